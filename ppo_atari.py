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
"""PPO on Atari: proximal policy optimization (Schulman et al. 2017, arXiv:1707.06347).

    python ppo_atari.py --env-id BreakoutNoFrameskip-v4 --cuda
    python evaluate.py runs/<run>

Measured, 100 games each, with --bf16 on CPUs: Breakout 390 after 9 million steps, one seed; Pong 19.6 ± 1.4 after 2
million steps and an hour, three seeds, with the flags in README.md's results.

For every *NoFrameskip and ALE/*-v5 game of ale-py. A step is one decision of the agent: 4 frames of the game.
`torchrun --nproc-per-node=K ppo_atari.py` shares the games among K processes: gradients are averaged over them,
advantages normalized within each one's part of a minibatch.

Hyperparameters are those of openai/baselines, where the published scores come from; the paper has 3 epochs, a clip
range that falls to 0 and a larger weight of the value loss. Also from baselines, and not in the paper: orthogonal
initialization, Adam's epsilon of 1e-5, advantages normalized in each minibatch, a clipped value loss, gradients
clipped to a global norm.

Departs from baselines: (1) FIRE is pressed for the agent at the start of a game, but not after a lost life; (2) frame
stacks start with zeros, not with copies of the first frame, and go on through a lost life; (3) a game starts with FIRE
and 0 to 29 idle frames, not with 1 to 30; (4) the maximum of two frames is taken in gray, not in color; (5) a game cut
off after 108,000 frames is not taken for a lost one, its last frame has a value. (1) to (4) are how ale-py's native
environment works.
"""

import argparse
import contextlib
import dataclasses
import difflib
import importlib.util
import itertools
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

import ale_py
import gymnasium as gym
import numpy as np
import torch
import tyro
from ale_py.vector_env import AtariVectorEnv
from gymnasium.vector import AutoresetMode, VectorWrapper
from torch import nn
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

gym.register_envs(ale_py)
FORMAT = 1  # of a checkpoint; a file with another number is refused


def fail(message, code=1):
    """End the program with one sentence instead of a traceback. Exit code 2: wrong usage; 1: anything else."""
    print(f"{Path(sys.argv[0]).name}: {message}", file=sys.stderr)
    sys.exit(code)


# ---- Arguments ----


@dataclass
class Args:
    env_id: str = "BreakoutNoFrameskip-v4"  # a *NoFrameskip id, or ALE/*-v5 (the game repeats an action by chance)
    total_timesteps: int = 10_000_000  # steps (of 4 frames), all games together; the last rollout is played to its end
    exp_name: str = Path(__file__).stem  # name of the experiment, part of the run folder's name
    seed: int = 1  # of everything random; on the CPU, the same seed gives the same run, bit for bit
    run_dir: str | None = None  # folder of this run; None: runs/{env_id}__{exp_name}__{seed}__{unix time}
    save_freq: int = 500_000  # steps between checkpoints of about 20 MB
    resume: str | None = None  # run folder or checkpoint to go on from; flags given beside it replace the saved ones
    cuda: bool = True  # train on the GPU; without one, on the CPU
    torch_deterministic: bool = True  # only deterministic cuDNN kernels; off may be faster
    bf16: bool = False  # compute the CNN in bfloat16, to 2 or 3 digits: faster on some processors, slower on others
    track: bool = False  # also log to Weights & Biases (pip install wandb)
    wandb_project_name: str = "single-file-rl"  # W&B project
    wandb_entity: str | None = None  # W&B team; None: your own account

    num_envs: int = 8  # games played side by side; more give less correlated batches
    num_steps: int = 128  # steps per game between updates (T); longer sees further, learns later
    learning_rate: float = 2.5e-4  # Adam's step size; larger learns faster until it diverges
    anneal_lr: bool = True  # lower the learning rate linearly, to 0 at the end
    gamma: float = 0.99  # discount per step; nearer to 1 looks further ahead
    gae_lambda: float = 0.95  # 0: advantages trust the value function (biased), 1: the rewards of the rollout (noisy)
    num_minibatches: int = 4  # parts a rollout is cut into; more parts, more and noisier gradient steps
    update_epochs: int = 4  # passes over a rollout; more take more from each step, and overfit it sooner
    norm_adv: bool = True  # normalize advantages to mean 0 and std 1 in each minibatch
    clip_coef: float = 0.1  # how far one update may move a probability ratio from 1
    clip_vloss: bool = True  # also clip how far one update may move a value, by clip_coef
    ent_coef: float = 0.01  # weight of the entropy bonus; larger explores longer
    vf_coef: float = 0.5  # weight of the value loss
    max_grad_norm: float = 0.5  # longest gradient (global L2 norm) that is applied as it is
    target_kl: float | None = None  # end an update after an epoch whose mean KL divergence exceeds this; None: never

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


