"""benchmarks/gpu.py, which nobody has run on a GPU yet: on the CPU, with tiny sizes, and on the simulated GPU."""

import csv
import os
import subprocess
import sys

import psutil
import pytest
import torch
from conftest import ROOT, SCRIPTS
from simulated_gpu import simulated_gpu

sys.path.append(str(ROOT / "benchmarks"))
import gpu

PEER = """
import time
from torch.utils.tensorboard import SummaryWriter
writer = SummaryWriter("runs/peer", flush_secs=1)
for step in range(100_000):
    writer.add_scalar("charts/SPS", 0, 10 * step)
    time.sleep(0.1)
"""


def run(folder, *flags):
    """gpu.py as a user would type it, with one thread: its CompletedProcess, and its rows by part, row and column."""
    command = [sys.executable, ROOT / "benchmarks/gpu.py", "--out", folder / "results", *flags]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=600)
    path = folder / "results/gpu.csv"
    rows = csv.DictReader(path.read_text().splitlines()) if path.exists() else []
    return done, {(x["part"], x["row"], x["column"]): x["value"] for x in rows}


def test_everything_is_found_out_and_what_fails_stops_nothing(tmp_path):
    (tmp_path / "peer.py").write_text(PEER)
    flags = ("--minutes", "9", "--device", "cpu", "--peer", f"{tmp_path}/peer.py", "no_such_file.py")
    done, found = run(tmp_path, *flags)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.endswith(f"Done. Tables: {tmp_path}/results/gpu.md\n")
    failed = {key[1]: value for key, value in found.items() if value.startswith("failed")}
    assert list(failed) == ["no_such_file.py"] and "No such file" in failed["no_such_file.py"]
    parts = {}
    for part, _, column in found:
        parts.setdefault(part, {})[column] = None
    assert {part: list(columns) for part, columns in parts.items()} == {
        "Machine": ["GPU", "processor", "versions"],
        "Right": ["loss differs by", "gradients differ by", "same actions", "right"],
        "The same again": ["trained again", "resumed"],
        "Steps per second": ["plain", "--bf16", "torch.compile"],
        "Milliseconds per 1,000 steps": [
            *("script", "environments", "network, to act", "gradient steps", "replay buffer", "all else"),
            *("copies of frames and actions", "limit"),
        ],
        "Learning": ["steps", "minutes", "mean of up to 100 games", "done"],
    }
    assert {value for key, value in found.items() if key[2] == "right"} == {"yes"}
    assert {value for key, value in found.items() if key[0] == "The same again"} == {"same weights"}
    speeds = [value for key, value in found.items() if key[0] == "Steps per second" and key[1] != "no_such_file.py"]
    assert len(speeds) == 7 and min(float(x.replace(",", "")) for x in speeds) > 0
    assert 50 < float(found["Steps per second", f"{tmp_path}/peer.py", "plain"]) <= 100  # 10 steps each 0.1 seconds
    for part in ("ppo_atari.py, 2 games", "dqn_atari.py, 2 games"):
        row = {key[2]: float(x.replace(",", "")) for key, x in found.items() if key[0][0] == "M" and key[1] == part}
        script = row.pop("script")
        assert row.pop("limit") > 0 and row.pop("copies of frames and actions") > 0
        assert sum(row.values()) == pytest.approx(script, abs=0.5)
    table = (tmp_path / "results/gpu.md").read_text()
    assert all(value in table for value in found.values())

    # again: nothing is done twice, and what failed is tried again on request
    done, again = run(tmp_path, *flags)
    assert done.returncode == 0 and again == found and "minutes left" not in done.stdout
    done, again = run(tmp_path, *flags, "--retry")
    assert done.returncode == 0 and done.stdout.count("minutes left") == 1
    assert again.keys() == found.keys()
    assert {key for key in found if again[key] != found[key]} <= {("Steps per second", "no_such_file.py", "plain")}


def test_the_time_is_kept_and_learning_goes_on(tmp_path, monkeypatch, capsys):
    """Pong goes on from its checkpoint in each call, and Breakout has to wait."""
    sizes = gpu.SIZES["cpu"]
    long = gpu.replace(sizes, pong=sizes.pong | {"total_timesteps": 1_000_000}, spare=12)
    monkeypatch.setitem(gpu.SIZES, "cpu", long)
    monkeypatch.setattr(gpu, "list_tasks", lambda args, sizes: [])
    steps, minutes = [0], [0.0]
    for _ in range(2):
        with pytest.raises(SystemExit) as end:
            gpu.main(gpu.Args(minutes=0.3, out=tmp_path, device="cpu"))
        assert end.value.code is None
        assert "The minutes are over. The same command does the rest." in capsys.readouterr().out
        found = gpu.Results(tmp_path).found
        assert found["Learning", gpu.PONG, "done"] == "not yet" and ("Learning", gpu.BREAKOUT, "done") not in found
        steps.append(int(found["Learning", gpu.PONG, "steps"].replace(",", "")))
        minutes.append(float(found["Learning", gpu.PONG, "minutes"]))
    assert 0 < steps[1] < steps[2] and 0 < minutes[1] < minutes[2]
    checkpoints = gpu.ppo_atari.list_checkpoints(tmp_path / gpu.PONG)
    assert [int(path.stem) for path in checkpoints] == steps[1:]


