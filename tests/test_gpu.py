"""The scripts on a simulated GPU (simulated_gpu.py): they train, resume and are scored, and seldom wait for it."""

import copy
import inspect
import operator
import os
import signal
from collections import Counter
from contextlib import nullcontext

import ale_py.vector_env
import numpy as np
import pytest
import torch
from conftest import ROOT, SCRIPTS, SHORT, same, train
from probes import PROBES
from simulated_gpu import simulated_gpu
from torch.overrides import _get_current_function_mode_stack
from torch.utils._pytree import tree_leaves

import evaluate

SETTINGS = {  # two segments, in which episodes are cut off
    "ppo_cartpole": {
        "env_id": PROBES["TruncatedEndless"],
        "total_timesteps": 256,
        "save_freq": 128,
        "num_envs": 4,
        "num_steps": 16,
        "num_minibatches": 2,
        "update_epochs": 3,
        "target_kl": 1000.0,  # compared with, never reached
        "norm_obs": True,
        "cuda": True,
    },
    "ppo_atari": SHORT["ppo_atari"] | {"update_epochs": 3, "bf16": True, "cuda": True},
    "dqn_atari": SHORT["dqn_atari"] | {"train_frequency": 2, "bf16": True, "cuda": True},
}

# Where the scripts wait for the device: what happens, the waits each time, and a part of their line in the script. An
# update is what is logged at once: a rollout of PPO, 1,000 steps of DQN. Nothing is read in a gradient step; a step of
# the environments, an update, and an epoch with --target-kl read once each.
LOG = ("read", ".tolist() if metrics")
PPO = {
    "environment step": [
        ("send", "rollout.obs[t] = "),
        ("read", "rollout.actions[t].cpu()"),
        ("send", "rollout.rewards[t] = "),
        ("send", "rollout.terminated[t] = "),
        ("send", "rollout.truncated[t] = "),
    ],
    "cut-off": [("send", "final_obs = torch.as_tensor(")],
    "gradient step": [],
    "epoch": [],
    "update": [("send", "last_values = "), LOG],
    "save": [("read", "x.isfinite().all()")],
    "tensor saved": [("read", "torch.save(")],
    "tensor of a network": [("send", "Agent(envs, args).to(run.device)")],
}
DQN = {
    "environment step": [("send", "actions = epsilon_greedy("), ("read", "actions = epsilon_greedy(")],
    "cut-off": [],
    "update": [LOG],
}
WAITS = {
    "ppo_cartpole": PPO | {"epoch": [("read", "if kl > args.target_kl")]},
    "ppo_atari": PPO,
    "dqn_atari": PPO | DQN,
}
EVALUATE = {
    "environment step": [("send", "agent.act(torch.as_tensor(obs"), ("read", "envs.step(actions.cpu()")],
    "tensor of a network": [("send", "agent = "), ("send", "agent.load_state_dict("), ("read", "isfinite().all()")],
}
REFUSALS = "Expected all tensors to be on the same device|can't convert cuda:0 device type tensor to numpy"


@pytest.fixture(autouse=True)
def short_games(monkeypatch):
    """Games of Atari are cut off after 60 frames, in the scripts and in those that are loaded during a test."""
    real = ale_py.vector_env.AtariVectorEnv

    def make(*args, **kwargs):
        return real(*args, **kwargs | {"max_num_frames_per_episode": 60})

    for module in (ale_py.vector_env, SCRIPTS["ppo_atari"], SCRIPTS["dqn_atari"]):
        monkeypatch.setattr(module, "AtariVectorEnv", make)


def stop_and_resume(module, run_dir, monkeypatch, **settings):
    """A run that gets SIGTERM in its second segment, and is resumed; its last checkpoint."""
    record_step = module.Run.record_step

    def record_and_stop(run, *rest):
        record_step(run, *rest)
        if run.global_step == settings["total_timesteps"] * 3 // 4:
            os.kill(os.getpid(), signal.SIGTERM)

    with monkeypatch.context() as patch:
        patch.setattr(module.Run, "record_step", record_and_stop)
        assert module.train(module.Args(**settings, run_dir=str(run_dir))) == 128 + signal.SIGTERM
    assert module.train(module.Args(**settings, run_dir=str(run_dir), resume=str(run_dir))) == 0
    return module.load_checkpoint(module.find_checkpoint(run_dir))


