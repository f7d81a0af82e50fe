"""Train one command over several seeds, score each result with evaluate.py, and write a CSV row per run.

    python benchmarks/seeds.py --script ppo_cartpole.py --threshold 475 --greedy --csv benchmarks/cartpole.csv
    python benchmarks/seeds.py --script ppo_cartpole.py --seeds 1 2 3 --flags="--env-id Acrobot-v1 --norm-obs"
    python benchmarks/seeds.py --script ppo_atari.py --seeds 1 --threshold 30 100 400 --keep runs/breakout

Runs one after the other, each as a user would type it; `seconds` is all of training, imports included. Each row is
written as soon as its run has ended. More --seeds add to the rows of the same command and script; rows of another one
are put aside in {csv}.old. (That an environment of your own has not changed is not checked.) A run that fails gets a
row without a score, unless its seed has one.

--keep leaves the run folders: after a crash or Ctrl-C, the same command goes on where it was, if the script has not
changed, and does not repeat a seed whose score is in --csv. Of a run that was cut short, `seconds` is empty.
"""

import contextlib
import csv
import hashlib
import itertools
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
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
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


def commit():
    """The checked-out commit, with -dirty where files have changed."""
    with contextlib.suppress(OSError):  # there may be no git
        git = ["git", "describe", "--always", "--dirty"]
        return subprocess.run(git, cwd=ROOT, capture_output=True, text=True).stdout.strip() or "unknown"
    return "unknown"


def hash_of(path):
    return hashlib.sha256(path.read_bytes()).hexdigest()[:8]


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
            new = run_dir / "done.tmp"
            new.write_text(flags)
            new.replace(done)  # so that a full disk leaves no empty one
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
    newest = max(run_dir.glob("checkpoints/*.pt"))  # knows the threads of the training
    threads = torch.load(newest, map_location="cpu", weights_only=True).get("versions", {}).get("threads")
    return row | {"truncated": score["truncated"], "threads": threads}


def read_rows(path, header, about):
    """The rows of a CSV file by seed, and whether they are of this command and script, with these flags."""
    with open(path, "a+", newline="") as file:
        file.seek(0)
        rows = list(csv.DictReader(file))
    same = ("command", "script", "episodes", "greedy")
    ours = all(list(row) == header and all(row[x] == str(about[x]) for x in same) for row in rows)
    return {row.get("seed"): row for row in rows}, ours


def add_row(path, header, row):
    """Put a row among those that the file has by now, in the order of their seeds. Other commands' are put aside."""
    rows, ours = read_rows(path, header, row)
    if not ours:
        names = (path.with_name(f"{path.name}.old{i or ''}") for i in itertools.count())
        old = next(name for name in names if not name.exists())
        os.replace(path, old)
        print(f"{path} had rows of another command, script or flags: they are in {old} now.", flush=True)
        rows = {}
    if "mean_return" in row or not rows.get(str(row["seed"]), {}).get("mean_return"):
        rows[str(row["seed"])] = row  # a run that failed takes no score away
    with open(path.with_name(f"{path.name}.tmp"), "w", newline="") as file:
        writer = csv.DictWriter(file, header)
        writer.writeheader()
        writer.writerows(rows[seed] for seed in sorted(rows, key=int))
    os.replace(file.name, path)
    return rows


def summary(rows, thresholds):
    """Print what the seeds have in common."""
    scores = [float(row["mean_return"]) for row in rows if row.get("mean_return") not in (None, "")]
    if len(scores) > 1:
        mean, std = np.mean(scores), np.std(scores, ddof=1)
        print(f"{mean:.2f} ± {std:.2f} over {len(scores)} seeds, lowest {min(scores):.2f}")
    for threshold in thresholds:
        steps = [float(row.get(f"steps_to_{threshold:.9g}") or np.inf) for row in rows]
        print(f"{threshold:.9g} reached after {np.median(steps):,.0f} steps (median), {max(steps):,.0f} at most")


def check(args):
    """Refuse what would be seen only after a training, and find --script."""
    flags = f"{args.flags} {args.then}".replace("_", "-")  # --run_dir is --run-dir, too
    for flag in ("--seed", "--run-dir", "--resume"):
        if re.search(rf"{flag}(?![\w-])", flags):
            sys.exit(f"seeds.py: {flag} is set for each run: leave it out of --flags and --then.")
    try:
        shlex.split(args.flags), shlex.split(args.then or "")
    except ValueError as error:
        sys.exit(f"seeds.py: --flags or --then cannot be read: {error}.")
    if not args.seeds or len(set(args.seeds)) < len(args.seeds) or args.episodes < 1:
        sys.exit("seeds.py: give at least one of --seeds, each once, and --episodes of at least 1.")
    name, args.script = args.script, args.script if args.script.is_file() else ROOT / args.script
    if not args.script.is_file():
        sys.exit(f"seeds.py: --script {name} is neither in this folder nor in {ROOT}.")


def main(args):
    then = "" if args.then is None else f"; --resume {args.then}"
    command = f"{args.script} {args.flags}{then}".strip()
    check(args)
    about = {"episodes": args.episodes, "greedy": args.greedy, "command": command}
    about |= {"script": hash_of(args.script), "commit": commit()}
    about |= {"torch": torch.__version__, "python": platform.python_version(), "threads": torch.get_num_threads()}
    about |= {"machine": machine()}
    times = [f"{what}_to_{threshold:.9g}" for threshold in args.threshold for what in ("steps", "seconds")]
    header = ["env_id", "seed", "steps", "seconds", *times, "mean_return", "std_return", "human_normalized"]
    header += ["min_return", "truncated", *about]
    rows, failed = {}, []
    if args.csv:
        try:  # before the runs, to see that it can be written
            before, ours = read_rows(args.csv, header, about)
        except OSError as error:
            sys.exit(f"seeds.py: --csv {args.csv} cannot be written: {error.strerror}.")
        rows = before if ours else {}

    def stop(number, frame):
        kept = f"the runs that ended are in {args.csv}: name the other --seeds" if args.csv else "nothing is kept"
        kept = "the same command goes on" if args.keep else kept
        with contextlib.suppress(OSError):  # the terminal may be gone
            print(f"\nseeds.py: stopped; {kept}.", file=sys.stderr, flush=True)
        sys.exit(128 + number)

    for number in (signal.SIGINT, signal.SIGTERM, getattr(signal, "SIGHUP", signal.SIGTERM)):
        if signal.getsignal(number) != signal.SIG_IGN:  # as nohup sets it
            signal.signal(number, stop)
    print(about, flush=True)
    with tempfile.TemporaryDirectory() as folder:
        for seed in args.seeds:
            if args.keep and rows.get(str(seed), {}).get("mean_return"):
                print(f"seed {seed} is in {args.csv}", flush=True)
                continue
            try:
                row = one_run(args, seed, args.keep or folder)
            except RuntimeError as error:
                print(f"seeds.py: seed {seed} failed: {error}", file=sys.stderr, flush=True)
                row = {"seed": seed}
                failed.append(seed)
            if hash_of(args.script) != about["script"]:
                sys.exit(f"seeds.py: {args.script} was edited while seed {seed} ran, which gets no row.")
            print(row, flush=True)
            rows[str(seed)] = about | row
            if args.csv:
                rows = add_row(args.csv, header, about | row)
    summary(rows.values(), args.threshold)
    if failed:
        sys.exit(f"seeds.py: {len(failed)} of {len(args.seeds)} seeds failed.")


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
