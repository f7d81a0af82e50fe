"""Several seeds, games or changes: seeds.py, games.py, ablations.py and symptoms.py of benchmarks/ do as they say."""

import csv
import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import ROOT
from torch.utils.tensorboard import SummaryWriter

sys.path.append(str(Path(__file__).resolve().parents[1] / "benchmarks"))
import ablations
import games
import plot
import seeds
import symptoms

PPO_CARTPOLE = ROOT / "ppo_cartpole.py"


def test_interquartile_mean_leaves_out_a_quarter_at_each_end():
    scores = np.array([[0.0, 1.0, 2.0, 100.0], [3.0, 4.0, 5.0, -100.0]])  # in order: -100, 0, 1, 2, 3, 4, 5, 100
    assert games.interquartile_mean(scores) == np.mean([1, 2, 3, 4])
    eighteen = np.arange(18.0).reshape(3, 6) ** 2
    assert games.interquartile_mean(eighteen) == np.mean(np.arange(4.0, 14.0) ** 2)
    assert games.interquartile_mean(np.stack([scores, scores + 1])).tolist() == [2.5, 3.5]


def test_interval_draws_seeds_within_each_game():
    """Games that differ widely, whose seeds agree, leave no doubt: another mix of games is not what is drawn."""
    assert games.interval(np.array([[1.0, 5.0, 30.0, 200.0]] * 3)).tolist() == [17.5, 17.5]
    scores = np.random.default_rng(1).normal([0.0, 1.0, 2.0, 3.0], 0.1, (3, 4))
    rng = np.random.default_rng(2)
    means = []
    for _ in range(4000):
        drawn = np.array([[rng.choice(scores[:, game]) for game in range(4)] for _ in range(3)])
        means.append(np.sort(drawn.ravel())[3:9].mean())
    assert games.interval(scores) == pytest.approx(np.percentile(means, [2.5, 97.5]), abs=0.005)


