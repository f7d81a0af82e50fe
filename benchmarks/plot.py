"""Draw the learning curves of runs, without opening TensorBoard.

    pip install -r benchmarks/requirements.txt
    python benchmarks/plot.py runs/<run> --out curve.png
    python benchmarks/plot.py runs/<seed 1> runs/<seed 2> runs/<seed 3> --mean --out curve.png

A curve is the running mean of the returns of training episodes. --mean draws one curve for all runs, the mean over
them, in a band: the 95% bootstrap interval of that mean.
"""

import sys
from dataclasses import dataclass
from pathlib import Path

import matplotlib
import numpy as np
import tyro
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

matplotlib.use("Agg")  # draws into files, also where there is no display
from matplotlib import pyplot


@dataclass
class Args:
    runs: tyro.conf.Positional[list[Path]]  # run folders
    out: Path = Path("curve.png")  # the picture: .png, .svg or .pdf
    tag: str = "charts/episodic_return"  # another one that TensorBoard shows, as losses/entropy
    window: int = 20  # points that are averaged; 1 shows each as it is
    mean: bool = False  # one curve for all runs, with its 95% interval
    title: str | None = None  # above the picture


def running_mean(run, tag, window):
    """Steps and running mean of a tag, each (T,)."""
    events = EventAccumulator(str(run), size_guidance={"scalars": 0}).Reload()
    if tag not in events.Tags()["scalars"]:
        sys.exit(f"plot.py: {run} has no {tag}; it has {', '.join(events.Tags()['scalars']) or 'no curves at all'}.")
    points = events.Scalars(tag)
    if len(points) < window:
        sys.exit(f"plot.py: {run} has {len(points)} points of {tag}, fewer than --window {window}.")
    means = np.convolve([point.value for point in points], np.ones(window) / window, mode="valid")
    return np.array([point.step for point in points])[window - 1 :], means


def main(args):
    curves = [running_mean(run, args.tag, args.window) for run in args.runs]
    figure, axes = pyplot.subplots(figsize=(7, 4), layout="constrained")
    if args.mean:
        grid = np.linspace(max(steps[0] for steps, _ in curves), min(steps[-1] for steps, _ in curves), 300)
        values = np.stack([np.interp(grid, *curve) for curve in curves])  # (runs, 300)
        picks = np.random.default_rng(0).integers(len(values), size=(2000, len(values)))
        low, high = np.percentile(values[picks].mean(1), [2.5, 97.5], axis=0)
        axes.plot(grid, values.mean(0), label=f"mean of {len(values)} runs, 95% interval")
        axes.fill_between(grid, low, high, alpha=0.3)
    else:
        for run, curve in zip(args.runs, curves, strict=True):
            axes.plot(*curve, label=run.resolve().name)
    axes.set(xlabel="steps", ylabel=f"{args.tag}, mean of {args.window}", title=args.title)
    axes.xaxis.set_major_formatter(matplotlib.ticker.EngFormatter())
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(args.out, dpi=150)
    print(f"{args.out}: {len(curves)} runs")


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
