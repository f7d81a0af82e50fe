"""Steps per second of training commands, run in turn on one machine, and the ratio of the first to each of the others.

    python benchmarks/speed.py --start 4000 --stop 8000 "python dqn_atari.py ..." "python /path/to/another.py ..."

Each command runs in an empty folder. The clock is that of its TensorBoard events: any program that writes charts/SPS
can be compared. Only steps --start to --stop count, so that imports, the first fill of a replay buffer and warming up
do not. Leave the machine alone meanwhile.
"""

import shlex
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import tyro
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

ROOT = Path(__file__).resolve().parents[1]


@dataclass
class Args:
    commands: tyro.conf.Positional[list[str]]  # each quoted; `python x.py` is this Python, x.py one of the project's
    start: int = 4000  # first step that counts
    stop: int = 8000  # last step that counts; the command must go a little further
    rounds: int = 3  # how often each command runs


def steps_per_second(command, start, stop):
    """Run a command, and read the rate between two steps from the times of its charts/SPS events."""
    words = shlex.split(command)
    if words[0] == "python":
        words[0] = sys.executable
    words = [str(ROOT / word) if (ROOT / word).is_file() else word for word in words]
    with tempfile.TemporaryDirectory() as folder:
        done = subprocess.run(words, cwd=folder, capture_output=True, text=True)
        if done.returncode:
            sys.exit(f"{command} failed:\n{done.stderr[-2000:]}")
        (file,) = Path(folder).rglob("events.*")
        events = EventAccumulator(str(file), size_guidance={"scalars": 0}).Reload().Scalars("charts/SPS")
    events = [event for event in events if start <= event.step <= stop]
    return (events[-1].step - events[0].step) / (events[-1].wall_time - events[0].wall_time)


def main(args):
    rates = np.zeros((args.rounds, len(args.commands)))
    for i in range(args.rounds):
        for j, command in enumerate(args.commands):
            rates[i, j] = steps_per_second(command, args.start, args.stop)
            print(f"round {i + 1} of {args.rounds}: {rates[i, j]:7.1f} steps/s  {command}", flush=True)
    for j, command in enumerate(args.commands):
        ratio = np.median(rates[:, 0] / rates[:, j])
        print(f"median {np.median(rates[:, j]):7.1f} steps/s, the first is {ratio:.2f} times as fast  {command}")


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