def test_table_and_picture(tmp_path, capsys):
    (tmp_path / "curves").mkdir()
    for game, scores in {"Pong": (20.0, 10.0, 18.0), "Qbert": (900.0, 1100.0, 4000.0)}.items():
        with open(tmp_path / f"{game}.csv", "w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(["env_id", "seed", "seconds", "mean_return", "human_normalized"])
            writer.writerows([game, i + 1, "" if i else 3600, score, score / 20] for i, score in enumerate(scores))
        with open(tmp_path / "curves" / f"{game}.csv", "w", newline="") as file:
            csv.writer(file).writerows([["run", "step", "value"], [1, 0, 0.0], [1, 100, 2.0]])
    files = [tmp_path / "Pong.csv", tmp_path / "Qbert.csv"]
    games.main(games.Args(files, out=tmp_path / "games.png"))
    out = capsys.readouterr().out
    assert "| Pong | 16.0 ± 5.3 | 20.0, 10.0, 18.0 | 3 | 0.80 | 60, –, – |" in out
    assert "| Qbert | 2,000.0 ± 1,734.9 | 900.0, 1,100.0, 4,000.0 | 2 | 100.00 | 60, –, – |" in out
    assert "3 seeds of each of 2 games" in out
    assert (tmp_path / "games.png").stat().st_size > 5000


def write(path, rows):
    with open(path, "w", newline="") as file:
        writer = csv.DictWriter(file, ["env_id", "seed", "seconds", "mean_return", "human_normalized"])
        writer.writeheader()
        writer.writerows(rows)
    return path


def test_the_interquartile_mean_that_is_printed(tmp_path, capsys):
    scores = {"Pong": (1.0, 0.5, 3.0), "Qbert": (45.0, 55.0, 200.0)}
    for game, values in scores.items():
        rows = [{"env_id": game, "seed": i, "mean_return": x, "human_normalized": x} for i, x in enumerate(values)]
        write(tmp_path / f"{game}.csv", rows)
    games.main(games.Args([tmp_path / "Pong.csv", tmp_path / "Qbert.csv"]))
    low, high = games.interval(np.array([*scores.values()]).T)
    line = f"scores: 26.00 ({low:.2f} to {high:.2f}, too narrow for so few seeds), 3 seeds of each of 2 games\n"
    assert line in capsys.readouterr().out  # the mean of 1, 3, 45 and 55


def test_games_that_cannot_be_compared(tmp_path, capsys):
    """One without published scores, and one with fewer seeds, still have their line."""
    pong = [{"env_id": "Pong", "seed": i, "mean_return": 20.0 + i, "human_normalized": 1.0} for i in (1, 2)]
    cartpole = [{"env_id": "CartPole-v1", "seed": 1, "mean_return": 500.0}]
    games.main(games.Args([write(tmp_path / "Pong.csv", pong), write(tmp_path / "CartPole.csv", cartpole)]))
    out = capsys.readouterr().out
    assert "| Pong | 21.5 ± 0.7 | 21.0, 22.0 | 1 | 1.00 | –, – |" in out
    assert "| CartPole-v1 | 500.0 | 500.0 | 1 | – | – |" in out
    assert "No interquartile mean" in out
    with pytest.raises(SystemExit, match="has no runs"):
        games.main(games.Args([write(tmp_path / "Empty.csv", [])]))


def test_a_row_is_of_its_own_seed(tmp_path, monkeypatch):
    """What is trained, how it is scored, and what the row says. Evaluation takes no time of `seconds`."""
    commands, clock = [], [100.0]
    score = {"env_id": "X-v0", "global_step": 768, "mean_return": 12.34567, "std_return": 1.2345, "truncated": 2}
    score |= {"human_normalized": 0.5, "returns": [20.0, 3.0, 7.0]}

    def execute(command, **_):
        commands.append(command := [*map(str, command)])
        if "--run-dir" in command:
            clock[0] += 7.25
            checkpoints = Path(command[command.index("--run-dir") + 1]) / "checkpoints"
            checkpoints.mkdir(parents=True)
            torch.save({"versions": {"threads": 3}}, checkpoints / "000000000768.pt")
        else:
            clock[0] += 1000
            Path(command[command.index("--json") + 1]).write_text(json.dumps(score))

    monkeypatch.setattr(seeds, "execute", execute)
    monkeypatch.setattr(seeds, "time", SimpleNamespace(time=lambda: clock[0]))
    monkeypatch.setattr(seeds, "first_reached", lambda run_dir, threshold: (512, 103.5))
    args = seeds.Args(PPO_CARTPOLE, [6, 7], "--gamma 0.9", threshold=[475], episodes=3, greedy=True)
    row = seeds.one_run(args, 7, tmp_path)
    training, scoring = commands
    assert training[1:] == ["--seed", "7", "--run-dir", str(tmp_path / "7"), "--gamma", "0.9"]
    assert scoring[1] == str(tmp_path / "7")
    assert scoring[scoring.index("--episodes") + 1] == "3"
    assert "--greedy" in scoring
    assert row == {
        **{"env_id": "X-v0", "seed": 7, "steps": 768, "seconds": 7.2, "steps_to_475": 512, "seconds_to_475": 3.5},
        **{"mean_return": 12.346, "std_return": 1.234, "human_normalized": 0.5, "min_return": 3.0},
        **{"truncated": 2, "threads": 3},
    }


def stub_runs(monkeypatch, scores):
    """one_run() returns a row with the score of its seed; without one, it fails. Returns the seeds that were run."""
    ran = []

    def one_run(args, seed, folder):
        ran.append(seed)
        if scores[seed] is None:
            raise RuntimeError("a loss is nan")
        reached = {"steps_to_475": scores[seed] * 10 if seed != 2 else None} if args.threshold else {}
        return {"seed": seed, "mean_return": scores[seed], **reached}

    monkeypatch.setattr(seeds, "one_run", one_run)
    monkeypatch.setattr(seeds.signal, "signal", lambda *_: None)  # the tests keep their own Ctrl-C
    return ran


def read(file, *columns):
    return [tuple(row[name] for name in columns) for row in csv.DictReader(open(file))]


def test_seeds_prints_the_spread_over_seeds_and_writes_a_row_of_each(tmp_path, monkeypatch, capsys):
    stub_runs(monkeypatch, {1: 40.0, 2: 20.0, 3: 30.0})
    file = tmp_path / "x.csv"
    seeds.main(seeds.Args(Path("ppo_cartpole.py"), [3, 1, 2], "--gamma 0.9", threshold=[475], greedy=True, csv=file))
    out = capsys.readouterr().out
    assert "30.00 ± 10.00 over 3 seeds, lowest 20.00" in out
    assert "475 reached after 400 steps (median), inf at most" in out
    command = "ppo_cartpole.py --gamma 0.9"
    rows = read(file, "seed", "mean_return", "steps_to_475", "episodes", "greedy", "command")
    of_all = ("100", "True", command)
    assert rows == [("1", "40.0", "400.0", *of_all), ("2", "20.0", "", *of_all), ("3", "30.0", "300.0", *of_all)]


def test_rows_are_in_the_order_of_their_seeds_and_a_score_of_zero_is_one(tmp_path, monkeypatch):
    file, ran = tmp_path / "x.csv", stub_runs(monkeypatch, {2: 0.0, 10: 40.0})
    for _ in range(2):
        seeds.main(seeds.Args(PPO_CARTPOLE, [10, 2], csv=file, keep=tmp_path))
    assert read(file, "seed", "mean_return") == [("2", "0.0"), ("10", "40.0")]
    assert ran == [10, 2]


def test_a_seed_that_fails_is_reported_and_costs_no_other_one(tmp_path, monkeypatch, capsys):
    ran, file = stub_runs(monkeypatch, {1: 40.0, 2: None, 3: 30.0}), tmp_path / "x.csv"
    with pytest.raises(SystemExit, match="1 of 3 seeds failed"):
        seeds.main(seeds.Args(PPO_CARTPOLE, [1, 2, 3], csv=file))
    assert ran == [1, 2, 3]
    assert read(file, "seed", "mean_return") == [("1", "40.0"), ("2", ""), ("3", "30.0")]
    said = capsys.readouterr()
    assert "seed 2 failed: a loss is nan" in said.err
    assert "35.00 ± 7.07 over 2 seeds" in said.out
    with pytest.raises(SystemExit, match="a seed that failed"):
        games.main(games.Args([file]))


def test_a_run_that_fails_takes_no_score_away(tmp_path, monkeypatch):
    file, scores = tmp_path / "x.csv", {1: 40.0, 2: None}
    stub_runs(monkeypatch, scores)
    for after in ({1: None, 2: 30.0}, {}):
        with pytest.raises(SystemExit, match="1 of 2 seeds failed"):
            seeds.main(seeds.Args(PPO_CARTPOLE, [1, 2], csv=file))
        scores |= after
    assert read(file, "seed", "mean_return") == [("1", "40.0"), ("2", "30.0")]


@pytest.mark.parametrize("score", [40.0, None])
def test_a_script_that_is_edited_while_it_trains_gets_no_row(score, tmp_path, monkeypatch):
    file, script = tmp_path / "x.csv", Path(shutil.copy(PPO_CARTPOLE, tmp_path / "mine.py"))
    stub_runs(monkeypatch, {1: 40.0, 2: score})
    one_run = seeds.one_run

    def edit(args, seed, folder):
        if seed == 2:
            script.write_text(script.read_text() + "# another\n")
        return one_run(args, seed, folder)

    monkeypatch.setattr(seeds, "one_run", edit)
    with pytest.raises(SystemExit, match="was edited while seed 2 ran"):
        seeds.main(seeds.Args(script, [1, 2, 3], csv=file))
    assert read(file, "seed") == [("1",)]


def test_a_csv_of_another_kind_is_put_aside(tmp_path, monkeypatch):
    stub_runs(monkeypatch, {1: 40.0})
    file = Path(shutil.copy(ROOT / "benchmarks" / "curves_breakout.csv", tmp_path / "x.csv"))
    kept = file.read_text()
    seeds.main(seeds.Args(PPO_CARTPOLE, [1], csv=file))
    assert read(file, "seed") == [("1",)]
    assert (tmp_path / "x.csv.old").read_text() == kept


def test_seeds_adds_to_the_rows_of_its_command(tmp_path, monkeypatch, capsys):
    file, scores = tmp_path / "x.csv", dict.fromkeys(range(1, 5), 40.0)
    ran = stub_runs(monkeypatch, scores)
    seeds.main(seeds.Args(PPO_CARTPOLE, [1, 2], csv=file))
    scores[2] = 50.0
    seeds.main(seeds.Args(PPO_CARTPOLE, [2, 3], csv=file))
    assert read(file, "seed", "mean_return") == [("1", "40.0"), ("2", "50.0"), ("3", "40.0")]
    assert "43.33 ± 5.77 over 3 seeds" in capsys.readouterr().out
    seeds.main(seeds.Args(PPO_CARTPOLE, [1, 4], csv=file, keep=tmp_path))  # goes on: what has a score is not repeated
    assert ran == [1, 2, 2, 3, 4]


def test_rows_that_another_process_adds_meanwhile_stay(tmp_path, monkeypatch):
    file = tmp_path / "x.csv"
    stub_runs(monkeypatch, {1: 40.0, 2: 40.0, 9: 40.0})
    one_run = seeds.one_run

    def beside(args, seed, folder):
        if seed == 2:
            seeds.main(seeds.Args(PPO_CARTPOLE, [9], csv=file))
        return one_run(args, seed, folder)

    monkeypatch.setattr(seeds, "one_run", beside)
    seeds.main(seeds.Args(PPO_CARTPOLE, [1, 2], csv=file))
    assert read(file, "seed") == [("1",), ("2",), ("9",)]


def test_rows_survive_a_write_that_fails(tmp_path, monkeypatch):
    file = tmp_path / "x.csv"
    stub_runs(monkeypatch, {1: 40.0, 2: 40.0})
    seeds.main(seeds.Args(PPO_CARTPOLE, [1], csv=file))

    def full_disk(*_):
        raise OSError

    monkeypatch.setattr(csv.DictWriter, "writerows", full_disk)
    with pytest.raises(OSError):
        seeds.main(seeds.Args(PPO_CARTPOLE, [2], csv=file))
    assert read(file, "seed") == [("1",)]


@pytest.mark.parametrize("changed", ["script", "flags", "greedy", "episodes", "threshold"])
def test_rows_of_another_command_are_put_aside_when_the_first_row_is_written(changed, tmp_path, monkeypatch, capsys):
    script, file, scores = tmp_path / "mine.py", tmp_path / "x.csv", dict.fromkeys(range(1, 5), 40.0)
    script.write_text("1")
    stub_runs(monkeypatch, scores)
    seeds.main(seeds.Args(script, [1], csv=file))
    kept, other = file.read_text(), {"flags": "--gamma 0.9", "greedy": True, "episodes": 9, "threshold": [475]}
    if changed == "script":
        script.write_text("2")
    args = seeds.Args(script, [4], csv=file, **({changed: other[changed]} if changed in other else {}))
    run, scores[4] = seeds.one_run, 40.0

    def refused(*_):
        sys.exit("the flags are wrong")

    monkeypatch.setattr(seeds, "one_run", refused)
    with pytest.raises(SystemExit):
        seeds.main(args)
    assert file.read_text() == kept
    monkeypatch.setattr(seeds, "one_run", run)
    for name in ("x.csv.old", "x.csv.old1"):
        seeds.main(args)
        assert read(file, "seed") == [("4",)]
        assert (tmp_path / name).read_text() == kept
        assert "had rows of another command" in capsys.readouterr().out
        file.write_text(kept)


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM", "SIGHUP"])
def test_a_signal_ends_the_training_too_and_the_same_command_goes_on(name, tmp_path):
    """It is killed: saving would make it another run."""
    sleeper = tmp_path / "sleeper.py"
    sleeper.write_text("import os, pathlib, time\npathlib.Path('pid').write_text(str(os.getpid()))\ntime.sleep(60)")
    command = [sys.executable, ROOT / "benchmarks" / "seeds.py", "--script", sleeper.name, "--keep", "kept"]
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)

    def heed():  # also where the tests run under nohup
        signal.signal(getattr(signal, name), signal.SIG_DFL)

    process = subprocess.Popen(command, cwd=tmp_path, preexec_fn=heed, **pipes)
    try:
        while not (tmp_path / "pid").exists() or not (pid := (tmp_path / "pid").read_text()):
            assert process.poll() is None, process.stderr.read()
            time.sleep(0.1)
        process.send_signal(getattr(signal, name))
        _, said = process.communicate(timeout=30)
    finally:
        process.kill()
    assert "seeds.py: stopped; the same command goes on." in said
    assert process.returncode == 128 + getattr(signal, name)
    with pytest.raises(ProcessLookupError):
        os.kill(int(pid), 0)


