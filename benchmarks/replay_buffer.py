"""What the replay buffer of dqn_atari.py costs: time to add and to sample, and memory, while it fills.

    python benchmarks/replay_buffer.py            # of the default size
    python benchmarks/replay_buffer.py --plain    # the same in plain memory instead of a mapped file

The buffer's file, 10.6 GB, is made in the current folder, and removed.
"""

import sys
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import tyro

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import dqn_atari


class Plain(np.ndarray):
    """Stands in for numpy.memmap: memory that belongs to no file."""

    def __new__(cls, path, dtype, mode, shape, offset=0):
        return np.zeros(shape, dtype).view(cls)

    def flush(self):
        pass


def held(kind):
    """Gigabytes of memory that this process holds: RssAnon is its own, RssFile the system may take back any time."""
    lines = dict(line.split(":") for line in Path("/proc/self/status").read_text().splitlines())
    return int(lines[kind].split()[0]) * 1024 / 1e9


def fill_buffer(capacity: int = 1_000_000, spare: int = 500_000, num_envs: int = 8, plain: bool = False):
    """Fill a buffer with random frames, and go on until every row has been written twice."""
    if plain:
        dqn_atari.np.memmap, spare = Plain, 0
        dqn_atari.make_file = lambda path, size: path.write_bytes(b"")
    obs = np.random.default_rng(0).integers(0, 256, (num_envs, 4, 84, 84), dtype=np.uint8)
    zeros = np.zeros(num_envs)
    with tempfile.TemporaryDirectory(dir=".") as folder:
        envs = SimpleNamespace(num_envs=num_envs, single_observation_space=np.empty((4, 84, 84)))
        buffer = dqn_atari.ReplayBuffer(folder, envs, capacity, spare)
        buffer.begin_games(obs)
        marks = [int(buffer.max_filled * share) for share in (0.01, 0.1, 0.5, 1)] + [2 * buffer.num_rows]
        last, start = 0, time.perf_counter()
        for row in range(1, marks[-1] + 1):
            buffer.add(zeros, zeros, zeros > 0, zeros > 0, {}, obs)
            if row in marks:
                add = (time.perf_counter() - start) / (row - last) / num_envs
                times = []
                for _ in range(1000):
                    start = time.perf_counter()
                    buffer.sample(32)
                    times.append(time.perf_counter() - start)
                print(f"{row * num_envs:9,} steps: {1e6 * add:4.1f} us to add one, ", end="")
                print(f"{1e3 * np.median(times):.2f} ms to sample 32 (median of 1000), ", end="")
                print(f"memory {held('RssAnon'):.2f} GB, and {held('RssFile'):.2f} GB of files", flush=True)
                last, start = row, time.perf_counter()
        buffer.state_dict()  # which waits for the disk
        if not plain:
            print(f"{time.perf_counter() - start:.1f} s until all of it is on the disk")


if __name__ == "__main__":
    tyro.cli(fill_buffer, description=__doc__)
