"""Search for better flags with Optuna, then see whether they are better, on seeds that the search has not seen.

    pip install -r benchmarks/requirements.txt
    python benchmarks/tune.py ppo_cartpole.py --env-id Acrobot-v1 --space learning_rate=1e-4..1e-2,log \\
        --space num_steps=16,32,64 --trials 30 --seeds 3

Flags that tune.py does not have go to the script: they are the defaults that the best flags are compared with. A trial
trains with seeds 1001, 1002, ... in turn, and scores each final policy with evaluate.py. Where even its best mean so
far is below the median of the trials that got all seeds, it gets no further one. A choice that got all seeds is not
trained again. The best of many trials was lucky, so its score is too high: the best flags and the defaults are trained
anew, with seeds 1, 2, ... The same command again continues its study; after a change of the script, or of an
environment beside it, it begins another. Another machine that shares the folder can run it at the same time.
"""

import contextlib
import difflib
import fcntl
import hashlib
import io
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import typing
import warnings
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path

import matplotlib
import numpy as np
import optuna
import torch
import tyro
from optuna.visualization.matplotlib import plot_optimization_history, plot_param_importances
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import evaluate

matplotlib.use("Agg")  # draws into files, also where there is no display
FIRST_SEED = 1001  # of the search; the comparison counts from 1
COMPLETE = optuna.trial.TrialState.COMPLETE
FIXED = {"seed", "run_dir", "resume"}  # flags that each run gets from here
stopping, children = threading.Event(), set()  # Ctrl-C sets the one and ends the others
waiting = threading.Event()  # for another process, with no child that could be ended
sources = {}  # the script, and what it has imported from beside it: {path: hash}


@dataclass
class Args:
    script: tyro.conf.Positional[Path]  # training script; flags that are not listed here go to it
    space: tyro.conf.UseAppendAction[list[str]] = field(default_factory=list)  # name=low..high[,log] or name=a,b,c
    trials: int = 30  # choices of flags to try; those that are pruned or fail count
    seeds: int = 3  # runs of a trial
    fresh_seeds: int = 10  # runs of the best flags, and of the defaults, to compare them
    episodes: int = 100  # of each evaluation
    jobs: int = 1  # runs side by side, each with its share of the threads


def parse_space(text, module, defaults):
    """The name in one --space, and what draws its value for an Optuna trial. Refuses what no run could use."""
    name, _, wanted = text.partition("=")
    kinds = typing.get_type_hints(module.Args)
    if name not in kinds or name in FIXED:
        close = difflib.get_close_matches(name, kinds.keys() - FIXED) or sorted(kinds.keys() - FIXED)
        evaluate.fail(f"--space {text}: the script has no {name!r} to tune. Close: {', '.join(close)}.", 2)
    between = re.fullmatch(r"(.+?)\.\.(.+?)(,log)?", wanted)
    try:
        with contextlib.redirect_stderr(io.StringIO()):
            words = between.groups()[:2] if between else wanted.split(",")
            values = [tyro.cli(kinds[name], args=[word], console_outputs=False) for word in words]
    except SystemExit:
        evaluate.fail(f"--space {text}: write {name}=low..high[,log] or {name}=a,b,c, with values that it takes.", 2)
    low, high, log = values[0], values[-1], wanted.endswith(",log")
    grows = {type(low), type(high)} <= {int, float} and low < high < np.inf and (low > 0 or not log)
    if not (grows if between else len(set(values)) == len(values) > 1):
        rule = "a range goes from one number to a larger one (with log, from above 0), a list has several, each once"
        evaluate.fail(f"--space {text} is empty: {rule}.", 2)
    if hasattr(module, "check_args"):  # what the script would refuse, in its own sentence
        for value in values:
            module.check_args(replace(defaults, **{name: value}))
    if not between:
        return name, lambda trial: trial.suggest_categorical(name, values)
    suggest = optuna.Trial.suggest_int if type(low) is int else optuna.Trial.suggest_float
    return name, lambda trial: suggest(trial, name, low, high, log=log)


