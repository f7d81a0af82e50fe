"""Environments so small that the right value and the right action are known: the first thing to try on a learner.

Each isolates one thing that a learner must get right. `PROBES` names them as ids of Gymnasium; `InFrames` puts one of
them in Atari's clothes (frames, lives), for ppo_atari.py and dqn_atari.py.
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


class Mixed(Probe):
    """1 to 5 steps, then ended or cut off; observations and rewards are noise."""

    def reset(self, *, seed=None, options=None):
        first = super().reset(seed=seed)
        self.length, self.truncates = int(self.np_random.integers(1, 6)), bool(self.np_random.random() < 0.5)
        return first

    def observe(self):
        return float(self.np_random.uniform(-1, 1))

    def reward(self, action):
        return float(self.np_random.normal())


class Endless(RewardFromActionAndObs):
    """The same, and it never ends."""

    length = 10**9


class CutOff(RewardFromActionAndObs):
    """The same, cut off after each step. What is seen last is neither -1 nor 1."""

    truncates = True

    def observe(self):
        return 0.2 if self.t == self.length else super().observe()


class OneArray(CutOff):
    """The same, with every observation written into one array, as environments do that save memory."""

    array = np.zeros(1, np.float32)

    def reset(self, *, seed=None, options=None):
        self.array[:], infos = super().reset(seed=seed)
        return self.array, infos

    def step(self, action):
        self.array[:], *outcome = super().step(action)
        return self.array, *outcome


PROBES = {}
for probe in (
    ConstantReward,
    RewardFromObs,
    DelayedReward,
    RewardFromAction,
    RewardFromActionAndObs,
    TruncatedEndless,
    Mixed,
    OneArray,
):
    PROBES[probe.__name__] = f"Probe{probe.__name__}-v0"
    gym.register(PROBES[probe.__name__], entry_point=probe)


class InFrames(gym.vector.VectorEnv):
    """N probes seen as Atari games are: an observation from -1 to 1 is a frame from black to white, 4 of them a stack.

    infos["raw_rewards"] is ten times the reward; with `life_lost`, every step that ends no game costs a life.
    """

    metadata = {"autoreset_mode": AutoresetMode.SAME_STEP}  # noqa: RUF012

    def __init__(self, probe, num_envs, life_lost=False):
        self.num_envs, self.life_lost = num_envs, life_lost
        self.envs = [probe() for _ in range(num_envs)]
        self.stacks = np.zeros((num_envs, 4, 84, 84), np.uint8)
        self.single_observation_space = gym.spaces.Box(0, 255, (4, 84, 84), np.uint8)
        self.single_action_space = gym.spaces.Discrete(2)

    def show(self, n, obs, first):
        """Game n's stack with `obs` as its newest frame."""
        self.stacks[n, :-1] = 0 if first else self.stacks[n, 1:]
        self.stacks[n, -1] = round(127.5 * (obs.item() + 1))

    def reset(self, *, seed=None, options=None):
        for n, env in enumerate(self.envs):
            self.show(n, env.reset(seed=(seed or 0) + n)[0], first=True)
        return self.stacks.copy(), {}

    def step(self, actions):
        rewards, terminated, truncated = np.zeros(self.num_envs), *np.zeros((2, self.num_envs), bool)
        final_obs = np.zeros_like(self.stacks)
        for n, env in enumerate(self.envs):
            obs, rewards[n], terminated[n], truncated[n], _ = env.step(actions[n])
            self.show(n, obs, first=False)
            if terminated[n] or truncated[n]:
                final_obs[n] = self.stacks[n]
                self.show(n, env.reset()[0], first=True)
        lost = self.life_lost & ~(terminated | truncated)
        infos = {"raw_rewards": 10 * rewards, "life_lost": lost, "final_obs": final_obs}
        return self.stacks.copy(), rewards, terminated, truncated, infos


def play_in_frames(monkeypatch, module, probe, life_lost=False):
    """From now on, the games that an Atari script makes are these."""
    monkeypatch.setattr(module, "make_envs", lambda args, n, seed, training: InFrames(probe, n, life_lost))


def stack(*observations):
    """What is seen after these observations of one game, as InFrames shows it: (1, 4, 84, 84) uint8."""
    gray = np.zeros(4)
    gray[4 - len(observations) :] = 127.5 * (np.array(observations) + 1)
    return np.broadcast_to(gray.round().astype(np.uint8)[:, None, None], (4, 84, 84))[None].copy()
