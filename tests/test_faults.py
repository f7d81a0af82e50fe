"""What happens to real runs: kill -9, disks that fill up, damaged files. `-m slow` runs the long series."""

import multiprocessing
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch
from conftest import ROOT, SCRIPTS, SHORT, flags, stride
from test_checkpoint import PIPES, curve

import evaluate

SETTINGS = {  # a checkpoint every few tenths of a second
    "ppo_cartpole": {"save_freq": 512},
    "ppo_atari": SHORT["ppo_atari"] | {"save_freq": 64},
    "dqn_atari": SHORT["dqn_atari"] | {"save_freq": 100, "batch_size": 1, "buffer_size": 60},
}


@pytest.fixture(scope="module")
def processes():
    """Makes processes by forking one that has already imported the scripts: seconds faster than starting Python."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(ROOT))
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload([*SCRIPTS, "torch._dynamo"])  # which the first optimizer imports
        yield context


def start(script, arguments, folder, played):
    """What `python SCRIPT.py ARGUMENTS` does, in a process of its own. Counts in `played` the steps it takes."""
    os.chdir(folder)
    sys.argv = [f"{script}.py", *arguments]
    sys.stdout = sys.stderr = open("log.txt", "w", buffering=1)
    module = SCRIPTS[script]
    make_envs = module.make_envs

    def make_and_count(args, num_envs, *rest, **more):
        envs = make_envs(args, num_envs, *rest, **more)
        step = envs.step

        def step_and_count(actions):
            result = step(actions)
            played.value += num_envs
            return result

        envs.step = step_and_count
        return envs

    module.make_envs = make_and_count
    module.train(module.read_args(), module.note_signals())


def wait_until(condition, process):
    deadline = time.monotonic() + 60
    while not condition() and process.is_alive() and time.monotonic() < deadline:
        time.sleep(0.0005)
    if not (process.is_alive() and condition()):
        process.kill()
        pytest.fail("it ended by itself, or never came to that")


def kill_again_and_again(processes, script, times, folder):
    """Kill a run, resume it, kill it, ... and let it finish. Returns steps lost by each, how many died saving."""
    module, moments = SCRIPTS[script], random.Random(times)
    settings = SETTINGS[script] | {"total_timesteps": 10_000_000, "run_dir": "run"}
    run_dir, lost, died_saving = folder / "run", [], 0
    arguments, kept, played = flags(settings), 0, processes.Value("q", 0)
    for number in range(times):
        began, played.value = kept, 0
        process = processes.Process(target=start, args=(script, arguments, folder, played))
        process.start()
        wait_until(lambda: played.value > 0, process)  # by then, a .tmp of the kill before is removed
        if number % 3 == 0:  # while it saves
            wait_until(lambda: list(run_dir.glob("checkpoints/*.tmp")), process)
        else:
            time.sleep(moments.uniform(0, 1))
        process.kill()
        process.join()
        assert process.exitcode == -signal.SIGKILL
        assert f"steps {began:,} to 10,000,000" in (folder / "log.txt").read_text()
        died_saving += bool(list(run_dir.glob("checkpoints/*.tmp")))
        held = module.list_checkpoints(run_dir)
        kept = module.load_checkpoint(held[-1])["global_step"] if held else 0
        assert kept == (int(held[-1].stem) if held else 0)
        lost.append(began + played.value - kept)
        assert 0 <= lost[-1] < settings["save_freq"] + 2 * stride(module.Args(**settings))
        if held:
            arguments = ["--resume", "run"]
    (run_dir / "checkpoints" / "000000000001.tmp").touch()  # killed in a save that no later one repeats
    settings["total_timesteps"] = kept + 2 * settings["save_freq"]
    arguments = flags(settings) + ["--resume", "run"] * (kept > 0)
    process = processes.Process(target=start, args=(script, arguments, folder, played))
    process.start()
    process.join()
    assert process.exitcode == 0
    assert "Done." in (folder / "log.txt").read_text()
    assert not list(run_dir.glob("checkpoints/*.tmp"))
    steps = [step for step, _ in curve(run_dir, "charts/SPS")]
    assert steps == sorted(set(steps))
    return lost, died_saving


def test_kill_9_costs_less_than_the_steps_between_two_checkpoints(script, processes, tmp_path):
    kill_again_and_again(processes, script, 3, tmp_path)


@pytest.mark.slow
def test_kill_9_thirty_times(script, processes, tmp_path, capsys):
    lost, died_saving = kill_again_and_again(processes, script, 30, tmp_path)
    assert died_saving > 3
    with capsys.disabled():
        print(f"\n{script}: 30 kills, {died_saving} while saving; steps lost: {sorted(lost)}")


def spoil(content, moments):
    """One of the things that happen to files: a bit flips, a block is lost, zeroed, doubled or another file's."""
    at, length = moments.randrange(len(content)), moments.choice([1, 16, 512, 4096])
    before, block, after = content[:at], content[at : at + length], content[at + length :]
    kind = moments.randrange(5)
    if kind == 0:
        flipped = bytearray(content)
        flipped[at] ^= 1 << moments.randrange(8)
        return bytes(flipped)
    return before + (b"", bytes(len(block)), 2 * block, moments.randbytes(len(block)))[kind - 1] + after


