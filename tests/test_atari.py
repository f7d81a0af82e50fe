"""The Atari environment of ppo_atari.py: frames, lives and rewards against Gymnasium's own wrappers and emulator."""

import cv2
import gymnasium as gym
import numpy as np
import pytest
from gymnasium.wrappers import AtariPreprocessing

import ppo_atari
from ppo_atari import Args, make_envs


def play(envs, steps, seed=0):
    """Random actions from a seeded generator; yields what each step returned."""
    random = np.random.default_rng(seed)
    for _ in range(steps):
        actions = random.integers(0, envs.single_action_space.n, envs.num_envs)
        yield actions, envs.step(actions)


@pytest.mark.parametrize("game", ["Breakout", "Pong", "Seaquest"])
def test_frames_are_those_of_gymnasiums_preprocessing(game):
    """Same frames, rewards, lives and end as AtariPreprocessing, bit for bit, once the start of the game is the same.

    By design of ale-py, the start differs: one FIRE and 0 to 29 no-ops, and a stack that begins with zeros, where
    Gymnasium's wrappers play 1 to 30 no-ops and repeat the first frame.
    """
    envs = make_envs(Args(env_id=f"{game}NoFrameskip-v4"), 2, seed=11, training=False)
    obs, infos = envs.reset()
    assert obs.shape == (2, 4, 84, 84)
    assert obs.dtype == np.uint8
    assert not obs[:, :3].any()
    assert obs[:, 3].any()

    reference = AtariPreprocessing(gym.make(f"{game}NoFrameskip-v4"), noop_max=0, frame_skip=4, screen_size=84)
    reference.reset(seed=0)
    emulator = reference.unwrapped
    emulator.step(emulator.get_action_meanings().index("FIRE"))
    for _ in range(infos["episode_frame_number"][0] - 1):
        emulator.step(0)

    frames = []
    for actions, (obs, rewards, terminated, truncated, infos) in play(envs, 400):
        frame, reward, over, _, info = reference.step(int(actions[0]))
        assert (rewards[0], terminated[0]) == (reward, over)
        if over or truncated[0]:
            frames.append(infos["final_obs"][0, 3])
            assert np.array_equal(frames[-1], frame)
            break
        frames.append(obs[0, 3])
        assert np.array_equal(obs[0, 3], frame)
        assert infos["lives"][0] == info["lives"]
        if len(frames) >= 4:
            assert np.array_equal(obs[0], np.stack(frames[-4:]))
    assert len(frames) > 100


def test_a_lost_life_is_flagged_and_the_game_goes_on():
    envs = make_envs(Args(), 8, seed=3, training=True)
    obs, _ = envs.reset()
    lives, lost, games = np.full(8, 5), np.zeros(8, int), 0
    for _, (obs, _, terminated, truncated, infos) in play(envs, 600):
        over = terminated | truncated
        assert not (infos["life_lost"] & over).any()
        assert np.array_equal(infos["lives"][~over], lives[~over] - infos["life_lost"][~over])
        lost += infos["life_lost"]
        assert (lost[over] == 4).all()  # the fifth life is the end of the game itself
        assert (infos["lives"][over] == 5).all()
        assert obs[infos["life_lost"], :3].any(axis=(1, 2, 3)).all()  # the stack goes on through a lost life
        games += over.sum()
        lost[over], lives = 0, infos["lives"].copy()
    assert games > 8


def test_the_end_of_a_game_is_not_taken_for_a_lost_life(monkeypatch):
    """A game that is cut off with more lives than the next one starts with."""
    real = ppo_atari.AtariVectorEnv
    monkeypatch.setattr(ppo_atari, "AtariVectorEnv", lambda *a, **k: real(*a, **k | {"max_num_frames_per_episode": 60}))
    envs = make_envs(Args(), 2, seed=1, training=True)
    envs.reset()
    ends = 0
    for _, (_, _, _, truncated, infos) in play(envs, 30):
        assert not infos["life_lost"][truncated].any()
        ends += truncated.sum()
        envs.lives = np.full(2, 9)  # as after extra lives
    assert ends > 0


def test_training_clips_rewards_and_keeps_the_score():
    for training in (True, False):
        envs = make_envs(Args(env_id="SpaceInvadersNoFrameskip-v4"), 4, seed=1, training=training)
        envs.reset()
        steps = [(rewards, infos["raw_rewards"]) for _, (_, rewards, _, _, infos) in play(envs, 300)]
        rewards, raw_rewards = (np.array(x) for x in zip(*steps, strict=True))
        assert raw_rewards.max() >= 5
        assert np.array_equal(rewards, np.sign(raw_rewards) if training else raw_rewards)


