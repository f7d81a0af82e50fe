# /// script
# requires-python = ">=3.11"
# dependencies = [
#     "ale-py==0.12.1",
#     "gymnasium[classic-control]==1.4.0",
#     "numpy==2.4.6",
#     "opencv-python==5.0.0.93",
#     "tensorboard==2.21.0",
#     "torch==2.13.0",
#     "tqdm==4.70.1",
#     "tyro==1.0.17",
# ]
# ///
"""PPO on vector observations: proximal policy optimization (Schulman et al. 2017, arXiv:1707.06347).

    python ppo_cartpole.py
    python ppo_cartpole.py --env-id Acrobot-v1
    python evaluate.py runs/<run>

Measured: CartPole-v1 500.0 ± 0.0 (10 seeds, 100 greedy episodes each, 80,000 steps, 21 to 27 s on two CPU cores).

For any Gymnasium environment with vector observations and discrete actions, also one of your own: a file my_module.py
beside this one that registers it is named with --env-id my_module:MyEnv-v0.

Departs from the paper, as openai/baselines does: (1) gradients are clipped to a global norm, (2) advantages are
normalized in each minibatch, (3) weights start orthogonal and Adam's epsilon is 1e-5. Departs from both: (4) a
truncated episode (CartPole's 500 steps are up) is not taken for a terminated one, its last observation has a value.
Hyperparameters start from those that rl-baselines3-zoo found for CartPole; twice their learning rate learns faster,
and --target-kl keeps one run in twenty from collapsing near the end.
"""

import argparse
import contextlib
import dataclasses
import difflib
import importlib.util
import json
import math
import os
import signal
import sys
import threading
import time
import zipfile
from collections import deque
from dataclasses import dataclass
from pathlib import Path

import gymnasium as gym
import numpy as np
import torch
import tyro
from gymnasium.vector import AutoresetMode, SyncVectorEnv
from torch import nn
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

FORMAT = 1  # of a checkpoint; a file with another number is refused


def fail(message, code=1):
    """End the program with one sentence instead of a traceback. Exit code 2: wrong usage; 1: anything else."""
    print(f"{Path(sys.argv[0]).name}: {message}", file=sys.stderr)
    sys.exit(code)


# ---- Arguments ----


@dataclass
class Args:
    env_id: str = "CartPole-v1"  # any Gymnasium id with vector observations and discrete actions
    total_timesteps: int = 80_000  # steps, all environments together; the last rollout is played to its end
    exp_name: str = Path(__file__).stem  # name of the experiment, part of the run folder's name
    seed: int = 1  # of everything random; on the CPU, the same seed gives the same run, bit for bit
    run_dir: str | None = None  # folder of this run; None: runs/{env_id}__{exp_name}__{seed}__{unix time}
    save_freq: int | None = None  # steps between checkpoints; None: a tenth of the run
    resume: str | None = None  # run folder or checkpoint to go on from; flags given beside it replace the saved ones
    cuda: bool = False  # train on the GPU; without one, on the CPU
    torch_deterministic: bool = True  # only deterministic cuDNN kernels; off may be faster
    track: bool = False  # also log to Weights & Biases (pip install wandb)
    wandb_project_name: str = "single-file-rl"  # W&B project
    wandb_entity: str | None = None  # W&B team; None: your own account

    num_envs: int = 8  # environments played side by side; more give less correlated batches
    num_steps: int = 32  # steps per environment between updates (T); longer sees further, learns later
    learning_rate: float = 2e-3  # Adam's step size; larger learns faster until it diverges
    anneal_lr: bool = True  # lower the learning rate linearly, to 0 at the end
    gamma: float = 0.98  # discount per step; nearer to 1 looks further ahead
    gae_lambda: float = 0.8  # 0: advantages trust the value function (biased), 1: the rewards of the rollout (noisy)
    num_minibatches: int = 1  # parts a rollout is cut into; more parts, more and noisier gradient steps
    update_epochs: int = 20  # passes over a rollout; more take more from each step, and overfit it sooner
    norm_adv: bool = True  # normalize advantages to mean 0 and std 1 in each minibatch
    clip_coef: float = 0.2  # how far one update may move a probability ratio from 1
    clip_vloss: bool = False  # also clip how far one update may move a value, by clip_coef
    ent_coef: float = 0.0  # weight of the entropy bonus; larger explores longer
    vf_coef: float = 0.5  # weight of the value loss
    max_grad_norm: float = 0.5  # longest gradient (global L2 norm) that is applied as it is
    target_kl: float | None = 0.02  # end an update after an epoch whose mean KL divergence exceeds this; None: never
    norm_obs: bool = False  # normalize observations by a running mean and variance

    def __post_init__(self):
        """Refuse what cannot work, naming the flag, what it got and what it takes."""
        for name in "total_timesteps save_freq num_envs num_steps num_minibatches update_epochs".split():
            value = getattr(self, name)
            if value is not None and value < 1:
                fail(f"--{name.replace('_', '-')} must be at least 1, got {value}.", code=2)
        if not 0 <= self.seed < 2**32:
            fail(f"--seed must be between 0 and {2**32 - 1}, got {self.seed}.", code=2)
        for name in "learning_rate ent_coef vf_coef clip_coef max_grad_norm target_kl".split():
            value = getattr(self, name)
            if value is not None and not (value >= 0 and math.isfinite(value)):
                fail(f"--{name.replace('_', '-')} must be a number of 0 or more, got {value}.", code=2)
        for name in "gamma gae_lambda".split():
            if not 0 <= getattr(self, name) <= 1:
                fail(f"--{name.replace('_', '-')} must be between 0 and 1, got {getattr(self, name)}.", code=2)
        batch_size, num_minibatches = self.num_envs * self.num_steps, self.num_minibatches
        if batch_size % num_minibatches:
            fail(f"--num-minibatches {num_minibatches} does not divide --num-envs * --num-steps = {batch_size}.", 2)
        if self.norm_adv and batch_size == num_minibatches:
            fail("--norm-adv needs minibatches of 2 or more: lower --num-minibatches, or add --no-norm-adv.", code=2)
        if self.total_timesteps < batch_size:
            fail(f"--total-timesteps {self.total_timesteps} is less than one rollout of {batch_size} steps.", code=2)


