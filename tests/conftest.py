"""What several test files share."""

import os
import signal
import subprocess
import sys
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"  # tests run side by side, one on each core; read by the import of torch

import pytest
import torch
from tensorboard.summary.writer import event_file_writer
from tqdm import tqdm

import dqn_atari
import ppo_atari
import ppo_cartpole

ROOT = Path(__file__).parents[1]
SCRIPTS = {"ppo_cartpole": ppo_cartpole, "ppo_atari": ppo_atari, "dqn_atari": dqn_atari}
SHORT = {  # two updates and a bit: the least that passes through everything
    "ppo_cartpole": {"total_timesteps": 600, "save_freq": 300},
    "ppo_atari": {
        "total_timesteps": 80,
        "save_freq": 40,
        "num_envs": 2,
        "num_steps": 16,
        "num_minibatches": 2,
        "cuda": False,
    },
    "dqn_atari": {
        "total_timesteps": 80,
        "save_freq": 40,
        "num_envs": 2,
        "buffer_size": 32,
        "learning_starts": 16,
        "target_network_frequency": 20,
        "batch_size": 4,
        "cuda": False,
    },
}


def stride(args):
    """Steps between two moments at which a run can be saved: a rollout of PPO, a step of all games in DQN."""
    return args.num_envs * getattr(args, "num_steps", 1)


def flags(args):
    """{"num_envs": 2, "cuda": False} -> ["--num-envs", "2", "--no-cuda"]"""
    out = []
    for name, value in args.items():
        name = name.replace("_", "-")
        out += [f"--{'' if value else 'no-'}{name}"] if isinstance(value, bool) else [f"--{name}", str(value)]
    return out


def run(script, *arguments, cwd):
    """Run a script of the project as a user would; its CompletedProcess, with text output."""
    command = [sys.executable, ROOT / script, *map(str, arguments)]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=300)


def train(module, folder, **settings):
    """Train in this process, in `folder`/run unless run_dir is given; the run folder. It must end well."""
    args = module.Args(**{"run_dir": str(folder / "run")} | settings)
    assert module.train(args) == 0
    return Path(args.run_dir)


def same(a, b):
    """Whether two nests of dicts, lists and tensors hold the same, bit for bit."""
    if isinstance(a, dict):
        return isinstance(b, dict) and a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return type(a) is type(b) and len(a) == len(b) and all(map(same, a, b))
    return torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


def reload(module, run_dir):
    """The newest checkpoint of a run, and the agent in it."""
    checkpoint = module.load_checkpoint(module.find_checkpoint(run_dir))
    args = module.Args(**checkpoint["args"])
    agent = module.Agent(module.make_envs(args, 1, seed=0, training=False), args)
    agent.load_state_dict(checkpoint["model"])
    return checkpoint, agent


@pytest.fixture(params=SCRIPTS)
def script(request):
    """Each training script's name in turn."""
    return request.param


@pytest.fixture(autouse=True)
def count_event_files_from_zero(monkeypatch):
    """TensorBoard reads files of one second by the order of a number in their names, of which 10 is before 9."""
    monkeypatch.setattr(event_file_writer, "_global_uid", event_file_writer.AtomicCounter(0))


@pytest.fixture(autouse=True)
def close_progress_bars():
    """Those of runs that failed on purpose: closed by the garbage collector, they can upset tqdm in a later test."""
    yield
    for bar in list(getattr(tqdm, "_instances", ())):
        bar.close()


@pytest.fixture(autouse=True)
def leave_torch_as_it_was():
    """Training in this process sets seeds, threads, signal handlers and how tiny numbers are treated."""
    threads, numbers = torch.get_num_threads(), (signal.SIGINT, signal.SIGTERM)
    handlers = [signal.getsignal(number) for number in numbers]
    yield
    for number, handler in zip(numbers, handlers, strict=True):
        signal.signal(number, handler)
    torch.set_flush_denormal(False)
    torch.set_num_threads(threads)
