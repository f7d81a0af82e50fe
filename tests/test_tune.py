"""benchmarks/tune.py: a study that goes on whatever happens, and an honest comparison at its end."""

import fcntl
import json
import math
import multiprocessing
import os
import re
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import optuna
import pytest
import tyro
from conftest import ROOT, run

import evaluate
import ppo_cartpole

sys.path.append(str(ROOT / "benchmarks"))
import tune

COMPLETE, PRUNED, FAIL, RUNNING = (
    getattr(optuna.trial.TrialState, name) for name in "COMPLETE PRUNED FAIL RUNNING".split()
)


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    """Each test in a folder of its own. What tune.py sets in this process is put back."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.setattr(tune, "sources", {})
    monkeypatch.setenv("OMP_NUM_THREADS", os.environ.get("OMP_NUM_THREADS", ""))
    yield tmp_path


@pytest.fixture
def start(monkeypatch):
    """Does what `python benchmarks/tune.py ppo_cartpole.py ...` does, but scores runs with a function of their Args.

    Returns the Args of the runs that were scored, oldest first.
    """

    def start(arguments, score, script=ROOT / "ppo_cartpole.py"):
        trained, scored = {}, []

        def execute(command, output):
            if "--json" not in command:
                args = tyro.cli(ppo_cartpole.Args, args=command[2:])
                trained[args.run_dir] = args
            else:
                args = trained[command[2]]
                assert command[command.index("--seed") + 1] == str(args.seed)
                value = score(args)
                scored.append(args)
                Path(command[command.index("--json") + 1]).write_text(json.dumps({"mean_return": value}))

        monkeypatch.setattr(tune, "execute", execute)
        monkeypatch.setattr(sys, "argv", ["tune.py", str(script), *arguments.split()])
        tune.main(*tyro.cli(tune.Args, return_unknown_args=True))
        return scored

    return start


def study():
    """The only study below this folder."""
    (path,) = Path().glob("runs/tune__*/journal.log")
    storage = optuna.storages.JournalStorage(optuna.storages.journal.JournalFileBackend(str(path)))
    return optuna.load_study(study_name=None, storage=storage)


def states():
    return [trial.state for trial in study().trials]


# ---- A study ----

SMALL = "--space learning_rate=1e-4..1e-2,log --seeds 2 --fresh-seeds 2"


def test_flags_go_to_the_script_and_seeds_are_fresh(start, capsys):
    flags = "--env-id Acrobot-v1 --learning-rate 1e-5 --no-anneal-lr --exp-name seed "
    flags += "--space target_kl=0.01,None --space norm_obs=True,False --space num_steps=16..64"
    runs = start(f"{SMALL} {flags} --trials 3", lambda args: 10 + (args.learning_rate > 1e-5))
    trials = study().trials
    for i, args in enumerate(runs):
        assert (args.env_id, args.anneal_lr) == ("Acrobot-v1", False)
        wanted = trials[i // 2].params if i < 6 else study().best_params
        if i < 8:  # the last two runs are those of the defaults
            assert {name: getattr(args, name) for name in wanted} == wanted
            assert len(wanted) == 4
            assert 1e-4 <= args.learning_rate <= 1e-2
            assert 16 <= args.num_steps <= 64
    assert [args.seed for args in runs] == [1001, 1002] * 3 + [1, 2] * 2
    default = ppo_cartpole.Args()
    assert (runs[-1].learning_rate, runs[-1].num_steps, runs[-1].target_kl) == (
        1e-5,
        default.num_steps,
        default.target_kl,
    )
    assert capsys.readouterr().out.count("  11.00  {") == 3
    assert len(list(Path().glob("runs/tune__*/*.png"))) == 2


def test_the_same_command_goes_on(start, capsys):
    def score(args):
        return args.learning_rate

    first = start(f"{SMALL} --trials 2", score)
    more = start(f"{SMALL} --trials 4", score)
    assert states() == [COMPLETE] * 4
    assert len(first) == 2 * 2 + 2 + 2
    assert [args.seed for args in more[:4]] == [1001, 1002] * 2
    assert {args.run_dir for args in first} & {args.run_dir for args in more} == set()
    capsys.readouterr()
    assert start(f"{SMALL} --trials 4", score) == []  # nothing is left to do but to say it again
    assert "To train the best flags again" in capsys.readouterr().out
    start(f"{SMALL} --trials 2 --gamma 0.9", score)  # other flags are another study
    assert len(list(Path("runs").iterdir())) == 2


def test_failed_and_nan_runs_are_failed_trials(start, capsys):
    def score(args):
        number = int(re.search(r"trial_(\d)|$", args.run_dir)[1] or 9)
        if (number == 0 and args.seed == 1002) or args.run_dir.endswith("defaults/seed_2"):
            raise RuntimeError("value_loss is nan after 512 steps")
        return math.nan if number == 2 or args.run_dir.endswith("defaults/seed_3") else 10

    start(f"{SMALL} --fresh-seeds 3 --trials 4", score)
    assert states() == [FAIL, COMPLETE, FAIL, COMPLETE]
    out = capsys.readouterr().out
    assert re.search(r"Trial 0 failed with .*learning_rate.*: value_loss is nan after 512 steps\n", out)
    assert " 10.00  -inf to inf  defaults: 10.00, failed, failed\n" in out
    assert "difference: no verdict, as 2 failed and are left out\n" in out


def test_where_all_fail_one_sentence_says_so(start, capsys):
    def score(args):
        raise RuntimeError("no")

    with pytest.raises(SystemExit) as stop:
        start(f"{SMALL} --trials 2", score)
    assert stop.value.code == 1
    assert re.search(
        r"tune.py: no trial ended well: the output.txt in runs/tune__\S+ say why.\n$", capsys.readouterr().err
    )


def test_hopeless_trials_get_no_further_seed(start):
    """Five to compare with, then bad ones and good ones in turn."""

    def score(args):
        number = int(re.search(r"trial_(\d+)|$", args.run_dir)[1] or 0)
        return 10 + number if number < 5 else -500 if number % 2 else 500

    runs = start("--space learning_rate=1e-4..1e-2 --seeds 3 --fresh-seeds 2 --trials 10", score)
    assert states() == [COMPLETE] * 5 + [PRUNED, COMPLETE] * 2 + [PRUNED]
    assert [len(trial.intermediate_values) for trial in study().trials] == [3] * 5 + [1, 3] * 2 + [1]
    assert len(runs) == 7 * 3 + 3 + 2 * 2


@pytest.mark.parametrize(("gain", "verdict"), [(20, "are better"), (-20, "are worse"), (1, "no difference is shown")])
def test_the_verdict(gain, verdict, start, capsys):
    """Seeds scatter by ±8; a gain of 1 is lost in that. The search itself sees none of it."""

    def score(args):
        return 1000 if args.seed > 1000 else [-8, 5, 0, 8, -5][args.seed % 5] + gain * ("best" in args.run_dir)

    start("--space gamma=0.9,0.95 --trials 2 --seeds 1 --fresh-seeds 10", score)
    lines = capsys.readouterr().out.splitlines()
    best, defaults, difference = lines[
        lines.index(next(line for line in lines if line.startswith("With seeds"))) + 1 :
    ][:3]
    number = r"(-?\d+\.\d+)"
    for line, mean in ((best, gain), (defaults, 0)):
        found, low, high = map(float, re.match(rf" +{number}  {number} to {number}", line).groups())
        assert found == mean
        assert mean - 5 < low < mean - 2
        assert mean + 2 < high < mean + 5
    low, high = map(float, re.match(rf" +{number} to {number}", difference).groups())
    assert low < gain < high
    assert difference.endswith(verdict) or verdict in difference


def test_jobs_share_the_threads(start, monkeypatch):
    monkeypatch.setattr(tune.torch, "get_num_threads", lambda: 8)
    start(f"{SMALL} --trials 1", lambda args: 1)
    assert os.environ["OMP_NUM_THREADS"] == "8"
    seen = []
    start(f"{SMALL} --trials 5 --jobs 3", lambda args: seen.append(args.run_dir) or time.sleep(0.05) or 1)
    assert os.environ["OMP_NUM_THREADS"] == "2"
    assert states() == [COMPLETE] * 5
    assert len(seen) == len(set(seen))


# ---- What ends a study ----


def test_what_a_killed_process_left_is_run_again(start):
    """SystemExit out of a run is how Ctrl-C ends it: Optuna learns nothing of it, as after kill -9."""

    def score(args):
        if args.run_dir.endswith("trial_1/seed_1002"):
            raise SystemExit(130)
        return args.learning_rate

    with pytest.raises(SystemExit):
        start(f"{SMALL} --trials 3", score)
    assert states() == [COMPLETE, RUNNING]
    with pytest.raises(SystemExit):
        start(f"{SMALL} --trials 3", score)  # and again
    runs = start(f"{SMALL} --trials 3", lambda args: args.learning_rate)
    trials = study().trials
    assert [trial.state for trial in trials] == [COMPLETE, FAIL, FAIL, COMPLETE, COMPLETE]
    assert trials[3].params == trials[2].params == trials[1].params
    ran = [args.run_dir.split("/", 2)[2] for args in runs[:3]]
    assert ran == ["trial_1/seed_1002", "trial_4/seed_1001", "trial_4/seed_1002"]  # what was scored is kept
    assert len(trials[3].intermediate_values) == 2


def test_a_line_of_the_journal_that_a_full_disk_cut_short_costs_nothing_else(start):
    start(f"{SMALL} --trials 2", lambda args: args.learning_rate)
    (journal,) = Path().glob("runs/tune__*/journal.log")
    journal.write_text(journal.read_text() + '{"op_code": 4, "worker')
    before = study().trials
    assert len(start(f"{SMALL} --trials 3", lambda args: args.learning_rate)) >= 2
    assert study().trials[:2] == before
    assert states() == [COMPLETE] * 3


def test_a_run_that_outlived_its_tune_is_not_a_failed_trial(start):
    start(f"{SMALL} --trials 1", lambda args: 1)
    run_dir = next(Path().glob("runs/tune__*")) / "trial_1" / "seed_1001"
    run_dir.mkdir(parents=True)
    with open(run_dir / ".lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(SystemExit):
            start(f"{SMALL} --trials 2", lambda args: 1)
    assert states() == [COMPLETE, RUNNING]
    start(f"{SMALL} --trials 2", lambda args: 1)
    assert states() == [COMPLETE, FAIL, COMPLETE]


@pytest.mark.parametrize("score", [1, RuntimeError("half an edit")])
def test_a_script_that_is_edited_while_it_trains_gets_no_score(score, start, capsys):
    script = Path(shutil.copy(ROOT / "ppo_cartpole.py", "mine.py")).resolve()

    def edit(args):
        script.write_text(script.read_text() + "# another\n")
        if isinstance(score, Exception):
            raise score
        return score

    with pytest.raises(SystemExit):
        start(f"{SMALL} --trials 1", edit, script)
    assert f"{script} was edited meanwhile" in capsys.readouterr().err
    assert states() == [RUNNING]
    assert not list(Path().glob("runs/tune__*/trial_0/seed_*"))
    shutil.copy(ROOT / "ppo_cartpole.py", script)  # undone, the study goes on
    assert len(start(f"{SMALL} --trials 1", lambda args: 1, script)) == 6
    assert states() == [FAIL, COMPLETE]


def test_an_edit_ends_the_comparison_at_once(start):
    script, ran = Path(shutil.copy(ROOT / "ppo_cartpole.py", "mine.py")).resolve(), []

    def score(args):
        if "best" in args.run_dir:
            ran.append(args.seed)
            script.unlink()
        return 1

    with pytest.raises(SystemExit):
        start(f"{SMALL} --trials 1 --fresh-seeds 9", score, script)
    assert ran == [1]


def one_of_two(start, number):
    sys.stdout = open(f"out{number}", "w", buffering=1)
    scored = start(f"{SMALL} --trials 8", lambda args: Path(f"runs{number}").touch() or time.sleep(0.2) or 1)
    Path(f"ran{number}").write_text("\n".join(args.run_dir for args in scored))


def test_two_at_a_time_share_a_study(start):
    context = multiprocessing.get_context("fork")
    both = [context.Process(target=one_of_two, args=(start, number)) for number in range(2)]
    for number, process in enumerate(both):
        process.start()
        while not Path(f"runs{number}").exists():  # the second one comes while a trial of the first one runs
            assert process.is_alive()
            time.sleep(0.01)
    for process in both:
        process.join()
        assert process.exitcode == 0
    assert states() in ([COMPLETE] * 8, [COMPLETE] * 9)  # each ends the trial that it has begun
    ran = [Path(f"ran{number}").read_text().split("\n") for number in range(2)]
    assert min(map(len, ran)) >= 2
    assert len(ran[0] + ran[1]) == len({*ran[0], *ran[1]}) == 2 * len(states()) + 2 + 2
    ends = [re.search(r"(?s)\d trials have ended, .*", Path(f"out{number}").read_text())[0] for number in range(2)]
    assert ends[0] == ends[1]


def test_a_command_that_fails_is_told_by_its_last_line():
    code = "import sys; print('first'); sys.exit('it went wrong')"
    with pytest.raises(RuntimeError, match=r"^it went wrong \(exit code 1\)$"):
        tune.execute(["python", "-c", code], Path("output.txt"))
    assert Path("output.txt").read_text() == "first\nit went wrong\n"
    assert not tune.children


SLEEPER = """
    if "trial_0" not in args.run_dir and not Path("go").exists():  # the second trial hangs, and has a child
        import subprocess
        child = subprocess.Popen(["sleep", "1000"])
        Path("pids.tmp").write_text(f"{os.getpid()} {child.pid}")
        os.rename("pids.tmp", "pids")
        child.wait()