# ---- Environment ----


def spread_seed(*key):
    """A seed in [0, 2**30) hashed from integers: environments count up from it, so runs 1, 2, 3 must lie far apart."""
    return int(np.random.SeedSequence(key).generate_state(1)[0] >> 2)  # a plain int: environments refuse NumPy's


def make_envs(args, num_envs, seed, training, render=False):
    """`num_envs` seeded copies of --env-id in one vector environment; an episode that ends restarts on the same step.

    On such a step obs is the first of the new episode; the last of the old one is in infos["final_obs"].
    `training` changes nothing: these environments are trained on and scored as they are.
    """
    render_mode = {"render_mode": "rgb_array"} if render else {}  # not every environment knows the word
    try:
        envs = SyncVectorEnv(
            [lambda: gym.make(args.env_id, **render_mode)] * num_envs, autoreset_mode=AutoresetMode.SAME_STEP
        )
    except gym.error.DependencyNotInstalled as error:
        fail(f"--env-id {args.env_id} needs a package that is not installed: {error}", code=2)
    except ImportError as error:
        fail(f"--env-id {args.env_id} cannot be imported: {error.msg}", code=2)
    except gym.error.Error:
        close = ", ".join(difflib.get_close_matches(args.env_id, gym.registry))
        hint = f"Close: {close}." if close else "Your own: my_module:MyEnv-v0. Atari games: ppo_atari.py."
        fail(f"--env-id {args.env_id} is not registered. {hint}", code=2)
    obs_space, action_space = envs.single_observation_space, envs.single_action_space
    if not isinstance(obs_space, gym.spaces.Box) or len(obs_space.shape) != 1:
        fail(f"--env-id {args.env_id} does not give vectors but {obs_space}; for Atari frames use ppo_atari.py.", 2)
    if not isinstance(action_space, gym.spaces.Discrete) or action_space.start != 0:
        fail(f"--env-id {args.env_id} does not take discrete actions 0, 1, 2, ... but {action_space}.", 2)
    envs.reset(seed=seed)  # the caller's own reset() goes on from this seed
    return envs


# ---- Network ----


