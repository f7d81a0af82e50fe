"""How near does a training script come to the most that any such program could do on this machine?

    python benchmarks/limit.py ppo_atari.py --no-cuda --bf16
    python benchmarks/limit.py dqn_atari.py --no-cuda --learning-starts 2000 --total-timesteps 200000 \\
        --buffer-size 20000
    python benchmarks/limit.py ppo_cartpole.py --total-timesteps 1000000 --target-kl None

The limit is the work that no such program can do without, and nothing else: steps of the environments, forward passes
to choose actions, and gradient steps. The bare network does them on data that is already there: float or bfloat16, in
its memory format, its weights converted beforehand. Nothing is compiled. No sampling, storing, loss, or log. The script
and the limit take turns of one update each (DQN: 1,000 steps) in one process. PPO's --target-kl would end some updates
of the script early, but none of the limit. Leave the machine alone meanwhile.
"""

import contextlib
import copy
import importlib
import io
import sys
import tempfile
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import tyro
from clock import Clock
from speed import quartiles
from torch import nn
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

PARTS = ["environments", "network, to act", "gradient steps"]  # of the limit; a script has more


@dataclass
class Args:
    # one of the three training scripts; flags that are not listed here go to it
    script: tyro.conf.Positional[Literal["ppo_cartpole.py", "ppo_atari.py", "dqn_atari.py"]]
    turns: int = 12  # of the script and of the limit, that count
    warmup: int = 2  # turns that do not count


class Limit:
    """What a script must do on `device`, with the networks of its `agent` and with environments of its own."""

    def __init__(self, module, args, agent, device):
        self.args, self.device, self.is_dqn = args, device, hasattr(args, "train_frequency")
        self.envs = module.make_envs(args, args.num_envs, seed=1, training=True)
        self.envs.reset(seed=1)
        self.actions = np.random.default_rng(1).integers(0, self.envs.single_action_space.n, (1000, args.num_envs))
        bf16 = getattr(args, "bf16", False)
        if not hasattr(agent, "network"):  # CartPole
            networks = [agent.actor, agent.critic]
        else:
            networks = [agent.network if self.is_dqn else nn.Sequential(agent.network, agent.actor)]
        masters = copy.deepcopy(nn.ModuleList(networks)).to(device)  # what the optimizer updates, in float32
        for parameter in masters.parameters():
            parameter.grad = torch.zeros_like(parameter)
        self.optimizer = torch.optim.Adam(masters.parameters(), lr=1e-5, fused=True)
        self.networks = copy.deepcopy(masters).to(torch.bfloat16 if bf16 else torch.float32)
        size = args.batch_size if self.is_dqn else args.num_envs * args.num_steps // args.num_minibatches
        shape = self.envs.single_observation_space.shape
        self.few, self.many = (self.inputs((count, *shape), bf16) for count in (args.num_envs, size))

    def inputs(self, shape, bf16):
        x = torch.rand(shape, device=self.device, dtype=torch.bfloat16 if bf16 else torch.float32)
        return x.contiguous(memory_format=torch.channels_last) if x.ndim == 4 else x

    def act(self):
        with torch.no_grad():
            for network in self.networks:
                network(self.few)
        if self.device.type == "cuda":
            torch.cuda.synchronize()  # the games wait for the actions

    def learn(self):
        if self.is_dqn:  # the target network's pass
            with torch.no_grad():
                self.networks[0](self.many)
        for parameter in self.networks.parameters():
            parameter.grad = None
        sum(network(self.many).sum() for network in self.networks).backward()
        self.optimizer.step()

    def turn(self, steps):
        """Do what `steps` steps of training ask for; the seconds of each of PARTS."""
        args, calls = self.args, steps // self.args.num_envs
        updates = steps // args.train_frequency if self.is_dqn else args.update_epochs * args.num_minibatches
        marks = [time.perf_counter()]
        for t in range(calls):
            self.envs.step(self.actions[t % len(self.actions)])
        marks.append(time.perf_counter())
        for work, count in ((self.act, calls), (self.learn, updates)):
            for _ in range(count):
                work()
            if self.device.type == "cuda":
                torch.cuda.synchronize()
            marks.append(time.perf_counter())
        return dict(zip(PARTS, np.diff(marks), strict=True))


