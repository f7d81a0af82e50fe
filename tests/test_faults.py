"""What happens to real runs: kill -9, disks that fill up, damaged files. `-m slow` runs the long series."""

import multiprocessing
import os
import pickle
import random
import resource
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from conftest import ROOT, SCRIPTS, SHORT, flags, same, stride, train
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from test_checkpoint import PIPES, curve

import evaluate

GAMES = {"env_id": "ALE/Pong-v5", "total_timesteps": 256, "save_freq": 64}  # sticky actions: more randomness to lose
SETTINGS = {  # four segments of a few tenths of a second
    "ppo_cartpole": {"norm_obs": True, "total_timesteps": 2048, "save_freq": 512},
    "ppo_atari": SHORT["ppo_atari"] | GAMES,
    "dqn_atari": SHORT["dqn_atari"] | GAMES | {"buffer_size": 100},  # the third segment overwrites the first
}


@pytest.fixture(scope="module")
def processes():
    """Makes processes by forking one that has already imported the scripts: seconds faster than starting Python."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(ROOT))
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload([*SCRIPTS, "torch._dynamo"])  # which the first optimizer imports
        yield context


def start(script, arguments, folder, played, die_at=float("inf")):
    """What `python SCRIPT.py ARGUMENTS` does, in a process of its own. Counts in `played` the steps it takes.

    After `die_at` steps it is killed. What DQN remembers at a checkpoint, the file "memory" keeps.
    """
    os.makedirs(folder, exist_ok=True)
    os.chdir(folder)
    sys.argv = [f"{script}.py", *arguments]
    os.dup2(os.open("log.txt", os.O_WRONLY | os.O_CREAT | os.O_TRUNC), 1)
    os.dup2(1, 2)
    module = SCRIPTS[script]
    record_step = module.Run.record_step

    def record_and_count(run, *rest):
        record_step(run, *rest)
        played.value += run.num_envs
        if played.value >= die_at:
            os.kill(os.getpid(), signal.SIGKILL)

    def note_memory(buffer):
        newest = np.arange(buffer.count + 1 - buffer.filled - buffer.stack, buffer.count) % buffer.num_rows
        frames = {key: frame.tobytes() for key, frame in buffer.final_frames.items()}
        with open("memory", "wb") as file:
            pickle.dump((len(newest), buffer.rows[newest].tobytes(), frames), file)
        return state_dict(buffer)

    module.Run.record_step = record_and_count
    if hasattr(module, "ReplayBuffer"):
        state_dict, module.ReplayBuffer.state_dict = module.ReplayBuffer.state_dict, note_memory
    sys.exit(module.train(module.read_args()))


def wait_until(condition, process):
    deadline = time.monotonic() + 60
    while not condition():
        if not process.is_alive() or time.monotonic() > deadline:
            process.kill()
            pytest.fail("it ended by itself, or never came to that")
        time.sleep(0.0005)


def run_to_its_end(processes, script, folder):
    """Start a run of SETTINGS, or go on with it: the same command. Returns all that it leaves behind, but times."""
    module, settings = SCRIPTS[script], SETTINGS[script] | {"run_dir": "run"}
    played = processes.Value("q", 0, lock=False)
    process = processes.Process(target=start, args=(script, flags(settings), folder, played))
    process.start()
    process.join()
    assert process.exitcode == 0, (folder / "log.txt").read_text()
    assert "Done: run is finished" in (folder / "log.txt").read_text()
    assert not list(folder.glob("run/checkpoints/*.tmp"))
    assert not (folder / "run" / "replay.bin").exists()
    checkpoint = module.load_checkpoint(module.find_checkpoint(folder / "run"))
    checkpoint.get("buffer", {}).pop("identity", None)  # the name of a file that is gone
    names = [path.name for path in module.list_checkpoints(folder / "run")]
    tags = EventAccumulator(str(folder / "run")).Reload().Tags()["scalars"]
    curves = {tag: curve(folder / "run", tag) for tag in tags if tag != "charts/SPS"}
    memory = pickle.loads((folder / "memory").read_bytes()) if "buffer" in checkpoint else None
    return {"checkpoint": checkpoint, "names": names, "curves": curves, "memory": memory}


def kill(processes, script, folder, steps, moment="at once"):
    """Start a run, or go on with it, and kill it after `steps` steps: at once, a moment later, or in its next save.

    Returns the steps it had before, those it has now, and whether it died while it saved.
    """
    module, settings, run_dir = SCRIPTS[script], SETTINGS[script] | {"run_dir": "run"}, folder / "run"
    held = [0, *(int(path.stem) for path in module.list_checkpoints(run_dir))]
    unfinished, played = run_dir / "checkpoints" / "unfinished.tmp", processes.Value("q", 0, lock=False)
    die_at = steps if moment == "at once" else float("inf")
    process = processes.Process(target=start, args=(script, flags(settings), folder, played, die_at))
    process.start()
    if moment != "at once":
        wait_until(lambda: played.value >= steps, process)
        if moment == "saving":
            wait_until(unfinished.exists, process)
        else:
            time.sleep(moment)
        process.kill()
    process.join()
    assert process.exitcode == -signal.SIGKILL, (folder / "log.txt").read_text()
    assert f"steps {held[-1]:,} to {settings['total_timesteps']:,}" in (folder / "log.txt").read_text()
    newest = [0, *(module.load_checkpoint(path)["global_step"] for path in module.list_checkpoints(run_dir))]
    lost = held[-1] + played.value - newest[-1]
    assert 0 <= lost < settings["save_freq"] + stride(module.Args(**settings))
    return held[-1], newest[-1], unfinished.exists()


def test_a_run_that_was_killed_ends_as_one_that_was_not(script, processes, tmp_path):
    """Bit for bit: weights, optimizer, curves and DQN's memory. Killed before its first checkpoint, and after two."""
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    expected, save_freq = run_to_its_end(processes, script, whole), SETTINGS[script]["save_freq"]
    assert len(expected["names"]) == 4
    assert script != "dqn_atari" or expected["memory"][2]  # the final frames of games that a checkpoint ended
    assert kill(processes, script, killed, save_freq // 2) == (0, 0, False)
    (killed / "run" / "checkpoints" / "unfinished.tmp").write_bytes(b"what a kill in the first save leaves")
    assert kill(processes, script, killed, int(2.9 * save_freq)) == (0, 2 * save_freq, False)
    assert same(run_to_its_end(processes, script, killed), expected)


@pytest.mark.slow
def test_ten_runs_killed_again_and_again(script, processes, tmp_path, capsys):
    """The same at random moments, also in a save, also twice or more from one checkpoint."""
    moments, save_freq, total = random.Random(0), SETTINGS[script]["save_freq"], SETTINGS[script]["total_timesteps"]
    expected, kills = run_to_its_end(processes, script, tmp_path / "whole"), []
    for number in range(10):
        folder = tmp_path / str(number)
        kills.append(kill(processes, script, folder, moments.randrange(total // 2), "saving"))
        left = total - kills[-1][1] - save_freq // 2
        kills.append(kill(processes, script, folder, moments.randrange(1, left), moments.uniform(0, 0.03)))
        kills.append(kill(processes, script, folder, moments.randrange(1, save_freq // 2)))
        assert same(run_to_its_end(processes, script, folder), expected)
    died_saving = sum(saving for _, _, saving in kills[::3])
    again = sum(before == after for before, after, _ in kills)
    assert died_saving > 3
    assert again > 5
    with capsys.disabled():
        print(f"\n{script}: 10 runs, {len(kills)} kills, {died_saving} while saving, {again} before a new checkpoint")


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


def test_of_200_damaged_checkpoints_none_is_loaded_wrong(tmp_path, capfd):
    """Refused with one sentence, or (where the damage hit bytes that mean nothing) loaded as it was saved."""
    module, moments = SCRIPTS["ppo_cartpole"], random.Random(0)
    path = module.find_checkpoint(train(module, tmp_path, **SHORT["ppo_cartpole"]))
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


def test_a_disk_with_room_again_gets_the_next_checkpoint(tmp_path):
    """A limit on the size of files stands in for the full disk. The run goes on, and says what it leaves out."""
    settings = {"total_timesteps": 1_000_000, "save_freq": 2000, "run_dir": "run"}
    command = [sys.executable, ROOT / "ppo_cartpole.py", *flags(settings)]
    process = subprocess.Popen(command, cwd=tmp_path, text=True, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    while not (held := list(tmp_path.glob("run/checkpoints/*.pt"))):
        assert process.poll() is None
        time.sleep(0.01)
    _, hard = resource.prlimit(process.pid, resource.RLIMIT_FSIZE)
    resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (100, hard))
    lines = []
    while sum("could not be written, training continues" in line for line in lines) < 3:
        lines.append(process.stderr.readline())
        assert lines[-1]
    resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (hard, hard))
    full = list(tmp_path.glob("run/checkpoints/*.pt"))
    while len(list(tmp_path.glob("run/checkpoints/*.pt"))) < len(full) + 2:
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    lines += process.stderr.readlines()
    assert process.wait(timeout=60) == 143
    assert sum("no more curves, training continues" in line for line in lines) == 1
    assert not list(tmp_path.glob("run/checkpoints/*.tmp"))
    newest = SCRIPTS["ppo_cartpole"].load_checkpoint(evaluate.find_checkpoint(tmp_path / "run"))
    assert newest["global_step"] > int(held[0].stem) + 3 * 2000


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
    assert "the last checkpoint was not written" in done.stderr
    held = (tmp_path / "held").read_text().split()
    assert 1 <= sum(name.endswith(".pt") for name in held) < 8
    assert set(held) - {"unfinished.tmp"} <= {f"{step:012d}.pt" for step in range(1024, 8193, 1024)}
    assert "return" in done.stdout


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")  # of TensorBoard
def test_a_run_outlives_its_folder(tmp_path, monkeypatch, capsys):
    """Somebody cleans up: the run says that it cannot save, and plays on. Checkpoints come back with the folder."""
    module, save, held = SCRIPTS["ppo_cartpole"], SCRIPTS["ppo_cartpole"].Run.save, []

    def remove_then_save(run):
        if len(held) == 1:
            shutil.rmtree(run.folder)
        if len(held) == 2:
            (run.folder / "checkpoints").mkdir(parents=True)
        save(run)
        held.append([path.stem[-4:] for path in module.list_checkpoints(run.folder)])

    monkeypatch.setattr(module.Run, "save", remove_then_save)
    train(module, tmp_path, total_timesteps=2048, save_freq=512)
    assert held == [["0512"], [], ["1536"], ["1536", "2048"]]
    assert capsys.readouterr().err.count("could not be written, training continues") == 1


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
        time.sleep(2)
        assert process.poll() is None
        process.send_signal(number)
        assert b"Stopping" in process.communicate(timeout=10)[1]
        assert process.returncode == 128 + number
    finally:
        process.kill()


def test_one_stop_that_is_sent_twice_saves(tmp_path):
    """`uv run` passes on a SIGTERM that the whole group has received."""
    settings = {"update_epochs": 2000, "target_kl": 100.0, "total_timesteps": 100_000, "run_dir": "run"}
    process = subprocess.Popen([sys.executable, ROOT / "ppo_cartpole.py", *flags(settings)], cwd=tmp_path, **PIPES)
    while not list(tmp_path.glob("run/events.*")):
        assert process.poll() is None
        time.sleep(0.01)
    time.sleep(1)
    for _ in range(2):
        process.send_signal(signal.SIGTERM)
        time.sleep(0.01)
    err = process.communicate(timeout=60)[1]
    assert process.returncode == 143
    assert b"--resume run" in err
    assert int(evaluate.find_checkpoint(tmp_path / "run").stem) > 0
    assert not list(tmp_path.glob("run/checkpoints/*.tmp"))


@pytest.mark.parametrize("closed", ["stdout", "both"])
def test_ctrl_c_saves_though_it_also_ends_tee(closed, tmp_path):
    """`python ppo_cartpole.py | tee log`, with or without 2>&1: nobody reads on, and each line is an error."""
    often = "import runpy, sys, tqdm\n"
    often += "init = tqdm.tqdm.__init__\n"
    often += "tqdm.tqdm.__init__ = lambda bar, *a, **k: init(bar, *a, **k | {'mininterval': 0, 'miniters': 1})\n"
    often += "sys.argv[0] = 'ppo_cartpole.py'\n"
    often += f"runpy.run_path('{ROOT}/ppo_cartpole.py', run_name='__main__')"
    command = [sys.executable, "-c", often, "--total-timesteps", "100_000_000", "--run-dir", "run"]
    process = subprocess.Popen(command, cwd=tmp_path, **PIPES)
    while not (events := list(tmp_path.glob("run/events.*"))) or events[0].stat().st_size < 500:
        assert process.poll() is None
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGSTOP)  # or it would print between the next two lines
    process.stdout.close()
    if closed == "both":
        process.stderr.close()
    process.send_signal(signal.SIGINT)
    os.kill(process.pid, signal.SIGCONT)
    err = b"" if closed == "both" else process.stderr.read()
    assert process.wait(timeout=60) == 130
    assert evaluate.find_checkpoint(tmp_path / "run")
    assert closed == "both" or b"--resume run" in err


@pytest.mark.slow
@pytest.mark.parametrize("seed", [1, 2, 3])
def test_a_run_interrupted_five_times_scores_like_one_that_was_not(seed, processes, tmp_path):
    moments, arguments, module = random.Random(seed), ["--seed", str(seed), "--run-dir", "run"], SCRIPTS["ppo_cartpole"]
    played = processes.Value("q", 0, lock=False)
    for end in (143, -signal.SIGKILL, 143, -signal.SIGKILL, 143, 0):
        process = processes.Process(target=start, args=("ppo_cartpole", arguments, tmp_path, played))
        process.start()
        until = played.value + moments.randrange(8_000, 15_000)
        if end:
            wait_until(lambda: played.value > until, process)  # noqa: B023
            os.kill(process.pid, signal.SIGKILL if end < 0 else signal.SIGTERM)
        process.join()
        assert process.exitcode == end
    path = module.find_checkpoint(tmp_path / "run")
    assert path.stem == "000000080128"
    result = evaluate.score(path, evaluate.Args(str(path), episodes=100, greedy=True))
    assert result["mean_return"] >= 495
