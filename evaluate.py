# /// script
# requires-python = ">=3.11"
# dependencies = [
#     "ale-py==0.12.1",
#     "gymnasium[classic-control]==1.4.0",
#     "numpy==2.4.6",
#     "opencv-python==5.0.0.93",
#     "tensorboard==2.21.0",
#     "torch==2.13.0",
#     "tqdm==4.70.1",
#     "tyro==1.0.17",
# ]
# ///
"""Score a checkpoint: play whole episodes, and add up their unclipped rewards.

    python evaluate.py runs/<run>                           # the newest checkpoint of a run
    python evaluate.py runs/<run> --episodes 100 --greedy   # always the best action
    python evaluate.py runs/<run> --all                     # every checkpoint, into TensorBoard as eval/episodic_return
    python evaluate.py runs/<run> --follow                  # the same while it trains, and keeps the best as best.pt
    python evaluate.py runs/<run> --video film.mp4          # films the episodes; --render shows them in a window

A checkpoint names the script that wrote it, which builds environments and agent. The script must lie beside this
file or be given with --script, and define Args, Agent(envs, args) with act(obs, greedy), and make_envs(args, num_envs,
seed, training, render): a vector environment in SAME_STEP mode, reset with `seed`, with unclipped rewards where
training=False.
"""

import contextlib
import dataclasses
import functools
import hashlib
import importlib.util
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
import zipfile
from dataclasses import dataclass
from pathlib import Path

import gymnasium as gym
import numpy as np
import torch
import tyro
from gymnasium.vector import AutoresetMode
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

FORMAT = 2  # of a checkpoint; older ones can be read, too
PATIENCE = 30  # seconds without a sign of life after which a run counts as ended, and --follow ends, too

# Mean score of uniformly random play and of a professional tester, by ROM name, as DQN Zoo lists them (Quan and
# Ostrovski 2020, dqn_zoo/atari_data.py); up to 30 idle frames at the start, games cut off after 108,000 frames.
# fmt: off
RANDOM_AND_HUMAN = {
    "alien": (227.8, 7127.7), "amidar": (5.8, 1719.5), "assault": (222.4, 742.0), "asterix": (210.0, 8503.3),
    "asteroids": (719.1, 47388.7), "atlantis": (12850.0, 29028.1), "bank_heist": (14.2, 753.1),
    "battle_zone": (2360.0, 37187.5), "beam_rider": (363.9, 16926.5), "berzerk": (123.7, 2630.4),
    "bowling": (23.1, 160.7), "boxing": (0.1, 12.1), "breakout": (1.7, 30.5), "centipede": (2090.9, 12017.0),
    "chopper_command": (811.0, 7387.8), "crazy_climber": (10780.5, 35829.4), "defender": (2874.5, 18688.9),
    "demon_attack": (152.1, 1971.0), "double_dunk": (-18.6, -16.4), "enduro": (0.0, 860.5),
    "fishing_derby": (-91.7, -38.7), "freeway": (0.0, 29.6), "frostbite": (65.2, 4334.7), "gopher": (257.6, 2412.5),
    "gravitar": (173.0, 3351.4), "hero": (1027.0, 30826.4), "ice_hockey": (-11.2, 0.9), "jamesbond": (29.0, 302.8),
    "kangaroo": (52.0, 3035.0), "krull": (1598.0, 2665.5), "kung_fu_master": (258.5, 22736.3),
    "montezuma_revenge": (0.0, 4753.3), "ms_pacman": (307.3, 6951.6), "name_this_game": (2292.3, 8049.0),
    "phoenix": (761.4, 7242.6), "pitfall": (-229.4, 6463.7), "pong": (-20.7, 14.6), "private_eye": (24.9, 69571.3),
    "qbert": (163.9, 13455.0), "riverraid": (1338.5, 17118.0), "road_runner": (11.5, 7845.0),
    "robotank": (2.2, 11.9), "seaquest": (68.4, 42054.7), "skiing": (-17098.1, -4336.9),
    "solaris": (1236.3, 12326.7), "space_invaders": (148.0, 1668.7), "star_gunner": (664.0, 10250.0),
    "surround": (-10.0, 6.5), "tennis": (-23.8, -8.3), "time_pilot": (3568.0, 5229.2), "tutankham": (11.4, 167.6),
    "up_n_down": (533.4, 11693.2), "venture": (0.0, 1187.5), "video_pinball": (16256.9, 17667.9),
    "wizard_of_wor": (563.5, 4756.5), "yars_revenge": (3092.9, 54576.9), "zaxxon": (32.5, 9173.3),
}
# fmt: on


