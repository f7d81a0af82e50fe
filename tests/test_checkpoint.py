"""What is saved is whole, safe to open, and goes on where it stopped."""

import dataclasses
import errno
import fcntl
import json
import os
import pickle
import shutil
import signal
import subprocess
import sys
import time
import types
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, SCRIPTS, SHORT, flags, reload, run, same, stride, train
from probes import PROBES, Endless, InFrames, RewardFromActionAndObs
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import evaluate
import ppo_cartpole
from ppo_cartpole import load_checkpoint, spread_seed

PIPES = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}


def go(module, *arguments):
    """What `python SCRIPT ARGUMENTS` does, in this process; its exit code."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_DFL)  # the run before is over: its lock goes with it
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.argv", ["x.py", *map(str, arguments)])
        try:
            return module.train(module.read_args())
        except SystemExit as stop:
            return stop.code
        except KeyboardInterrupt:
            return "killed"


def last_words(capfd):
    """What was said since the last call, without progress bars and the warning of short runs: the lines of stderr."""
    lines = capfd.readouterr().err.splitlines()
    return [line for line in lines if "%|" not in line and " cuts " not in line and line.strip()]


def files(folder):
    """What lies in a folder, and when it was written."""
    return sorted((p.name, p.stat().st_mtime_ns) for p in folder.rglob("*") if p.is_file() and p.name != ".lock")


def die_at_save(number, monkeypatch):
    """Where ppo_cartpole.py would save for the `number`-th time from now on, it ends as if killed: nothing is saved."""
    calls, save = [], ppo_cartpole.Run.save

    def save_or_die(run):
        calls.append(1)
        if len(calls) == number:
            run.lock.close()
            raise KeyboardInterrupt
        save(run)

    monkeypatch.setattr(ppo_cartpole.Run, "save", save_or_die)


@pytest.fixture
def trained(script, tmp_path):
    """A short run of each script: module, run folder, the Args it had."""
    module = SCRIPTS[script]
    run_dir = train(module, tmp_path, **SHORT[script])
    return module, run_dir, module.Args(run_dir=str(run_dir), **SHORT[script])


@pytest.fixture
def checkpoint_file(tmp_path):
    """A checkpoint of ppo_cartpole.py, alone in a folder."""
    return ppo_cartpole.find_checkpoint(train(ppo_cartpole, tmp_path / "made", **SHORT["ppo_cartpole"]))


def refusal(path, capfd):
    """What load_checkpoint says of a file that it must refuse: one sentence, exit code 1."""
    capfd.readouterr()
    with pytest.raises(SystemExit) as stop:
        load_checkpoint(path)
    assert stop.value.code == 1
    message = capfd.readouterr().err
    assert message.count("\n") == 1
    assert str(path) in message
    return message


def curve(run_dir, tag):
    """(step, value) of a TensorBoard tag."""
    events = EventAccumulator(str(run_dir), size_guidance={"scalars": 0}).Reload()
    return [(event.step, event.value) for event in events.Scalars(tag)]


def test_a_run_folder_holds_what_the_design_says(trained):
    module, run_dir, args = trained
    assert json.loads((run_dir / "args.json").read_text())["env_id"] == args.env_id
    assert (run_dir / "script.py").read_text() == open(module.__file__).read()
    steps = [int(path.stem) for path in sorted((run_dir / "checkpoints").iterdir())]
    end = -(-args.total_timesteps // stride(args)) * stride(args)  # the last rollout is played to its end
    moments = range(stride(args), end + 1, stride(args))
    marks = [*range(args.save_freq, end, args.save_freq), end]
    saved = {next(step for step in moments if step >= mark) for mark in marks}
    assert len(saved) < len(moments)
    assert steps == sorted(saved)
    checkpoint = module.load_checkpoint(module.find_checkpoint(run_dir))
    assert {"format", "script", "args", "global_step", "model", "optimizer", "versions"} <= checkpoint.keys()
    assert checkpoint["versions"]["threads"] == torch.get_num_threads()  # on which the bits of a run depend
    assert checkpoint["global_step"] == steps[-1]


def test_the_logs_have_the_tags_people_plot(trained):
    module, run_dir, _ = trained
    tags = EventAccumulator(str(run_dir)).Reload().Tags()["scalars"]
    names = "charts/learning_rate charts/SPS losses/grad_norm "
    if module.__name__ == "dqn_atari":
        names += "losses/td_loss losses/q_values charts/epsilon"
    else:
        names += "losses/value_loss losses/policy_loss losses/entropy losses/old_approx_kl losses/approx_kl "
        names += "losses/clipfrac losses/explained_variance"
    assert set(names.split()) <= set(tags)


def test_checkpoints_come_when_multiples_of_save_freq_are_passed(tmp_path):
    """Each at the end of the rollout that passes one: how late one is does not add up."""
    run_dir = train(ppo_cartpole, tmp_path, total_timesteps=1500, save_freq=300)
    assert [int(path.stem) for path in ppo_cartpole.list_checkpoints(run_dir)] == [512, 768, 1024, 1280, 1536]


def test_the_bar_shows_the_mean_of_the_last_100_returns(tmp_path, monkeypatch):
    shown = []
    monkeypatch.setattr(ppo_cartpole.tqdm, "set_postfix_str", lambda bar, text, refresh: shown.append(text))
    run_dir = train(ppo_cartpole, tmp_path, env_id=PROBES["RewardFromObs"], total_timesteps=512)
    returns = [value for _, value in curve(run_dir, "charts/episodic_return")]
    assert shown == [f"return {np.mean(returns[end - 100 : end]):.1f}" for end in (256, 512)]


def test_episodes_that_end_together_all_show(tmp_path):
    run_dir = train(ppo_cartpole, tmp_path, env_id=PROBES["ConstantReward"], total_timesteps=512)
    assert curve(run_dir, "charts/episodic_return") == [(step, 1.0) for step in range(1, 513)]
    assert curve(run_dir, "charts/episodic_length") == [(step, 1.0) for step in range(1, 513)]


@pytest.mark.parametrize("probe", [RewardFromActionAndObs, Endless])
@pytest.mark.parametrize("name", ["ppo_atari", "dqn_atari"])
def test_the_logged_score_is_the_raw_one_of_whole_games(name, probe, tmp_path, monkeypatch):
    """InFrames pays 10 points where the reward is 1; a lost life is no end of a game."""
    module = SCRIPTS[name]
    monkeypatch.setattr(module, "make_envs", lambda args, n, seed, training: InFrames(probe, n, life_lost=True))
    run_dir = train(module, tmp_path, **SHORT[name])
    if probe is RewardFromActionAndObs:
        games = curve(run_dir, "charts/episodic_return")
        last = module.load_checkpoint(module.find_checkpoint(run_dir))["global_step"]
        assert [step for step, _ in games] == list(range(1, last + 1))
        assert {score for _, score in games} == {-10.0, 10.0}
    else:
        assert "charts/episodic_return" not in EventAccumulator(str(run_dir)).Reload().Tags()["scalars"]


def test_same_seed_same_run_another_seed_another(script, tmp_path, monkeypatch):
    """And no two segments, no two seeds and no evaluation play the same games."""
    module, models, seeds = SCRIPTS[script], [], []
    begin_segment = module.Run.begin_segment
    monkeypatch.setattr(module.Run, "begin_segment", lambda run: seeds.append(begin_segment(run)) or seeds[-1])
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        run_dir = train(module, tmp_path / name, seed=seed, **SHORT[script])
        models.append(module.load_checkpoint(module.find_checkpoint(run_dir))["model"])
    assert same(models[0], models[1])
    assert not any(torch.equal(models[0][key], models[2][key]) for key in models[0] if key.endswith("weight"))
    assert len(seeds) == 6
    assert seeds[:2] == seeds[2:4]
    seeds = [*seeds[2:], *(spread_seed(2, seed) for seed in (1, 2))]  # evaluate.py's
    assert np.diff(sorted(seeds)).min() > 4096  # more environments than anyone runs


def test_resume_goes_on_with_the_flags_of_the_run_and_those_beside_it(trained, monkeypatch, capfd):
    module, run_dir, args = trained
    before, rates = module.load_checkpoint(module.find_checkpoint(run_dir)), []
    step = torch.optim.Adam.step
    monkeypatch.setattr(torch.optim.Adam, "step", lambda x: rates.append(x.param_groups[0]["lr"]) or step(x))
    longer = 2 * args.total_timesteps
    (run_dir / "script.py").write_text("an earlier one")
    assert go(module, "--resume", run_dir, "--total-timesteps", longer, "--learning-rate", 0.003) == 0
    fraction_left = 1 - before["global_step"] / longer if getattr(args, "anneal_lr", False) else 1
    assert rates[0] == pytest.approx(0.003 * fraction_left)
    after = module.load_checkpoint(module.find_checkpoint(run_dir))
    assert after["global_step"] >= longer
    assert after["args"] == dataclasses.asdict(args) | {"total_timesteps": longer, "learning_rate": 0.003}
    steps = [step for step, _ in curve(run_dir, "charts/SPS")]
    assert steps == sorted(set(steps))  # nothing doubled

    assert json.loads((run_dir / "args.json").read_text()) == after["args"]
    assert (run_dir / "script.py").read_bytes() == Path(module.__file__).read_bytes()

    before = files(run_dir)
    capfd.readouterr()
    assert go(module, "--resume", run_dir) == 0
    out, err = capfd.readouterr()
    assert f"Done: {run_dir} is finished" in out
    assert "starts empty" not in err  # DQN's replay buffer is gone, but nothing is left to be learned
    assert before == files(run_dir)


def test_flags_are_checked_when_a_run_is_resumed(tmp_path, capfd):
    run_dir = train(ppo_cartpole, tmp_path, **SHORT["ppo_cartpole"])
    assert go(ppo_cartpole, "--resume", run_dir, "--total-timesteps", 1200, "--gamma", 1.1) == 2
    assert "--gamma must be between 0 and 1, got 1.1" in capfd.readouterr().err


def test_a_tracked_run_goes_on_in_the_same_curves_of_wandb(tmp_path, monkeypatch):
    """What W&B is told; W&B itself needs an account and a network."""
    told, curves = [], []

    def init(**settings):
        told.append(settings)
        curves.append(list((tmp_path / "run").glob("events.*")))

    wandb = types.SimpleNamespace(init=init, run=types.SimpleNamespace(id="abc"))
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    settings = SHORT["ppo_cartpole"] | {"wandb_project_name": "p", "wandb_entity": "e"}
    run_dir = train(ppo_cartpole, tmp_path, track=True, **settings)
    assert (told[0]["project"], told[0]["entity"], told[0]["name"]) == ("p", "e", "run")
    assert told[0]["config"] == reload(ppo_cartpole, run_dir)[0]["args"]
    assert told[0]["sync_tensorboard"]
    assert not curves[0]  # W&B follows only the writers that are made after it
    assert go(ppo_cartpole, "--resume", run_dir, "--total-timesteps", 1200) == 0
    train(ppo_cartpole, tmp_path / "other", track=True, **SHORT["ppo_cartpole"])
    assert [settings["id"] for settings in told] == [None, "abc", None]
    assert {settings["resume"] for settings in told} == {"allow"}


def test_the_same_command_again(tmp_path, monkeypatch, capfd):
    """Before the first checkpoint it starts afresh, then it goes on; one that says otherwise is refused."""
    run_dir = tmp_path / "run"
    command = ["--run-dir", run_dir, *flags({"total_timesteps": 768, "save_freq": 256})]
    die_at_save(1, monkeypatch)
    assert go(ppo_cartpole, *command, "--seed", 5) == "killed"
    die_at_save(2, monkeypatch)
    assert go(ppo_cartpole, *command) == "killed"
    assert [path.stem for path in ppo_cartpole.list_checkpoints(run_dir)] == ["000000000256"]
    before = files(run_dir)
    for changed in (["--seed", 5], ["--total-timesteps", 1024], ["--norm-obs"], ["--save-freq", 512]):
        capfd.readouterr()
        assert go(ppo_cartpole, *command, *changed) == 2
        (message,) = last_words(capfd)
        assert f"another {changed[0]}: continue it with --resume {run_dir}" in message
    assert before == files(run_dir)

    assert go(ppo_cartpole, *command) == 0
    assert "steps 256 to 768" in capfd.readouterr().out
    whole = train(ppo_cartpole, tmp_path / "whole", total_timesteps=768, save_freq=256)
    for part in ("model", "optimizer"):
        assert same(*(reload(ppo_cartpole, folder)[0][part] for folder in (run_dir, whole)))
    before = files(run_dir)
    assert go(ppo_cartpole, *command) == 0
    assert f"Done: {run_dir} is finished" in capfd.readouterr().out
    assert before == files(run_dir)
    monkeypatch.chdir(tmp_path)
    assert go(ppo_cartpole, "--run-dir", "run", *command[2:]) == 0  # the same folder, named in another way
    assert before == files(run_dir)

    (run_dir / "script.py").write_text("an earlier one")  # edited since, so the weights are another program's
    assert go(ppo_cartpole, *command) == 2
    assert f"another ppo_cartpole.py: continue it with --resume {run_dir}" in capfd.readouterr().err
    assert go(ppo_cartpole, "--resume", run_dir) == 0


def test_a_run_that_began_from_another_goes_on_by_the_same_command(tmp_path, monkeypatch, capfd):
    first = train(ppo_cartpole, tmp_path, **SHORT["ppo_cartpole"])
    before = files(first)
    older, newest = ppo_cartpole.list_checkpoints(first)
    assert go(ppo_cartpole, "--resume", older) == 2
    (message,) = last_words(capfd)
    assert newest.name in message
    command = ["--resume", older, "--total-timesteps", 1536, "--run-dir"]
    assert go(ppo_cartpole, *command, tmp_path / "whole") == 0
    assert "steps 512 to 1,536" in capfd.readouterr().out
    die_at_save(2, monkeypatch)
    assert go(ppo_cartpole, *command, tmp_path / "killed") == "killed"
    assert go(ppo_cartpole, *command, tmp_path / "killed") == 0
    assert "steps 768 to 1,536" in capfd.readouterr().out
    whole, killed = (reload(ppo_cartpole, tmp_path / name)[0] for name in ("whole", "killed"))
    assert same([whole["model"], whole["optimizer"]], [killed["model"], killed["optimizer"]])

    newest = ppo_cartpole.find_checkpoint(tmp_path / "killed")
    assert go(ppo_cartpole, "--resume", newest, "--total-timesteps", 2000) == 0
    assert go(ppo_cartpole, "--resume", older, "--total-timesteps", 2000, "--run-dir", tmp_path / "killed") == 0
    assert before == files(first)


def test_a_finished_run_that_is_resumed_elsewhere_has_nothing_to_do(tmp_path, capfd):
    first = train(ppo_cartpole, tmp_path, **SHORT["ppo_cartpole"])
    capfd.readouterr()
    assert go(ppo_cartpole, "--resume", first, "--run-dir", tmp_path / "other") == 0
    assert "could not be written" not in capfd.readouterr().err


def test_a_checkpoint_without_its_folder_goes_on_in_a_new_one(tmp_path, monkeypatch):
    """And writes nothing near the file."""
    monkeypatch.chdir(tmp_path)
    path = ppo_cartpole.find_checkpoint(train(ppo_cartpole, tmp_path, **SHORT["ppo_cartpole"]))
    (tmp_path / "downloads" / "from_a_friend").mkdir(parents=True)
    copy = shutil.copy(path, tmp_path / "downloads" / "from_a_friend")
    assert go(ppo_cartpole, "--resume", copy, "--total-timesteps", 1200) == 0
    (run_dir,) = (tmp_path / "runs").iterdir()
    assert reload(ppo_cartpole, run_dir)[0]["global_step"] == 1280
    assert [x.name for x in (tmp_path / "downloads").rglob("*")] == ["from_a_friend", path.name]


def test_another_seed_begins_with_other_weights(script, tmp_path, monkeypatch):
    """Before the first gradient step, in which the games of the seed would show, too."""
    module, first = SCRIPTS[script], []
    start = module.Run.start

    def watch(run, **state):
        first.append([x.clone() for x in state["model"].parameters() if x.any()])  # without biases, which are 0
        start(run, **state)

    monkeypatch.setattr(module.Run, "start", watch)
    for seed in (1, 1, 2):
        train(module, tmp_path / str(len(first)), seed=seed, **SHORT[script] | {"total_timesteps": 1})
    assert same(first[0], first[1])
    assert not any(map(torch.equal, first[0], first[2]))


def test_each_segment_plays_the_games_of_its_own_seed(script, tmp_path, monkeypatch):
    module, seeds, used = SCRIPTS[script], [], []
    begin_segment, make_envs = module.Run.begin_segment, module.make_envs

    def make(*args, **settings):
        envs = make_envs(*args, **settings)
        reset = envs.reset
        envs.reset = lambda *, seed=None, options=None: used.append(seed) or reset(seed=seed)
        return envs

    monkeypatch.setattr(module, "make_envs", make)
    monkeypatch.setattr(module.Run, "begin_segment", lambda run: seeds.append(begin_segment(run)) or seeds[-1])
    train(module, tmp_path, **SHORT[script])
    assert used == seeds
    assert len(set(used)) == 2


def test_steps_a_second_are_those_of_this_process(tmp_path, monkeypatch):
    """By a clock that ticks once for each update of 256 steps."""
    ticks = []
    clock = types.SimpleNamespace(time=lambda: 0, monotonic=lambda: ticks.append(1) or float(len(ticks)))
    monkeypatch.setattr(ppo_cartpole, "time", clock)
    run_dir = train(ppo_cartpole, tmp_path, **SHORT["ppo_cartpole"])
    assert go(ppo_cartpole, "--resume", run_dir, "--total-timesteps", 1536) == 0
    assert curve(run_dir, "charts/SPS") == [(256 * i, 256) for i in range(1, 7)]


def test_ppo_cartpole_takes_one_thread(tmp_path):
    torch.set_num_threads(2)
    run_dir = train(ppo_cartpole, tmp_path, **SHORT["ppo_cartpole"])
    assert reload(ppo_cartpole, run_dir)[0]["versions"]["threads"] == 1


def test_a_checkpoint_is_on_the_disk_before_it_has_its_name(tmp_path, monkeypatch):
    """Else a power cut could leave a name with nothing behind it."""
    synced, names, fsync, replace = {}, [], os.fsync, os.replace

    def watch_fsync(number):
        synced[os.fstat(number).st_ino] = os.fstat(number).st_size
        fsync(number)

    def watch_replace(old, new):
        assert synced.pop(os.stat(old).st_ino) == os.stat(old).st_size > 0
        names.append(Path(new).name)
        replace(old, new)

    monkeypatch.setattr(os, "fsync", watch_fsync)
    monkeypatch.setattr(os, "replace", watch_replace)
    run_dir = train(ppo_cartpole, tmp_path, **SHORT["ppo_cartpole"])
    assert names == [path.name for path in ppo_cartpole.list_checkpoints(run_dir)] != []


@pytest.mark.parametrize("value", [np.float32(3), np.zeros(3)])
def test_what_could_not_be_read_back_is_not_saved(value, script, tmp_path, monkeypatch):
    """A copy may save more than the script; what NumPy made would shut the weights away with it."""
    module, start = SCRIPTS[script], SCRIPTS[script].Run.start
    mine = types.SimpleNamespace(state_dict=lambda: {"best": value})
    monkeypatch.setattr(module.Run, "start", lambda run, **state: start(run, **state, mine=mine))
    with pytest.raises(pickle.UnpicklingError, match="numpy"):
        train(module, tmp_path, **SHORT[script])
    assert not list(tmp_path.rglob("*.pt"))


def test_a_run_goes_on_in_its_folder_though_its_checkpoints_lie_elsewhere(tmp_path):
    run_dir = train(ppo_cartpole, tmp_path, **SHORT["ppo_cartpole"])
    shutil.move(run_dir / "checkpoints", tmp_path / "elsewhere")
    (run_dir / "checkpoints").symlink_to(tmp_path / "elsewhere")
    assert go(ppo_cartpole, "--resume", run_dir, "--total-timesteps", 1200) == 0
    newest = ppo_cartpole.find_checkpoint(run_dir)
    assert newest.stem == "000000001280"
    assert go(ppo_cartpole, "--resume", newest, "--total-timesteps", 1500) == 0
    assert ppo_cartpole.find_checkpoint(run_dir).stem == "000000001536"


def test_a_full_disk_costs_a_checkpoint_and_nothing_else(tmp_path):
    """A limit on the size of a file stands in for the full disk: the system refuses the write half way."""
    code = "import resource, ppo_cartpole as p; resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, 60_000)); "
    code += "p.train(p.Args(run_dir='run', total_timesteps=1024, save_freq=256))"
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env={"PYTHONPATH": ROOT}, text=True, **PIPES)
    assert done.returncode == 1
    assert done.stderr.count("could not be written, training continues") == 4
    assert "the last checkpoint was not written" in done.stderr.splitlines()[-1]
    assert "Traceback" not in done.stderr
    assert not list((tmp_path / "run").glob("checkpoints/*.pt"))


def test_nan_ends_the_run_and_leaves_the_last_good_checkpoint(tmp_path, monkeypatch, capfd):
    observe, calls = ppo_cartpole.Agent.observe, []

    def spoil(agent, obs):
        """After the third update, one weight of the critic is NaN."""
        observe(agent, obs)
        calls.append(obs)
        if len(calls) == 3:
            agent.critic[0].weight.data[0, 0] = float("nan")

    monkeypatch.setattr(ppo_cartpole.Agent, "observe", spoil)
    assert go(ppo_cartpole, *flags({"run_dir": tmp_path / "run", "total_timesteps": 2560, "save_freq": 512})) == 1
    (checkpoint,) = ppo_cartpole.list_checkpoints(tmp_path / "run")
    assert checkpoint.stem == "000000000512"
    message = capfd.readouterr().err.splitlines()[-1]  # and no progress bar after it
    assert "value_loss is nan after 1,024 steps" in message
    assert f"{checkpoint} with --resume and a smaller --learning-rate" in message
    assert all(x.isfinite().all() for x in load_checkpoint(checkpoint)["model"].values())
    assert go(ppo_cartpole, "--resume", checkpoint, "--learning-rate", 1e-4) == 0


def test_weights_that_the_last_gradient_step_spoilt_are_not_saved(script, tmp_path, monkeypatch, capfd):
    """The losses that it was made from were still finite."""
    module, run_dir = SCRIPTS[script], tmp_path / "run"
    name = "dqn_update" if script == "dqn_atari" else "ppo_update"
    settings = SHORT[script] | ({"train_frequency": 40} if script == "dqn_atari" else {})  # one step before each save
    update = getattr(module, name)

    def spoil(agent, *rest, **more):
        metrics = update(agent, *rest, **more)
        if module.list_checkpoints(run_dir):
            list(agent.parameters())[-1].data[0] = float("nan")
        return metrics

    monkeypatch.setattr(module, name, spoil)
    assert go(module, *flags(settings | {"run_dir": run_dir})) == 1
    (checkpoint,) = module.list_checkpoints(run_dir)
    message = capfd.readouterr().err.splitlines()[-1]
    assert "a weight is not finite after" in message
    assert checkpoint.name in message


def test_statistics_of_observations_that_are_not_finite_are_not_saved(tmp_path, monkeypatch, capfd):
    """Their squares leave the range of numbers. What is normalized by such a variance is 0: no loss shows it."""
    update = ppo_cartpole.RunningNorm.update
    monkeypatch.setattr(ppo_cartpole.RunningNorm, "update", lambda norm, x: update(norm, 1e25 * x))
    assert go(ppo_cartpole, *flags({"run_dir": tmp_path, "norm_obs": True, "save_freq": 256})) == 1
    assert "a weight is not finite after 256 steps" in capfd.readouterr().err.splitlines()[-1]
    assert not ppo_cartpole.list_checkpoints(tmp_path)


def test_a_signal_after_the_last_update_does_not_make_a_finished_run_a_stopped_one(
    script, tmp_path, monkeypatch, capfd
):
    module, signals = SCRIPTS[script], []
    save = module.Run.save

    def signal_at_the_end(run):
        if run.global_step >= run.args.total_timesteps:
            signals.append(os.kill(os.getpid(), signal.SIGINT))
        save(run)

    monkeypatch.setattr(module.Run, "save", signal_at_the_end)
    run_dir = train(module, tmp_path, **SHORT[script])
    assert len(signals) == 1
    assert f"Done: {run_dir} is finished" in capfd.readouterr().out


def test_what_a_signal_saves_is_what_an_uninterrupted_run_had_then(script, tmp_path, monkeypatch, capfd):
    """The update in progress is finished first. Then --resume goes on."""
    module, steps = SCRIPTS[script], []
    update, record_step = stride(module.Args(**SHORT[script])), module.Run.record_step
    settings = SHORT[script] | {"total_timesteps": 4 * update, "run_dir": tmp_path / "cut"}
    settings |= {"exploration_fraction": 0.0, "learning_starts": 1} if script == "dqn_atari" else {}
    whole = train(module, tmp_path, **settings | {"run_dir": str(tmp_path / "whole"), "save_freq": 2 * update})

    def record_and_signal(run, *rest):
        record_step(run, *rest)
        steps.append(run.num_envs)
        if sum(steps) == update + run.num_envs:  # the second update has begun
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(module.Run, "record_step", record_and_signal)
    assert go(module, *flags(settings | {"save_freq": 1000})) == 143
    (path,) = module.list_checkpoints(settings["run_dir"])
    assert int(path.stem) == 2 * update
    saved, expected = load_checkpoint(path), load_checkpoint(whole / "checkpoints" / path.name)
    assert same([saved["model"], saved["optimizer"]], [expected["model"], expected["optimizer"]])
    err = capfd.readouterr().err
    assert err.count("Stopping") == 1
    assert f"Stopped at step {2 * update:,}. Continue: python x.py --resume {settings['run_dir']}" in err
    assert go(module, "--resume", settings["run_dir"]) == 0


@pytest.mark.parametrize("agreed", [True, False])
def test_a_signal_changes_nothing_in_what_several_processes_agreed_on(script, agreed):
    """torchrun sends one to the others when a process has stopped and ended: they may still be saving."""
    this = object.__new__(SCRIPTS[script].Run)
    this.num_ranks, this.stop_time, this.stopped, this.bar = 2, float("inf"), agreed, types.SimpleNamespace()
    this.request_stop(signal.SIGTERM, None)
    assert this.stopped is agreed
    assert this.stop_signal == signal.SIGTERM


@pytest.mark.parametrize(
    ("script", "number", "code"),
    [
        ("ppo_cartpole", signal.SIGINT, 130),
        pytest.param("ppo_atari", signal.SIGTERM, 143, marks=pytest.mark.slow),
        pytest.param("dqn_atari", signal.SIGTERM, 143, marks=pytest.mark.slow),
    ],
)
def test_a_signal_saves_and_says_how_to_go_on(script, number, code, tmp_path):
    """Ctrl-C, or what a cluster sends before it kills: what was learned so far is saved."""
    settings = SHORT[script] | {"total_timesteps": 100_000, "save_freq": 100_000, "run_dir": "run"}
    command = [sys.executable, ROOT / f"{script}.py", *flags(settings)]
    process = subprocess.Popen(command, cwd=tmp_path, text=True, **PIPES)
    while not (events := list(tmp_path.glob("run/events.*"))) or events[0].stat().st_size < 500:
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.1)
    process.send_signal(number)
    stderr = process.communicate(timeout=60)[1]
    assert process.returncode == code
    assert "Traceback" not in stderr
    (checkpoint,) = (tmp_path / "run" / "checkpoints").iterdir()
    step = load_checkpoint(checkpoint)["global_step"]
    assert step > 0
    assert step % stride(SCRIPTS[script].Args(**settings)) == 0
    assert stderr.splitlines()[-1] == f"Stopped at step {step:,}. Continue: python {command[1]} --resume run"


def test_two_processes_never_write_one_folder(tmp_path):
    first = ppo_cartpole.Run(ppo_cartpole.Args(run_dir=str(tmp_path / "run")))
    done = run("ppo_cartpole.py", "--run-dir", "run", cwd=tmp_path)
    assert done.returncode == 1
    assert "run is being written by another process" in done.stderr
    assert done.stderr.count("\n") == 1
    first.lock.close()
    assert go(ppo_cartpole, "--run-dir", tmp_path / "run", "--total-timesteps", 256) == 0


def test_a_file_system_without_locks_is_no_obstacle(tmp_path, monkeypatch, capfd):
    def refuse(*_):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", refuse)
    train(ppo_cartpole, tmp_path, **SHORT["ppo_cartpole"])
    (message,) = last_words(capfd)
    assert "cannot be locked" in message


@pytest.mark.parametrize("load", [ppo_cartpole.load_checkpoint, evaluate.load_checkpoint])
def test_a_checkpoint_of_a_gpu_is_read_without_one(load, checkpoint_file, monkeypatch):
    checkpoint = load(checkpoint_file)
    with monkeypatch.context() as patch:
        patch.setattr(torch.serialization, "location_tag", lambda storage: "cuda:0")  # noted beside each weight
        torch.save(checkpoint, checkpoint_file)
    assert same(load(checkpoint_file), checkpoint)


def test_a_file_that_is_not_named_by_a_step_is_not_the_newest(checkpoint_file):
    best = checkpoint_file.with_name("best.pt")
    best.write_bytes(checkpoint_file.read_bytes())
    assert evaluate.find_checkpoint(checkpoint_file.parents[1]) == checkpoint_file
    assert evaluate.find_checkpoint(best) == best


class Payload:
    def __reduce__(self):
        return os.mkdir, ("payload_ran",)


def test_a_checkpoint_with_code_in_it_is_refused_and_the_code_not_run(tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    torch.save({"format": 1, "script": "ppo_cartpole", "args": {}, "global_step": 0, "model": Payload()}, "evil.pt")
    refusal("evil.pt", capfd)
    (tmp_path / "plain.pt").write_bytes(pickle.dumps(Payload()))
    refusal("plain.pt", capfd)
    with pytest.raises(SystemExit):
        evaluate.main(evaluate.Args(checkpoint="evil.pt"))
    assert not (tmp_path / "payload_ran").exists()


@pytest.mark.parametrize("keep", [0, 4, 100, 0.5, -1])
def test_a_shortened_checkpoint_is_refused(keep, checkpoint_file, capfd):
    whole = checkpoint_file.read_bytes()
    checkpoint_file.write_bytes(whole[: int(len(whole) * keep) if isinstance(keep, float) else keep])
    assert "damaged" in refusal(checkpoint_file, capfd)


@pytest.mark.parametrize("where", ["in a weight", "in what is said of a weight"])
def test_a_flipped_bit_that_torch_alone_does_not_notice_is_refused(where, checkpoint_file, capfd):
    """The second one calls the weight a directory: torch.load leaves its memory as it found it."""
    whole = bytearray(checkpoint_file.read_bytes())
    with zipfile.ZipFile(checkpoint_file) as file:
        largest = max(file.infolist(), key=lambda info: info.file_size)
    if where == "in a weight":
        whole[largest.header_offset + 200 + largest.file_size // 2] ^= 1
    else:
        entry = whole.rindex(b"PK\x01\x02", 0, whole.rindex(b"/data/0"))  # in the central directory
        whole[entry + 38] |= 0x10  # its external file attributes (APPNOTE.TXT, 4.3.12)
    checkpoint_file.write_bytes(whole)
    assert torch.load(checkpoint_file, weights_only=True)["format"] == 2
    assert "damaged" in refusal(checkpoint_file, capfd)


def test_other_formats_and_foreign_files_are_refused(checkpoint_file, tmp_path, capfd):
    checkpoint = load_checkpoint(checkpoint_file)
    torch.save(checkpoint | {"format": 3}, tmp_path / "newer.pt")
    torch.save(checkpoint["model"], tmp_path / "weights.pt")
    torch.save(torch.zeros(3), tmp_path / "tensor.pt")
    for name in ("newer.pt", "weights.pt", "tensor.pt"):
        assert "no checkpoint of this version" in refusal(tmp_path / name, capfd)
    torch.save(checkpoint | {"format": 1}, tmp_path / "older.pt")
    assert same(load_checkpoint(tmp_path / "older.pt")["model"], checkpoint["model"])
    assert go(ppo_cartpole, "--resume", tmp_path / "older.pt") == 1
    (message,) = last_words(capfd)
    assert "older.pt can only be scored" in message


@pytest.mark.parametrize(
    ("part", "content", "reason"),
    [
        ("optimizer", {}, "does not fit script, flags or environment (KeyError: 'param_groups')"),
        ("optimizer", 3, "does not fit script, flags or environment (AttributeError: "),
        ("model", {"a": torch.ones(1)}, "does not fit script, flags or environment (RuntimeError: Error(s) in loading"),
        ("args", {"no_such": 1}, "was written by ppo_cartpole.py with other flags than this script has"),
    ],
)
def test_a_whole_file_that_fits_nothing_gets_one_sentence(part, content, reason, checkpoint_file, capfd):
    """Not damaged, but from an edited script, or made by hand."""
    torch.save(load_checkpoint(checkpoint_file) | {part: content}, checkpoint_file)
    capfd.readouterr()
    assert go(ppo_cartpole, "--resume", checkpoint_file, "--total-timesteps", 2000) == 1
    (message,) = last_words(capfd)
    assert reason in message


def test_norm_obs_is_saved_and_reloaded_and_frozen(tmp_path):
    run_dir = train(ppo_cartpole, tmp_path, norm_obs=True, **SHORT["ppo_cartpole"])
    checkpoint, agent = reload(ppo_cartpole, run_dir)
    assert agent.norm_obs.count == checkpoint["global_step"]
    assert agent.norm_obs.var.ne(1).all()
    before = {k: v.clone() for k, v in agent.state_dict().items()}
    evaluate.score(ppo_cartpole.find_checkpoint(run_dir), evaluate.Args(checkpoint=str(run_dir), episodes=2))
    assert all(torch.equal(before[k], v) for k, v in agent.state_dict().items())
