"""What a machine with a GPU can tell about the scripts: are they right there, how fast, and do they learn?

    pip install -r benchmarks/requirements.txt  # beforehand: the rest needs no network
    python benchmarks/gpu.py --minutes 9 --out results
    python benchmarks/gpu.py --minutes 3 --out tryout --device cpu  # tiny: tries out this program without a GPU

Each result is written to results/gpu.csv as soon as it is there, and results/gpu.md shows all of them in tables. When
the minutes are over, the same command again does what is missing, and goes on learning where it was; with --retry, it
also tries again what failed. --peer adds the speed of other programs that write charts/SPS:

    python benchmarks/gpu.py \\
        --peer "benchmarks/cleanrl.py /path/to/cleanrl/cleanrl/ppo_atari.py --env-id PongNoFrameskip-v4"

It needs gymnasium, ale-py, numpy, torch, tyro, tensorboard, tqdm, opencv-python and psutil.
"""

import contextlib
import copy
import csv
import math
import multiprocessing
import os
import platform
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal, NamedTuple

# To look for a GPU must not start CUDA here: processes that are forked afterwards could not use it.
os.environ["PYTORCH_NVML_BASED_CUDA_CHECK"] = "1"

import numpy as np
import psutil
import torch
import torch._dynamo  # here, once: whatever has an optimizer imports it, and takes seconds
import tyro
from seeds import commit
from seeds import machine as processor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import dqn_atari
import ppo_atari
import ppo_cartpole

ROOT = Path(__file__).resolve().parents[1]
PONG, BREAKOUT = "PongNoFrameskip-v4", "BreakoutNoFrameskip-v4"
SCRIPTS = {"ppo_cartpole": ppo_cartpole, "ppo_atari": ppo_atari, "dqn_atari": dqn_atari}
POLICIES = {"ppo_cartpole": "CartPole", "ppo_atari": "Pong", "dqn_atari": "Pong"}  # in benchmarks/policies


@dataclass
class Args:
    minutes: float = 9  # when they are over, what is in progress is ended
    out: Path = Path("results")  # folder for the results and for the runs that learn
    device: Literal["cuda", "cpu"] = "cuda"  # cpu: with tiny sizes
    retry: bool = False  # also try again what failed
    peer: list[str] = field(default_factory=list)  # other programs to time, each quoted with its flags


@dataclass(frozen=True)
class Sizes:
    """How much work there is."""

    batch: int  # observations on which devices are compared
    games: tuple  # of ppo_atari.py; dqn_atari.py plays the first number of them
    warmup: int  # updates (DQN: thousands of steps) before a measurement of speed
    seconds: float  # of a measurement of speed, at least
    peer_warmup: float  # seconds: imports, compilation, a first fill of a replay buffer
    turns: int  # of a script and its limit
    compiled: dict  # name -> arguments of torch.compile
    repeated: dict  # script -> flags of short runs that save twice
    timed: dict  # script -> flags of runs that outlast every measurement
    pong: dict  # flags
    breakout: dict
    spare: float  # seconds: the learning stops so much before the end, to save


SMALL = {"num_steps": 16, "num_minibatches": 2, "update_epochs": 1}
SIZES = {
    "cuda": Sizes(
        batch=512,
        games=(8, 64, 256),
        warmup=2,
        seconds=8,
        peer_warmup=40,
        turns=5,
        compiled={"torch.compile": {}, "CUDA graphs": {"mode": "reduce-overhead"}},
        repeated={
            "ppo_cartpole": {"total_timesteps": 5120, "save_freq": 2560},
            "ppo_atari": {"total_timesteps": 8192, "save_freq": 4096},
            "dqn_atari": {"total_timesteps": 4000, "save_freq": 2000, "buffer_size": 2000, "learning_starts": 400},
        },
        timed={
            "ppo_atari": {"total_timesteps": 50_000_000, "save_freq": 50_000_000},
            "dqn_atari": {"total_timesteps": 60_000, "buffer_size": 60_000, "learning_starts": 2000},
        },
        pong={"num_envs": 32, "num_steps": 64, "num_minibatches": 8, "update_epochs": 3, "clip_coef": 0.2}
        | {"learning_rate": 1.5e-3, "total_timesteps": 2_000_000},
        breakout={},  # the defaults
        spare=20,
    ),
    "cpu": Sizes(  # just enough to see that every part of this program runs
        batch=32,
        games=(2,),
        warmup=0,
        seconds=0,
        peer_warmup=8,
        turns=1,
        compiled={"torch.compile": {"backend": "eager"}},  # the others take a minute to compile
        repeated={
            "ppo_cartpole": {"total_timesteps": 512, "save_freq": 256},
            "ppo_atari": SMALL | {"num_envs": 2, "total_timesteps": 64, "save_freq": 32},
            "dqn_atari": {"num_envs": 2, "total_timesteps": 64, "save_freq": 32, "buffer_size": 64}
            | {"learning_starts": 16},
        },
        timed={
            "ppo_atari": SMALL,
            "dqn_atari": {"total_timesteps": 50_000, "buffer_size": 2000, "learning_starts": 100}
            | {"train_frequency": 200},
        },
        pong=SMALL | {"num_envs": 2, "total_timesteps": 64},
        breakout=SMALL | {"num_envs": 2, "total_timesteps": 64},
        spare=0,
    ),
}


