"""Keep a trained policy in a small file: a checkpoint's weights in half precision, without what --resume needs.

    python benchmarks/export.py runs/<run> benchmarks/policies/ppo_cartpole-CartPole.pt
    python evaluate.py benchmarks/policies/ppo_cartpole-CartPole.pt

A weight loses what float16 cannot hold (one part in 2,000): score the file, not the run.
"""

import sys
from dataclasses import dataclass
from pathlib import Path

import torch
import tyro

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import evaluate


@dataclass
class Args:
    run: tyro.conf.Positional[Path]  # run folder, or a checkpoint
    policy: tyro.conf.Positional[Path]  # the file to write


def main(args):
    checkpoint = evaluate.load_checkpoint(evaluate.find_checkpoint(args.run))
    kept = {name: checkpoint[name] for name in ("format", "script", "args", "global_step", "versions")}
    kept["args"] |= {"run_dir": None, "resume": None}  # of the machine that trained
    weights = checkpoint["model"].items()
    kept["model"] = {name: weight.half() if weight.numel() > 1000 else weight for name, weight in weights}
    if broken := [name for name, weight in kept["model"].items() if not weight.isfinite().all()]:
        sys.exit(f"export.py: {broken[0]} has a weight that is too large for half precision (65,504), or not a number.")
    torch.save(kept, args.policy)
    print(f"{args.policy}: {args.policy.stat().st_size / 1e6:.2f} MB. Score it: python evaluate.py {args.policy}")


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
