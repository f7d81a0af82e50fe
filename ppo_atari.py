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

    python ppo_atari.py --env-id PongNoFrameskip-v4
    python evaluate.py runs/<run>

Measured (mean ± std of 3 seeds, 100 games each), on CPUs with --bf16: Breakout 411 ± 9 (the other defaults); Pong
19.7 ± 1.1 (2 million steps in an hour, by the two commands in benchmarks/README.md). A step is one action for 4 frames.

Hyperparameters are the Atari defaults of openai/baselines. Like baselines, this file adds to the paper: orthogonal
initialization, Adam's epsilon of 1e-5, advantages normalized per minibatch, a clipped value loss, gradients clipped to
a global norm. The paper has 3 epochs, four times this weight of the value loss, and a clip range that falls to 0.

Unlike baselines:
(1) ale-py's vector environment presses FIRE before the idle frames and not after a lost life, does not clear frame
    stacks when a life is lost, and takes the maximum of two frames after conversion to gray.
(2) A game truncated at 108,000 frames is not lost: the value of its last observation is bootstrapped.
(3) All games start anew after each checkpoint, so that a killed run can be resumed exactly.
"""

import contextlib
import dataclasses
import difflib
import json
import math
import os
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
    total_timesteps: int = 10_000_000  # agent steps (4 frames each) over all games, rounded up to whole rollouts
    learning_rate: float = 2.5e-4  # Adam's step size; larger learns faster until it diverges
    anneal_lr: bool = True  # lower the learning rate linearly to 0 at the end
    num_envs: int = 8  # games played side by side; more games decorrelate the batch
    num_steps: int = 128  # steps of each game between updates (T); longer rollouts bootstrap less
    gamma: float = 0.99  # discount per step; nearer to 1 looks further ahead
    gae_lambda: float = 0.95  # near 0, advantages rely on the value function (bias); near 1, on rewards (variance)
    num_minibatches: int = 4  # parts a rollout is cut into; more parts give more and noisier gradient steps
    update_epochs: int = 4  # passes over a rollout; more passes use each sample better but overfit sooner
    norm_adv: bool = True  # normalize advantages to mean 0 and std 1 in each minibatch
    clip_coef: float = 0.1  # no incentive to move a probability ratio farther than this from 1
    clip_vloss: bool = True  # clip the value loss likewise: no gain from moving a value farther than --clip-coef
    ent_coef: float = 0.01  # weight of the entropy bonus; larger explores longer
    vf_coef: float = 0.5  # weight of the value loss, itself half of the squared error
    max_grad_norm: float = 0.5  # gradients with a larger global L2 norm are scaled down to this
    target_kl: float | None = None  # end an update after an epoch whose mean KL divergence exceeds this; None: never
    bf16: bool = False  # run the CNN in bfloat16: faster on some processors, slower on others

    exp_name: str = Path(__file__).stem  # name of the experiment, part of the run folder's name
    seed: int = 1  # random seed; on a CPU, the same seed and number of threads repeat a run bit for bit
    run_dir: str | None = None  # run folder: the same command again continues there; None: a new one in runs/
    save_freq: int = 500_000  # steps between checkpoints (20 MB); all games start anew after each
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
    """The Nature CNN (Mnih et al. 2015, Methods), shared by the policy head and the value head."""

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
        self.actor = layer_init(nn.Linear(512, envs.single_action_space.n), gain=0.01)  # near-uniform at first
        self.critic = layer_init(nn.Linear(512, 1), gain=1.0)
        # channels_last makes training on a CPU 1.5 times as fast. Set after layer_init, which needs the default layout.
        self.network.to(memory_format=torch.channels_last)

    def forward(self, obs):
        """obs (N, 4, 84, 84) uint8 -> logits (N, A), values (N,)"""
        x = obs.contiguous(memory_format=torch.channels_last).float()  # from bytes, so a copy: div_ leaves obs alone
        with torch.autocast(obs.device.type, torch.bfloat16, enabled=self.bf16):  # weights stay float32
            x = self.network(x.div_(255))  # (N, 512)
        x = x.float()  # heads in float32: probability ratios near 1 need the precision
        return self.actor(x), self.critic(x).squeeze(-1)

    def act(self, obs, greedy):
        """For evaluate.py: obs (N, 4, 84, 84) uint8 -> actions (N,) int64, the likeliest or sampled as in training."""
        logits, _ = self(obs)
        return logits.argmax(-1) if greedy else sample(logits)[0]


def sample(logits):
    """logits (N, A) -> actions (N,) int64 drawn from the policy, and their log-probabilities (N,)"""
    log_pi = logits.log_softmax(-1)
    actions = torch.multinomial(log_pi.exp(), 1)  # (N, 1)
    return actions.squeeze(-1), log_pi.gather(-1, actions).squeeze(-1)


# ---- Storage ----


class Rollout:
    """T steps of N environments, preallocated. Row t holds an observation, the action taken, and its outcome."""

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
        self.final_values = torch.zeros((T, N), device=device)  # value of the final observation; valid where truncated

    def flatten(self, advantages, returns):
        """The batch for an update: obs, actions, logprobs, values, advantages, returns, each (B, ...)."""
        batch = (self.obs, self.actions, self.logprobs, self.values, advantages, returns)
        return tuple(x.flatten(0, 1) for x in batch)  # (T, N, ...) -> (B, ...), B = T * N


# ---- Learning ----


def compute_gae(rewards, values, next_values, terminated, ended, gamma, gae_lambda):
    """Generalized advantage estimation (Schulman et al. 2016, eq. 16). All (T, N); returns advantages, returns.

    next_values[t]: value of the observation after step t; at a truncation, of the final one; unused at a termination,
    after which there is no future. ended: terminated or truncated, where the λ-sum stops.
    """
    advantages = torch.empty_like(rewards)
    next_advantage = torch.zeros_like(rewards[0])  # (N,)
    for t in reversed(range(len(rewards))):
        delta = rewards[t] + gamma * next_values[t] * ~terminated[t] - values[t]
        advantages[t] = next_advantage = delta + gamma * gae_lambda * next_advantage * ~ended[t]
    return advantages, advantages + values


def ppo_loss(agent, minibatch, args):
    """The loss to minimize (Schulman et al. 2017, eq. 7 and 9), and its metrics by name.

    minibatch: obs, actions, logprobs and values as collected, advantages, returns; each (M, ...).
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
    if args.clip_vloss:  # take the larger error: a value that moved clip_coef toward its return gets no gradient
        clipped_values = mb_values + (new_values - mb_values).clamp(-args.clip_coef, args.clip_coef)
        value_loss = torch.max(value_loss, (clipped_values - mb_returns) ** 2)
    value_loss = 0.5 * value_loss.mean()

    entropy = -(log_pi.exp() * log_pi).sum(-1).mean()
    loss = policy_loss - args.ent_coef * entropy + args.vf_coef * value_loss
    metrics = {
        "value_loss": value_loss,
        "policy_loss": policy_loss,
        "entropy": entropy,
        "old_approx_kl": -logratio.mean(),  # CleanRL's name; the plain estimate of the same KL, which can be negative
        "approx_kl": (ratio - 1 - logratio).mean(),  # never negative, less noisy (joschu.net/blog/kl-approx.html)
        "clipfrac": ((ratio - 1).abs() > args.clip_coef).float().mean(),
    }
    return loss, {name: metric.detach() for name, metric in metrics.items()}


