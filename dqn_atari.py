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

    python dqn_atari.py --env-id PongNoFrameskip-v4
    python evaluate.py runs/<run>

Measured: Pong 18.2 ± 1.0 (mean ± std of 3 seeds, 100 games each; 2 million steps, flags in benchmarks/README.md). The
defaults have not been run to their end. A step is one action, held for 4 frames. The replay buffer is a file in the run
folder: 7.1 GB for a million steps, and 3.5 GB for the steps between two checkpoints. A finished run removes it.

Hyperparameters are those of CleanRL's published scores. The paper instead has 50 million steps, RMSProp, a clipped
error, learning from step 50,000, exploration that falls to 0.1, and a target network copied every 10,000 gradient
steps. Unlike CleanRL:
(1) ale-py's vector environment presses FIRE before the idle frames and not after a lost life, starts frame stacks with
    zeros and does not clear them when a life is lost, and takes the maximum of two frames after conversion to gray.
(2) A game truncated at 108,000 frames is bootstrapped from its own last observation, not from the next game's first.
(3) All games start anew after each checkpoint, so that a killed run can be resumed exactly.
(4) Orthogonal initialization, small in the last layer: with PyTorch's, a run learned nothing in 27,000 gradient steps.
(5) Several games are played side by side. Gradient steps and target updates come as often per step as with one game.
(6) The actions of the first --learning-starts steps are random; only then does epsilon fall.
"""

import contextlib
import dataclasses
import difflib
import json
import math
import os
import shutil
import signal
import sys
import time
import zipfile
from collections import deque
from pathlib import Path

import ale_py
import gymnasium as gym
import numpy as np
import torch
import tyro
from ale_py.vector_env import AtariVectorEnv
from gymnasium.vector import AutoresetMode, VectorWrapper
from torch import nn
from torch.utils.benchmark import Timer
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

# ---- Arguments ----


@dataclasses.dataclass
class Args:
    env_id: str = "BreakoutNoFrameskip-v4"  # an id that ends in NoFrameskip-v4, or ALE/...-v5 for sticky actions
    total_timesteps: int = 10_000_000  # agent steps (4 frames each) over all games
    learning_rate: float = 1e-4  # Adam's step size; larger learns faster until it diverges
    num_envs: int = 8  # games played side by side; the number of gradient steps stays the same
    buffer_size: int = 1_000_000  # steps to learn from, 7 kB each on disk; a larger buffer holds more diverse ones
    gamma: float = 0.99  # discount per step; nearer to 1 looks further ahead
    tau: float = 1.0  # how far an update moves the target network toward the online network; 1 copies it
    target_network_frequency: int = 1000  # steps between updates of the target network; more: steadier, slower learning
    batch_size: int = 32  # transitions per gradient step
    start_e: float = 1.0  # chance of a random action (epsilon) after --learning-starts steps; before, all are random
    end_e: float = 0.01  # the final epsilon, which is also that of evaluate.py without --greedy
    exploration_fraction: float = 0.1  # part of the run over which epsilon falls linearly, once learning has started
    learning_starts: int = 80_000  # steps in the buffer before the first gradient step
    train_frequency: int = 4  # steps per gradient step; lower: more learning per step, and a slower run
    bf16: bool = False  # run the CNN in bfloat16: faster on some processors, slower on others

    exp_name: str = Path(__file__).stem  # name of the experiment, part of the run folder's name
    seed: int = 1  # random seed; on a CPU, the same seed and number of threads repeat a run bit for bit
    run_dir: str | None = None  # run folder: the same command again continues there; None: a new one in runs/
    save_freq: int = 500_000  # steps (7 kB of disk each) between checkpoints; all games start anew after each
    resume: str | None = None  # run folder or checkpoint to resume; flags you pass override the saved ones
    cuda: bool = True  # use the GPU if there is one
    torch_deterministic: bool = True  # only deterministic cuDNN kernels; off may be faster
    track: bool = False  # also log to Weights & Biases (pip install wandb)
    wandb_project_name: str = "single-file-rl"  # W&B project
    wandb_entity: str | None = None  # W&B team; None: your own account


# ---- Network ----


def layer_init(layer, gain=2**0.5):
    """Orthogonal weights times `gain`, zero bias (Saxe et al. 2014): signals keep their size from layer to layer."""
    nn.init.orthogonal_(layer.weight, gain)
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
            layer_init(nn.Linear(512, envs.single_action_space.n), gain=0.01),  # all Q-values near 0 at first
        )
        # channels_last makes training on a CPU 1.2 times as fast. Set after layer_init, which needs the default layout.
        self.network.to(memory_format=torch.channels_last)
        self.end_e, self.bf16 = args.end_e, args.bf16

    def forward(self, obs):
        """obs (N, 4, 84, 84) uint8 -> Q-values (N, A)"""
        x = obs.contiguous(memory_format=torch.channels_last).float()  # from bytes, so a copy: div_ leaves obs alone
        with torch.autocast(obs.device.type, torch.bfloat16, enabled=self.bf16):  # weights stay float32
            x = self.network[:-1](x.div_(255))  # (N, 512)
        return self.network[-1](x.float())  # in float32: the Q-values of an observation lie close together

    def act(self, obs, greedy):
        """For evaluate.py: obs (N, 4, 84, 84) uint8 -> actions (N,) int64, exploring by end_e unless `greedy`."""
        return epsilon_greedy(self(obs), 0.0 if greedy else self.end_e)


def epsilon_greedy(q_values, epsilon):
    """q_values (N, A) -> actions (N,) int64: each the best one or, with a chance of `epsilon`, any."""
    best = q_values.argmax(-1)
    explores = torch.rand(best.shape, device=best.device) < epsilon
    return torch.where(explores, torch.randint_like(best, q_values.shape[-1]), best)


# ---- Storage ----


class ReplayBuffer:
    """The last `capacity` steps of N games. Each frame is stored once; sample() puts the stacks of 4 together.

    A ring of rows, each one step of all games: for each game the newest frame seen, the action, and the outcome.
    The frame seen next is in the next row. Where a game was truncated, the next row is already another game's,
    so its final frame is kept aside. (terminated includes a lost life here: nothing is expected after it.)

    The rows are a memory-mapped file: the system keeps in memory what it has room for, and they outlive the program.
    A checkpoint only says where its rows lie. The file is `spare` steps longer, so they last until the next checkpoint.
    """

    def __init__(self, folder, envs, capacity, spare):
        """folder: where replay.bin lies, or will be made by begin_games(). capacity, spare: steps of all games."""
        self.path, self.num_envs = Path(folder) / "replay.bin", envs.num_envs
        self.stack, *frame = envs.single_observation_space.shape  # 4, 84, 84
        fields = [("frame", np.uint8, frame), ("action", np.uint8), ("reward", np.float32), ("terminated", bool)]
        self.row_dtype = np.dtype([*fields, ("num_earlier", np.uint8)])  # how many of the 3 before it are of its game
        self.max_filled = capacity // self.num_envs  # rows
        self.num_rows = self.max_filled + self.stack + spare // self.num_envs + 1  # stack: 3 before the oldest, 1 begun
        self.count = self.filled = 0  # rows completed so far, and how many of them can be sampled
        self.final_frames = {}  # (row, n) -> final frame of game n, which was truncated at that row's step
        self.file = None

    def begin_games(self, obs):
        """New games begin: obs (N, 4, 84, 84) is what is seen first. Makes the file, unless there is one."""
        if self.file is None:
            make_file(self.path, self.num_rows * self.num_envs * self.row_dtype.itemsize + 16)
            self.map_file()
            self.footer[1] = int.from_bytes(os.urandom(7))  # not from --seed: each file has its own
        self.begin_row(obs, 0)

    def map_file(self):
        """Rows (num_rows, N) and, behind them, the highest count ever and a number that tells this file from others."""
        self.file = np.memmap(self.path, self.row_dtype, "r+", shape=(self.num_rows, self.num_envs))
        self.footer = np.memmap(self.path, np.int64, "r+", offset=self.file.nbytes, shape=2)
        self.rows = self.file.view(np.ndarray)  # the same memory; indexing a memmap takes longer

    def begin_row(self, obs, num_earlier):
        """Write what was seen to the row that waits for its action."""
        t = self.count % self.num_rows
        self.rows["frame"][t], self.rows["num_earlier"][t] = obs[:, -1], num_earlier
        for n in range(self.num_envs):  # left from when this row was last written
            self.final_frames.pop((t, n), None)

    def add(self, actions, rewards, terminated, ended, final_obs, next_obs):
        """Complete a row, and begin the next one with what was seen then. Arrays of N.

        terminated: no future, as after a lost life; ended: a new game begins, and its stack with it.
        final_obs: {n: final observation (4, 84, 84)} of truncated games, whose next_obs belongs to the new ones.
        """
        t = self.count % self.num_rows
        row = self.rows[t]  # (N,)
        row["action"], row["reward"], row["terminated"] = actions, rewards, terminated
        self.final_frames |= {(t, n): obs[-1].copy() for n, obs in final_obs.items()}
        self.count, self.filled = self.count + 1, min(self.filled + 1, self.max_filled)
        self.footer[0] = max(self.footer[0], self.count)
        self.begin_row(next_obs, np.where(ended, 0, np.minimum(row["num_earlier"] + 1, self.stack - 1)))

    def end_games(self):
        """Truncate the games in progress: what was seen last is their final frame."""
        t = (self.count - 1) % self.num_rows
        for n, frame in enumerate(self.rows["frame"][self.count % self.num_rows].copy()):
            self.final_frames.setdefault((t, n), frame)  # a game truncated at this very step has its own already

    def sample(self, batch_size):
        """M = batch_size transitions drawn uniformly: frames, actions, rewards, terminated, as tensors.

        frames: (M, 5, 84, 84) uint8, of which the first 4 are what was seen and the last 4 what was seen next; the very
        last one means nothing where terminated. actions: (M,) int64; rewards: (M,) float32; terminated: (M,) bool.
        """
        ages = torch.randint(1, self.filled + 1, (batch_size,)).numpy()  # 1: the newest complete row
        t, n = (self.count - ages) % self.num_rows, torch.randint(self.num_envs, (batch_size,)).numpy()
        offsets = np.arange(1 - self.stack, 2)  # -3, -2, -1, 0, 1
        frames = self.rows["frame"][(t[:, None] + offsets) % self.num_rows, n[:, None]]  # (M, 5, 84, 84)
        frames[-offsets > self.rows["num_earlier"][t, n][:, None]] = 0  # the stack of a new game starts with zeros
        for i, key in enumerate(zip(t.tolist(), n.tolist(), strict=True)):
            if key in self.final_frames:
                frames[i, -1] = self.final_frames[key]
        actions = self.rows["action"][t, n].astype(np.int64)  # as gather() wants them
        batch = (frames, actions, self.rows["reward"][t, n], self.rows["terminated"][t, n])
        return [torch.from_numpy(x) for x in batch]

    def state_dict(self):
        """What a checkpoint says of the file. Waits until all of it is on the disk."""
        self.file.flush()
        self.footer.flush()
        final_frames = {key: torch.from_numpy(frame) for key, frame in self.final_frames.items()}
        sizes = {"num_envs": self.num_envs, "max_filled": self.max_filled, "num_rows": self.num_rows}
        position = {"count": self.count, "filled": self.filled, "identity": int(self.footer[1])}
        return sizes | position | {"final_frames": final_frames}

    def load_state_dict(self, state):
        """Continue with a checkpoint's rows. If their file is gone, the buffer starts empty, to be filled again."""
        offset = state["num_rows"] * state["num_envs"] * self.row_dtype.itemsize + 8  # of the last 8 bytes: identity
        kept = self.path.is_file() and self.path.stat().st_size == offset + 8
        if not kept or np.fromfile(self.path, np.int64, offset=offset).tolist() != [state["identity"]]:
            tqdm.write(f"{self.path} is gone, or another run's: the replay buffer starts empty.", file=sys.stderr)
            return
        if (state["num_envs"], state["max_filled"]) != (self.num_envs, self.max_filled):
            fail(f"--num-envs and --buffer-size must stay as they were, unless you remove {self.path}.", code=2)
        self.num_rows, self.count = state["num_rows"], state["count"]
        self.map_file()
        self.final_frames = {key: frame.numpy() for key, frame in state["final_frames"].items()}
        # A run that went on for more than `spare` steps, as after a failed save, has overwritten the oldest rows
        self.filled = max(0, min(state["filled"], self.num_rows - self.stack - int(self.footer[0] - self.count)))


