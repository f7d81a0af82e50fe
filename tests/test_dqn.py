"""dqn_atari.py: its replay buffer against one that stores every stack whole, its targets, schedules and counts."""

import errno
import os
import signal
import subprocess
import sys
from collections import defaultdict
from types import SimpleNamespace

import gymnasium as gym
import numpy as np
import pytest
import torch
from conftest import ROOT, SHORT, flags, reload, same, train
from probes import DelayedReward, Endless, InFrames, Mixed, RewardFromActionAndObs, TruncatedEndless, play_in_frames
from test_checkpoint import curve, go

import dqn_atari
from dqn_atari import Args, ReplayBuffer, annealed_epsilon, dqn_update, epsilon_greedy, td_target, update_target

STACK = 4


class Games:
    """N games of random length whose frames are numbered, so that no two are alike; they end in every way there is."""

    single_observation_space = gym.spaces.Box(0, 255, (STACK, 2, 2), np.uint8)

    def __init__(self, num_envs, random, ends):
        self.num_envs, self.random, self.ends, self.number = num_envs, random, ends, 0

    def reset(self):
        self.obs = np.stack([self.start() for _ in range(self.num_envs)])
        return self.obs

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
        final_obs = {n: seen_next[n] for n in np.flatnonzero(kinds == "truncated").tolist()}
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


