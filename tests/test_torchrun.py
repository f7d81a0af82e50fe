"""torchrun with both PPO scripts: several processes that learn as one. Here two, which talk through gloo."""

import dataclasses
import fcntl
import os
import signal
import socket
import subprocess
import sys
import time

import pytest
import torch
from conftest import ROOT, SCRIPTS, SHORT, flags, same
from probes import InFrames, RewardFromActionAndObs
from simulated_gpu import simulated_gpu
from test_checkpoint import PIPES, curve

import ppo_atari

# What a script does, ppo_atari.py with games of one step; and a record of what each update got and did.
PROGRAM = """
import copy, importlib, os, sys, torch, probes
module = importlib.import_module(os.environ["MODULE"])
rank, updates, seeds, trouble = int(os.environ["RANK"]), [], [], os.environ.get("TROUBLE", "").split()
ppo_update, ppo_loss, clip = module.ppo_update, module.ppo_loss, torch.nn.utils.clip_grad_norm_
begin_segment = module.Run.begin_segment

def watch_clip(parameters, *rest):
    parameters = list(parameters)
    updates[-1]["gradients"].append([p.grad.clone() for p in parameters])
    return clip(parameters, *rest)

def watch_update(agent, optimizer, batch, args):
    before, batch = copy.deepcopy(agent.state_dict()), [x.clone() for x in batch]
    updates.append({"seeds": seeds, "batch": batch, "before": before, "gradients": []})
    metrics = ppo_update(agent, optimizer, batch, args)
    updates[-1]["after"] = [p.detach().clone() for p in agent.parameters()]
    torch.save(updates, f"rank{rank}.pt")
    return metrics

def watch_loss(agent, minibatch, args):
    loss, metrics = ppo_loss(agent, minibatch, args)
    if trouble and rank == 1:
        metrics[trouble[0]] = torch.tensor(float(trouble[len(updates)]))
    return loss, metrics

torch.nn.utils.clip_grad_norm_, module.ppo_update, module.ppo_loss = watch_clip, watch_update, watch_loss
module.Run.begin_segment = lambda run: seeds.append(begin_segment(run)) or seeds[-1]
if module.__name__ == "ppo_atari":
    module.make_envs = lambda args, n, seed, training: probes.InFrames(probes.RewardFromActionAndObs, n)
code = module.train(module.read_args())
threads = [open(f"/proc/self/task/{thread}/comm").read().strip() for thread in os.listdir("/proc/self/task")]
open(f"threads{rank}", "w").write(" ".join(threads))
sys.exit(code)
"""
ATARI = SHORT["ppo_atari"] | {"update_epochs": 1, "num_minibatches": 1, "total_timesteps": 96, "run_dir": "run"}
CARTPOLE = {"num_envs": 4, "num_steps": 64, "update_epochs": 1, "total_timesteps": 768, "save_freq": 400}
CARTPOLE |= {"norm_obs": True, "run_dir": "run"}
SETTINGS = {"ppo_cartpole": CARTPOLE, "ppo_atari": ATARI}


def launch(folder, script, *settings, program="program.py", **environment):
    """Start two processes: by one torchrun, or by one on each of two "machines" where there are settings for two."""
    (folder / "program.py").write_text(PROGRAM)
    paths = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    environment = os.environ | {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1", "MODULE": script} | environment
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "torch.distributed.run", f"--nproc-per-node={2 // len(settings)}"]
    command += [f"--nnodes={len(settings)}", "--master-addr=127.0.0.1", f"--master-port={port}"]
    pipes = PIPES | {"cwd": folder, "env": environment, "text": True, "start_new_session": True}
    return [
        subprocess.Popen([*command, f"--node-rank={i}", program, *flags(each)], **pipes)
        for i, each in enumerate(settings)
    ]


def workers(process):
    """Process numbers of what torchrun started, in the order of their ranks."""
    out = subprocess.run(["pgrep", "-P", str(process.pid)], capture_output=True, text=True).stdout
    return sorted(map(int, out.split()))


def kill(process):
    """torchrun and all that it started: each is in a session of its own."""
    for pid in [process.pid, *workers(process)]:
        os.killpg(pid, signal.SIGKILL)


def finish(processes):
    """Exit codes, and all that was written. None of them may hang."""
    try:
        texts = ["".join(process.communicate(timeout=200)) for process in processes]
    finally:
        for process in processes:
            if process.poll() is None:
                kill(process)
    return [process.returncode for process in processes], "".join(texts)


def wait_for(process, there):
    """Wait until there() is true."""
    while not there():
        assert process.poll() is None, process.communicate()
        time.sleep(0.05)


def rebuild(module, args, state):
    """The agent that a process had."""
    envs = InFrames(RewardFromActionAndObs, 1) if module.__name__ == "ppo_atari" else module.make_envs(args, 1, 0, True)
    agent = module.Agent(envs, args)
    agent.load_state_dict(state)
    return agent