"""


def alive(pid):
    """Whether a process runs; one that ended and that nobody has asked about does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def wait_for(condition, process):
    deadline = time.monotonic() + 240
    while not condition():
        if process.poll() is not None or time.monotonic() > deadline:
            process.kill()
            pytest.fail(f"it ended by itself with {process.returncode}, or never came to that")
        time.sleep(0.05)


@pytest.mark.skipif(not Path("/proc").exists(), reason="needs /proc, to see which processes run")
def test_ctrl_c_leaves_no_child_and_loses_no_finished_trial():
    source = (ROOT / "ppo_cartpole.py").read_text()
    Path("sleeper.py").write_text(
        source.replace("    torch.set_num_threads(1)", f"{SLEEPER}    torch.set_num_threads(1)")
    )
    command = [sys.executable, ROOT / "benchmarks/tune.py", "sleeper.py", "--total-timesteps", "256"]
    command += "--space learning_rate=1e-4..1e-2 --trials 2 --seeds 1 --episodes 1".split()
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    wait_for(Path("pids").exists, process)
    pids = list(map(int, Path("pids").read_text().split()))
    assert all(map(alive, pids))
    try:
        process.send_signal(signal.SIGINT)
        err = process.communicate(timeout=60)[1]
        left = list(filter(alive, pids))
    finally:
        for pid in filter(alive, [process.pid, *pids]):
            os.kill(pid, signal.SIGKILL)
    assert not left
    assert process.returncode == 130
    assert "The same command goes on" in err
    assert "Traceback" not in err
    before = study().trials
    assert [trial.state for trial in before] == [COMPLETE, RUNNING]

    Path("go").touch()
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    wait_for(lambda: states()[2:] == [COMPLETE], process)
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=60)
    assert process.returncode == 130
    after = study().trials
    assert after[0] == before[0]
    assert [trial.params for trial in after[1:]] == [before[1].params] * 2
    assert len(list(Path().glob("runs/tune__*/trial_*"))) == 2