# ---- Learning ----


def annealed_epsilon(args, global_step):
    """The chance of a random action: 1 for learning_starts steps, then falling linearly from start_e to end_e."""
    if global_step < args.learning_starts:
        return 1.0
    num_steps = max(1, args.exploration_fraction * args.total_timesteps)
    return args.start_e + min(1, (global_step - args.learning_starts) / num_steps) * (args.end_e - args.start_e)


@torch.no_grad()
def td_target(target_agent, rewards, next_obs, terminated, gamma):
    """The TD target (M,): reward plus discounted best Q-value of what was seen next (Mnih et al. 2015, Methods)."""
    return rewards + gamma * target_agent(next_obs).max(-1).values * ~terminated  # truncated games had a future


def dqn_update(agent, target_agent, optimizer, batch, gamma):
    """One gradient step on `batch` from ReplayBuffer.sample. Returns metrics by name, left on the device."""
    frames, actions, rewards, terminated = batch
    obs, next_obs = frames[:, :-1], frames[:, 1:]  # (M, 4, 84, 84) each
    targets = td_target(target_agent, rewards, next_obs, terminated, gamma)  # (M,)
    q_values = agent(obs).gather(-1, actions.unsqueeze(-1)).squeeze(-1)  # (M,)
    loss = nn.functional.mse_loss(q_values, targets)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    return {"td_loss": loss.detach(), "q_values": q_values.detach().mean()}