def test_what_nohup_ignores_stays_ignored(monkeypatch):
    monkeypatch.setattr(seeds, "one_run", lambda *_: {"seed": 1, "mean_return": 4.0})
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGHUP)}
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        seeds.main(seeds.Args(PPO_CARTPOLE, [1]))
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def test_seeds_go_on_where_they_were(tmp_path, monkeypatch):
    """Also when the second of two commands was cut off: the first, which the run would now refuse, is not repeated."""
    crash, commands, execute = [True], [], seeds.execute

    def crashing(command, **options):
        script = "evaluate.py" if "evaluate.py" in str(command[0]) else "train"
        commands.append([script, *map(str, command[1:])])
        execute(command, **options)
        if "--resume" in command and crash.pop():
            raise KeyboardInterrupt

    monkeypatch.setattr(seeds, "execute", crashing)
    args = seeds.Args(PPO_CARTPOLE, [1], "--total-timesteps 300", "--total-timesteps 600 --ent-coef 0.01", episodes=2)
    with pytest.raises(KeyboardInterrupt):
        seeds.one_run(args, 1, tmp_path)
    crash.append(False)
    row = seeds.one_run(args, 1, tmp_path)
    assert [command[0] for command in commands] == ["train", "train", "train", "evaluate.py"]
    assert "--resume" in commands[2]
    assert (row["env_id"], row["seed"], row["steps"], row["seconds"]) == ("CartPole-v1", 1, 768, None)
    assert row["human_normalized"] is None
    for changed in ({"flags": "--total-timesteps 300 --gamma 0.9"}, {"then": "--total-timesteps 900"}):
        with pytest.raises(SystemExit, match="was trained with other flags"):
            seeds.one_run(dataclasses.replace(args, **changed), 1, tmp_path)
    with pytest.raises(SystemExit, match="was trained further"):
        seeds.one_run(dataclasses.replace(args, then=None), 1, tmp_path)
    assert len(commands) == 4


