"""Train one command over several seeds, score each result with evaluate.py, and write a CSV row per run.

    python benchmarks/seeds.py --script ppo_cartpole.py --threshold 475 --greedy --csv benchmarks/cartpole.csv
    python benchmarks/seeds.py --script ppo_cartpole.py --seeds 1 2 3 --flags="--env-id Acrobot-v1 --norm-obs"
    python benchmarks/seeds.py --script ppo_atari.py --seeds 1 --threshold 30 100 400 --keep runs/breakout

Runs one after the other, each as a user would type it; `seconds` is all of training, imports included. Each row is
written as soon as its run has ended. More --seeds add to the rows of the same command and script; rows of another one
are put aside in {csv}.old. A run that fails gets a row without a score.

--keep leaves the run folders: after a crash or Ctrl-C, the same command goes on where it was, if the script has not
changed. (An environment of your own must not change either, which is not checked.) Of runs that were there before,
`seconds` is empty, and commit and machine are those of the last command.
"""

import csv
import hashlib
import json
import os
import platform
import re
import shlex
import signal
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
    script: Path  # training script, in this folder or in that of the project
    seeds: list[int] = field(default_factory=lambda: list(range(1, 11)))  # seeds, in this order
    flags: str = ""  # further flags of the training script, as one string
    then: str | None = None  # flags of a second command, which goes on with --resume where the first one ended
    threshold: list[float] = field(default_factory=list)  # also find when the mean of 20 training episodes first is >=
    episodes: int = 100  # of each evaluation
    greedy: bool = False  # evaluate with the likeliest actions
    csv: Path | None = None  # write the rows here
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


def execute(command, **options):
    """Run a command. RuntimeError: it failed, and has said why. Ends the program where its flags are wrong.

    It is out of reach of Ctrl-C, and gets a kill -9 instead: started again, it then repeats what it would have done.
    """
    process = subprocess.Popen([sys.executable, *map(str, command)], process_group=0, **options)
    try:
        code = process.wait()
    finally:
        process.kill()  # does nothing if it has ended
        process.wait()
    if code == 2:  # so would they be with every seed
        sys.exit(f"seeds.py: {Path(command[0]).name} refuses its flags.")
    if code:
        raise RuntimeError(f"{Path(command[0]).name} ended with exit code {code}")


def score_of(run_dir, script, episodes, greedy):
    """What evaluate.py --json says of a run's last checkpoint, with the Agent and the environment of `script`."""
    result = Path(run_dir) / "score.json"
    command = [ROOT / "evaluate.py", run_dir, "--script", script, "--episodes", episodes, "--json", result]
    execute([*command, *["--greedy"] * greedy], stdout=subprocess.DEVNULL)
    return json.loads(result.read_text())


def machine():
    """The processor and how many of its cores there are."""
    cpuinfo = Path("/proc/cpuinfo")  # Linux; elsewhere platform knows best
    models = re.findall(r"model name\s*: (.*)", cpuinfo.read_text()) if cpuinfo.exists() else []
    return f"{models[0] if models else platform.processor()}, {os.cpu_count()} cores"


def one_run(args, seed, folder):
    """Train with `seed` in `folder`, evaluate; returns the CSV row as a dict. RuntimeError: one of these failed."""
    run_dir = Path(folder) / str(seed)
    commands = [(["--seed", seed, "--run-dir", run_dir], args.flags)]
    if args.then is not None:
        commands += [(["--resume", run_dir], args.then)]
    copy = run_dir / "script.py"
    if copy.exists() and copy.read_bytes() != args.script.read_bytes():
        sys.exit(f"seeds.py: {run_dir} was trained by another script than {args.script} is now: name another --keep.")
    start = None if run_dir.exists() else time.time()  # None: a run that goes on, whose time is not known
    for i, (own, flags) in enumerate(commands):
        done = run_dir / f"command_{i + 1}_done"  # once the second has begun, the first would be refused
        if not done.exists():
            execute([args.script, *own, *shlex.split(flags)])
            done.write_text(flags)
        elif done.read_text() != flags:
            sys.exit(f"seeds.py: {run_dir} was trained with other flags: name another --keep.")
    if (run_dir / f"command_{len(commands) + 1}_done").exists():
        sys.exit(f"seeds.py: {run_dir} was trained further, with --then: name another --keep.")
    end = time.time()
    score = score_of(run_dir, args.script, args.episodes, args.greedy)
    row = {"env_id": score["env_id"], "seed": seed, "steps": score["global_step"]}
    row |= {"seconds": start and round(end - start, 1)}
    for threshold in args.threshold:
        step, when = first_reached(run_dir, threshold)
        row[f"steps_to_{threshold:.9g}"] = step
        row[f"seconds_to_{threshold:.9g}"] = start and when and round(when - start, 1)
    row |= {name: score[name] and round(score[name], 3) for name in ("mean_return", "std_return")}
    row |= {"human_normalized": score["human_normalized"], "min_return": min(score["returns"])}
    return row | {"truncated": score["truncated"]}


