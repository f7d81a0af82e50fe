"""Train one command over several seeds, score each result with evaluate.py, and write a CSV row per run.

    python benchmarks/seeds.py --script ppo_cartpole.py --threshold 475 --greedy --csv benchmarks/cartpole.csv
    python benchmarks/seeds.py --script ppo_cartpole.py --seeds 1 2 3 --flags="--env-id Acrobot-v1 --norm-obs"
    python benchmarks/seeds.py --script ppo_atari.py --seeds 1 --threshold 30 100 400 --keep runs/breakout

Runs one after the other, each as a user would type it; `seconds` is all of training, imports included. --keep leaves
the run folders: after a crash, the same command goes on where it was, if the script has not changed. Of runs that were
there before, `seconds` is empty, and commit and machine are those of the last command.
"""

import csv
import json
import os
import platform
import re
import shlex
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
import tyro
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

ROOT = Path(__file__).resolve().parents[1]


@dataclass
class Args:
    script: str  # training script
    seeds: list[int] = field(default_factory=lambda: list(range(1, 11)))  # seeds, in this order
    flags: str = ""  # further flags of the training script, as one string
    then: str | None = None  # flags of a second command, which goes on with --resume where the first one ended
    threshold: list[float] = field(default_factory=list)  # also find when the mean of 20 training episodes first is >=
    episodes: int = 100  # of each evaluation
    greedy: bool = False  # evaluate with the likeliest actions
    csv: str | None = None  # write the rows here
    keep: Path | None = None  # keep the run folders in this one, named by their seeds; None: remove them


def first_reached(run_dir, threshold):
    """Step, and time of the clock, at which the mean return of the last 20 episodes first was >= threshold."""
    curves = EventAccumulator(str(run_dir), size_guidance={"scalars": 0}).Reload()
    if "charts/episodic_return" not in curves.Tags()["scalars"]:
        return None, None  # no episode has ended
    events = curves.Scalars("charts/episodic_return")
    returns = np.array([event.value for event in events])
    for i in range(20, len(returns) + 1):
        if returns[i - 20 : i].mean() >= threshold:
            return events[i - 1].step, events[i - 1].wall_time
    return None, None


def score_of(run_dir, script, episodes, greedy):
    """What evaluate.py --json says of a run's last checkpoint, with the Agent and the environment of `script`."""
    result = Path(run_dir) / "score.json"
    command = [sys.executable, ROOT / "evaluate.py", run_dir, "--script", ROOT / script]
    command += ["--episodes", str(episodes), "--json", result, *["--greedy"] * greedy]
    done = subprocess.run(command, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True)
    if done.returncode:
        sys.exit(f"seeds.py: {run_dir} could not be scored: {done.stderr.strip().splitlines()[-1]}")
    return json.loads(result.read_text())


def machine():
    """The processor and how many of its cores there are."""
    cpuinfo = Path("/proc/cpuinfo")  # Linux; elsewhere platform knows best
    models = re.findall(r"model name\s*: (.*)", cpuinfo.read_text()) if cpuinfo.exists() else []
    return f"{models[0] if models else platform.processor()}, {os.cpu_count()} cores"


def one_run(args, seed, folder):
    """Train with `seed` in `folder`, evaluate; returns the CSV row as a dict."""
    run_dir = Path(folder) / str(seed)
    commands = [["--seed", str(seed), "--run-dir", run_dir, *shlex.split(args.flags)]]
    if args.then is not None:
        commands += [["--resume", run_dir, *shlex.split(args.then)]]
    copy = run_dir / "script.py"
    if copy.exists() and copy.read_bytes() != (ROOT / args.script).read_bytes():
        sys.exit(f"seeds.py: {run_dir} was trained by another script than {args.script} is now: name another --keep.")
    start = None if run_dir.exists() else time.time()  # None: a run that goes on, whose time is not known
    for i, flags in enumerate(commands):
        done = run_dir / f"command_{i + 1}_done"  # once the second has begun, the first would be refused
        if not done.exists():
            subprocess.run([sys.executable, ROOT / args.script, *flags], check=True)
            done.write_text(shlex.join(map(str, flags)))
        elif done.read_text() != shlex.join(map(str, flags)):
            sys.exit(f"seeds.py: {run_dir} was trained with other flags: name another --keep.")
    if (run_dir / f"command_{len(commands) + 1}_done").exists():
        sys.exit(f"seeds.py: {run_dir} was trained further, with --then: name another --keep.")
    end = time.time()
    score = score_of(run_dir, args.script, args.episodes, args.greedy)
    row = {"env_id": score["env_id"], "seed": seed, "steps": score["global_step"]}
    row |= {"seconds": start and round(end - start, 1)}
    for threshold in args.threshold:
        step, when = first_reached(run_dir, threshold)
        row[f"steps_to_{threshold:g}"] = step
        row[f"seconds_to_{threshold:g}"] = start and when and round(when - start, 1)
    row |= {name: score[name] and round(score[name], 3) for name in ("mean_return", "std_return")}
    row |= {"human_normalized": score["human_normalized"], "min_return": min(score["returns"])}
    return row | {"truncated": score["truncated"], "episodes": args.episodes}


def main(args):
    flags = f"{args.flags} {args.then}".replace("_", "-")  # --run_dir is --run-dir, too
    for flag in ("--seed", "--run-dir", "--resume"):
        if re.search(rf"{flag}\b", flags):
            sys.exit(f"seeds.py: {flag} is set for each run: leave it out of --flags and --then.")
    if args.csv:
        open(args.csv, "a").close()  # to see before the runs, not after them, that it can be written
    commit = subprocess.run(["git", "describe", "--always", "--dirty"], cwd=ROOT, capture_output=True, text=True)
    then = "" if args.then is None else f"; --resume {args.then}"
    about = {"command": f"{args.script} {args.flags}{then}".strip(), "commit": commit.stdout.strip()}
    about |= {"torch": torch.__version__, "python": platform.python_version(), "threads": torch.get_num_threads()}
    about |= {"machine": machine()}
    print(about, flush=True)
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for seed in args.seeds:
            rows.append(one_run(args, seed, args.keep or folder))
            print(rows[-1], flush=True)
    if args.csv:
        with open(args.csv, "w", newline="") as file:
            writer = csv.DictWriter(file, [*rows[0], *about])
            writer.writeheader()
            writer.writerows(row | about for row in rows)
    scores = [row["mean_return"] for row in rows]
    if len(scores) > 1:
        print(f"{np.mean(scores):.2f} ± {np.std(scores, ddof=1):.2f} over {len(rows)} seeds, lowest {min(scores):.2f}")
    for threshold in args.threshold:
        steps = [row[f"steps_to_{threshold:g}"] or np.inf for row in rows]
        print(f"{threshold:g} reached after {np.median(steps):,.0f} steps (median), {max(steps):,.0f} at most")


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
