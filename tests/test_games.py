"""benchmarks/games.py: what is published of several games is computed as it says."""

import csv
import sys
from pathlib import Path

import numpy as np
import pytest

sys.path.append(str(Path(__file__).resolve().parents[1] / "benchmarks"))
import games


def test_interquartile_mean_leaves_out_a_quarter_at_each_end():
    scores = np.array([[0.0, 1.0, 2.0, 100.0], [3.0, 4.0, 5.0, -100.0]])  # in order: -100, 0, 1, 2, 3, 4, 5, 100
    assert games.interquartile_mean(scores) == np.mean([1, 2, 3, 4])
    eighteen = np.arange(18.0).reshape(3, 6) ** 2
    assert games.interquartile_mean(eighteen) == np.mean(np.arange(4.0, 14.0) ** 2)
    assert games.interquartile_mean(np.stack([scores, scores + 1])).tolist() == [2.5, 3.5]


def test_interval_draws_seeds_within_each_game():
    """Games that differ widely, whose seeds agree, leave no doubt: another mix of games is not what is drawn."""
    assert games.interval(np.array([[1.0, 5.0, 30.0, 200.0]] * 3)).tolist() == [17.5, 17.5]
    scores = np.random.default_rng(1).normal([0.0, 1.0, 2.0, 3.0], 0.1, (3, 4))
    rng = np.random.default_rng(2)
    means = []
    for _ in range(4000):
        drawn = np.array([[rng.choice(scores[:, game]) for game in range(4)] for _ in range(3)])
        means.append(np.sort(drawn.ravel())[3:9].mean())
    assert games.interval(scores) == pytest.approx(np.percentile(means, [2.5, 97.5]), abs=0.005)


def test_table_and_picture(tmp_path, capsys):
    (tmp_path / "curves").mkdir()
    for game, scores in {"Pong": (20.0, 10.0, 18.0), "Qbert": (900.0, 1100.0, 4000.0)}.items():
        with open(tmp_path / f"{game}.csv", "w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(["env_id", "seed", "seconds", "mean_return", "human_normalized"])
            writer.writerows([game, i + 1, "" if i else 3600, score, score / 20] for i, score in enumerate(scores))
        with open(tmp_path / "curves" / f"{game}.csv", "w", newline="") as file:
            csv.writer(file).writerows([["run", "step", "value"], [1, 0, 0.0], [1, 100, 2.0]])
    files = [tmp_path / "Pong.csv", tmp_path / "Qbert.csv"]
    games.main(games.Args(files, out=tmp_path / "games.png"))
    out = capsys.readouterr().out
    assert "| Pong | 16.0 ± 5.3 | 20.0, 10.0, 18.0 | 3 | 0.80 | 60, –, – |" in out
    assert "| Qbert | 2,000.0 ± 1,734.9 | 900.0, 1,100.0, 4,000.0 | 2 | 100.00 | 60, –, – |" in out
    assert "3 seeds of each of 2 games" in out
    assert (tmp_path / "games.png").stat().st_size > 5000