class AtariGames(VectorWrapper):
    """N games in lockstep: all that happens to frames, lives and rewards between the console and the agent.

    obs: (N, 4, 84, 84) uint8. A game that ends restarts on the same step: obs is then the first of the new game, the
    last of the old one is in infos["final_obs"]. rewards: (N,), in training clipped to -1, 0, 1.
    infos["raw_rewards"]: (N,) points of the game. infos["life_lost"]: (N,) bool, the game goes on with one life fewer.
    """

    def __init__(self, game, num_envs, repeat_action_probability, training, render):
        protocol = dict(
            num_envs=num_envs,
            batch_size=0,  # a step waits for all games
            num_threads=0,  # one emulator thread for each core
            frameskip=4,  # an action is held for 4 frames: 15 decisions per second of play
            maxpool=True,  # a picture is the maximum of the last 2 frames: some sprites are drawn on every other one
            noop_max=30,  # a game begins with 0 to 29 idle frames, drawn by the seed: else all would be the same
            use_fire_reset=True,  # and with FIRE where nothing moves before it; after a lost life, the agent presses it
            max_num_frames_per_episode=108_000,  # half an hour of play, then the game is truncated
            repeat_action_probability=repeat_action_probability,  # chance per frame that the last action stays on
            continuous=False,  # actions are the buttons of the joystick
            full_action_space=False,  # the actions that do something in this game: 4 in Breakout, 6 in Pong, at most 18
            episodic_life=False,  # would restart the whole game at a lost life: later lives would never be seen
            life_loss_info=False,  # would call a lost life terminated; step() below keeps the two apart
            reward_clipping=False,  # would hide the score; step() below clips what is learned from
            autoreset_mode=AutoresetMode.SAME_STEP,  # every step is a real one, none is spent on a reset
        )
        seen = dict(
            grayscale=True,  # brightness alone: a third of the bytes
            img_height=84,  # 210 pixels on the console
            img_width=84,  # 160 pixels on the console
            stack_num=4,  # the last 4 pictures, so that one observation shows what moves where
        )
        super().__init__(AtariVectorEnv(game, **seen, **protocol))
        self.metadata = self.metadata | {"render_fps": 15}  # the console draws 60 pictures a second
        self.training = training
        self.camera = None
        if render:  # the same games once more, as they look: same seed and actions, so the same frames
            shown = dict(grayscale=False, img_height=210, img_width=160, stack_num=1)
            self.camera = AtariVectorEnv(game, **shown, **protocol)

    def reset(self, *, seed=None, options=None):
        obs, infos = self.env.reset(seed=seed, options=options)
        self.lives = infos["lives"]
        if self.camera:
            self.picture = self.camera.reset(seed=seed, options=options)[0]
        return obs, infos

    def step(self, actions):
        obs, rewards, terminated, truncated, infos = self.env.step(actions)
        infos["life_lost"] = (infos["lives"] < self.lives) & ~(terminated | truncated)  # those have a new game's lives
        self.lives = infos["lives"]
        infos["raw_rewards"] = rewards
        if self.training:
            rewards = np.sign(rewards)  # one scale for all games: the same learning rate serves 1 point and 1,000
        if self.camera:
            self.picture = self.camera.step(actions)[0]
        return obs, rewards, terminated, truncated, infos

    def render(self):
        """One picture per game, (210, 160, 3) uint8 RGB."""
        return tuple(self.picture[:, 0])