def fail(message, code=1):
    """End the program with one sentence instead of a traceback. Exit code 2: wrong usage; 1: anything else."""
    tqdm.write(f"{Path(sys.argv[0]).name}: {message}", file=sys.stderr)  # print would garble the progress bar
    sys.exit(code)


@functools.cache
def say_once(message):
    """A warning that --all and --follow do not repeat for each checkpoint."""
    tqdm.write(message, file=sys.stderr)


@dataclass
class Args:
    checkpoint: tyro.conf.Positional[str]  # a run folder (its newest checkpoint) or a checkpoint (.pt)
    episodes: int = 10  # whole episodes to play; more episodes give a narrower interval
    num_envs: int | None = None  # environments side by side; None: one per episode, at most 16; 1 to show or film
    seed: int = 1  # of environments and sampled actions
    greedy: bool = False  # always the best action; otherwise act as at the end of training
    cuda: bool = False  # use the GPU if there is one
    all: bool = False  # score every checkpoint of the run, and write the curve to its eval/ folder
    follow: bool = False  # score each new checkpoint until the run has ended; its best.pt is the best of them
    json: str | None = None  # also write the result to this file; with --all or --follow, a list of results
    render: bool = False  # show the episodes in a window, one after the other, at the speed of the game
    video: str | None = None  # film the episodes, one after the other, into this .mp4 file
    script: str | None = None  # the training script, if it is not beside evaluate.py

    def __post_init__(self):
        """Refuse what cannot work, naming the flag, what it got and what it takes."""
        if self.episodes < 1:
            fail(f"--episodes must be at least 1, got {self.episodes}.", code=2)
        if self.num_envs is not None and not 1 <= self.num_envs <= self.episodes:
            fail(f"--num-envs must be between 1 and --episodes ({self.episodes}), got {self.num_envs}.", code=2)
        if not 0 <= self.seed < 2**32:
            fail(f"--seed must be between 0 and {2**32 - 1}, got {self.seed}.", code=2)
        if self.all and not Path(self.checkpoint).is_dir():
            fail(f"--all takes a run folder, not {self.checkpoint}.", code=2)
        if self.follow and Path(self.checkpoint).is_file():
            fail(f"--follow takes a run folder, not {self.checkpoint}.", code=2)
        if self.follow and self.all:
            fail("--follow begins with all checkpoints that are there: leave out --all.", code=2)
        if (self.render or self.video) and (self.all or self.follow or (self.num_envs or 1) > 1):
            fail("--render and --video show one game at a time: leave out --all, --follow and --num-envs.", code=2)
        if self.video is not None and (Path(self.video).suffix != ".mp4" or not Path(self.video).parent.is_dir()):
            fail(f"--video {self.video} cannot be written: it must be an .mp4 in a folder that exists.", code=2)
        if self.json is not None and (Path(self.json).is_dir() or not Path(self.json).parent.is_dir()):
            fail(f"--json {self.json} cannot be written: it must be a file in a folder that exists.", code=2)
        if self.json and not os.access(self.json if Path(self.json).exists() else Path(self.json).parent, os.W_OK):
            fail(f"--json {self.json} cannot be written: no permission.", code=2)


# ---- Reload ----


def spread_seed(*key):
    """Integers hashed to a seed below 2**30. Environment i gets seed + i, and runs 1, 2, 3 must not share them."""
    return int(np.random.SeedSequence(key).generate_state(1)[0] >> 2)  # a plain int: environments refuse NumPy's


