"""The table and the picture of docs/environments.md: vector environments compared, and what the Atari agent sees.

    pip install -r benchmarks/requirements.txt
    python benchmarks/environments.py speed
    python benchmarks/environments.py picture --out docs/images/atari_observation.png

Kinds of vector environment take turns, so that they are compared at the same speed of the machine.
"""

import sys
import time
from pathlib import Path

import ale_py
import gymnasium as gym
import matplotlib
import numpy as np
import tyro
from ale_py.vector_env import AtariVectorEnv
from gymnasium.vector import AsyncVectorEnv, AutoresetMode, SyncVectorEnv
from gymnasium.wrappers import AtariPreprocessing, FrameStackObservation

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import ppo_atari

matplotlib.use("Agg")
from matplotlib import pyplot

gym.register_envs(ale_py)


def pong():
    """One game of Pong behind Gymnasium's own wrappers: frames as AtariGames makes them, in Python."""
    return FrameStackObservation(AtariPreprocessing(gym.make("PongNoFrameskip-v4"), noop_max=30), 4)


def cartpole():
    return gym.make("CartPole-v1")


MAKERS = {
    "CartPole": {
        "SyncVectorEnv": lambda n: SyncVectorEnv([cartpole] * n, autoreset_mode=AutoresetMode.SAME_STEP),
        "AsyncVectorEnv": lambda n: AsyncVectorEnv([cartpole] * n, autoreset_mode=AutoresetMode.SAME_STEP),
        "native": lambda n: gym.make_vec("CartPole-v1", n, vectorization_mode="vector_entry_point"),
    },
    "Pong": {
        "SyncVectorEnv": lambda n: SyncVectorEnv([pong] * n, autoreset_mode=AutoresetMode.SAME_STEP),
        "AsyncVectorEnv": lambda n: AsyncVectorEnv([pong] * n, autoreset_mode=AutoresetMode.SAME_STEP),
        "native": lambda n: AtariVectorEnv("pong", n, autoreset_mode=AutoresetMode.SAME_STEP),
    },
}


def rate(envs, seconds):
    """Steps per second with random actions, all environments together."""
    envs.reset(seed=1)
    actions = np.random.default_rng(1).integers(0, envs.single_action_space.n, (1000, envs.num_envs))
    start, steps = time.perf_counter(), 0
    while time.perf_counter() < start + seconds:
        envs.step(actions[steps % 1000])
        steps += 1
    return steps * envs.num_envs / (time.perf_counter() - start)


def speed(seconds: float = 1.0, rounds: int = 5):
    """Steps per second of each kind. `seconds`: of a turn; `rounds`: turns of each, of which the median counts."""
    print("| environment | how many | " + " | ".join(MAKERS["Pong"]) + " |\n|---|---|---|---|---|")
    for game, kinds in MAKERS.items():
        for n in (1, 8, 64):
            made = [make(n) for make in kinds.values()]
            rates = [[rate(envs, seconds) for envs in made] for _ in range(rounds)]
            for envs in made:
                envs.close()
            print(f"| {game} | {n} | " + " | ".join(f"{x:,.0f}" for x in np.median(rates, 0)) + " |", flush=True)


def picture(out: Path = Path("atari_observation.png"), env_id: str = "BreakoutNoFrameskip-v4", steps: int = 10):
    """Draw a frame as the console shows it after some random `steps`, and the four that the agent sees then."""
    envs = ppo_atari.make_envs(ppo_atari.Args(env_id=env_id), 1, seed=1, training=False, render=True)
    obs, _ = envs.reset()
    rng = np.random.default_rng(0)
    for _ in range(steps):
        obs, *_ = envs.step(rng.integers(0, envs.single_action_space.n, 1))
    figure, panels = pyplot.subplots(1, 5, figsize=(12, 3), layout="constrained")
    panels[0].imshow(envs.render()[0])
    panels[0].set_title("210 × 160, color")
    for i, axes in enumerate(panels[1:]):
        axes.imshow(obs[0, i], cmap="gray", vmin=0, vmax=255)
        axes.set_title(f"obs[0, {i}]: {['3 steps ago', '2 steps ago', '1 step ago', 'now'][i]}")
    for axes in panels:
        axes.set(xticks=[], yticks=[])
    figure.savefig(out, dpi=90)
    print(out)


if __name__ == "__main__":
    tyro.extras.subcommand_cli_from_dict({"speed": speed, "picture": picture}, description=__doc__)
