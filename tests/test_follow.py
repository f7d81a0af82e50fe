"""evaluate.py --follow: each checkpoint is scored once, the best is kept, and training is left alone."""

import fcntl
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
import tyro
from conftest import ROOT, train
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import evaluate
import ppo_cartpole

STEPS = [256, 512, 768]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run with three checkpoints."""
    return train(ppo_cartpole, tmp_path_factory.mktemp("finished"), total_timesteps=768, save_freq=256)


@pytest.fixture
def run_dir(finished, tmp_path):
    return Path(shutil.copytree(finished, tmp_path / "run"))


@pytest.fixture(autouse=True)
def nice(monkeypatch):
    """An impatient --follow that leaves the priority of the tests alone. Gives the priorities it asked for."""
    asked = []
    monkeypatch.setattr(os, "nice", asked.append)
    monkeypatch.setattr(evaluate, "PATIENCE", 0.5)
    return asked


@pytest.fixture
def play(monkeypatch):
    """play(10, 30): the next checkpoints score 10 and 30. An exception among them is raised instead.

    A number more or less than is asked for fails the test.
    """
    returns = []

    def fake(envs, agent, episodes, greedy, bar, screen=None):
        value = returns.pop(0)
        if not isinstance(value, int):
            raise value
        return [float(value + i % 2) for i in range(episodes)], [1] * episodes, [False] * episodes

    monkeypatch.setattr(evaluate, "play", fake)
    yield lambda *values: returns.extend(values)
    assert not returns


def age(run_dir):
    """Let the last sign of life be long ago."""
    for path in run_dir.glob("events.*"):
        os.utime(path, (0, 0))


def follow(run_dir, **flags):
    """What `evaluate.py RUN --follow` gives, with two episodes; its exit code."""
    age(run_dir)
    return evaluate.follow(run_dir, evaluate.Args(str(run_dir), follow=True, **{"episodes": 2} | flags))


def checkpoint(run_dir, step):
    return run_dir / "checkpoints" / f"{step:012d}.pt"


def curve(run_dir):
    """{step: value} of eval/episodic_return. No point may be there twice."""
    points = EventAccumulator(str(run_dir / "eval")).Reload().Scalars("eval/episodic_return")
    assert len({point.step for point in points}) == len(points)
    return {point.step: point.value for point in points}


def test_each_checkpoint_is_scored_and_the_best_is_kept(run_dir, play, capsys):
    play(10, 30, 20, 25)
    assert follow(run_dir) == 0
    first, *lines, last = capsys.readouterr().out.splitlines()
    assert str(run_dir) in first
    for i, (step, value, best) in enumerate(
        [(256, 10, "this one"), (512, 30, "this one"), (768, 20, "that after 512")]
    ):
        head, score, so_far = lines[3 * i : 3 * i + 3]
        assert head.startswith(f"{checkpoint(run_dir, step)}: CartPole-v1 after {step} steps, 2 episodes")
        assert score.startswith(f"return {value + 0.5:.2f} ± 0.71 (std) over 2 episodes, 95% interval")
        assert so_far.startswith(f"best so far: {best}")
    assert (run_dir / "best.pt").samefile(checkpoint(run_dir, 512))
    assert curve(run_dir) == {256: 10.5, 512: 30.5, 768: 20.5}
    best, again, head = lines[9:]
    assert best.startswith("Best of 3: 30.50 after 512 steps")
    assert "scored too high" in again
    assert head.startswith(f"{run_dir / 'best.pt'}: ")
    assert last.startswith("return 25.50")
    command = shlex.split(again[again.index("python ") :])
    assert command[2:] == [str(run_dir / "best.pt"), "--episodes", "2", "--seed", "2"]


def test_the_last_command_scores_the_best_on_fresh_seeds(run_dir, tmp_path, capsys):
    """The same score as the last line has, from seeds that no checkpoint was chosen on, with the same flags."""
    (tmp_path / "my idea").mkdir()
    script = shutil.copy(ROOT / "ppo_cartpole.py", tmp_path / "my idea")
    assert follow(run_dir, greedy=True, script=str(script), num_envs=1, cuda=True) == 0
    *_, again, _, last = capsys.readouterr().out.splitlines()
    arguments = shlex.split(again[again.index("python ") :])[2:]
    assert arguments[-5:] == ["--cuda", "--script", str(script), "--num-envs", "1"]
    evaluate.main(tyro.cli(evaluate.Args, args=[*arguments, "--json", str(tmp_path / "score.json")]))
    assert capsys.readouterr().out.splitlines()[-1] == last
    result = json.loads((tmp_path / "score.json").read_text())
    assert (result["seed"], result["greedy"], result["episodes"]) == (2, True, 2)
    scored = [json.loads(line) for line in (run_dir / "eval" / "scores.jsonl").read_text().splitlines()]
    assert [(one["global_step"], one["seed"], one["greedy"]) for one in scored] == [(step, 1, True) for step in STEPS]


def test_follow_scores_as_all_does(run_dir, tmp_path, capsys):
    for file, flags in {"follow.json": {"follow": True}, "all.json": {"all": True}}.items():
        evaluate.main(evaluate.Args(str(run_dir), episodes=3, json=str(tmp_path / file), **flags))
    followed, scored = (json.loads((tmp_path / file).read_text()) for file in ("follow.json", "all.json"))
    *followed, fresh = followed
    assert followed == scored
    assert [one["global_step"] for one in scored] == STEPS
    assert (fresh["checkpoint"], fresh["seed"]) == (str(run_dir / "best.pt"), 2)


def test_a_checkpoint_that_lies_elsewhere_is_kept_itself_not_its_symbolic_link(run_dir, play):
    best, elsewhere = checkpoint(run_dir, 768), run_dir.with_name("disk") / "moved.pt"
    elsewhere.parent.mkdir()
    best.rename(elsewhere)
    best.symlink_to(elsewhere)
    play(10, 20, 30, 25)
    assert follow(run_dir) == 0
    assert not (run_dir / "best.pt").is_symlink()
    assert (run_dir / "best.pt").read_bytes() == elsewhere.read_bytes()


def test_where_the_file_system_has_no_hard_links_best_is_a_copy(run_dir, play, monkeypatch):
    """And what a killed process left behind, a link to another checkpoint, is not written to."""
    os.link(checkpoint(run_dir, 256), run_dir / "best.tmp")
    before = {step: checkpoint(run_dir, step).read_bytes() for step in STEPS}

    def refuse(*_):
        raise PermissionError

    monkeypatch.setattr(Path, "hardlink_to", refuse)
    play(10, 20, 30, 25)
    assert follow(run_dir) == 0
    assert not (run_dir / "best.pt").samefile(checkpoint(run_dir, 768))
    assert (run_dir / "best.pt").read_bytes() == before[768]
    assert {step: checkpoint(run_dir, step).read_bytes() for step in STEPS} == before
    assert not (run_dir / "best.tmp").exists()
    play(35)  # a copy is known for the checkpoint it is, too
    assert follow(run_dir) == 0

    os.link(checkpoint(run_dir, 256), run_dir / "best.tmp")
    monkeypatch.setattr(Path, "unlink", lambda *_, **__: None)  # another process has made it again
    with pytest.raises(FileExistsError):
        evaluate.keep_best(checkpoint(run_dir, 512), run_dir / "best.pt")
    assert checkpoint(run_dir, 256).read_bytes() == before[256]


def test_stopped_by_ctrl_c_it_ends_with_what_it_has_and_goes_on_there(run_dir, play, capsys):
    play(10, KeyboardInterrupt)
    assert follow(run_dir) == 130
    again = capsys.readouterr().out.splitlines()[-1]
    assert f"evaluate.py {run_dir / 'best.pt'} --episodes 2 --seed 2" in again.replace(sys.argv[0], "evaluate.py")
    assert (run_dir / "best.pt").samefile(checkpoint(run_dir, 256))
    play(5, 7, 11)
    assert follow(run_dir) == 0
    out = capsys.readouterr().out
    assert str(checkpoint(run_dir, 256)) not in out
    assert out.count("best so far: that after 256 steps") == 2
    assert out.count("best so far") == 2  # nothing about the one that is known
    assert "Best of 3: 10.50 after 256 steps" in out
    assert curve(run_dir) == {256: 10.5, 512: 5.5, 768: 7.5}
    play(12)  # with nothing new, only the best is scored again
    assert follow(run_dir, json=str(run_dir / "scores.json")) == 0
    assert [one["mean_return"] for one in json.loads((run_dir / "scores.json").read_text())] == [10.5, 5.5, 7.5, 12.5]
    assert curve(run_dir) == {256: 10.5, 512: 5.5, 768: 7.5}


def test_ctrl_c_before_the_first_score_ends_it_as_any_evaluation(run_dir, play):
    play(KeyboardInterrupt)
    with pytest.raises(KeyboardInterrupt):
        follow(run_dir)
    assert not (run_dir / "best.pt").exists()


OTHER_SCRIPT = {"script": str(ROOT / "ppo_cartpole.py")}


@pytest.mark.parametrize("flags", [{"greedy": True}, {"seed": 2}, {"episodes": 4}, {"num_envs": 1}, OTHER_SCRIPT])
def test_other_flags_score_everything_again(flags, run_dir, play):
    play(10, 30, 20, 25)
    follow(run_dir)
    play(12, 40, 13, 20)  # best.pt first
    follow(run_dir, **flags)
    assert (run_dir / "best.pt").samefile(checkpoint(run_dir, 256))
    assert curve(run_dir) == {512: 12.5, 256: 40.5, 768: 13.5}
    play(25)
    follow(run_dir)  # as at first, of which all is known
    assert (run_dir / "best.pt").samefile(checkpoint(run_dir, 512))
    assert curve(run_dir) == {256: 10.5, 512: 30.5, 768: 20.5}


def test_an_edited_script_scores_everything_again(run_dir, play, tmp_path, capsys):
    script = shutil.copy(ROOT / "ppo_cartpole.py", tmp_path)
    play(10, 30, 20, 25)
    follow(run_dir, script=str(script))
    with open(script, "a") as file:
        file.write("# edited\n")
    play(12, 40, 13, 20)
    follow(run_dir, script=str(script))
    assert curve(run_dir) == {512: 12.5, 256: 40.5, 768: 13.5}
    assert "Best of 3: 40.50 after 256 steps" in capsys.readouterr().out.splitlines()[-4]


def test_it_waits_for_a_run_that_is_resumed_a_moment_later(run_dir, play, monkeypatch):
    monkeypatch.setattr(evaluate, "PATIENCE", 3)
    os.replace(checkpoint(run_dir, 768), run_dir / "later.pt")
    timer = threading.Timer(1.5, os.replace, (run_dir / "later.pt", checkpoint(run_dir, 768)))
    timer.start()
    play(10, 30, 20, 25)
    assert follow(run_dir) == 0
    timer.join()
    assert curve(run_dir)[768] == 20.5


def test_the_best_outlives_its_checkpoint(run_dir, play, capsys):
    play(10, 30, KeyboardInterrupt)
    assert follow(run_dir) == 130
    held = checkpoint(run_dir, 512).read_bytes()
    checkpoint(run_dir, 512).unlink()
    play(20, 25)
    assert follow(run_dir) == 0
    assert "Best of 3: 30.50 after 512 steps" in capsys.readouterr().out
    play(90, 80, 70, 85)  # with other flags it takes part, too, and is not lost
    assert follow(run_dir, greedy=True) == 0
    assert (run_dir / "best.pt").read_bytes() == held


def test_a_best_that_was_deleted_with_its_checkpoint_is_no_longer_the_best(run_dir, play, capsys):
    play(10, 30, 20, 25)
    follow(run_dir)
    (run_dir / "best.pt").unlink()
    checkpoint(run_dir, 512).unlink()
    play(25)
    assert follow(run_dir) == 0
    assert (run_dir / "best.pt").samefile(checkpoint(run_dir, 768))


def test_a_checkpoint_that_was_replaced_is_scored_again(run_dir, play):
    """A run that was started anew in its folder writes other checkpoints by the same names."""
    play(10, 20, 30, 25)
    follow(run_dir)
    path = checkpoint(run_dir, 256)
    content = evaluate.load_checkpoint(path) | {"optimizer": {}}
    path.unlink()
    torch.save(content, path)
    play(40, 25)
    follow(run_dir)
    assert (run_dir / "best.pt").samefile(path)


def test_a_line_that_was_cut_short_is_scored_again(run_dir, play):
    play(10, 20, 30, 25)
    follow(run_dir)
    file = run_dir / "eval" / "scores.jsonl"
    file.write_text("3\n" + file.read_text()[:-100])
    play(30, 25)
    assert follow(run_dir) == 0
    play(25)  # only the best on fresh seeds: the new line is whole
    assert follow(run_dir) == 0


def test_each_score_is_written_before_the_next_checkpoint_is_played(run_dir, play, monkeypatch):
    """So kill -9 loses none."""
    score, written = evaluate.score, []

    def count_and_score(*arguments):
        written.append((run_dir / "eval" / "scores.jsonl").read_text().count("\n"))
        return score(*arguments)

    monkeypatch.setattr(evaluate, "score", count_and_score)
    play(10, 20, 30, 25)
    assert follow(run_dir) == 0
    assert written == [0, 1, 2, 3]


def test_of_equal_scores_the_first_stays_the_best(run_dir, play):
    play(10, 30, 30, 25)
    assert follow(run_dir) == 0
    assert (run_dir / "best.pt").samefile(checkpoint(run_dir, 512))


def test_fresh_seeds_begin_anew_after_the_largest_one(run_dir, play, capsys):
    play(10, 20, 30, 25)
    assert follow(run_dir, seed=2**32 - 1) == 0
    assert "--seed 0\n" in capsys.readouterr().out


def test_checkpoints_that_are_deleted_meanwhile_are_left_out(run_dir, play, monkeypatch):
    play(10, 20, 25)
    score = evaluate.score

    def score_and_prune(*arguments):
        checkpoint(run_dir, 512).unlink(missing_ok=True)
        return score(*arguments)

    monkeypatch.setattr(evaluate, "score", score_and_prune)
    assert follow(run_dir) == 0
    assert curve(run_dir) == {256: 10.5, 768: 20.5}


def test_what_a_run_saves_at_its_very_end_is_scored(run_dir, play, monkeypatch):
    monkeypatch.setattr(evaluate, "PATIENCE", -1)  # the first look after the end is the last one
    shutil.move(checkpoint(run_dir, 768), run_dir / "last.pt")

    def end(run_dir):
        if (run_dir / "last.pt").exists():
            shutil.move(run_dir / "last.pt", checkpoint(run_dir, 768))
        return False

    monkeypatch.setattr(evaluate, "is_running", end)
    play(10, 20, 30, 25)
    assert follow(run_dir) == 0
    assert curve(run_dir)[768] == 30.5


def test_it_waits_for_a_run_to_start_and_for_its_lock_to_be_free(finished, tmp_path, play, monkeypatch):
    """A folder that is made a moment later, and checkpoints that come long after each other."""
    monkeypatch.setattr(evaluate, "PATIENCE", 1.5)
    run_dir, held = tmp_path / "later", []

    def write_slowly():
        time.sleep(0.3)
        training = ppo_cartpole.Run(ppo_cartpole.Args(run_dir=str(run_dir)))
        for step in STEPS:
            time.sleep(1.8)
            held.append(step)
            os.replace(shutil.copy(checkpoint(finished, step), tmp_path / "unfinished.pt"), checkpoint(run_dir, step))
        training.lock.close()

    thread = threading.Thread(target=write_slowly)
    thread.start()
    play(10, 30, 20, 25)
    assert follow(run_dir) == 0
    thread.join()
    assert curve(run_dir) == {256: 10.5, 512: 30.5, 768: 20.5}


def test_a_run_that_is_killed_is_followed_to_its_end(tmp_path, play, monkeypatch, capsys):
    command = [sys.executable, ROOT / "ppo_cartpole.py", "--run-dir", "run", "--total-timesteps", "10000000"]
    run_dir, log = tmp_path / "run", open(tmp_path / "log.txt", "w")
    training = subprocess.Popen([*command, "--save-freq", "1024"], cwd=tmp_path, stdout=log, stderr=log)
    try:
        while not list(run_dir.glob("checkpoints/*.pt")):
            assert training.poll() is None, (tmp_path / "log.txt").read_text()
            time.sleep(0.1)
        score, scored = evaluate.score, []

        def score_and_kill(path, args):
            scored.append(path)
            if len(scored) == 2:
                training.kill()
                training.wait()
            return score(path, args)

        monkeypatch.setattr(evaluate, "score", score_and_kill)
        monkeypatch.setattr(evaluate, "play", lambda *_: ([1.0, 2.0], [1, 2], [False, False]))
        assert follow(run_dir) == 0
    finally:
        training.kill()
        training.wait()
    assert training.returncode == -signal.SIGKILL
    assert sorted(set(scored)) == sorted([run_dir / "best.pt", *evaluate.list_checkpoints(run_dir)])
    assert len(scored) >= 3


def test_a_run_goes_on_where_its_lock_is_held_or_its_curves_are_fresh(run_dir, monkeypatch):
    age(run_dir)
    assert not evaluate.is_running(run_dir)
    assert not evaluate.is_running(run_dir / "nothing")
    training = ppo_cartpole.Run(ppo_cartpole.Args(run_dir=str(run_dir), total_timesteps=768, save_freq=256))

    def forbidden(*_):
        pytest.fail("the lock was tried: a run that starts just then would be refused")

    for name in ("flock", "lockf", "fcntl"):
        monkeypatch.setattr(fcntl, name, forbidden)
    assert evaluate.is_running(run_dir)
    training.lock.close()
    assert not evaluate.is_running(run_dir)
    os.utime(next(run_dir.glob("events.*")))  # a run on another machine
    assert evaluate.is_running(run_dir)
    time.sleep(0.6)
    assert not evaluate.is_running(run_dir)


def test_the_lock_of_another_file_is_not_taken_for_that_of_the_run(run_dir, monkeypatch):
    age(run_dir)
    (run_dir / ".lock").touch()
    number, read_text = (run_dir / ".lock").stat().st_ino, Path.read_text
    for inode, running in ((number, True), (f"{number}7", False), (f"7{number}", False)):
        locks = f"1: FLOCK  ADVISORY  WRITE 99 00:2b:{inode} 0 EOF\n"
        monkeypatch.setattr(Path, "read_text", lambda path, x=locks: x if path.name == "locks" else read_text(path))
        assert evaluate.is_running(run_dir) == running


def test_training_goes_first(run_dir, play, nice, monkeypatch):
    """Also a training in another terminal, which Linux would otherwise give an equal share."""
    group = Path("/proc/self/autogroup")
    before = group.read_text() if group.exists() else ""  # empty: no such group
    asked, follow = [], evaluate.follow

    def follow_and_look(*args):
        asked.extend((torch.get_num_threads(), group.read_text().split()[-1] if before else "19"))
        time.sleep(0.3)  # who is not root may change it ten times a second
        return follow(*args)

    monkeypatch.setattr(evaluate, "follow", follow_and_look)
    torch.set_num_threads(2)
    play(10, 20, 30, 30)
    assert evaluate.main(evaluate.Args(str(run_dir), follow=True)) == 0
    assert (nice, asked) == ([19], [1, "19"])
    assert not before or group.read_text() == before


def test_one_that_is_terminated_gives_its_terminal_the_old_weight_back(run_dir, monkeypatch):
    group = Path("/proc/self/autogroup")
    before = group.read_text() if group.exists() else ""

    def terminated(*_):
        time.sleep(0.3)  # who is not root may change it ten times a second
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(5)

    monkeypatch.setattr(evaluate, "follow", terminated)
    with pytest.raises(SystemExit) as stop:
        evaluate.main(evaluate.Args(str(run_dir), follow=True))
    assert stop.value.code == 143
    assert not before or group.read_text() == before


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_of_two_in_one_terminal_the_first_gives_it_the_weight_that_it_had(order, monkeypatch):
    """/proc/self/autogroup is replaced by a variable."""
    weight, read_text, write_text = ["0"], Path.read_text, Path.write_text
    monkeypatch.setattr(torch, "set_num_threads", lambda number: None)

    def read(path):
        return f"/autogroup-7 nice {weight[0]}\n" if path.name == "autogroup" else read_text(path)

    def write(path, text):
        return weight.append(text) or weight.pop(0) if path.name == "autogroup" else write_text(path, text)

    monkeypatch.setattr(Path, "read_text", read)
    monkeypatch.setattr(Path, "write_text", write)
    both = evaluate.lowest_priority(), evaluate.lowest_priority()
    for each in both:
        each.__enter__()
        assert weight == ["19"]
    for i in order:
        both[i].__exit__(None, None, None)
        assert weight == ["0" if 0 in order[: order.index(i) + 1] else "19"]


def test_no_group_of_the_terminal_is_no_obstacle(run_dir, play, monkeypatch):
    """The file is empty in a process that belongs to no such group."""
    read_text = Path.read_text
    monkeypatch.setattr(Path, "read_text", lambda path, *a, **k: "" if path.name == "autogroup" else read_text(path))
    play(10, 20, 30, 30)
    assert evaluate.main(evaluate.Args(str(run_dir), follow=True)) == 0


def test_a_second_follow_is_refused(run_dir, play, capsys):
    (run_dir / "eval").mkdir()
    with open(run_dir / "eval" / "scores.jsonl", "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        with pytest.raises(SystemExit) as stop:
            follow(run_dir)
    assert stop.value.code == 1
    message = capsys.readouterr().err
    assert f"{run_dir} is already followed" in message
    assert message.count("\n") == 1
    assert not list(run_dir.glob("eval/events.*"))  # its curve would hide that of the first


def test_a_folder_without_a_run_is_refused_and_left_alone(tmp_path, capsys):
    (tmp_path / "other").mkdir()
    for name in ("other", "nothing"):
        with pytest.raises(SystemExit) as stop:
            follow(tmp_path / name)
        assert stop.value.code == 1
        message = capsys.readouterr().err
        assert f"{tmp_path / name} holds no checkpoint, and no run is writing one." in message
        assert message.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["other"]
    assert not list((tmp_path / "other").iterdir())


def test_an_eval_folder_that_cannot_be_written_gets_one_sentence(run_dir, capsys):
    (run_dir / "eval").write_text("")
    with pytest.raises(SystemExit) as stop:
        follow(run_dir)
    assert stop.value.code == 1
    message = capsys.readouterr().err
    assert str(run_dir / "eval") in message
    assert message.count("\n") == 1


@pytest.mark.parametrize("flags", [{"all": True}, {"render": True}, {"video": "film.mp4"}, {"checkpoint": "some.pt"}])
def test_flags_that_do_not_go_together_get_one_sentence(flags, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "some.pt").write_text("")
    with pytest.raises(SystemExit) as stop:
        evaluate.Args(**{"checkpoint": ".", "follow": True} | flags)
    assert stop.value.code == 2
    message = capsys.readouterr().err
    assert "--follow" in message
    assert message.count("\n") == 1


def test_best_is_scored_as_any_checkpoint_and_never_resumed_by_mistake(run_dir, play, capsys):
    play(10, 30, 20, 25, 28)
    follow(run_dir)
    capsys.readouterr()
    best = run_dir / "best.pt"
    evaluate.main(evaluate.Args(str(best), episodes=2))
    assert f"{best}: CartPole-v1 after 512 steps" in capsys.readouterr().out
    for module in (evaluate, ppo_cartpole):
        assert module.find_checkpoint(run_dir) == checkpoint(run_dir, 768)
    content = evaluate.load_checkpoint(best) | {"script": "my_idea"}
    torch.save(content, best)
    with pytest.raises(SystemExit):
        evaluate.main(evaluate.Args(str(best)))
    assert re.search(rf"--script, for instance {run_dir / 'script.py'}\.", capsys.readouterr().err)