def same(a, b):
    """Whether two checkpoints hold the same."""
    if isinstance(a, dict):
        return isinstance(b, dict) and a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return type(a) is type(b) and len(a) == len(b) and all(map(same, a, b))
    return torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


def test_of_200_damaged_checkpoints_none_is_loaded_wrong(tmp_path, capfd):
    """Refused with one sentence, or (where the damage hit bytes that mean nothing) loaded as it was saved."""
    module, moments = SCRIPTS["ppo_cartpole"], random.Random(0)
    path = module.find_checkpoint(module.train(module.Args(run_dir=str(tmp_path / "run"), **SHORT["ppo_cartpole"])))
    content, whole, refused = path.read_bytes(), module.load_checkpoint(path), 0
    assert same(whole, module.load_checkpoint(path))
    for _ in range(200):
        path.write_bytes(spoil(content, moments))
        capfd.readouterr()
        try:
            assert same(whole, module.load_checkpoint(path))
        except SystemExit as stop:
            refused += 1
            assert stop.code == 1
            message = capfd.readouterr().err
            assert message.count("\n") == 1
            assert str(path) in message
    assert refused > 150


def test_a_disk_with_room_again_gets_the_next_checkpoint_and_the_curves(tmp_path):
    """A limit on the size of files stands in for the full disk. The run goes on, and says what it leaves out."""
    settings = {"total_timesteps": 1_000_000, "save_freq": 2000, "run_dir": "run"}
    command = [sys.executable, ROOT / "ppo_cartpole.py", *flags(settings)]
    process = subprocess.Popen(command, cwd=tmp_path, text=True, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    while not list(tmp_path.glob("run/checkpoints/*.pt")):
        assert process.poll() is None
        time.sleep(0.01)
    _, hard = resource.prlimit(process.pid, resource.RLIMIT_FSIZE)
    resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (100, hard))
    lines = []
    while sum("could not be written and is left out" in line for line in lines) < 3:
        lines.append(process.stderr.readline())
        assert lines[-1]
    assert any("run: curves cannot be written for now" in line for line in lines)
    resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (hard, hard))
    failed = {int(path.stem) for path in tmp_path.glob("run/checkpoints/*")}
    while len(list(tmp_path.glob("run/checkpoints/*.pt"))) < len(failed) + 2:
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=60) == 143
    lines += process.stderr.readlines()
    assert not any("Traceback" in line for line in lines)
    assert not list(tmp_path.glob("run/checkpoints/*.tmp"))
    newest = SCRIPTS["ppo_cartpole"].list_checkpoints(tmp_path / "run")[-1]
    assert 0 <= int(newest.stem) - curve(tmp_path / "run", "losses/entropy")[-1][0] < 2000