def test_a_game_that_is_cut_off_is_truncated_and_shows_its_last_frame(monkeypatch):
    real = ppo_atari.AtariVectorEnv
    monkeypatch.setattr(
        ppo_atari, "AtariVectorEnv", lambda *a, **k: real(*a, **k | {"max_num_frames_per_episode": 200})
    )
    envs = make_envs(Args(env_id="PongNoFrameskip-v4"), 2, seed=1, training=True)
    last, _ = envs.reset()
    for _, (obs, _, terminated, truncated, infos) in play(envs, 60):
        if truncated.any():
            i = np.flatnonzero(truncated)[0]
            assert not terminated.any()
            assert np.array_equal(infos["final_obs"][i, :3], last[i, 1:])  # goes on from the frames before
            assert not obs[i, :3].any()  # obs is the next game's
            return
        last = obs
    raise AssertionError("no game was truncated")


def test_a_game_lasts_half_an_hour_at_most(monkeypatch):
    """Of 60 frames a second. The emulator counts frames, not steps of 4."""
    settings, real = [], ppo_atari.AtariVectorEnv
    monkeypatch.setattr(ppo_atari, "AtariVectorEnv", lambda *a, **k: settings.append(k) or real(*a, **k))
    make_envs(Args(), 1, seed=0, training=True)
    assert settings[0]["max_num_frames_per_episode"] == 30 * 60 * 60


def test_new_games_have_lost_no_life():
    envs = make_envs(Args(), 2, seed=3, training=True)
    envs.lives = np.full(2, 9)  # of the games before
    envs.reset(seed=1)
    assert not envs.step(np.zeros(2, int))[4]["life_lost"].any()


def test_only_the_ids_with_sticky_actions_have_them():
    """Same seed, same actions: a game that repeats an action by chance leaves the one that does not."""
    frames = []
    for env_id in ("PongNoFrameskip-v4", "PongNoFrameskip-v4", "PongNoFrameskip-v0", "ALE/Pong-v5"):
        envs = make_envs(Args(env_id=env_id), 2, seed=4, training=True)
        envs.reset()
        frames.append([obs for _, (obs, *_) in play(envs, 60)])
    assert np.array_equal(frames[0], frames[1])
    assert not np.array_equal(frames[0], frames[2])
    assert not np.array_equal(frames[0], frames[3])
    assert np.array_equal(frames[2], frames[3])  # both repeat with a chance of 0.25


def test_no_two_games_start_alike():
    _, infos = make_envs(Args(), 64, seed=1, training=True).reset()
    idle = infos["episode_frame_number"] - 1  # the first frame is FIRE's
    assert idle.min() >= 0
    assert 25 < idle.max() < 30
    assert len(set(idle)) > 15


def test_same_seed_same_games_and_neighbours_share_none():
    def first_frames(seed):
        envs = make_envs(Args(env_id="ALE/Breakout-v5"), 4, seed=seed, training=True)  # sticky: chance at each frame
        start = envs.reset()[0]
        return np.concatenate([start[None], [obs for _, (obs, *_) in play(envs, 40)]])

    assert np.array_equal(first_frames(5), first_frames(5))
    assert not np.array_equal(first_frames(5), first_frames(500))


def test_pictures_are_those_of_the_games_in_their_own_colors():
    envs = make_envs(Args(env_id="ALE/Breakout-v5"), 2, seed=2, training=False, render=True)
    envs.reset()
    for _, (obs, *_) in play(envs, 200):
        for picture, stack in zip(envs.render(), obs, strict=True):
            assert picture.shape == (210, 160, 3)
            gray = cv2.resize(cv2.cvtColor(picture, cv2.COLOR_RGB2GRAY), (84, 84), interpolation=cv2.INTER_AREA)
            assert np.abs(gray.astype(int) - stack[3]).max() < 10  # ale-py weighs the colors a little differently
    red, _, blue = picture[57:63, 8:152].mean(axis=(0, 1))  # Breakout's uppermost row of bricks is red
    assert red > 150 > 100 > blue


@pytest.mark.parametrize(
    "env_id", ["ALE/Pong-v5", "PongNoFrameskip-v0", "ALE/MontezumaRevenge-v5", "UpNDownNoFrameskip-v4"]
)
def test_any_game_starts(env_id):
    envs = make_envs(Args(env_id=env_id), 2, seed=1, training=True)
    assert envs.reset()[0].shape == (2, 4, 84, 84)


def test_every_game_that_is_registered_is_accepted():
    ids = [name for name in gym.registry if name.startswith("ALE/") or "NoFrameskip" in name]
    assert len(ids) == 228
    for env_id in ids[::19]:
        make_envs(Args(env_id=env_id), 1, seed=1, training=True).close()