def make_envs(args, num_envs, seed, training, render=False):
    """`num_envs` seeded games of --env-id. `training=False`: rewards are the game's own points."""
    spec = gym.registry.get(args.env_id)
    playable = [name for name in gym.registry if "NoFrameskip" in name or name.startswith("ALE/")]
    if spec is None:
        close = ", ".join(difflib.get_close_matches(args.env_id, playable))
        fail(f"--env-id {args.env_id} is not registered.{f' Close: {close}.' if close else ''}", code=2)
    if "game" not in spec.kwargs:
        fail(f"--env-id {args.env_id} is no Atari game; for vector observations use ppo_cartpole.py.", code=2)
    if args.env_id not in playable:
        other = f"{spec.name}NoFrameskip-v4"
        fail(f"--env-id {args.env_id} skips a random number of frames, which is not supported: take {other}.", code=2)
    envs = AtariGames(spec.kwargs["game"], num_envs, spec.kwargs["repeat_action_probability"], training, render)
    envs.reset(seed=seed)  # the caller's own reset() goes on from this seed
    return envs


# ---- Network ----


def layer_init(layer, std=2**0.5):
    """Orthogonal weights scaled by `std`, zero bias (Saxe et al. 2014): signals keep their size from layer to layer."""
    nn.init.orthogonal_(layer.weight, std)
    nn.init.zeros_(layer.bias)
    return layer


class Agent(nn.Module):
    """The Nature CNN (Mnih et al. 2015, Methods), shared by the policy's head and the value's."""

    def __init__(self, envs, args):
        super().__init__()
        self.bf16 = args.bf16
        self.network = nn.Sequential(  # (N, 4, 84, 84)
            layer_init(nn.Conv2d(4, 32, kernel_size=8, stride=4)),  # (N, 32, 20, 20)
            nn.ReLU(),
            layer_init(nn.Conv2d(32, 64, kernel_size=4, stride=2)),  # (N, 64, 9, 9)
            nn.ReLU(),
            layer_init(nn.Conv2d(64, 64, kernel_size=3, stride=1)),  # (N, 64, 7, 7)
            nn.ReLU(),
            nn.Flatten(),
            layer_init(nn.Linear(64 * 7 * 7, 512)),
            nn.ReLU(),
        )
        self.actor = layer_init(nn.Linear(512, envs.single_action_space.n), std=0.01)  # all actions equally likely
        self.critic = layer_init(nn.Linear(512, 1), std=1.0)
        # Gradient steps on a CPU are 1.5 times as fast for it. After layer_init, which needs the usual format.
        self.network.to(memory_format=torch.channels_last)

    def forward(self, obs):
        """obs (N, 4, 84, 84) uint8 -> logits (N, A), values (N,)"""
        x = obs.contiguous(memory_format=torch.channels_last).float()  # a copy, as obs is bytes
        with torch.autocast(obs.device.type, torch.bfloat16, enabled=self.bf16):  # weights and gradients stay float32
            x = self.network(x.div_(255))  # (N, 512)
        x = x.float()  # probability ratios and values need the digits
        return self.actor(x), self.critic(x).squeeze(-1)

    def act(self, obs, greedy):
        """obs (N, 4, 84, 84) uint8 -> actions (N,) int64: the likeliest ones, or sampled as in training."""
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


def gather(item):
    """A list of what each rank has for `item`. A process that torchrun did not start is the only one."""
    if not torch.distributed.is_initialized():
        return [item]
    items = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(items, item)
    return items