def stop(number, frame):
    """Ctrl-C, SIGTERM or SIGHUP: kill -9 all runs, or end the waiting. Started again, a run repeats what it did."""
    signal.signal(number, signal.SIG_DFL)  # a second one ends this program at once
    stopping.set()
    with contextlib.suppress(OSError):  # the terminal may be gone
        os.write(2, b"\nStopping. The same command goes on from here.\n")  # print is not reentrant
    if waiting.is_set():
        raise SystemExit(130)
    for process in list(children):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)


def execute(command, output):
    """Run a command, with its output in a file. RuntimeError: it failed. SystemExit: stop() ended it."""
    command = [sys.executable, *command[1:]]
    with open(output, "a") as file:  # in a process group of its own, which a terminal's Ctrl-C does not reach
        process = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT, process_group=0)
    children.add(process)
    if stopping.is_set():  # before it was among the children
        os.killpg(process.pid, signal.SIGKILL)
    code = process.wait()
    children.discard(process)
    if code:
        last_line = re.split(r"[\r\n]", output.read_text(errors="replace").strip())[-1]
        raise SystemExit(130) if stopping.is_set() else RuntimeError(f"{last_line} (exit code {code})")


def commands(args, flags, params, seed, run_dir):
    """The two commands that train with these parameters and score the result."""
    tuned = {name.replace("_", "-"): value for name, value in params.items()}
    tuned = [f"--{'' if x else 'no-'}{name}" if isinstance(x, bool) else f"--{name}={x}" for name, x in tuned.items()]
    train = ["python", args.script, *flags, *tuned, "--seed", seed, "--run-dir", run_dir]
    score = ["python", os.path.relpath(evaluate.__file__), run_dir, "--script", args.script]
    score += ["--episodes", args.episodes, "--seed", seed]
    return list(map(str, train)), list(map(str, score))


def hash_of(path):
    return hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else None


def check_sources(run_dir):
    """End where a file of this study has been edited: a run that was begun since then is another study's."""
    for path, expected in sources.items():
        if hash_of(path) != expected:
            shutil.rmtree(run_dir, ignore_errors=True)  # or it would be in the way, once the edit is undone
            evaluate.fail(f"{path} was edited meanwhile: the same command begins another study, or undo the edit.")


def score_of(args, flags, params, seed, folder):
    """Train and score. Continues a run that was ended; does not repeat one that was scored."""
    run_dir = folder / f"seed_{seed}"
    if not (run_dir / "score.json").exists():
        run_dir.mkdir(parents=True, exist_ok=True)
        with open(run_dir / ".lock", "a") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:  # it has outlived a kill -9 of tune.py
                evaluate.fail(f"{run_dir} is still being trained: wait until that has ended, then go on.")
        train, score = commands(args, flags, params, seed, run_dir)
        check_sources(run_dir)
        try:
            execute(train, run_dir / "output.txt")
            execute([*score, "--json", str(run_dir / "score.tmp")], run_dir / "output.txt")
        finally:
            check_sources(run_dir)
        os.replace(run_dir / "score.tmp", run_dir / "score.json")
        for path in sorted(run_dir.glob("checkpoints/*.pt"))[:-1]:
            path.unlink()  # in Atari, each takes 20 MB
    score = json.loads((run_dir / "score.json").read_text())["mean_return"]
    if not np.isfinite(score):
        raise RuntimeError(f"its score is {score}")
    return score


def run_trial(trial, args, flags, space, out):
    """What Optuna maximizes: the mean score over seeds."""
    params, scores = {name: draw(trial) for name, draw in space.items()}, []
    tried = [old for old in trial.study.get_trials(states=(COMPLETE,)) if old.params == params]
    first = (tried or [trial])[0]  # a choice that got all seeds has all its scores
    folder = out / f"trial_{first.user_attrs.get('again', first.number)}"  # of its first attempt
    try:
        for i in range(args.seeds):
            scores.append(score_of(args, flags, params, FIRST_SEED + i, folder))
            trial.report(np.mean(scores), i)
            if i + 1 < args.seeds and trial.should_prune():
                raise optuna.TrialPruned
    except RuntimeError as error:
        tqdm.write(f"Trial {trial.number} failed with {params}: {error}")
        raise
    return np.mean(scores)


