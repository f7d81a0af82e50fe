"""evaluate.py: what is reloaded acts as what was saved, and the score is fair."""

import json
import os
import re
import runpy
import shutil
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import cv2
import gymnasium as gym
import numpy as np
import pytest
import torch
import tyro
from conftest import ROOT, SCRIPTS, SHORT, run, train
from gymnasium.envs.registration import EnvSpec
from gymnasium.vector import AutoresetMode
from probes import PROBES, InFrames, RewardFromAction, TruncatedEndless
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tqdm import tqdm

import evaluate
import ppo_cartpole


@pytest.fixture
def run_dir(tmp_path):
    """A short run of ppo_cartpole.py with three checkpoints."""
    return train(ppo_cartpole, tmp_path, total_timesteps=768, save_freq=256)


@pytest.mark.parametrize("policy", [path.name for path in sorted(ROOT.glob("benchmarks/policies/*.pt"))])
def test_the_trained_policies_play(policy):
    """What the repository brings is read by this evaluate.py, and its agent prefers some actions to others."""
    path = ROOT / "benchmarks/policies" / policy
    checkpoint, envs, agent = evaluate.rebuild(path, evaluate.Args(checkpoint=str(path)), 2)
    assert checkpoint["global_step"] > 10_000
    assert checkpoint["args"]["run_dir"] is None
    obs = envs.reset()[0]
    with torch.no_grad():
        outputs = agent(torch.as_tensor(obs))
    preferences = outputs[0] if isinstance(outputs, tuple) else outputs
    assert preferences.isfinite().all()
    assert preferences.std(-1).min() > 1e-3
    assert not agent.training  # a copy may have dropout


def test_what_is_reloaded_acts_as_what_was_saved(script, tmp_path, monkeypatch):
    module, made = SCRIPTS[script], []
    agent_class = module.Agent
    monkeypatch.setattr(module, "Agent", lambda *a: made.append(agent_class(*a)) or made[-1])
    run_dir = train(module, tmp_path, **SHORT[script])
    args = evaluate.Args(checkpoint=str(run_dir), episodes=2)
    _, envs, agent = evaluate.rebuild(evaluate.find_checkpoint(run_dir), args, 2)
    obs, _ = envs.reset()
    for _ in range(20):
        obs = torch.as_tensor(obs)
        with torch.no_grad():
            for ours, theirs in zip(made[0](obs), agent(obs), strict=True):
                assert torch.equal(ours, theirs)
            greedy = agent.act(obs, greedy=True)
            assert greedy.dtype == torch.int64
            assert torch.equal(made[0].act(obs, greedy=True), greedy)
            torch.manual_seed(0)
            actions = agent.act(obs, greedy=False)
            torch.manual_seed(0)
            assert torch.equal(made[0].act(obs, greedy=False), actions)
        obs = envs.step(actions.numpy())[0]


@pytest.mark.parametrize(
    ("policy", "logits", "value"),
    [
        ("ppo_cartpole-CartPole", [-0.9134, 0.9158], 49.9981),
        ("ppo_atari-Pong", [-2.8360, 0.2668, -12.6266, 6.2460, -1.6749, 1.8417], -0.4646),
        ("ppo_atari-Breakout", [2.7738, -3.9577, -1.0119, -7.6729], 4.3935),
    ],
)
def test_the_trained_policies_compute_what_they_did(policy, logits, value):
    """Weights also fit a network with another nonlinearity. A score may not show it: CartPole's is 500 all the same."""
    path = ROOT / f"benchmarks/policies/{policy}.pt"
    _, envs, agent = evaluate.rebuild(path, evaluate.Args(str(path)), 1)
    agent.bf16, shape = False, envs.single_observation_space.shape
    obs = torch.arange(np.prod(shape)).reshape(1, *shape)
    with torch.no_grad():
        found = agent((obs % 251).to(torch.uint8) if len(shape) > 1 else obs / 100)
    assert found[0][0].tolist() == pytest.approx(logits, rel=1e-3)
    assert found[1].item() == pytest.approx(value, rel=1e-3)