@torch.no_grad()
def update_target(target_agent, agent, tau):
    """Move the target network's parameters (it has no buffers) the fraction `tau` of the way to the online ones."""
    for target, parameter in zip(target_agent.parameters(), agent.parameters(), strict=True):
        target.lerp_(parameter, tau)


# ---- Training ----


def train(args):
    """Train to --total-timesteps, or until Ctrl-C. Returns the exit code."""
    torch.set_flush_denormal(True)  # before any thread starts: Adam's averages of dead weights become slow denormals
    run = Run(args)
    envs = make_envs(args, run.num_envs, seed=0, training=True)  # each segment seeds them anew
    agent, target_agent = Agent(envs, args).to(run.device), Agent(envs, args).to(run.device)
    target_agent.load_state_dict(agent.state_dict())
    optimizer = torch.optim.Adam(agent.parameters(), lr=args.learning_rate, fused=True)
    buffer = ReplayBuffer(run.folder, envs, args.buffer_size, spare=min(args.save_freq, args.total_timesteps))
    run.start(model=agent, target_model=target_agent, optimizer=optimizer, buffer=buffer)
    optimizer.param_groups[0]["lr"] = args.learning_rate  # the checkpoint's was restored; the flag decides

    while not run.finished():
        # A segment: from one checkpoint to the next, with new games and a seed of its own
        obs, _ = envs.reset(seed=run.begin_segment())  # (N, 4, 84, 84) uint8
        buffer.begin_games(obs)
        history = []  # metrics of each gradient step since the last log
        while not run.segment_over():
            # Act
            epsilon = annealed_epsilon(args, run.global_step)
            with torch.no_grad():
                actions = epsilon_greedy(agent(torch.as_tensor(obs, device=run.device)), epsilon).cpu().numpy()  # (N,)
            obs, rewards, terminated, truncated, infos = envs.step(actions)
            run.record_step(infos["raw_rewards"], terminated | truncated)

            # Remember. A lost life ends the episode for learning only. Where a game ended, `obs` is already the next.
            final_obs = {n: infos["final_obs"][n] for n in np.flatnonzero(truncated).tolist()}
            buffer.add(actions, rewards, terminated | infos["life_lost"], terminated | truncated, final_obs, obs)

            # Learn, as often per step as with a single game
            if buffer.filled * args.num_envs >= args.learning_starts:
                for step in range(run.global_step - args.num_envs + 1, run.global_step + 1):
                    if step % args.train_frequency == 0:
                        batch = [x.to(run.device, non_blocking=True) for x in buffer.sample(args.batch_size)]
                        history.append(dqn_update(agent, target_agent, optimizer, batch, args.gamma))
                    if step % args.target_network_frequency == 0:
                        update_target(target_agent, agent, args.tau)

            # Log, every 1,000 steps
            if run.global_step % 1000 < args.num_envs or run.segment_over():
                metrics = {}
                if history:
                    metrics = {name: torch.stack([x[name] for x in history]).mean() for name in history[0]}
                    metrics["grad_norm"] = nn.utils.get_total_norm([p.grad for p in agent.parameters()])  # the last one
                history.clear()
                run.log(metrics, epsilon=epsilon, learning_rate=args.learning_rate)
        buffer.end_games()
        run.save()

    envs.close()
    code = run.end()
    if code == 0 and run.global_step > run.first_step:
        buffer.path.unlink(missing_ok=True)  # kept if nothing was trained: a run asked to end earlier can still go on
    return code


