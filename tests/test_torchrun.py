"""`torchrun ppo_atari.py`: several processes that learn as one. Here two, which talk through gloo."""

import os
import re
import signal
import socket
import subprocess
import sys
import time

import pytest
import torch
from conftest import ROOT, SHORT, flags
from probes import InFrames, RewardFromActionAndObs
from test_checkpoint import PIPES, curve

import ppo_atari

# One-step games in frames, and a record of what each update got and did.
PROGRAM = """
import os, sys, torch, ppo_atari
from probes import InFrames, RewardFromActionAndObs
rank, updates, seeds = int(os.environ["RANK"]), [], []
ppo_update, ppo_loss, clip = ppo_atari.ppo_update, ppo_atari.ppo_loss, torch.nn.utils.clip_grad_norm_
copy = lambda xs: [x.detach().clone() for x in xs]

def watch_clip(parameters, *rest):
    parameters = list(parameters)
    updates[-1]["gradients"].append(copy(p.grad for p in parameters))
    return clip(parameters, *rest)

def watch_update(learner, optimizer, batch, *rest, **more):
    updates.append({"seeds": seeds, "batch": copy(batch), "before": copy(learner.parameters()), "gradients": []})
    metrics = ppo_update(learner, optimizer, batch, *rest, **more)
    updates[-1]["after"] = copy(learner.parameters())
    torch.save(updates, f"rank{rank}.pt")
    return metrics

def trouble(agent, minibatch, args):
    loss, metrics = ppo_loss(agent, minibatch, args)
    name, value = os.environ["TROUBLE"].split()
    metrics[name] = torch.tensor(float(value)) if rank == 1 else metrics[name]
    return loss, metrics

torch.nn.utils.clip_grad_norm_, ppo_atari.ppo_update = watch_clip, watch_update
def make_envs(args, n, seed, training):
    seeds.append(seed)
    return InFrames(RewardFromActionAndObs, n)

ppo_atari.make_envs = make_envs
if "TROUBLE" in os.environ:
    ppo_atari.ppo_loss = trouble
ppo_atari.train(ppo_atari.read_args(), ppo_atari.note_signals())
threads = [open(f"/proc/self/task/{thread}/comm").read().strip() for thread in os.listdir("/proc/self/task")]
open(f"threads{rank}", "w").write(" ".join(threads))
"""
ONE_STEP = SHORT["ppo_atari"] | {"update_epochs": 1, "num_minibatches": 1, "run_dir": "run"}


def launch(folder, settings, program="program.py", launchers=1, **environment):
    """Start two processes, by one torchrun or by one on each of two "machines"."""
    (folder / "program.py").write_text(PROGRAM)
    paths = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    environment = os.environ | {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1"} | environment
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "torch.distributed.run", f"--nproc-per-node={2 // launchers}"]
    command += [f"--nnodes={launchers}", "--master-addr=127.0.0.1", f"--master-port={port}"]
    return [
        subprocess.Popen(
            [*command, f"--node-rank={i}", program, *flags(settings)],
            cwd=folder,
            env=environment,
            text=True,
            start_new_session=True,
            **PIPES,
        )
        for i in range(launchers)
    ]


def finish(processes):
    """Exit codes, and all that was written. None of them may hang."""
    try:
        texts = ["".join(process.communicate(timeout=120)) for process in processes]
    finally:
        for process in processes:
            if process.poll() is None:
                for pid in [process.pid, *workers(process)]:  # each in a session of its own
                    os.killpg(pid, signal.SIGKILL)
    return [process.returncode for process in processes], "".join(texts)