def test_a_full_disk_after_a_training_makes_no_run_with_other_flags_of_it(tmp_path, monkeypatch):
    args, write_text = seeds.Args(PPO_CARTPOLE, [1], "--total-timesteps 300", episodes=2), Path.write_text

    def full_disk(path, text):
        write_text(path, "")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_text", full_disk)
    monkeypatch.setattr(seeds, "execute", lambda *_, **__: (tmp_path / "1").mkdir())
    with pytest.raises(OSError):
        seeds.one_run(args, 1, tmp_path)
    monkeypatch.undo()
    assert seeds.one_run(args, 1, tmp_path)["steps"] == 512


def test_seeds_scores_with_the_script_that_it_trained(tmp_path):
    """A copy elsewhere under the same name, whose episodes end after 7 steps."""
    source = (ROOT / "ppo_cartpole.py").read_text()
    copy = tmp_path / "ppo_cartpole.py"
    copy.write_text(source.replace("gym.make(args.env_id", "gym.make(args.env_id, max_episode_steps=7"))
    assert copy.read_text() != source
    args = seeds.Args(copy, [1], "--total-timesteps 300", episodes=1, threshold=[475])
    row = seeds.one_run(args, 1, tmp_path / "runs")
    assert (row["mean_return"], row["std_return"], row["steps_to_475"]) == (7, None, None)


