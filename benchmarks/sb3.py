"""Stable-Baselines3 on the game and with the hyperparameters of our scripts, for speed.py to compare.

    pip install stable-baselines3==2.9.2
    python benchmarks/speed.py "python ppo_atari.py --no-cuda" "python benchmarks/sb3.py ppo"

Its own Atari wrappers, on the CPU. It writes charts/SPS, as our scripts do.
"""

from typing import Literal

import ale_py
import gymnasium as gym
import tyro
from stable_baselines3 import DQN, PPO
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.env_util import make_atari_env
from stable_baselines3.common.vec_env import VecFrameStack
from torch.utils.tensorboard import SummaryWriter


class Speed(BaseCallback):
    """A point of charts/SPS at each rollout of PPO, at every 100th step of DQN."""

    def _on_training_start(self):
        self.writer = SummaryWriter("runs/sb3")

    def _on_rollout_start(self):
        if isinstance(self.model, PPO):
            self.writer.add_scalar("charts/SPS", 0, self.num_timesteps)

    def _on_step(self):
        if isinstance(self.model, DQN) and self.num_timesteps % 100 == 0:
            self.writer.add_scalar("charts/SPS", 0, self.num_timesteps)
        return True


def main(
    algorithm: tyro.conf.Positional[Literal["ppo", "dqn"]],
    env_id: str = "PongNoFrameskip-v4",
    total_timesteps: int = 10_000_000,
    buffer_size: int = 20_000,
    learning_starts: int = 1_000,
    exploration_fraction: float = 0.1,
):
    """Train with the defaults of ppo_atari.py or dqn_atari.py; DQN with one game, and a buffer that fits in memory."""
    gym.register_envs(ale_py)
    envs = VecFrameStack(make_atari_env(env_id, n_envs=8 if algorithm == "ppo" else 1, seed=1), 4)
    if algorithm == "ppo":
        settings = dict(n_steps=128, n_epochs=4, batch_size=256, learning_rate=2.5e-4, clip_range=0.1, ent_coef=0.01)
        model = PPO("CnnPolicy", envs, vf_coef=0.5, device="cpu", **settings)
    else:
        settings = dict(buffer_size=buffer_size, learning_starts=learning_starts, batch_size=32, learning_rate=1e-4)
        settings |= dict(train_freq=4, gradient_steps=1, target_update_interval=1000)
        settings |= dict(exploration_fraction=exploration_fraction, exploration_final_eps=0.01)
        model = DQN("CnnPolicy", envs, device="cpu", **settings)
    model.learn(total_timesteps, callback=Speed())


if __name__ == "__main__":
    tyro.cli(main, description=__doc__)
