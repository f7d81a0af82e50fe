"""What each detail of PPO is worth on CartPole: train with one of them changed, over seeds, and compare.

    python benchmarks/ablations.py --csv benchmarks/ablations.csv
    python benchmarks/ablations.py --only "gradients not clipped" "as it is" --seeds 11 12

A change is some flags, or an edit of the source (a text that stands in ppo_cartpole.py exactly once, and what replaces
it). Each final policy is scored over 100 greedy episodes.
"""

import contextlib
import csv
import os
import shlex
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import tyro
from seeds import first_reached, score_of
from tqdm import tqdm

ROOT = Path(__file__).resolve().parents[1]
os.environ["OMP_NUM_THREADS"] = "1"  # of each training and each evaluation
CHANGES = {  # name: flags, or (text of the script, what replaces it)
    "as it is": "",
    "truncated episodes taken for terminated ones": (
        "rollout.terminated[t] = torch.as_tensor(terminated)",
        "rollout.terminated[t] = torch.as_tensor(terminated | truncated)",
    ),
    "truncated episodes valued by the next one's first observation": (
        "next_values = torch.where(rollout.truncated, rollout.final_values, next_values)",
        "",
    ),
    "λ-sum runs on across the ends of episodes": ("next_advantage * ~ended[t]", "next_advantage"),
    "advantages not normalized": "--no-norm-adv",
    "ratio not clipped": "--clip-coef 1e9",
    "value loss clipped": "--clip-vloss",
    "gradients not clipped": "--max-grad-norm 1e9",
    "learning rate constant": "--no-anneal-lr",
    "no KL limit": "--target-kl None",
    "neither KL limit nor clipped ratio": "--target-kl None --clip-coef 1e9",
    "one pass over each rollout": "--update-epochs 1",
    "PyTorch's own initial weights": (
        "    nn.init.orthogonal_(layer.weight, gain)\n    nn.init.zeros_(layer.bias)\n",
        "",
    ),
    "policy's last layer not small": (
        "layer_init(nn.Linear(64, num_actions), gain=0.01)",
        "layer_init(nn.Linear(64, num_actions), gain=1.0)",
    ),
    "λ = 1 (returns alone)": "--gae-lambda 1",
    "λ = 0 (value function alone)": "--gae-lambda 0",
}


@dataclass
class Args:
    only: list[str] = field(default_factory=lambda: list(CHANGES))  # names of changes; all, if not given
    seeds: list[int] = field(default_factory=lambda: list(range(1, 6)))  # of each change
    jobs: int = 1  # runs side by side, each on one thread
    csv: Path | None = None  # write a row per run here; until the last has ended, they are in {csv}.part

    def __post_init__(self):
        if unknown := set(self.only) - set(CHANGES):
            sys.exit(f"ablations.py: --only {sorted(unknown)[0]!r} is none of: {', '.join(CHANGES)}.")
        if self.csv and not self.csv.parent.is_dir():
            sys.exit(f"ablations.py: --csv {self.csv} must be in a folder that exists.")


@contextlib.contextmanager
def workers(jobs):
    """A pool of `jobs` threads. An error or Ctrl-C ends it without the calls that still wait."""
    with ThreadPoolExecutor(jobs) as pool:
        try:
            yield pool
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def train(script, flags, change, seed, folder):
    """Train a copy of `script` with one change. Returns the run's folder, and the error that ended it or None."""
    source = (ROOT / script).read_text()
    if not isinstance(change, str):
        if source.count(change[0]) != 1:
            sys.exit(f"{script} does not hold this text exactly once: {change[0]}")
        source, change = source.replace(*change), ""
    folder.mkdir()
    (folder / script).write_text(source)
    command = [sys.executable, folder / script, "--seed", str(seed), "--run-dir", folder / "run"]
    command += [*shlex.split(flags), *shlex.split(change)]
    done = subprocess.run(command, capture_output=True, text=True)
    return folder / "run", done.stderr.strip().splitlines()[-1] if done.returncode else None


def one_run(name, seed):
    """Train with one change, score the final policy; returns the CSV row as a dict."""
    with tempfile.TemporaryDirectory() as folder:
        run_dir, error = train("ppo_cartpole.py", "", CHANGES[name], seed, Path(folder) / "copy")
        if error:  # as when NaN ended it, which is a result
            return {"change": name, "seed": seed, "error": error}
        score = score_of(run_dir, ROOT / "ppo_cartpole.py", episodes=100, greedy=True)
        step, _ = first_reached(run_dir, threshold=475)
    return {"change": name, "seed": seed, "mean_return": score["mean_return"], "steps_to_475": step}


def main(args):
    rows, part = [], f"{args.csv}.part" if args.csv else os.devnull
    with workers(args.jobs) as pool, open(part, "w", newline="") as file:
        writer = csv.DictWriter(file, ["change", "seed", "mean_return", "steps_to_475", "error"])
        writer.writeheader()
        runs = [pool.submit(one_run, name, seed) for name in args.only for seed in args.seeds]
        for run in tqdm(as_completed(runs), total=len(runs), unit=" runs", mininterval=10):
            rows.append(run.result())
            writer.writerow(rows[-1])
            file.flush()
            if "error" in rows[-1]:
                tqdm.write("{change}, seed {seed}: {error}".format(**rows[-1]), file=sys.stderr)
    if args.csv:
        os.replace(part, args.csv)
    print("| change | return: mean, lowest | runs that reached 475, after (median) |\n|---|---|---|")
    for name in args.only:
        own = [row for row in rows if row["change"] == name]
        scores = [row["mean_return"] for row in own if "mean_return" in row]
        steps = [row["steps_to_475"] for row in own if row.get("steps_to_475")]
        median = f", {np.median(steps):,.0f} steps" if steps else ""
        returns = f"{np.mean(scores):.1f}, {min(scores):.1f}" if scores else "none"
        if failed := len(own) - len(scores):
            returns += f"; {failed} failed"
        print(f"| {name} | {returns} | {len(steps)} of {len(own)}{median} |")


if __name__ == "__main__":
    try:
        main(tyro.cli(Args, description=__doc__))
    except KeyboardInterrupt:
        sys.exit("ablations.py: stopped.")
