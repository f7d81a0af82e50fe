"""dqn_atari.py: its replay buffer against one that stores every stack whole, its targets, schedules and counts."""

import copy
import subprocess
import sys
import time
from collections import defaultdict

import numpy as np
import pytest
import torch
from conftest import ROOT, SHORT, flags, reload
from probes import DelayedReward, Endless, InFrames, RewardFromActionAndObs, TruncatedEndless

import dqn_atari
import evaluate
from dqn_atari import Args, ReplayBuffer, annealed_epsilon, dqn_update, epsilon_greedy, td_target, update_target

STACK = 4


class Games:
    """N games of random length whose frames are numbered, so that no two are alike; they end in every way there is."""

    def __init__(self, num_envs, random, ends):
        self.num_envs, self.random, self.ends, self.number = num_envs, random, ends, 0
        self.obs = np.stack([self.start() for _ in range(num_envs)])

    def frame(self):
        self.number += 1
        return np.frombuffer(np.uint32(self.number).tobytes(), np.uint8).reshape(2, 2)

    def start(self):
        return np.concatenate([np.zeros((STACK - 1, 2, 2), np.uint8), self.frame()[None]])

    def step(self):
        """What ReplayBuffer.add takes, and the N transitions as whole stacks."""
        N = self.num_envs
        actions, rewards = self.random.integers(0, 6, N), self.random.integers(-1, 2, N)
        kinds = self.random.choice(
            ["on", "terminated", "truncated", "life_lost"], N, p=[1 - sum(self.ends), *self.ends]
        )
        seen_next = np.stack([np.concatenate([obs[1:], self.frame()[None]]) for obs in self.obs])
        terminated, ended = np.isin(kinds, ["terminated", "life_lost"]), np.isin(kinds, ["terminated", "truncated"])
        transitions = [
            (self.obs[n].tobytes(), seen_next[n].tobytes(), actions[n], rewards[n], terminated[n]) for n in range(N)
        ]
        final_obs = {n: seen_next[n] for n in np.flatnonzero(kinds == "truncated")}
        self.obs = np.stack([self.start() if ended[n] else seen_next[n] for n in range(N)])
        return (actions, rewards, terminated, ended, final_obs, self.obs), transitions


def check(buffer, stored):
    """That what is sampled is what is stored: every transition, and no other, with its stack and the next one."""
    expected = {row[0]: row[1:] for row in stored}  # a stack is seen once: frames are numbered
    frames, actions, rewards, terminated = (x.numpy() for x in buffer.sample(40 * len(stored)))
    sampled = set()
    for stack, action, reward, end in zip(frames, actions, rewards, terminated, strict=True):
        next_stack, *rest = expected[stack[:-1].tobytes()]
        assert rest == [action, reward, end]
        assert end or next_stack == stack[1:].tobytes()  # nobody looks at what follows an end
        sampled.add(stack[:-1].tobytes())
    assert sampled == expected.keys()  # a miss has a chance below 1e-14