def measure(module, args, turns, warmup, bar=None):
    """Train with `args`, in turns with the limit. Returns, for each turn that counts, the steps, and the seconds of
    the script, of its parts, and of the parts of the limit; a list of dicts.
    """
    cuda = args.cuda and torch.cuda.is_available()
    clock, limit, rows, last = Clock(cuda), None, [], 0
    make_envs, log = module.make_envs, module.Run.log

    def make_timed_envs(*arguments, **keywords):
        envs = make_envs(*arguments, **keywords)
        clock.time("environments", envs, "step")
        return envs

    def log_and_take_turns(run, metrics, **charts):
        nonlocal limit, last
        log(run, metrics, **charts)  # which has waited for the GPU
        seconds, steps, last = clock.stop(), run.global_step - last, run.global_step
        if limit is None:
            module.make_envs = make_envs
            limit = Limit(module, args, run.state["model"], run.device)
        if metrics:  # DQN has none until it learns
            script = {"script": seconds, **clock.seconds, "all else": seconds - sum(clock.seconds.values())}
            rows.append({"steps": steps, "of script": script, "of limit": limit.turn(steps)})
            if bar is not None:
                bar.update()
        run.stopped = run.stopped or len(rows) == warmup + turns
        clock.start()

    with contextlib.ExitStack() as undo, tempfile.TemporaryDirectory() as folder:
        timed = [(module.Agent, "forward", "network, to act")]
        if hasattr(module, "dqn_update"):
            timed += [(module, "dqn_update", "gradient steps")]
            timed += [(module.ReplayBuffer, name, "replay buffer") for name in ("add", "sample")]
        else:
            timed += [(module, "ppo_update", "gradient steps")]
        for owner, name, part in timed:
            undo.callback(setattr, owner, name, getattr(owner, name))
            clock.time(part, owner, name)
        undo.callback(setattr, module, "make_envs", make_envs)
        undo.callback(setattr, module.Run, "log", log)
        undo.callback(setattr, module.Run, "end", module.Run.end)
        module.make_envs, module.Run.log = make_timed_envs, log_and_take_turns
        module.Run.end = lambda run: run.bar.close()  # which would tell how to resume a run that is soon gone
        clock.start()
        module.train(replace(args, run_dir=f"{folder}/run"))
    return rows[warmup:]


def report(rows):
    """What measure() found, in lines: the speeds and their ratio, and where the time goes."""
    steps = np.array([row["steps"] for row in rows])
    script = np.array([row["of script"]["script"] for row in rows])
    limit = np.array([sum(row["of limit"].values()) for row in rows])
    yield f"{quartiles(steps / script, 0)} steps/s are {quartiles(limit / script, 2)} of the limit,"
    yield f"{quartiles(steps / limit, 0)} steps/s: median (quartiles) of {len(rows)} turns."
    yield f"{'milliseconds per 1,000 steps':28} {'script':>9} {'limit':>9}"
    for part in [*PARTS, "replay buffer", "all else"]:
        medians = []
        for column in ("of script", "of limit"):
            values = [1e6 * row[column][part] / row["steps"] for row in rows if part in row[column]]
            medians.append(f"{np.median(values):9,.1f}" if values else f"{'':9}")
        if any(map(str.strip, medians)):
            yield f"{part:28} {' '.join(medians)}".rstrip()


def main():
    arguments, flags = tyro.cli(Args, description=__doc__, return_unknown_args=True)
    module = importlib.import_module(Path(arguments.script).stem)
    args = tyro.cli(module.Args, args=flags)
    module.check_args(args)
    bar = tqdm(total=arguments.warmup + arguments.turns, unit=" turns", file=sys.stderr)
    output = io.StringIO()
    try:
        with contextlib.redirect_stdout(output), contextlib.redirect_stderr(output):
            rows = measure(module, args, arguments.turns, arguments.warmup, bar)
    except SystemExit:
        sys.exit(output.getvalue())
    bar.close()
    if len(rows) < arguments.turns:
        advice = "stopped, or too few --total-timesteps"
        print(f"limit.py: {len(rows)} of {arguments.turns} turns: {advice}.", file=sys.stderr)
    if not rows:
        sys.exit(1)
    print(f"{arguments.script} {' '.join(flags)}, {torch.get_num_threads()} threads")
    print(*report(rows), sep="\n")
    sys.exit(len(rows) < arguments.turns)


if __name__ == "__main__":
    main()