class RunningNorm(nn.Module):
    """Normalizes vectors by the mean and variance of all that were passed to update(), and clips them to ±10.

    The statistics are buffers: they are saved and loaded with the network, and only update() changes them.
    """

    def __init__(self, size):
        super().__init__()
        self.register_buffer("mean", torch.zeros(size))
        self.register_buffer("var", torch.ones(size))
        self.register_buffer("count", torch.zeros(()))

    @torch.no_grad()
    def update(self, x):
        """Take in `x`, (B, size): mean and variance of two samples together (Chan et al. 1979)."""
        total = self.count + len(x)
        delta = x.mean(0) - self.mean
        m2 = self.var * self.count + x.var(0, correction=0) * len(x) + delta**2 * self.count * len(x) / total
        self.mean += delta * len(x) / total
        self.var.copy_(m2 / total)
        self.count.copy_(total)

    def forward(self, x):
        return ((x - self.mean) / (self.var + 1e-8).sqrt()).clamp(-10, 10)


def layer_init(layer, std=2**0.5):
    """Orthogonal weights scaled by `std`, zero bias (Saxe et al. 2014): signals keep their size from layer to layer."""
    nn.init.orthogonal_(layer.weight, std)
    nn.init.zeros_(layer.bias)
    return layer


class Agent(nn.Module):
    """Policy and value function as two separate networks, which share nothing but the observation's normalization."""

    def __init__(self, envs, args):
        super().__init__()
        size, num_actions = envs.single_observation_space.shape[0], envs.single_action_space.n
        self.norm_obs = RunningNorm(size) if args.norm_obs else nn.Identity()
        self.actor = nn.Sequential(
            layer_init(nn.Linear(size, 64)),
            nn.Tanh(),
            layer_init(nn.Linear(64, 64)),
            nn.Tanh(),
            layer_init(nn.Linear(64, num_actions), std=0.01),  # so small that every action starts out equally likely
        )
        self.critic = nn.Sequential(
            layer_init(nn.Linear(size, 64)),
            nn.Tanh(),
            layer_init(nn.Linear(64, 64)),
            nn.Tanh(),
            layer_init(nn.Linear(64, 1), std=1.0),
        )

    def forward(self, obs):
        """obs (N, size) -> logits (N, A), values (N,)"""
        x = self.norm_obs(obs.float())
        return self.actor(x), self.critic(x).squeeze(-1)

    def observe(self, obs):
        """Take observations (B, size) into the statistics of --norm-obs; without it, nothing."""
        if isinstance(self.norm_obs, RunningNorm):
            self.norm_obs.update(obs.float())

    def act(self, obs, greedy):
        """obs (N, size) -> actions (N,) int64: the likeliest ones, or sampled as in training."""
        logits, _ = self(obs)
        return logits.argmax(-1) if greedy else sample(logits)[0]


def sample(logits):
    """logits (N, A) -> actions (N,) int64 drawn from the policy, and their log-probabilities (N,)"""
    log_pi = logits.log_softmax(-1)
    actions = torch.multinomial(log_pi.exp(), 1)  # (N, 1)
    return actions.squeeze(-1), log_pi.gather(-1, actions).squeeze(-1)


# ---- Storage ----


class Rollout:
    """What T steps of N environments gave, preallocated. Row t: what was seen, what was done, what came of it."""

    def __init__(self, num_steps, envs, device):
        T, N, space = num_steps, envs.num_envs, envs.single_observation_space
        dtype = torch.uint8 if space.dtype == np.uint8 else torch.float32  # frames stay bytes: a quarter of the memory
        self.obs = torch.zeros((T, N, *space.shape), dtype=dtype, device=device)
        self.actions = torch.zeros((T, N), dtype=torch.int64, device=device)
        self.logprobs = torch.zeros((T, N), device=device)
        self.values = torch.zeros((T, N), device=device)
        self.rewards = torch.zeros((T, N), device=device)
        self.terminated = torch.zeros((T, N), dtype=torch.bool, device=device)  # no future after this step
        self.truncated = torch.zeros((T, N), dtype=torch.bool, device=device)  # cut off, though there was a future
        self.final_values = torch.zeros((T, N), device=device)  # what that future was worth; read where truncated

    def flatten(self, advantages, returns):
        """The batch that an update needs: obs, actions, logprobs, values, advantages, returns, each (B, ...)."""
        batch = (self.obs, self.actions, self.logprobs, self.values, advantages, returns)
        return tuple(x.flatten(0, 1) for x in batch)  # (T, N, ...) -> (B, ...), B = T * N


# ---- Learning ----