# ---- Environment ----

gym.register_envs(ale_py)


def spread_seed(*key):
    """Integers hashed to a seed below 2**30. Environment i gets seed + i, and runs 1, 2, 3 must not share them."""
    return int(np.random.SeedSequence(key).generate_state(1)[0] >> 2)  # a plain int: environments refuse NumPy's


class AtariGames(VectorWrapper):
    """N games in lockstep, with the preprocessing of Mnih et al. (2015).

    obs: (N, 4, 84, 84) uint8. A game that ends restarts on the same step: obs is then the first of the new game, and
    infos["final_obs"] has the last of the old one. rewards: (N,), in training clipped to -1, 0, 1.
    infos["raw_rewards"]: (N,) points of the game. infos["life_lost"]: (N,) bool, a life was lost but not the game.
    """

    def __init__(self, game, num_envs, repeat_action_probability, training, render):
        protocol = dict(
            num_envs=num_envs,
            batch_size=0,  # a step waits for all games
            num_threads=0,  # at most one emulator thread per core
            frameskip=4,  # an action is held for 4 frames: 15 decisions per second of play
            maxpool=True,  # the agent sees the maximum of the last 2 frames: some sprites are drawn on every other one
            noop_max=30,  # a game begins with 0 to 29 idle frames, drawn from the seed, so that games start differently
            use_fire_reset=True,  # and with FIRE, where the game has it (then 0 to 28 idle frames)
            max_num_frames_per_episode=108_000,  # half an hour of play, then the game is truncated
            repeat_action_probability=repeat_action_probability,  # chance per frame that the previous action sticks
            continuous=False,  # actions are the joystick's positions and its button
            full_action_space=False,  # only those that do something in this game: 4 in Breakout, 6 in Pong
            episodic_life=False,  # True would restart the whole game at a lost life: later lives would never be seen
            life_loss_info=False,  # True would call a lost life terminated; step() below keeps the two apart
            reward_clipping=False,  # True would hide the score; step() below clips what is learned from
            autoreset_mode=AutoresetMode.SAME_STEP,  # every step is a real one, none is spent on a reset
        )
        agent_view = dict(
            grayscale=True,  # brightness alone: a third of the bytes
            img_height=84,  # scaled down from 210
            img_width=84,  # and from 160
            stack_num=4,  # the last 4 views, so that one observation shows what moves where
        )
        human_view = dict(grayscale=False, img_height=210, img_width=160, stack_num=1)
        super().__init__(AtariVectorEnv(game, **agent_view, **protocol))
        self.metadata = self.metadata | {"render_fps": 15}  # the console draws 60 frames a second, 4 for each step
        self.training = training
        # For evaluate.py --video: the same games in color. Same seed and actions, so the same frames.
        self.camera = AtariVectorEnv(game, **human_view, **protocol) if render else None

    def reset(self, *, seed=None, options=None):
        obs, infos = self.env.reset(seed=seed, options=options)
        self.lives = infos["lives"]
        if self.camera:
            self.picture, _ = self.camera.reset(seed=seed, options=options)
        return obs, infos

    def step(self, actions):
        obs, rewards, terminated, truncated, infos = self.env.step(actions)
        ended = terminated | truncated  # where a game ended, infos["lives"] is already the next one's
        infos["life_lost"] = (infos["lives"] < self.lives) & ~ended
        self.lives = infos["lives"]
        infos["raw_rewards"] = rewards
        if self.training:
            rewards = np.sign(rewards)  # one learning rate for games that pay 1 point and games that pay 1,000
        if self.camera:
            self.picture = self.camera.step(actions)[0]
        return obs, rewards, terminated, truncated, infos

    def render(self):
        """One RGB picture per game, (210, 160, 3) uint8."""
        return tuple(self.picture[:, 0])


