"""RL2 against plain loops over tasks and time steps, in float64."""

from __future__ import annotations

import copy
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from metarun.algorithms.rl2 import RL2
from metarun.backbones.mlp import MLP
from metarun.config.build import build_outer_loop
from metarun.datasets.environments.navigation2d import Navigation2D
from metarun.datasets.environments.tabular import Tabular
from metarun.errors import ConfigError
from metarun.tasks.episodes import EpisodeShape
from metarun.tasks.policy_gradient import Estimator
from metarun.tasks.rollouts import BEFORE, SCORED, Rollouts
from metarun.tasks.spec import TaskSpec
from metarun.training.hardware import Hardware
from metarun.training.outer_loops import PPO, Gradient
from metarun.training.step import OuterStep

pytestmark = [pytest.mark.quick, pytest.mark.usefixtures("float64")]

ESTIMATOR = Estimator(discount=0.9, gae=0.7)
SHAPE = EpisodeShape(1, 2, 2)
# Goals so near that some episodes end early, and an environment of discrete actions.
FAMILIES = {
    "navigation2d": Navigation2D(half=0.012, horizon=4, estimator=ESTIMATOR),
    "tabular": Tabular(states=3, choices=2, horizon=4, estimator=ESTIMATOR),
}


def policy(family: str, memory: str = "gru", **settings: Any) -> RL2:
    """A policy whose outputs depend on its memory; with small deviations of Gaussian actions."""
    torch.manual_seed(0)
    spec = FAMILIES[family].spec
    backbone = MLP(spec.item_shape, hidden=(5,))
    settings |= {"memory": memory, "size": 6, "width": 0.05, "longest": 16}
    algorithm = RL2(backbone, int(spec.outputs or 0), spec.constants, **settings)
    with torch.no_grad():
        for head in (algorithm.policy, algorithm.critic):
            head.weight.normal_(std=0.4 / algorithm.memory.features**0.5)
        if algorithm.constants is not None:
            algorithm.constants.fill_(-4.0)
        algorithm.return_mean.fill_(0.3)
        algorithm.return_std.fill_(1.7)
    return algorithm


def tasks_of(family: str, count: int = 5, shape: EpisodeShape = SHAPE) -> Rollouts:
    source = FAMILIES[family].load("train")
    draw = source.draw(count, shape, torch.Generator().manual_seed(1))
    return source.gather(draw, shape).to(torch.float64)  # type: ignore[return-value]


def by_task(tasks: Rollouts, name: str) -> list[list[Tensor]]:
    """What was recorded at each time step of each trial, in the order in which it happened."""
    found = []
    for t in range(len(tasks)):
        parts = [getattr(tasks.recorded[phase], name)[t] for phase in (BEFORE, SCORED)]
        found.append([x[h, e] for x in parts for e in range(x.shape[1]) for h in range(x.shape[0])])
    return found