# ---- The whole of it ----

TARGET = """
import gymnasium as gym, numpy as np
class Coin(gym.Env):
    observation_space, action_space = gym.spaces.Box(-1, 1, (1,), np.float32), gym.spaces.Discrete(2)
    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        return np.zeros(1, np.float32), {}
    def step(self, action):
        return np.zeros(1, np.float32), float(action + self.np_random.random()), True, False, {}
gym.register("Coin-v0", entry_point=Coin)
"""


def test_the_last_line_trains_the_best_flags_and_finds_their_score(start, monkeypatch, capsys):
    """A copy of a script and an environment beside it, in a folder of its own; runs are real, but in this process."""
    Path("place").mkdir()
    Path("place/coin_env.py").write_text(TARGET)
    shutil.copy(ROOT / "ppo_cartpole.py", "place/my_idea.py")
    arguments = "place/my_idea.py --env-id coin_env:Coin-v0 --total-timesteps 512 --save-freq 256 --learning-rate 0.01"
    arguments += (
        " --space num_steps=8,16,32 --space norm_adv=True,False --trials 2 --seeds 1 --fresh-seeds 2 --episodes 3"
    )

    def execute(command, output):
        if "--json" in command:
            evaluate.main(tyro.cli(evaluate.Args, args=command[2:]))
        else:
            monkeypatch.setattr(ppo_cartpole, "__file__", command[1])  # a checkpoint names it
            monkeypatch.setattr(signal, "signal", lambda *_: None)  # only the main thread may
            assert ppo_cartpole.train(tyro.cli(ppo_cartpole.Args, args=command[2:])) == 0

    monkeypatch.setattr(tune, "execute", execute)
    monkeypatch.setattr(sys, "argv", ["tune.py", *arguments.split()])
    tune.main(*tyro.cli(tune.Args, return_unknown_args=True))
    assert all(len(list(run.glob("checkpoints/*.pt"))) == 1 for run in Path().glob("runs/*/*/seed_*"))
    score = json.loads(next(Path().glob("runs/*/best_*/seed_1/score.json")).read_text())
    export, command = capsys.readouterr().out.splitlines()[-2:]
    command = command.replace("python ", f"{sys.executable} ")
    shell = f"{export.strip()}; {command.strip()} --json again.json"
    done = subprocess.run(["sh", "-c", shell], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert json.loads(Path("again.json").read_text())["returns"] == score["returns"]


# ---- Refusals ----


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ("--space learning_rte=1e-4..1e-2", "'learning_rte' to tune. Close: learning_rate"),
        ("--space seed=1,2", "'seed'"),
        ("--space run_dir=a,b", "'run_dir'"),
        ("--space learning_rate", "learning_rate=low..high"),
        ("--space learning_rate=", "learning_rate=low..high"),
        ("--space num_steps=16,many", "num_steps=16,many"),
        ("--space num_steps=1.5..2.5", "num_steps=1.5..2.5"),
        ("--space learning_rate=1e-2..1e-4", "is empty"),
        ("--space learning_rate=1e-2..1e-2,log", "is empty"),
        ("--space learning_rate=0..1e-2,log", "is empty"),
        ("--space learning_rate=1e-4..inf", "is empty"),
        ("--space learning_rate=nan,1", "--learning-rate must be"),
        ("--space target_kl=0.1..None", "is empty"),
        ("--space norm_obs=False..True", "is empty"),
        ("--space num_steps=32", "is empty"),
        ("--space num_steps=32,32", "is empty"),
        ("--space gamma=0.9..1.1", "--gamma must be between 0 and 1, got 1.1"),
        ("--space num_minibatches=1,3", "--num-minibatches 3"),
        ("--space num_envs=6,12 --num-minibatches 3", "--num-minibatches 3 must cut 256 steps"),  # the defaults
        ("--space env_id=CartPole-v1,CartPol-v1", "CartPole-v1"),
        ("--space gamma=0.9,0.99 --env-id CartPol-v1", "CartPole-v1"),
        ("--space gamma=0.9,0.99 --seed 3", "--seed"),
        ("--space gamma=0.9,0.99 --run_dir=here", "--run-dir"),
        ("--gamma 0.9", "--space"),
        ("--space gamma=0.9,0.99 --jobs 0", "--jobs"),
        ("--space gamma=0.9,0.99 --fresh-seeds 1", "--fresh-seeds"),
    ],
)
def test_wrong_usage_gets_one_sentence_before_anything_runs(arguments, named, start, folder, capsys):
    with pytest.raises(SystemExit) as stop:
        start(arguments, lambda args: pytest.fail("something ran"))
    assert stop.value.code == 2
    message = capsys.readouterr().err
    assert message.startswith("tune.py: ")
    assert named in message
    assert message.count("\n") == 1
    assert not list(folder.iterdir())