def list_checkpoints(run_dir):
    """The checkpoints of a run folder, oldest first. Ignores files that are not named by a step."""
    return sorted(path for path in Path(run_dir).glob("checkpoints/*.pt") if path.stem.isdigit())


def find_checkpoint(path):
    """The checkpoint that `path` names: a .pt itself, or the newest one of a run folder."""
    found = max(list_checkpoints(path), default=Path(path))
    if not found.is_file():
        fail(f"{path} holds no checkpoint (yet): name the folder of one run, or a .pt file.")
    return found


def load_checkpoint(path):
    """Read a checkpoint onto the CPU. Safe for untrusted files; refuses damaged ones."""
    try:
        with zipfile.ZipFile(path) as file:  # torch.load checks no checksums, and skips weights marked as folders
            if file.testzip() or any(entry.external_attr & 0x10 for entry in file.infolist()):
                raise ValueError
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        if checkpoint["format"] > FORMAT or not {"script", "args", "global_step", "model"} <= checkpoint.keys():
            raise ValueError
        return checkpoint
    except Exception as error:  # a damaged file can raise almost anything
        fail(f"{path} cannot be read: damaged, or no checkpoint of this version ({type(error).__name__}).")


def find_source(path):
    """The script.py of the run that wrote a checkpoint, or None; `path` may also be the run's best.pt."""
    sources = [folder / "script.py" for folder in path.resolve().parents[:2]]
    return next(filter(Path.is_file, sources), None)


def find_script(checkpoint, path, script):
    """The file that wrote `checkpoint`: `script` if given, else {name}.py beside this file."""
    name = checkpoint["script"]
    if script is not None:
        if Path(script).suffix != ".py" or not Path(script).is_file():
            fail(f"--script {script} is not a Python file.", code=2)
        return Path(script)
    if not re.fullmatch(r"[\w-]+", name):
        fail(f"{path} names the script {name!r}, which is not a bare module name: give the file with --script.")
    found, ran = Path(__file__).with_name(f"{name}.py"), find_source(path)
    if not found.is_file():
        hint = f", for instance {ran}" if ran else ""
        fail(f"{path} was written by {name}.py, which is not beside evaluate.py: give it with --script{hint}.")
    if ran and ran.read_bytes() != found.read_bytes():
        say_once(f"{found.name} has changed since this run; what ran is --script {ran}")
    return found


def load_script(checkpoint, path, script):
    """The module that wrote `checkpoint`."""
    script = find_script(checkpoint, path, script)
    if (folder := str(script.resolve().parent)) not in sys.path:
        sys.path.insert(0, folder)  # an environment of one's own lies beside the script
    spec = importlib.util.spec_from_file_location(script.stem, script)
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)  # dataclasses look their module up there
    spec.loader.exec_module(module)
    if missing := {"Args", "make_envs", "Agent"} - vars(module).keys():
        fail(f"{script} must define {', '.join(sorted(missing))}.")
    if not hasattr(module.Agent, "act"):
        fail(f"{script} must define Agent.act(obs, greedy).")
    return module


@contextlib.contextmanager
def must_fit(path, module):
    """Ends the program where the checkpoint at `path` does not fit what `module` has by now."""
    try:
        yield
    except (TypeError, RuntimeError, AttributeError) as error:
        reason = " ".join(str(error).split())[:300]
        fail(f"{path} does not fit {module.__file__}, or the environment ({reason}); --script takes the one that ran.")


@contextlib.contextmanager
def environment_errors():
    """Lets an OSError of the environment, as of a lost connection, not pass for one of the disk."""
    try:
        yield
    except OSError as error:
        raise RuntimeError(f"the environment failed: {error!r}") from error