def random_buffer(seed, path):
    """Games, a buffer for them, the rows of its capacity, and the rows that it must have room for besides."""
    random = np.random.default_rng(seed)
    num_envs, rows = random.integers(1, 5), random.integers(1, 40)
    capacity = int(rows * num_envs + random.integers(0, num_envs))  # what is no multiple is rounded down
    games = Games(num_envs, random, random.dirichlet([1, 1, 1]) * random.choice([0.02, 0.2, 0.9]))
    spare = int(random.integers(0, 60))
    return games, ReplayBuffer(path, games.obs, capacity, spare), rows, -(-spare // num_envs)


@pytest.mark.parametrize("seed", range(25))
def test_the_buffer_samples_what_one_of_whole_stacks_holds(seed, tmp_path):
    """Every transition among the last `capacity`, and no other; stacks and next stacks as the agent saw them."""
    games, buffer, rows, _ = random_buffer(seed, tmp_path / "replay.bin")
    stored = []
    for step in range(1, 250):
        added, transitions = games.step()
        buffer.add(*added)
        stored = (stored + transitions)[-rows * games.num_envs :]
        if step in (1, 2, 3, 4, 5, 20, 39, 40, 41, 42, 43, 44, 45, 130, 249):
            check(buffer, stored)


@pytest.mark.parametrize("seed", range(25))
def test_the_buffer_of_a_checkpoint_is_there_when_the_run_goes_on(seed, tmp_path):
    """Saved, filled further, killed and gone on with, twice: samples are those of the moment of the checkpoint.

    If more steps were added than there was room for, the oldest transitions are gone; no other is wrong.
    """
    games, buffer, rows, num_spare = random_buffer(seed, tmp_path / "replay.bin")
    random, num_envs, stored = np.random.default_rng(seed), games.num_envs, []
    for _ in range(random.integers(1, 150)):
        added, transitions = games.step()
        buffer.add(*added)
        stored = (stored + transitions)[-rows * num_envs :]
    torch.save(buffer.state_dict(), tmp_path / "state.pt")
    torch.manual_seed(seed)
    before = buffer.sample(100)
    furthest = 0

    for _ in range(2):
        further = int(random.choice([num_spare // 2, num_spare, num_spare + 3, num_spare + 100]))
        furthest = max(furthest, further)
        for _ in range(further):
            buffer.add(*games.step()[0])
        state = torch.load(tmp_path / "state.pt", weights_only=True)
        games.obs = np.stack([games.start() for _ in range(num_envs)])
        buffer = ReplayBuffer(tmp_path / "replay.bin", games.obs, rows * num_envs, spare=7, saved=state)
        if furthest <= num_spare:
            torch.manual_seed(seed)
            assert all(torch.equal(x, y) for x, y in zip(before, buffer.sample(100), strict=True))
            assert buffer.filled * num_envs == len(stored)
        if buffer.filled:
            check(buffer, stored[-buffer.filled * num_envs :])
        assert furthest <= num_spare + rows + STACK or not buffer.filled

    restored = stored[-buffer.filled * num_envs :] if buffer.filled else []
    for step in range(60):
        added, transitions = games.step()
        buffer.add(*added)
        restored = (restored + transitions)[-rows * num_envs :]
        if step % 7 == 3:
            check(buffer, restored)


def test_the_buffer_samples_uniformly(tmp_path):
    random = np.random.default_rng(0)
    games = Games(3, random, (0.1, 0.1, 0.1))
    torch.manual_seed(0)
    buffer = ReplayBuffer(tmp_path / "replay.bin", games.obs, 30, spare=10)
    for _ in range(25):
        buffer.add(*games.step()[0])
    newest = buffer.sample(60_000)[0][:, 3].flatten(1).numpy()
    counts = np.unique(newest, axis=0, return_counts=True)[1]
    assert len(counts) == 30
    assert np.abs(counts / 2000 - 1).max() < 0.1  # 4.5 standard deviations


def test_the_buffer_takes_no_memory_before_it_is_used_and_its_disk_at_once(tmp_path):
    obs = np.zeros((8, 4, 84, 84), np.uint8)
    before = resident()
    buffer = ReplayBuffer(tmp_path / "replay.bin", obs, 100_000, spare=50_000)
    assert buffer.path.stat().st_size == pytest.approx(150_000 * 7063, rel=1e-3)
    assert buffer.path.stat().st_blocks * 512 >= buffer.path.stat().st_size
    assert resident() - before < 0.1e9


def resident():
    """Bytes of memory that this process holds."""
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * 4096


class Table(torch.nn.Module):
    """Q-values looked up by the gray of the newest frame."""

    def __init__(self, q_values):
        super().__init__()
        self.q_values = torch.nn.Parameter(torch.tensor(q_values))

    def forward(self, obs):
        return self.q_values[obs[:, -1, 0, 0].long()]


def frames(*grays):
    """(M, 5, 84, 84): all frames but the last two are gray 0."""
    out = torch.zeros((len(grays), 5, 84, 84), dtype=torch.uint8)
    out[:, -2:] = torch.tensor(grays, dtype=torch.uint8)[:, :, None, None]
    return out


def test_td_target_by_hand():
    target = Table([[0.0, 3.0], [5.0, -1.0], [-2.0, -4.0]])
    seen_next = frames((0, 0), (0, 1), (0, 2), (0, 1))[:, 1:]
    terminated = torch.tensor([False, False, False, True])
    targets = td_target(target, torch.tensor([1.0, 0.0, -1.0, 0.5]), seen_next, terminated, 0.9)
    assert targets.tolist() == pytest.approx([1 + 0.9 * 3, 0.9 * 5, -1 - 0.9 * 2, 0.5])
    assert not targets.requires_grad


def test_a_gradient_step_by_hand():
    """Each value moves by 2 / M of its error, toward a target that stands still."""
    agent, target = Table([[0.0, 1.0], [2.0, 3.0]]), Table([[10.0, 20.0], [30.0, 40.0]])
    batch = frames((0, 1), (1, 0)), torch.tensor([1, 0]), torch.tensor([1.0, -1.0]), torch.tensor([False, True])
    loss, q_mean = dqn_update(agent, target, torch.optim.SGD(agent.parameters(), lr=0.1), batch, gamma=0.5).tolist()
    errors = (1 + 0.5 * 40) - 1, -1 - 2  # of Q(0, 1) and of Q(1, 0)
    assert loss == pytest.approx((errors[0] ** 2 + errors[1] ** 2) / 2)
    assert q_mean == pytest.approx(1.5)
    assert agent.q_values.detach().flatten().tolist() == pytest.approx([0, 1 + 0.1 * errors[0], 2 + 0.1 * errors[1], 3])
    assert target.q_values.detach().flatten().tolist() == [10, 20, 30, 40]


def test_target_network_moves_by_tau():
    agent, target = Table([[0.0, 1.0]]), Table([[10.0, 20.0]])
    update_target(target, agent, 0.25)
    assert target.q_values.tolist() == [[7.5, 15.25]]
    update_target(target, agent, 1.0)
    assert torch.equal(target.q_values, agent.q_values)


def test_epsilon_reaches_its_ends():
    args = Args(total_timesteps=1000, learning_starts=0, exploration_fraction=0.2, start_e=1.0, end_e=0.1)
    assert [annealed_epsilon(args, step) for step in (0, 100, 200, 1000)] == pytest.approx([1, 0.55, 0.1, 0.1])
    args.exploration_fraction = 0
    assert [annealed_epsilon(args, step) for step in (0, 1)] == pytest.approx([1, 0.1])


def test_epsilon_is_the_chance_of_a_random_action():
    torch.manual_seed(0)
    q_values = torch.tensor([0.0, 3.0, 1.0]).expand(60_000, 3)
    frequencies = epsilon_greedy(q_values, 0.3).bincount(minlength=3) / len(q_values)
    assert torch.allclose(frequencies, torch.tensor([0.1, 0.8, 0.1]), atol=0.01)
    assert (epsilon_greedy(q_values, 0.0) == 1).all()


def train(tmp_path, monkeypatch, probe=RewardFromActionAndObs, life_lost=False, signals=(), **settings):
    """The folder of a run on a probe."""
    monkeypatch.setattr(dqn_atari, "make_envs", lambda args, n, seed, training: InFrames(probe, n, life_lost))
    return dqn_atari.train(Args(**SHORT["dqn_atari"] | {"run_dir": str(tmp_path / "run")} | settings), signals)


@pytest.mark.parametrize("num_envs", [1, 2, 3, 8, 64])
@pytest.mark.parametrize(("learning_starts", "train_frequency"), [(0, 4), (40, 1), (41, 7)])
def test_gradient_steps_and_targets_come_when_a_single_game_would_bring_them(
    num_envs, learning_starts, train_frequency, tmp_path, monkeypatch
):
    """So does the fall of epsilon, which is the one that actions are drawn with."""
    updates, copies, epsilons, explored = [], [], [], []
    monkeypatch.setattr(dqn_atari, "dqn_update", lambda *a: updates.append(len(copies)) or torch.zeros(2))
    monkeypatch.setattr(dqn_atari, "update_target", lambda *a: copies.append(len(updates)))
    monkeypatch.setattr(dqn_atari.nn.utils, "get_total_norm", lambda grads: torch.zeros(()))
    monkeypatch.setattr(
        dqn_atari, "annealed_epsilon", lambda args, step: epsilons.append(step) or annealed_epsilon(args, step)
    )
    monkeypatch.setattr(dqn_atari, "epsilon_greedy", lambda q, epsilon: explored.append(epsilon) or q.argmax(-1))
    settings = dict(learning_starts=learning_starts, train_frequency=train_frequency, target_network_frequency=20)
    settings["exploration_fraction"] = 0.5
    run_dir = train(tmp_path, monkeypatch, num_envs=num_envs, buffer_size=128, total_timesteps=192, **settings)
    due = [step for step in range(1, 193) if step > learning_starts and step % train_frequency == 0]
    assert len(updates) == len(due)
    copies_due = [step for step in range(1, 193) if step > learning_starts and step % 20 == 0]
    assert copies == [sum(update <= step for update in due) for step in copies_due]  # each after its own updates
    assert epsilons[1:] == list(range(0, 192, num_envs))  # the first is what the first line says
    checkpoint = dqn_atari.load_checkpoint(dqn_atari.find_checkpoint(run_dir))
    assert checkpoint["global_step"] == 192
    args = Args(**checkpoint["args"])
    assert explored == [annealed_epsilon(args, step) for step in range(0, 192, num_envs)]


class Colorful(Endless):
    """No frame is black, as those are that a stack starts with."""

    def observe(self):
        return -0.9 + 0.1 * (self.t % 19)

    def reward(self, action):
        return 2.0 * action - 1


@pytest.mark.parametrize(("probe", "life_lost"), [(TruncatedEndless, False), (DelayedReward, False), (Colorful, True)])
def test_what_is_learned_from_is_what_was_played(probe, life_lost, tmp_path, monkeypatch):
    """Every transition of every batch: the stack that was seen, what was done, what came, the stack that followed."""
    played, batches = defaultdict(set), []
    step = InFrames.step

    def record(envs, actions):
        before = envs.stacks.copy()
        obs, rewards, terminated, truncated, infos = step(envs, actions)
        for n in range(envs.num_envs):
            after, no_future = infos["final_obs"][n] if truncated[n] else obs[n], terminated[n] or life_lost
            key = before[n].tobytes(), int(actions[n]), float(rewards[n]), bool(no_future)
            played[key].add(None if no_future else after.tobytes())
        return obs, rewards, terminated, truncated, infos

    monkeypatch.setattr(InFrames, "step", record)
    monkeypatch.setattr(dqn_atari, "dqn_update", lambda *a: batches.append(a[3]) or dqn_update(*a))
    train(tmp_path, monkeypatch, probe, life_lost, num_envs=3, total_timesteps=300, batch_size=8)
    ends = 0
    for batch in batches:
        for stacks, action, reward, end in zip(*(x.numpy() for x in batch), strict=True):
            following = played[stacks[:-1].tobytes(), int(action), float(reward), bool(end)]
            assert (None if end else stacks[1:].tobytes()) in following
            ends += end
    assert len(batches) == 71
    assert (ends > 0) == (probe is not TruncatedEndless)


def resume(run_dir, monkeypatch, *arguments):
    """Go on with a run; the target network's parameters at each gradient step."""
    seen = []

    def watch(agent, target_agent, *rest):
        seen.append(copy.deepcopy(target_agent.state_dict()))
        return dqn_update(agent, target_agent, *rest)

    monkeypatch.setattr(dqn_atari, "dqn_update", watch)
    monkeypatch.setattr("sys.argv", ["x.py", "--resume", str(run_dir), *map(str, arguments)])
    dqn_atari.train(dqn_atari.read_args())
    return seen


def test_resume_goes_on_with_target_network_and_replay(tmp_path, monkeypatch, capsys):
    signals, added, add = [], [], ReplayBuffer.add

    def add_and_signal(buffer, *row):
        added.append(row)
        if len(added) == 30:
            signals.append(15)
        return add(buffer, *row)

    monkeypatch.setattr(ReplayBuffer, "add", add_and_signal)
    monkeypatch.setattr(dqn_atari, "make_envs", lambda args, n, seed, training: InFrames(RewardFromActionAndObs, n))
    run_dir = tmp_path / "run"
    with pytest.raises(SystemExit):
        dqn_atari.train(Args(**SHORT["dqn_atari"] | {"run_dir": str(run_dir), "target_network_frequency": 48}), signals)
    before = dqn_atari.load_checkpoint(dqn_atari.find_checkpoint(run_dir))
    assert before["global_step"] == 60
    assert not all(torch.equal(before["model"][key], before["target_model"][key]) for key in before["model"])
    seen = resume(run_dir, monkeypatch)
    assert len(seen) == (80 - 60) // 4
    assert all(torch.equal(seen[0][key], before["target_model"][key]) for key in before["target_model"])
    assert "32 steps in the replay buffer" in capsys.readouterr().out
    assert not (run_dir / "replay.bin").exists()  # the run is finished


def test_resume_without_the_replay_file_fills_a_new_one_before_it_learns(tmp_path, monkeypatch, capsys):
    run_dir = train(tmp_path, monkeypatch, total_timesteps=80)  # removes its file at the end
    seen = resume(run_dir, monkeypatch, "--total-timesteps", 120)
    assert len(seen) == (120 - 80 - SHORT["dqn_atari"]["learning_starts"]) // 4
    out = capsys.readouterr().out
    assert "learning from 96 on" in out
    assert "0 steps in the replay buffer" in out


def test_the_file_of_another_buffer_is_not_taken_for_the_checkpoints(tmp_path, monkeypatch, capsys):
    """A finished run is resumed, makes a new file of the same size, and is killed before its next checkpoint."""
    run_dir = train(tmp_path, monkeypatch, total_timesteps=80)
    monkeypatch.setattr(dqn_atari, "save_checkpoint", lambda *a, **k: False)
    for _ in range(2):
        with pytest.raises(SystemExit):
            resume(run_dir, monkeypatch, "--total-timesteps", 120)
        assert (run_dir / "replay.bin").exists()
        assert "0 steps in the replay buffer" in capsys.readouterr().out


@pytest.mark.parametrize("changed", [("--num-envs", 4), ("--buffer-size", 34)])
def test_resume_with_other_sizes_is_refused_and_leaves_the_file(changed, tmp_path, monkeypatch, capsys):
    signals = [15]
    with pytest.raises(SystemExit):
        train(tmp_path, monkeypatch, signals=signals)
    content = (tmp_path / "run" / "replay.bin").read_bytes()
    with pytest.raises(SystemExit) as stop:
        resume(tmp_path / "run", monkeypatch, *changed)
    assert stop.value.code == 2
    assert "--num-envs and --buffer-size" in capsys.readouterr().err
    assert (tmp_path / "run" / "replay.bin").read_bytes() == content


def test_after_kill_9_the_buffer_is_that_of_the_checkpoint(tmp_path):
    """Killed while it plays on; compared, bit for bit, with a run that was stopped at the step of the checkpoint."""
    settings = SHORT["dqn_atari"] | {"save_freq": 60, "total_timesteps": 100_000}
    command = [sys.executable, ROOT / "dqn_atari.py", *flags(settings), "--run-dir", "killed"]
    process = subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    rows = 0
    while len(list(tmp_path.glob("killed/checkpoints/*.pt"))) < 3 or not 15 < rows % 30 < 25:  # amid 30 to the next
        assert process.poll() is None
        time.sleep(0.01)
        if (file := tmp_path / "killed" / "replay.bin").exists() and file.stat().st_size:
            rows = np.fromfile(file, np.int64, offset=file.stat().st_size - 16)[0]  # written so far
    process.kill()
    process.wait()
    path = dqn_atari.find_checkpoint(tmp_path / "killed")
    killed = dqn_atari.load_checkpoint(path)

    signals, add = [], ReplayBuffer.add
    with pytest.MonkeyPatch.context() as patch:

        def add_and_stop(buffer, *row):
            add(buffer, *row)
            if 2 * buffer.count == killed["global_step"]:
                signals.append(15)

        patch.setattr(ReplayBuffer, "add", add_and_stop)
        with pytest.raises(SystemExit):
            dqn_atari.train(Args(**settings, run_dir=str(tmp_path / "stopped")), signals)
    stopped = dqn_atari.load_checkpoint(dqn_atari.find_checkpoint(tmp_path / "stopped"))
    assert stopped["global_step"] == killed["global_step"]
    batches = []
    for name, checkpoint in (("killed", killed), ("stopped", stopped)):
        obs = np.zeros((2, 4, 84, 84), np.uint8)
        file = tmp_path / name / "replay.bin"
        buffer = ReplayBuffer(file, obs, settings["buffer_size"], settings["save_freq"], checkpoint["replay"])
        assert buffer.filled == 16
        torch.manual_seed(0)
        batches.append(buffer.sample(1000))
    assert all(torch.equal(x, y) for x, y in zip(*batches, strict=True))
    assert all(torch.equal(killed["model"][key], stopped["model"][key]) for key in killed["model"])


@pytest.mark.parametrize("broken", [{"replay": 3}, {"target_model": {"a": 1}}, {"target_model": None}])
def test_a_checkpoint_of_an_edited_copy_gets_one_sentence(broken, tmp_path, monkeypatch, capsys):
    run_dir = train(tmp_path, monkeypatch)
    path = dqn_atari.find_checkpoint(run_dir)
    torch.save(dqn_atari.load_checkpoint(path) | broken, path)
    capsys.readouterr()
    if "replay" in broken:
        resume(run_dir, monkeypatch, "--total-timesteps", 120)
        assert "0 steps in the replay buffer" in capsys.readouterr().out
    else:
        with pytest.raises(SystemExit) as stop:
            resume(run_dir, monkeypatch, "--total-timesteps", 120)
        assert stop.value.code == 1
        assert capsys.readouterr().err.count("\n") == 1


def test_evaluation_explores_as_much_as_the_checkpoint_says(tmp_path):
    run_dir = dqn_atari.train(Args(run_dir=str(tmp_path / "run"), end_e=0.3, **SHORT["dqn_atari"]))
    _, envs, agent = evaluate.rebuild(evaluate.find_checkpoint(run_dir), evaluate.Args(str(run_dir)), 2)
    obs = torch.as_tensor(envs.reset()[0][:1]).expand(2000, 4, 84, 84)
    torch.manual_seed(0)
    with torch.no_grad():
        best = agent.act(obs, greedy=True)
        assert (best == best[0]).all()
        assert (agent.act(obs, greedy=False) != best).float().mean().item() == pytest.approx(0.3 * 3 / 4, abs=0.04)


def test_nan_ends_the_run_and_is_not_saved(tmp_path, monkeypatch, capsys):
    """Also where it comes between two logs."""

    def spoil(agent, target_agent, optimizer, batch, gamma):
        if len(list((tmp_path / "run" / "checkpoints").iterdir())) == 1:
            next(agent.parameters()).data[0] = float("nan")
        return dqn_update(agent, target_agent, optimizer, batch, gamma)

    monkeypatch.setattr(dqn_atari, "dqn_update", spoil)
    with pytest.raises(SystemExit) as stop:
        train(tmp_path, monkeypatch, total_timesteps=200)
    assert stop.value.code == 1
    message = capsys.readouterr().err.splitlines()[-1]
    assert "td_loss is nan after 80 steps" in message
    assert "000000000040.pt" in message
    checkpoint, _ = reload(dqn_atari, tmp_path / "run")
    assert all(x.isfinite().all() for x in checkpoint["model"].values())