def read_rows(args, header, about):
    """The rows that --csv has already, by seed. What another command or script wrote is put aside."""
    try:
        with open(args.csv, "a+", newline="") as file:  # made here, to see before the runs that it can be written
            file.seek(0)
            rows = list(csv.DictReader(file))
    except OSError as error:
        sys.exit(f"seeds.py: --csv {args.csv} cannot be written: {error.strerror}.")
    same = ("command", "script", "episodes", "greedy")
    if any(list(row) != header or any(row[x] != str(about[x]) for x in same) for row in rows):
        old = args.csv.with_name(f"{args.csv.name}.old")
        print(f"{args.csv} has rows of another command or script: they are in {old} now.", flush=True)
        args.csv.replace(old)
        return {}
    return {int(row["seed"]): row for row in rows}


def write_rows(args, header, rows):
    """All rows, in the order of their seeds."""
    with open(args.csv, "w", newline="") as file:
        writer = csv.DictWriter(file, header)
        writer.writeheader()
        writer.writerows(rows[seed] for seed in sorted(rows))


def summary(rows, thresholds):
    """Print what the seeds have in common. Ends with exit code 1 if one has failed."""
    scores = [float(row["mean_return"]) for row in rows if row.get("mean_return") not in (None, "")]
    if len(scores) > 1:
        mean, std = np.mean(scores), np.std(scores, ddof=1)
        print(f"{mean:.2f} ± {std:.2f} over {len(scores)} seeds, lowest {min(scores):.2f}")
    for threshold in thresholds:
        steps = [float(row.get(f"steps_to_{threshold:.9g}") or np.inf) for row in rows]
        print(f"{threshold:.9g} reached after {np.median(steps):,.0f} steps (median), {max(steps):,.0f} at most")
    if len(scores) < len(rows):
        sys.exit(f"seeds.py: {len(rows) - len(scores)} of {len(rows)} seeds failed.")


def check(args):
    """Refuse what would be seen only after a training. Makes --script a file that exists."""
    flags = f"{args.flags} {args.then}".replace("_", "-")  # --run_dir is --run-dir, too
    for flag in ("--seed", "--run-dir", "--resume"):
        if re.search(rf"{flag}(?![\w-])", flags):
            sys.exit(f"seeds.py: {flag} is set for each run: leave it out of --flags and --then.")
    try:
        shlex.split(args.flags), shlex.split(args.then or "")
    except ValueError as error:
        sys.exit(f"seeds.py: --flags or --then cannot be read: {error}.")
    if not args.seeds or len(set(args.seeds)) < len(args.seeds) or args.episodes < 1:
        sys.exit("seeds.py: give at least one of --seeds, each once, and --episodes 1.")
    name, args.script = args.script, args.script if args.script.is_file() else ROOT / args.script
    if not args.script.is_file():
        sys.exit(f"seeds.py: --script {name} is neither in this folder nor in {ROOT}.")


def main(args):
    then = "" if args.then is None else f"; --resume {args.then}"
    command = f"{args.script} {args.flags}{then}".strip()
    check(args)
    commit = subprocess.run(["git", "describe", "--always", "--dirty"], cwd=ROOT, capture_output=True, text=True)
    about = {"episodes": args.episodes, "greedy": args.greedy, "command": command}
    about |= {"script": hashlib.sha256(args.script.read_bytes()).hexdigest()[:8], "commit": commit.stdout.strip()}
    about |= {"torch": torch.__version__, "python": platform.python_version(), "threads": torch.get_num_threads()}
    about |= {"machine": machine()}
    times = [f"{what}_to_{threshold:.9g}" for threshold in args.threshold for what in ("steps", "seconds")]
    header = ["env_id", "seed", "steps", "seconds", *times, "mean_return", "std_return", "human_normalized"]
    header += ["min_return", "truncated", *about]
    rows = read_rows(args, header, about) if args.csv else {}

    def stop(number, frame):
        kept = "the runs that ended are in --csv" if args.csv else "nothing is kept"
        kept = "the same command goes on" if args.keep else kept
        print(f"\nseeds.py: stopped; {kept}.", file=sys.stderr)
        sys.exit(128 + number)

    for number in (signal.SIGINT, signal.SIGTERM, getattr(signal, "SIGHUP", signal.SIGTERM)):
        if signal.getsignal(number) != signal.SIG_IGN:  # as nohup sets it
            signal.signal(number, stop)
    print(about, flush=True)
    with tempfile.TemporaryDirectory() as folder:
        for seed in args.seeds:
            try:
                row = one_run(args, seed, args.keep or folder)
            except RuntimeError as error:
                print(f"seeds.py: seed {seed} failed: {error}", file=sys.stderr, flush=True)
                row = {"seed": seed}
            rows[seed] = row | about
            print(row, flush=True)
            if args.csv:
                write_rows(args, header, rows)
    summary(rows.values(), args.threshold)


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