def rebuild(path, args, num_envs):
    """Returns the checkpoint, and the environments and the agent built from it."""
    checkpoint = load_checkpoint(path)
    module = load_script(checkpoint, path, args.script)
    device = torch.device("cuda" if args.cuda and torch.cuda.is_available() else "cpu")
    with must_fit(path, module):
        script_args = module.Args(**checkpoint["args"])
    render = {"render": True} if args.render or args.video else {}
    try:
        with environment_errors():
            envs = module.make_envs(script_args, num_envs, spread_seed(2, args.seed), training=False, **render)
    except TypeError as error:
        if render and "render" in str(error):
            fail(f"--render and --video need make_envs(..., render) and environments with render_mode: {error}.")
        raise
    if envs.metadata.get("autoreset_mode", AutoresetMode.SAME_STEP) != AutoresetMode.SAME_STEP:
        fail(f"{module.__file__} must make environments in SAME_STEP mode.")
    with must_fit(path, module):
        agent = module.Agent(envs, script_args).to(device)
        agent.load_state_dict(checkpoint["model"])
    if broken := [name for name, weights in agent.state_dict().items() if not weights.isfinite().all()]:
        fail(f"{path} holds weights that are not finite, in {broken[0]}: it cannot play.")
    return checkpoint, envs, agent.eval()


# ---- Play ----