class Hare(gym.vector.VectorEnv):
    """Environment 0 ends at each step with return 1, environment 1 at each tenth with return 10."""

    metadata = {"autoreset_mode": AutoresetMode.SAME_STEP}  # noqa: RUF012
    num_envs = 2

    def reset(self, *, seed=None, options=None):
        self.t = 0
        return np.zeros((2, 1), np.float32), {}

    def step(self, actions):
        self.t += 1
        ended = np.array([True, self.t % 10 == 0])
        return np.zeros((2, 1), np.float32), np.ones(2), ended, np.zeros(2, bool), {}


class Idle(torch.nn.Linear):
    def act(self, obs, greedy):
        return torch.zeros(len(obs), dtype=torch.int64)


@pytest.mark.parametrize(("episodes", "short", "long"), [(6, 3, 3), (7, 4, 3)])
def test_every_environment_plays_its_share_however_long_its_episodes(episodes, short, long):
    returns, lengths, _ = evaluate.play(Hare(), Idle(1, 1), episodes, True, tqdm(disable=True))
    assert sorted(returns) == [1.0] * short + [10.0] * long
    assert sorted(lengths) == [1] * short + [10] * long


@pytest.mark.parametrize(("episodes", "num_envs"), [(3, 3), (16, 16), (100, 16)])
def test_sixteen_environments_side_by_side_at_most(episodes, num_envs, run_dir, monkeypatch):
    """Which games are played, and so the score, depends on it."""
    played = [1.0] * episodes, [1] * episodes, [False] * episodes
    monkeypatch.setattr(evaluate, "play", lambda *_: played)
    path = evaluate.find_checkpoint(run_dir)
    assert evaluate.score(path, evaluate.Args(str(path), episodes=episodes))["num_envs"] == num_envs


def test_a_score_is_the_sum_of_all_rewards_of_a_whole_game():
    """-5, then 1, 1, 1, 1, and cut off. Each step costs a life, which ends nothing."""
    envs = InFrames(TruncatedEndless, 2, life_lost=True)
    returns, lengths, truncated = evaluate.play(envs, Idle(1, 1), 4, True, tqdm(disable=True))
    assert (returns, lengths, truncated) == ([-1.0] * 4, [5] * 4, [True] * 4)


def test_points_of_atari_games_are_not_clipped():
    path = ROOT / "benchmarks/policies/ppo_atari-Qbert-hour.pt"
    _, envs, _ = evaluate.rebuild(path, evaluate.Args(str(path)), 8)
    envs.reset()
    rng = np.random.default_rng(0)
    points = np.concatenate([envs.step(rng.integers(0, 6, 8))[1] for _ in range(60)])
    assert points.max() >= 25  # for each cube


def test_greedy_takes_the_best_action_and_otherwise_the_policy_is_sampled(tmp_path):
    """A policy that has hardly learned does both things, which pay -1 and 1."""
    run_dir = train(ppo_cartpole, tmp_path, env_id=PROBES["RewardFromAction"], total_timesteps=256)
    path = evaluate.find_checkpoint(run_dir)
    sampled, greedy = (
        evaluate.score(path, evaluate.Args(str(path), episodes=48, greedy=greedy))["returns"]
        for greedy in (False, True)
    )
    assert set(sampled) == {-1, 1}
    assert len(set(greedy)) == 1


@pytest.mark.parametrize("greedy", [False, True])
def test_the_same_seed_gives_the_same_score(greedy, run_dir):
    path = evaluate.find_checkpoint(run_dir)
    scores = [evaluate.score(path, evaluate.Args(str(run_dir), seed=seed, greedy=greedy)) for seed in (1, 1, 2)]
    scores = [score["returns"] for score in scores]
    assert scores[0] == scores[1] != scores[2]


def test_no_evaluation_plays_the_games_of_training_or_of_another_seed(run_dir):
    path = evaluate.find_checkpoint(run_dir)
    same, again, other = (
        evaluate.rebuild(path, evaluate.Args(str(path), seed=seed), 4)[1].reset()[0] for seed in (1, 1, 2)
    )
    training = ppo_cartpole.make_envs(ppo_cartpole.Args(), 4, evaluate.spread_seed(1, 1, 0), training=True).reset()[0]
    assert np.array_equal(same, again)
    assert not np.isin(same, [other, training]).any()


