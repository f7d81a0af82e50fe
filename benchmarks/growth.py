"""How cost grows: with the number of games, with the number of steps, with the episodes of an evaluation.

    pip install -r benchmarks/requirements.txt
    python benchmarks/growth.py games                  # ppo_atari.py with 1 to 256 games: steps/s, and where time goes
    python benchmarks/growth.py steps                  # seconds and memory of ever longer runs
    python benchmarks/growth.py evaluation runs/<run>  # evaluate.py, with 1 to 32 environments

Each prints a table; with --out NAME it also writes NAME.csv and draws NAME.png. replay_buffer.py measures the replay
buffer. For two processes against one, give speed.py a command with torchrun.
"""

import contextlib
import csv
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
from plot import pyplot
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import ppo_atari

ROOT = Path(__file__).resolve().parents[1]


def show(rows):
    """Print the newest of `rows`, dicts with the same keys, as a line of a table; above the first, their keys."""
    if len(rows) == 1:
        print(f"| {' | '.join(rows[0])} |\n|{'---|' * len(rows[0])}")
    print(f"| {' | '.join(f'{x:,}' if isinstance(x, int) else str(x) for x in rows[-1].values())} |", flush=True)


def check(out):
    """Refuse a place that cannot be written before the work, not after it."""
    if out and not out.parent.is_dir():
        sys.exit(f"growth.py: --out {out} must be in a folder that exists.")


def save(rows, out, x, panels, lines=None):
    """Write `rows` to out.csv and draw out.png, a panel for each column of `panels`, a line per value of `lines`."""
    with open(f"{out}.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    figure, axes = pyplot.subplots(1, len(panels), figsize=(4 * len(panels), 3), layout="constrained")
    for axis, panel in zip(axes, panels, strict=True):
        for name in dict.fromkeys(row.get(lines) for row in rows):
            line = [row for row in rows if row.get(lines) == name]
            axis.plot([row[x] for row in line], [row[panel] for row in line], marker="o", label=name)
        axis.set(xlabel=x, ylabel=panel, xscale="log")
        if panel == "seconds":
            axis.set(yscale="log")  # where cost is proportional, a straight line
        else:
            axis.set(ylim=(0, None))
        if lines:
            axis.legend()
    figure.savefig(f"{out}.png", dpi=100)


def games(out: Path | None = None):
    """Learn Pong, for 4 updates of 32 steps per game. Time the parts from the end of the first update on."""
    check(out)
    num_steps, updates, calls, total = 32, 4, 0, 0.0
    clock = Clock(cuda=False)
    clock.time("environment", ppo_atari.AtariGames, "step")
    clock.time("network, to act", ppo_atari.Agent, "forward")
    clock.time("update", ppo_atari, "ppo_update")
    update = ppo_atari.ppo_update

    def update_and_count(*args, **kwargs):
        nonlocal calls, total
        result, calls = update(*args, **kwargs), calls + 1
        if calls == updates:
            total = clock.stop()
        elif calls == 1:
            clock.start()
        return result

    ppo_atari.ppo_update = update_and_count
    rows = []
    for num_envs in (1, 2, 4, 8, 16, 32, 64, 128, 256):
        steps, calls = num_envs * num_steps, 0
        with tempfile.TemporaryDirectory() as folder:
            sizes = dict(num_envs=num_envs, num_steps=num_steps, total_timesteps=updates * steps)
            with contextlib.redirect_stdout(sys.stderr):
                pong = ppo_atari.Args(env_id="PongNoFrameskip-v4", cuda=False, run_dir=f"{folder}/run", **sizes)
                if ppo_atari.train(pong) != 0:
                    sys.exit("growth.py: stopped.")
        row = {"games": num_envs, "steps/s": round((updates - 1) * steps / total)}
        for part in ("environment", "network, to act", "update"):
            row[f"{part}, %"] = round(100 * clock.seconds[part] / total)
        row["peak memory, GB"] = gigabytes(resource.getrusage(resource.RUSAGE_SELF))
        rows.append(row)
        show(rows)
    if out:
        save(rows, out, "games", ["steps/s", "update, %", "peak memory, GB"])


def gigabytes(usage):
    """Peak memory. Linux counts in kibibytes; of a child, no less than its parent had when it started it."""
    return round(usage.ru_maxrss * 1024 / 1e9, 2)


def measure(command, folder):
    """Seconds and peak memory in GB of a command."""
    start = time.perf_counter()
    with tempfile.TemporaryFile("w+") as output:
        process = subprocess.Popen(command, cwd=folder, stdout=subprocess.DEVNULL, stderr=output)
        _, status, usage = os.wait4(process.pid, 0)
        seconds = time.perf_counter() - start
        if status:
            output.seek(0)
            sys.exit(f"growth.py: this command failed: {' '.join(map(str, command))}\n{output.read()[-2000:]}")
    return round(seconds, 1), gigabytes(usage)


def steps(out: Path | None = None):
    """Runs of each script that differ in --total-timesteps alone."""
    check(out)
    runs = [("ppo_cartpole.py", n, "") for n in (5_000, 20_000, 80_000, 320_000)]
    runs += [("ppo_atari.py", n, "--no-cuda") for n in (1_024, 4_096, 16_384, 32_768)]
    dqn = "--no-cuda --learning-starts 500 --buffer-size 50000 --exploration-fraction 0.5"
    runs += [("dqn_atari.py", n, dqn) for n in (1_024, 4_096, 8_192)]
    rows = []
    for script, n, flags in tqdm(runs, unit=" runs"):
        with tempfile.TemporaryDirectory() as folder:
            command = [sys.executable, ROOT / script, "--total-timesteps", str(n), *flags.split()]
            seconds, memory = measure(command, folder)
        rows.append({"script": script, "steps": n, "seconds": seconds, "peak memory, GB": memory})
        show(rows)
    if out:
        save(rows, out, "steps", ["seconds", "peak memory, GB"], lines="script")


def evaluation(run: tyro.conf.Positional[Path], episodes: int = 32, out: Path | None = None):
    """Score `run` with ever more environments side by side."""
    check(out)
    rows = []
    for num_envs in filter(lambda count: count <= episodes, (1, 2, 4, 8, 16, 32)):
        with tempfile.TemporaryDirectory() as folder:
            command = [sys.executable, ROOT / "evaluate.py", run.resolve(), "--episodes", str(episodes)]
            command += ["--num-envs", str(num_envs), "--json", "score.json"]
            seconds, memory = measure(command, folder)
            played = sum(json.loads((Path(folder) / "score.json").read_text())["lengths"])
        row = {"environments": num_envs, "seconds": seconds, "steps/s": round(played / seconds)}
        rows.append(row | {"peak memory, GB": memory})
        show(rows)
    if out:
        save(rows, out, "environments", ["seconds", "steps/s"])


if __name__ == "__main__":
    commands = {"games": games, "steps": steps, "evaluation": evaluation}
    tyro.extras.subcommand_cli_from_dict(commands, description=__doc__)