def test_a_script_that_is_none_gets_one_sentence(folder):
    done = run("benchmarks/tune.py", "nothing.py", "--space", "gamma=0.9,0.99", cwd=folder)
    assert done.returncode == 2
    assert done.stderr == "tune.py: --script nothing.py is not a Python file.\n"


def test_a_trial_is_worth_its_mean_over_seeds(start, capsys):
    """And of the trials, the best are printed, best first."""

    def score(args):
        return 10 * int(re.search(r"trial_(\d)|$", args.run_dir)[1] or 0) + args.seed % 2

    start(f"{SMALL} --trials 5", score)
    trials = study().trials
    assert [trial.value for trial in trials] == [0.5, 10.5, 20.5, 30.5, 40.5]
    assert trials[4].intermediate_values == {0: 41, 1: 40.5}
    assert re.findall(r"(?m)^ +(\d+\.\d\d)  \{", capsys.readouterr().out) == ["40.50", "30.50", "20.50"]
    assert trials[0].distributions["learning_rate"].log


def test_the_order_of_the_spaces_makes_no_other_study(start):
    spaces = ["--space gamma=0.9,0.95", "--space num_steps=16,32"]
    flags = "--seeds 1 --fresh-seeds 2 --trials 1"
    assert start(f"{' '.join(spaces)} {flags}", lambda args: 1)
    assert not start(f"{' '.join(spaces[::-1])} {flags}", lambda args: 1)