def test_it_trains_resumes_and_is_scored_as_on_the_cpu(script, tmp_path, monkeypatch, capsys):
    """Weights, optimizer and score are those of the CPU, bit for bit."""
    checkpoints, scores = [], []
    for cuda in (True, False):
        run_dir = tmp_path / str(cuda)
        with simulated_gpu() if cuda else nullcontext():
            settings = SETTINGS[script] | {"cuda": cuda}
            checkpoints.append(stop_and_resume(SCRIPTS[script], run_dir, monkeypatch, **settings))
            path = evaluate.find_checkpoint(run_dir)
            scores.append(evaluate.score(path, evaluate.Args(str(path), episodes=1, cuda=cuda)))
        printed = capsys.readouterr().out
        assert printed.count("on a simulated GPU, steps" if cuda else "on the CPU, steps") == 2
        assert printed.endswith("on the GPU\n" if cuda else "on the CPU\n")
    assert scores[0]["returns"] == scores[1]["returns"]
    for name in checkpoints[0].keys() - {"args", "buffer"}:  # which name a folder, and the file in it
        assert same(checkpoints[0][name], checkpoints[1][name]), name


def count_events(module, monkeypatch):
    """A Counter of what happens from now on, by its names in WAITS."""
    events = Counter()

    def count(owner, name, event, happens=lambda *args: True):
        real = getattr(owner, name)

        def counted(*args, **kwargs):
            events[event] += bool(happens(*args))
            return real(*args, **kwargs)

        monkeypatch.setattr(owner, name, counted)

    count(module.Run, "record_step", "environment step")
    count(module.Run, "record_step", "cut-off", lambda run, rewards, ended: ended.any())
    count(module, "dqn_update" if hasattr(module, "dqn_update") else "ppo_loss", "gradient step")
    count(torch, "randperm", "epoch")
    count(module.Run, "log", "update")
    count(module.Run, "save", "save")
    return events


def compare(waits, events, table):
    """The waits that the table does not have, and with a minus those that it has and that did not happen."""
    difference = Counter()
    for event, parts in table.items():
        for part in parts:
            difference[part] -= events[event]
    for (kind, line), times in waits.items():
        part = next((part for part in difference if part[0] == kind and part[1] in line), (kind, line))
        difference[part] += times
    return {part: times for part, times in difference.items() if times}


def count_tensors(*nests):
    return sum(isinstance(x, torch.Tensor) for x in tree_leaves(nests))


def train_and_count(module, script, tmp_path, monkeypatch):
    """Train on the device; what happened, and how the waits differ from the table of `script`."""
    events = count_events(module, monkeypatch)
    with simulated_gpu() as gpu:
        run_dir = train(module, tmp_path, **SETTINGS[script])
    checkpoint = module.load_checkpoint(module.find_checkpoint(run_dir))
    networks = checkpoint["model"], checkpoint.get("target_model")
    events["tensor of a network"] = count_tensors(networks)
    events["tensor saved"] = events["save"] * count_tensors(networks, checkpoint["optimizer"])
    return events, compare(gpu.waits, events, WAITS[script])


def test_training_waits_where_the_table_says(script, tmp_path, monkeypatch):
    events, difference = train_and_count(SCRIPTS[script], script, tmp_path, monkeypatch)
    assert min(events.values()) > 0
    assert difference == {}


def test_evaluation_waits_where_the_table_says(tmp_path):
    path = evaluate.find_checkpoint(train(SCRIPTS["ppo_cartpole"], tmp_path, **SHORT["ppo_cartpole"]))
    with simulated_gpu() as gpu:
        score = evaluate.score(path, evaluate.Args(str(path), episodes=2, num_envs=1, cuda=True))
    tensors = count_tensors(evaluate.load_checkpoint(path)["model"])
    events = {"environment step": sum(score["lengths"]), "tensor of a network": tensors}
    assert compare(gpu.waits, events, EVALUATE) == {}


MISTAKES = {  # what a copy may get wrong: the script, what it says, and what the copy says instead
    "a tensor made on the CPU": (
        "ppo_cartpole",
        "self.values = torch.zeros((T, N), device=device)",
        "self.values = torch.zeros((T, N))",
    ),
    "a buffer that is not registered": (
        "ppo_cartpole",
        'self.register_buffer("mean", torch.zeros(size))',
        "self.mean = torch.zeros(size)",
    ),
    "actions that NumPy cannot read": (
        "ppo_atari",
        "envs.step(rollout.actions[t].cpu().numpy())",
        "envs.step(rollout.actions[t].numpy())",
    ),
    "a minibatch left on the CPU": (
        "dqn_atari",
        "batch = [x.to(run.device, non_blocking=True) for x in buffer.sample(args.batch_size)]",
        "batch = buffer.sample(args.batch_size)",
    ),
    "a network left on the CPU": (
        "dqn_atari",
        "Agent(envs, args).to(run.device), Agent(envs, args).to(run.device)",
        "Agent(envs, args).to(run.device), Agent(envs, args)",
    ),
}


def edited_copy(folder, script, old, new):
    """A copy of a script, loaded as evaluate.py does, in which `new` stands for `old`."""
    source, path = (ROOT / f"{script}.py").read_text(), folder / "my_idea.py"
    assert source.count(old) == 1
    path.write_text(source.replace(old, new))
    return evaluate.load_script({"script": "my_idea"}, path, path)


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_found(mistake, tmp_path):
    module = edited_copy(tmp_path, *MISTAKES[mistake])
    with simulated_gpu(), pytest.raises((RuntimeError, TypeError), match=REFUSALS):
        train(module, tmp_path, **SETTINGS[MISTAKES[mistake][0]])