def test_seeds_refuses_what_it_would_lose_before_it_trains(tmp_path, monkeypatch):
    monkeypatch.setattr(seeds, "one_run", lambda *_: pytest.fail("has trained"))
    for flags in ("--seed 9", "--gamma 0.9 --run_dir=x"):
        with pytest.raises(SystemExit, match="is set for each run"):
            seeds.main(seeds.Args(PPO_CARTPOLE, [1], flags))
    for wrong, said in (
        ({"csv": tmp_path / "none" / "x.csv"}, "cannot be written: No such file"),
        ({"csv": tmp_path}, "cannot be written: Is a directory"),
        ({"flags": "--exp-name 'my"}, "cannot be read: No closing quotation"),
        ({"seeds": [1, 2, 1]}, "each once"),
        ({"seeds": []}, "at least one"),
        ({"episodes": 0}, "--episodes of at least 1"),
        ({"script": tmp_path / "none.py"}, "none.py is neither"),
    ):
        with pytest.raises(SystemExit, match=said):
            seeds.main(seeds.Args(**{"script": PPO_CARTPOLE, "seeds": [1]} | wrong))


def test_seeds_ends_where_the_script_refuses_its_flags(tmp_path, monkeypatch, capfd):
    monkeypatch.setattr(seeds.signal, "signal", lambda *_: None)
    with pytest.raises(SystemExit, match="refuses its flags"):
        seeds.main(seeds.Args(PPO_CARTPOLE, [1, 2], "--gamma 2", keep=tmp_path))
    assert capfd.readouterr().err.count("--gamma must be between 0 and 1") == 1