def find_game(env_id):
    """Gymnasium's entry for --env-id. Refuses ids that are not Atari games, or skip frames differently."""
    spec = gym.registry.get(env_id)
    playable = [name for name in gym.registry if "NoFrameskip" in name or name.startswith("ALE/")]
    close = ", ".join(difflib.get_close_matches(env_id, playable))
    if spec is None:
        fail(f"--env-id {env_id} is not registered.{f' Close: {close}.' if close else ''}", code=2)
    if "game" not in spec.kwargs:
        fail(f"--env-id {env_id} is not an Atari game; for vector observations use ppo_cartpole.py.", code=2)
    if env_id not in playable:
        fail(f"--env-id {env_id} must be a *NoFrameskip or ALE/*-v5 id. Close: {close}.", code=2)
    return spec


def make_envs(args, num_envs, seed, training, render=False):
    """`num_envs` seeded games of --env-id. training=False: rewards are the game's own points."""
    kwargs = find_game(args.env_id).kwargs
    envs = AtariGames(kwargs["game"], num_envs, kwargs["repeat_action_probability"], training, render)
    envs.reset(seed=seed)  # for a caller who resets without a seed
    return envs


# ---- Refusals ----


def fail(message, code=1):
    """End the program with one sentence instead of a traceback. Exit code 2: wrong usage; 1: anything else."""
    tqdm.write(f"{Path(sys.argv[0]).name}: {message}", file=sys.stderr)  # print would garble the progress bar
    sys.exit(code)


def check_numbers(args, names, low, high=math.inf):
    """Refuse flags (names in one string) that are infinite, NaN, or outside low to high. None is allowed."""
    for name in names.split():
        value, flag = getattr(args, name), f"--{name.replace('_', '-')}"
        if value is not None and not (low <= value <= high and math.isfinite(value)):
            expected = f"between {low} and {high}" if high < math.inf else f"{low} or more"
            fail(f"{flag} must be {expected}, got {value}.", code=2)


def check_args(args):
    """Refuse bad flags, each with a sentence that names the flag, its value and what is allowed."""
    numbers = "total_timesteps save_freq num_envs buffer_size train_frequency batch_size target_network_frequency"
    check_numbers(args, numbers, 1)
    check_numbers(args, "learning_rate learning_starts", 0)
    check_numbers(args, "gamma tau start_e end_e exploration_fraction", 0, 1)
    check_numbers(args, "seed", 0, 2**32 - 1)
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        fail("DQN learns in one process: start it with python, not with torchrun.", code=2)
    if args.buffer_size // args.num_envs * args.num_envs < max(1, args.learning_starts):
        fail(f"--buffer-size {args.buffer_size} must be at least --learning-starts and --num-envs.", code=2)
    if args.learning_starts + args.exploration_fraction * args.total_timesteps >= args.total_timesteps:
        what = f"--learning-starts {args.learning_starts} and --exploration-fraction {args.exploration_fraction}"
        fail(f"with {what}, epsilon never reaches --end-e in --total-timesteps {args.total_timesteps}.", code=2)
    least = 5000 * args.num_envs  # every checkpoint starts new games: 5,000 steps are more than most games take
    if args.save_freq < min(least, args.total_timesteps):
        print(f"--save-freq {args.save_freq} cuts games off before their end: raise it to {least}.", file=sys.stderr)
    if args.bf16 and not (args.cuda and torch.cuda.is_available()):
        check_bf16()
    make_envs(args, 1, seed=0, training=True).close()  # a bad --env-id is refused here, before a folder is made
    check_disk(args)


def check_disk(args):
    """Refuse a replay buffer that the disk has no room for. A finished run needs none."""
    needed = (args.buffer_size + min(args.save_freq, args.total_timesteps)) * 84 * 84
    path = Path(args.run_dir or "runs").absolute() / "replay.bin"
    free = shutil.disk_usage(next(folder for folder in path.parents if folder.exists())).free
    free += path.stat().st_size if path.exists() else 0  # which is used again, or replaced
    if needed > free and not any(int(x.stem) >= args.total_timesteps for x in list_checkpoints(path.parent)):
        gb = f"{needed / 1e9:.1f} GB on the disk, of which {free / 1e9:.1f} GB are free"
        fail(f"--buffer-size {args.buffer_size} and --save-freq {args.save_freq} need {gb}: lower them.", code=2)


def make_file(path, size):
    """Make a file and reserve its `size` bytes: writing to a hole in it on a full disk would kill the program."""
    try:
        with open(path, "wb") as file:
            file.truncate(size)
            if hasattr(os, "posix_fallocate"):  # not on Windows and macOS
                os.posix_fallocate(file.fileno(), 0, size)
    except OSError as error:
        path.unlink(missing_ok=True)
        fail(f"{path} of {size / 1e9:.1f} GB cannot be made ({error.strerror}): lower --buffer-size or --save-freq.")


