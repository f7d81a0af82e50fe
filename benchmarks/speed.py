"""Steps per second and memory of training commands on one machine, and how many times as fast the first ones are.

    pip install -r benchmarks/requirements.txt
    python benchmarks/speed.py "python ppo_atari.py --no-cuda" "python /path/to/another.py"

A machine's speed changes from minute to minute, so the commands take turns: each runs for --seconds while the others
are stopped (SIGSTOP; not on Windows), and the ratios are those of turns that are neighbors in time. Each command runs
in an empty folder. The clock is that of its TensorBoard events: any program that writes charts/SPS can be compared.
Each command must last for all its turns. Afterwards it is killed. Leave the machine alone meanwhile.
"""

import contextlib
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import psutil
import tyro
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tqdm import tqdm

ROOT = Path(__file__).resolve().parents[1]


@dataclass
class Args:
    commands: tyro.conf.Positional[list[str]]  # each quoted; python and torchrun are of this environment
    warmup: float = 40.0  # seconds of each command before its first turn: imports, a first fill of a replay buffer
    seconds: float = 40.0  # of a turn, in which a command must log several points of its curves
    rounds: int = 6  # turns of each command
    ours: int = 1  # how many of the commands, from the first on, are compared with all that follow


class Run:
    """A training command that stands still until it is its turn."""

    def __init__(self, command, folder, ours=False):
        words = shlex.split(command)
        beside = Path(sys.executable).parent / words[0]  # python or torchrun of this environment
        words[0] = str(beside if beside.exists() else words[0])
        words = [str(ROOT / word) if (ROOT / word).is_file() else word for word in words]
        self.command, self.folder, self.ours, self.turns, self.memory = command, Path(folder), ours, [], 0
        self.output = open(self.folder / "output.txt", "w")
        output = dict(stdout=self.output, stderr=subprocess.STDOUT)
        self.process = subprocess.Popen(words, cwd=folder, **output, start_new_session=True)  # Ctrl-C is ours alone
        self.signal(signal.SIGSTOP)

    def processes(self):
        """The command and all that it started: torchrun's processes are in groups of their own."""
        with contextlib.suppress(psutil.NoSuchProcess):
            process = psutil.Process(self.process.pid)
            return [process, *process.children(recursive=True)]
        return []

    def signal(self, number):
        for process in self.processes():
            with contextlib.suppress(psutil.NoSuchProcess):
                process.send_signal(number)

    def turn(self, seconds):
        """Let it go on for a while. Returns when that began and ended; None if it is over, which must not happen."""
        begin = time.time()
        self.signal(signal.SIGCONT)
        time.sleep(seconds)
        if self.process.poll() is not None:
            return None
        self.signal(signal.SIGSTOP)
        with contextlib.suppress(psutil.NoSuchProcess):  # pages that processes share count for each
            self.memory = max(self.memory, sum(process.memory_info().rss for process in self.processes()))
        return begin, time.time()

    def rates(self):
        """Steps per second of each turn: from the first to the last point that the command logged in it.

        RuntimeError: there are not enough points.
        """
        events, deadline = [], time.monotonic() + 180
        while not events or events[-1].wall_time < self.turns[-1][1]:
            ended = self.turn(5) is None  # TensorBoard's writer holds events back for up to two minutes
            for file in self.folder.rglob("events.*"):
                curves = EventAccumulator(str(file), size_guidance={"scalars": 0}).Reload()
                events = curves.Scalars("charts/SPS") if "charts/SPS" in curves.Tags()["scalars"] else events
            if ended or time.monotonic() > deadline:
                break
        rates = []
        for begin, end in self.turns:
            points = [event for event in events if begin <= event.wall_time <= end]
            if len(points) < 2:
                advice = "take more --seconds" if events else "it wrote none at all"
                raise RuntimeError(f"fewer than two points of charts/SPS in a turn; {advice}")
            first, last = points[0], points[-1]
            rates.append((last.step - first.step) / (last.wall_time - first.wall_time))
        return rates

    def end(self, reason):
        """Kill it, and say why, with what it wrote last."""
        self.signal(signal.SIGKILL)
        output = (self.folder / "output.txt").read_text()[-2000:]
        tqdm.write(f"left out, {reason}: {self.command}\n{output}", file=sys.stderr)


def quartiles(values, digits):
    low, median, high = (f"{value:,.{digits}f}" for value in np.percentile(values, [25, 50, 75]))
    return f"{median} ({low} to {high})"


def main(args):
    for number in (signal.SIGTERM, getattr(signal, "SIGHUP", signal.SIGTERM)):
        if signal.getsignal(number) != signal.SIG_IGN:  # as nohup sets it
            signal.signal(number, lambda *_: sys.exit(143))  # or the commands, in groups of their own, would go on
    with contextlib.ExitStack() as stack:
        runs = []
        for i, command in enumerate(args.commands):
            run = Run(command, stack.enter_context(tempfile.TemporaryDirectory()), i < args.ours)
            stack.callback(run.signal, signal.SIGKILL)
            runs.append(run)
        turns = [(run, args.warmup, False) for run in runs] + [(run, args.seconds, True) for run in runs] * args.rounds
        bar = tqdm(total=sum(seconds for _, seconds, _ in turns), bar_format="{percentage:3.0f}%: {remaining} left")
        for run, seconds, counts in turns:
            if run not in runs:
                continue
            turn = run.turn(seconds)
            if turn is None:
                runs.remove(run)
                run.end("as it ended before its turns did")
                if not any(run.ours for run in runs):
                    sys.exit("speed.py: there is nothing left to compare with the others.")
            elif counts:
                run.turns.append(turn)
            bar.update(seconds)
        bar.close()
        rates = []  # (commands, rounds)
        for run in runs[:]:
            try:
                rates.append(np.array(run.rates()))
            except RuntimeError as error:
                runs.remove(run)
                run.end(error)
    if not runs:
        sys.exit("speed.py: no command that can be measured.")
    print("steps/s: median (quartiles) of the turns; GB: the most at the end of a turn; then, how many times as fast")
    for i, (run, rate) in enumerate(zip(runs, rates, strict=True)):
        print(f"{quartiles(rate, 1)} steps/s, {run.memory / 1e9:.2f} GB: {run.command}")
        for other, its_rate in zip(runs[:i], rates[:i], strict=True):
            if other.ours:
                print(f"    {quartiles(its_rate / rate, 2)} times as fast: {other.command}")


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