def compute_gae(rewards, values, next_values, terminated, ended, gamma, gae_lambda):
    """Generalized advantage estimation (Schulman et al. 2016, eq. 16). All (T, N); returns advantages, returns.

    next_values[t] is the value of the observation that step t led to, also where the episode was cut off there:
    only a terminated episode has no future. `ended` is terminated or truncated: the λ-sum stops at either.
    """
    advantages = torch.empty_like(rewards)
    following = torch.zeros_like(rewards[0])  # advantage of the step after t, (N,)
    for t in reversed(range(len(rewards))):
        delta = rewards[t] + gamma * next_values[t] * ~terminated[t] - values[t]
        advantages[t] = following = delta + gamma * gae_lambda * following * ~ended[t]
    return advantages, advantages + values


def annealed_lr(args, global_step):
    """The learning rate of an update after `global_step` steps: linear, reaching 0 at --total-timesteps."""
    fraction_left = 1 - global_step / args.total_timesteps if args.anneal_lr else 1
    return args.learning_rate * fraction_left


def ppo_loss(agent, minibatch, args):
    """The loss to minimize, and its metrics by name (Schulman et al. 2017, eq. 7 and 9).

    minibatch: obs, actions, logprobs and values as the rollout had them, advantages, returns; each (M, ...).
    """
    mb_obs, mb_actions, mb_logprobs, mb_values, mb_advantages, mb_returns = minibatch
    logits, new_values = agent(mb_obs)  # (M, A), (M,)
    log_pi = logits.log_softmax(-1)
    logratio = log_pi.gather(-1, mb_actions.unsqueeze(-1)).squeeze(-1) - mb_logprobs  # (M,)
    ratio = logratio.exp()

    if args.norm_adv:
        mb_advantages = (mb_advantages - mb_advantages.mean()) / (mb_advantages.std() + 1e-8)
    clipped_ratio = ratio.clamp(1 - args.clip_coef, 1 + args.clip_coef)
    policy_loss = -torch.min(ratio * mb_advantages, clipped_ratio * mb_advantages).mean()

    value_loss = (new_values - mb_returns) ** 2
    if args.clip_vloss:  # the larger error: no gradient once a value has moved clip_coef toward its return
        clipped_values = mb_values + (new_values - mb_values).clamp(-args.clip_coef, args.clip_coef)
        value_loss = torch.max(value_loss, (clipped_values - mb_returns) ** 2)
    value_loss = 0.5 * value_loss.mean()

    entropy = -(log_pi.exp() * log_pi).sum(-1).mean()
    loss = policy_loss - args.ent_coef * entropy + args.vf_coef * value_loss
    metrics = {
        "value_loss": value_loss,
        "policy_loss": policy_loss,
        "entropy": entropy,
        "old_approx_kl": -logratio.mean(),
        "approx_kl": (ratio - 1 - logratio).mean(),  # never negative, less noisy (joschu.net/blog/kl-approx.html)
        "clipfrac": ((ratio - 1).abs() > args.clip_coef).float().mean(),
    }
    return loss, {name: metric.detach() for name, metric in metrics.items()}