class Screen:
    """Shows pictures in a window at the speed of the game, or films them, or both.

    The film is VP9 in an .mp4: what OpenCV can write without further software, and browsers play.
    """

    title = "evaluate.py: q ends it"

    def __init__(self, window, film, fps):
        self.window, self.film, self.fps = window, film, fps
        self.writer, self.pictures, self.next_time = None, 0, time.monotonic()
        if window:  # tried in another process: without a display, OpenCV aborts the one that asks
            os.environ.setdefault("QT_LOGGING_RULES", "default.warning=false")  # hides warnings about missing fonts
            code = f"import cv2; cv2.namedWindow({self.title!r})"
            attempt = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
            if attempt.returncode == 1:  # a Python exception: an OpenCV without windows, for example
                fail(f"--render cannot open a window: {attempt.stderr.strip().splitlines()[-1]}")
            if attempt.returncode:
                fail("--render needs a display, and found none; --video FILE.mp4 works without.")

    def show(self, picture):
        """picture: (H, W, 3) uint8 RGB, enlarged so that it is at least 400 pixels high."""
        import cv2

        if np.shape(picture)[2:] != (3,) or picture.dtype != np.uint8:
            fail("--render and --video need pictures from the environment's render(), (H, W, 3) uint8.")
        times = -(-400 // len(picture))
        picture = np.ascontiguousarray(picture.repeat(times, 0).repeat(times, 1)[..., ::-1])  # BGR, as OpenCV has it
        self.pictures += 1
        if self.film:
            if self.writer is None:
                size = (picture.shape[1], picture.shape[0])
                self.writer = cv2.VideoWriter(self.film, cv2.VideoWriter_fourcc(*"vp09"), self.fps, size)
                if not self.writer.isOpened():
                    fail(f"--video {self.film} cannot be written.")
            self.writer.write(picture)
        if self.window:
            self.next_time = max(self.next_time + 1 / self.fps, time.monotonic())
            cv2.imshow(self.title, picture)
            if cv2.waitKey(max(1, round(1000 * (self.next_time - time.monotonic())))) == ord("q"):
                raise KeyboardInterrupt

    def close(self):
        """Complete the film. One that was cut short can be played too."""
        if self.writer and self.writer.isOpened():
            import cv2

            self.writer.release()
            if not cv2.VideoCapture(self.film).read()[0]:  # OpenCV does not say that the disk was full
                fail(f"--video {self.film} could not be written: is the disk full?")
            length = self.pictures / self.fps
            print(f"{self.film}: {self.pictures:,} pictures, {length:.1f} s at {self.fps:g} per second", flush=True)


@torch.no_grad()
def play(envs, agent, episodes, greedy, bar, screen=None):
    """Play whole episodes. Gives three lists: returns, lengths in steps, and whether each was truncated.

    How many episodes each environment plays is fixed beforehand: taking the first to finish would favor short ones.
    """
    N, device = envs.num_envs, next(agent.parameters()).device
    to_play = np.full(N, episodes // N)  # (N,)
    to_play[: episodes % N] += 1
    returns, lengths, truncations = [], [], []
    episode_return, episode_length = np.zeros(N), np.zeros(N, dtype=np.int64)
    obs, _ = envs.reset()
    while to_play.any():
        if screen:
            screen.show(envs.render()[0])
        actions = agent.act(torch.as_tensor(obs, device=device), greedy)
        obs, rewards, terminated, truncated, _ = envs.step(actions.cpu().numpy())
        episode_return += rewards
        episode_length += 1
        if episode_length.max() == 30_000:  # longer than any Atari game
            say_once("An episode has lasted 30,000 steps: if it cannot end, register it with max_episode_steps.")
        for i in np.flatnonzero(terminated | truncated):
            if to_play[i]:
                to_play[i] -= 1
                returns.append(float(episode_return[i]))
                lengths.append(int(episode_length[i]))
                truncations.append(bool(truncated[i] and not terminated[i]))
                bar.update()
            episode_return[i] = episode_length[i] = 0
    return returns, lengths, truncations


def mean_interval(returns):
    """95% interval of the mean by Student's t, whose quantile is simulated: no SciPy needed. None for one episode."""
    if len(returns) < 2:
        return None
    deviations = np.abs(np.random.default_rng(0).standard_t(len(returns) - 1, 1_000_000))
    margin = np.percentile(deviations, 95) * np.std(returns, ddof=1) / len(returns) ** 0.5
    return [float(np.mean(returns) - margin), float(np.mean(returns) + margin)]


def human_normalized(env_id, score):
    """0 for random play, 1 for a human; None where nobody published the two."""
    spec = gym.registry.get(env_id)
    game = spec.kwargs.get("game") if spec and str(spec.entry_point).startswith("ale_py") else None  # not MinAtar's
    if game not in RANDOM_AND_HUMAN:
        return None
    random, human = RANDOM_AND_HUMAN[game]
    return (score - random) / (human - random)


def score(path, args):
    """Play --episodes episodes with the checkpoint at `path`; returns all that --json writes."""
    watched = args.render or args.video
    num_envs = args.num_envs or (1 if watched else min(args.episodes, 16))
    checkpoint, envs, agent = rebuild(path, args, num_envs)
    torch.manual_seed(args.seed)
    env_id, step = checkpoint["args"].get("env_id", checkpoint["script"]), checkpoint["global_step"]
    how = "greedy" if args.greedy else "acting as at the end of training"
    where = "the GPU" if next(agent.parameters()).is_cuda else "the CPU (no GPU)" if args.cuda else "the CPU"
    episodes = f"{args.episodes} episode{'s' * (args.episodes > 1)}"
    print(f"{path}: {env_id} after {step:,} steps, {episodes}, {how}, on {where}", flush=True)
    screen = Screen(args.render, args.video, envs.metadata.get("render_fps") or 30) if watched else None
    with tqdm(total=args.episodes, unit="episode", disable=None, leave=False) as bar:  # None: only at a terminal
        try:
            with environment_errors():
                returns, lengths, truncated = play(envs, agent, args.episodes, args.greedy, bar, screen)
        finally:
            bar.close()
            if screen:
                screen.close()
    envs.close()
    return {
        "mean_return": float(np.mean(returns)),
        "std_return": float(np.std(returns, ddof=1)) if len(returns) > 1 else None,
        "ci95": mean_interval(returns),
        "episodes": len(returns),
        "returns": returns,
        "lengths": lengths,
        "truncated": sum(truncated),
        "human_normalized": human_normalized(env_id, np.mean(returns)),
        "env_id": env_id,
        "checkpoint": str(path),
        "global_step": step,
        "greedy": args.greedy,
        "seed": args.seed,
        "num_envs": num_envs,
    }


def report(result):
    """Print the result in one line."""
    line = f"return {result['mean_return']:.2f}"
    if result["episodes"] > 1:
        low, high = result["ci95"]
        line += f" ± {result['std_return']:.2f} (std) over {result['episodes']} episodes"
        line += f", 95% interval of the mean {low:.2f} to {high:.2f}"
    else:
        line += " in 1 episode"
    if result["human_normalized"] is not None:
        line += f", human-normalized {result['human_normalized']:.3f}"
    print(f"{line}, time limit reached in {result['truncated']} of {result['episodes']}", flush=True)


def score_all(run_dir, args):
    """Score every checkpoint of a run, and write the curve to its eval/ folder."""
    earlier = list(run_dir.glob("eval/events.*"))  # of an earlier curve, which stays until this one is whole
    results, whole = [], False
    try:
        writer = SummaryWriter(run_dir / "eval")
    except OSError as error:
        fail(f"{run_dir / 'eval'} cannot be written: {error.strerror}.")
    own = set(run_dir.glob("eval/events.*")) - set(earlier)
    try:
        with writer:
            for path in list_checkpoints(run_dir):
                results.append(score(path, args))
                report(results[-1])
                write_json(results, args)
                writer.add_scalar("eval/episodic_return", results[-1]["mean_return"], results[-1]["global_step"])
                writer.flush()
        whole = True
    except OSError as error:
        fail(f"{error.filename or f'the output or {run_dir}/eval'} cannot be read or written: {error.strerror}.")
    finally:  # TensorBoard would mix the two curves: one of them goes, this one if it was cut short
        for file in earlier if whole else own if earlier else ():
            file.unlink(missing_ok=True)  # another --all may have removed it
    print(f"Look at the curve: tensorboard --logdir {run_dir}")


def write_json(result, args):
    """Write what was scored to the file that --json names."""
    if args.json:
        try:
            Path(args.json).write_text(json.dumps(result, indent=2))
        except OSError as error:
            fail(f"--json {args.json} could not be written: {error.strerror}.")


# ---- Follow ----


def is_running(run_dir):
    """Whether a run is going on: a process holds its lock, or wrote to its curves a moment ago.

    Linux lists all locks. To try the lock would be to hold it for a moment, and a run that starts just then would be
    refused. Other systems have no such list, and it omits other machines and containers: there, the curves tell.
    """
    with contextlib.suppress(OSError):
        if f":{(run_dir / '.lock').stat().st_ino} " in Path("/proc/locks").read_text():
            return True
    return time.time() - max((path.stat().st_mtime for path in run_dir.glob("events.*")), default=0) < PATIENCE


def new_checkpoints(run_dir):
    """Yields the best.pt of an earlier --follow, then each checkpoint as it comes, until the run has ended."""
    seen, deadline = set(), time.monotonic() + PATIENCE
    while True:
        running = is_running(run_dir)  # asked before looking, or what a run saves at its end would be missed
        while new := [path for path in (*run_dir.glob("best.pt"), *list_checkpoints(run_dir)) if path not in seen]:
            seen.add(new[0])
            yield new[0]
        if not running and time.monotonic() > deadline:  # a run may be started, or resumed, after its --follow
            return
        time.sleep(1)


def scoring_flags(args, source):
    """What a score depends on, besides the checkpoint: flags, and the content of the training script."""
    script = hashlib.sha256(source.read_bytes()).hexdigest()
    return [args.episodes, args.seed, args.greedy, args.num_envs, args.script, script]


def open_scores(run_dir, flags):
    """The file of results, the curve, and those results in the file that have the same flags: {SHA-256: result}."""
    (run_dir / "eval").mkdir(exist_ok=True)
    file, known = open(run_dir / "eval" / "scores.jsonl", "a+"), {}
    try:
        import fcntl

        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        fail(f"{run_dir} is already followed by another process.")
    except (ImportError, OSError):  # Windows; a file system without locks
        pass
    file.seek(0)
    for line in (text := file.read()).splitlines():
        with contextlib.suppress(AttributeError, KeyError, TypeError, ValueError):  # a full disk cut it short
            result = json.loads(line)
            if result.pop("flags") == flags:
                known[result.pop("sha256")] = result
    file.write("\n" * bool(text and text[-1] != "\n"))  # or the next line would go on where that one was cut
    writer = SummaryWriter(run_dir / "eval", purge_step=0)  # hides the earlier curve, which may be of other flags
    for step, result in {result["global_step"]: result for result in known.values()}.items():
        writer.add_scalar("eval/episodic_return", result["mean_return"], step)
    return file, writer, known


def keep_best(path, best_path):
    """Make best_path a hard link to a checkpoint, which costs no disk; a copy where the file system has none."""
    new = best_path.with_suffix(".tmp")
    new.unlink(missing_ok=True)  # left by a process that was killed
    try:
        new.hardlink_to(path.resolve())
    except OSError:
        with open(new, "xb") as file:  # x: a new file, for an old one may be a link to another checkpoint
            file.write(path.read_bytes())
    new.replace(best_path)


@contextlib.contextmanager
def lowest_priority():
    """Where the cores do not suffice for both, training goes first."""
    torch.set_num_threads(1)
    if hasattr(os, "nice"):  # not on Windows
        os.nice(19)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # which would otherwise skip the end of this
    group, before = Path("/proc/self/autogroup"), None  # Linux weighs terminals, and heeds nice only within each
    with contextlib.suppress(OSError, IndexError):  # IndexError: the file of a process in no such group is empty
        before = group.read_text().split()[-1]
        group.write_text("19")
    try:
        yield
    finally:
        if before not in (None, "19"):  # 19: another --follow's, which gives the weight back itself
            with contextlib.suppress(OSError):
                group.write_text(before)


def follow(run_dir, args):
    """Score each checkpoint of a run as it comes, and keep the best. Returns the exit code."""
    print(f"Following {run_dir} until its run has ended. Ctrl-C stops it; the same command goes on.", flush=True)
    best, best_path, code = None, run_dir / "best.pt", 0
    try:
        for path in new_checkpoints(run_dir):
            if best is None:  # only now: a folder that holds no run stays as it is
                source = find_script(load_checkpoint(path), path, args.script)
                file, writer, known = open_scores(run_dir, scoring_flags(args, source))
            checksum = hashlib.sha256(path.read_bytes()).hexdigest()  # best.pt has the same as its checkpoint
            result, is_new = known.get(checksum), checksum not in known
            if is_new:
                result = known[checksum] = score(path, args)
                report(result)
                line = result | {"sha256": checksum, "flags": scoring_flags(args, source)}
                print(json.dumps(line), file=file, flush=True)
                writer.add_scalar("eval/episodic_return", result["mean_return"], result["global_step"])
                writer.flush()
            write_json(list(known.values()), args)
            if best is None or result["mean_return"] > best["mean_return"]:
                best = result
                if path != best_path:
                    keep_best(path, best_path)
            if is_new:
                which = "this one" if best is result else f"that after {best['global_step']:,} steps"
                print(f"best so far: {which}", flush=True)
    except KeyboardInterrupt:
        if best is None:
            raise
        code = 130
    except OSError as error:
        fail(f"{run_dir} cannot be followed: {error}.")
    if best is None:
        fail(f"{run_dir} holds no checkpoint, and no run is writing one.")
    again = dataclasses.replace(args, checkpoint=str(best_path), follow=False, seed=(args.seed + 1) % 2**32)
    flags = ["--episodes", args.episodes, "--seed", again.seed, *["--greedy"] * args.greedy, *["--cuda"] * args.cuda]
    flags += ["--script", args.script] * bool(args.script) + ["--num-envs", args.num_envs] * bool(args.num_envs)
    command = shlex.join(map(str, ["python", sys.argv[0], best_path, *flags]))
    print(f"Best of {len(known)}: {best['mean_return']:.2f} after {best['global_step']:,} steps, kept as {best_path}.")
    print(f"The best of many is scored too high. On fresh seeds: {command}", flush=True)
    if code == 0:
        fresh = score(best_path, again)
        report(fresh)
        write_json([*known.values(), fresh], args)
    return code


def main(args):
    if args.follow:
        with lowest_priority():
            return follow(Path(args.checkpoint), args)
    path = find_checkpoint(args.checkpoint)
    if args.all:
        score_all(Path(args.checkpoint), args)
    else:
        result = score(path, args)
        report(result)
        write_json(result, args)


if __name__ == "__main__":
    try:
        sys.exit(main(tyro.cli(Args, description=__doc__)))
    except KeyboardInterrupt:
        fail("stopped before the last episode ended.", code=130)
