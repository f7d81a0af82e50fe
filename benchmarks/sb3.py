"""Stable-Baselines3 beside our scripts: its speed, and its judgment of our policies.

    pip install -r benchmarks/requirements.txt stable-baselines3==2.9.2
    python benchmarks/speed.py "python ppo_atari.py --no-cuda" "python benchmarks/sb3.py ppo"
    python benchmarks/sb3.py score benchmarks/policies/ppo_atari-Pong.pt --episodes 20

`ppo` and `dqn` train with the game and hyperparameters of our scripts, its own Atari wrappers, on the CPU; they write
charts/SPS, as our scripts do. `score` plays whole games in its wrappers, with its evaluator and our network.
"""

import sys
from pathlib import Path

import ale_py
import gymnasium as gym
import numpy as np
import torch
import tyro
from stable_baselines3 import DQN, PPO
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.env_util import make_atari_env
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.vec_env import VecFrameStack, VecTransposeImage
from torch.utils.tensorboard import SummaryWriter

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import evaluate

gym.register_envs(ale_py)


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


def ppo(env_id: str = "PongNoFrameskip-v4", total_timesteps: int = 10_000_000):
    """Train with the defaults of ppo_atari.py."""
    envs = VecFrameStack(make_atari_env(env_id, n_envs=8, seed=1), 4)
    settings = dict(n_steps=128, n_epochs=4, batch_size=256, learning_rate=2.5e-4, clip_range=0.1, ent_coef=0.01)
    PPO("CnnPolicy", envs, vf_coef=0.5, device="cpu", **settings).learn(total_timesteps, callback=Speed())


def dqn(
    env_id: str = "PongNoFrameskip-v4",
    total_timesteps: int = 10_000_000,
    buffer_size: int = 20_000,
    learning_starts: int = 1_000,
    exploration_fraction: float = 0.1,
):
    """Train with the defaults of dqn_atari.py, but one game, a buffer that fits in memory, and an early start."""
    envs = VecFrameStack(make_atari_env(env_id, n_envs=1, seed=1), 4)
    settings = dict(buffer_size=buffer_size, learning_starts=learning_starts, batch_size=32, learning_rate=1e-4)
    settings |= dict(train_freq=4, gradient_steps=1, target_update_interval=1000)
    settings |= dict(exploration_fraction=exploration_fraction, exploration_final_eps=0.01)
    DQN("CnnPolicy", envs, device="cpu", **settings).learn(total_timesteps, callback=Speed())


class Policy:
    """Our agent as evaluate_policy wants a model to be."""

    def __init__(self, agent):
        self.agent = agent

    @torch.no_grad()
    def predict(self, observation, state=None, episode_start=None, deterministic=False):
        return self.agent.act(torch.as_tensor(observation), deterministic).numpy(), state


def score(checkpoint: tyro.conf.Positional[str], episodes: int = 100, greedy: bool = False, seed: int = 1):
    """Score a checkpoint, or the last one of a run folder. The policy acts as in training unless --greedy is given."""
    path = evaluate.find_checkpoint(checkpoint)
    saved, envs, agent = evaluate.rebuild(path, evaluate.Args(checkpoint, cuda=False), 1)
    envs.close()
    torch.manual_seed(seed)
    env_id = saved["args"]["env_id"]
    if saved["script"] == "ppo_cartpole":
        sys.exit(f"sb3.py: {env_id} is not an Atari game.")
    kwargs = {} if "NoFrameskip" in env_id else dict(frameskip=1)  # its wrapper skips 3 of 4 frames itself
    envs = VecTransposeImage(VecFrameStack(make_atari_env(env_id, min(8, episodes), seed, env_kwargs=kwargs), 4))
    returns, _ = evaluate_policy(Policy(agent), envs, episodes, greedy, return_episode_rewards=True)
    line = f"{path}: {env_id}, return {np.mean(returns):.2f} over {episodes} episodes"
    if interval := evaluate.mean_interval(returns):
        line += f", 95% interval of the mean {interval[0]:.2f} to {interval[1]:.2f}"
    print(line)


if __name__ == "__main__":
    tyro.extras.subcommand_cli_from_dict({"ppo": ppo, "dqn": dqn, "score": score}, description=__doc__)
