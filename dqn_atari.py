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
"""DQN on Atari: deep Q-learning with a replay buffer and a target network (Mnih et al. 2015, "Nature DQN").

    python dqn_atari.py --env-id BreakoutNoFrameskip-v4 --cuda
    python evaluate.py runs/<run>

Measured: Pong 19.5 (1 seed, 100 games, 1.4 million steps on two CPU cores, with the flags in README.md's results). The
defaults have not been run to their end.

For every *NoFrameskip and ALE/*-v5 game of ale-py. A step is one decision of the agent: 4 frames of the game. The
replay buffer stores each frame once, in a file of the run folder that is mapped into memory: 7.1 GB for a million steps
and 3.5 GB for those between two checkpoints. It is removed when the run is finished.

Hyperparameters are those of CleanRL's published scores. They depart from the paper: 10 million steps, not 50; Adam at
1e-4 instead of RMSProp; the squared error, not clipped; learning from step 80,000 on, not 50,000; a target network that
is copied every 1,000 steps, not every 10,000 gradient steps; exploration that falls to 0.01, not to 0.1 (0.05 where the
paper evaluates).

Departs from CleanRL: (1) orthogonal initialization: PyTorch's own takes many more gradient steps to notice the first
rewards; (2) several games are played side by side; gradient steps, target updates and exploration go by the steps of
all games together, as with one game; (3) a game cut off after 108,000 frames is not taken for a lost one, its last
frame has a value; (4) FIRE is pressed for the agent at the start of a game, but not after a lost life; (5) frame stacks
start with zeros, not with copies of the first frame; (6) the maximum of two frames is taken in gray, not in color. (4)
to (6) are how ale-py's native environment works.
"""

import argparse
import contextlib
import dataclasses
import difflib
import importlib.util
import json
import math
import os
import shutil
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
    total_timesteps: int = 10_000_000  # steps (of 4 frames), all games together
    exp_name: str = Path(__file__).stem  # name of the experiment, part of the run folder's name
    seed: int = 1  # of everything random; on the CPU, the same seed gives the same run, bit for bit
    run_dir: str | None = None  # folder of this run; None: runs/{env_id}__{exp_name}__{seed}__{unix time}
    save_freq: int = 500_000  # steps between checkpoints of 27 MB; larger takes 7 kB more disk per step
    resume: str | None = None  # run folder or checkpoint to go on from; flags given beside it replace the saved ones
    cuda: bool = True  # train on the GPU; without one, on the CPU
    torch_deterministic: bool = True  # only deterministic cuDNN kernels; off may be faster
    track: bool = False  # also log to Weights & Biases (pip install wandb)
    wandb_project_name: str = "single-file-rl"  # W&B project
    wandb_entity: str | None = None  # W&B team; None: your own account

    num_envs: int = 8  # games played side by side; the number of gradient steps stays the same
    buffer_size: int = 1_000_000  # steps to learn from, 7 kB each on the disk; larger holds older, more diverse ones
    learning_starts: int = 80_000  # steps before the first gradient step; until then the buffer fills
    train_frequency: int = 4  # steps per gradient step; fewer learn more from each step, and cost more time
    batch_size: int = 32  # transitions per gradient step (M)
    learning_rate: float = 1e-4  # Adam's step size; larger learns faster until it diverges
    gamma: float = 0.99  # discount per step; nearer to 1 looks further ahead
    target_network_frequency: int = 1000  # steps between updates of the target network; more are steadier and slower
    tau: float = 1.0  # how far an update moves the target network toward the network; 1: copies it
    start_e: float = 1.0  # chance of a random action (epsilon) at the start
    end_e: float = 0.01  # chance of a random action after --exploration-fraction of the run, and in evaluate.py
    exploration_fraction: float = 0.1  # part of the run over which epsilon falls linearly

    def __post_init__(self):
        """Refuse what cannot work, naming the flag, what it got and what it takes."""
        for name in "total_timesteps save_freq num_envs train_frequency batch_size target_network_frequency".split():
            if getattr(self, name) < 1:
                fail(f"--{name.replace('_', '-')} must be at least 1, got {getattr(self, name)}.", code=2)
        if not 0 <= self.seed < 2**32:
            fail(f"--seed must be between 0 and {2**32 - 1}, got {self.seed}.", code=2)
        for name in "learning_rate learning_starts".split():
            value = getattr(self, name)
            if not (value >= 0 and math.isfinite(value)):
                fail(f"--{name.replace('_', '-')} must be a number of 0 or more, got {value}.", code=2)
        for name in "gamma tau start_e end_e exploration_fraction".split():
            if not 0 <= getattr(self, name) <= 1:
                fail(f"--{name.replace('_', '-')} must be between 0 and 1, got {getattr(self, name)}.", code=2)
        if self.buffer_size < self.num_envs:
            fail(f"--buffer-size {self.buffer_size} is less than one step of --num-envs = {self.num_envs} games.", 2)
        if self.total_timesteps <= self.learning_starts:
            steps = f"--total-timesteps {self.total_timesteps}"
            fail(f"--learning-starts {self.learning_starts} must be less than {steps}: nothing would be learned.", 2)


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
    """The Nature CNN (Mnih et al. 2015, Methods): one Q-value for each action."""

    def __init__(self, envs, args):
        super().__init__()
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
            layer_init(nn.Linear(512, envs.single_action_space.n), std=0.01),  # all Q-values near 0
        )
        # Gradient steps on a CPU are 1.2 times as fast for it. After layer_init, which needs the usual format.
        self.network.to(memory_format=torch.channels_last)
        self.end_e = args.end_e

    def forward(self, obs):
        """obs (N, 4, 84, 84) uint8 -> Q-values (N, A)"""
        x = obs.contiguous(memory_format=torch.channels_last).float()  # a copy, as obs is bytes
        return self.network(x.div_(255))

    def act(self, obs, greedy):
        """obs (N, 4, 84, 84) uint8 -> actions (N,) int64: the best ones, or exploring as at the end of training."""
        return epsilon_greedy(self(obs), 0.0 if greedy else self.end_e)


