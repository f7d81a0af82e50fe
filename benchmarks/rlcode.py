"""An Atari script of rlcode/reinforcement-learning as it is, for speed.py to compare: it writes charts/SPS beside it.

    pip install pygame-ce
    python benchmarks/speed.py "python ppo_atari.py --no-cuda" \\
        "python benchmarks/rlcode.py /path/to/reinforcement-learning/3-atari/2-ppo.py --env pong --device cpu"

Only its LEARN_START of DQN becomes 1,000 steps, so that learning starts soon.
"""

import sys
from pathlib import Path

import gymnasium as gym
from torch.utils.tensorboard import SummaryWriter

if len(sys.argv) < 2 or not Path(sys.argv[1]).is_file():
    sys.exit("rlcode.py: the first argument must be a script, as in its docstring.")
script = Path(sys.argv[1]).resolve()
writer = SummaryWriter("runs/rlcode")


def count(owner, steps, every):
    """Write a point whenever `every` calls of owner.step, each `steps` steps of games, are over."""
    step, calls = owner.step, 0

    def step_and_count(envs, action):
        nonlocal calls
        calls += 1
        if calls % every == 0:
            writer.add_scalar("charts/SPS", 0, calls * steps)
        return step(envs, action)

    owner.step = step_and_count


if "ppo" in script.name:
    count(gym.vector.SyncVectorEnv, steps=8, every=128)  # a rollout
else:
    count(gym.wrappers.FrameStackObservation, steps=1, every=100)
sys.path.insert(0, str(script.parent))
sys.argv = sys.argv[1:]
source, start = script.read_text(), "LEARN_START = 80_000 "
if "ppo" not in script.name and source.count(start) != 1:
    sys.exit(f"rlcode.py: {script} does not hold this text exactly once: {start}")
source = source.replace(start, "LEARN_START = 1_000 ")
exec(compile(source, script, "exec"), {"__name__": "__main__"})