@pytest.mark.parametrize("launchers", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_two_processes_learn_as_one(launchers, tmp_path):
    codes, text = finish(launch(tmp_path, ONE_STEP, launchers=launchers))
    assert codes == [0] * launchers, text
    updates = [torch.load(tmp_path / f"rank{rank}.pt") for rank in (0, 1)]
    assert len(updates[0]) == len(updates[1]) == 3
    args = ppo_atari.Args(**ONE_STEP)
    assert updates[1][0]["seeds"] == [updates[0][0]["seeds"][0] + 1]  # the games that one process would play
    for ours, theirs in zip(*updates, strict=True):
        assert not torch.equal(ours["batch"][1], theirs["batch"][1])  # actions
        agents = [ppo_atari.Agent(InFrames(RewardFromActionAndObs, 1), args) for _ in range(2)]
        for agent, update in zip(agents, (ours, theirs), strict=True):
            for parameter, saved in zip(agent.parameters(), update["before"], strict=True):
                parameter.data.copy_(saved)
            ppo_atari.ppo_loss(agent, update["batch"], args)[0].backward()
        for i, (a, b) in enumerate(zip(*(agent.parameters() for agent in agents), strict=True)):
            torch.testing.assert_close(ours["gradients"][0][i], (a.grad + b.grad) / 2, rtol=1e-3, atol=1e-6)
        for key in ("before", "after"):
            assert all(torch.equal(x, y) for x, y in zip(ours[key], theirs[key], strict=True))
    assert any(not torch.equal(x, y) for x, y in zip(updates[0][0]["before"], updates[0][2]["after"], strict=True))
    checkpoint = ppo_atari.load_checkpoint(ppo_atari.find_checkpoint(tmp_path / "run"))
    assert checkpoint["global_step"] == 96
    assert all(torch.equal(x, y) for x, y in zip(checkpoint["model"].values(), updates[1][2]["after"], strict=True))
    assert [path.name for path in sorted(tmp_path.glob("run/checkpoints/*"))] == ["000000000064.pt", "000000000096.pt"]
    games = curve(tmp_path / "run", "charts/episodic_return")
    assert [step for step, _ in games] == list(range(1, 97))
    assert text.count("Done.") == 1
    for rank in (0, 1):  # a thread of gloo that still frees a tensor while Python ends aborts the process
        assert "gloo" not in (tmp_path / f"threads{rank}").read_text()


@pytest.mark.parametrize(
    ("trouble", "code", "gradient_steps"),
    [("approx_kl 1", 0, 1), pytest.param("value_loss nan", 1, 4, marks=pytest.mark.slow)],
)
def test_what_one_process_finds_all_act_on(trouble, code, gradient_steps, tmp_path):
    """One has a KL divergence of 1, the other of almost 0: their mean decides. One NaN ends the run of both."""
    settings = ONE_STEP | {"update_epochs": 4, "target_kl": 0.4, "total_timesteps": 32}
    codes, text = finish(launch(tmp_path, settings, TROUBLE=trouble))
    assert codes == [code]
    updates = [torch.load(tmp_path / f"rank{rank}.pt") for rank in (0, 1)]
    assert [len(of_rank[0]["gradients"]) for of_rank in updates] == [gradient_steps] * 2
    if code:
        assert "value_loss is nan after 32 steps" in text


@pytest.mark.slow
@pytest.mark.parametrize("whom", ["torchrun", "one", "all"])
def test_sigterm_ends_all_with_a_checkpoint(whom, tmp_path):
    """Sent to torchrun, which passes it on; to one process only; or to every one, torchrun too, as some clusters do.

    In the last case each gets it twice, in updates of half a second.
    """
    settings = ONE_STEP | {"total_timesteps": 10_000_000, "save_freq": 10_000, "update_epochs": 50}
    (process,) = launch(tmp_path, settings)
    while not (events := list(tmp_path.glob("run/events.*"))) or events[0].stat().st_size < 3000:
        assert process.poll() is None, process.communicate()
        time.sleep(0.1)
    told = {"torchrun": [], "one": workers(process)[1:], "all": workers(process)}[whom]
    for pid in told:
        os.kill(pid, signal.SIGTERM)
    if whom != "one":
        time.sleep(0.1)
        process.terminate()
    codes, text = finish([process])
    assert codes != [0]
    (path,) = tmp_path.glob("run/checkpoints/*.pt")
    step = ppo_atari.load_checkpoint(path)["global_step"]
    assert f"Stopped after {step:,} steps. Go on: torchrun --nproc-per-node=2 ppo_atari.py --resume run" in text


def workers(process):
    """Process numbers of what torchrun started, in the order of their ranks."""
    out = subprocess.run(["pgrep", "-P", str(process.pid)], capture_output=True, text=True).stdout
    return sorted(map(int, out.split()))


def test_a_process_that_dies_ends_the_run(tmp_path):
    (process,) = launch(tmp_path, ONE_STEP | {"total_timesteps": 10_000_000, "save_freq": 200})
    while not list(tmp_path.glob("run/checkpoints/*.pt")):
        assert process.poll() is None, process.communicate()
        time.sleep(0.1)
    os.kill(workers(process)[1], signal.SIGKILL)
    start = time.monotonic()
    codes, _ = finish([process])
    assert codes == [1]
    assert time.monotonic() - start < 60
    ppo_atari.load_checkpoint(ppo_atari.find_checkpoint(tmp_path / "run"))


def test_games_that_cannot_be_shared_are_refused(tmp_path):
    command = [sys.executable, ROOT / "ppo_atari.py", "--num-envs", "8"]
    environment = os.environ | {"RANK": "0", "WORLD_SIZE": "3"}
    done = subprocess.run(command, cwd=tmp_path, env=environment, text=True, **PIPES)
    assert done.returncode == 2
    assert re.fullmatch(r"ppo_atari.py: --num-envs 8 must give each of the 3 processes .*\n", done.stderr)
    assert not (tmp_path / "runs").exists()


def test_minibatches_of_one_step_per_process_are_refused(tmp_path, monkeypatch, capsys):
    """Of one advantage there is no standard deviation to normalize with."""
    monkeypatch.setenv("WORLD_SIZE", "2")
    settings = dict(num_envs=2, num_steps=2, num_minibatches=2, cuda=False)
    with pytest.raises(SystemExit) as stop:
        ppo_atari.train(ppo_atari.Args(run_dir=str(tmp_path / "run"), **settings))
    assert stop.value.code == 2
    assert "2 or more" in capsys.readouterr().err


def test_more_processes_than_gpus_are_refused(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setenv("LOCAL_RANK", "1")
    with pytest.raises(SystemExit) as stop:
        ppo_atari.train(ppo_atari.Args(run_dir=str(tmp_path / "run")))
    assert stop.value.code == 2
    assert "--nproc-per-node" in capsys.readouterr().err