def test_what_nohup_ignores_stays_ignored(start):
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        start(f"{SMALL} --trials 1", lambda args: 1)
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


def test_an_edited_script_is_another_study(start):
    script = Path(shutil.copy(ROOT / "ppo_cartpole.py", "mine.py"))
    for flags in ("", "--seeds 1", "--episodes 7"):
        assert start(f"{SMALL} --trials 1 {flags}", lambda args: 1, script.resolve())
    script.write_text(script.read_text() + "# another\n")
    assert start(f"{SMALL} --trials 1", lambda args: 1, script.resolve())
    assert len(list(Path("runs").iterdir())) == 4


def test_an_edited_environment_beside_the_script_is_another_study_too(start, monkeypatch):
    script = Path(shutil.copy(ROOT / "ppo_cartpole.py", "mine.py")).resolve()
    Path("edited_env.py").write_text(textwrap.dedent(TARGET))
    flags = f"{SMALL} --trials 1 --env-id edited_env:Coin-v0"
    assert start(flags, lambda args: 1, script)
    assert not start(flags, lambda args: 1, script)  # all of it is known
    Path("edited_env.py").write_text(textwrap.dedent(TARGET) + "# another\n")
    assert start(flags, lambda args: 1, script)
    assert len(list(Path("runs").iterdir())) == 2


