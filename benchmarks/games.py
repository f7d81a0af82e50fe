"""The table and the picture of several games, from what seeds.py and plot.py have written of each.

    python benchmarks/games.py benchmarks/hour/*.csv --out hour.png

A file holds the runs of one game, a row per seed. Prints a line per game, and the interquartile mean of the
human-normalized scores: the mean of the middle half of all runs, with its 95% interval over the seeds (Agarwal et al.
2021, arXiv 2108.13264, section 4). The interval speaks of these games alone, and is too narrow for few seeds. --out
draws the curves, from the files of the same names in the folder `curves`.
"""

import csv
import sys
from dataclasses import dataclass
from pathlib import Path

import matplotlib
import numpy as np
import plot
import tyro
from plot import pyplot


@dataclass
class Args:
    files: tyro.conf.Positional[list[Path]]  # of seeds.py, one for each game
    out: Path | None = None  # the picture: .png, .svg or .pdf


def interquartile_mean(scores):
    """Mean of the middle half of all runs: (..., seeds, games) to (...). As rliable has it, 18 runs keep 10."""
    runs = np.sort(scores.reshape(*scores.shape[:-2], -1))
    cut = runs.shape[-1] // 4
    return runs[..., cut : runs.shape[-1] - cut].mean(-1)


def interval(scores, resamples=10_000):
    """95% bootstrap interval of the interquartile mean. Seeds are drawn anew within each game: (seeds, games)."""
    picks = np.random.default_rng(0).integers(len(scores), size=(resamples, *scores.shape))
    return np.percentile(interquartile_mean(np.take_along_axis(scores[None], picks, axis=1)), [2.5, 97.5])


def normalized(rows):
    """The human-normalized scores of a game; none where nobody has published what they are made from."""
    return [float(row["human_normalized"]) for row in rows if row["human_normalized"]]


def table(games):
    """Lines in Markdown. The middle seed has the median score, the lower one of two."""
    lines = ["| game | score | each seed | middle seed | human-normalized | minutes |", "|---|---|---|---|---|---|"]
    for rows in games:
        scores = np.array([float(row["mean_return"]) for row in rows])
        middle = rows[np.argsort(scores)[(len(scores) - 1) // 2]]["seed"]
        human = f"{np.mean(normalized(rows)):.2f}" if normalized(rows) else "–"
        minutes = ", ".join(f"{float(row['seconds']) / 60:.0f}" if row["seconds"] else "–" for row in rows)
        each = ", ".join(f"{score:,.1f}" for score in scores)
        spread = f" ± {scores.std(ddof=1):,.1f}" if len(scores) > 1 else ""
        score = f"{scores.mean():,.1f}{spread}"
        lines.append(f"| {rows[0]['env_id']} | {score} | {each} | {middle} | {human} | {minutes} |")
    return "\n".join(lines)


def draw(files, games, out):
    columns = min(3, len(files))
    size = dict(figsize=(3.2 * columns, 2.4 * -(-len(files) // columns)), layout="constrained")
    figure, axes = pyplot.subplots(-(-len(files) // columns), columns, squeeze=False, **size)
    for panel in axes.flat[len(files) :]:
        panel.set_visible(False)
    for panel, path, rows in zip(axes.flat, files, games, strict=False):
        for name, curve in plot.load(path.parent / "curves" / path.name, None).items():
            panel.plot(*curve, linewidth=1, label=f"seed {name}")
        panel.set_title(rows[0]["env_id"], fontsize="medium")
        panel.xaxis.set_major_formatter(matplotlib.ticker.EngFormatter())
        panel.grid(alpha=0.3)
    axes.flat[0].legend(fontsize="small")
    figure.savefig(out, dpi=150)


def main(args):
    games = []
    if not args.files or not all(path.is_file() for path in args.files):
        sys.exit("games.py: name files of seeds.py that exist.")
    if args.out and (args.out.suffix not in (".png", ".svg", ".pdf") or not args.out.parent.is_dir()):
        sys.exit("games.py: --out must be a .png, .svg or .pdf in a folder that exists.")
    for path in args.files:
        with open(path, newline="") as file:
            games.append(list(csv.DictReader(file)))
        if not games[-1] or not {"env_id", "human_normalized"} <= games[-1][0].keys():
            sys.exit(f"games.py: {path} has no runs, or was not written by this version of seeds.py.")
        if not all(row["mean_return"] for row in games[-1]):
            sys.exit(f"games.py: {path} has a seed that failed, without a score.")
    print(table(games))
    scores = [normalized(rows) for rows in games]
    if len({len(game) for game in scores}) > 1 or len(scores[0]) < 2:
        print("\nNo interquartile mean: it takes two human-normalized scores or more of each game, equally many.")
    else:
        scores = np.array(scores).T  # (seeds, games)
        low, high = interval(scores)
        doubt = "" if len(scores) >= 10 else ", too narrow for so few seeds"
        print(f"\nInterquartile mean of the human-normalized scores: {interquartile_mean(scores):.2f}", end=" ")
        print(f"({low:.2f} to {high:.2f}{doubt}), {len(scores)} seeds of each of {scores.shape[1]} games")
    if args.out:
        draw(args.files, games, args.out)
        print(args.out)


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
