"""A script of CleanRL as it is, under Gymnasium 1, for speed.py to compare.

    python benchmarks/speed.py "python ppo_atari.py --no-cuda" \\
        "python benchmarks/cleanrl.py /path/to/cleanrl/cleanrl/ppo_atari.py --env-id PongNoFrameskip-v4 --no-cuda"

CleanRL asks for Gymnasium 0.29. Here are the names it had, and its vector environment, which resets within a step. What
is lost is the log of finished episodes.
"""

import runpy
import sys
from pathlib import Path

import ale_py
import gymnasium as gym


class SyncVectorEnv(gym.vector.SyncVectorEnv):
    def __init__(self, env_fns):
        super().__init__(env_fns, autoreset_mode=gym.vector.AutoresetMode.SAME_STEP)

    def step(self, actions):
        *results, infos = super().step(actions)
        infos.pop("final_info", None)
        infos["final_observation"] = infos.pop("final_obs", None)
        return *results, infos


gym.register_envs(ale_py)
gym.vector.SyncVectorEnv = SyncVectorEnv
gym.wrappers.GrayScaleObservation = gym.wrappers.GrayscaleObservation
gym.wrappers.FrameStack = gym.wrappers.FrameStackObservation
if len(sys.argv) < 2 or not Path(sys.argv[1]).is_file():
    sys.exit("cleanrl.py: the first argument must be a script, as in its docstring.")
script = Path(sys.argv[1]).resolve()
sys.path.insert(0, str(script.parents[1]))  # cleanrl_utils
sys.argv = sys.argv[1:]
runpy.run_path(str(script), run_name="__main__")
