"""What is saved is whole, safe to open, and goes on where it stopped."""

import json
import os
import pickle
import signal
import subprocess
import sys
import time
import types
import zipfile

import numpy as np
import pytest
import torch
from conftest import ROOT, SCRIPTS, SHORT, flags, reload, run, stride
from probes import PROBES, Endless, InFrames, RewardFromActionAndObs
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import evaluate
from ppo_cartpole import load_checkpoint, spread_seed

PIPES = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}


@pytest.fixture
def trained(script, tmp_path):
    """A short run of each script: module, run folder, the Args it had."""
    module = SCRIPTS[script]
    args = module.Args(run_dir=str(tmp_path / "run"), **SHORT[script])
    return module, module.train(args), args


@pytest.fixture
def checkpoint_file(tmp_path):
    """A checkpoint of ppo_cartpole.py, alone in a folder."""
    module = SCRIPTS["ppo_cartpole"]
    run_dir = module.train(module.Args(run_dir=str(tmp_path / "made"), **SHORT["ppo_cartpole"]))
    return module.find_checkpoint(run_dir)


def refusal(path, capsys):
    """What load_checkpoint says of a file that it must refuse: one sentence, exit code 1."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        load_checkpoint(path)
    assert stop.value.code == 1
    message = capsys.readouterr().err
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
    assert {"format", "script", "args", "global_step", "model", "optimizer", "rng", "versions"} <= checkpoint.keys()
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


def test_episodes_that_end_together_all_show(tmp_path):
    module = SCRIPTS["ppo_cartpole"]
    run_dir = module.train(
        module.Args(env_id=PROBES["ConstantReward"], run_dir=str(tmp_path / "run"), total_timesteps=512)
    )
    assert curve(run_dir, "charts/episodic_return") == [(step, 1.0) for step in range(1, 513)]
    assert curve(run_dir, "charts/episodic_length") == [(step, 1.0) for step in range(1, 513)]


@pytest.mark.parametrize("probe", [RewardFromActionAndObs, Endless])
@pytest.mark.parametrize("name", ["ppo_atari", "dqn_atari"])
def test_the_logged_score_is_the_raw_one_of_whole_games(name, probe, tmp_path, monkeypatch):
    """InFrames pays 10 points where the reward is 1; a lost life is no end of a game."""
    module = SCRIPTS[name]
    monkeypatch.setattr(module, "make_envs", lambda args, n, seed, training: InFrames(probe, n, life_lost=True))
    run_dir = module.train(module.Args(run_dir=str(tmp_path / "run"), **SHORT[name]))
    if probe is RewardFromActionAndObs:
        games = curve(run_dir, "charts/episodic_return")
        last = module.load_checkpoint(module.find_checkpoint(run_dir))["global_step"]
        assert [step for step, _ in games] == list(range(1, last + 1))
        assert {score for _, score in games} == {-10.0, 10.0}
    else:
        assert "charts/episodic_return" not in EventAccumulator(str(run_dir)).Reload().Tags()["scalars"]


def test_same_seed_same_run_another_seed_another(script, tmp_path):
    module = SCRIPTS[script]
    models = []
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        run_dir = module.train(module.Args(seed=seed, run_dir=str(tmp_path / name), **SHORT[script]))
        models.append(module.load_checkpoint(module.find_checkpoint(run_dir))["model"])
    assert all(torch.equal(models[0][key], models[1][key]) for key in models[0])
    assert not any(torch.equal(models[0][key], models[2][key]) for key in models[0] if key.endswith("weight"))


def test_runs_with_neighbouring_seeds_share_no_environment_seed(script, tmp_path, monkeypatch):
    module, seeds = SCRIPTS[script], []
    make_envs = module.make_envs
    monkeypatch.setattr(
        module, "make_envs", lambda args, n, seed, training: seeds.append(seed) or make_envs(args, n, seed, training)
    )
    for seed in (1, 2, 3):
        module.train(module.Args(seed=seed, run_dir=str(tmp_path / str(seed)), **SHORT[script]))
    seeds += [spread_seed(2, seed) for seed in (1, 2, 3)]  # evaluate.py's
    assert len(seeds) == 6
    assert np.diff(sorted(seeds)).min() > 4096  # more environments than anyone runs


def test_no_two_starts_of_a_run_play_the_same_games(trained, monkeypatch):
    """Also if the first resumed run is killed before its next checkpoint, and the run is resumed from where it was."""
    module, run_dir, args = trained
    make_envs, seeds = module.make_envs, []

    def note_seed(args, n, seed, training):
        seeds.append(seed)
        return make_envs(args, n, seed, training)

    monkeypatch.setattr(module, "make_envs", note_seed)
    monkeypatch.setattr(module, "save_checkpoint", lambda *a, **k: False)
    more = ["--resume", str(run_dir), "--total-timesteps", str(2 * args.total_timesteps)]
    for _ in range(2):
        monkeypatch.setattr("sys.argv", ["x.py", *more])
        with pytest.raises(SystemExit):
            module.train(module.read_args())
    assert len({spread_seed(1, args.seed, 0), *seeds}) == 3


def test_resume_goes_on_with_everything(trained, tmp_path, monkeypatch, capsys):
    module, run_dir, args = trained
    before = module.load_checkpoint(module.find_checkpoint(run_dir))
    restored = {}

    def watch(optimizer, zero_grad=torch.optim.Adam.zero_grad):
        """What the first gradient step starts from."""
        if not restored:
            (group,) = optimizer.param_groups
            restored.update(lr=group["lr"], parameters=[p.detach().clone() for p in group["params"]])
            restored["moments"] = [{k: v.clone() for k, v in state.items()} for state in optimizer.state.values()]
        return zero_grad(optimizer)

    monkeypatch.setattr(torch.optim.Adam, "zero_grad", watch)
    longer = 2 * args.total_timesteps
    more = ["--total-timesteps", str(longer), "--learning-rate", "0.003"]
    monkeypatch.setattr("sys.argv", ["x.py", "--resume", str(run_dir), *more])
    resumed = module.read_args()
    assert resumed.num_envs == args.num_envs
    assert module.train(resumed).resolve() == run_dir.resolve()

    for ours, theirs in zip(restored["parameters"], before["model"].values(), strict=True):
        assert torch.equal(ours, theirs)
    saved = before["optimizer"]["state"].values()
    for ours, theirs in zip(restored["moments"], saved, strict=True):
        assert all(torch.equal(ours[k], theirs[k]) for k in theirs)
    fraction_left = 1 - before["global_step"] / longer if getattr(args, "anneal_lr", False) else 1
    assert restored["lr"] == pytest.approx(0.003 * fraction_left)
    assert f"learning rate {restored['lr']:.3g}" in capsys.readouterr().out
    after = module.load_checkpoint(module.find_checkpoint(run_dir))
    assert after["global_step"] >= longer
    steps = [step for step, _ in curve(run_dir, "charts/SPS")]
    assert steps == sorted(set(steps))  # nothing doubled

    monkeypatch.setattr("sys.argv", ["x.py", "--resume", str(run_dir)])
    before = sorted((path.name, path.stat().st_mtime_ns) for path in run_dir.rglob("*"))
    assert module.train(module.read_args()) == run_dir.resolve()
    assert "is finished" in capsys.readouterr().out
    assert before == sorted((path.name, path.stat().st_mtime_ns) for path in run_dir.rglob("*"))


def test_resume_goes_on_with_the_random_numbers(trained, monkeypatch):
    module, run_dir, args = trained
    before = module.load_checkpoint(module.find_checkpoint(run_dir))["rng"]["torch"]
    open_run, states = module.open_run, []
    monkeypatch.setattr(module, "open_run", lambda args: states.append(torch.get_rng_state()) or open_run(args))
    monkeypatch.setattr(
        "sys.argv", ["x.py", "--resume", str(run_dir), "--total-timesteps", str(2 * args.total_timesteps)]
    )
    torch.manual_seed(5)
    module.train(module.read_args())
    assert torch.equal(states[0], before)


def test_a_tracked_run_goes_on_in_the_same_curves_of_wandb(tmp_path, monkeypatch):
    """What W&B is told; W&B itself needs an account and a network."""
    module, told = SCRIPTS["ppo_cartpole"], []
    wandb = types.SimpleNamespace(init=lambda **settings: told.append(settings), run=types.SimpleNamespace(id="abc"))
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    monkeypatch.setattr(module.importlib.util, "find_spec", lambda name: True)
    run_dir = module.train(module.Args(run_dir=str(tmp_path / "run"), track=True, **SHORT["ppo_cartpole"]))
    monkeypatch.setattr("sys.argv", ["x.py", "--resume", str(run_dir), "--total-timesteps", "1200"])
    module.train(module.read_args())
    module.train(module.Args(run_dir=str(tmp_path / "other"), track=True, **SHORT["ppo_cartpole"]))
    assert [settings["id"] for settings in told] == [None, "abc", None]
    assert {settings["resume"] for settings in told} == {"allow"}


def test_what_a_run_wrote_after_its_last_checkpoint_is_not_doubled(tmp_path, monkeypatch):
    """A run that dies between checkpoints has logged steps that the resumed run plays again."""
    module = SCRIPTS["ppo_cartpole"]
    save, calls = module.save_checkpoint, []

    def save_once(*args, **state):
        calls.append(args)
        return save(*args, **state) if len(calls) == 1 else True

    monkeypatch.setattr(module, "save_checkpoint", save_once)
    run_dir = module.train(module.Args(run_dir=str(tmp_path / "run"), total_timesteps=2560, save_freq=1024))
    monkeypatch.setattr(module, "save_checkpoint", save)
    assert [path.name for path in (run_dir / "checkpoints").iterdir()] == ["000000001024.pt"]
    monkeypatch.setattr("sys.argv", ["x.py", "--resume", str(run_dir)])
    module.train(module.read_args())
    steps = [step for step, _ in curve(run_dir, "losses/entropy")]
    assert steps == list(range(256, 2561, 256))


def test_a_folder_with_a_checkpoint_is_not_overwritten(trained, capsys):
    module, run_dir, args = trained
    before = sorted((path.name, path.stat().st_mtime_ns) for path in run_dir.rglob("*"))
    with pytest.raises(SystemExit) as stop:
        module.train(args)
    assert stop.value.code == 1
    assert f"--resume {run_dir}" in capsys.readouterr().err
    assert before == sorted((path.name, path.stat().st_mtime_ns) for path in run_dir.rglob("*"))


def test_a_full_disk_costs_a_checkpoint_and_nothing_else(tmp_path):
    """A limit on the size of a file stands in for the full disk: the system refuses the write half way."""
    code = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, 60_000)); import ppo_cartpole as p; "
    code += "p.train(p.Args(run_dir='run', total_timesteps=1024, save_freq=256))"
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env={"PYTHONPATH": ROOT}, text=True, **PIPES)
    assert done.returncode == 1
    assert done.stderr.count("could not be written and is left out") == 4
    assert "the last checkpoint of run could not be written" in done.stderr.splitlines()[-1]
    assert "Traceback" not in done.stderr
    assert not list((tmp_path / "run").glob("checkpoints/*.pt"))


def test_nan_ends_the_run_and_leaves_the_last_good_checkpoint(tmp_path, monkeypatch, capsys):
    module, made = SCRIPTS["ppo_cartpole"], []
    agent_class, observe = module.Agent, module.Agent.observe
    monkeypatch.setattr(module, "Agent", lambda *a: made.append(agent_class(*a)) or made[-1])

    def spoil(agent, obs, calls=[]):  # noqa: B006
        """After the third update, one weight of the critic is NaN."""
        observe(agent, obs)
        calls.append(obs)
        if len(calls) == 3:
            agent.critic[0].weight.data[0, 0] = float("nan")

    monkeypatch.setattr(agent_class, "observe", spoil)
    with pytest.raises(SystemExit) as stop:
        module.train(module.Args(run_dir=str(tmp_path / "run"), total_timesteps=2560, save_freq=512))
    assert stop.value.code == 1
    message = capsys.readouterr().err.splitlines()[-1]
    assert "value_loss is nan after 1,024 steps" in message  # and no progress bar after it
    assert "000000000512.pt" in message
    (checkpoint,) = module.list_checkpoints(tmp_path / "run")
    assert all(x.isfinite().all() for x in module.load_checkpoint(checkpoint)["model"].values())


def test_weights_that_the_last_gradient_step_spoilt_are_not_saved(script, tmp_path, monkeypatch, capsys):
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
    with pytest.raises(SystemExit) as stop:
        module.train(module.Args(run_dir=str(run_dir), **settings))
    assert stop.value.code == 1
    (checkpoint,) = module.list_checkpoints(run_dir)
    message = capsys.readouterr().err.splitlines()[-1]
    assert "bias is not finite after" in message
    assert checkpoint.name in message


@pytest.mark.parametrize("step", [0, 40])
def test_an_observation_that_is_not_finite_gets_a_sentence(step, tmp_path, monkeypatch, capsys):
    module = SCRIPTS["ppo_cartpole"]
    make_envs = module.make_envs

    def make(args, *rest, **more):
        envs = make_envs(args, *rest, **more)
        reset, play, steps = envs.reset, envs.step, []
        bad = np.full((args.num_envs, 4), np.nan, np.float32)

        def play_some(actions):
            steps.append(1)
            _, *rest = result = play(actions)
            return (bad, *rest) if len(steps) == step else result

        envs.reset = lambda **seed: reset(**seed) if step else (bad, {})
        envs.step = play_some
        return envs

    monkeypatch.setattr(module, "make_envs", make)
    with pytest.raises(SystemExit) as stop:
        module.train(module.Args(run_dir=str(tmp_path / "run"), total_timesteps=2560, save_freq=256))
    assert stop.value.code == 1
    message = capsys.readouterr().err.splitlines()[-1]
    newest = "000000000256.pt" if step else "none"
    assert f"an observation of the environment is not finite after {256 if step else 0} steps" in message
    assert f"{newest}. " in message


def test_a_signal_after_the_last_update_does_not_make_a_finished_run_a_stopped_one(
    script, tmp_path, monkeypatch, capsys
):
    module, signals = SCRIPTS[script], []
    save = module.save_checkpoint
    args = module.Args(run_dir=str(tmp_path / "run"), **SHORT[script])

    def signal_at_the_end(run_dir, args, global_step, *rest, **more):
        if global_step >= args.total_timesteps:
            signals.append(signal.SIGINT)
        return save(run_dir, args, global_step, *rest, **more)

    monkeypatch.setattr(module, "save_checkpoint", signal_at_the_end)
    module.train(args, signals)
    assert signals == [signal.SIGINT]
    assert "Done." in capsys.readouterr().out


def test_what_a_signal_saves_is_what_an_uninterrupted_run_had_then(script, tmp_path, monkeypatch):
    """The last completed update: in PPO, a rollout that is cut short is dropped."""
    module, signals = SCRIPTS[script], []
    settings = SHORT[script] | {"save_freq": 1}
    whole = module.train(module.Args(run_dir=str(tmp_path / "whole"), **settings))
    settings["save_freq"] = 1000
    make_envs, steps = module.make_envs, []

    def make_and_count(args, *rest, **more):
        envs = make_envs(args, *rest, **more)
        step = envs.step

        def step_and_signal(actions):
            steps.append(1)
            if len(steps) == 1.5 * getattr(args, "num_steps", 20):  # half way through the second rollout
                signals.append(signal.SIGTERM)
            return step(actions)

        envs.step = step_and_signal
        return envs

    monkeypatch.setattr(module, "make_envs", make_and_count)
    with pytest.raises(SystemExit) as stop:
        module.train(module.Args(run_dir=str(tmp_path / "cut"), **settings), signals)
    assert stop.value.code == 143
    (path,) = module.list_checkpoints(tmp_path / "cut")
    saved, expected = load_checkpoint(path), load_checkpoint(whole / "checkpoints" / path.name)
    assert all(torch.equal(saved["model"][key], expected["model"][key]) for key in expected["model"])


@pytest.mark.parametrize(
    ("script", "number", "code"),
    [
        ("ppo_cartpole", signal.SIGINT, 130),
        ("dqn_atari", signal.SIGTERM, 143),
        pytest.param("ppo_cartpole", signal.SIGTERM, 143, marks=pytest.mark.slow),
        pytest.param("ppo_atari", signal.SIGTERM, 143, marks=pytest.mark.slow),
    ],
)
def test_a_signal_saves_and_says_how_to_go_on(script, number, code, tmp_path):
    """Ctrl-C, or what a cluster sends before it kills: what was learned so far is saved."""
    settings = SHORT[script] | {"total_timesteps": 100_000, "save_freq": 100_000, "run_dir": "run"}
    if script == "dqn_atari":
        settings |= {"train_frequency": 100, "num_envs": 8}  # soon at the first log
    command = [sys.executable, ROOT / f"{script}.py", *flags(settings)]
    process = subprocess.Popen(command, cwd=tmp_path, text=True, **PIPES)
    while not (events := list(tmp_path.glob("run/events.*"))) or events[0].stat().st_size < 5000:
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.1)
    process.send_signal(number)
    stdout, stderr = process.communicate(timeout=60)
    assert process.returncode == code
    assert "Traceback" not in stderr
    (checkpoint,) = (tmp_path / "run" / "checkpoints").iterdir()
    step = SCRIPTS[script].load_checkpoint(checkpoint)["global_step"]
    assert step > 0
    assert stdout.splitlines()[-1] == f"Stopped after {step:,} steps. Go on: python {script}.py --resume run"
    updates = stride(SCRIPTS[script].Args(**settings))
    assert step % updates == 0
    done = run(f"{script}.py", "--resume", "run", "--total-timesteps", step + updates, cwd=tmp_path)
    assert done.returncode == 0, done.stderr


def test_two_processes_never_write_one_folder(tmp_path, capsys):
    module = SCRIPTS["ppo_cartpole"]
    _, lock = module.open_run(module.Args(run_dir=str(tmp_path / "run")))
    done = run("ppo_cartpole.py", "--run-dir", "run", cwd=tmp_path)
    assert done.returncode == 1
    assert "another process" in done.stderr
    assert done.stderr.count("\n") == 1
    lock.close()
    module.open_run(module.Args(run_dir=str(tmp_path / "run")))


def test_two_runs_of_one_second_get_two_folders(tmp_path, monkeypatch):
    module = SCRIPTS["ppo_cartpole"]
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(module.time, "time", lambda: 1e9)
    folders = [module.open_run(module.Args())[0] for _ in range(3)]
    assert len(set(folders)) == 3


def test_a_file_that_is_not_named_by_a_step_is_not_the_newest(checkpoint_file):
    best = checkpoint_file.with_name("best.pt")
    best.write_bytes(checkpoint_file.read_bytes())
    assert evaluate.find_checkpoint(checkpoint_file.parents[1]) == checkpoint_file
    assert evaluate.find_checkpoint(best) == best


class Payload:
    def __reduce__(self):
        return os.mkdir, ("payload_ran",)


def test_a_checkpoint_with_code_in_it_is_refused_and_the_code_not_run(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    torch.save({"format": 1, "script": "ppo_cartpole", "args": {}, "global_step": 0, "model": Payload()}, "evil.pt")
    refusal("evil.pt", capsys)
    (tmp_path / "plain.pt").write_bytes(pickle.dumps(Payload()))
    refusal("plain.pt", capsys)
    with pytest.raises(SystemExit):
        evaluate.main(evaluate.Args(checkpoint="evil.pt"))
    assert not (tmp_path / "payload_ran").exists()


@pytest.mark.parametrize("keep", [0, 4, 100, 0.5, -1])
def test_a_shortened_checkpoint_is_refused(keep, checkpoint_file, capsys):
    whole = checkpoint_file.read_bytes()
    checkpoint_file.write_bytes(whole[: int(len(whole) * keep) if isinstance(keep, float) else keep])
    assert "damaged" in refusal(checkpoint_file, capsys)


def test_a_flipped_bit_in_a_weight_is_refused(checkpoint_file, capsys):
    whole = bytearray(checkpoint_file.read_bytes())
    with zipfile.ZipFile(checkpoint_file) as file:
        largest = max(file.infolist(), key=lambda info: info.file_size)
    middle = largest.header_offset + 200 + largest.file_size // 2
    whole[middle] ^= 1
    checkpoint_file.write_bytes(whole)
    assert torch.load(checkpoint_file, weights_only=True)["format"] == 1  # torch alone does not notice
    assert "damaged" in refusal(checkpoint_file, capsys)


def test_a_weight_that_a_flipped_bit_calls_a_directory_is_refused(checkpoint_file, capsys):
    """torch.load leaves the memory of its weights as it found it, and all checksums are right."""
    whole = bytearray(checkpoint_file.read_bytes())
    entry = whole.rindex(b"PK\x01\x02", 0, whole.rindex(b"/data/0"))  # of a weight, in the central directory
    whole[entry + 38] |= 0x10  # its external file attributes (APPNOTE.TXT, 4.3.12)
    checkpoint_file.write_bytes(whole)
    with zipfile.ZipFile(checkpoint_file) as file:
        assert file.testzip() is None
    assert torch.load(checkpoint_file, weights_only=True)["format"] == 1  # torch alone does not notice
    assert "damaged" in refusal(checkpoint_file, capsys)


def test_other_formats_and_foreign_files_are_refused(checkpoint_file, tmp_path, capsys):
    checkpoint = load_checkpoint(checkpoint_file)
    torch.save(checkpoint | {"format": 2}, tmp_path / "newer.pt")
    message = refusal(tmp_path / "newer.pt", capsys)
    assert "format 2" in message
    assert "format 1" in message
    torch.save(checkpoint["model"], tmp_path / "weights.pt")
    assert "no checkpoint of these scripts" in refusal(tmp_path / "weights.pt", capsys)
    torch.save(torch.zeros(3), tmp_path / "tensor.pt")
    assert "no checkpoint of these scripts" in refusal(tmp_path / "tensor.pt", capsys)
    for broken in ({"args": [1]}, {"model": 3}, {"global_step": "5"}, {"format": torch.zeros(3)}, {"script": 7}):
        torch.save(checkpoint | broken, tmp_path / "broken.pt")
        assert "no checkpoint of these scripts" in refusal(tmp_path / "broken.pt", capsys)


@pytest.mark.parametrize(
    "broken",
    [{"optimizer": 3}, {"rng": None}, {"args": {"no_such": 1}}, {"args": {"num_envs": "8"}}, {"model": {"a": 1}}],
)
def test_a_whole_file_that_fits_nothing_gets_one_sentence(broken, checkpoint_file, capsys, monkeypatch):
    """Not damaged, but from an edited script, or made by hand."""
    module = SCRIPTS["ppo_cartpole"]
    torch.save(load_checkpoint(checkpoint_file) | broken, checkpoint_file)
    monkeypatch.setattr("sys.argv", ["x.py", "--resume", str(checkpoint_file), "--total-timesteps", "2000"])
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        module.train(module.read_args())
    assert stop.value.code == 1
    assert capsys.readouterr().err.count("\n") == 1
    if broken.keys() & {"args", "model"}:
        with pytest.raises(SystemExit) as stop:
            evaluate.main(evaluate.Args(str(checkpoint_file)))
        assert stop.value.code == 1
        assert capsys.readouterr().err.count("\n") == 1


def test_norm_obs_is_saved_and_reloaded_and_frozen(tmp_path):
    module = SCRIPTS["ppo_cartpole"]
    run_dir = module.train(module.Args(run_dir=str(tmp_path / "run"), norm_obs=True, **SHORT["ppo_cartpole"]))
    checkpoint, agent = reload(module, run_dir)
    assert agent.norm_obs.count == checkpoint["global_step"]
    assert agent.norm_obs.var.ne(1).all()
    before = {k: v.clone() for k, v in agent.state_dict().items()}
    evaluate.score(module.find_checkpoint(run_dir), evaluate.Args(checkpoint=str(run_dir), episodes=2))
    assert all(torch.equal(before[k], v) for k, v in agent.state_dict().items())
