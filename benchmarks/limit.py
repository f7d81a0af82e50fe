"""The most that a PPO program for Atari could do on this machine: what it cannot do without, and nothing else.

    python benchmarks/speed.py "python ppo_atari.py --no-cuda" "python benchmarks/limit.py"

Like ppo_atari.py with its defaults: 128 steps of 8 games with random actions, the forward passes that choose actions,
and 16 gradient steps of 256 frames, on data that is already there: float, in the network's memory format. No sampling,
storing, loss or logging. It writes charts/SPS, so that speed.py can compare it.
"""

import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import tyro
from torch.utils.tensorboard import SummaryWriter

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import ppo_atari


@dataclass
class Args:
    env_id: str = "PongNoFrameskip-v4"
    total_timesteps: int = 10_000_000


def main(limit):
    args = ppo_atari.Args(env_id=limit.env_id)
    envs = ppo_atari.make_envs(args, args.num_envs, seed=1, training=True)
    envs.reset()
    agent = ppo_atari.Agent(envs, args)
    network = torch.nn.Sequential(agent.network, agent.actor)
    optimizer = torch.optim.Adam(network.parameters(), lr=1e-5, fused=True)
    frames = torch.rand(args.num_envs * args.num_steps // args.num_minibatches, 4, 84, 84)
    frames = frames.contiguous(memory_format=torch.channels_last)
    few = frames[: args.num_envs].contiguous(memory_format=torch.channels_last)
    actions = np.random.default_rng(1).integers(0, envs.single_action_space.n, (args.num_steps, args.num_envs))
    writer = SummaryWriter("runs/limit")
    for step in range(0, limit.total_timesteps, args.num_envs * args.num_steps):
        writer.add_scalar("charts/SPS", 0, step)
        for t in range(args.num_steps):
            envs.step(actions[t])
        with torch.no_grad():
            for _ in range(args.num_steps + 1):
                network(few)
        for _ in range(args.update_epochs * args.num_minibatches):
            optimizer.zero_grad()
            network(frames).sum().backward()
            optimizer.step()


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
