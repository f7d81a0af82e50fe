"""The mathematics against independent computations, and each script's learning on problems with known answers."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import SHORT, reload, train
from probes import (
    PROBES,
    CutOff,
    Endless,
    InFrames,
    Mixed,
    RewardFromActionAndObs,
    RewardFromObs,
    TruncatedEndless,
    play_in_frames,
    stack,
)
from test_checkpoint import curve
from torch.distributions import Categorical

import dqn_atari
import ppo_atari
import ppo_cartpole
from ppo_cartpole import Args, RunningNorm, compute_gae, ppo_loss, sample


def lambda_return(rewards, next_values, terminated, ended, t, gamma, lam):
    """The λ-return of one environment from its definition (Sutton & Barto 2018, eq. 12.3), in O(T) for each t."""
    last = next((k for k in range(t, len(rewards)) if ended[k]), len(rewards) - 1)
    n_step = []  # the 1-step, 2-step, ... return, up to the end of the episode or of the data
    for k in range(t, last + 1):
        reward_sum = sum(gamma ** (j - t) * rewards[j] for j in range(t, k + 1))
        n_step.append(reward_sum + gamma ** (k - t + 1) * next_values[k] * (not terminated[k]))
    weights = [(1 - lam) * lam**n for n in range(len(n_step) - 1)] + [lam ** (len(n_step) - 1)]
    return sum(w * g for w, g in zip(weights, n_step, strict=True))


@pytest.mark.parametrize(("gamma", "lam"), [(0.99, 0.95), (0.9, 0.0), (0.9, 1.0), (1.0, 0.5)])
def test_gae_is_the_lambda_return(gamma, lam):
    random = np.random.default_rng(0)
    T, N = 24, 16
    rewards, values, next_values = random.normal(size=(3, T, N))
    terminated = random.random((T, N)) < 0.15
    ended = terminated | (random.random((T, N)) < 0.15)
    next_values[:-1] = np.where(ended[:-1], next_values[:-1], values[1:])  # only an ended row leads elsewhere
    arrays = [torch.as_tensor(x) for x in (rewards, values, next_values, terminated, ended)]
    advantages, returns = compute_gae(*arrays, gamma, lam)
    for t in range(T):
        for n in range(N):
            expected = lambda_return(*(x[:, n] for x in (rewards, next_values, terminated, ended)), t, gamma, lam)
            assert returns[t, n].item() == pytest.approx(expected, abs=1e-9)
            assert advantages[t, n].item() == pytest.approx(expected - values[t, n], abs=1e-9)


class Linear(torch.nn.Module):
    """An agent whose outputs are its parameters."""

    def __init__(self, size, num_actions):
        super().__init__()
        self.logits = torch.nn.Parameter(torch.randn(size, num_actions, dtype=torch.float64))
        self.values = torch.nn.Parameter(torch.randn(size, dtype=torch.float64))

    def forward(self, obs):
        return self.logits, self.values


@pytest.mark.parametrize("clip_vloss", [False, True])
@pytest.mark.parametrize("norm_adv", [False, True])
def test_ppo_loss_matches_a_loop_over_its_definition(clip_vloss, norm_adv):
    torch.manual_seed(0)
    size, num_actions, clip = 32, 3, 0.2
    agent = Linear(size, num_actions)
    mb = {"obs": torch.zeros(size), "actions": torch.randint(num_actions, (size,)), "logprobs": None}
    mb |= {name: torch.randn(size, dtype=torch.float64) for name in ("values", "advantages", "returns")}
    new_logprobs = Categorical(logits=agent.logits.detach()).log_prob(mb["actions"])
    mb["logprobs"] = new_logprobs + 0.3 * torch.randn(size, dtype=torch.float64)
    args = Args(clip_coef=clip, clip_vloss=clip_vloss, norm_adv=norm_adv, ent_coef=0.02, vf_coef=0.7)

    advantages = mb["advantages"].numpy()
    if norm_adv:
        advantages = (advantages - advantages.mean()) / (advantages.std(ddof=1) + 1e-8)
    policy, value, clipped, logratios = [], [], [], []
    for i in range(size):
        logratios.append(new_logprobs[i].item() - mb["logprobs"][i].item())
        ratio = np.exp(logratios[-1])
        policy.append(-min(ratio * advantages[i], np.clip(ratio, 1 - clip, 1 + clip) * advantages[i]))
        clipped.append(abs(ratio - 1) > clip)
        new, old, target = (x[i].item() for x in (agent.values, mb["values"], mb["returns"]))
        error = (new - target) ** 2
        value.append(0.5 * (max(error, (old + np.clip(new - old, -clip, clip) - target) ** 2) if clip_vloss else error))
    entropy = Categorical(logits=agent.logits.detach()).entropy().mean().item()

    loss, metrics = ppo_loss(agent, tuple(mb.values()), args)
    assert 0 < np.mean(clipped) < 1  # both sides of the clipping are on trial
    assert metrics["policy_loss"].item() == pytest.approx(np.mean(policy))
    assert metrics["value_loss"].item() == pytest.approx(np.mean(value))
    assert metrics["entropy"].item() == pytest.approx(entropy)
    assert metrics["clipfrac"].item() == pytest.approx(np.mean(clipped))
    assert metrics["old_approx_kl"].item() == pytest.approx(-np.mean(logratios))
    assert metrics["approx_kl"].item() == pytest.approx(np.mean([np.exp(x) - 1 - x for x in logratios]))
    assert loss.item() == pytest.approx(np.mean(policy) - 0.02 * entropy + 0.7 * np.mean(value))


def test_sampled_actions_follow_the_policy():
    torch.manual_seed(0)
    logits = torch.tensor([0.0, 1.0, 2.0])
    actions, logprobs = sample(logits.expand(60_000, 3))
    frequencies = actions.bincount(minlength=3) / len(actions)
    assert torch.allclose(frequencies, logits.softmax(0), atol=0.01)
    assert torch.allclose(logprobs, Categorical(logits=logits).log_prob(actions))


def test_running_norm_is_the_mean_and_variance_of_all_it_saw():
    torch.manual_seed(0)
    batches = [torch.randn(size, 3) * 5 + torch.tensor([100.0, 0.0, -7.0]) for size in (1, 50, 7, 400)]
    norm = RunningNorm(3)
    for batch in batches:
        norm.update(batch)
    everything = torch.cat(batches)
    assert torch.allclose(norm.mean, everything.mean(0), rtol=1e-4)
    assert torch.allclose(norm.var, everything.var(0, correction=0), rtol=1e-3)
    before = norm.mean.clone()
    assert norm(everything).std(0).sub(1).abs().max() < 0.01
    assert torch.equal(norm.mean, before)  # only update() learns


def test_running_norm_clips_and_bears_what_never_changes():
    norm = RunningNorm(2)
    norm.update(torch.tensor([[0.0, 7.0], [1.0, 7.0]]))
    assert norm(torch.tensor([[1e6, 7.0], [-1e6, 7.0]])).tolist() == [[10, 0], [-10, 0]]


@pytest.mark.parametrize("module", [ppo_cartpole, ppo_atari])
def test_a_new_agent_tries_all_actions_about_equally_often(module):
    """Sampled; greedily it takes one and the same."""
    args = module.Args()
    envs = module.make_envs(args, 1, seed=0, training=False)
    agent = module.Agent(envs, args)
    obs = torch.as_tensor(envs.reset()[0])
    obs = obs.expand(200, *obs.shape[1:])
    with torch.no_grad():
        probabilities = agent(10 * obs if module is ppo_cartpole else obs)[0].softmax(-1)
        assert probabilities.sub(1 / envs.single_action_space.n).abs().max() < 0.01
        assert len(agent.act(obs, greedy=True).unique()) == 1
        counts = agent.act(obs, greedy=False).bincount(minlength=envs.single_action_space.n)
    assert counts.min() > 0.5 * len(obs) / len(counts)


@pytest.mark.parametrize(("module", "eps"), [(ppo_cartpole, 1e-5), (ppo_atari, 1e-5), (dqn_atari, 1e-8)])
def test_the_epsilon_of_adam(module, eps, tmp_path):
    """PPO's is in its docstring, DQN's is that of PyTorch."""
    run_dir = train(module, tmp_path, **SHORT[module.__name__])
    assert reload(module, run_dir)[0]["optimizer"]["param_groups"][0]["eps"] == eps


@pytest.mark.parametrize("module", [ppo_cartpole, ppo_atari])
def test_advantages_are_made_of_what_the_environments_said(module, tmp_path, monkeypatch):
    """Each in its place, though episodes end in either way at any time; and with the flags of the run."""
    agents, trainings, outcomes, cut_off = [], [], [], []
    agent_class, make_envs, compute_gae = module.Agent, module.make_envs, module.compute_gae
    if module is ppo_atari:  # in the first game, each step costs a life

        def make_envs(args, num_envs, seed, training):
            return InFrames(Mixed, num_envs, life_lost=np.arange(num_envs) == 0)

    def watch_envs(*args, **settings):
        envs = make_envs(*args, **settings)
        step = envs.step
        envs.step = lambda actions: outcomes.append(step(actions)) or outcomes[-1]
        trainings.append(settings["training"])
        return envs

    def watch_gae(rewards, values, next_values, terminated, ended, gamma, gae_lambda):
        for t, (obs, reward, over, truncated, infos) in enumerate(outcomes[-len(rewards) :]):
            over, final_obs = over | infos.get("life_lost", False), infos.get("final_obs")
            last = np.stack([final_obs[n] if truncated[n] else obs[n] for n in range(len(obs))])
            expected = agents[0](torch.as_tensor(last))[1].where(torch.as_tensor(~over), 0)
            torch.testing.assert_close(next_values[t] * ~terminated[t], expected, rtol=1e-4, atol=1e-6)
            assert rewards[t].tolist() == pytest.approx(reward)
            assert terminated[t].tolist() == over.tolist()
            assert ended[t].tolist() == (over | truncated).tolist()
            cut_off.append(truncated.sum())
        assert (gamma, gae_lambda) == (0.9, 0.7)
        return compute_gae(rewards, values, next_values, terminated, ended, gamma, gae_lambda)

    monkeypatch.setattr(module, "Agent", lambda *a: agents.append(agent_class(*a)) or agents[-1])
    monkeypatch.setattr(module, "make_envs", watch_envs)
    monkeypatch.setattr(module, "compute_gae", watch_gae)
    settings = dict(num_envs=4, num_steps=20, num_minibatches=1, total_timesteps=160, update_epochs=1, cuda=False)
    settings |= {"env_id": PROBES["Mixed"]} if module is ppo_cartpole else {}
    train(module, tmp_path, gamma=0.9, gae_lambda=0.7, **settings)
    assert trainings == [True]  # rewards are clipped
    assert len(cut_off) == 40
    assert {0, 1, 2} <= set(cut_off)


def test_an_environment_that_has_one_array_for_all_observations_keeps_its_last_one():
    """Gymnasium stores final_obs as it was returned, and the first observation of the next episode overwrote it."""
    envs = ppo_cartpole.make_envs(Args(env_id=PROBES["OneArray"]), 2, seed=1, training=True)
    obs, _, _, truncated, infos = envs.step(np.zeros(2, np.int64))
    assert truncated.all()
    assert np.stack(infos["final_obs"]) == pytest.approx(0.2)
    assert set(np.abs(obs.flat)) == {1}


@pytest.mark.parametrize("anneal_lr", [True, False])
@pytest.mark.parametrize("module", [ppo_cartpole, ppo_atari])
def test_learning_rate_falls_linearly_to_0_at_the_end(module, anneal_lr, tmp_path, monkeypatch):
    """Also with checkpoints in between; what the optimizer has is what the curve says."""
    used = []
    monkeypatch.setattr(module, "ppo_update", lambda *update: used.append(update[1].param_groups[0]["lr"]) or {})
    settings = dict(num_envs=2, num_steps=16, total_timesteps=160, save_freq=70, cuda=False)
    run_dir = train(module, tmp_path, learning_rate=0.5, anneal_lr=anneal_lr, **settings)
    assert used == pytest.approx([0.5, 0.4, 0.3, 0.2, 0.1] if anneal_lr else [0.5] * 5)
    assert curve(run_dir, "charts/learning_rate") == [(32 * i, pytest.approx(lr)) for i, lr in enumerate(used, 1)]


@pytest.mark.parametrize("values", ["alike", "unlike"])
@pytest.mark.parametrize("module", [ppo_cartpole, ppo_atari])
def test_explained_variance_is_0_where_there_is_none_to_explain(module, values, tmp_path, monkeypatch):
    """Without rewards, and with values that are all the same (0 / 0) or not (1 / 0): neither ends the run."""
    monkeypatch.setattr(RewardFromObs, "reward", lambda env, action: 0.0)
    play_in_frames(monkeypatch, ppo_atari, RewardFromObs)
    if values == "alike":
        monkeypatch.setattr(module.nn.init, "orthogonal_", lambda weight, gain: torch.nn.init.zeros_(weight))
    settings = dict(num_envs=2, num_steps=16, num_minibatches=1, total_timesteps=96, cuda=False)
    settings |= {"env_id": PROBES["RewardFromObs"]} if module is ppo_cartpole else {}
    run_dir = train(module, tmp_path, **settings)
    assert curve(run_dir, "losses/explained_variance") == [(32, 0), (64, 0), (96, 0)]


@pytest.mark.parametrize("module", [ppo_cartpole, ppo_atari])
def test_explained_variance_is_that_of_returns_by_values(module, tmp_path, monkeypatch):
    """All of it, though each value is too low by 3; and as its definition says, where returns lie elsewhere."""
    expected = []

    def gae(rewards, values, *rest):
        returns = values.roll(1, 0) if expected else values + 3
        expected.append((1 - (returns - values).var() / returns.var()).item())
        return torch.zeros_like(values), returns

    monkeypatch.setattr(module, "compute_gae", gae)
    play_in_frames(monkeypatch, ppo_atari, RewardFromActionAndObs)
    settings = dict(num_envs=2, num_steps=16, num_minibatches=1, total_timesteps=64, cuda=False)
    run_dir = train(module, tmp_path, **settings)
    assert expected[0] == pytest.approx(1, abs=1e-4)
    found = [value for _, value in curve(run_dir, "losses/explained_variance")]
    assert found == pytest.approx(expected, abs=1e-4)


def updated(monkeypatch, kls, **settings):
    """ppo_update whose gradient steps report these KL divergences: how many it took, and what it returned."""
    agent, taken = torch.nn.Linear(1, 1), iter(kls)

    def loss(agent, minibatch, args):
        return agent(minibatch[0]).mean(), {"approx_kl": torch.tensor(next(taken))}

    monkeypatch.setattr(ppo_cartpole, "ppo_loss", loss)
    optimizer = torch.optim.SGD(agent.parameters(), lr=0.1)
    metrics = ppo_cartpole.ppo_update(agent, optimizer, (torch.ones(8, 1),) * 6, Args(**settings))
    return len(kls) - len(list(taken)), metrics


def test_the_kl_limit_looks_at_the_mean_of_the_last_epoch(monkeypatch):
    """Not at the last minibatch, which is above it in the first epoch, nor at the whole update, which is below."""
    kls = [0.0, 1.5, 2.5, 0.0, 0.0, 0.0]
    assert updated(monkeypatch, kls, num_minibatches=2, update_epochs=3, target_kl=1.0)[0] == 4


def test_what_is_logged_of_an_update_is_the_mean_of_its_gradient_steps(monkeypatch):
    steps, metrics = updated(monkeypatch, [1.0, 2.0, 3.0, 6.0], num_minibatches=2, update_epochs=2, target_kl=None)
    assert (steps, metrics["approx_kl"].item()) == (4, 3.0)


def test_target_kl_ends_the_update_after_a_whole_epoch():
    torch.manual_seed(0)
    args = Args(num_minibatches=4, update_epochs=5, learning_rate=0.1, target_kl=1e-9)
    envs = ppo_cartpole.make_envs(args, 8, seed=0, training=True)
    agent = ppo_cartpole.Agent(envs, args)
    optimizer = torch.optim.Adam(agent.parameters(), lr=args.learning_rate)
    obs = torch.randn(64, 4)
    actions, logprobs = sample(agent(obs)[0].detach())
    batch = (obs, actions, logprobs, *torch.randn(3, 64))
    ppo_cartpole.ppo_update(agent, optimizer, batch, args)
    assert optimizer.state[next(agent.parameters())]["step"] == 4  # one epoch of four minibatches, of five


def test_gradients_are_clipped_to_a_global_norm():
    torch.manual_seed(0)
    args = Args(num_minibatches=1, update_epochs=1, max_grad_norm=0.01)
    agent = ppo_cartpole.Agent(ppo_cartpole.make_envs(args, 8, seed=0, training=True), args)
    before = torch.nn.utils.parameters_to_vector(agent.parameters()).detach().clone()
    batch = (torch.randn(64, 4), torch.zeros(64, dtype=torch.int64), *torch.randn(4, 64))
    metrics = ppo_cartpole.ppo_update(agent, torch.optim.SGD(agent.parameters(), lr=1.0), batch, args)
    change = torch.nn.utils.parameters_to_vector(agent.parameters()).detach() - before
    assert metrics["grad_norm"] > 0.1  # as it was before clipping
    assert change.norm().item() == pytest.approx(0.01, rel=1e-3)


@pytest.mark.parametrize(
    ("name", "values", "actions", "tolerance"),  # by what is observed: -1, 0 or 1
    [
        ("ConstantReward", {1: 1}, {}, 0.05),
        ("RewardFromObs", {-1: -1, 1: 1}, {}, 0.1),
        ("DelayedReward", {0: 0.9, 1: 1}, {}, 0.05),
        ("RewardFromAction", {}, {1: 1}, None),
        ("RewardFromActionAndObs", {-1: 1, 1: 1}, {-1: 0, 1: 1}, 0.2),
        ("TruncatedEndless", {-1: -1, 1: 5}, {}, 0.3),  # far lower, were the cut an end or the next start what follows
    ],
)
def test_probe(name, values, actions, tolerance, tmp_path):
    """ppo_cartpole.py finds the values and greedy actions that are known."""
    gamma = 0.8 if name == "TruncatedEndless" else 0.9
    settings = dict(num_steps=16, gamma=gamma, gae_lambda=0.9, learning_rate=5e-3, update_epochs=10)
    run_dir = train(ppo_cartpole, tmp_path, env_id=PROBES[name], total_timesteps=5120, **settings)
    agent, obs = reload(ppo_cartpole, run_dir)[1], torch.tensor([[-1.0], [0.0], [1.0]])
    found, best = agent(obs)[1].tolist(), agent.act(obs, greedy=True).tolist()
    assert {x: found[x + 1] for x in values} == pytest.approx(values, abs=tolerance)
    assert {x: best[x + 1] for x in actions} == actions
    if name == "RewardFromObs":
        explained = [value for _, value in curve(run_dir, "losses/explained_variance")]
        assert explained[0] < 0.5
        assert explained[-1] > 0.95


def test_a_truncated_game_is_worth_what_its_own_last_frame_is(tmp_path, monkeypatch):
    play_in_frames(monkeypatch, ppo_atari, CutOff)
    agents, seen, agent_class, compute_gae = [], [], ppo_atari.Agent, ppo_atari.compute_gae
    monkeypatch.setattr(ppo_atari, "Agent", lambda *a: agents.append(agent_class(*a)) or agents[-1])

    def watch(rewards, values, next_values, *rest):
        last = torch.as_tensor(np.concatenate([stack(-1, 0.2), stack(1, 0.2)]))  # after black, after white
        seen.append((next_values, agents[0](last)[1]))
        return compute_gae(rewards, values, next_values, *rest)

    monkeypatch.setattr(ppo_atari, "compute_gae", watch)
    train(ppo_atari, tmp_path, num_envs=2, num_steps=8, num_minibatches=2, total_timesteps=16, cuda=False)
    ((next_values, expected),) = seen
    assert next_values.shape == (8, 2)
    assert (next_values.unsqueeze(-1) - expected).abs().min(-1).values.max() < 1e-6


def train_in_frames(module, probe, tmp_path, monkeypatch, life_lost=False, **settings):
    """Train an Atari script on a probe; returns the agent."""
    play_in_frames(monkeypatch, module, probe, life_lost)
    return reload(module, train(module, tmp_path, gamma=0.5, cuda=False, **settings))[1]


def state_values(agent, obs):
    """What an agent of either kind takes the observations to be worth."""
    outputs = agent(obs)
    return outputs[1].tolist() if isinstance(outputs, tuple) else outputs.max(-1).values.tolist()


PPO = (ppo_atari, dict(num_steps=16, num_minibatches=2, learning_rate=1e-3, total_timesteps=128 * 20))
DQN = (
    dqn_atari,
    dict(buffer_size=1000, learning_starts=100, target_network_frequency=100, learning_rate=1e-3, total_timesteps=1500),
)


BF16 = [(module, settings | dict(bf16=True)) for module, settings in (PPO, DQN)]
IDS = ["ppo_atari", "dqn_atari", "ppo_atari-bf16", "dqn_atari-bf16"]


@pytest.mark.parametrize(("module", "settings"), [PPO, DQN, *BF16], ids=IDS)
@pytest.mark.parametrize("probe", [RewardFromActionAndObs, Endless])
def test_probe_in_frames(module, settings, probe, tmp_path, monkeypatch):
    """Sees what a frame shows; the end of a game or the loss of a life, which never ends it, ends the value."""
    agent = train_in_frames(module, probe, tmp_path, monkeypatch, life_lost=True, **settings)
    history = (1, -1, 1) if probe is Endless else ()
    obs = torch.as_tensor(np.concatenate([stack(*history, -1), stack(*history, 1)]))
    assert agent.act(obs, greedy=True).tolist() == [0, 1]
    assert state_values(agent, obs) == pytest.approx([1, 1], rel=0.15)


@pytest.mark.parametrize(("module", "settings"), [PPO, DQN], ids=["ppo_atari", "dqn_atari"])
def test_probe_in_frames_truncation_is_not_termination(module, settings, tmp_path, monkeypatch):
    agent = train_in_frames(module, TruncatedEndless, tmp_path, monkeypatch, **settings)
    obs = torch.as_tensor(np.concatenate([stack(-1), stack(-1, 1), stack(1, 1, 1, 1)]))
    assert state_values(agent, obs) == pytest.approx([-4, 2, 2], abs=0.4)  # V = 1 / (1 - 0.5), and 0.5 V - 5 at first


CARTPOLE = (ppo_cartpole, dict(norm_obs=True, learning_rate=1e-2, total_timesteps=4 * 256))
FRAMES = (ppo_atari, dict(num_envs=4, num_steps=16, num_minibatches=2, learning_rate=1e-3, total_timesteps=4 * 64))


@pytest.mark.parametrize(("module", "settings"), [CARTPOLE, FRAMES], ids=["ppo_cartpole", "ppo_atari"])
def test_ratio_is_one_before_the_first_gradient_step(module, settings, tmp_path, monkeypatch):
    """What a rollout stored is what the policy saw and did: else clipping works on an error of ours."""
    update, spread, ratios = module.ppo_update, [], []

    def watch(agent, optimizer, batch, args):
        with torch.no_grad():
            log_pi = agent(batch[0])[0].log_softmax(-1)
        spread.append(log_pi.std(0).mean().item())  # how much the policy depends on what it sees
        ratios.append((log_pi.gather(-1, batch[1].unsqueeze(-1)).squeeze(-1) - batch[2]).exp())
        return update(agent, optimizer, batch, args)

    monkeypatch.setattr(module, "ppo_update", watch)
    if module is ppo_atari:  # games look too much alike at their start
        play_in_frames(monkeypatch, module, RewardFromActionAndObs)
    train(module, tmp_path, cuda=False, **settings)
    assert len(ratios) == 4
    assert spread[-1] > 0.01  # else rows that do not belong together would go unnoticed
    assert (torch.cat(ratios) - 1).abs().max() < 1e-4


@pytest.mark.parametrize("module", [ppo_atari, dqn_atari])
def test_bf16_is_the_same_network_with_fewer_digits(module):
    """What is learned from and what learns stay float32; only what the CNN computes loses digits."""
    outputs, gradients = [], []
    for bf16 in (False, True):
        args = module.Args(bf16=bf16)
        envs = module.make_envs(args, 8, seed=0, training=True)
        torch.manual_seed(0)
        agent = module.Agent(envs, args)
        found = agent(torch.as_tensor(envs.reset()[0]))
        if module is dqn_atari:  # Q-values alone
            found = (found,)
        (100 * found[0].square().sum() + found[-1].sum()).backward()
        outputs.append(torch.cat([x.flatten() for x in found]).detach())
        gradients.append(torch.cat([weight.grad.flatten() for weight in agent.parameters()]))
    for (exact, rounded), tolerance in ((outputs, 0.02), (gradients, 0.1)):
        assert exact.dtype == rounded.dtype == torch.float32
        assert 0 < (exact - rounded).norm() < tolerance * exact.norm()


@pytest.mark.parametrize("module", [ppo_atari, dqn_atari])
def test_convolutions_are_channels_last(module):
    """Else training on a CPU takes longer."""
    agent = module.Agent(SimpleNamespace(single_action_space=SimpleNamespace(n=4)), module.Args())
    layers, inputs = [layer for layer in agent.network if isinstance(layer, torch.nn.Conv2d)], []
    for layer in layers:
        assert layer.weight.is_contiguous(memory_format=torch.channels_last)
        layer.register_forward_pre_hook(lambda layer, x: inputs.append(x[0]))
    agent(torch.zeros((2, 4, 84, 84), dtype=torch.uint8))
    assert [x.is_contiguous(memory_format=torch.channels_last) for x in inputs] == [True] * 3


def test_heads_of_bf16_have_all_digits_of_float32():
    """Probability ratios near 1 need them."""
    args = ppo_atari.Args(bf16=True)
    envs = ppo_atari.make_envs(args, 2, seed=0, training=True)
    agent, computed = ppo_atari.Agent(envs, args), []
    for layer in (agent.network[0], agent.actor, agent.critic):
        layer.register_forward_hook(lambda layer, inputs, output: computed.append(output.dtype))
    agent(torch.as_tensor(envs.reset()[0]))
    assert computed == [torch.bfloat16, torch.float32, torch.float32]


def test_each_epoch_takes_every_step_once_in_an_order_of_its_own(monkeypatch):
    seen = []

    def loss(agent, minibatch, args):
        seen.append(minibatch[0].flatten().tolist())
        return agent(minibatch[0]).mean(), {}

    monkeypatch.setattr(ppo_cartpole, "ppo_loss", loss)
    agent, batch = torch.nn.Linear(1, 1), (torch.arange(64.0).view(64, 1),) * 6
    args = Args(num_minibatches=2, update_epochs=3, target_kl=None)
    ppo_cartpole.ppo_update(agent, torch.optim.SGD(agent.parameters(), lr=0.1), batch, args)
    epochs = [seen[i] + seen[i + 1] for i in (0, 2, 4)]
    assert all(sorted(epoch) == list(range(64)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in [*epochs, range(64)]}) == 4


@pytest.mark.parametrize("module", [ppo_cartpole, ppo_atari])
def test_layers_begin_orthogonal_and_with_their_gains(module):
    args = module.Args()
    agent = module.Agent(module.make_envs(args, 1, seed=0, training=True), args)
    heads = (agent.actor, agent.critic) if module is ppo_atari else (agent.actor[-1], agent.critic[-1])
    for layer in (x for x in agent.modules() if hasattr(x, "bias")):
        rows = layer.weight.flatten(1) / dict(zip(heads, (0.01, 1.0), strict=True)).get(layer, 2**0.5)
        rows = rows if len(rows) <= rows.shape[1] else rows.T
        torch.testing.assert_close(rows @ rows.T, torch.eye(len(rows)), atol=1e-4, rtol=0)
        assert not layer.bias.any()