def train(args, signals=()):
    """Train as `args` say, until the end or until there is something in `signals`. Returns the run folder.

    torchrun starts several processes, or ranks. Each plays its share of the games and learns from it; what ends an
    epoch or the run, they decide together, for none can take a gradient step alone. Rank 0 logs and saves.
    """
    rank, num_ranks = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    num_envs = args.num_envs // num_ranks  # games of this rank
    if args.cuda and 0 < torch.cuda.device_count() <= int(os.environ.get("LOCAL_RANK", 0)):
        fail("torchrun started more processes than there are GPUs here: lower --nproc-per-node, or --no-cuda.", 2)
    rows, rest = divmod(num_envs * args.num_steps, args.num_minibatches)  # of a minibatch of this rank
    if args.num_envs % num_ranks or rest or (args.norm_adv and rows < 2):
        share = f"an equal part of them, whose steps --num-minibatches {args.num_minibatches} divides"
        share += " into minibatches of 2 or more" if args.norm_adv else ""
        fail(f"--num-envs {args.num_envs} must give each of the {num_ranks} processes {share}.", code=2)
    device = torch.device("cuda" if args.cuda and torch.cuda.is_available() else "cpu")
    if num_ranks > 1:
        importlib.import_module("torch._dynamo")  # Adam imports it, too; later, it would never let go of the group
        torch.distributed.init_process_group()  # NCCL between GPUs, gloo between CPUs
        # A Ctrl-C reaches us directly and through torchrun: the second must not end the program at once.
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, lambda number, frame: signals.append(number))
        if device.type == "cuda":
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))  # the GPU of this rank
    torch.backends.cudnn.deterministic = args.torch_deterministic
    torch.manual_seed(args.seed)

    checkpoint = load_checkpoint(args.resume) if args.resume else None
    global_step = checkpoint["global_step"] if checkpoint else 0
    if global_step >= args.total_timesteps:
        print(f"{args.resume} is finished at {global_step:,} steps; a larger --total-timesteps goes on from it.")
        return Path(args.resume).parents[1]
    earlier_starts = len(list(Path(args.run_dir).glob("events.*"))) if checkpoint and args.run_dir else 0
    earlier_starts = min(gather(earlier_starts))  # before any rank adds one
    env_seed = spread_seed(1, args.seed, global_step, earlier_starts)  # earlier starts from this checkpoint had others
    envs = make_envs(args, num_envs, env_seed + rank * num_envs, training=True)
    agent = Agent(envs, args).to(device)
    optimizer = torch.optim.Adam(agent.parameters(), lr=args.learning_rate, eps=1e-5, fused=True)
    try:
        rollout = Rollout(args.num_steps, envs, device)
    except RuntimeError:  # what PyTorch raises where memory does not suffice
        fail(f"--num-envs {args.num_envs} * --num-steps {args.num_steps} steps do not fit in memory: lower either.", 2)
    if checkpoint:
        restore(checkpoint, optimizer, model=agent)
    learner = agent  # the same network, as ppo_update sees it
    if num_ranks > 1:
        learner = nn.parallel.DistributedDataParallel(agent)  # averages gradients over the ranks in backward()
        # Ranks draw actions of their own.
        torch.manual_seed(spread_seed(3, args.seed, global_step, earlier_starts, rank))

    if rank == 0:
        run_dir, _lock = open_run(args)
        writer = open_writer(args, run_dir, global_step)
        on_cpu = "the CPU (no GPU found)" if args.cuda else "the CPU"
        where = torch.cuda.get_device_name() if device.type == "cuda" else on_cpu
        where += f" ({num_ranks} processes)" if num_ranks > 1 else ""
        plan = f"steps {global_step:,} to {args.total_timesteps:,}, learning rate {annealed_lr(args, global_step):.3g}"
        if checkpoint:
            plan += f" (last {optimizer.param_groups[0]['lr']:.3g})"
        print(f"{args.exp_name}: {args.env_id} x {args.num_envs} on {where}, {plan}, in {run_dir}", flush=True)
        bar = progress_bar(args.total_timesteps, global_step)
    next_save = (global_step // args.save_freq + 1) * args.save_freq
    start_time, start_step = time.monotonic(), global_step

    obs, _ = envs.reset()
    next_obs = torch.as_tensor(obs, dtype=rollout.obs.dtype, device=device)  # (N, 4, 84, 84) uint8
    episode_return, episode_length = np.zeros(num_envs), np.zeros(num_envs, dtype=np.int64)
    recent_returns = deque(maxlen=100)
    stop, broken = 0, []

    while global_step < args.total_timesteps:
        optimizer.param_groups[0]["lr"] = annealed_lr(args, global_step)

        # Collect
        episodes = []  # step, return and length of those that ended
        with torch.no_grad():
            for t in range(args.num_steps):
                if signals:
                    break
                logits, values = agent(next_obs)
                actions, logprobs = sample(logits)
                rollout.obs[t], rollout.actions[t], rollout.logprobs[t] = next_obs, actions, logprobs
                rollout.values[t] = values

                obs, rewards, terminated, truncated, infos = envs.step(actions.cpu().numpy())
                next_obs = torch.as_tensor(obs, dtype=rollout.obs.dtype, device=device)
                rollout.rewards[t] = torch.as_tensor(rewards)
                rollout.terminated[t] = torch.as_tensor(terminated | infos["life_lost"])  # though the game may go on
                rollout.truncated[t] = torch.as_tensor(truncated)
                if truncated.any():
                    final_obs = np.stack(infos["final_obs"][truncated])  # `obs` is already the next episode's
                    final_obs = torch.as_tensor(final_obs, dtype=rollout.obs.dtype, device=device)
                    rollout.final_values[t, torch.as_tensor(truncated)] = agent(final_obs)[1]

                episode_return += infos["raw_rewards"]
                episode_length += 1
                for i in np.flatnonzero(terminated | truncated):
                    # Each environment's step has a number of its own, so that episodes ending together all show.
                    step = global_step + t * args.num_envs + rank * num_envs + int(i) + 1
                    episodes.append((step, episode_return[i], episode_length[i]))
                    episode_return[i] = episode_length[i] = 0
            if stop := max(gather(signals[0] if signals else 0)):
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
        of_ranks = gather(ppo_update(learner, optimizer, batch, args, mean=lambda x: np.mean(gather(x.mean().item()))))
        metrics = {name: np.mean([one[name] for one in of_ranks]) for name in of_ranks[0]}
        if broken := not_finite(metrics, agent):
            break

        # Log
        metrics["explained_variance"] = np.mean(gather((1 - (returns - rollout.values).var() / returns.var()).item()))
        episodes = gather(episodes)
        if rank > 0:
            continue  # rank 0 logs and saves
        for step, episodic_return, episodic_length in sorted(itertools.chain(*episodes)):
            writer.add_scalar("charts/episodic_return", episodic_return, step)
            writer.add_scalar("charts/episodic_length", episodic_length, step)
            recent_returns.append(episodic_return)
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
            next_save = (global_step // args.save_freq + 1) * args.save_freq

    envs.close()
    if num_ranks > 1:
        del learner  # the last that holds the process group, whose threads must end before Python does, or may abort
        torch.distributed.destroy_process_group()
    if rank > 0:
        return None
    bar.close()
    writer.close()
    if broken:
        newest = (list_checkpoints(run_dir) or ["none"])[-1]
        fail(f"{broken[0]} after {global_step:,} steps; last good checkpoint: {newest}. Try a smaller --learning-rate.")
    if stop:
        saved = save_checkpoint(run_dir, args, global_step, agent, optimizer)
    if not saved:
        fail(f"the last checkpoint of {run_dir} could not be written; --resume goes on from the newest that was.")
    if stop:
        launcher = f"torchrun --nproc-per-node={os.environ['LOCAL_WORLD_SIZE']}" if num_ranks > 1 else "python"
        print(f"Stopped after {global_step:,} steps. Go on: {launcher} {Path(__file__).name} --resume {run_dir}")
        sys.exit(128 + stop)
    print(f"Done. Score it: python evaluate.py {run_dir}")
    return run_dir


if __name__ == "__main__":
    train(read_args(), note_signals())
