"""Environments so small that the right value and the right action are known: the first thing to try on a learner.

Each isolates one thing that a learner must get right. `PROBES` names them as ids of Gymnasium; `PixelProbe` is the same
idea in Atari's clothes (frames, lives) for ppo_atari.py.
"""

import gymnasium as gym
import numpy as np
from gymnasium.vector import AutoresetMode


class Probe(gym.Env):
    """Episodes of `length` steps; the observation is a number, given by observe(t); reward(t, obs, action)."""

    length = 1
    truncates = False  # whether the last step cuts the episode off instead of ending it

    def __init__(self, render_mode=None):
        self.observation_space = gym.spaces.Box(-1, 1, (1,), np.float32)
        self.action_space = gym.spaces.Discrete(2)

    def observe(self):
        return 1.0

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.t, self.obs = 0, None
        self.obs = self.observe()
        return np.array([self.obs], np.float32), {}

    def step(self, action):
        reward = self.reward(action)
        self.t += 1
        over = self.t == self.length
        self.obs = self.observe()
        return np.array([self.obs], np.float32), reward, over and not self.truncates, over and self.truncates, {}


class ConstantReward(Probe):
    """One step, reward 1. The value is 1."""

    def reward(self, action):
        return 1.0


class RewardFromObs(Probe):
    """One step, the reward is the observation, -1 or 1. The value is the observation."""

    def observe(self):
        return float(self.np_random.choice([-1, 1]))

    def reward(self, action):
        return self.obs


class DelayedReward(Probe):
    """Two steps, observations 0 and 1, reward 1 on the second. The values are gamma and 1."""

    length = 2

    def observe(self):
        return float(self.t == 1)

    def reward(self, action):
        return float(self.t == 1)


class RewardFromAction(Probe):
    """One step, reward 1 for action 1, -1 for action 0."""

    def reward(self, action):
        return 2.0 * action - 1


class RewardFromActionAndObs(RewardFromObs):
    """One step, reward 1 where action 1 goes with observation 1 and action 0 with -1, else -1."""

    def reward(self, action):
        return self.obs * (2.0 * action - 1)


class TruncatedEndless(Probe):
    """Reward -5 on the first step and 1 for ever after, cut off after every 5 steps.

    With V = 1 / (1 - gamma), as if there were no cut, the value is V at observation 1 and gamma V - 5 at the start, -1.
    """

    length = 5
    truncates = True

    def observe(self):
        return -1.0 if self.t == 0 else 1.0

    def reward(self, action):
        return -5.0 if self.t == 0 else 1.0


PROBES = {}
for probe in (ConstantReward, RewardFromObs, DelayedReward, RewardFromAction, RewardFromActionAndObs, TruncatedEndless):
    PROBES[probe.__name__] = f"Probe{probe.__name__}-v0"
    gym.register(PROBES[probe.__name__], entry_point=probe)


class PixelProbe(gym.vector.VectorEnv):
    """Frames all black or all white. Reward 1 for action 1 on white and action 0 on black, else 0, for ever.

    `ending`: "terminated" after each step, "truncated" after each, or "life_lost" at each, while the game goes on.
    `final_frame`: gray of the last frame of a game, where it is not black or white as well.
    """

    metadata = {"autoreset_mode": AutoresetMode.SAME_STEP}  # noqa: RUF012

    def __init__(self, num_envs, ending, final_frame=None):
        self.num_envs, self.ending, self.final_frame = num_envs, ending, final_frame
        self.random = np.random.default_rng(0)
        self.single_observation_space = gym.spaces.Box(0, 255, (4, 84, 84), np.uint8)
        self.single_action_space = gym.spaces.Discrete(2)

    def observe(self):
        self.white = self.random.integers(0, 2, self.num_envs)
        return np.broadcast_to(255 * self.white[:, None, None, None], (self.num_envs, 4, 84, 84)).astype(np.uint8)

    def reset(self, *, seed=None, options=None):
        return self.observe(), {}

    def step(self, actions):
        rewards = (actions == self.white).astype(np.int32)
        flags = {name: np.full(self.num_envs, name == self.ending) for name in ("terminated", "truncated", "life_lost")}
        final_obs = self.observe() if self.final_frame is None else np.full_like(self.observe(), self.final_frame)
        infos = {"raw_rewards": 10 * rewards, "life_lost": flags["life_lost"], "final_obs": final_obs}
        return self.observe(), rewards, flags["terminated"], flags["truncated"], infos