def test_a_choice_that_got_all_seeds_is_not_trained_again(start, capsys):
    scored = start("--space num_steps=16,32 --seeds 2 --fresh-seeds 2 --trials 6", lambda args: args.num_steps)
    assert [trial.value for trial in study().trials] == [trial.params["num_steps"] for trial in study().trials]
    searched = [(args.num_steps, args.seed) for args in scored if args.seed > 1000]
    assert len(searched) == len(set(searched)) <= 4


def test_who_waits_for_another_process_says_so_and_can_be_stopped():
    """Ctrl-C would otherwise only be noted, as no run of its own is there to end."""
    code = (
        "import fcntl, signal, sys; sys.path[:0] = sys.argv[1:]; import tune; signal.signal(signal.SIGINT, tune.stop)"
    )
    code += "; tune.wait_for(open('lock', 'w'), fcntl.LOCK_EX)"
    with open("lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        command = [sys.executable, "-c", code, str(ROOT / "benchmarks")]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        assert process.stdout.readline().startswith("Waiting for another process")
        process.send_signal(signal.SIGINT)
        process.communicate(timeout=60)
        assert process.returncode == 130


def test_tune_scores_as_many_episodes_as_it_says():
    _, score = tune.commands(tune.Args(Path("x.py"), episodes=7), [], {}, 3, Path("run"))
    assert score[2:] == ["run", "--script", "x.py", "--episodes", "7", "--seed", "3"]


def test_of_a_scored_run_the_newest_checkpoint_stays(tmp_path, monkeypatch):
    checkpoints = tmp_path / "seed_1" / "checkpoints"
    checkpoints.mkdir(parents=True)
    for step in (256, 512, 1024):
        (checkpoints / f"{step:012d}.pt").touch()
    scored = tmp_path / "seed_1" / "score.tmp"
    monkeypatch.setattr(tune, "execute", lambda *_: scored.write_text('{"mean_return": 5.0}'))
    assert tune.score_of(tune.Args(Path("x.py")), [], {}, 1, tmp_path) == 5
    assert [path.stem for path in checkpoints.iterdir()] == ["000000001024"]


def test_the_interval_of_the_difference_is_as_wide_as_ten_seeds_make_it(start, capsys):
    """Each side scatters by 6.29 over seeds, so the difference of two means of ten by 2.81.

    Its interval lies between those of Student's t with 18 degrees of freedom and with 9.
    """
    start("--space gamma=0.9,0.95 --trials 1 --seeds 1 --fresh-seeds 10", lambda args: [-8, 5, 0, 8, -5][args.seed % 5])
    (interval,) = re.findall(r"(?m)^ +(-\d+\.\d+) to (\d+\.\d+)  difference", capsys.readouterr().out)
    for end in interval:
        assert 2.10 * 2.81 < abs(float(end)) < 2.27 * 2.81
