"""Draw the learning curves of runs, without opening TensorBoard.

    pip install -r benchmarks/requirements.txt
    python benchmarks/plot.py runs/<run> --out curve.png
    python benchmarks/plot.py runs/<seed 1> runs/<seed 2> runs/<seed 3> --mean --out curve.png --csv curve.csv
    python benchmarks/plot.py benchmarks/curves_cartpole.csv --mean --lines "most there is=500"

A curve is the running mean of the returns of training episodes. --mean draws one curve for all runs, the mean over
them, in a band: the 95% bootstrap interval of that mean. --csv keeps the curves in a small file, which can be drawn
again when the runs are gone.
"""

import csv
import sys
from dataclasses import dataclass, field
from pathlib import Path

import matplotlib
import numpy as np
import tyro
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

matplotlib.use("Agg")  # draws into files, also where there is no display
from matplotlib import pyplot


@dataclass
class Args:
    runs: tyro.conf.Positional[list[Path]]  # run folders, or files that --csv has written
    out: Path = Path("curve.png")  # the picture: .png, .svg or .pdf
    tag: str = "charts/episodic_return"  # another one that TensorBoard shows, as losses/entropy
    window: int = 20  # points that are averaged; 1 shows each as it is
    mean: bool = False  # one curve for all runs, with its 95% interval
    title: str | None = None  # above the picture
    lines: list[str] = field(default_factory=list)  # to compare with: "name=value"
    csv: Path | None = None  # also write the curves here, 200 points each


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


def load(path, args):
    """Curves by name: (steps, values), each (T,)."""
    if not path.exists():
        sys.exit(f"plot.py: {path} does not exist.")
    if path.suffix != ".csv":
        return {path.resolve().name: running_mean(path, args.tag, args.window)}
    with open(path, newline="") as file:
        rows = list(csv.DictReader(file))
    if not rows or not {"run", "step", "value"} <= rows[0].keys():
        sys.exit(f"plot.py: {path} has no curves: name run folders, or what --csv has written.")
    names = dict.fromkeys(row["run"] for row in rows)
    points = {name: [(float(row["step"]), float(row["value"])) for row in rows if row["run"] == name] for name in names}
    return {name: np.array(points[name]).T for name in names}


def save(curves, path):
    with open(path, "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["run", "step", "value"])
        for name, (steps, values) in curves.items():
            for i in np.unique(np.linspace(0, len(steps) - 1, 200).astype(int)):
                writer.writerow([name, int(steps[i]), round(float(values[i]), 3)])


def main(args):
    if not args.runs or (args.csv and not args.csv.parent.is_dir()):
        sys.exit("plot.py: name at least one run, and --csv in a folder that exists.")
    for line in args.lines:
        try:
            float(line.rpartition("=")[2])
        except ValueError:
            sys.exit(f'plot.py: --lines takes "name=number", not "{line}".')
    if args.window < 1 or args.out.suffix not in (".png", ".svg", ".pdf") or not args.out.parent.is_dir():
        sys.exit("plot.py: --window must be at least 1, and --out a .png, .svg or .pdf in a folder that exists.")
    curves = {}
    for path in args.runs:
        for name, curve in load(path, args).items():
            folder = path.stem if path.suffix == ".csv" else path.resolve().parent.name
            name = f"{folder}/{name}" if name in curves else name
            if name in curves:
                sys.exit(f"plot.py: two curves are called {name}: rename a folder.")
            curves[name] = curve
    if args.csv:
        save(curves, args.csv)
    figure, axes = pyplot.subplots(figsize=(7, 4), layout="constrained")
    if args.mean:
        begin, end = max(steps[0] for steps, _ in curves.values()), min(steps[-1] for steps, _ in curves.values())
        grid = np.linspace(begin, end, 300)
        values = np.stack([np.interp(grid, *curve) for curve in curves.values()])  # (runs, 300)
        picks = np.random.default_rng(0).integers(len(values), size=(2000, len(values)))
        low, high = np.percentile(values[picks].mean(1), [2.5, 97.5], axis=0)
        interval = ", 95% interval" if len(values) > 1 else ""
        axes.plot(grid, values.mean(0), label=f"mean of {len(values)} runs{interval}")
        axes.fill_between(grid, low, high, alpha=0.3)
    else:
        for name, curve in curves.items():
            axes.plot(*curve, label=name)
    for i, line in enumerate(args.lines):
        name, _, value = line.rpartition("=")
        color = f"C{i + (1 if args.mean else len(curves))}"  # the next that no curve has
        axes.axhline(float(value), linestyle="--", linewidth=1, color=color, label=name)
    axes.set(xlabel="steps", ylabel=f"{args.tag}, mean of {args.window}", title=args.title)
    axes.xaxis.set_major_formatter(matplotlib.ticker.EngFormatter())
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(args.out, dpi=150)
    print(f"{args.out}: {len(curves)} runs")


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