def check_bf16():
    """Warn if bfloat16 is slower than float32 here. It is measured, as some processors have it and are slow."""
    setup = "conv, x = torch.nn.Conv2d(32, 64, 4, 2).to({0}), torch.rand(8, 32, 20, 20).to({0})"
    timers = [Timer("conv(x).sum().backward()", setup.format(x)) for x in (torch.float32, torch.bfloat16)]
    # The fastest of five, as other programs slow some down. A Timer uses one thread, and starts no others.
    float32, bfloat16 = (min(timer.timeit(1).mean for _ in range(5)) for timer in timers)
    if bfloat16 > float32:
        print("--bf16 may be slower than float32 on this processor: leave it off.", file=sys.stderr)


# ---- The run ----

FORMAT = 2  # of a checkpoint; format 1, which knew no segments, can be scored but not resumed


class Run:
    """What keeps a run alive: folder, checkpoints, curves, signals, several processes. The same in every script."""

    def __init__(self, args):
        """Lock the run folder, find the checkpoint to continue from, join the other processes, seed the weights."""
        self.args = args
        name = f"{args.env_id}__{args.exp_name}__{args.seed}__{int(time.time())}".replace("/", "-").replace(":", "-")
        self.folder = Path(args.run_dir or f"runs/{name}")
        self.rank, self.num_ranks = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
        self.num_envs = args.num_envs // self.num_ranks  # of this process
        self.device = torch.device("cuda" if args.cuda and torch.cuda.is_available() else "cpu")
        self.stop_signal, self.stop_time, self.stopped, self.saved = 0, math.inf, False, True
        self.writer, self.points, self.recent_returns = None, [], deque(maxlen=100)  # points: not yet written
        torch.backends.cudnn.deterministic = args.torch_deterministic
        self.checkpoint = self.open_folder() if self.rank == 0 else None
        if self.num_ranks > 1:
            __import__("torch._dynamo")  # later, it can crash Python at exit; a plain import would make torch local
            torch.distributed.init_process_group()  # NCCL between GPUs, gloo between CPUs
            if self.device.type == "cuda":
                torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
            found = [self.checkpoint, self.folder, dataclasses.asdict(args)]  # those of rank 0, for all
            torch.distributed.broadcast_object_list(found)
            self.checkpoint, self.folder, flags = found
            if flags != dataclasses.asdict(args):
                fail("torchrun's processes have different flags, or do not see the same run folder.", code=2)
        self.global_step = self.first_step = self.checkpoint["global_step"] if self.checkpoint else 0
        torch.manual_seed(args.seed)  # the same initial weights in all processes

    def open_folder(self):
        """Make the run folder and lock it. Returns the checkpoint to continue from, None to start afresh."""
        args = self.args
        try:
            (self.folder / "checkpoints").mkdir(parents=True, exist_ok=True)
            self.lock = open(self.folder / ".lock", "w")
        except OSError as error:
            fail(f"the run folder (--run-dir) {self.folder} cannot be written: {error.strerror}.")
        try:
            import fcntl

            fcntl.flock(self.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # released when the process ends
        except BlockingIOError:
            fail(f"{self.folder} is being written by another process: wait for it, or name another --run-dir.")
        except (ImportError, OSError) as error:  # Windows; a file system without locks
            print(f"{self.folder} cannot be locked ({error}): do not start a second run in it.", file=sys.stderr)
        paths = list_checkpoints(self.folder)
        if not paths:
            return None if args.resume is None else load_checkpoint(find_checkpoint(args.resume))
        newest = load_checkpoint(paths[-1])
        resumed = args.resume and Path(args.resume).resolve() in (self.folder.resolve(), paths[-1].resolve())
        if resumed:  # keep what the run was started with, so that its first command still continues it
            self.args = dataclasses.replace(args, resume=newest["args"]["resume"])
        flags = dataclasses.asdict(args) | {"run_dir": newest["args"]["run_dir"]}  # a path may be written in many ways
        changed = [f"--{x.replace('_', '-')}" for x in flags if flags[x] != newest["args"].get(x)]
        ran = self.folder / "script.py"  # edited since? Then the weights there are those of another program
        changed += [Path(__file__).name] * (ran.is_file() and ran.read_bytes() != Path(__file__).read_bytes())
        if changed and not resumed:
            what = f"{self.folder} holds checkpoints up to {paths[-1].name}, of a run with another {', '.join(changed)}"
            fail(f"{what}: continue it with --resume {self.folder}, or name another --run-dir.", code=2)
        return newest

    def start(self, model, optimizer, **more):
        """Restore what is given (objects with a state_dict), open the curves, and say what is about to run."""
        self.state, self.start_time = {"model": model, "optimizer": optimizer, **more}, time.monotonic()
        try:
            if self.checkpoint and not self.finished():
                for name, x in self.state.items():
                    x.load_state_dict(self.checkpoint[name])
        except (AttributeError, KeyError, RuntimeError, TypeError, ValueError) as error:
            reason = " ".join(f"{type(error).__name__}: {error}".split())[:300]
            fail(f"the checkpoint does not fit script, flags or environment ({reason}); see script.py in its folder.")
        args, running = self.args, self.rank == 0 and not self.finished()
        if running:
            (self.folder / "args.json").write_text(json.dumps(dataclasses.asdict(args), indent=2))
            (self.folder / "script.py").write_bytes(Path(__file__).read_bytes())
            if args.track:
                import wandb

                track = dict(project=args.wandb_project_name, entity=args.wandb_entity, config=dataclasses.asdict(args))
                id_file = self.folder / "wandb_id"  # a resumed run continues its curves
                run_id = id_file.read_text() if id_file.exists() else None
                wandb.init(**track, name=self.folder.name, id=run_id, resume="allow", sync_tensorboard=True)
                id_file.write_text(wandb.run.id)
            self.writer = SummaryWriter(self.folder, purge_step=self.global_step + 1)  # hide points to be logged again
            where = torch.cuda.get_device_name() if self.device.type == "cuda" else "the CPU" + " (no GPU)" * args.cuda
            what = f"{args.exp_name}: {args.env_id} x {args.num_envs} on {where}"
            print(f"{what}, steps {self.global_step:,} to {args.total_timesteps:,}, in {self.folder}", flush=True)
        bar = dict(total=args.total_timesteps, initial=self.global_step, unit=" steps", unit_scale=True)
        self.bar = tqdm(**bar, mininterval=0.5 if sys.stderr.isatty() else 10, disable=not running)  # seconds
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self.request_stop)

    def finished(self):
        """Whether to end: --total-timesteps is reached, or a stop was requested."""
        return self.stopped or self.global_step >= self.args.total_timesteps

    def begin_segment(self):
        """Set where it ends, and seed PyTorch from --seed and the step. Returns the seed for the environments.

        Nothing else is random, so a killed run repeats what it did after its last checkpoint: on a CPU, bit for bit.
        """
        next_save = (self.global_step // self.args.save_freq + 1) * self.args.save_freq
        self.segment_end = min(next_save, self.args.total_timesteps)
        self.returns, self.lengths = np.zeros(self.num_envs), np.zeros(self.num_envs, np.int64)
        seed = spread_seed(1, self.args.seed, self.global_step) + self.rank * self.num_envs  # 1: here, 2: evaluate.py
        torch.manual_seed(seed)
        return seed

    def segment_over(self):
        """Whether to save: --save-freq or the end is reached, or a stop was requested."""
        return self.stopped or self.global_step >= self.segment_end

    def request_stop(self, number, frame):
        """Ctrl-C or SIGTERM: finish the update in progress, save, stop. A second one ends a single process at once."""
        if self.num_ranks == 1 and time.monotonic() > self.stop_time + 1:  # sooner, it is the first one, sent twice
            os._exit(128 + number)
        self.stop_signal, self.stop_time = number, min(self.stop_time, time.monotonic())
        self.stopped |= self.num_ranks == 1  # several processes decide together in log()
        self.bar.disable = True  # it could no longer be printed: Ctrl-C also ends the `tee` of `2>&1 | tee log`
        with contextlib.suppress(OSError):
            os.write(2, b"\nStopping: saving a checkpoint first.\n")  # print is not reentrant

    def record_step(self, rewards, ended):
        """Count one step of every environment. rewards: (N,), unclipped; ended: (N,), where an episode ended."""
        self.returns += rewards
        self.lengths += 1
        for i in np.flatnonzero(ended):
            step = self.global_step + int(i) + 1  # TensorBoard shows one point per step: episodes must not share one
            self.points.append(("charts/episodic_return", self.returns[i], step))
            self.points.append(("charts/episodic_length", self.lengths[i], step))
            self.recent_returns.append(self.returns[i])
            self.returns[i] = self.lengths[i] = 0
        self.global_step += self.args.num_envs

    def log(self, metrics, **charts):
        """Write curves and progress. metrics: scalar tensors by name, which must be finite; charts: numbers by name."""
        average_over_ranks(list(metrics.values()))
        if self.num_ranks > 1:  # stop together: a process that stopped alone would leave the others waiting
            stop = torch.tensor([float(self.stop_signal > 0)], device=self.device)
            average_over_ranks([stop])
            self.stopped = stop.item() > 0
        values = torch.stack(list(metrics.values())).tolist() if metrics else []  # one wait for the GPU, not one each
        for name, value in zip(metrics, values, strict=True):
            if not math.isfinite(value):
                self.give_up(f"{name} is {value}")
            self.points.append((f"losses/{name}", value, self.global_step))
        charts["SPS"] = (self.global_step - self.first_step) / (time.monotonic() - self.start_time)
        self.points += [(f"charts/{name}", value, self.global_step) for name, value in charts.items()]
        try:
            if self.writer:
                for point in self.points:
                    self.writer.add_scalar(*point)
                self.writer.flush()
        except Exception as error:  # an OSError or, where TensorFlow is installed, one of its own
            tqdm.write(f"no more curves, training continues: {error}", file=sys.stderr)
            self.writer = None  # once failed, it fails at every later point
        self.points.clear()
        if self.recent_returns:
            self.bar.set_postfix_str(f"return {np.mean(self.recent_returns):.1f}", refresh=False)
        self.bar.update(min(self.global_step, self.args.total_timesteps) - self.bar.n)

    def save(self):
        """Write checkpoints/{global_step}.pt, with all that --resume and evaluate.py need. Atomic."""
        if not torch.stack([x.isfinite().all() for x in self.state["model"].state_dict().values()]).all():
            self.give_up("a weight is not finite")
        if self.rank > 0:
            return
        versions = {x.__name__: str(x.__version__) for x in (torch, gym, np)} | {"threads": torch.get_num_threads()}
        path = self.folder / "checkpoints" / f"{self.global_step:012d}.pt"
        try:
            checkpoint = {name: x.state_dict() for name, x in self.state.items()}
            checkpoint |= {"format": FORMAT, "script": Path(__file__).stem, "args": dataclasses.asdict(self.args)}
            checkpoint |= {"global_step": self.global_step, "versions": versions}
            with open(path.with_name("unfinished.tmp"), "wb") as file:
                torch.save(checkpoint, file)
                file.flush()
                os.fsync(file.fileno())  # or the new name may reach the disk before the data
            torch.load(file.name, map_location="cpu", weights_only=True)  # refuses NumPy values, before it is too late
            os.replace(file.name, path)
        except (OSError, RuntimeError) as error:  # torch.save wraps some OSErrors
            tqdm.write(f"{path} could not be written, training continues: {error}", file=sys.stderr)
        self.saved = path.exists()

    def give_up(self, reason):
        """End the program without saving. All processes get here, as they check the same values."""
        self.bar.close()
        paths = list_checkpoints(self.folder)
        advice = f"continue from {paths[-1]} with --resume and" if paths else "start again with"
        fail(f"{reason} after {self.global_step:,} steps: {advice} a smaller --learning-rate, or fix the environment.")

    def end(self):
        """Say what to do next. Returns the exit code: 0 if finished, 128 + the signal if stopped."""
        self.bar.close()
        launch = f"torchrun --nproc-per-node={os.environ['LOCAL_WORLD_SIZE']}" if self.num_ranks > 1 else "python"
        if self.num_ranks > 1:
            torch.distributed.destroy_process_group()
        code, message = 0, f"Done: {self.folder} is finished. Score it: python evaluate.py {self.folder}"
        if self.global_step < self.args.total_timesteps:
            message = f"Stopped at step {self.global_step:,}. Continue: {launch} {sys.argv[0]} --resume {self.folder}"
            code = 128 + (self.stop_signal or signal.SIGTERM)  # which another process may have received
        if not self.saved:
            fail(f"the last checkpoint was not written: --resume {self.folder} continues from an earlier one, if any.")
        if self.rank == 0:
            self.lock.close()
            with contextlib.suppress(OSError):
                os.write(2 if code else 1, f"{message}\n".encode())
        return code


def average_over_ranks(tensors):
    """Replace each tensor by its mean over the processes that torchrun started. With one process, do nothing."""
    if torch.distributed.is_initialized():
        total = torch.cat([x.flatten() for x in tensors])
        torch.distributed.all_reduce(total)
        means = (total / torch.distributed.get_world_size()).split([x.numel() for x in tensors])
        for x, mean in zip(tensors, means, strict=True):
            x.copy_(mean.view_as(x))


def list_checkpoints(run_dir):
    """The checkpoints of a run folder, oldest first. Ignores files that are not named by a step."""
    return sorted(path for path in Path(run_dir).glob("checkpoints/*.pt") if path.stem.isdigit())


def find_checkpoint(path):
    """The checkpoint that `path` names: a .pt itself, or the newest one of a run folder."""
    found = max(list_checkpoints(path), default=Path(path))
    if not found.is_file():
        fail(f"{path} holds no checkpoint (yet): name the folder of one run, or a .pt file.")
    return found


def load_checkpoint(path):
    """Read a checkpoint onto the CPU. Safe for untrusted files; refuses damaged ones."""
    try:
        with zipfile.ZipFile(path) as file:  # torch.load checks no checksums, and skips weights marked as folders
            if file.testzip() or any(entry.external_attr & 0x10 for entry in file.infolist()):
                raise ValueError
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        if checkpoint["format"] > FORMAT or not {"script", "args", "global_step", "model"} <= checkpoint.keys():
            raise ValueError
        return checkpoint
    except Exception as error:  # a damaged file can raise almost anything
        fail(f"{path} cannot be read: damaged, or no checkpoint of this version ({type(error).__name__}).")


def read_args():
    """Args from the command line. With --resume, flags that are not given are those of the run."""
    args = tyro.cli(Args, description=__doc__)  # parsed twice: to find --resume, then with the run's flags as defaults
    if args.resume is not None:
        path = find_checkpoint(args.resume)
        checkpoint = load_checkpoint(path)
        if checkpoint["format"] < FORMAT or "optimizer" not in checkpoint:
            fail(f"{path} can only be scored: it holds a policy alone, or was written by an earlier version.")
        run_dir = str(path.parents[1]) if path.parent.name == "checkpoints" else None
        try:
            saved = Args(**checkpoint["args"] | {"run_dir": run_dir})
        except TypeError:
            fail(f"{path} was written by {checkpoint['script']}.py with other flags than this script has.")
        args = tyro.cli(Args, description=__doc__, default=saved)
        if args.env_id != saved.env_id:
            fail(f"--env-id {args.env_id} does not match the checkpoint's {saved.env_id}.", code=2)
    check_args(args)
    return args


if __name__ == "__main__":
    sys.exit(train(read_args()))
