"""What holds for the scripts as files and as commands: what they share, what they say, how they refuse."""

import ast
import os
import re
import shlex
import shutil
import sys
import tomllib
from pathlib import Path
from types import SimpleNamespace

import gymnasium as gym
import numpy as np
import pytest
import torch
import tyro
from conftest import ROOT, SCRIPTS, SHORT, flags, run, train
from probes import PROBES
from simulated_gpu import simulated_gpu

import evaluate
import ppo_atari
import ppo_cartpole

FILES = ["ppo_cartpole.py", "ppo_atari.py", "dqn_atari.py", "evaluate.py"]
OWN = {"Args", "make_envs", "Agent", "check_args", "train"}  # may differ from script to script
BANNERS = ["Arguments", "Network", "Storage", "Learning", "Training", "Environment", "Refusals", "The run"]
BUDGETS = {  # lines: to the end of train(), train() itself, the run, the file
    "ppo_cartpole": (335, 60, 280, 670),
    "ppo_atari": (315, 60, 280, 720),
    "dqn_atari": (395, 70, 280, 790),
}
PROJECT = {path.stem for path in ROOT.glob("*.py")} | {"tests", "benchmarks"}


def definitions(file):
    """Top-level functions and classes of a file: name -> source."""
    source = (ROOT / file).read_text()
    nodes = [node for node in ast.parse(source).body if isinstance(node, ast.FunctionDef | ast.ClassDef)]
    lines = source.splitlines()
    return {node.name: "\n".join(lines[node.lineno - 1 : node.end_lineno]) for node in nodes}


@pytest.mark.parametrize("file", FILES)
@pytest.mark.parametrize("other", FILES)
def test_what_two_scripts_share_they_share_to_the_letter(file, other):
    ours, theirs = definitions(file), definitions(other)
    shared = ours.keys() & theirs.keys() - OWN
    assert "fail" in shared
    for name in shared:
        assert ours[name] == theirs[name], f"{name} differs between {file} and {other}"


def test_both_atari_scripts_play_the_same_games():
    """test_atari.py looks at those of ppo_atari.py alone."""
    assert definitions("ppo_atari.py")["make_envs"] == definitions("dqn_atari.py")["make_envs"]


@pytest.mark.parametrize("file", FILES)
def test_inline_requirements_are_requirements_txt(file):
    source = (ROOT / file).read_text()
    block = re.match(r"# /// script\n((?:#.*\n)+?)# ///\n", source).group(1)
    metadata = tomllib.loads(re.sub(r"(?m)^# ?", "", block))
    assert metadata["dependencies"] == (ROOT / "requirements.txt").read_text().split()
    assert metadata["requires-python"] == ">=3.11"


def test_scripts_have_the_same_rooms_in_the_same_order(script):
    assert re.findall(r"(?m)^# ---- (.*) ----$", (ROOT / f"{script}.py").read_text()) == BANNERS


def test_scripts_keep_their_budgets(script):
    """The algorithm comes first, and a reader can see its end."""
    source = (ROOT / f"{script}.py").read_text()
    lines = source.splitlines()
    (train,) = [node for node in ast.parse(source).body if getattr(node, "name", None) == "train"]
    counts = train.end_lineno, train.end_lineno - train.lineno + 1, len(lines) - lines.index("# ---- The run ----")
    for count, budget in zip((*counts, len(lines)), BUDGETS[script], strict=True):
        assert count <= budget
    assert max(map(len, lines)) <= 120


def test_the_run_is_the_same_to_the_letter_and_knows_no_algorithm():
    sources = [(ROOT / f"{script}.py").read_text() for script in SCRIPTS]
    assert len({source[source.index("# ---- The run ----") :] for source in sources}) == 1
    the_run = sources[0][sources[0].index("# ---- The run ----") :].lower()
    for word in ("rollout", "minibatch", "replay", "buffer", "epsilon", "advantage", "atari", "cartpole"):
        assert word not in the_run


def test_train_knows_no_file_no_signal_and_no_rank(script):
    source = definitions(f"{script}.py")["train"]
    assert len(re.findall(r"\breturn\b", source)) == 1
    for word in ("open", "signal", "print", "rank", "Path", 'f"', "sys", "os"):
        assert not re.search(rf"\b{re.escape(word)}", source), word