def test_json_holds_what_the_readme_says(run_dir, tmp_path):
    done = run(
        "evaluate.py", run_dir, "--episodes", 5, "--num-envs", 2, "--greedy", "--json", "score.json", cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr
    result = json.loads((tmp_path / "score.json").read_text())
    returns = result["returns"]
    assert result["episodes"] == len(returns) == len(result["lengths"]) == 5
    assert returns == result["lengths"]  # CartPole pays 1 for each step
    assert result["mean_return"] == pytest.approx(np.mean(returns))
    assert result["std_return"] == pytest.approx(np.std(returns, ddof=1))
    assert result["ci95"][0] <= result["mean_return"] <= result["ci95"][1]
    assert result["env_id"] == "CartPole-v1"
    assert result["checkpoint"].endswith("000000000768.pt")
    assert (result["global_step"], result["greedy"], result["seed"]) == (768, True, 1)
    assert result["truncated"] == 0
    assert result["human_normalized"] is None
    assert f"return {np.mean(returns):.2f} ± {np.std(returns, ddof=1):.2f} (std) over 5 episodes" in done.stdout


def test_episodes_that_ran_into_the_time_limit_are_counted(tmp_path):
    run_dir = train(ppo_cartpole, tmp_path, env_id=PROBES["TruncatedEndless"], total_timesteps=512)
    path = evaluate.find_checkpoint(run_dir)
    assert evaluate.score(path, evaluate.Args(str(path), episodes=4))["truncated"] == 4


def test_an_end_that_falls_on_the_time_limit_is_no_truncation():
    class CutOff(Hare):
        def step(self, actions):
            obs, rewards, ended, _, infos = super().step(actions)
            return obs, rewards, ended & [True, False], ended, infos  # environment 0 ends, 1 is cut off

    returns, _, truncated = evaluate.play(CutOff(), Idle(1, 1), 6, True, tqdm(disable=True))
    assert sorted(zip(returns, truncated, strict=True)) == [(1.0, False)] * 3 + [(10.0, True)] * 3


@pytest.mark.parametrize(("episodes", "t"), [(2, 12.706), (5, 2.776), (10, 2.262), (100, 1.984)])
def test_the_interval_is_that_of_students_t(episodes, t):
    """t: two-sided 95%, from a table of the distribution."""
    returns = [float(i**2) for i in range(episodes)]
    mean, margin = np.mean(returns), t * np.std(returns, ddof=1) / episodes**0.5
    low, high = evaluate.mean_interval(returns)
    assert (low + high) / 2 == pytest.approx(mean)
    assert (high - low) / 2 == pytest.approx(margin, rel=0.01)


def test_a_single_episode_has_no_interval(run_dir, tmp_path):
    assert evaluate.mean_interval([30.0]) is None
    done = run("evaluate.py", run_dir, "--episodes", 1, "--json", "score.json", cwd=tmp_path)
    assert re.search(r"(?m)^return \d+\.\d\d in 1 episode, time limit", done.stdout)
    result = json.loads((tmp_path / "score.json").read_text())
    assert (result["ci95"], result["std_return"], result["num_envs"]) == (None, None, 1)


def test_human_normalized_score(monkeypatch):
    assert evaluate.human_normalized("BreakoutNoFrameskip-v4", 30.5) == pytest.approx(1)
    assert evaluate.human_normalized("ALE/Pong-v5", -20.7) == pytest.approx(0)
    assert evaluate.human_normalized("CartPole-v1", 500) is None
    minatar = EnvSpec("MinAtar/Breakout-v1", entry_point="minatar.gym:BaseEnv", kwargs={"game": "breakout"})
    monkeypatch.setitem(gym.registry, "MinAtar/Breakout-v1", minatar)  # another game of the same name
    assert evaluate.human_normalized("MinAtar/Breakout-v1", 17) is None
    assert len(evaluate.RANDOM_AND_HUMAN) == 57


def test_human_normalized_figures_are_those_published():
    """The sums are those of both columns of atari_data.py in DeepMind's dqn_zoo."""
    assert evaluate.RANDOM_AND_HUMAN.keys() <= {spec.kwargs.get("game") for spec in gym.registry.values()}
    columns = map(sum, zip(*evaluate.RANDOM_AND_HUMAN.values(), strict=True))
    assert list(columns) == pytest.approx([50864.9, 606494.2], abs=0.01)


def test_human_normalized_score_is_of_the_mean(monkeypatch):
    path = ROOT / "benchmarks/policies/ppo_atari-Qbert-hour.pt"
    monkeypatch.setattr(evaluate, "play", lambda *_: ([163.9, 163.9, 163.9, 26746.1], [1] * 4, [False] * 4))
    result = evaluate.score(path, evaluate.Args(str(path), episodes=4))
    assert result["human_normalized"] == pytest.approx(0.5)


def test_what_is_printed_of_a_score(capsys):
    result = {"mean_return": 390.31, "std_return": 48.9, "ci95": [380.6, 400.0], "episodes": 100}
    evaluate.report(result | {"human_normalized": 13.4934, "truncated": 7})
    line = "return 390.31 ± 48.90 (std) over 100 episodes, 95% interval of the mean 380.60 to 400.00, "
    assert capsys.readouterr().out == f"{line}human-normalized 13.493, time limit reached in 7 of 100\n"


def test_all_scores_every_checkpoint_and_leaves_the_training_curves_alone(run_dir):
    training = EventAccumulator(str(run_dir)).Reload().Scalars("losses/entropy")
    for _ in range(2):  # again during a run: the curve is written anew, not doubled
        evaluate.main(evaluate.Args(str(run_dir), episodes=2, all=True))
    curve = EventAccumulator(str(run_dir / "eval")).Reload().Scalars("eval/episodic_return")
    assert [event.step for event in curve] == [256, 512, 768]
    assert EventAccumulator(str(run_dir)).Reload().Scalars("losses/entropy") == training


def test_the_curve_of_all_has_the_scores(run_dir, monkeypatch):
    scores = iter([[10.0, 12.0], [30.0, 34.0], [20.0, 26.0]])
    monkeypatch.setattr(evaluate, "play", lambda *_: (next(scores), [1, 1], [False, False]))
    evaluate.main(evaluate.Args(str(run_dir), episodes=2, all=True))
    curve = EventAccumulator(str(run_dir / "eval")).Reload().Scalars("eval/episodic_return")
    assert [(event.step, event.value) for event in curve] == [(256, 11), (512, 32), (768, 23)]


def test_a_curve_stays_until_the_next_one_is_whole(run_dir, capsys):
    evaluate.main(evaluate.Args(str(run_dir), episodes=2, all=True))
    (last := evaluate.list_checkpoints(run_dir)[-1]).write_bytes(b"damaged")
    with pytest.raises(SystemExit):
        evaluate.main(evaluate.Args(str(run_dir), episodes=2, all=True))
    assert str(last) in capsys.readouterr().err
    curve = EventAccumulator(str(run_dir / "eval")).Reload().Scalars("eval/episodic_return")
    assert [event.step for event in curve] == [256, 512, 768]  # and nothing of the one that was cut short


def test_a_first_curve_that_is_cut_short_stays_and_so_do_those_of_others(run_dir, monkeypatch):
    other, score, scored = run_dir / "eval" / "events.out.tfevents.other", evaluate.score, []

    def interrupted(path, args):
        scored.append(path)
        if len(scored) in (3, 6):
            other.touch()  # by another process
            raise KeyboardInterrupt
        return score(path, args)

    monkeypatch.setattr(evaluate, "score", interrupted)
    for points in ([256, 512], [256, 512]):
        with pytest.raises(KeyboardInterrupt):
            evaluate.main(evaluate.Args(str(run_dir), episodes=2, all=True))
        assert other.exists()
        other.unlink()
        curve = EventAccumulator(str(run_dir / "eval")).Reload().Scalars("eval/episodic_return")
        assert [event.step for event in curve] == points


def test_with_all_a_disk_that_is_full_costs_no_score(run_dir, tmp_path, monkeypatch, capsys):
    def full(writer):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(evaluate.SummaryWriter, "flush", full)
    with pytest.raises(SystemExit):
        evaluate.main(evaluate.Args(str(run_dir), episodes=2, all=True, json=str(tmp_path / "scores.json")))
    assert (
        f"the output or {run_dir}/eval cannot be read or written: No space left on device." in capsys.readouterr().err
    )
    assert [one["global_step"] for one in json.loads((tmp_path / "scores.json").read_text())] == [256]


def test_with_all_the_json_has_what_was_scored_before_something_failed(run_dir, tmp_path):
    evaluate.list_checkpoints(run_dir)[-1].write_bytes(b"damaged")
    with pytest.raises(SystemExit):
        evaluate.main(evaluate.Args(str(run_dir), episodes=2, all=True, json=str(tmp_path / "scores.json")))
    assert [one["global_step"] for one in json.loads((tmp_path / "scores.json").read_text())] == [256, 512]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full, a file on a disk that is full")
def test_a_result_that_cannot_be_written_is_still_printed(run_dir, tmp_path):
    done = run("evaluate.py", run_dir, "--episodes", 2, "--json", "/dev/full", cwd=tmp_path)
    assert done.returncode == 1
    assert "over 2 episodes" in done.stdout
    assert done.stderr == "evaluate.py: --json /dev/full could not be written: No space left on device.\n"


def copied(run_dir, tmp_path, source, name="my_idea"):
    """The run's newest checkpoint as a script `name` with this source would have written it."""
    path = evaluate.find_checkpoint(run_dir)
    torch.save(evaluate.load_checkpoint(path) | {"script": name}, path)
    (tmp_path / "my_idea.py").write_text(source)
    return path


def test_a_copied_script_is_found_beside_evaluate_or_with_script(run_dir, tmp_path):
    source = (ROOT / "ppo_cartpole.py").read_text().replace("env_id", "task")  # three names must stay, no others
    path = copied(run_dir, tmp_path, source)
    checkpoint = evaluate.load_checkpoint(path)
    checkpoint["args"]["task"] = checkpoint["args"].pop("env_id")
    torch.save(checkpoint, path)
    shutil.copy(ROOT / "evaluate.py", tmp_path)
    done = run(tmp_path / "evaluate.py", path, "--episodes", 1, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    done = run("evaluate.py", path, "--episodes", 1, cwd=tmp_path)
    assert done.returncode == 1
    assert "my_idea.py" in done.stderr
    assert f"--script, for instance {run_dir / 'script.py'}." in done.stderr  # of what ran, whatever its name
    done = run("evaluate.py", path, "--episodes", 1, "--script", "my_idea.py", cwd=tmp_path)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("name", ["../my_idea", "/my_idea", "my.idea", "my_idea.py", ""])
def test_a_script_name_that_is_no_bare_module_name_is_refused(name, run_dir, tmp_path, capsys):
    path = copied(run_dir, tmp_path, "raise SystemExit('it ran')", name)
    with pytest.raises(SystemExit) as stop:
        evaluate.main(evaluate.Args(str(path)))
    assert stop.value.code == 1
    assert "bare module name" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("nn.Linear(64, 64)", "nn.Linear(64, 32)"),
        ("norm_obs: bool", "normalize: bool"),
        ("def make_envs", "def made"),
        ("def act", "def choose"),
    ],
)
def test_an_edited_script_gets_a_hint_and_not_a_traceback(old, new, run_dir, tmp_path, capsys):
    source = (ROOT / "ppo_cartpole.py").read_text().replace(old, new)
    if "32" in new:
        source = source.replace("nn.Linear(64, num_actions)", "nn.Linear(32, num_actions)").replace(
            "nn.Linear(64, 1)", "nn.Linear(32, 1)"
        )
    path = copied(run_dir, tmp_path, source)
    with pytest.raises(SystemExit) as stop:
        evaluate.main(evaluate.Args(str(path), script=str(tmp_path / "my_idea.py")))
    assert stop.value.code == 1
    message = capsys.readouterr().err
    assert message.count("\n") == 1
    assert "--script" in message or re.search(r"must define (make_envs|Agent.act\(obs, greedy\))", message)
    assert "64, 32" not in new or ("torch.Size([64, 64])" in message and "torch.Size([32, 64])" in message)