def count(study):
    """How many trials have ended. One that was killed and queued again has not."""
    trials = study.get_trials(deepcopy=False)
    return sum(trial.state.is_finished() for trial in trials) - sum("again" in trial.user_attrs for trial in trials)


def wait_for(lock, kind):
    """Take the lock, and say so if another process has it."""
    try:
        fcntl.flock(lock, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        waiting.set()  # first: who reads the next line may press Ctrl-C
        print("Waiting for another process, which works on this study, too.", flush=True)
        fcntl.flock(lock, kind)
        waiting.clear()


def open_study(out):
    """Begin the study in this folder, or go on with it."""
    journal = (out / "journal.log").resolve()  # an absolute path, or Optuna waits forever for a lock left by kill -9
    writing = optuna.storages.journal.JournalFileSymlinkLock(str(journal))
    backend = optuna.storages.journal.JournalFileBackend(str(journal), writing)
    writing.acquire()
    try:
        os.truncate(journal, journal.read_bytes().rfind(b"\n") + 1)  # a last line without its end, of a full disk
    finally:
        writing.release()
    storage = optuna.storages.JournalStorage(backend)
    return optuna.create_study(storage=storage, study_name=out.name, direction="maximize", load_if_exists=True)


def search(study, args, flags, space, out, lock):
    """Run trials until --trials have ended, here and on other machines."""
    with contextlib.suppress(BlockingIOError):
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # nobody else is here: what seems to run was killed
        for trial in study.get_trials(states=(optuna.trial.TrialState.RUNNING,)):
            study.enqueue_trial(trial.params, {"again": trial.user_attrs.get("again", trial.number)})
            study.tell(trial.number, state=optuna.trial.TrialState.FAIL)
    wait_for(lock, fcntl.LOCK_SH)
    options = dict(n_trials=args.trials - count(study), n_jobs=args.jobs, catch=RuntimeError, show_progress_bar=True)
    if options["n_trials"] > 0:
        enough = [lambda study, trial: study.stop() if count(study) >= args.trials else None]
        study.optimize(lambda trial: run_trial(trial, args, flags, space, out), **options, callbacks=enough)
    fcntl.flock(lock, fcntl.LOCK_UN)
    wait_for(lock, fcntl.LOCK_EX)  # for the last trials of other machines
    complete = sorted(study.get_trials(states=(COMPLETE,)), key=lambda trial: -trial.value)
    print(f"{count(study)} trials have ended, {len(complete)} with all seeds from {FIRST_SEED} on. The best of these:")
    for trial in complete[:3]:
        print(f"{trial.value:10.2f}  {trial.params}")
    if not complete:
        evaluate.fail(f"no trial ended well: the output.txt in {out} say why.")


def compare(study, args, flags, out):
    """Train the best flags and the defaults with fresh seeds, and print them side by side."""
    best, means, failed, random = study.best_trial, {}, 0, np.random.default_rng(0)
    print(f"With seeds 1 to {args.fresh_seeds}, which the search has not seen: mean, 95% interval by Student's t")
    for side, params in ((f"best_{best.number}", best.params), ("defaults", {})):
        with ThreadPoolExecutor(args.jobs) as pool:
            runs = [pool.submit(score_of, args, flags, params, i + 1, out / side) for i in range(args.fresh_seeds)]
            for run in tqdm(runs, desc=side, unit=" runs"):
                if isinstance(run.exception(), SystemExit):  # waits for it
                    pool.shutdown(cancel_futures=True)
                    raise run.exception()
        scores = [run.result() for run in runs if not isinstance(run.exception(), RuntimeError)]
        if not scores:
            evaluate.fail(f"all runs failed: the output.txt in {out / side} say why.")
        failed += len(runs) - len(scores)
        # The mean may be any of these, says Student's t. Their difference makes the interval of Behrens and Fisher.
        n, std = len(scores), np.std(scores, ddof=1) if len(scores) > 1 else np.inf
        means[side] = np.mean(scores) + std / n**0.5 * random.standard_t(max(n - 1, 1), 100_000)
        low, high = np.percentile(means[side], [2.5, 97.5], method="nearest")
        each = ["failed" if run.exception() else f"{run.result():.2f}" for run in runs]
        print(f"{np.mean(scores):10.2f}  {low:.2f} to {high:.2f}  {side}: {', '.join(each)}")
    low, high = np.percentile(np.subtract(*means.values()), [2.5, 97.5], method="nearest")
    verdict = "the best flags are better" if low > 0 else "they are worse" if high < 0 else "no difference is shown"
    verdict = f"no verdict, as {failed} failed and are left out" if failed else verdict
    print(f"            {low:.2f} to {high:.2f}  difference: {verdict}")


def main(args, flags):
    if min(len(args.space), args.trials, args.seeds, args.fresh_seeds - 1, args.episodes, args.jobs) < 1:
        evaluate.fail("give at least one --space, --fresh-seeds 2, and 1 for --trials, --seeds, --episodes, --jobs.", 2)
    names = {flag.split("=")[0].strip("-").replace("-", "_") for flag in flags if flag.startswith("--")}
    if fixed := names & FIXED:
        evaluate.fail(f"--{fixed.pop().replace('_', '-')} is set for each run: leave it out.", 2)
    module = evaluate.load_script({"script": args.script.stem}, args.script, args.script)
    defaults = tyro.cli(module.Args, prog=args.script.name, args=flags)  # refuses what the script would
    if hasattr(module, "check_args"):
        module.check_args(defaults)  # they are trained, too, in the end
    space = dict(parse_space(text, module, defaults) for text in args.space)
    files = [Path(x.__file__) for x in [*sys.modules.values()] if getattr(x, "__file__", None)]
    beside = {x.resolve() for x in files if x.resolve().parent == args.script.resolve().parent and x.is_file()}
    sources.clear()
    sources.update({path: hash_of(path) for path in sorted(beside - {Path(evaluate.__file__).resolve()})})
    what = json.dumps([[*sources.values()], flags, sorted(args.space), args.seeds, args.episodes])
    out = Path(f"runs/tune__{args.script.stem}__{hashlib.sha256(what.encode()).hexdigest()[:8]}")
    out.mkdir(parents=True, exist_ok=True)
    threads = os.environ["OMP_NUM_THREADS"] = str(max(1, torch.get_num_threads() // args.jobs))
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) != signal.SIG_IGN:  # as nohup sets it
            signal.signal(number, stop)
    with open(out / ".lock", "w") as lock:
        study = open_study(out)
        watch = f"pip install optuna-dashboard && optuna-dashboard {out}/journal.log"
        print(f"{count(study)} of {args.trials} trials have ended. Watch: {watch}", flush=True)
        search(study, args, flags, space, out, lock)
        compare(study, args, flags, out)
    warnings.simplefilter("ignore")  # Optuna calls its drawings experimental
    for plot in (plot_param_importances, plot_optimization_history):
        plot(study).figure.savefig(out / f"{plot.__name__.removeprefix('plot_')}.png", bbox_inches="tight")
    train, score = commands(args, flags, study.best_params, 1, out / "again")
    print(f"Pictures and policies are in {out}. To train the best flags again, with seed 1, to the same score:")
    print(f"  export OMP_NUM_THREADS={threads}")
    print(f"  {shlex.join(train)} && {shlex.join(score)}")


if __name__ == "__main__":
    main(*tyro.cli(Args, description=__doc__, return_unknown_args=True))