# ---- Right ----

# How far loss and gradients may be from the CPU's in the same precision, relative to their size. By default, cuDNN's
# convolutions round float32 to 10 bits (TF32); bfloat16 has 7. On the CPU, gradients in bfloat16 are 0.1 (DQN) and 0.2
# (PPO) from those in float32.
TOLERANCE = {"float32 without TF32": 0.001, "float32": 0.1, "bfloat16": 0.4}


def play(envs, agent, count):
    """What `agent` sees and does on the CPU: obs (count, ...), next_obs (count, ...), actions (count,)."""
    obs, _ = envs.reset(seed=1)
    seen, actions = [torch.as_tensor(obs.copy())], []
    with torch.no_grad():
        for _ in range(count // envs.num_envs):
            actions.append(agent.act(seen[-1], greedy=False))
            obs, *_ = envs.step(actions[-1].numpy())
            seen.append(torch.as_tensor(obs.copy()))
    return torch.cat(seen[:-1]), torch.cat(seen[1:]), torch.cat(actions)


def make_batch(module, envs, agent, size):
    """What the script's update is given, with outcomes drawn at random; on the CPU."""
    obs, next_obs, actions = play(envs, agent, size)
    if hasattr(module, "dqn_update"):
        frames = torch.cat([obs, next_obs[:, -1:]], dim=1)  # (M, 5, 84, 84)
        return [frames, actions, torch.randn(size), torch.rand(size) < 0.1]
    with torch.no_grad():
        logits, values = agent(obs)
    logprobs = logits.log_softmax(-1).gather(-1, actions.unsqueeze(-1)).squeeze(-1)
    old_logprobs, old_values = logprobs + 0.2 * torch.randn(size), values + 0.2 * torch.randn(size)  # so that both clip
    return [obs, actions, old_logprobs, old_values, torch.randn(size), values + torch.randn(size)]


def learn_from(module, args, agent, batch):
    """The loss, the gradients (one vector), and the actions thought best, computed where `agent` is."""
    batch = [x.to(next(agent.parameters()).device) for x in batch]
    if hasattr(module, "dqn_update"):
        no_step = torch.optim.SGD(agent.parameters(), lr=0.0)
        loss = module.dqn_update(agent, copy.deepcopy(agent), no_step, batch, args.gamma)["td_loss"]
        obs = batch[0][:, :-1]
    else:
        loss, _ = module.ppo_loss(agent, batch, args)
        loss.backward()
        obs = batch[0]
    gradients = torch.cat([p.grad.flatten() for p in agent.parameters()]).cpu()
    with torch.no_grad():
        return loss.item(), gradients, agent.act(obs, greedy=True).cpu()


def compare(script, precision, device, sizes):
    """A trained policy's loss, gradients and actions on `device`, against those on the CPU."""
    module = SCRIPTS[script]
    torch.backends.cudnn.allow_tf32 = precision == "float32"
    torch.backends.cuda.matmul.allow_tf32 = False  # its default; some installations change it
    checkpoint = module.load_checkpoint(ROOT / f"benchmarks/policies/{script}-{POLICIES[script]}.pt")
    args = module.Args(**checkpoint["args"])
    if hasattr(args, "bf16"):
        args = replace(args, bf16=precision == "bfloat16")
    torch.manual_seed(1)
    envs = module.make_envs(args, sizes.games[0], seed=1, training=True)
    agent = module.Agent(envs, args)
    agent.load_state_dict({name: x.float() for name, x in checkpoint["model"].items()})
    batch = make_batch(module, envs, agent, sizes.batch)
    on_cpu = learn_from(module, args, copy.deepcopy(agent), batch)
    on_device = learn_from(module, args, agent.to(device), batch)
    loss = abs(on_device[0] - on_cpu[0]) / abs(on_cpu[0])
    gradients = ((on_device[1] - on_cpu[1]).norm() / on_cpu[1].norm()).item()
    actions = (on_device[2] == on_cpu[2]).float().mean().item()
    right = max(loss, gradients) <= TOLERANCE[precision] and actions >= 0.98
    found = {"loss differs by": f"{loss:.1e}", "gradients differ by": f"{gradients:.1e}"}
    return found | {"same actions": f"{actions:.1%}", "right": "yes" if right else "NO"}


def weights(module, run_dir):
    model = module.load_checkpoint(module.find_checkpoint(run_dir))["model"]
    return torch.cat([x.double().flatten() for x in model.values()])


def repeat(script, device, sizes):
    """Train twice with the same seed, and once from the first run's first checkpoint on: are the weights the same?"""
    module, found = SCRIPTS[script], {}
    args = module.Args(**sizes.repeated[script], cuda=device == "cuda", torch_deterministic=True)
    save = module.Run.save

    def save_and_copy(run):
        save(run)
        if not resumed.exists():
            shutil.copytree(run.folder, resumed)

    with tempfile.TemporaryDirectory() as folder:
        first, again, resumed = (Path(folder) / name for name in ("first", "again", "resumed"))
        try:
            module.Run.save = save_and_copy
            for run_dir in (first, again, resumed):
                if module.train(replace(args, run_dir=str(run_dir))) != 0:
                    raise RuntimeError("the run was stopped")
        finally:
            module.Run.save = save
        for name, run_dir in (("trained again", again), ("resumed", resumed)):
            difference = (weights(module, run_dir) - weights(module, first)).abs().max().item()
            found[name] = "same weights" if difference == 0 else f"weights differ by up to {difference:.1e}"
    return found


# ---- Fast ----


def speed(script, games, variant, device, sizes):
    """Steps per second in training on Pong."""
    module, times, points, skip = SCRIPTS[script], [], [], sizes.warmup
    args = module.Args(env_id=PONG, num_envs=games, cuda=device == "cuda", bf16=variant == "--bf16")
    if variant in sizes.compiled:

        class CompiledAgent(module.Agent):
            def __init__(self, envs, args):
                super().__init__(envs, args)
                self.compile(**sizes.compiled[variant])

        module.Agent = CompiledAgent
    log = module.Run.log

    def timed_log(run, metrics, **charts):
        log(run, metrics, **charts)  # which waits for the GPU
        if metrics:  # DQN has none until it learns
            times.append(time.perf_counter())
            points.append(run.global_step)
        run.stopped = len(times) > skip + 1 and times[-1] - times[skip] > sizes.seconds

    module.Run.log = timed_log
    with tempfile.TemporaryDirectory() as folder:
        module.train(replace(args, **sizes.timed[script], run_dir=f"{folder}/run"))
    return {variant: f"{(points[-1] - points[skip]) / (times[-1] - times[skip]):,.0f}"}


def peer(command, sizes):
    """Steps per second of another program."""
    from speed import Run

    with tempfile.TemporaryDirectory() as folder:
        run = Run(f"python {command}", folder)
        try:
            for seconds in (sizes.peer_warmup, sizes.seconds + 4):
                turn = run.turn(seconds)
                if turn is None:
                    raise RuntimeError((run.folder / "output.txt").read_text()[-2000:])
            run.turns.append(turn)
            return {"plain": f"{run.rates()[0]:,.0f}"}
        finally:
            run.signal(signal.SIGKILL)


def transfer(module, args, device):
    """Milliseconds that frames and actions travel, per 1,000 steps."""
    envs = module.make_envs(args, args.num_envs, seed=1, training=True)
    obs, calls = envs.reset(seed=1)[0], 100
    actions = torch.zeros(args.num_envs, dtype=torch.int64, device=device)
    for _ in range(2):  # the first time warms up
        start = time.perf_counter()
        for _ in range(calls):
            torch.as_tensor(obs).to(device)
            actions.cpu()
        seconds = time.perf_counter() - start
    envs.close()
    return 1e6 * seconds / calls / args.num_envs


def where(script, games, device, sizes):
    """Milliseconds per 1,000 steps in training on Pong, part by part, and how near to the limit that is."""
    import limit

    module = SCRIPTS[script]
    args = module.Args(env_id=PONG, num_envs=games, cuda=device == "cuda")
    args = replace(args, **sizes.timed[script])
    rows = limit.measure(module, args, sizes.turns, max(1, sizes.warmup))  # the first turn includes the start
    steps = np.array([row["steps"] for row in rows])
    milliseconds = {
        part: np.median([1e6 * row["of script"].get(part, 0) for row in rows] / steps)
        for part in ("script", *limit.PARTS, "replay buffer", "all else")
    }
    milliseconds["copies of frames and actions"] = transfer(module, args, device)
    milliseconds["limit"] = np.median([1e6 * sum(row["of limit"].values()) for row in rows] / steps)
    return {part: f"{value:,.1f}" for part, value in milliseconds.items()}


# ---- Learned ----


def learn(env_id, target, settings, device, folder, deadline, earlier):
    """Train until the mean of 100 games is `target`, or until the deadline; go on where an earlier call ended.

    earlier: minutes of training before this call.
    """
    start, found = time.time(), {}
    args = ppo_atari.Args(env_id=env_id, cuda=device == "cuda", run_dir=str(folder / env_id), **settings)
    log = ppo_atari.Run.log

    def log_and_look(run, metrics, **charts):
        log(run, metrics, **charts)
        games, minutes = len(run.recent_returns), earlier + (time.time() - start) / 60
        mean = np.mean(run.recent_returns) if games else np.nan
        reached = games == 100 and mean >= target
        found.update({"steps": f"{run.global_step:,}", "minutes": f"{minutes:.2f}"})
        found.update({"mean of up to 100 games": f"{mean:.1f}", "done": f"{target} reached" if reached else "not yet"})
        run.stopped = run.stopped or reached or time.time() > deadline

    ppo_atari.Run.log = log_and_look
    if ppo_atari.train(args) == 0:
        found["done"] = "all steps"
    return found or {"done": "not yet"}  # stopped before the first update had ended


# ---- All of it ----


def machine(device):
    """What the results are of."""
    if device == "cuda" and not torch.cuda.is_available():
        return {"GPU": "failed: PyTorch finds no GPU. --device cpu tries out this program without one"}
    name = torch.cuda.get_device_name() if device == "cuda" else "none"
    versions = f"PyTorch {torch.__version__}, CUDA {torch.version.cuda}, Python {platform.python_version()}"
    about = {"GPU": name, "processor": processor(), "versions": versions}
    return about | {"commit": commit()}


class Task(NamedTuple):
    """What fills some columns in one row of the table of one part. `column` is among them, and says that it is done."""

    part: str
    row: str
    column: str
    function: Callable  # returns {column: text}
    arguments: tuple = ()


def list_tasks(args, sizes):
    """What is to be found out, in order of worth, but for the learning."""
    device = args.device
    for script in SCRIPTS:
        for precision in list(TOLERANCE)[: 1 if script == "ppo_cartpole" else 3]:
            yield Task("Right", f"{script}.py, {precision}", "right", compare, (script, precision, device, sizes))
    for script in SCRIPTS:
        yield Task("The same again", f"{script}.py", "resumed", repeat, (script, device, sizes))
    cases = [("ppo_atari", games) for games in sizes.games] + [("dqn_atari", sizes.games[0])]
    for variant in ("plain", "--bf16", *sizes.compiled):
        for script, games in cases:
            row = f"{script}.py, {games} games"
            yield Task("Steps per second", row, variant, speed, (script, games, variant, device, sizes))
    for command in args.peer:
        yield Task("Steps per second", command, "plain", peer, (command, sizes))
    for script, games in cases:
        row = f"{script}.py, {games} games"
        yield Task("Milliseconds per 1,000 steps", row, "script", where, (script, games, device, sizes))


class Results:
    """What has been found, on the disk at any moment: text by part, row and column."""

    def __init__(self, folder):
        folder.mkdir(parents=True, exist_ok=True)
        self.path, self.found = folder / "gpu.csv", {}
        if self.path.exists():
            with open(self.path, newline="") as file:
                self.found = {(x["part"], x["row"], x["column"]): x["value"] for x in csv.DictReader(file)}

    def get(self, task):
        """What is in the task's column; None if nothing is."""
        return self.found.get((task.part, task.row, task.column))

    def is_done(self, task, retry=False):
        """Whether there is nothing left to do. What failed is done, unless it is to be tried again."""
        value = self.get(task) or "not yet"
        return value != "not yet" and not (retry and value.startswith("failed"))

    def add(self, task, values):
        self.found |= {(task.part, task.row, column): value for column, value in values.items()}
        with open(self.path.with_suffix(".tmp"), "w", newline="") as file:
            writer = csv.writer(file)
            writer.writerows([("part", "row", "column", "value"), *((*key, self.found[key]) for key in self.found)])
        os.replace(file.name, self.path)
        self.path.with_suffix(".md").write_text("\n".join(self.tables()))

    def tables(self):
        """A table for each part, in Markdown."""
        for part in dict.fromkeys(key[0] for key in self.found):
            rows = dict.fromkeys(key[1] for key in self.found if key[0] == part)
            columns = dict.fromkeys(key[2] for key in self.found if key[0] == part)
            yield from ("", f"**{part}**", "", f"| | {' | '.join(columns)} |", "|---" * (len(columns) + 1) + "|")
            for row in rows:
                cells = (self.found.get((part, row, column), "") for column in columns)
                yield f"| {row} | {' | '.join(cells)} |"
        yield ""


def run_task(task, pipe, log):
    """In a process of its own: a fault of the GPU ends only this task, and patched functions are gone afterwards."""
    for stream in (1, 2):
        os.dup2(log.fileno(), stream)
    try:
        pipe.send(task.function(*task.arguments))
    except BaseException as error:  # SystemExit: a script refused its flags
        traceback.print_exc()
        reason = "see log.txt" if isinstance(error, SystemExit) else " ".join(str(error).split())[-200:]
        reason = reason.replace("|", "/")
        pipe.send({task.column: f"failed: {type(error).__name__}: {reason}"})


def attempt(task, log, until):
    """Run a task in a process; what it found, or None if the time ran out.

    KeyboardInterrupt: its `args` have what a run that learns has found until then.
    """
    context = multiprocessing.get_context("fork")  # this process has not touched the GPU; imports need no repeating
    ours, theirs = context.Pipe()
    process = context.Process(target=run_task, args=(task, theirs, log))
    process.start()
    theirs.close()
    try:
        return ours.recv() if ours.poll(max(0.0, until - time.time())) else None
    except EOFError:
        process.join()
        return {task.column: f"failed: exit code {process.exitcode}"}
    except KeyboardInterrupt as stop:
        process.terminate()  # makes a run that learns save
        with contextlib.suppress(EOFError):
            if task.part == "Learning" and ours.poll(20):
                stop.args = (ours.recv(),)
        raise
    finally:
        with contextlib.suppress(psutil.NoSuchProcess):
            for child in [*psutil.Process(process.pid).children(recursive=True), process]:
                child.kill()
        process.join()


def main(args, start=None):
    deadline, sizes = (start or time.time()) + 60 * args.minutes, SIZES[args.device]
    results, log = Results(args.out), open(args.out / "log.txt", "a")
    print(f"{args.minutes:g} minutes; results in {args.out}/gpu.md and gpu.csv, all output in {args.out}/log.txt")

    def end(message):
        print(f"{message} Tables: {args.out}/gpu.md")
        sys.exit()

    def do(task, until=math.inf):
        """Try a task that is not done. Ends the program when the minutes are over."""
        if results.is_done(task, args.retry):
            return
        print(f"{task.part}: {task.row}, {task.column}", end=": ", flush=True)
        try:
            found = None if time.time() > deadline else attempt(task, log, min(until, deadline))
        except KeyboardInterrupt as stop:
            if stop.args and not stop.args[0][task.column].startswith("failed"):
                results.add(task, *stop.args)
            raise
        if found is None and time.time() >= deadline:
            end("the minutes are over. The same command does the rest.")
        found = found or {task.column: "failed: it took too long"}
        print(f"{found[task.column]} ({(deadline - time.time()) / 60:.1f} minutes left)", flush=True)
        results.add(task, found)

    about = attempt(Task("Machine", "", "GPU", machine, (args.device,)), log, deadline)
    if not about or about["GPU"].startswith("failed"):
        reason = about["GPU"].removeprefix("failed: ") if about else "the minutes were over at once"
        sys.exit(f"gpu.py: {reason}.")
    for (part, _, column), known in results.found.items():
        if (part, column) == ("Machine", "GPU") and known != about["GPU"]:
            sys.exit(
                f"gpu.py: {args.out} has results of {known}, not of {about['GPU']}: name another folder with --out."
            )
    results.add(Task("Machine", f"commit {about.pop('commit')}", "GPU", machine), about)  # a row for each commit
    for task in list_tasks(args, sizes):
        do(task, time.time() + 240)
    for env_id, target, settings in ((PONG, 18, sizes.pong), (BREAKOUT, math.inf, sizes.breakout)):
        minutes = results.get(Task("Learning", env_id, "minutes", learn))
        arguments = (env_id, target, settings, args.device, args.out, deadline - sizes.spare, float(minutes or 0))
        task = Task("Learning", env_id, "done", learn, arguments)
        do(task)
        if not results.is_done(task):
            end("The minutes are over. The same command does the rest.")
    end("Done.")


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        main(tyro.cli(Args, description=__doc__), psutil.Process().create_time())  # importing takes time, too
    except KeyboardInterrupt:
        sys.exit("\ngpu.py: stopped. The same command does the rest.")