def ppo_update(agent, optimizer, batch, args, mean=torch.mean):
    """Epochs of minibatch steps on `batch`, which Rollout.flatten made. Returns each metric's mean over all steps.

    mean: takes that of an epoch's KL divergences; where several processes learn together, they must agree on it.
    """
    batch_size, device = len(batch[0]), batch[0].device
    steps = []  # metrics of each gradient step, left on the device: reading them here would wait for it every time
    for _ in range(args.update_epochs):
        for mb_inds in torch.randperm(batch_size, device=device).split(batch_size // args.num_minibatches):
            minibatch = [x.index_select(0, mb_inds) for x in batch]  # x[mb_inds] takes 10 times as long for frames
            loss, metrics = ppo_loss(agent, minibatch, args)
            optimizer.zero_grad()
            loss.backward()
            metrics["grad_norm"] = nn.utils.clip_grad_norm_(agent.parameters(), args.max_grad_norm)  # before clipping
            optimizer.step()
            steps.append(metrics)
        if args.target_kl is not None:
            epoch = steps[-args.num_minibatches :]
            if mean(torch.stack([metrics["approx_kl"] for metrics in epoch])) > args.target_kl:
                break
    means = torch.stack([torch.stack(list(metrics.values())) for metrics in steps]).mean(0)
    return dict(zip(steps[0], means.tolist(), strict=True))


def not_finite(metrics, agent):
    """Which losses, gradients or weights are NaN or infinite, in words: such a network must not be saved."""
    spoilt = [f"{name} is {value}" for name, value in metrics.items() if not math.isfinite(value)]
    weights = agent.named_parameters()
    return spoilt + [f"{name} is not finite" for name, weight in weights if not weight.isfinite().all()]


# ---- Checkpoint ----


def save_checkpoint(run_dir, args, global_step, agent, optimizer, **more):
    """Write all that --resume and evaluate.py need to {run_dir}/checkpoints/{global_step}.pt; whole, or not at all.

    Returns whether it was written. A full disk is no reason to stop: the next checkpoint may fit again.
    """
    checkpoint = {
        "format": FORMAT,
        "script": Path(__file__).stem,
        "args": dataclasses.asdict(args),
        "global_step": global_step,
        "model": agent.state_dict(),
        "optimizer": optimizer.state_dict(),
        **more,  # what else an algorithm must carry
        "rng": {
            "torch": torch.get_rng_state(),
            "cuda": torch.cuda.get_rng_state() if torch.cuda.is_initialized() else None,
        },
        "versions": {"torch": str(torch.__version__), "gymnasium": gym.__version__, "numpy": np.__version__},
    }
    path = run_dir / "checkpoints" / f"{global_step:012d}.pt"
    unfinished = path.with_suffix(".tmp")
    try:
        with open(unfinished, "wb") as file:
            torch.save(checkpoint, file)
            file.flush()
            os.fsync(file.fileno())  # else the new name could reach the disk before what it names
        unfinished.replace(path)
    except (OSError, RuntimeError) as error:  # PyTorch makes a RuntimeError of some
        print(f"{path} could not be written and is left out: {error}", file=sys.stderr, flush=True)
        with contextlib.suppress(OSError):  # in a folder that is read-only by now, nothing can be removed
            unfinished.unlink()
        return False
    return True


def list_checkpoints(run_dir):
    """The checkpoints of a run folder, oldest first. Files that are not named by a step are not its own."""
    return sorted(path for path in run_dir.glob("checkpoints/*.pt") if path.stem.isdigit())


def find_checkpoint(path):
    """The checkpoint that `path` names: a .pt itself, or the newest one of a run folder."""
    path = Path(path)
    if path.is_dir():
        found = list_checkpoints(path)
        if not found:
            fail(f"{path} holds no checkpoint (checkpoints/*.pt): name the folder of one run, or a .pt.")
        path = found[-1]
    if not path.is_file():
        fail(f"{path} does not exist.")
    return path


def load_checkpoint(path):
    """Read a checkpoint onto the CPU. Runs nothing that is in the file, whoever wrote it, and refuses damaged ones."""
    try:
        with zipfile.ZipFile(path) as file:
            # PyTorch alone takes a flipped bit for a weight, and skips a weight that a flipped bit calls a directory.
            directories = (info.filename for info in file.infolist() if info.external_attr & 0x10)
            damaged = file.testzip() or next(directories, None)
        checkpoint = None if damaged else torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # which one depends on the byte that is wrong
        fail(f"{path} is damaged, or no checkpoint of these scripts ({type(error).__name__}).")
    if damaged:
        fail(f"{path} is damaged: {damaged!r} in it is not what was written.")
    types = {"format": int, "script": str, "args": dict, "global_step": int, "model": dict}
    if not isinstance(checkpoint, dict) or not all(isinstance(checkpoint.get(k), t) for k, t in types.items()):
        fail(f"{path} is no checkpoint of these scripts.")
    if checkpoint["format"] != FORMAT:
        fail(f"{path} has format {checkpoint['format']}; this program reads format {FORMAT}.")
    return checkpoint


def restore(checkpoint, optimizer, **modules):
    """Put networks, optimizer and random numbers back to where they were saved. Environments start from new seeds."""
    if "optimizer" not in checkpoint:
        fail("this file holds a policy alone: evaluate.py plays it, --resume needs a checkpoint of a training run.")
    try:
        for name, module in modules.items():
            module.load_state_dict(checkpoint[name])
        optimizer.load_state_dict(checkpoint["optimizer"])
        torch.set_rng_state(checkpoint["rng"]["torch"])
        if torch.cuda.is_initialized() and checkpoint["rng"]["cuda"] is not None:
            torch.cuda.set_rng_state(checkpoint["rng"]["cuda"])
    except Exception as error:  # the file is whole, so it is the script or its flags that changed
        reason = " ".join(str(error).split())[:160]
        fail(f"the checkpoint does not fit this script or its flags ({reason}); script.py in its run folder did.")


def read_args():
    """Args from the command line. Beside --resume, what the command line leaves out is as the checkpoint has it."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)  # of one flag, which sets the others' defaults
    parser.add_argument("--resume", nargs="?")
    default = None
    if (resume := parser.parse_known_args()[0].resume) is not None:
        path = find_checkpoint(resume).resolve()
        checkpoint = load_checkpoint(path)
        run_dir = os.path.relpath(path.parents[1]) if path.parent.name == "checkpoints" else None
        try:
            default = Args(**checkpoint["args"] | {"resume": str(path), "run_dir": run_dir})
        except TypeError:
            fail(f"{path} was written by {checkpoint['script']}.py, whose arguments are not those of this script.")
    args = tyro.cli(Args, description=__doc__, default=default)
    if default and args.env_id != default.env_id:
        fail(f"--env-id {args.env_id} cannot go on from a checkpoint of {default.env_id}.", code=2)
    if args.track and importlib.util.find_spec("wandb") is None:
        fail("--track needs Weights & Biases: pip install wandb.", code=2)
    args.resume = default.resume if default else None
    return args


# ---- Training ----


def open_run(args):
    """Make the run folder, lock it, and record in it what runs: args.json, script.py. Returns its Path and the lock."""
    name = f"{args.env_id}__{args.exp_name}__{args.seed}__{int(time.time())}".replace("/", "-").replace(":", "-")
    run_dir = Path(args.run_dir or f"runs/{name}")
    try:
        number = 1
        while args.run_dir is None:  # until the name is free: a sweep may start several runs in one second
            try:
                run_dir.mkdir(parents=True)
                break
            except FileExistsError:
                number += 1
                run_dir = Path(f"runs/{name}_{number}")
        held = list_checkpoints(run_dir)
        if held and (args.resume is None or held[-1].resolve() != Path(args.resume)):
            fail(f"{run_dir} already holds {held[-1].name}: go on with --resume {run_dir}, or name another --run-dir.")
        (run_dir / "checkpoints").mkdir(parents=True, exist_ok=True)
        lock = lock_folder(run_dir)
        for unfinished in run_dir.glob("checkpoints/*.tmp"):
            unfinished.unlink()  # of a run that was killed while it saved
        (run_dir / "args.json").write_text(json.dumps(dataclasses.asdict(args), indent=2))
        (run_dir / "script.py").write_bytes(Path(__file__).read_bytes())
    except OSError as error:
        fail(f"--run-dir {run_dir} cannot be written: {error.strerror}.")
    return run_dir, lock


def lock_folder(run_dir):
    """Refuse a folder that another process writes. The lock is the open file that is returned: it dies with us."""
    try:
        import fcntl
    except ImportError:
        return None  # not on Windows
    lock = open(run_dir / ".lock", "w")
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        fail(f"{run_dir} is being written by another process: name another --run-dir.")
    return lock


def note_signals():
    """A list to which Ctrl-C and SIGTERM append their number; the same one a second time ends the program at once."""
    received = []

    def note(number, frame):
        received.append(number)
        signal.signal(number, signal.SIG_DFL)

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, note)
    return received


class Curves(SummaryWriter):
    """TensorBoard's writer. Where it cannot write, as on a full disk, points are left out and training goes on."""

    failed = False

    def attempt(self, write, *args):
        if not self.failed:
            try:
                write(*args)
            except Exception as error:  # an OSError or, where TensorFlow is installed, one of its own
                print(f"{self.log_dir}: curves cannot be written for now: {error}", file=sys.stderr, flush=True)
                self.failed = True

    def add_scalar(self, tag, value, step):
        self.attempt(super().add_scalar, tag, value, step)

    def flush(self):
        """Done before each checkpoint. A failed writer does not recover: the next point opens a new file."""
        self.attempt(super().flush)
        if self.failed:
            self.failed, self.file_writer, self.all_writers = False, None, None

    def close(self):
        self.attempt(super().close)


def open_writer(args, run_dir, global_step):
    """TensorBoard's writer for the run folder. With --track, Weights & Biases receives what is written to it."""
    if args.track:
        import wandb

        run_id = run_dir / "wandb_id"  # with which a resumed run goes on in the same curves
        wandb.init(
            project=args.wandb_project_name,
            entity=args.wandb_entity,
            config=dataclasses.asdict(args),
            name=run_dir.name,
            sync_tensorboard=True,
            id=run_id.read_text() if args.resume and run_id.exists() else None,
            resume="allow",
        )
        run_id.write_text(wandb.run.id)
    threading.excepthook = thread_failed
    rows = "\n".join(f"|{name}|{value}|" for name, value in dataclasses.asdict(args).items())
    try:
        writer = Curves(run_dir, purge_step=global_step + 1)  # hides what a run wrote after its last checkpoint
        writer.add_text("hyperparameters", f"|argument|value|\n|-|-|\n{rows}", global_step)
    except OSError as error:
        fail(f"--run-dir {run_dir} cannot be written: {error.strerror}.")
    return writer


def thread_failed(failure):
    """TensorBoard writes in a thread. What stops it reaches Curves too, and is a sentence there, not a traceback."""
    if not type(failure.thread).__module__.startswith("tensorboard"):
        threading.__excepthook__(failure)


class Lines:
    """A stream for tqdm where there is no terminal: each state of the bar becomes a line of its own."""

    def write(self, text):
        if text.strip():
            print(text.strip(), file=sys.stderr, flush=True)

    def flush(self):
        pass


def progress_bar(total, initial):
    """A bar of steps with rate and time left; in a log file, a line of the same every ten seconds."""
    terminal = sys.stderr.isatty()
    return tqdm(
        total=total,
        initial=initial,
        unit=" steps",
        unit_scale=True,
        bar_format="{percentage:3.0f}%: {n_fmt} of {total_fmt} steps, {rate_fmt}, {remaining} left{postfix}",
        file=sys.stderr if terminal else Lines(),
        mininterval=0.5 if terminal else 10,
        miniters=1,
    )


def train(args, signals=()):
    """Train as `args` say, until the end or until there is something in `signals`. Returns the run folder."""
    device = torch.device("cuda" if args.cuda and torch.cuda.is_available() else "cpu")
    torch.backends.cudnn.deterministic = args.torch_deterministic
    torch.set_num_threads(1)  # layers this small gain little from a second, which another run can use
    torch.manual_seed(args.seed)

    checkpoint = load_checkpoint(args.resume) if args.resume else None
    global_step = checkpoint["global_step"] if checkpoint else 0
    if global_step >= args.total_timesteps:
        print(f"{args.resume} is finished at {global_step:,} steps; a larger --total-timesteps goes on from it.")
        return Path(args.resume).parents[1]
    earlier_starts = len(list(Path(args.run_dir).glob("events.*"))) if checkpoint and args.run_dir else 0
    env_seed = spread_seed(1, args.seed, global_step, earlier_starts)  # earlier starts from this checkpoint had others
    envs = make_envs(args, args.num_envs, env_seed, training=True)
    agent = Agent(envs, args).to(device)
    optimizer = torch.optim.Adam(agent.parameters(), lr=args.learning_rate, eps=1e-5, fused=True)
    try:
        rollout = Rollout(args.num_steps, envs, device)
    except RuntimeError:  # what PyTorch raises where memory does not suffice
        fail(f"--num-envs {args.num_envs} * --num-steps {args.num_steps} steps do not fit in memory: lower either.", 2)
    if checkpoint:
        restore(checkpoint, optimizer, model=agent)

    run_dir, _lock = open_run(args)
    writer = open_writer(args, run_dir, global_step)
    on_cpu = "the CPU (no GPU found)" if args.cuda else "the CPU"
    where = torch.cuda.get_device_name() if device.type == "cuda" else on_cpu
    plan = f"steps {global_step:,} to {args.total_timesteps:,}, learning rate {annealed_lr(args, global_step):.3g}"
    if checkpoint:
        plan += f" (last {optimizer.param_groups[0]['lr']:.3g})"
    print(f"{args.exp_name}: {args.env_id} x {args.num_envs} on {where}, {plan}, in {run_dir}", flush=True)
    bar = progress_bar(args.total_timesteps, global_step)
    save_freq = args.save_freq or max(1, args.total_timesteps // 10)
    next_save = (global_step // save_freq + 1) * save_freq
    start_time, start_step = time.monotonic(), global_step

    obs, _ = envs.reset()
    next_obs = torch.as_tensor(obs, dtype=rollout.obs.dtype, device=device)  # (N, size)
    episode_return, episode_length = np.zeros(args.num_envs), np.zeros(args.num_envs, dtype=np.int64)
    recent_returns = deque(maxlen=100)
    broken = []

    while global_step < args.total_timesteps:
        optimizer.param_groups[0]["lr"] = annealed_lr(args, global_step)

        # Collect
        with torch.no_grad():
            for t in range(args.num_steps):
                if not np.isfinite(obs).all():
                    broken = ["an observation of the environment is not finite"]
                if signals or broken:
                    break
                logits, values = agent(next_obs)
                actions, logprobs = sample(logits)
                rollout.obs[t], rollout.actions[t], rollout.logprobs[t] = next_obs, actions, logprobs
                rollout.values[t] = values

                obs, rewards, terminated, truncated, infos = envs.step(actions.cpu().numpy())
                next_obs = torch.as_tensor(obs, dtype=rollout.obs.dtype, device=device)
                rollout.rewards[t] = torch.as_tensor(rewards)
                rollout.terminated[t] = torch.as_tensor(terminated)
                rollout.truncated[t] = torch.as_tensor(truncated)
                if truncated.any():
                    final_obs = np.stack(infos["final_obs"][truncated])  # `obs` is already the next episode's
                    final_obs = torch.as_tensor(final_obs, dtype=rollout.obs.dtype, device=device)
                    rollout.final_values[t, torch.as_tensor(truncated)] = agent(final_obs)[1]

                episode_return += rewards
                episode_length += 1
                for i in np.flatnonzero(terminated | truncated):
                    # Each environment's step has a number of its own, so that episodes ending together all show.
                    step = global_step + t * args.num_envs + int(i) + 1
                    writer.add_scalar("charts/episodic_return", episode_return[i], step)
                    writer.add_scalar("charts/episodic_length", episode_length[i], step)
                    recent_returns.append(episode_return[i])
                    episode_return[i] = episode_length[i] = 0
            if signals or broken:
                break  # this rollout is dropped
            global_step += args.num_steps * args.num_envs

            # Estimate
            next_values = torch.cat([rollout.values[1:], agent(next_obs)[1].unsqueeze(0)])  # (T, N)
            next_values = torch.where(rollout.truncated, rollout.final_values, next_values)
            ended = rollout.terminated | rollout.truncated
            advantages, returns = compute_gae(
                rollout.rewards, rollout.values, next_values, rollout.terminated, ended, args.gamma, args.gae_lambda
            )

        # Learn
        batch = rollout.flatten(advantages, returns)
        metrics = ppo_update(agent, optimizer, batch, args)
        if broken := not_finite(metrics, agent):
            break
        agent.observe(batch[0])  # after the update: old and new policy must see the same inputs

        # Log
        metrics["explained_variance"] = (1 - (returns - rollout.values).var() / returns.var()).item()
        for name, value in metrics.items():
            writer.add_scalar(f"losses/{name}", value, global_step)
        writer.add_scalar("charts/learning_rate", optimizer.param_groups[0]["lr"], global_step)
        writer.add_scalar("charts/SPS", (global_step - start_step) / (time.monotonic() - start_time), global_step)
        if recent_returns:
            bar.set_postfix_str(f"return {np.mean(recent_returns):.1f} (last {len(recent_returns)})", refresh=False)
        bar.update(min(global_step, args.total_timesteps) - bar.n)

        # Save
        if global_step >= min(next_save, args.total_timesteps):
            writer.flush()
            saved = save_checkpoint(run_dir, args, global_step, agent, optimizer)
            next_save = (global_step // save_freq + 1) * save_freq

    bar.close()
    envs.close()
    writer.close()
    if broken:
        newest = (list_checkpoints(run_dir) or ["none"])[-1]
        advice = "Try a smaller --learning-rate, if observations and rewards are finite."
        fail(f"{broken[0]} after {global_step:,} steps; last good checkpoint: {newest}. {advice}")
    if stopped := global_step < args.total_timesteps:
        saved = save_checkpoint(run_dir, args, global_step, agent, optimizer)
    if not saved:
        fail(f"the last checkpoint of {run_dir} could not be written; --resume goes on from the newest that was.")
    if stopped:
        print(f"Stopped after {global_step:,} steps. Go on: python {Path(__file__).name} --resume {run_dir}")
        sys.exit(128 + signals[0])
    print(f"Done. Score it: python evaluate.py {run_dir}")
    return run_dir


if __name__ == "__main__":
    train(read_args(), note_signals())
