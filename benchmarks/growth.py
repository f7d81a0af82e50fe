"""How cost grows: with the number of games, with the number of steps, with the episodes of an evaluation.

    python benchmarks/growth.py games                  # ppo_atari.py with 1 to 256 games: steps/s, and where time goes
    python benchmarks/growth.py steps                  # seconds and memory of ever longer runs
    python benchmarks/growth.py evaluation runs/<run>  # evaluate.py, with 1 to 32 environments

Each prints a table. The replay buffer's own is dqn_parts.py; two processes against one, speed.py with torchrun.
"""

import contextlib
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import tyro
from clock import Clock
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import ppo_atari

ROOT = Path(__file__).resolve().parents[1]


def games(env_id: str = "PongNoFrameskip-v4", num_steps: int = 32, updates: int = 4, cuda: bool = False):
    """Train for some `updates` of `num_steps` steps per game, of which the first does not count, and time the parts."""
    clock = Clock(cuda)
    clock.time("environment", ppo_atari.AtariGames, "step")
    clock.time("network, to act", ppo_atari.Agent, "forward")
    clock.time("update", ppo_atari, "ppo_update")
    update = ppo_atari.ppo_update

    def first_update(*args, **kwargs):
        ppo_atari.ppo_update = update
        result = update(*args, **kwargs)
        clock.start()
        return result

    print("| games | steps/s | environment | network, to act | update | else | memory |\n|---|---|---|---|---|---|---|")
    for num_envs in (1, 2, 4, 8, 16, 32, 64, 128, 256):
        ppo_atari.ppo_update = first_update
        steps = num_envs * num_steps
        with tempfile.TemporaryDirectory() as folder:
            sizes = dict(num_envs=num_envs, num_steps=num_steps, total_timesteps=updates * steps)
            with contextlib.redirect_stdout(sys.stderr):
                ppo_atari.train(ppo_atari.Args(env_id=env_id, cuda=cuda, run_dir=f"{folder}/run", **sizes))
        total = clock.stop()
        parts = [clock.seconds[part] / total for part in ("environment", "network, to act", "update")]
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
        shares = " | ".join(f"{part:.0%}" for part in [*parts, 1 - sum(parts)])
        print(f"| {num_envs} | {(updates - 1) * steps / total:.0f} | {shares} | {peak:.2f} GB |", flush=True)


def measure(command, folder):
    """Seconds and peak memory in GB of a command and the processes that it starts."""
    start = time.perf_counter()
    process = subprocess.Popen(command, cwd=folder, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        sys.exit(f"growth.py: this command failed: {' '.join(map(str, command))}")
    return time.perf_counter() - start, usage.ru_maxrss / 1e6


def steps():
    """Runs of one script that differ in --total-timesteps alone."""
    runs = [("ppo_cartpole.py", n, "") for n in (5_000, 20_000, 80_000, 320_000)]
    runs += [("ppo_atari.py", n, "--no-cuda") for n in (1_024, 4_096, 16_384, 32_768)]
    print("| script | steps | seconds | peak memory |\n|---|---|---|---|")
    for script, n, flags in tqdm(runs, unit=" runs"):
        with tempfile.TemporaryDirectory() as folder:
            command = [sys.executable, ROOT / script, "--total-timesteps", str(n), *flags.split()]
            seconds, memory = measure(command, folder)
        print(f"| `{script}` | {n:,} | {seconds:.1f} | {memory:.2f} GB |", flush=True)


def evaluation(run: tyro.conf.Positional[Path], episodes: int = 32):
    """Score `run` with ever more environments side by side."""
    print("| environments | seconds | steps/s | peak memory |\n|---|---|---|---|")
    for num_envs in (1, 2, 4, 8, 16, 32):
        with tempfile.TemporaryDirectory() as folder:
            command = [sys.executable, ROOT / "evaluate.py", run.resolve(), "--episodes", str(episodes)]
            command += ["--num-envs", str(num_envs), "--json", "score.json"]
            seconds, memory = measure(command, folder)
            played = sum(json.loads((Path(folder) / "score.json").read_text())["lengths"])
        print(f"| {num_envs} | {seconds:.1f} | {played / seconds:.0f} | {memory:.2f} GB |", flush=True)


if __name__ == "__main__":
    commands = {"games": games, "steps": steps, "evaluation": evaluation}
    tyro.extras.subcommand_cli_from_dict(commands, description=__doc__)