def test_a_wait_in_each_gradient_step_is_found(tmp_path, monkeypatch):
    module = edited_copy(tmp_path, "ppo_atari", "loss.backward()", "loss.backward(), loss.item()")
    events, difference = train_and_count(module, "ppo_atari", tmp_path, monkeypatch)
    assert difference == {("read", "loss.backward(), loss.item()"): events["gradient step"]}


WAITING = {  # what makes the program wait, and how; g is on the device, c has the same numbers on the CPU
    "not at all": [
        lambda g, c: g + 2 * g.mean(),
        lambda g, c: g * c.sum(),
        lambda g, c: g.double().view(3, 1).to("cuda"),
        lambda g, c: torch.zeros(3, device="cuda") + g,
        lambda g, c: g[c > 0],
        lambda g, c: g[1:].fill_(c.sum()),
        lambda g, c: operator.setitem(g, slice(2), 1.0),
        lambda g, c: c.to("cuda", non_blocking=True),
        lambda g, c: g.copy_(c, non_blocking=True),
        lambda g, c: copy.deepcopy(g) * g,
        lambda g, c: g[g.long()],
    ],
    "send": [
        lambda g, c: c.to("cuda"),
        lambda g, c: c.cuda(),
        lambda g, c: torch.as_tensor(c, device="cuda"),
        lambda g, c: torch.tensor([1.0], device="cuda"),
        lambda g, c: g.copy_(c),
        lambda g, c: g[c.long()],
        lambda g, c: g[[0, 2]],
    ],
    "read": [
        lambda g, c: c.copy_(g),
        lambda g, c: g.cpu(),
        lambda g, c: copy.deepcopy(g).tolist(),
        lambda g, c: g.sum().item(),
        lambda g, c: bool(g.any()),
        lambda g, c: f"{g.sum()}",
        lambda g, c: repr(g),
        lambda g, c: torch.equal(g, g),
        lambda g, c: g.nonzero(),
        lambda g, c: g[g > 0],
        lambda g, c: torch.cuda.synchronize(),
    ],
}
REFUSED = [
    lambda g, c: g + c,
    lambda g, c: c + g.sum(),
    lambda g, c: c.sum().add_(g.sum()),
    lambda g, c: torch.stack([g.sum(), c.sum()]),
    lambda g, c: torch.where(g > 0, g, c),
    lambda g, c: g.index_select(0, c.long()),
    lambda g, c: c[g.long()],
    lambda g, c: g.index_put_((g.long(),), c),
    lambda g, c: torch.nn.Linear(3, 1)(g),
    lambda g, c: g + torch.zeros_like(g, device="cpu"),
    lambda g, c: g.numpy(),
    lambda g, c: np.stack([g, g]),
]


@pytest.mark.parametrize("wait", WAITING)
def test_what_waits_for_the_device(wait):
    for operation in WAITING[wait]:
        c = torch.tensor([0.0, 1.0, 2.0])
        with simulated_gpu() as gpu:
            g = c.to("cuda", non_blocking=True)
            operation(g, c)
        waits = [kind for kind, _ in gpu.waits.elements()]
        assert waits == ([] if wait == "not at all" else [wait]), inspect.getsource(operation)


@pytest.mark.parametrize("operation", REFUSED, ids=lambda operation: inspect.getsource(operation).strip())
def test_what_the_device_refuses(operation):
    c = torch.tensor([0.0, 1.0, 2.0])
    with simulated_gpu(), pytest.raises((RuntimeError, TypeError), match=REFUSALS):
        operation(c.to("cuda"), c)


def test_a_moved_tensor_is_what_was_asked_for():
    c = torch.arange(12.0).view(1, 2, 2, 3)
    with simulated_gpu():
        g = c.to("cuda", torch.float64, memory_format=torch.channels_last)
        back = g.to("cpu", torch.float32)
        g += 1
    assert g.is_contiguous(memory_format=torch.channels_last)
    assert (g.dtype, g.tolist()) == (torch.float64, (c + 1).tolist())
    assert (back.dtype, back.tolist()) == (torch.float32, c.tolist())


def test_nothing_of_the_device_remains():
    def state():
        return [
            torch.cuda.is_available,
            torch.cuda.get_device_name,
            torch.cuda.synchronize,
            torch.accelerator.current_accelerator,
            torch.autocast,
            torch._C._group_tensors_by_device_and_dtype,
            torch.__future__.get_swap_module_params_on_conversion,
            *_get_current_function_mode_stack(),
        ]

    before = state()
    with pytest.raises(KeyError), simulated_gpu():
        assert torch.zeros(1, device="cuda").is_cuda
        assert state() != before
        raise KeyError
    assert state() == before
