"""The default run really learns: trained and scored as the README says."""

import json

from conftest import run


def test_the_default_run_solves_cartpole(tmp_path):
    done = run("ppo_cartpole.py", "--run-dir", "run", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    done = run("evaluate.py", "run", "--episodes", 100, "--greedy", "--json", "score.json", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    result = json.loads((tmp_path / "score.json").read_text())
    assert result["global_step"] <= 100_000
    assert result["mean_return"] >= 495