def test_a_real_disk_that_is_full(tmp_path):
    """400 kB, of which a checkpoint takes a hundred: the run says so, trains to its end, and keeps what it had."""
    inside = "mkdir disk && mount -t tmpfs -o size=400k none disk && cd disk && "
    inside += f"{sys.executable} {ROOT}/ppo_cartpole.py --run-dir run --total-timesteps 8192 --save-freq 1024; "
    inside += f"code=$?; ls run/checkpoints > ../held; {sys.executable} {ROOT}/evaluate.py run --episodes 1; exit $code"
    try:
        done = subprocess.run(
            ["unshare", "--user", "--mount", "--map-root-user", "sh", "-c", inside], cwd=tmp_path, text=True, **PIPES
        )
    except FileNotFoundError:
        pytest.skip("there is no unshare here, to mount a small disk with")
    if "mount" in done.stderr or "unshare" in done.stderr:
        pytest.skip(f"a small disk cannot be mounted here: {done.stderr}")
    assert done.returncode == 1
    assert "No space left on device" in done.stderr
    assert "Traceback" not in done.stderr
    assert "the last checkpoint of run could not be written" in done.stderr
    held = (tmp_path / "held").read_text().split()
    assert 1 <= len(held) < 8
    assert all(name.endswith(".pt") for name in held)
    assert "1 episodes" in done.stdout


def test_a_run_outlives_its_folder(tmp_path):
    """Somebody cleans up: the run says that it cannot save, and plays on. Curves and checkpoints come back with it."""
    module, save, seen = SCRIPTS["ppo_cartpole"], SCRIPTS["ppo_cartpole"].save_checkpoint, []

    def remove_then_save(run_dir, *rest, **more):
        if len(seen) == 1:
            shutil.rmtree(run_dir)
        if len(seen) == 2:
            (run_dir / "checkpoints").mkdir(parents=True)
        seen.append(save(run_dir, *rest, **more))
        return seen[-1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "save_checkpoint", remove_then_save)
        run_dir = module.train(module.Args(run_dir=str(tmp_path / "run"), total_timesteps=2048, save_freq=512))
    assert seen == [True, False, True, True]
    assert evaluate.find_checkpoint(run_dir).stem == "000000002048"
    assert curve(run_dir, "losses/entropy")[-1][0] == 2048


@pytest.mark.parametrize("number", [signal.SIGINT, pytest.param(signal.SIGTERM, marks=pytest.mark.slow)])
def test_the_second_signal_ends_the_program_at_once(number, tmp_path):
    settings = {"update_epochs": 10_000_000, "target_kl": 100.0, "run_dir": "run"}  # an update that takes for ever
    process = subprocess.Popen([sys.executable, ROOT / "ppo_cartpole.py", *flags(settings)], cwd=tmp_path, **PIPES)
    while not list(tmp_path.glob("run/events.*")):
        assert process.poll() is None
        time.sleep(0.01)
    time.sleep(1)
    try:
        process.send_signal(number)
        time.sleep(1)
        assert process.poll() is None
        process.send_signal(number)
        assert process.wait(timeout=10) == -number
    finally:
        process.kill()


@pytest.mark.slow
@pytest.mark.parametrize("seed", [1, 2, 3])
def test_a_run_interrupted_five_times_scores_like_one_that_was_not(seed, processes, tmp_path):
    moments, arguments, module = random.Random(seed), ["--seed", str(seed), "--run-dir", "run"], SCRIPTS["ppo_cartpole"]
    played = processes.Value("q", 0)
    for number in range(5):
        process = processes.Process(target=start, args=("ppo_cartpole", arguments, tmp_path, played))
        process.start()
        until = played.value + moments.randrange(8_000, 15_000)
        wait_until(lambda: played.value > until, process)  # noqa: B023
        os.kill(process.pid, signal.SIGKILL if number % 2 else signal.SIGTERM)
        process.join()
        arguments = ["--resume", "run"]
    process = processes.Process(target=start, args=("ppo_cartpole", arguments, tmp_path, played))
    process.start()
    process.join()
    path = module.find_checkpoint(tmp_path / "run")
    assert path.stem == "000000080128"
    result = evaluate.score(path, evaluate.Args(str(path), episodes=100, greedy=True))
    assert result["mean_return"] >= 495