def read_film(path):
    """The pictures of a film, (T, H, W, 3) RGB, and how many are shown per second."""
    film, pictures = cv2.VideoCapture(str(path)), []
    fps = film.get(cv2.CAP_PROP_FPS)
    while (read := film.read())[0]:
        pictures.append(read[1][..., ::-1])
    return np.stack(pictures), fps


@pytest.mark.parametrize(("name", "fps", "size"), [("ppo_cartpole", 50, (400, 600)), ("ppo_atari", 15, (420, 320))])
def test_a_film_shows_what_was_scored_in_its_own_colors_and_at_its_speed(name, fps, size, tmp_path):
    module = SCRIPTS[name]
    path = evaluate.find_checkpoint(train(module, tmp_path, **SHORT[name]))
    film = str(tmp_path / "film.mp4")
    filmed = evaluate.score(path, evaluate.Args(str(path), episodes=1, video=film))
    assert filmed["returns"] == evaluate.score(path, evaluate.Args(str(path), episodes=1))["returns"]
    pictures, rate = read_film(film)
    assert rate == fps
    assert pictures.shape == (sum(filmed["lengths"]), *size, 3)
    _, envs, _ = evaluate.rebuild(path, evaluate.Args(str(path), video=film), 1)
    envs.reset()
    first = envs.render()[0]
    shown = pictures[0][:: size[0] // len(first), :: size[0] // len(first)].astype(int)
    assert np.abs(shown - first).mean() < 6  # VP9 loses a little
    assert np.abs(shown - first[..., ::-1]).mean() > np.abs(shown - first).mean()
    assert np.abs(pictures[1].astype(int) - pictures[-2]).max() > 50  # and something moves


def test_a_film_shows_all_episodes_one_after_the_other(run_dir, tmp_path):
    path, film = evaluate.find_checkpoint(run_dir), str(tmp_path / "film.mp4")
    filmed = evaluate.score(path, evaluate.Args(str(path), episodes=2, video=film))
    assert len(read_film(film)[0]) == sum(filmed["lengths"])
    assert filmed["returns"] == evaluate.score(path, evaluate.Args(str(path), episodes=2, num_envs=1))["returns"]


def test_a_film_that_was_interrupted_can_be_played(run_dir, tmp_path, monkeypatch, capsys):
    show, shown = evaluate.Screen.show, []

    def interrupt(screen, picture):
        if len(shown) == 7:
            raise KeyboardInterrupt
        shown.append(picture)
        show(screen, picture)

    monkeypatch.setattr(evaluate.Screen, "show", interrupt)
    with pytest.raises(KeyboardInterrupt):
        evaluate.main(evaluate.Args(str(run_dir), video=str(tmp_path / "film.mp4")))
    assert len(read_film(tmp_path / "film.mp4")[0]) == 7
    assert "7 pictures" in capsys.readouterr().out


def test_a_film_that_cannot_be_written_gets_one_sentence(run_dir, tmp_path, capsys):
    (tmp_path / "film.mp4").mkdir()
    with pytest.raises(SystemExit):
        evaluate.main(evaluate.Args(str(run_dir), episodes=1, video=str(tmp_path / "film.mp4")))
    out, err = capsys.readouterr()
    assert "pictures" not in out
    assert "film.mp4 cannot be written" in err
    assert " 1 episode, " in out


@pytest.mark.skipif(not Path("/dev/null").exists(), reason="needs /dev/null, which keeps nothing, like a full disk")
def test_a_film_that_was_not_kept_is_not_called_a_film(run_dir, tmp_path, capsys):
    (tmp_path / "film.mp4").symlink_to("/dev/null")
    with pytest.raises(SystemExit):
        evaluate.main(evaluate.Args(str(run_dir), episodes=1, video=str(tmp_path / "film.mp4")))
    out, err = capsys.readouterr()
    assert "pictures" not in out
    assert "film.mp4 could not be written: is the disk full?" in err


@pytest.mark.parametrize(
    "picture", [None, np.zeros((4, 6), np.uint8), np.zeros((4, 6, 4), np.uint8), np.zeros((4, 6, 3))]
)
def test_pictures_that_nobody_could_play_are_refused(picture, tmp_path, capsys):
    screen = evaluate.Screen(window=False, film=str(tmp_path / "film.mp4"), fps=30)
    with pytest.raises(SystemExit):
        screen.show(picture)
    assert "need pictures from the environment's render()" in capsys.readouterr().err


def test_an_environment_is_found_beside_the_script(tmp_path, monkeypatch):
    """Before one of the same name elsewhere: training found that one, too."""
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    (tmp_path / "lab").mkdir()
    script = shutil.copy(ROOT / "ppo_cartpole.py", tmp_path / "lab" / "my_idea.py")
    for folder, reward in ((tmp_path / "lab", 3.0), (tmp_path, 5.0)):
        (folder / "coin_env.py").write_text(f"""
import gymnasium as gym, numpy as np

class Coin(gym.Env):
    observation_space, action_space = gym.spaces.Box(-1, 1, (2,)), gym.spaces.Discrete(2)
    def reset(self, *, seed=None, options=None):
        return np.zeros(2, np.float32), {{}}
    def step(self, action):
        return np.zeros(2, np.float32), {reward}, True, False, {{}}

gym.register("Coin-v0", entry_point=Coin)
""")
    flags = ["--env-id", "coin_env:Coin-v0", "--total-timesteps", "256", "--run-dir", "run"]
    assert run(script, *flags, cwd=tmp_path).returncode == 0
    done = run("evaluate.py", "run", "--script", script, "--episodes", "1", cwd=tmp_path)
    assert "return 3.00 in 1 episode" in done.stdout, done.stderr


def test_the_window_shows_the_game_at_its_speed_until_q(run_dir, monkeypatch):
    """OpenCV's window is replaced: a machine that runs tests has no display."""
    shown = []

    def wait(milliseconds):
        time.sleep(milliseconds / 1000)
        return {6: ord("x"), 12: ord("q")}.get(len(shown), -1)  # any other key does nothing

    monkeypatch.setattr(evaluate.subprocess, "run", lambda *a, **k: SimpleNamespace(returncode=0))
    monkeypatch.setattr(cv2, "imshow", lambda title, picture: shown.append((time.monotonic(), picture)))
    monkeypatch.setattr(cv2, "waitKey", wait)
    with pytest.raises(KeyboardInterrupt):
        evaluate.main(evaluate.Args(str(run_dir), render=True))
    assert shown[-1][0] - shown[0][0] >= 11 / 50 - 0.02  # CartPole's 50 pictures per second, and never more
    assert shown[0][1].shape == (400, 600, 3)


def test_ctrl_c_ends_an_evaluation_with_a_sentence(monkeypatch, capsys):
    def interrupt(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(tyro, "cli", interrupt)
    with pytest.raises(SystemExit) as stop:
        runpy.run_path(str(ROOT / "evaluate.py"), run_name="__main__")
    assert stop.value.code == 130
    assert "stopped before the last episode ended" in capsys.readouterr().err


def test_weights_that_are_no_numbers_are_refused(run_dir, capsys):
    path = evaluate.find_checkpoint(run_dir)
    checkpoint = torch.load(path, weights_only=True)
    next(iter(checkpoint["model"].values()))[0] = float("nan")
    torch.save(checkpoint, path)
    capsys.readouterr()
    with pytest.raises(SystemExit):
        evaluate.main(evaluate.Args(str(path)))
    assert "not finite" in capsys.readouterr().err


@pytest.mark.skipif(shutil.which("xvfb-run") is None, reason="needs Xvfb, a display without a screen")
def test_a_window_opens_on_a_display(run_dir, tmp_path):
    command = ["xvfb-run", "-a", sys.executable, str(ROOT / "evaluate.py"), str(run_dir), "--render", "--episodes", "2"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "over 2 episodes" in done.stdout
    assert "Qt" not in done.stderr  # its warnings


def test_an_opencv_without_windows_is_not_taken_for_a_missing_display(run_dir, tmp_path, monkeypatch):
    broken = tmp_path / "cv2.py"
    broken.write_text("def namedWindow(name):\n    raise RuntimeError('rebuild the library with Qt')\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    done = run("evaluate.py", run_dir, "--render", cwd=tmp_path)
    assert done.returncode == 1
    assert done.stderr == "evaluate.py: --render cannot open a window: RuntimeError: rebuild the library with Qt\n"


def test_without_a_display_render_says_so(run_dir, tmp_path, monkeypatch):
    for name in ("DISPLAY", "WAYLAND_DISPLAY"):
        monkeypatch.delenv(name, raising=False)
    done = run("evaluate.py", run_dir, "--render", cwd=tmp_path)
    assert done.returncode == 1
    assert done.stderr == "evaluate.py: --render needs a display, and found none; --video FILE.mp4 works without.\n"


class Broken(RewardFromAction):
    """Since it was trained, it has been edited: it fails, or has other actions."""

    fault, when, num_actions = None, "reset", 2

    def __init__(self):  # cannot be rendered
        super().__init__()
        self.action_space = gym.spaces.Discrete(self.num_actions)

    def reset(self, *, seed=None, options=None):
        if self.fault and self.when == "reset":
            raise self.fault
        return super().reset(seed=seed)

    def step(self, action):
        if self.fault:
            raise self.fault
        return super().step(action)


@pytest.fixture
def broken_run(tmp_path, monkeypatch):
    """A run of an environment that is then edited."""
    monkeypatch.setitem(gym.registry, "Broken-v0", EnvSpec("Broken-v0", entry_point=Broken, max_episode_steps=5))
    return train(ppo_cartpole, tmp_path, env_id="Broken-v0", total_timesteps=256)


def test_an_environment_that_is_another_by_now_is_refused_with_a_sentence(broken_run, monkeypatch, capsys):
    monkeypatch.setattr(Broken, "num_actions", 3)
    with pytest.raises(SystemExit):
        evaluate.main(evaluate.Args(str(broken_run)))
    assert "does not fit" in capsys.readouterr().err


@pytest.mark.parametrize("mode", [{}, {"all": True}, {"follow": True}])
@pytest.mark.parametrize("fault", [TypeError("mine"), RuntimeError("mine"), ConnectionRefusedError("mine")])
@pytest.mark.parametrize("when", ["reset", "step"])
def test_an_error_of_the_environment_is_not_blamed_on_script_or_disk(mode, fault, when, broken_run, monkeypatch):
    monkeypatch.setattr(os, "nice", lambda increment: None)  # --follow would slow all later tests
    monkeypatch.setattr(Broken, "fault", fault)
    monkeypatch.setattr(Broken, "when", when)
    with pytest.raises((TypeError, RuntimeError)) as error:
        evaluate.main(evaluate.Args(str(broken_run), **mode))
    assert fault in (error.value, error.value.__cause__)


def test_an_environment_that_cannot_be_rendered_is_refused_with_a_sentence(broken_run, tmp_path, capsys):
    with pytest.raises(SystemExit):
        evaluate.main(evaluate.Args(str(broken_run), episodes=1, video=str(tmp_path / "film.mp4")))
    assert "need make_envs(..., render) and environments with render_mode" in capsys.readouterr().err


def test_environments_that_reset_at_the_next_step_are_refused(run_dir, tmp_path, capsys):
    script = tmp_path / "next_step.py"
    script.write_text((ROOT / "ppo_cartpole.py").read_text().replace("Mode.SAME_STEP", "Mode.NEXT_STEP"))
    with pytest.raises(SystemExit):
        evaluate.main(evaluate.Args(str(run_dir), script=str(script)))
    assert "must make environments in SAME_STEP mode" in capsys.readouterr().err


def test_an_episode_that_does_not_end_is_noticed(capsys):
    evaluate.say_once.cache_clear()
    hare, steps = Hare(), iter(range(30_001))
    hare.step = lambda actions: (np.zeros((2, 1)), np.ones(2), np.full(2, next(steps) == 30_000), np.zeros(2, bool), {})
    evaluate.play(hare, Idle(1, 1).double(), 2, True, tqdm(disable=True))
    assert capsys.readouterr().err.count("An episode has lasted 30,000 steps") == 1


@pytest.mark.parametrize("flags", [{}, {"all": True}])
def test_a_script_that_was_edited_since_is_named(flags, tmp_path, capsys):
    """Its weights may fit all the same, and be scored as if the edit had been trained."""
    run_dir = train(ppo_cartpole, tmp_path, **SHORT["ppo_cartpole"])
    capsys.readouterr()
    evaluate.main(evaluate.Args(str(run_dir), episodes=1, **flags))
    assert "has changed" not in capsys.readouterr().err
    source = run_dir / "script.py"
    source.write_text(source.read_text() + "# an earlier one\n")
    evaluate.main(evaluate.Args(str(run_dir), episodes=1, **flags))
    error = capsys.readouterr().err
    assert error.count(f"ppo_cartpole.py has changed since this run; what ran is --script {source}") == 1
    evaluate.main(evaluate.Args(str(run_dir), episodes=1, script=str(source), **flags))
    assert "has changed" not in capsys.readouterr().err