@pytest.mark.parametrize("precision", gpu.TOLERANCE)
def test_on_the_simulated_gpu_all_is_right(script, precision):
    with simulated_gpu():
        found = gpu.compare(script, precision, "cuda", gpu.SIZES["cpu"])
    assert found["loss differs by"] == found["gradients differ by"] == "0.0e+00"
    assert (found["same actions"], found["right"]) == ("100.0%", "yes")


@pytest.mark.parametrize("wrong", ["loss", "gradients", "actions"])
def test_what_is_wrong_on_the_gpu_is_found(script, wrong, monkeypatch):
    module = SCRIPTS[script]
    name = "dqn_update" if script == "dqn_atari" else "ppo_loss"
    learn, act = getattr(module, name), module.Agent.act

    def learn_wrong(agent, *rest):
        result = learn(agent, *rest)
        if next(agent.parameters()).device.type == "cpu":
            return result
        if script == "dqn_atari":
            if wrong == "gradients":
                next(agent.parameters()).grad.mul_(1.1)
            return result | ({"td_loss": 1.01 * result["td_loss"]} if wrong == "loss" else {})
        loss, metrics = result
        if wrong == "gradients":
            loss.register_hook(lambda gradient: 1.01 * gradient)
        return loss + (0.01 if wrong == "loss" else 0), metrics

    def act_wrong(agent, obs, greedy):
        actions = act(agent, obs, greedy)
        return (actions + 1) % 2 if obs.device.type == "cuda" else actions

    monkeypatch.setattr(module, name, learn_wrong)
    if wrong == "actions":
        monkeypatch.setattr(module.Agent, "act", act_wrong)
    with simulated_gpu():
        assert gpu.compare(script, "float32 without TF32", "cuda", gpu.SIZES["cpu"])["right"] == "NO"


def test_on_the_simulated_gpu_runs_are_repeated(script):
    with simulated_gpu():
        found = gpu.repeat(script, "cuda", gpu.SIZES["cpu"])
    assert found == {"trained again": "same weights", "resumed": "same weights"}


def test_a_run_that_is_not_repeated_is_found(script, monkeypatch):
    module = SCRIPTS[script]
    begin = module.Run.begin_segment
    monkeypatch.setattr(module.Run, "begin_segment", lambda run: begin(run) + int.from_bytes(os.urandom(2)))
    found = gpu.repeat(script, "cpu", gpu.SIZES["cpu"])
    assert all(text.startswith("weights differ by up to ") for text in found.values())


def test_without_a_gpu_or_with_another_machines_results_it_says_so(tmp_path):
    if not torch.cuda.is_available():
        done, _ = run(tmp_path)
        expected = "gpu.py: PyTorch finds no GPU. --device cpu tries out this program without one.\n"
        assert done.returncode == 1
        assert done.stderr.endswith(expected)  # PyTorch's CUDA build may warn before
    results = gpu.Results(tmp_path / "results")
    results.add(gpu.Task("Machine", "this one", "GPU", None), {"GPU": "another"})
    done, _ = run(tmp_path, "--device", "cpu")
    assert done.returncode == 1 and "has results of another, not of none: name another folder" in done.stderr


def test_a_run_that_cannot_learn_leaves_the_time_to_the_next(tmp_path, monkeypatch, capsys):
    (tmp_path / gpu.PONG).write_text("a file where the run folder should be")
    monkeypatch.setattr(gpu, "list_tasks", lambda args, sizes: [])
    with pytest.raises(SystemExit):
        gpu.main(gpu.Args(minutes=5, out=tmp_path, device="cpu"))
    found = gpu.Results(tmp_path).found
    assert found["Learning", gpu.PONG, "done"].startswith("failed: ")
    assert found["Learning", gpu.BREAKOUT, "done"] == "all steps"
    assert "Done. Tables" in capsys.readouterr().out


def test_a_peer_is_ended(tmp_path):
    """Also when nothing ends the process that timed it."""
    (tmp_path / "peer.py").write_text(PEER)
    assert gpu.peer(f"{tmp_path}/peer.py", gpu.SIZES["cpu"])["plain"]
    running = [
        x.info for x in psutil.process_iter(["cmdline", "status"]) if f"{tmp_path}/peer.py" in (x.info["cmdline"] or [])
    ]
    assert [x for x in running if x["status"] != psutil.STATUS_ZOMBIE] == []