def test_a_training_script_stands_alone(script, tmp_path):
    tree = ast.parse((ROOT / f"{script}.py").read_text())
    imported = {
        alias.name.split(".")[0] for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names
    }
    imported |= {node.module.split(".")[0] for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    assert not imported & PROJECT
    shutil.copy(ROOT / f"{script}.py", tmp_path / "my_idea.py")
    done = run(tmp_path / "my_idea.py", *flags(SHORT[script]), cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert next((tmp_path / "runs").iterdir()).name.split("__")[1] == "my_idea"


def test_what_a_user_sees(script, tmp_path):
    """A first line with what runs and where it writes, lines of progress, a last line with what to do next."""
    done = run(f"{script}.py", *flags(SHORT[script] | {"cuda": True, "run_dir": "here"}), cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    first, last = done.stdout.splitlines()
    for part in (script, SCRIPTS[script].Args.env_id, "in here", str(SHORT[script]["total_timesteps"])):
        assert part in first
    assert "no GPU" in first or "CPU" not in first
    command = re.search(r"python (evaluate\.py .*)", last).group(1)
    assert re.search(r"100%.*steps/s", done.stderr.splitlines()[-1])
    scored = run(*shlex.split(command), "--episodes", 1, cwd=tmp_path)
    assert scored.returncode == 0, scored.stderr


def test_a_new_run_gets_a_folder_named_by_what_it_is(script, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run = SCRIPTS[script].Run(SCRIPTS[script].Args(env_id="my:ALE/Pong-v5", seed=7, exp_name="idea"))
    assert re.fullmatch(r"runs/my-ALE-Pong-v5__idea__7__\d{10}", str(run.folder))


def test_the_run_obeys_the_flags_of_the_device(script, tmp_path, monkeypatch):
    module = SCRIPTS[script]
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", False)  # and so again when the test is over
    for i, flag in enumerate((True, False)):
        with simulated_gpu():
            run = module.Run(module.Args(run_dir=str(tmp_path / str(i)), torch_deterministic=flag, cuda=flag))
        assert run.device.type == ("cuda" if flag else "cpu")
        assert torch.backends.cudnn.deterministic is flag


class Doubles(gym.Env):
    """In double precision, as NumPy makes it by default, and without a time limit."""

    observation_space = gym.spaces.Box(-1, 1, (3,), np.float64)

    def __init__(self, start=0):
        self.action_space = gym.spaces.Discrete(2, start=start)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        return self.observation_space.sample(), {}

    def step(self, action):
        return self.observation_space.sample(), 1.0, False, bool(self.np_random.random() < 0.1), {}


gym.register("Doubles-v0", Doubles)
gym.register("FromOne-v0", Doubles, kwargs={"start": 1})


@pytest.mark.parametrize("norm_obs", [True, False])
def test_an_environment_in_double_precision_trains(norm_obs, tmp_path):
    args = ppo_cartpole.Args(env_id="Doubles-v0", norm_obs=norm_obs)
    ppo_cartpole.check_args(args)
    train(ppo_cartpole, tmp_path, env_id="Doubles-v0", norm_obs=norm_obs, total_timesteps=512)


def test_actions_that_do_not_begin_at_0_are_refused(monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(tmp_path)
    code, message = refuse(ppo_cartpole, ["--env-id", "FromOne-v0"], monkeypatch, capsys)
    assert code == 2
    assert "from 0" in message


def test_an_environment_that_cannot_be_made_is_not_advised_instead_of_itself(monkeypatch, capsys, tmp_path):
    (tmp_path / "needs_module.py").write_text(
        "import gymnasium as gym\ngym.register('Needs-v0', lambda: __import__('not_there'))\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    for env_id, close in (("needs_module:Needs-v0", ""), ("needs_module:CartPol-v1", " Close: CartPole-v1")):
        code, message = refuse(ppo_cartpole, ["--env-id", env_id], monkeypatch, capsys)
        assert code == 2
        assert ("No module named 'not_there'" if close == "" else close) in message
        assert ("Close" in message) == bool(close)


def test_no_time_limit_is_none_that_a_checkpoint_could_cut(capsys):
    ppo_cartpole.check_args(ppo_cartpole.Args(env_id=PROBES["ConstantReward"], save_freq=1000))
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("cuda", ["--no-cuda", "--cuda"])
def test_bf16_is_measured_wherever_the_run_will_be_on_the_cpu(cuda, monkeypatch):
    measured = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(ppo_atari, "check_bf16", lambda: measured.append(1))
    ppo_atari.check_args(tyro.cli(ppo_atari.Args, args=["--bf16", cuda]))
    assert measured


def test_help_explains_every_flag(script):
    done = run(f"{script}.py", "--help", cwd=ROOT)
    assert done.returncode == 0
    assert SCRIPTS[script].__doc__.splitlines()[0][:40] in done.stdout
    source = definitions(f"{script}.py")["Args"]
    fields = re.findall(r"(?m)^    (\w+): (.*)$", source)
    assert len(fields) > 20
    for name, rest in fields:
        assert f"--{name.replace('_', '-')}" in done.stdout
        assert "  # " in rest, f"{name} is not explained"


def refuse(module, arguments, monkeypatch, capsys):
    """Exit code and message of a command that must be refused: one sentence."""
    monkeypatch.setattr(sys, "argv", [f"{module.__name__}.py", *map(str, arguments)])
    monkeypatch.setattr(module.Run, "begin_segment", lambda run: pytest.fail("it was not refused"))
    with pytest.raises(SystemExit) as stop:
        module.train(module.read_args())
    message = re.sub("--save-freq .* cuts .*\n", "", capsys.readouterr().err)  # a warning of short runs
    assert message.startswith(f"{module.__name__}.py: ")
    assert message.count("\n") == 1
    return stop.value.code, message


USAGE = {  # arguments -> what the one sentence must name
    "ppo_cartpole": {
        "--env-id CartPol-v1": "CartPole-v1",
        "--env-id CartPole-v9": "CartPole-v1",
        "--env-id no_such_module:Env-v0": "no_such_module",
        "--env-id Pendulum-v1": "discrete",
        "--env-id FrozenLake-v1": "vectors",
        "--env-id LunarLander-v3": "not installed",
        "--env-id Hopper-v2": "Hopper-v2",
        "--env-id ALE/Pong-v9": "ALE/Pong-v",
        "--env-id BreakoutNoFrameskip-v4": "BreakoutNoFrameskip-v4",
        "--env-id=": "--env-id",
    },
}
USAGE["ppo_atari"] = USAGE["dqn_atari"] = {
    "--env-id BreakoutNoFramskip-v4": "BreakoutNoFrameskip-v4",
    "--env-id ALE/Brekout-v5": "ALE/Breakout-v5",
    "--env-id CartPole-v1": "ppo_cartpole.py",
    "--env-id Breakout-v4": "BreakoutNoFrameskip-v4",
    "--env-id ALE/Breakout": "ALE/Breakout-v5",
}
EVERYWHERE = {
    "--num-envs 0": "--num-envs",
    "--total-timesteps 0": "--total-timesteps",
    "--save-freq 0": "--save-freq",
    "--seed -1": "--seed",
    "--seed 4294967296": "--seed",
    "--gamma 1.01": "--gamma",
    "--learning-rate nan": "--learning-rate",
    "--learning-rate inf": "--learning-rate",
}
PPO = {
    "--num-steps -1": "--num-steps",
    "--update-epochs 0": "--update-epochs",
    "--gae-lambda -0.1": "--gae-lambda",
    "--num-minibatches 3": "--num-minibatches 3",
    "--num-envs 2 --num-steps 4 --num-minibatches 8": "2 or more",
    "--num-minibatches 0": "--num-minibatches",
    "--clip-coef -0.1": "--clip-coef",
    "--max-grad-norm -0.5": "--max-grad-norm",
    "--ent-coef nan": "--ent-coef",
    "--vf-coef -1": "--vf-coef",
    "--target-kl -1": "--target-kl",
}
DQN = {
    "--train-frequency 0": "--train-frequency",
    "--batch-size 0": "--batch-size",
    "--target-network-frequency 0": "--target-network-frequency",
    "--tau 1.1": "--tau",
    "--end-e -0.1": "--end-e",
    "--exploration-fraction 2": "--exploration-fraction",
    "--learning-starts -1": "--learning-starts",
    "--total-timesteps 80000": "--learning-starts 80000",
    "--exploration-fraction 1": "--exploration-fraction 1.0",
    "--buffer-size 7 --learning-starts 0": "--buffer-size 7",
    "--buffer-size 79999": "--buffer-size 79999",
    "--total-timesteps 64 --num-envs 3 --buffer-size 16 --learning-starts 16": "--buffer-size 16",  # 5 rows of 3
    "--total-timesteps 64 --buffer-size 64 --learning-starts 32 --exploration-fraction 0.5": "--exploration-fraction",
    "--buffer-size 1000000000": "7059.5 GB",
}
OWN_USAGE = {"ppo_cartpole": PPO, "ppo_atari": PPO, "dqn_atari": DQN}


@pytest.mark.parametrize(
    ("script", "arguments", "named"),
    [(script, *case) for script in SCRIPTS for case in (USAGE[script] | EVERYWHERE | OWN_USAGE[script]).items()],
    indirect=["script"],
)
def test_wrong_usage_gets_one_sentence(script, arguments, named, monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(tmp_path)
    code, message = refuse(SCRIPTS[script], arguments.split(" "), monkeypatch, capsys)
    assert code == 2
    assert named in message
    assert not list(tmp_path.iterdir())  # nothing half-written


@pytest.mark.parametrize("name", ["ppo_atari", "dqn_atari"])
@pytest.mark.parametrize("slower", [True, False])
def test_bf16_is_measured_before_it_is_used(name, slower, monkeypatch, capsys):
    """A processor may have the instructions and be slow all the same: one sentence, and the run goes on."""
    module = SCRIPTS[name]

    class Clock:
        def __init__(self, work, setup):
            names = {"torch": torch}
            exec(f"{setup}\n{work}", names)  # what is measured runs
            bf16 = names["x"].dtype == torch.bfloat16
            self.seconds = [1.0 + slower * bf16] * 5
            if bf16 != slower:  # other programs slow down some of the five, so that the mean would mislead
                self.seconds[::2] = [9.0] * 3

        def timeit(self, number):
            return SimpleNamespace(mean=np.mean([self.seconds.pop() for _ in range(number)]))

    monkeypatch.setattr(module, "Timer", Clock)
    monkeypatch.setattr(sys, "argv", [f"{name}.py", "--bf16", "--no-cuda"])
    assert module.read_args().bf16
    message = capsys.readouterr().err
    assert ("--bf16 may be slower" in message) == slower
    assert message.count("\n") == slower


@pytest.mark.parametrize("path", ["nothing", "empty", "empty/no.pt", "text.pt"])
def test_a_missing_or_empty_run_gets_one_sentence(path, script, monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    (tmp_path / "text.pt").write_text("not a checkpoint")
    code, message = refuse(SCRIPTS[script], ["--resume", path], monkeypatch, capsys)
    assert code == 1
    assert path in message
    with pytest.raises(SystemExit) as stop:
        evaluate.main(evaluate.Args(path))
    assert stop.value.code == 1
    assert capsys.readouterr().err.count("\n") == 1


def test_an_empty_resume_is_no_new_run(script, monkeypatch, capsys, tmp_path):
    """What a shell makes of --resume "$(ls ...)" where nothing was found."""
    monkeypatch.chdir(tmp_path)
    code, message = refuse(SCRIPTS[script], ["--resume", ""], monkeypatch, capsys)
    assert code == 1
    assert "holds no checkpoint (yet)" in message


def test_resume_refuses_another_environment_and_another_script(tmp_path, monkeypatch, capsys):
    cartpole, atari = SCRIPTS["ppo_cartpole"], SCRIPTS["ppo_atari"]
    run_dir = train(cartpole, tmp_path, **SHORT["ppo_cartpole"])
    capsys.readouterr()
    code, message = refuse(cartpole, ["--resume", run_dir, "--env-id", "Acrobot-v1"], monkeypatch, capsys)
    assert code == 2
    assert "Acrobot-v1" in message
    assert "CartPole-v1" in message
    code, message = refuse(atari, ["--resume", run_dir], monkeypatch, capsys)
    assert code == 1


def test_resume_with_an_edited_network_gets_one_sentence(tmp_path, monkeypatch, capsys):
    module = SCRIPTS["ppo_cartpole"]
    run_dir = train(module, tmp_path, **SHORT["ppo_cartpole"])
    capsys.readouterr()
    code, message = refuse(module, ["--resume", run_dir, "--norm-obs", "--total-timesteps", 2000], monkeypatch, capsys)
    assert code == 1
    assert "does not fit" in message


@pytest.mark.parametrize("policy", [path.name for path in sorted(ROOT.glob("benchmarks/policies/*.pt"))])
def test_resume_refuses_a_policy_without_its_training(policy, tmp_path, monkeypatch, capsys):
    path, run_dir = ROOT / "benchmarks/policies" / policy, tmp_path / "run"
    flags = ["--resume", path, "--run-dir", run_dir, "--total-timesteps", 10_000_000]
    code, message = refuse(SCRIPTS[policy.split("-")[0]], flags, monkeypatch, capsys)
    assert code == 1
    assert "a policy alone" in message
    assert not run_dir.exists()


def test_a_run_folder_that_cannot_be_written_gets_one_sentence(script, tmp_path, monkeypatch, capsys):
    (tmp_path / "file").write_text("")
    code, message = refuse(SCRIPTS[script], ["--run-dir", tmp_path / "file" / "run"], monkeypatch, capsys)
    assert code == 1
    assert "--run-dir" in message


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ("--episodes 0", "--episodes"),
        ("--num-envs 11", "--num-envs"),
        ("--seed -1", "--seed"),
        ("--seed 4294967296", "--seed"),
        ("--all", "--all"),
        ("--json no/where.json", "--json"),
        ("--json .", "--json"),
        ("--json=", "--json"),
        ("--video=", "--video"),
        ("--video film.avi", "--video film.avi"),
        ("--video no/folder/film.mp4", "--video no/folder/film.mp4"),
        ("--render --num-envs 2", "--num-envs"),
    ],
)
def test_wrong_usage_of_evaluate_gets_one_sentence(arguments, named, capsys):
    with pytest.raises(SystemExit) as stop:
        tyro.cli(evaluate.Args, args=["some.pt", *arguments.split()])
    assert stop.value.code == 2
    message = capsys.readouterr().err
    assert named in message
    assert message.count("\n") == 1


@pytest.mark.parametrize("flag", ["all", "follow"])
@pytest.mark.parametrize("picture", [{"render": True}, {"video": "film.mp4"}])
def test_many_checkpoints_are_not_one_film(flag, picture, tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        evaluate.Args(str(tmp_path), **picture, **{flag: True})
    assert stop.value.code == 2
    assert "--render and --video show one game at a time" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["scores.json", "new.json"])
def test_a_json_that_may_not_be_written_is_refused_before_anything_is_played(name, tmp_path, monkeypatch, capsys):
    """os.access is replaced: whoever runs the tests may be root."""
    (tmp_path / "scores.json").touch()
    asked = tmp_path / "scores.json" if name == "scores.json" else tmp_path
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path) != asked)
    with pytest.raises(SystemExit) as stop:
        evaluate.Args("some.pt", json=str(tmp_path / name))
    assert stop.value.code == 2
    assert f"--json {tmp_path / name} cannot be written: no permission." in capsys.readouterr().err


def test_without_norm_adv_a_minibatch_may_be_a_single_step():
    ppo_cartpole.check_args(ppo_cartpole.Args(num_envs=1, num_steps=4, num_minibatches=4, norm_adv=False))


@pytest.mark.parametrize(
    ("arguments", "least"),
    [
        ("ppo_cartpole --num-envs 64", 34048),  # CartPole's limit is 500; one rollout of 32 more
        ("ppo_cartpole --num-envs 32", None),
        ("ppo_cartpole --save-freq 4000", 4256),  # some of these are 3,840 steps, as rollouts are played to their end
        ("ppo_cartpole --save-freq 4096", None),
        ("ppo_cartpole --env-id Acrobot-v1 --save-freq 3000", 4256),
        ("ppo_cartpole --save-freq 3000 --total-timesteps 3000", None),
        ("ppo_cartpole --save-freq 800 --num-steps 400", 7200),
        ("ppo_cartpole --save-freq 800 --num-steps 500", None),
        ("ppo_atari --save-freq 30000", 40000),
        ("ppo_atari --save-freq 40000", None),
        ("dqn_atari --num-envs 64 --save-freq 320000", None),
        ("dqn_atari --save-freq 39999", 40000),
    ],
)
def test_a_save_freq_that_cuts_episodes_off_is_named(arguments, least, capsys):
    """Episodes that never end leave no return behind: a good policy would look like one that has not learned."""
    name, *arguments = arguments.split()
    module = SCRIPTS[name]
    module.check_args(tyro.cli(module.Args, args=arguments))
    warnings = re.findall(r"--save-freq \d+ cuts .* off before their end: raise it to (\d+)", capsys.readouterr().err)
    assert warnings == ([str(least)] if least else [])


@pytest.mark.parametrize("seed", [2**31 - 1, 2**32 - 1])
@pytest.mark.parametrize("name", SCRIPTS)
def test_the_largest_seeds_run(name, seed, tmp_path):
    """ale-py takes seeds below 2**31: no environment may get --seed itself."""
    module, settings = SCRIPTS[name], {"seed": seed} | SHORT[name]
    module.check_args(module.Args(**settings))
    assert (train(module, tmp_path, **settings) / "checkpoints").is_dir()
