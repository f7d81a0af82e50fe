"""The pictures that benchmarks/diagrams.py draws say what the scripts do, and can be read."""

import itertools
import re
import sys
from types import SimpleNamespace

import gymnasium as gym
import numpy as np
import pytest
import torch
from conftest import ROOT

import dqn_atari
import ppo_atari

sys.path.append(str(ROOT / "benchmarks"))
import diagrams

SPACE = gym.spaces.Box(0, 255, (4, 84, 84), np.uint8)
PICTURES = {ppo_atari: diagrams.draw_data_flow, dqn_atari: diagrams.draw_ring_buffer}


def code_in(figure):
    """What is set in typewriter letters."""
    return [text.get_text() for text in figure.axes[0].texts if text.get_fontfamily() == ["monospace"]]


@pytest.mark.parametrize("module", PICTURES)
def test_what_is_set_as_code_stands_in_the_script(module):
    known = set(re.findall(r"[A-Za-z_]\w*", (ROOT / f"{module.__name__}.py").read_text()))
    words = " ".join(code_in(PICTURES[module]()))
    assert set(re.findall(r"[A-Za-z_]\w*", words)) <= known
    for owner, name in re.findall(r"\b([A-Z]\w+)\.(\w+)", words):
        assert hasattr(getattr(module, owner), name)


def test_sizes_are_those_of_the_defaults(tmp_path):
    args = ppo_atari.Args()
    for name in ("num_steps", "num_envs", "num_minibatches", "update_epochs", "save_freq"):
        assert getattr(diagrams, name.upper()) == getattr(args, name)
    args = dqn_atari.Args()
    envs = SimpleNamespace(num_envs=args.num_envs, single_observation_space=SPACE)
    buffer = dqn_atari.ReplayBuffer(tmp_path, envs, args.buffer_size, min(args.save_freq, args.total_timesteps))
    assert (buffer.num_rows, buffer.max_filled) == (diagrams.DEFAULT_ROWS, diagrams.DEFAULT_SAMPLED)


def test_the_rollout_has_what_its_box_says():
    rollout = vars(ppo_atari.Rollout(3, SimpleNamespace(num_envs=2, single_observation_space=SPACE), "cpu"))
    words = re.findall(r"\w+", " ".join(code_in(diagrams.draw_data_flow())))
    assert rollout["obs"].shape == (3, 2, 4, 84, 84) and rollout["obs"].dtype == torch.uint8
    for name, tensor in rollout.items():
        assert name in words
        assert name == "obs" or tensor.shape == (3, 2)


def test_the_ring_is_what_the_real_buffer_does(tmp_path):
    """The picture's two games, behind a third, whose rows are written over."""
    envs = SimpleNamespace(num_envs=1, single_observation_space=gym.spaces.Box(0, 255, (4, 1, 1), np.uint8))
    buffer = dqn_atari.ReplayBuffer(tmp_path, envs, diagrams.SAMPLED, diagrams.SPARE - 1)
    names = ["0", *(f"z{i}" for i in range(8)), *(f"a{i}" for i in range(21)), *(f"b{i}" for i in range(7))]

    def stack(name):  # only its newest frame is looked at
        return np.full((4, 1, 1), names.index(name), np.uint8)

    buffer.begin_games(stack("z0")[None])
    for game, length, then in (("z", 7, "a"), ("a", 20, "b"), ("b", 6, None)):
        for i in range(1, length + 1):
            ended = i == length and then is not None
            final_obs = {0: stack(f"{game}{i}")} if ended else {}
            seen = stack(f"{then}0" if ended else f"{game}{i}")
            buffer.add(*np.zeros((3, 1)), np.array([ended]), final_obs, seen[None])

    assert buffer.count % buffer.num_rows == len(diagrams.FRAMES) - 1
    assert [names[i] for i in buffer.rows["frame"].flat] == diagrams.FRAMES
    assert buffer.rows["num_earlier"][:, 0].tolist() == diagrams.NUM_EARLIER
    final_frames = {key: names[frame.item()] for key, frame in buffer.final_frames.items()}
    assert final_frames == {(diagrams.TRUNCATED, 0): diagrams.FINAL_FRAME}
    drawn = {names[frames[3]]: [names[i] for i in frames] for frames in buffer.sample(1000)[0].flatten(1).tolist()}
    first = diagrams.SPARE + diagrams.STACKS_ONLY
    assert drawn.keys() == set(diagrams.FRAMES[first : first + diagrams.SAMPLED])
    for row, (frames, *_) in diagrams.SAMPLES.items():
        assert drawn[diagrams.FRAMES[row]] == frames.split()


@pytest.mark.parametrize("module", PICTURES)
def test_no_text_leaves_the_picture_or_its_box_or_covers_another(module):
    figure = PICTURES[module]()
    figure.draw_without_rendering()
    texts = [(text.get_text(), text.get_window_extent()) for text in figure.axes[0].texts if text.get_text()]
    boxes = [figure.bbox, *(patch.get_window_extent() for patch in figure.axes[0].patches)]
    assert len(texts) > 30
    for (one, a), (other, b) in itertools.combinations(texts, 2):
        assert not a.overlaps(b), (one, other)
    for (words, text), box in itertools.product(texts, boxes):
        inside = [box.contains(x, y) for x, y in text.corners()]
        assert all(inside) or (box is not figure.bbox and not any(inside)), words