def test_no_episode_has_ended(tmp_path):
    with SummaryWriter(tmp_path) as writer:
        writer.add_scalar("charts/SPS", 1, 1)
    assert seeds.first_reached(tmp_path, 475) == (None, None)


def test_first_reached_is_the_last_of_twenty_episodes(tmp_path):
    """25 episodes without a point, then 10 points each: ten of these bring the mean of 20 to 5."""
    with SummaryWriter(tmp_path) as writer:
        for i in range(60):
            writer.add_scalar("charts/episodic_return", 10 * (i >= 25), 100 * i, walltime=5000 + i)
    assert seeds.first_reached(tmp_path, 0) == (1900, 5019)
    assert seeds.first_reached(tmp_path, 5) == (3400, 5034)
    assert seeds.first_reached(tmp_path, 10) == (4400, 5044)
    assert seeds.first_reached(tmp_path, 10.1) == (None, None)


def test_a_curve_is_the_running_mean_at_the_last_step_of_each_window(tmp_path):
    for name, slope, count in (("1", 1.0, 12), ("2", 3.0, 12), ("3", 8.0, 10)):  # --mean ends where the shortest does
        with SummaryWriter(tmp_path / name) as writer:
            for i in range(count):
                writer.add_scalar("charts/episodic_return", slope * i, 10 * i)
    runs = [tmp_path / name for name in "123"]
    plot.main(plot.Args(runs, window=3, mean=True, out=tmp_path / "x.png", csv=tmp_path / "x.csv"))
    (axes,) = plot.pyplot.gcf().axes
    steps, values = axes.lines[0].get_data()
    assert steps[[0, -1]].tolist() == [20, 90]
    assert values == pytest.approx(4 * (steps / 10 - 1))
    band = axes.collections[0].get_paths()[0].vertices
    ends = [band[band[:, 0] == step, 1] for step in (20, 90)]
    assert [(min(y), max(y)) for y in ends] == [(1, 8), (8, 64)]  # all resampled runs the lowest, the highest: 1 in 27
    curve = plot.load(tmp_path / "x.csv", None)["1"]
    assert curve.tolist() == [list(range(20, 120, 10)), list(range(1, 11))]


