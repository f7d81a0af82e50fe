"""The pictures of docs/debugging.md: broken runs, most of them broken on purpose, beside runs as they should be.

    pip install -r benchmarks/requirements.txt
    python benchmarks/symptoms.py

Seed 1 where no other is given: pictures of what a symptom looks like, not measurements of how often it comes.
"""

import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path

import matplotlib
import tyro
from ablations import train, workers
from plot import pyplot, running_mean
from tqdm import tqdm

RETURN, KL, ENTROPY = "charts/episodic_return", "losses/approx_kl", "losses/entropy"
PONG = "--env-id PongNoFrameskip-v4 --total-timesteps 16000 --learning-starts 2000 --buffer-size 10000 --no-cuda "
PONG += "--exploration-fraction 0.1 --learning-rate 1e-3 --target-network-frequency 1000"
CASES = {  # name of the picture: script, flags of both runs, what is broken (flags or an edit), curves to show
    "does_not_rise": ("ppo_cartpole.py", "", "--learning-rate 1e-6", (RETURN, KL, ENTROPY)),
    "unstable": ("ppo_cartpole.py", "", "--learning-rate 0.02 --target-kl None", (RETURN, KL, "losses/grad_norm")),
    "collapse": ("ppo_cartpole.py", "", "--seed 213", (RETURN, KL, "losses/value_loss")),  # a rare seed that fails
    "entropy_at_zero": (  # another
        "ppo_cartpole.py",
        "--env-id Acrobot-v1 --seed 112 --ent-coef 0.01",
        "--ent-coef 0",
        (RETURN, ENTROPY, "losses/explained_variance"),
    ),
    "value_loss_explodes": (
        "ppo_cartpole.py",
        "",
        ("rollout.rewards[t] = torch.as_tensor(rewards)", "rollout.rewards[t] = torch.as_tensor(rewards) * 1000"),
        (RETURN, "losses/value_loss", "losses/grad_norm"),
    ),
    "explained_variance": (
        "ppo_cartpole.py",
        "",
        "--vf-coef 0",
        (RETURN, "losses/explained_variance", "losses/value_loss"),
    ),
    "kl_from_the_start": (  # the row holds what was seen after the action, not before
        "ppo_cartpole.py",
        "",
        (
            "rollout.rewards[t] = torch.as_tensor(rewards)",
            "rollout.obs[t], rollout.rewards[t] = torch.as_tensor(obs), torch.as_tensor(rewards)",
        ),
        (RETURN, KL, "losses/clipfrac"),
    ),
    "q_values_drift": (  # the target is computed by the network that runs after it
        "dqn_atari.py",
        PONG,
        ("targets = td_target(target_agent,", "targets = td_target(agent,"),
        ("losses/q_values", "losses/td_loss"),
    ),
}


@dataclass
class Args:
    only: list[str] = field(default_factory=lambda: list(CASES))  # names of pictures; all, if not given
    out: Path = Path("runs/symptoms")  # folder for the pictures
    jobs: int = 1  # runs side by side, each on one thread

    def __post_init__(self):
        if unknown := set(self.only) - set(CASES):
            sys.exit(f"symptoms.py: --only {sorted(unknown)[0]!r} is none of: {', '.join(CASES)}.")


def draw(name, healthy, broken, tags, out):
    figure, panels = pyplot.subplots(1, len(tags), figsize=(4 * len(tags), 2.8), layout="constrained")
    for axes, tag in zip(panels, tags, strict=True):
        curves = [running_mean(run, tag, window=20 if tag == RETURN else 1) for run in (healthy, broken)]
        for label, curve in zip(("as it should be", "broken"), curves, strict=True):
            axes.plot(*curve, label=label, linewidth=1.2)
        low, high = min(values.min() for _, values in curves), max(values.max() for _, values in curves)
        if high > 1e4:
            axes.set_yscale("symlog" if low < 0 else "log")
        axes.set(title=tag, xlabel="steps")
        axes.xaxis.set_major_formatter(matplotlib.ticker.EngFormatter())
        axes.grid(alpha=0.3)
    panels[0].legend()
    figure.savefig(out / f"{name}.png", dpi=90)
    pyplot.close(figure)


def main(args):
    args.out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder, workers(args.jobs) as pool:
        runs = {}  # (script, flags, what is broken) -> a run's folder, once it is there
        for name in args.only:
            script, flags, broken, _ = CASES[name]
            for change in ("", broken):
                if (script, flags, change) not in runs:
                    place = Path(folder) / f"{len(runs)}_{Path(script).stem}"
                    runs[script, flags, change] = pool.submit(train, script, flags, change, 1, place)
        for run in tqdm(runs.values(), unit=" runs"):
            run.result()
        for name in args.only:
            script, flags, broken, tags = CASES[name]
            pair = [runs[script, flags, change].result() for change in ("", broken)]
            draw(name, *(run_dir for run_dir, _ in pair), tags, args.out)
            print(args.out / f"{name}.png", *(f"({error})" for _, error in pair if error))


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
