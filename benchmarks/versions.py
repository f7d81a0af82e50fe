"""Is one version of an Atari script faster than another? They take turns as short as one update, a few seconds.

    git show HEAD~1:ppo_atari.py > /tmp/ppo_atari.py
    python benchmarks/versions.py "ppo_atari.py --no-cuda" "/tmp/ppo_atari.py --no-cuda"

speed.py compares programs of any origin in turns of many seconds, between which the machine may change by more than a
few percent. Here each version waits in a call of the environment until it is its turn, and its turn ends --calls calls
later: take as many as the script has between two updates. Each turn is compared with its neighbor, by the clock and by
processor time, which other guests of the machine disturb less. Leave the machine alone meanwhile.
"""

import multiprocessing
import os
import runpy
import shlex
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import tyro
from ale_py.vector_env import AtariVectorEnv
from speed import quartiles
from tqdm import tqdm

ROOT = Path(__file__).resolve().parents[1]


@dataclass
class Args:
    versions: tyro.conf.Positional[list[str]]  # each quoted: a script and its flags; they must last for all turns
    calls: int = 128  # of the environment in a turn: a rollout of PPO; for DQN, 50 calls of 8 games are 100 updates
    warmup: int = 3  # turns of each version that do not count
    rounds: int = 14  # turns of each version that count


def play(words, calls, pipe):
    """Run a script that stops at every `calls`-th step of its environment, tells what the last ones took, and waits."""
    step, count = AtariVectorEnv.step, 0

    def step_in_turn(envs, actions):
        nonlocal count, started
        if count % calls == 0:
            pipe.send(np.array([time.perf_counter(), time.process_time()]) - started)
            pipe.recv()
            started = np.array([time.perf_counter(), time.process_time()])
        count += 1
        return step(envs, actions)

    started = np.zeros(2)
    AtariVectorEnv.step = step_in_turn
    sys.argv = [str(ROOT / words[0]), *words[1:]]
    os.chdir(tempfile.mkdtemp())
    for stream in (1, 2):
        os.dup2(os.open("output.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND), stream)
    runpy.run_path(sys.argv[0], run_name="__main__")


def turn(pipe):
    """Seconds and processor seconds of one turn."""
    pipe.send("go")
    return pipe.recv()


def main(args):
    if len(args.versions) < 2:
        sys.exit("versions.py: name at least two versions.")
    context = multiprocessing.get_context("spawn")
    pipes, total = [], len(args.versions) * (args.warmup + args.rounds)
    bar = tqdm(total=total, bar_format="{percentage:3.0f}%: {remaining} left")
    for version in args.versions:
        ours, theirs = context.Pipe()
        context.Process(target=play, args=(shlex.split(version), args.calls, theirs), daemon=True).start()
        theirs.close()  # so that a script that ends is seen to
        pipes.append(ours)
        ours.recv()  # until the others start, it has the machine to itself
        for _ in range(args.warmup):
            turn(ours)
            bar.update()
    seconds = np.zeros((args.rounds, len(pipes), 2))  # of the clock, and of the processor
    for k in range(args.rounds):
        for i in range(len(pipes))[:: 1 if k % 2 else -1]:  # there and back: a drift favors none
            seconds[k, i] = turn(pipes[i])
            bar.update()
    bar.close()
    print("median (quartiles): seconds of a turn, and how many times as fast the first is, by the clock | by processor")
    for i, version in enumerate(args.versions):
        ratios = seconds[:, i] / seconds[:, 0]
        clock, processor = (quartiles(ratios[:, k], 3) for k in (0, 1))
        print(f"{quartiles(seconds[:, i, 0], 3)} s, {clock} | {processor}  {version}")


if __name__ == "__main__":
    try:
        with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
            os.environ["TMPDIR"] = folder  # of the versions, too: DQN's replay buffer takes gigabytes
            main(tyro.cli(Args, description=__doc__))
    except EOFError:
        sys.exit("versions.py: a script has ended before its turns had: run it by itself to see why, or let it last.")
    except KeyboardInterrupt:
        sys.exit("versions.py: stopped.")
    finally:
        for process in multiprocessing.active_children():  # SIGTERM, which Python would send, only makes them save
            process.kill()
