"""The replay buffer of dqn_atari.py against one that stores every stack whole."""

import numpy as np
import pytest

from dqn_atari import ReplayBuffer

STACK = 4


class Games:
    """N games of random length whose frames are numbered, so that no two are alike; they end in every way there is."""

    def __init__(self, num_envs, random, ends):
        self.num_envs, self.random, self.ends, self.number = num_envs, random, ends, 0
        self.obs = np.stack([self.start() for _ in range(num_envs)])

    def frame(self):
        self.number += 1
        return np.frombuffer(np.uint32(self.number).tobytes(), np.uint8).reshape(2, 2)

    def start(self):
        return np.concatenate([np.zeros((STACK - 1, 2, 2), np.uint8), self.frame()[None]])

    def step(self):
        """What ReplayBuffer.add takes, and the N transitions as whole stacks."""
        N = self.num_envs
        actions, rewards = self.random.integers(0, 6, N), self.random.integers(-1, 2, N)
        kinds = self.random.choice(["on", "terminated", "truncated", "life_lost"], N, p=[1 - sum(self.ends), *self.ends])
        seen_next = np.stack([np.concatenate([obs[1:], self.frame()[None]]) for obs in self.obs])
        terminated, ended = np.isin(kinds, ["terminated", "life_lost"]), np.isin(kinds, ["terminated", "truncated"])
        transitions = [
            (self.obs[n].tobytes(), seen_next[n].tobytes(), actions[n], rewards[n], terminated[n]) for n in range(N)
        ]
        cut_off = {n: seen_next[n] for n in np.flatnonzero(kinds == "truncated")}
        self.obs = np.stack([self.start() if ended[n] else seen_next[n] for n in range(N)])
        return (actions, rewards, terminated, ended, cut_off, self.obs), transitions


@pytest.mark.parametrize("seed", range(40))
def test_it_samples_what_a_buffer_of_whole_stacks_holds(seed):
    """Every transition among the last `capacity`, and no other; stacks and next stacks as the agent saw them."""
    random = np.random.default_rng(seed)
    num_envs, rows = random.integers(1, 5), random.integers(1, 60)
    capacity = int(rows * num_envs + random.integers(0, num_envs))  # what is no multiple is rounded down
    games = Games(num_envs, random, random.dirichlet([1, 1, 1]) * random.choice([0.02, 0.2, 0.9]))
    buffer, stored = ReplayBuffer(capacity, games.obs), []
    for step in range(1, 300):
        added, transitions = games.step()
        buffer.add(*added)
        stored = (stored + transitions)[-rows * num_envs :]
        if step in (1, 2, 3, 5, 20, 59, 60, 61, 63, 64, 65, 122, 299):
            frames, actions, rewards, terminated = (x.numpy() for x in buffer.sample(40 * len(stored)))
            sampled = set()
            for stack, action, reward, end in zip(frames, actions, rewards, terminated, strict=True):
                next_stack = stack[1:].tobytes()
                found = [row for row in stored if row[0] == stack[:-1].tobytes()]
                assert len(found) == 1
                assert found[0][2:] == (action, reward, end)
                assert end or found[0][1] == next_stack  # nobody looks at what follows an end
                sampled.add(stack[:-1].tobytes())
            if len(stored) < 100:
                assert len(sampled) == len(stored)  # a miss has a chance below 1e-14