@pytest.mark.parametrize("memory", ["gru", "lstm", "snail"])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_pass_along_a_trial_is_that_of_acting_step_by_step(family: str, memory: str):
    algorithm, tasks = policy(family, memory), tasks_of(family)
    algorithm.play(tasks)
    trial = algorithm.trial(tasks)
    assert family == "tabular" or 0.2 < trial.alive.mean() < 0.9
    outputs, values = algorithm.along(tasks, trial)
    torch.testing.assert_close(outputs, trial.outputs, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(values, trial.values, rtol=1e-10, atol=1e-12)
    steps = [[float(alive) for alive in own] for own in by_task(tasks, "alive")]
    assert trial.alive.squeeze(2).tolist() == steps
    # So that the ratio of probabilities is 1 where the policy is the one that acted, whatever is clipped.
    tasks.clip = 1e-6
    advantages = (trial.advantages * trial.alive).sum((1, 2)) / trial.alive.sum((1, 2))
    algorithm.value = algorithm.entropy = 0.0
    torch.testing.assert_close(algorithm.meta_loss(tasks).loss, -advantages, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("family", FAMILIES)
def test_advantages_over_a_trial_against_a_plain_loop(family: str):
    """Steps at which an episode has ended are left out, so that the next episode follows the last move."""
    algorithm, tasks = policy(family), tasks_of(family)
    algorithm.play(tasks)
    names = ("rewards", "values", "alive", "advantages", "targets")
    for rewards, values, alive, advantages, targets in zip(
        *(by_task(tasks, name) for name in names), strict=True
    ):
        played = [i for i, going in enumerate(alive) if going]
        for place, start in enumerate(played):
            expected, weight = 0.0, 1.0
            for now, then in zip(played[place:], [*played[place + 1 :], None], strict=True):
                following = 0.0 if then is None else float(values[then])
                expected += weight * (float(rewards[now]) + 0.9 * following - float(values[now]))
                weight *= 0.9 * 0.7
            assert float(advantages[start]) == pytest.approx(expected, abs=1e-12)
            assert float(targets[start]) == pytest.approx(expected + float(values[start]), abs=1e-12)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_loss_at_other_weights_against_a_plain_loop(family: str):
    algorithm, tasks = policy(family, value=0.4, entropy=0.05), tasks_of(family)
    algorithm.play(tasks)
    old = by_task(tasks, "outputs")
    with torch.no_grad():
        for p in algorithm.parameters():
            p += 0.05 * torch.randn_like(p)
    tasks.clip = 0.1
    with torch.no_grad():
        outputs, values = algorithm.along(tasks, algorithm.trial(tasks))
    actions, expected = tasks.world.actions, []
    recorded = [by_task(tasks, name) for name in ("actions", "alive", "advantages", "targets")]
    for t, own in enumerate(zip(*recorded, strict=True)):
        losses = []
        for i, (action, alive, advantage, target) in enumerate(zip(*own, strict=True)):
            if alive:
                ratio = (
                    actions.log_prob(outputs[t, i, 0], action) - actions.log_prob(old[t][i], action)
                ).exp()
                clipped = min(float(ratio * advantage), float(ratio.clamp(0.9, 1.1) * advantage))
                error = float((values[t, i, 0] - target) / 1.7)
                losses.append(-clipped + 0.4 * error**2 - 0.05 * float(actions.entropy(outputs[t, i, 0])))
        expected.append(np.mean(losses))
    assert algorithm.meta_loss(tasks).loss.tolist() == pytest.approx(expected, abs=1e-10)


@pytest.mark.parametrize("family", FAMILIES)
def test_adapting_and_then_playing_is_one_trial(family: str):
    algorithm, whole, parts = policy(family), tasks_of(family), tasks_of(family)
    algorithm.play(whole)
    outcome = algorithm.outcome(algorithm.adapt(parts), parts)
    for phase in (BEFORE, SCORED):
        assert torch.equal(parts.recorded[phase].actions, whole.recorded[phase].actions)
    assert torch.equal(outcome.scores["return"], whole.recorded[SCORED].returns.mean(1))
    # What it would do first in an episode after the shots is what it did.
    first = whole.recorded[SCORED].observations[:, 0, :1]
    outputs = algorithm.predict(algorithm.adapt(parts), torch.cat([first + 1, first], 1))[:, 1]
    torch.testing.assert_close(outputs, whole.recorded[SCORED].outputs[:, 0, 0], rtol=1e-10, atol=1e-12)
    states = list(algorithm.trajectory(parts))
    assert len(states) == 2 and not torch.equal(states[0]["state"][0], states[1]["state"][0])


def step_with(algorithm: RL2, at_once: int, minibatches: int = 1) -> OuterStep:
    optimizer = torch.optim.Adam(algorithm.parameters(), 0.01)
    hardware = Hardware("cpu", "float64", at_once)
    source = FAMILIES["navigation2d"].load("train")
    rule = PPO(epochs=2, minibatches=minibatches)
    step = OuterStep(algorithm, optimizer, source, SHAPE, 5, 0, hardware, outer_loop=rule)
    step.prepare(0)
    return step


def test_a_step_in_chunks_is_that_of_all_tasks_at_once():
    weights = []
    for at_once in (5, 2):
        algorithm = policy("navigation2d", annealed=3)
        step = step_with(algorithm, at_once)
        step.step()
        step.step()
        assert algorithm.entropy == pytest.approx(0.01 * 2 / 3)
        weights.append(torch.cat([x.flatten() for x in algorithm.state_dict().values()]))
    torch.testing.assert_close(weights[0], weights[1], rtol=1e-10, atol=1e-12)
    assert not torch.equal(
        weights[0], torch.cat([x.flatten() for x in policy("navigation2d").state_dict().values()])
    )


def test_advantages_and_returns_are_scaled_by_all_tasks():
    algorithm = policy("navigation2d")
    batches = [tasks_of("navigation2d", 3), tasks_of("navigation2d", 2)]
    for tasks in batches:
        algorithm.play(tasks)

    def all_of(name: str) -> np.ndarray:
        recorded = [tasks.recorded[phase] for tasks in batches for phase in (BEFORE, SCORED)]
        return np.concatenate([getattr(batch, name)[batch.alive > 0].numpy() for batch in recorded])

    before, targets = all_of("advantages"), all_of("targets")
    algorithm.on_collected(batches)
    np.testing.assert_allclose(all_of("advantages"), (before - before.mean()) / before.std(), rtol=1e-6)
    assert float(algorithm.return_mean) == pytest.approx(targets.mean())  # of the first iteration
    assert float(algorithm.return_std) == pytest.approx(targets.std())


def test_a_resumed_run_is_that_of_one_go():
    whole = policy("navigation2d", annealed=4)
    step = step_with(whole, 5, minibatches=2)
    for iteration in range(4):
        if iteration == 2:
            kept = copy.deepcopy((whole.state_dict(), step.optimizer.state_dict()))
        step.step()
    resumed = policy("navigation2d", annealed=4)
    resumed.load_state_dict(kept[0])
    step = step_with(resumed, 5, minibatches=2)
    step.optimizer.load_state_dict(kept[1])
    step.prepare(2)
    step.step()
    step.step()
    for name, value in whole.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[name]), name


def test_what_it_cannot_learn_from_is_refused():
    with pytest.raises(ConfigError, match="RL2: acts in environments"):
        RL2.check_tasks(TaskSpec((1, 28, 28)))
    algorithm, rule = ({"_target_": f"{cls.__module__}.{cls.__name__}"} for cls in (RL2, Gradient))
    settings = SimpleNamespace(algorithm=algorithm, outer_loop=rule, dataset={})
    with pytest.raises(ConfigError, match=r"RL2 trains a critic .*; choose outer_loop=ppo"):
        build_outer_loop(settings, FAMILIES["tabular"].spec)  # type: ignore[arg-type]
    backbone = MLP((2,), hidden=())
    for wrong in ({"size": 0}, {"memory": "snail", "width": 0.0}, {"entropy": -1.0}):
        with pytest.raises(ConfigError, match=f"algorithm.{list(wrong)[-1]}="):
            RL2(backbone, 2, **wrong)  # type: ignore[arg-type]


def test_its_policy_sees_no_more_than_it_has_seen():
    """Rewards of a later step do not change what it does before."""
    algorithm, tasks = policy("tabular"), tasks_of("tabular")
    algorithm.play(tasks)
    trial = algorithm.trial(tasks)
    changed = trial.rewards.clone()
    changed[:, 9] += 1
    before, _ = algorithm.along(tasks, trial)
    after, _ = algorithm.along(tasks, replace(trial, rewards=changed))
    different = (before != after).flatten(2).any(-1).any(0)
    assert not different[:10].any() and different[10:].all()