def ppo_update(agent, optimizer, batch, args):
    """Take minibatch steps on `batch` from Rollout.flatten. Returns each metric's mean over all gradient steps."""
    batch_size, device = len(batch[0]), batch[0].device
    history = []  # metrics of each gradient step, kept on the device: reading each would wait for it
    for _ in range(args.update_epochs):
        for mb_inds in torch.randperm(batch_size, device=device).split(batch_size // args.num_minibatches):
            minibatch = [x.index_select(0, mb_inds) for x in batch]  # for Atari frames, 10 times as fast as x[mb_inds]
            loss, metrics = ppo_loss(agent, minibatch, args)
            optimizer.zero_grad()
            loss.backward()
            average_over_ranks([p.grad for p in agent.parameters()])  # does nothing without torchrun
            metrics["grad_norm"] = nn.utils.clip_grad_norm_(agent.parameters(), args.max_grad_norm)  # before clipping
            optimizer.step()
            history.append(metrics)
        if args.target_kl is not None:  # compared with this epoch's mean, not with that of all epochs, which is logged
            kl = torch.stack([metrics["approx_kl"] for metrics in history[-args.num_minibatches :]]).mean()
            average_over_ranks([kl])
            if kl > args.target_kl:
                break
    return {name: torch.stack([metrics[name] for metrics in history]).mean() for name in history[0]}


# ---- Training ----


def train(args):
    """Train to --total-timesteps, or until Ctrl-C. Returns the exit code."""
    run = Run(args)
    envs = make_envs(args, run.num_envs, seed=0, training=True)  # each segment seeds them anew
    agent = Agent(envs, args).to(run.device)
    optimizer = torch.optim.Adam(agent.parameters(), lr=args.learning_rate, eps=1e-5, fused=True)
    rollout = Rollout(args.num_steps, envs, run.device)
    run.start(model=agent, optimizer=optimizer)

    while not run.finished():
        # A segment: from one checkpoint to the next, with new games and a seed of its own
        obs, _ = envs.reset(seed=run.begin_segment())  # (N, 4, 84, 84) uint8
        while not run.segment_over():
            # Anneal: linearly to 0 at --total-timesteps
            fraction_left = (1 - run.global_step / args.total_timesteps) if args.anneal_lr else 1
            optimizer.param_groups[0]["lr"] = args.learning_rate * fraction_left

            # Collect
            with torch.no_grad():
                for t in range(args.num_steps):
                    rollout.obs[t] = torch.as_tensor(obs)
                    logits, rollout.values[t] = agent(rollout.obs[t])
                    rollout.actions[t], rollout.logprobs[t] = sample(logits)

                    obs, rewards, terminated, truncated, infos = envs.step(rollout.actions[t].cpu().numpy())
                    run.record_step(infos["raw_rewards"], terminated | truncated)
                    rollout.rewards[t] = torch.as_tensor(rewards)
                    # Losing a life ends the episode for learning only.
                    rollout.terminated[t] = torch.as_tensor(terminated | infos["life_lost"])
                    rollout.truncated[t] = torch.as_tensor(truncated)
                    if truncated.any():  # `obs` already belongs to the next game
                        final_obs = torch.as_tensor(np.stack(infos["final_obs"][truncated]), device=run.device)
                        rollout.final_values[t, torch.as_tensor(truncated)] = agent(final_obs)[1]

                # Estimate
                last_values = agent(torch.as_tensor(obs, device=run.device))[1]  # (N,)
                next_values = torch.cat([rollout.values[1:], last_values.unsqueeze(0)])  # (T, N)
                next_values = torch.where(rollout.truncated, rollout.final_values, next_values)
                ended = rollout.terminated | rollout.truncated
                advantages, returns = compute_gae(
                    rollout.rewards, rollout.values, next_values, rollout.terminated, ended, args.gamma, args.gae_lambda
                )

            # Learn
            metrics = ppo_update(agent, optimizer, rollout.flatten(advantages, returns), args)

            # Log
            unexplained = (returns - rollout.values).var() / returns.var()
            metrics["explained_variance"] = torch.where(returns.var() > 0, 1 - unexplained, 0)
            run.log(metrics, learning_rate=optimizer.param_groups[0]["lr"])
        run.save()

    envs.close()
    return run.end()


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
    check_numbers(args, "total_timesteps save_freq num_envs num_steps num_minibatches update_epochs", 1)
    check_numbers(args, "learning_rate ent_coef vf_coef clip_coef max_grad_norm target_kl", 0)
    check_numbers(args, "gamma gae_lambda", 0, 1)
    check_numbers(args, "seed", 0, 2**32 - 1)
    num_ranks, parts = int(os.environ.get("WORLD_SIZE", 1)), args.num_minibatches
    batch_size = args.num_envs // num_ranks * args.num_steps  # of each process
    if args.num_envs % num_ranks:
        fail(f"--num-envs {args.num_envs} cannot be shared equally by {num_ranks} processes.", code=2)
    if batch_size % parts or (args.norm_adv and batch_size == parts):
        least = "2 or more steps, for --norm-adv" if args.norm_adv else "1 or more steps"
        fail(f"--num-minibatches {parts} must cut {batch_size} steps into equal parts of {least}.", code=2)
    least = 5000 * args.num_envs  # every checkpoint starts new games: 5,000 steps are more than most games take
    if args.save_freq < min(least, args.total_timesteps):
        print(f"--save-freq {args.save_freq} cuts games off before their end: raise it to {least}.", file=sys.stderr)
    if args.bf16 and not (args.cuda and torch.cuda.is_available()):
        check_bf16()
    make_envs(args, 1, seed=0, training=True).close()  # a bad --env-id is refused here, before a folder is made


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