def epsilon_greedy(q_values, epsilon):
    """q_values (N, A) -> actions (N,) int64: each the best one or, with a chance of `epsilon`, any."""
    best = q_values.argmax(-1)
    explores = torch.rand(best.shape, device=best.device) < epsilon
    return torch.where(explores, torch.randint_like(best, q_values.shape[-1]), best)


# ---- Storage ----


class ReplayBuffer:
    """The last `capacity` steps of N games, each frame stored once; a stack of 4 is put together when it is sampled.

    A ring of rows, one for each step of all games. A row holds the newest frame of what each agent saw, what it did and
    what came of it; the frame that it saw next is the next row's. Where a game was truncated, the next row is already
    another game's, so its final frame is kept aside.

    The rows lie in a file that is mapped into memory: the operating system keeps of it what it has room for, and writes
    it to the disk in its own time. So they outlive the program. A checkpoint only says which rows it counts on; these
    stay as they are until `spare` more steps have been added.
    """

    def __init__(self, path, obs, capacity, spare, saved=None):
        """path: the file. obs: (N, 4, 84, 84) uint8, the first observations. capacity, spare: steps of all games.

        saved: the state_dict() to go on from, with its file; else the file is made anew.
        """
        N, self.stack, *frame = obs.shape
        self.path, self.max_filled = path, capacity // N
        self.num_rows = self.max_filled + self.stack + spare // N + 1  # also the oldest stack, and one incomplete row
        self.count = self.filled = 0  # rows completed so far, and how many of them can be sampled
        self.final_frames = {}  # row -> {n: final frame of game n, which was truncated in that row's step}
        if saved:
            self.num_rows, self.count = saved["num_rows"], saved["count"]
            for t, n, final_frame in zip(*saved["final_frames"], strict=True):
                self.final_frames.setdefault(t, {})[n] = final_frame.numpy()

        fields = [
            ("frame", np.uint8, frame),
            ("action", np.uint8),
            ("reward", np.float32),
            ("terminated", bool),  # no future after this step
            ("num_earlier", np.uint8),  # frames of the same game that its stack holds besides, up to 3
        ]
        size = self.num_rows * N * np.dtype(fields).itemsize
        self.file_size = size + 16
        try:
            if not saved:
                allocate(path, self.file_size)
            self.file = np.memmap(path, fields, "r+", shape=(self.num_rows, N))
            # Behind the rows: the highest count ever, and the file's identity.
            self.footer = np.memmap(path, np.int64, "r+", offset=size, shape=2)
        except OSError as error:
            what = f"{path} of {self.file_size / 1e9:.1f} GB could not be made or mapped ({error.strerror})"
            fail(f"{what}: lower --buffer-size or --save-freq.")
        self.rows = self.file.view(np.ndarray)  # the same memory; indexing a memmap takes longer
        if saved:  # the run may have gone further than its checkpoint, and overwritten the oldest rows
            intact = self.num_rows - self.stack - int(self.footer[0] - self.count)
            self.filled = max(0, min(saved["filled"], intact))
        else:
            self.footer[1] = int.from_bytes(os.urandom(7))
        self.begin_row(obs, 0)

    def begin_row(self, obs, num_earlier):
        """Write what was seen to the row that waits for its action."""
        row = self.rows[self.count % self.num_rows]  # (N,)
        row["frame"], row["num_earlier"] = obs[:, -1], num_earlier
        self.final_frames.pop(self.count % self.num_rows, None)

    def add(self, actions, rewards, terminated, ended, final_obs, next_obs):
        """Complete a row, and begin the next one with what was seen then. Arrays of N.

        terminated: no future, as after a lost life; ended: a new game begins, and its stack with it.
        final_obs: {n: final observation (4, 84, 84)} of the truncated games; next_obs is already of the new ones.
        """
        t = self.count % self.num_rows
        row = self.rows[t]
        row["action"], row["reward"], row["terminated"] = actions, rewards, terminated
        if final_obs:
            self.final_frames[t] = {int(n): obs[-1].copy() for n, obs in final_obs.items()}
        self.count, self.filled = self.count + 1, min(self.filled + 1, self.max_filled)
        self.footer[0] = max(self.footer[0], self.count)
        self.begin_row(next_obs, np.where(ended, 0, np.minimum(row["num_earlier"] + 1, self.stack - 1)))

    def sample(self, batch_size):
        """Transitions drawn uniformly: frames, actions, rewards, terminated, as tensors.

        frames: (M, 5, 84, 84) uint8, of which the first 4 are what was seen and the last 4 what was seen next; the very
        last one means nothing where terminated. actions: (M,) int64; rewards: (M,) float32; terminated: (M,) bool.
        """
        ages = torch.randint(1, self.filled + 1, (batch_size,)).numpy()  # 1: the newest complete row
        t, n = (self.count - ages) % self.num_rows, torch.randint(self.rows.shape[1], (batch_size,)).numpy()
        offsets = np.arange(1 - self.stack, 2)  # -3, -2, -1, 0, 1
        frames = self.rows["frame"][(t[:, None] + offsets) % self.num_rows, n[:, None]]  # (M, 5, 84, 84)
        frames[-offsets > self.rows["num_earlier"][t, n][:, None]] = 0  # the stack of a new game starts with zeros
        for i, (row, game) in enumerate(zip(t, n, strict=True)):
            if game in self.final_frames.get(row, ()):
                frames[i, -1] = self.final_frames[row][game]
        actions = self.rows["action"][t, n].astype(np.int64)  # as gather() wants them
        batch = (frames, actions, self.rows["reward"][t, n], self.rows["terminated"][t, n])
        return [torch.from_numpy(x) for x in batch]

    def state_dict(self):
        """What a checkpoint needs beside the file. To a resumed run, the games in progress count as truncated here."""
        newest = (self.count - 1) % self.num_rows
        in_progress = dict(enumerate(self.rows["frame"][self.count % self.num_rows]))
        final_frames = self.final_frames | {newest: in_progress | self.final_frames.get(newest, {})}
        t, n, frames = zip(*((t, n, frame) for t in final_frames for n, frame in final_frames[t].items()), strict=True)
        return {
            "count": self.count,
            "filled": self.filled,
            "final_frames": (t, n, torch.from_numpy(np.stack(frames))),
            "num_rows": self.num_rows,
            "max_filled": self.max_filled,
            "num_envs": self.rows.shape[1],
            "file_size": self.file_size,
            "identity": int(self.footer[1]),
        }

    def flush(self):
        """Wait until all rows are on the disk, and return whether they are. The system writes most as they come."""
        try:
            self.file.flush()
            self.footer.flush()
        except OSError as error:
            print(f"{self.path} could not be written: {error}", file=sys.stderr, flush=True)
            return False
        return True