def test_plot_keeps_curves_of_the_same_name_apart(tmp_path):
    for folder, value in (("a", 1.0), ("b", 2.0), ("c/b", 3.0)):
        with SummaryWriter(tmp_path / folder / "1") as writer:
            for step in range(30):
                writer.add_scalar("charts/episodic_return", value, step)
    runs = [tmp_path / "a" / "1", tmp_path / "b" / "1"]
    plot.main(plot.Args(runs, out=tmp_path / "x.png", csv=tmp_path / "x.csv"))
    rows = list(csv.DictReader(open(tmp_path / "x.csv")))
    assert {(row["run"], float(row["value"])) for row in rows} == {("1", 1.0), ("b/1", 2.0)}
    with pytest.raises(SystemExit, match="two curves are called b/1"):
        plot.main(plot.Args([*runs, tmp_path / "c" / "b" / "1"], out=tmp_path / "x.png"))


def test_plot_refuses_what_it_cannot_draw_in_one_sentence(tmp_path):
    for run, flags, said in (
        (ROOT / "benchmarks" / "cartpole.csv", {}, r"cartpole\.csv has no curves"),
        (tmp_path / "none", {}, "does not exist"),
        (tmp_path, {"window": 0}, "--window must be"),
        (tmp_path, {"out": tmp_path / "none" / "x.png"}, "a folder that exists"),
        (tmp_path, {"out": tmp_path / "x.txt"}, "and --out a .png"),
    ):
        with pytest.raises(SystemExit, match=said):
            plot.main(plot.Args([run], **{"out": tmp_path / "x.png"} | flags))


def test_seeds_does_not_take_one_script_for_another(tmp_path):
    (tmp_path / "1").mkdir()
    (tmp_path / "1" / "script.py").write_text("print('the original')")
    with pytest.raises(SystemExit, match="trained by another script than"):
        seeds.one_run(seeds.Args(PPO_CARTPOLE, [1]), 1, tmp_path)


def test_ablations_compares_each_change(tmp_path, monkeypatch, capsys):
    as_it_is = "--total-timesteps 600"
    monkeypatch.setattr(ablations, "CHANGES", {"as it is": as_it_is, "diverges": f"{as_it_is} --learning-rate 1e38"})
    monkeypatch.setattr(ablations, "score_of", lambda *_, **options: {"mean_return": float(options["episodes"])})
    ablations.main(ablations.Args(["as it is", "diverges"], [1], csv=tmp_path / "rows.csv"))
    out = capsys.readouterr().out
    assert "| as it is | 100.0, 100.0 | 0 of 1 |" in out
    assert "| diverges | none; 1 failed | 0 of 1 |" in out
    rows = list(csv.DictReader(open(tmp_path / "rows.csv")))
    assert [(row["change"], row["seed"]) for row in rows] == [("as it is", "1"), ("diverges", "1")]
    assert "nan" in rows[1]["error"]


def test_changes_of_ablations_and_symptoms_fit_the_scripts():
    cases = [("ppo_cartpole.py", change) for change in ablations.CHANGES.values()]
    cases += [(script, broken) for script, _, broken, _ in symptoms.CASES.values()]
    for script, change in cases:
        if not isinstance(change, str):
            assert (ROOT / script).read_text().count(change[0]) == 1, change