@pytest.mark.parametrize(
    ("script", "machines"),
    [("ppo_cartpole", 1), ("ppo_atari", 1), pytest.param("ppo_atari", 2, marks=pytest.mark.slow)],
)
def test_two_processes_learn_as_one(script, machines, tmp_path):
    """Half the games each. Gradients, weights and statistics are those of one process with all of them."""
    module, settings = SCRIPTS[script], SETTINGS[script] | {"norm_adv": False}
    codes, text = finish(launch(tmp_path, script, *[settings] * machines))
    assert codes == [0] * machines, text
    args, updates = module.Args(**settings), [torch.load(tmp_path / f"rank{rank}.pt") for rank in (0, 1)]
    assert len(updates[0]) == len(updates[1]) == 3
    seeds = [of_rank[0]["seeds"] for of_rank in updates]
    assert seeds[1] == [seed + args.num_envs // 2 for seed in seeds[0]]  # the games that one process would play
    assert len(set(seeds[0])) == 2
    seen = []
    for ours, theirs in zip(*updates, strict=True):
        assert not torch.equal(ours["batch"][1], theirs["batch"][1])  # actions
        for key in ("before", "gradients", "after"):
            assert same(ours[key], theirs[key])
        together = [torch.cat(parts) for parts in zip(ours["batch"], theirs["batch"], strict=True)]
        agent = rebuild(module, args, ours["before"])
        module.ppo_loss(agent, together, args)[0].backward()
        for averaged, parameter in zip(ours["gradients"][0], agent.parameters(), strict=True):
            torch.testing.assert_close(averaged, parameter.grad, rtol=1e-5, atol=1e-6)
        assert any(x.abs().max() > 1e-3 for x in ours["gradients"][0])
        if script == "ppo_cartpole" and seen:
            mean, var = (ours["before"][f"norm_obs.{name}"] for name in ("mean", "var"))
            torch.testing.assert_close(mean, torch.cat(seen).mean(0), rtol=1e-4, atol=1e-6)
            torch.testing.assert_close(var, torch.cat(seen).var(0, correction=0), rtol=1e-4, atol=1e-6)
        seen.append(together[0])
    checkpoint = module.load_checkpoint(module.find_checkpoint(tmp_path / "run"))
    assert checkpoint["global_step"] == args.total_timesteps
    assert same(updates[1][2]["after"], [*rebuild(module, args, checkpoint["model"]).parameters()])
    assert not same(updates[1][0]["after"], updates[1][2]["after"])
    assert text.count("Done:") == 1
    for rank in (0, 1):  # a thread of gloo that still frees a tensor while Python ends aborts the process
        assert "gloo" not in (tmp_path / f"threads{rank}").read_text()


@pytest.mark.parametrize(
    ("script", "trouble", "code", "gradient_steps"),
    [
        ("ppo_cartpole", "approx_kl 1 0.7", 0, [1, 4]),
        pytest.param("ppo_atari", "approx_kl 1 0.7", 0, [1, 4], marks=pytest.mark.slow),
        pytest.param("ppo_atari", "value_loss nan", 1, [4], marks=pytest.mark.slow),
    ],
)
def test_what_one_process_finds_all_act_on(script, trouble, code, gradient_steps, tmp_path):
    """One has a KL divergence of 1, then 0.7, the other of almost 0: their mean decides. One NaN ends the run of both.

    However many gradient steps they take, their weights stay the same.
    """
    settings = SETTINGS[script] | {"update_epochs": 4, "num_minibatches": 1, "target_kl": 0.4}
    settings["total_timesteps"] = len(gradient_steps) * settings["num_envs"] * settings["num_steps"]
    codes, text = finish(launch(tmp_path, script, settings, TROUBLE=trouble))
    assert codes == [code], text
    updates = [torch.load(tmp_path / f"rank{rank}.pt") for rank in (0, 1)]
    for of_rank in updates:
        assert [len(update["gradients"]) for update in of_rank] == gradient_steps
    assert all(same(ours["after"], theirs["after"]) for ours, theirs in zip(*updates, strict=True))
    assert len(list(tmp_path.glob("run/events.*"))) == 1
    if not code:  # the curve is of both, too
        means = [value for _, value in curve(tmp_path / "run", "losses/approx_kl")]
        assert means == pytest.approx([0.5, 0.35], abs=0.02)
    if code:
        assert "value_loss is nan after 32 steps" in text


@pytest.mark.slow
@pytest.mark.parametrize(
    ("script", "whom"), [*(("ppo_atari", x) for x in ("torchrun", "one", "all")), ("ppo_cartpole", "one")]
)
def test_sigterm_ends_all_with_a_checkpoint(script, whom, tmp_path):
    """Sent to torchrun, which passes it on; to one process only; or to every one, torchrun too, as some clusters do.

    In the last case each gets it twice, in updates of half a second.
    """
    settings = SETTINGS[script] | {"total_timesteps": 10_000_000, "save_freq": 1_000_000, "update_epochs": 50}
    (process,) = launch(tmp_path, script, settings, program=ROOT / f"{script}.py")
    wait_for(process, lambda: any(file.stat().st_size > 1000 for file in tmp_path.glob("run/events.*")))
    for pid in {"torchrun": [], "one": workers(process)[1:], "all": workers(process)}[whom]:
        os.kill(pid, signal.SIGTERM)
    if whom != "one":
        time.sleep(0.1)
        process.terminate()
    codes, text = finish([process])
    assert codes != [0]
    (path,) = tmp_path.glob("run/checkpoints/*.pt")
    step = SCRIPTS[script].load_checkpoint(path)["global_step"]
    assert f"Stopped at step {step:,}. " in text
    assert f"torchrun --nproc-per-node=2 {ROOT / script}.py --resume run" in text


@pytest.mark.parametrize("script", ["ppo_cartpole", pytest.param("ppo_atari", marks=pytest.mark.slow)])
def test_a_run_that_lost_its_processes_ends_as_one_that_was_left_alone(script, tmp_path):
    """One process dies: the run ends. All are killed: nobody says so. The same command goes on from a checkpoint."""
    module, settings = SCRIPTS[script], SETTINGS[script] | {"total_timesteps": 20_480, "save_freq": 2_560}
    settings |= {"total_timesteps": 640, "save_freq": 64} if script == "ppo_atari" else {}

    def start(name):
        return launch(tmp_path, script, settings | {"run_dir": name}, program=ROOT / f"{script}.py")

    for whom in ("one", "all"):
        held = module.list_checkpoints(tmp_path / "killed")
        (process,) = start("killed")
        wait_for(process, lambda held=held: module.list_checkpoints(tmp_path / "killed") > held)
        if whom == "one":
            os.kill(workers(process)[1], signal.SIGKILL)
        else:
            kill(process)
        assert finish([process])[0] == [1 if whom == "one" else -signal.SIGKILL]
    killed = module.load_checkpoint(module.find_checkpoint(tmp_path / "killed"))
    assert killed["global_step"] < settings["total_timesteps"]
    ends = []
    for name in ("killed", "alone"):
        codes, text = finish(start(name))
        assert codes == [0], text
        ends.append(module.load_checkpoint(module.find_checkpoint(tmp_path / name)))
        assert ends[-1]["global_step"] == settings["total_timesteps"]
    assert all(same(ends[0][key], ends[1][key]) for key in ("model", "optimizer"))
    assert not same(killed["model"], ends[0]["model"])


def test_processes_with_different_flags_are_refused(tmp_path):
    """As when the command is typed on each machine."""
    settings = [CARTPOLE, CARTPOLE | {"learning_rate": 0.1}]
    codes, text = finish(launch(tmp_path, "ppo_cartpole", *settings, program=ROOT / "ppo_cartpole.py"))
    assert 0 not in codes
    assert "torchrun's processes have different flags" in text
    assert not list(tmp_path.glob("run/checkpoints/*.pt"))


def test_a_second_torchrun_in_the_same_folder_ends_with_a_sentence(tmp_path):
    """Though only one of its processes sees the lock."""
    (tmp_path / "run").mkdir()
    with open(tmp_path / "run" / ".lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        codes, text = finish(launch(tmp_path, "ppo_cartpole", CARTPOLE, program=ROOT / "ppo_cartpole.py"))
    assert codes == [1]
    assert "ppo_cartpole.py: run is being written by another process" in text


@pytest.mark.parametrize(
    ("script", "num_ranks", "settings", "reason"),
    [
        ("ppo_cartpole", 3, {}, "--num-envs 8 cannot be shared equally by 3 processes"),
        ("ppo_atari", 3, {}, "--num-envs 8 cannot be shared equally by 3 processes"),
        ("ppo_atari", 2, {"num_envs": 2, "num_steps": 2, "num_minibatches": 2}, "--num-minibatches 2 must"),
        ("dqn_atari", 2, {}, "not with torchrun"),
    ],
)
def test_what_cannot_be_shared_is_refused(script, num_ranks, settings, reason, tmp_path, monkeypatch, capsys):
    """Of one advantage, for instance, there is no standard deviation to normalize with."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("WORLD_SIZE", str(num_ranks))
    monkeypatch.setattr("sys.argv", ["x.py", *flags(settings)])
    with pytest.raises(SystemExit) as stop:
        SCRIPTS[script].read_args()
    assert stop.value.code == 2
    message = capsys.readouterr().err
    assert reason in message
    assert message.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_a_process_takes_the_gpu_of_its_number_on_its_own_machine(tmp_path, monkeypatch):
    """The second process of the second machine, of two on each."""
    chosen, args = [], ppo_atari.Args(run_dir=str(tmp_path / "run"))
    for variable, value in {"RANK": 3, "LOCAL_RANK": 1, "WORLD_SIZE": 4}.items():
        monkeypatch.setenv(variable, str(value))

    def broadcast(found):
        assert chosen == [1]  # before anything is sent
        found[:] = [None, tmp_path / "run", dataclasses.asdict(args)]

    monkeypatch.setattr(torch.distributed, "init_process_group", lambda: None)
    monkeypatch.setattr(torch.distributed, "broadcast_object_list", broadcast)
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    with simulated_gpu():
        assert ppo_atari.Run(args).num_envs == 2
    assert chosen == [1]
