"""export.py, sb3.py and environments.py of benchmarks/ do as they say."""

import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import ROOT, reload, train

import evaluate
import ppo_cartpole

sys.path.append(str(ROOT / "benchmarks"))
import environments
import export


def test_a_weight_that_half_precision_cannot_hold_is_not_exported(tmp_path):
    run_dir = train(ppo_cartpole, tmp_path, total_timesteps=256)
    path = evaluate.find_checkpoint(run_dir)
    checkpoint = evaluate.load_checkpoint(path)
    name = max(checkpoint["model"], key=lambda name: checkpoint["model"][name].numel())
    checkpoint["model"][name][0] = 1e5
    torch.save(checkpoint, path)
    with pytest.raises(SystemExit, match="is too large for half precision"):
        export.main(export.Args(run_dir, tmp_path / "policy.pt"))
    assert not (tmp_path / "policy.pt").exists()


def test_an_exported_policy_is_the_newest_of_its_run(tmp_path):
    run_dir, policy = train(ppo_cartpole, tmp_path, total_timesteps=512, save_freq=256), tmp_path / "policy.pt"
    export.main(export.Args(run_dir, policy))
    kept, _, agent = evaluate.rebuild(policy, evaluate.Args(str(policy)), 1)
    assert kept.keys() == {"format", "script", "args", "global_step", "versions", "model"}
    assert (kept["global_step"], kept["args"]["run_dir"]) == (512, None)
    assert kept["model"]["actor.2.weight"].dtype == torch.float16
    for ours, theirs in zip(agent.parameters(), reload(ppo_cartpole, run_dir)[1].parameters(), strict=True):
        assert torch.allclose(ours, theirs, rtol=1 / 2000, atol=1e-7)


def test_sb3_plays_our_policy_in_frames_of_four_and_scores_it_as_asked(tmp_path, monkeypatch, capsys):
    pytest.importorskip("stable_baselines3", reason="needs Stable-Baselines3, which only benchmarks/sb3.py uses")
    import sb3

    path, acted, frames = tmp_path / "sticky.pt", [], []
    policy = evaluate.load_checkpoint(ROOT / "benchmarks/policies/ppo_atari-Qbert-hour.pt")
    policy["args"] |= {"env_id": "ALE/Qbert-v5", "bf16": False}
    torch.save(policy, path)

    def evaluate_policy(policy, envs, episodes, deterministic, return_episode_rewards):
        obs, emulator = envs.reset(), envs.get_attr("unwrapped")[0].ale
        assert (obs.shape, obs.dtype, episodes, return_episode_rewards) == ((3, 4, 84, 84), np.uint8, 3, True)
        act = policy.agent.act
        policy.agent.act = lambda obs, greedy: acted.append(greedy) or act(obs, greedy)
        before = emulator.getEpisodeFrameNumber()
        envs.step(policy.predict(obs, deterministic=deterministic)[0])
        frames.append(emulator.getEpisodeFrameNumber() - before)
        return [1.0, 2.0, 6.0], [1, 2, 3]

    monkeypatch.setattr(sb3, "evaluate_policy", evaluate_policy)
    for greedy in (False, True):
        sb3.score(str(path), episodes=3, greedy=greedy)
    assert (acted, frames) == ([False, True], [4, 4])
    low, high = evaluate.mean_interval([1.0, 2.0, 6.0])
    line = f"ALE/Qbert-v5, return 3.00 over 3 episodes, 95% interval of the mean {low:.2f} to {high:.2f}\n"
    assert capsys.readouterr().out.count(line) == 2


def test_the_rate_counts_the_steps_of_all_environments(monkeypatch):
    clock = [0.0]

    def step(actions):
        assert actions.shape == (8,)
        clock[0] += 0.25

    space = SimpleNamespace(n=2)
    envs = SimpleNamespace(num_envs=8, single_action_space=space, reset=lambda seed: None, step=step)
    monkeypatch.setattr(environments, "time", SimpleNamespace(perf_counter=lambda: clock[0]))
    assert environments.rate(envs, 2.0) == 8 * 4