def allocate(path, size):
    """Make a file of `size` bytes that are really there: if the disk fills up later, a hole would end the program."""
    path.unlink(missing_ok=True)
    try:
        with open(path, "wb") as file:
            file.truncate(size)
            if hasattr(os, "posix_fallocate"):  # not on Windows and macOS
                os.posix_fallocate(file.fileno(), 0, size)
    except OSError:
        path.unlink(missing_ok=True)
        raise


def check_disk(args):
    """Refuse a replay buffer that the disk has no room for, before anything is written."""
    needed = (args.buffer_size + min(args.save_freq, args.total_timesteps)) * 84 * 84
    folder = Path(args.run_dir or "runs").absolute()
    free = shutil.disk_usage(next(path for path in (folder, *folder.parents) if os.path.exists(path))).free
    if os.path.exists(folder / "replay.bin"):
        free += os.path.getsize(folder / "replay.bin")  # which is replaced
    if needed > free:
        gb = f"{needed / 1e9:.1f} GB on the disk, of which {free / 1e9:.1f} GB are free"
        fail(f"--buffer-size {args.buffer_size} and --save-freq {args.save_freq} need {gb}: lower them.", code=2)


def kept_replay(checkpoint, args):
    """What a checkpoint says of its replay buffer, if the file is still there; None if a new one must be filled."""
    saved, file = checkpoint.get("replay"), Path(args.run_dir or "") / "replay.bin"
    if args.run_dir is None or not isinstance(saved, dict) or not file.is_file():
        return None
    if np.fromfile(file, np.int64, offset=saved["file_size"] - 8).tolist() != [saved["identity"]]:
        return None  # the file of another buffer
    if (saved["num_envs"], saved["max_filled"]) != (args.num_envs, args.buffer_size // args.num_envs):
        fail(f"--num-envs and --buffer-size must stay as they were, or {file} be removed: a new one is then filled.", 2)
    return saved


# ---- Learning ----


def annealed_epsilon(args, global_step):
    """The chance of a random action after `global_step` steps: linear, reaching end_e after exploration_fraction."""
    fraction_done = min(1, global_step / max(1, args.exploration_fraction * args.total_timesteps))
    return args.start_e + fraction_done * (args.end_e - args.start_e)


@torch.no_grad()
def td_target(target_agent, rewards, next_obs, terminated, gamma):
    """The TD target, (M,): reward and discounted best Q-value of what was seen next (Mnih et al. 2015, Methods).

    A truncated game still has its next_obs: only a terminated one has no future.
    """
    return rewards + gamma * target_agent(next_obs).max(-1).values * ~terminated


def dqn_update(agent, target_agent, optimizer, batch, gamma):
    """One gradient step on `batch`, which ReplayBuffer.sample gave. Returns the loss and the mean Q-value, (2,)."""
    frames, actions, rewards, terminated = batch
    obs, next_obs = frames[:, :-1], frames[:, 1:]  # (M, 4, 84, 84) each
    targets = td_target(target_agent, rewards, next_obs, terminated, gamma)  # (M,)
    q_values = agent(obs).gather(-1, actions.unsqueeze(-1)).squeeze(-1)  # (M,)
    loss = nn.functional.mse_loss(q_values, targets)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    return torch.stack([loss, q_values.mean()]).detach()  # on the device: reading them would wait for it every time


@torch.no_grad()
def update_target(target_agent, agent, tau):
    """Move the target network by the fraction `tau` of the way to the network."""
    for target, parameter in zip(target_agent.parameters(), agent.parameters(), strict=True):
        target.lerp_(parameter, tau)


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
    torch.manual_seed(args.seed)
    # Adam's averages for dead weights fade to numbers so small that a CPU is slow with them: take them for 0.
    torch.set_flush_denormal(True)

    checkpoint = load_checkpoint(args.resume) if args.resume else None
    global_step = checkpoint["global_step"] if checkpoint else 0
    if global_step >= args.total_timesteps:
        print(f"{args.resume} is finished at {global_step:,} steps; a larger --total-timesteps goes on from it.")
        return Path(args.resume).parents[1]
    saved_replay = kept_replay(checkpoint, args) if checkpoint else None
    if not saved_replay:
        check_disk(args)
        if global_step + args.learning_starts >= args.total_timesteps:
            fail("--total-timesteps leaves no step to learn in, once a new replay buffer is filled: train longer.", 2)
    earlier_starts = len(list(Path(args.run_dir).glob("events.*"))) if checkpoint and args.run_dir else 0
    env_seed = spread_seed(1, args.seed, global_step, earlier_starts)  # earlier starts from this checkpoint had others
    envs = make_envs(args, args.num_envs, env_seed, training=True)
    agent, target_agent = Agent(envs, args).to(device), Agent(envs, args).to(device)
    optimizer = torch.optim.Adam(agent.parameters(), lr=args.learning_rate, fused=True)
    target_agent.load_state_dict(agent.state_dict())
    if checkpoint:
        restore(checkpoint, optimizer, model=agent, target_model=target_agent)
        optimizer.param_groups[0]["lr"] = args.learning_rate  # the flag, should it have changed

    run_dir, _lock = open_run(args)
    writer = open_writer(args, run_dir, global_step)
    on_cpu = "the CPU (no GPU found)" if args.cuda else "the CPU"
    where = torch.cuda.get_device_name() if device.type == "cuda" else on_cpu
    obs, _ = envs.reset()  # (N, 4, 84, 84) uint8
    spare = min(args.save_freq, args.total_timesteps)
    buffer = ReplayBuffer(run_dir / "replay.bin", obs, args.buffer_size, spare, saved_replay)
    remembered = buffer.filled * args.num_envs
    missing = min(args.learning_starts, buffer.max_filled * args.num_envs) - remembered  # to fill before learning
    learn_after = max(args.learning_starts, global_step + max(0, missing))
    plan = f"steps {global_step:,} to {args.total_timesteps:,}, learning from {learn_after:,} on"
    plan += f" with learning rate {args.learning_rate:.3g}, epsilon {annealed_epsilon(args, global_step):.3g}"
    if checkpoint:
        plan += f", {remembered:,} steps in the replay buffer"
    print(f"{args.exp_name}: {args.env_id} x {args.num_envs} on {where}, {plan}, in {run_dir}", flush=True)
    bar = progress_bar(args.total_timesteps, global_step)
    next_log, next_save = global_step + 1000, (global_step // args.save_freq + 1) * args.save_freq
    start_time, start_step = time.monotonic(), global_step

    losses = []  # loss and mean Q-value of each gradient step since the last log
    episode_return, episode_length = np.zeros(args.num_envs), np.zeros(args.num_envs, dtype=np.int64)
    recent_returns = deque(maxlen=100)
    finished, broken = False, []

    while not finished:
        # Act
        epsilon = annealed_epsilon(args, global_step)
        with torch.no_grad():
            actions = epsilon_greedy(agent(torch.as_tensor(obs, device=device)), epsilon).cpu().numpy()
        obs, rewards, terminated, truncated, infos = envs.step(actions)
        ended = terminated | truncated
        final_obs = {n: infos["final_obs"][n] for n in np.flatnonzero(truncated)}  # `obs` is already the next game's
        buffer.add(actions, rewards, terminated | infos["life_lost"], ended, final_obs, obs)

        episode_return += infos["raw_rewards"]
        episode_length += 1
        for i in np.flatnonzero(ended):
            # Each environment's step has a number of its own, so that episodes ending together all show.
            step = global_step + int(i) + 1
            writer.add_scalar("charts/episodic_return", episode_return[i], step)
            writer.add_scalar("charts/episodic_length", episode_length[i], step)
            recent_returns.append(episode_return[i])
            episode_return[i] = episode_length[i] = 0

        # Learn, after the same steps as with a single game
        for step in range(global_step + 1, global_step + args.num_envs + 1):
            if step > learn_after and step % args.train_frequency == 0:
                batch = [x.to(device) for x in buffer.sample(args.batch_size)]
                losses.append(dqn_update(agent, target_agent, optimizer, batch, args.gamma))
            if step > learn_after and step % args.target_network_frequency == 0:
                update_target(target_agent, agent, args.tau)
        global_step += args.num_envs

        # Log
        finished = bool(signals) or global_step >= args.total_timesteps
        if finished or global_step >= min(next_log, next_save):
            next_log = global_step + 1000
            if losses:
                td_loss, q_values = torch.stack(losses).mean(0).tolist()
                grad_norm = nn.utils.get_total_norm([p.grad for p in agent.parameters()]).item()  # of the last one
                losses.clear()
                metrics = {"td_loss": td_loss, "q_values": q_values, "grad_norm": grad_norm}
                if broken := not_finite(metrics, agent):
                    break
                for name, value in metrics.items():
                    writer.add_scalar(f"losses/{name}", value, global_step)
            writer.add_scalar("charts/epsilon", epsilon, global_step)
            writer.add_scalar("charts/learning_rate", optimizer.param_groups[0]["lr"], global_step)
            writer.add_scalar("charts/SPS", (global_step - start_step) / (time.monotonic() - start_time), global_step)
            if recent_returns:
                bar.set_postfix_str(f"return {np.mean(recent_returns):.1f} (last {len(recent_returns)})", refresh=False)
        bar.update(min(global_step, args.total_timesteps) - bar.n)

        # Save
        if finished or global_step >= next_save:
            writer.flush()
            more = {"target_model": target_agent.state_dict(), "replay": buffer.state_dict()}
            saved = buffer.flush() and save_checkpoint(run_dir, args, global_step, agent, optimizer, **more)
            next_save = (global_step // args.save_freq + 1) * args.save_freq

    bar.close()
    envs.close()
    writer.close()
    if broken:
        newest = (list_checkpoints(run_dir) or ["none"])[-1]
        fail(f"{broken[0]} after {global_step:,} steps; last good checkpoint: {newest}. Try a smaller --learning-rate.")
    if not saved:
        fail(f"the last checkpoint of {run_dir} could not be written; --resume goes on from the newest that was.")
    if global_step < args.total_timesteps:
        print(f"Stopped after {global_step:,} steps. Go on: python {Path(__file__).name} --resume {run_dir}")
        sys.exit(128 + signals[0])
    buffer.path.unlink(missing_ok=True)  # nobody needs it any more
    print(f"Done. Score it: python evaluate.py {run_dir}")
    return run_dir


if __name__ == "__main__":
    train(read_args(), note_signals())