def random_buffer(seed, folder):
    """Games, a buffer for them, the steps that it samples from, and the rows that it must have room for besides."""
    random = np.random.default_rng(seed)
    num_envs, rows = (int(random.integers(1, high)) for high in (5, 40))
    capacity = rows * num_envs + int(random.integers(0, num_envs))  # what is no multiple is rounded down
    games = Games(num_envs, random, random.dirichlet([1, 1, 1]) * random.choice([0.02, 0.2, 0.9]))
    spare = int(random.integers(0, 60))
    return games, ReplayBuffer(folder, games, capacity, spare), rows * num_envs, -(-spare // num_envs)


def play(games, buffer, stored, num_rows):
    """Some steps in segments of random length, of which the last goes on; `stored` and the new transitions."""
    for _ in range(num_rows):
        if games.random.random() < 0.1:
            buffer.end_games()
            buffer.begin_games(games.reset())
        added, transitions = games.step()
        buffer.add(*added)
        stored = stored + transitions
    return stored


@pytest.mark.parametrize("seed", range(25))
def test_the_buffer_samples_what_one_of_whole_stacks_holds(seed, tmp_path):
    """Every transition among the last `capacity`, and no other; stacks and next stacks as the agent saw them."""
    games, buffer, capacity, _ = random_buffer(seed, tmp_path)
    buffer.begin_games(games.reset())
    stored = []
    for num_rows in (1, 1, 1, 1, 1, 15, 19, 1, 1, 1, 1, 1, 1, 85, 119):
        stored = play(games, buffer, stored, num_rows)[-capacity:]
        check(buffer, stored)
        if num_rows > 1:
            buffer.end_games()
            check(buffer, stored)
            buffer.begin_games(games.reset())
            check(buffer, stored)


@pytest.mark.parametrize("seed", range(25))
def test_the_buffer_of_a_checkpoint_is_there_when_the_run_goes_on(seed, tmp_path):
    """Saved, filled further, killed and gone on with, twice: samples are those of the moment of the checkpoint.

    If more steps were added than there was room for, the oldest transitions are gone; no other is wrong.
    """
    games, buffer, capacity, num_spare = random_buffer(seed, tmp_path)
    random, num_envs, furthest = np.random.default_rng(seed), games.num_envs, 0
    buffer.begin_games(games.reset())
    stored = play(games, buffer, [], random.integers(1, 150))[-capacity:]
    buffer.end_games()
    torch.save(buffer.state_dict(), tmp_path / "state.pt")
    torch.manual_seed(seed)
    before = buffer.sample(100)

    for _ in range(2):
        further = int(random.choice([num_spare // 2, num_spare, num_spare + 3, num_spare + 100]))
        furthest = max(furthest, further)
        buffer.begin_games(games.reset())
        play(games, buffer, [], further)
        buffer = ReplayBuffer(tmp_path, games, capacity, spare=7)
        buffer.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
        if furthest <= num_spare:
            torch.manual_seed(seed)
            assert same(before, buffer.sample(100))
            assert buffer.filled * num_envs == len(stored)
        if buffer.filled:
            check(buffer, stored[-buffer.filled * num_envs :])
        assert furthest <= num_spare + capacity // num_envs + STACK or not buffer.filled

    restored = stored[-buffer.filled * num_envs :] if buffer.filled else []
    buffer.begin_games(games.reset())
    for _ in range(9):
        restored = play(games, buffer, restored, 7)[-capacity:]
        check(buffer, restored)


def test_the_buffer_samples_uniformly(tmp_path):
    games = Games(3, np.random.default_rng(0), (0.1, 0.1, 0.1))
    torch.manual_seed(0)
    buffer = ReplayBuffer(tmp_path, games, 30, spare=10)
    buffer.begin_games(games.reset())
    play(games, buffer, [], 25)
    newest = buffer.sample(60_000)[0][:, 3].flatten(1).numpy()
    counts = np.unique(newest, axis=0, return_counts=True)[1]
    assert len(counts) == 30
    assert np.abs(counts / 2000 - 1).max() < 0.1  # 4.5 standard deviations


def test_the_buffer_takes_no_memory_before_it_is_used_and_its_disk_at_once(tmp_path):
    before, envs = resident(), InFrames(Endless, 8)
    buffer = ReplayBuffer(tmp_path, envs, 100_000, spare=50_000)
    buffer.begin_games(envs.reset()[0])
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
    metrics = dqn_update(agent, target, torch.optim.SGD(agent.parameters(), lr=0.1), batch, gamma=0.5)
    errors = (1 + 0.5 * 40) - 1, -1 - 2  # of Q(0, 1) and of Q(1, 0)
    assert metrics["td_loss"].item() == pytest.approx((errors[0] ** 2 + errors[1] ** 2) / 2)
    assert metrics["q_values"].item() == pytest.approx(1.5)
    assert agent.q_values.detach().flatten().tolist() == pytest.approx([0, 1 + 0.1 * errors[0], 2 + 0.1 * errors[1], 3])
    assert target.q_values.detach().flatten().tolist() == [10, 20, 30, 40]


def test_each_gradient_step_has_its_own_gradient():
    agent, target = Table([[0.0]]), Table([[0.0]])
    batch = frames((0, 0)), torch.tensor([0]), torch.tensor([1.0]), torch.tensor([True])
    optimizer = torch.optim.SGD(agent.parameters(), lr=0.1)
    for value in (0.2, 0.36):  # an error of 1, then of 0.8
        dqn_update(agent, target, optimizer, batch, gamma=0.9)
        assert agent.q_values.item() == pytest.approx(value)


def test_target_network_moves_by_tau():
    agent, target = Table([[0.0, 1.0]]), Table([[10.0, 20.0]])
    update_target(target, agent, 0.25)
    assert target.q_values.tolist() == [[7.5, 15.25]]
    update_target(target, agent, 1.0)
    assert torch.equal(target.q_values, agent.q_values)


def test_epsilon_falls_once_learning_starts():
    args = Args(total_timesteps=1000, learning_starts=300, exploration_fraction=0.2, start_e=0.9, end_e=0.1)
    steps = (0, 299, 300, 400, 500, 1000)
    assert [annealed_epsilon(args, step) for step in steps] == pytest.approx([1, 1, 0.9, 0.5, 0.1, 0.1])
    args.learning_starts = args.exploration_fraction = 0
    assert [annealed_epsilon(args, step) for step in (0, 1)] == pytest.approx([0.9, 0.1])


def test_epsilon_is_the_chance_of_a_random_action():
    torch.manual_seed(0)
    q_values = torch.tensor([0.0, 3.0, 1.0]).expand(60_000, 3)
    frequencies = epsilon_greedy(q_values, 0.3).bincount(minlength=3) / len(q_values)
    assert torch.allclose(frequencies, torch.tensor([0.1, 0.8, 0.1]), atol=0.01)
    assert (epsilon_greedy(q_values, 0.0) == 1).all()


def learn(monkeypatch, folder, probe=RewardFromActionAndObs, life_lost=False, **settings):
    """The folder of a run on a probe."""
    play_in_frames(monkeypatch, dqn_atari, probe, life_lost)
    return train(dqn_atari, folder, **SHORT["dqn_atari"] | settings)


@pytest.mark.parametrize("num_envs", [1, 2, 3, 8, 64])
@pytest.mark.parametrize(("learning_starts", "train_frequency"), [(0, 4), (40, 1), (41, 7)])
def test_gradient_steps_and_targets_come_when_a_single_game_would_bring_them(
    num_envs, learning_starts, train_frequency, tmp_path, monkeypatch
):
    """But for the start, which waits for no part of a step of all games. Checkpoints change nothing."""
    updates, copies, explored = [], [], []
    zeros = {"td_loss": torch.zeros(()), "q_values": torch.zeros(())}
    monkeypatch.setattr(dqn_atari, "dqn_update", lambda *a: updates.append(len(copies)) or zeros)
    monkeypatch.setattr(dqn_atari, "update_target", lambda *a: copies.append(len(updates)))
    monkeypatch.setattr(dqn_atari.nn.utils, "get_total_norm", lambda grads: torch.zeros(()))
    monkeypatch.setattr(dqn_atari, "epsilon_greedy", lambda q, epsilon: explored.append(epsilon) or q.argmax(-1))
    settings = dict(learning_starts=learning_starts, train_frequency=train_frequency, exploration_fraction=0.5)
    settings |= dict(num_envs=num_envs, buffer_size=128, total_timesteps=192, save_freq=50)
    run_dir = learn(monkeypatch, tmp_path, **settings)
    learned = [step for step in range(1, 193) if -(-step // num_envs) * num_envs >= learning_starts]
    due = [step for step in learned if step % train_frequency == 0]
    assert len(updates) == len(due)
    copies_due = [step for step in learned if step % 20 == 0]
    assert copies == [sum(update <= step for update in due) for step in copies_due]  # each after its own updates
    checkpoint = dqn_atari.load_checkpoint(dqn_atari.find_checkpoint(run_dir))
    assert checkpoint["global_step"] == 192
    args = Args(**checkpoint["args"])
    assert explored == [annealed_epsilon(args, step) for step in range(0, 192, num_envs)]


def test_tau_and_batch_size_reach_the_updates(tmp_path, monkeypatch):
    sizes, taus = set(), set()
    monkeypatch.setattr(dqn_atari, "dqn_update", lambda *a: sizes.update(map(len, a[3])) or dqn_update(*a))
    monkeypatch.setattr(dqn_atari, "update_target", lambda target_agent, agent, tau: taus.add(tau))
    learn(monkeypatch, tmp_path, tau=0.25, batch_size=5)
    assert (sizes, taus) == ({5}, {0.25})


def test_the_target_network_is_a_copy_before_the_first_update(tmp_path, monkeypatch):
    alike = []

    def watch(agent, target_agent, *rest):
        alike.append(same(agent.state_dict(), target_agent.state_dict()))
        return dqn_update(agent, target_agent, *rest)

    monkeypatch.setattr(dqn_atari, "dqn_update", watch)
    learn(monkeypatch, tmp_path, target_network_frequency=1000)
    assert alike == [True] + [False] * (len(alike) - 1)


def test_the_online_network_plays_and_the_target_network_only_says_what_comes(tmp_path, monkeypatch):
    calls, made, agent_class = set(), [], dqn_atari.Agent

    class Watched(agent_class):
        def forward(self, obs):
            calls.add((made.index(self), len(obs)))
            return super().forward(obs)

    monkeypatch.setattr(dqn_atari, "Agent", lambda *a: made.append(Watched(*a)) or made[-1])
    learn(monkeypatch, tmp_path, num_envs=2, batch_size=5)
    online, target = 0, 1
    assert calls == {(online, 2), (online, 5), (target, 5)}


def test_curves_are_means_since_the_last_point_but_for_the_gradients_norm(tmp_path, monkeypatch):
    """Two points in one segment: after 10 gradient steps, and after 2 more."""
    found = []

    def watch(agent, *rest):
        metrics = dqn_update(agent, *rest)
        norm = torch.cat([x.grad.flatten() for x in agent.parameters()]).norm()
        found.append([metrics["td_loss"].item(), metrics["q_values"].item(), norm.item()])
        return metrics

    monkeypatch.setattr(dqn_atari, "dqn_update", watch)
    settings = dict(num_envs=64, total_timesteps=1216, save_freq=2000, buffer_size=1024, learning_starts=0)
    settings |= dict(train_frequency=100, learning_rate=0.003, exploration_fraction=0.9)
    run_dir = learn(monkeypatch, tmp_path, **settings)
    parts = np.array(found[:10]), np.array(found[10:])
    for i, name in enumerate(("td_loss", "q_values", "grad_norm")):
        values = [part[-1, i] if name == "grad_norm" else part[:, i].mean() for part in parts]
        expected = [pytest.approx(value, rel=1e-4) for value in values]
        assert curve(run_dir, f"losses/{name}") == list(zip((1024, 1216), expected, strict=True))
    epsilons = [pytest.approx(annealed_epsilon(Args(**settings), step - 64)) for step in (1024, 1216)]
    assert curve(run_dir, "charts/epsilon") == list(zip((1024, 1216), epsilons, strict=True))
    assert curve(run_dir, "charts/learning_rate") == [(step, pytest.approx(0.003)) for step in (1024, 1216)]


def test_what_is_learned_from_are_clipped_rewards(tmp_path, monkeypatch):
    wanted = []

    def make_envs(args, num_envs, seed, training):
        wanted.append(training)
        return InFrames(Endless, num_envs)

    monkeypatch.setattr(dqn_atari, "make_envs", make_envs)
    train(dqn_atari, tmp_path, **SHORT["dqn_atari"])
    assert wanted == [True]


def test_tiny_numbers_are_taken_for_zero_in_training(tmp_path, monkeypatch):
    """Where weights get no gradient, Adam's averages fade to them, and a step on the CPU takes three times as long."""
    products = []
    monkeypatch.setattr(
        dqn_atari, "dqn_update", lambda *a: products.append(torch.full((8,), 1e-30) * 1e-10) or dqn_update(*a)
    )
    learn(monkeypatch, tmp_path)
    assert not any(x.any() for x in products)
    torch.set_flush_denormal(False)
    assert (torch.full((8,), 1e-30) * 1e-10).all()


def test_tiny_numbers_are_taken_for_zero_on_every_core():
    """Only threads that torch starts afterwards heed the setting: the measurement for --bf16 must not start any."""
    code = """
import torch, dqn_atari

def stop(args):
    print(torch.get_num_threads(), (torch.full((400_000,), 1e-30) * 1e-10).count_nonzero().item())
    raise SystemExit

dqn_atari.Run = stop
dqn_atari.train(dqn_atari.read_args())
"""
    flags = "--no-cuda --bf16 --buffer-size 1000 --learning-starts 100 --save-freq 100000 --total-timesteps 100000"
    command = [sys.executable, "-c", code, *flags.split()]
    env = os.environ | {"OMP_NUM_THREADS": "2"}
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=120)
    assert done.stdout == "2 0\n", done.stderr


def test_the_network_is_that_of_the_paper():
    """Computed anew from its weights: the convolutions, a ReLU after each layer but the last, pixels from 0 to 1."""
    torch.manual_seed(0)
    envs = SimpleNamespace(single_action_space=SimpleNamespace(n=6))
    agent = dqn_atari.Agent(envs, Args())
    obs = torch.randint(256, (3, 4, 84, 84), dtype=torch.uint8)
    with torch.no_grad():
        found, x = agent(obs), obs / 255
        for i, stride in ((0, 4), (2, 2), (4, 1)):
            x = torch.relu(torch.conv2d(x, agent.network[i].weight, agent.network[i].bias, stride))
        x = torch.relu(agent.network[7](x.flatten(1)))
        torch.testing.assert_close(found, agent.network[9](x))
        assert 0 < found.abs().max() < 0.1  # nearly 0 at first
        for i, gain in ((0, 2**0.5), (2, 2**0.5), (4, 2**0.5), (7, 2**0.5), (9, 0.01)):
            rows = agent.network[i].weight.flatten(1) / gain
            torch.testing.assert_close(rows @ rows.T, torch.eye(len(rows)), atol=1e-4, rtol=0)  # orthogonal
            assert not agent.network[i].bias.any()
        agent.bf16 = True
        rounded = agent(obs)
    assert not torch.equal(rounded, rounded.bfloat16().float())  # the last layer has all digits of float32


def test_actions_are_random_until_learning_starts(tmp_path, monkeypatch):
    """And the network's from then on, if epsilon is 0."""
    played, updated, step = [], [], InFrames.step

    def record(envs, actions):
        played.extend(zip(envs.stacks[:, -1, 0, 0].tolist(), actions.tolist(), strict=True))
        return step(envs, actions)

    def note(agent, target_agent, optimizer, batch, gamma):
        updated.append(len(played))
        return dqn_update(agent, target_agent, optimizer, batch, gamma)

    monkeypatch.setattr(InFrames, "step", record)
    monkeypatch.setattr(dqn_atari, "dqn_update", note)
    settings = dict(num_envs=8, buffer_size=800, learning_starts=800, train_frequency=20, total_timesteps=960)
    learn(monkeypatch, tmp_path, **settings, save_freq=500, learning_rate=0.0, start_e=0.0, end_e=0.0)
    assert updated[0] == 800
    for seen in (0, 255):
        before, after = ([action for obs, action in part if obs == seen] for part in (played[:800], played[800:]))
        assert np.mean(before) == pytest.approx(0.5, abs=0.1)  # 4 standard deviations
        assert len(set(after)) == 1


class Colorful(Endless):
    """No frame is black, as those are that a stack starts with."""

    def observe(self):
        return -0.9 + 0.1 * (self.t % 19)

    def reward(self, action):
        return 2.0 * action - 1


class Unlike(Mixed):
    """No two games look alike, and they are cut off at different times."""

    def reward(self, action):
        return float(self.np_random.integers(-1, 2))


@pytest.mark.parametrize(
    ("probe", "life_lost"),
    [(TruncatedEndless, False), (DelayedReward, False), (Colorful, False), (Colorful, True), (Unlike, False)],
)
def test_what_is_learned_from_is_what_was_played(probe, life_lost, tmp_path, monkeypatch):
    """Every transition of every batch: the stack that was seen, what was done, what came, the stack that followed.

    Games are cut off by six checkpoints, too.
    """
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
    learn(monkeypatch, tmp_path, probe, life_lost, num_envs=3, total_timesteps=300, batch_size=8, save_freq=50)
    ends = 0
    for batch in batches:
        for stacks, action, reward, end in zip(*(x.numpy() for x in batch), strict=True):
            following = played[stacks[:-1].tobytes(), int(action), float(reward), bool(end)]
            assert (None if end else stacks[1:].tobytes()) in following
            ends += end
    assert len(batches) == 72
    assert (ends > 0) == (life_lost or probe in (DelayedReward, Unlike))


@pytest.fixture
def stopped(tmp_path, monkeypatch):
    """The folder of a run on a probe that got SIGTERM in its step from 58 to 60, of 80, and its checkpoint."""
    play_in_frames(monkeypatch, dqn_atari, RewardFromActionAndObs)
    add = ReplayBuffer.add

    def add_and_stop(buffer, *row):
        add(buffer, *row)
        if buffer.count == 30:
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(ReplayBuffer, "add", add_and_stop)
    settings = SHORT["dqn_atari"] | {"run_dir": str(tmp_path / "run"), "target_network_frequency": 48}
    assert dqn_atari.train(Args(**settings)) == 128 + signal.SIGTERM
    checkpoint = dqn_atari.load_checkpoint(dqn_atari.find_checkpoint(tmp_path / "run"))
    assert checkpoint["global_step"] == 60
    return tmp_path / "run", checkpoint


def go_on(run_dir, checkpoint, **changed):
    """Resume a run; its exit code."""
    return dqn_atari.train(Args(**checkpoint["args"] | {"resume": str(run_dir)} | changed))


@pytest.mark.parametrize(("replay", "num_updates"), [("kept", 5), ("gone", 2), ("another's", 2), ("smaller", 2)])
def test_resume_goes_on_with_target_network_and_replay(replay, num_updates, stopped, monkeypatch, capsys):
    """Without its file it fills a new one before it learns, with 16 steps."""
    (run_dir, checkpoint), seen = stopped, []
    changed = {"num_envs": 4, "buffer_size": 36} if replay == "gone" else {}
    if replay == "gone":
        (run_dir / "replay.bin").unlink()
    elif replay != "kept":  # as of a run that was resumed without its file, and killed before it could save
        envs, size = InFrames(RewardFromActionAndObs, 2), (run_dir / "replay.bin").stat().st_size
        ReplayBuffer(run_dir, envs, 16 if replay == "smaller" else 32, spare=40).begin_games(envs.reset()[0])
        assert ((run_dir / "replay.bin").stat().st_size < size) == (replay == "smaller")

    def watch(agent, target_agent, optimizer, *rest):
        seen.append(([x.clone() for x in target_agent.parameters()], optimizer.param_groups[0]["lr"]))
        return dqn_update(agent, target_agent, optimizer, *rest)

    monkeypatch.setattr(dqn_atari, "dqn_update", watch)
    assert go_on(run_dir, checkpoint, learning_rate=0.01, **changed) == 0
    assert len(seen) == num_updates
    assert ("the replay buffer starts empty" in capsys.readouterr().err) == (replay != "kept")
    assert same(seen[0], (list(checkpoint["target_model"].values()), 0.01))
    assert not same(checkpoint["target_model"], checkpoint["model"])
    assert not (run_dir / "replay.bin").exists()  # the run is finished


@pytest.mark.parametrize("changed", [{"num_envs": 4}, {"buffer_size": 34}])
def test_resume_with_other_sizes_is_refused_and_leaves_the_file(changed, stopped, capsys):
    run_dir, checkpoint = stopped
    content = (run_dir / "replay.bin").read_bytes()
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        go_on(run_dir, checkpoint, **changed)
    assert stop.value.code == 2
    assert "--num-envs and --buffer-size must stay as they were" in capsys.readouterr().err
    assert (run_dir / "replay.bin").read_bytes() == content


def test_a_total_that_is_already_reached_does_not_cost_the_memory(stopped):
    run_dir, checkpoint = stopped
    assert go_on(run_dir, checkpoint, total_timesteps=40, learning_starts=0) == 0
    assert (run_dir / "replay.bin").exists()


def test_a_finished_run_needs_no_room(tmp_path, monkeypatch, capfd):
    """A cluster may requeue it when others have filled the disk."""
    command = flags(SHORT["dqn_atari"] | {"run_dir": tmp_path / "run"})
    assert go(dqn_atari, *command) == 0
    monkeypatch.setattr(dqn_atari.shutil, "disk_usage", lambda path: SimpleNamespace(free=0))
    assert go(dqn_atari, *command) == 0
    assert "is finished" in capfd.readouterr().out


def test_a_run_that_goes_on_needs_no_room_for_the_file_that_it_has(stopped, monkeypatch, capsys):
    run_dir, checkpoint = stopped
    monkeypatch.setattr(dqn_atari.shutil, "disk_usage", lambda path: SimpleNamespace(free=0))
    args = Args(**checkpoint["args"])
    dqn_atari.check_disk(args)
    (run_dir / "replay.bin").unlink()
    with pytest.raises(SystemExit):
        dqn_atari.check_disk(args)


def test_without_checkpoints_in_between_no_room_is_kept_for_them(tmp_path):
    settings = SHORT["dqn_atari"] | {"save_freq": 10**10}  # 70 TB
    dqn_atari.check_args(Args(**settings))
    train(dqn_atari, tmp_path, **settings)


def test_a_file_that_cannot_be_made_gets_one_sentence_and_is_not_left(tmp_path, monkeypatch, capsys):
    def refuse(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "posix_fallocate", refuse)
    with pytest.raises(SystemExit) as stop:
        train(dqn_atari, tmp_path, **SHORT["dqn_atari"])
    assert stop.value.code == 1
    assert (
        "replay.bin of 0.0 GB cannot be made (No space left on device): lower --buffer-size or --save-freq"
        in capsys.readouterr().err
    )
    assert not (tmp_path / "run" / "replay.bin").exists()


def test_the_memory_stays_if_the_last_checkpoint_could_not_be_written(tmp_path, monkeypatch):
    def refuse(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(torch, "save", refuse)
    with pytest.raises(SystemExit):
        learn(monkeypatch, tmp_path)
    assert (tmp_path / "run" / "replay.bin").exists()


def test_a_checkpoint_is_named_when_all_of_it_is_on_the_disk(tmp_path, monkeypatch):
    """Or a power cut could leave one that counts on rows that were never written, or an empty one."""
    events, flush, fsync, replace = [], np.memmap.flush, os.fsync, os.replace
    monkeypatch.setattr(np.memmap, "flush", lambda file: events.append(file.nbytes) or flush(file))
    monkeypatch.setattr(os, "fsync", lambda number: events.append("fsync") or fsync(number))
    monkeypatch.setattr(os, "replace", lambda *paths: events.append("replace") or replace(*paths))
    settings = SHORT["dqn_atari"] | {"total_timesteps": 40, "learning_starts": 32}
    train(dqn_atari, tmp_path, **settings)
    rows = (32 // 2 + 4 + 40 // 2 + 1) * 2
    assert events == [rows * 7063, 16, "fsync", "replace"]


@pytest.mark.parametrize("broken", [{"buffer": 3}, {"target_model": {"a": 1}}, {"target_model": None}])
def test_a_checkpoint_of_an_edited_copy_gets_one_sentence(broken, stopped, capsys):
    run_dir, checkpoint = stopped
    torch.save(checkpoint | broken, dqn_atari.find_checkpoint(run_dir))
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        go_on(run_dir, checkpoint)
    assert stop.value.code == 1
    assert capsys.readouterr().err.count("\n") == 1


def test_evaluation_explores_as_much_as_the_checkpoint_says(tmp_path):
    _, agent = reload(dqn_atari, train(dqn_atari, tmp_path, **SHORT["dqn_atari"], end_e=0.3))
    obs = torch.randint(256, (1, 4, 84, 84), dtype=torch.uint8).expand(2000, 4, 84, 84)
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
        learn(monkeypatch, tmp_path, total_timesteps=200)
    assert stop.value.code == 1
    message = capsys.readouterr().err.splitlines()[-1]
    assert "td_loss is nan after 80 steps" in message
    assert "000000000040.pt" in message
    checkpoint, _ = reload(dqn_atari, tmp_path / "run")
    assert all(x.isfinite().all() for x in checkpoint["model"].values())
