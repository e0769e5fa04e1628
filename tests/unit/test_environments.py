"""Bandits, tabular decision processes and pendulums against plain loops; their players and optima."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from scipy.stats import norm

from metarun.algorithms.rl2 import RL2
from metarun.backbones.mlp import MLP
from metarun.commands.cells import Cell, Reference
from metarun.commands.references import with_references
from metarun.config.schema import EvalConfig
from metarun.datasets.environments import players
from metarun.datasets.environments.bandit import Bandit
from metarun.datasets.environments.base import Environments
from metarun.datasets.environments.pendulum import Pendulum
from metarun.datasets.environments.tabular import Tabular
from metarun.errors import ConfigError
from metarun.tasks.episodes import EpisodeShape
from metarun.tasks.rollouts import BEFORE, SCORED
from metarun.training.evaluation import EvalSettings, evaluate, paired_difference
from metarun.training.hardware import Hardware

pytestmark = [pytest.mark.quick, pytest.mark.usefixtures("float64")]

TASKS, EPISODES = 3, 4
CPU = "cpu"


def parameters_of(family: Environments, tasks: int = TASKS) -> dict[str, torch.Tensor]:
    drawn = family.sample("test", tasks, torch.Generator().manual_seed(0))
    return {name: values.double() for name, values in drawn.items()}


@pytest.mark.parametrize("rewards", ["bernoulli", "gaussian"])
def test_arms_against_a_plain_loop(rewards: str):
    family = Bandit(arms=3, pulls=5, rewards=rewards)  # type: ignore[arg-type]
    means = parameters_of(family)["means"]
    world, random = family.world({"means": means}, CPU), torch.Generator().manual_seed(1)
    assert world.reset(EPISODES, torch.rand(TASKS, EPISODES, 1)).tolist() == [[[1.0]] * EPISODES] * TASKS
    for _ in range(family.horizon):
        arms = torch.randint(3, (TASKS, EPISODES), generator=random)
        chance = torch.rand(TASKS, EPISODES, 1, generator=random)
        _, found, ended = world.step(arms, chance)
        assert not ended.any()
        for t, e in itertools.product(range(TASKS), range(EPISODES)):
            mean, u = float(means[t, arms[t, e]]), float(chance[t, e, 0])
            expected = float(u < mean) if rewards == "bernoulli" else mean + norm.ppf(u)
            assert float(found[t, e]) == pytest.approx(expected, abs=1e-4)
    best = family.optimum({"means": means})
    assert best.tolist() == pytest.approx([5 * max(own) for own in means.tolist()])


def test_tables_against_a_plain_loop():
    family = Tabular(states=4, choices=3, horizon=6)
    drawn = parameters_of(family)
    assert torch.allclose(drawn["next"].sum(-1), torch.ones(()))
    world, random = family.world(drawn, CPU), torch.Generator().manual_seed(1)
    seen = world.reset(EPISODES, torch.rand(TASKS, EPISODES, 2))
    states = np.zeros((TASKS, EPISODES), dtype=int)
    for _ in range(family.horizon):
        assert seen.argmax(-1).tolist() == states.tolist() and (seen.sum(-1) == 1).all()
        actions = torch.randint(3, (TASKS, EPISODES), generator=random)
        chance = torch.rand(TASKS, EPISODES, 2, generator=random)
        seen, rewards, _ = world.step(actions, chance)
        for t, e in itertools.product(range(TASKS), range(EPISODES)):
            place = t, states[t, e], int(actions[t, e])
            expected = float(drawn["means"][place]) + norm.ppf(float(chance[t, e, 0]))
            assert float(rewards[t, e]) == pytest.approx(expected, abs=1e-4)
            shares = np.cumsum(drawn["next"][place].numpy())
            states[t, e] = next(s for s, share in enumerate(shares) if float(chance[t, e, 1]) < share)


def test_the_optimum_of_tables_is_the_best_of_all_policies():
    family = Tabular(states=2, choices=2, horizon=3)
    drawn = parameters_of(family)
    means, following = drawn["means"].numpy(), drawn["next"].numpy()
    for t, best in enumerate(family.optimum(drawn).tolist()):
        values = []
        for policy in itertools.product(range(2), repeat=6):  # an action for each step and state
            shares, value = np.array([1.0, 0.0]), 0.0
            for step in range(3):
                chosen = [policy[2 * step + s] for s in range(2)]
                value += sum(shares[s] * means[t, s, chosen[s]] for s in range(2))
                shares = sum(shares[s] * following[t, s, chosen[s]] for s in range(2))
            values.append(value)
        assert best == pytest.approx(max(values), abs=1e-12)


def test_pendulums_against_a_plain_loop():
    family = Pendulum(mass=(0.5, 2.0), length=(0.5, 1.5), gravity=(5.0, 15.0))
    drawn = parameters_of(family)
    world, random = family.world(drawn, CPU), torch.Generator().manual_seed(1)
    start = torch.rand(TASKS, EPISODES, 2, generator=random, dtype=torch.float64)
    seen = world.reset(EPISODES, start)
    angles = ((2 * start[..., 0] - 1) * math.pi).numpy().copy()
    speeds = (2 * start[..., 1] - 1).numpy().copy()
    for _ in range(40):
        expected = np.stack([np.cos(angles), np.sin(angles), speeds / 8], -1)
        np.testing.assert_allclose(seen.numpy(), expected, atol=1e-10)
        actions = 1.5 * torch.randn(TASKS, EPISODES, 1, generator=random, dtype=torch.float64)
        seen, rewards, ended = world.step(actions, start)
        assert not ended.any()
        for t, e in itertools.product(range(TASKS), range(EPISODES)):
            m, length, g = (float(drawn[name][t]) for name in ("mass", "length", "gravity"))
            torque = 2 * min(max(float(actions[t, e, 0]), -1), 1)
            wrapped = math.atan2(math.sin(angles[t, e]), math.cos(angles[t, e]))
            cost = wrapped**2 + 0.1 * speeds[t, e] ** 2 + 0.001 * torque**2
            assert float(rewards[t, e]) == pytest.approx(-cost, abs=1e-9)
            inertia = m * length**2 / 3  # of a rod about its end
            force = m * g * length / 2 * math.sin(angles[t, e]) + torque
            speeds[t, e] = min(max(speeds[t, e] + 0.05 * force / inertia, -8), 8)
            angles[t, e] += 0.05 * speeds[t, e]


def test_a_pendulum_of_mass_and_length_1_is_that_of_gymnasium():
    gymnasium = pytest.importorskip("gymnasium")
    family = Pendulum(mass=(1.0, 1.0), length=(1.0, 1.0))
    world = family.world(parameters_of(family, 1), CPU)
    theirs = gymnasium.make("Pendulum-v1").unwrapped
    theirs.reset(seed=0)
    random = torch.Generator().manual_seed(1)
    world.reset(1, torch.rand(1, 1, 2, generator=random, dtype=torch.float64))
    theirs.state = np.array([float(world.angle), float(world.speed)])
    for _ in range(family.horizon):
        action = 1.5 * torch.randn(1, 1, 1, generator=random, dtype=torch.float64)
        seen, reward, _ = world.step(action, action)
        expected, their_reward, *_ = theirs.step(2 * action[0, 0].numpy())
        np.testing.assert_allclose(seen[0, 0].numpy() * [1, 1, 8], expected, atol=1e-5)  # of float32
        assert float(reward) == pytest.approx(their_reward, abs=1e-8)


def test_the_exact_value_of_bandits():
    for arms, pulls, value in ((2, 5, 2.88889), (2, 10, 6.02179), (3, 10, 6.40964), (5, 10, 6.65999)):
        assert players.bayes_value(((0, 0),) * arms, pulls) == pytest.approx(value, abs=5e-6)


def test_gittins_indices_by_bisection_in_a_plain_loop():
    def gains(known: float, ones: int, zeros: int) -> float:
        """How much the first pull of an arm gains on a known arm, with 150 further pulls."""
        values = [max(known, (1 + i) / (152 + ones + zeros)) / 0.01 for i in range(ones, ones + 151)]
        for left in range(149, -1, -1):
            chances = [(1 + i) / (2 + ones + zeros + left) for i in range(ones, ones + left + 1)]
            pulled = [
                p * (1 + 0.99 * values[i + 1]) + (1 - p) * 0.99 * values[i] for i, p in enumerate(chances)
            ]
            values = [max(known / 0.01, value) for value in pulled]
        return pulled[0] - known / 0.01

    table = players.gittins_table(10)
    for ones, zeros in ((0, 0), (3, 1), (2, 5)):
        low, high = 0.0, 1.0
        for _ in range(12):
            middle = (low + high) / 2
            low, high = (middle, high) if gains(middle, ones, zeros) > 0 else (low, middle)
        assert table[ones, zeros] == pytest.approx(low, abs=2e-3)
    assert table[0, 0] == pytest.approx(0.8699, abs=1e-4)  # of Gittins 1979


SHAPE = EpisodeShape(1, 0, 1)


def rows_beside(family: Environments, shape: EpisodeShape, episodes: int) -> dict[str, Cell]:
    """The rows of eval on a family beside that of an untrained policy, by name."""
    torch.manual_seed(0)
    policy, source = (
        RL2(MLP(family.spec.item_shape, hidden=()), int(family.spec.outputs or 0)),
        family.load("test"),
    )
    result = evaluate(policy, source, EvalSettings(shape, episodes, 3), Hardware("cpu", "float64"))
    cell = Cell(Reference("a model"), shape, None, source, family.title, result)
    cells = with_references([cell], EvalConfig(episodes=episodes, seed=3))
    return {each.model.name: each for each in cells}


def test_players_of_a_bandit_are_below_the_exact_optimum():
    rows = rows_beside(Bandit(), SHAPE, 1000)
    results = {name: cell.result for name, cell in rows.items() if cell.result}
    names = ["a model", "random", "greedy", "Thompson", "UCB1", "UCB1, constant 0.2", "Gittins (0.99)"]
    assert list(results) == [*names, "Bayes optimum", "optimum, task known"]
    best = results["Bayes optimum"]
    assert abs(best.mean - 6.65999) < best.interval
    for name in names:
        assert results[name].mean - results[name].interval < 6.65999
        difference, half = paired_difference(best, results[name], best.metric)
        assert difference > -half
    assert results["random"].mean == pytest.approx(5.0, abs=0.15)
    assert results["Thompson"].mean == pytest.approx(5.75, abs=0.2)
    assert results["optimum, task known"].mean == pytest.approx(10 * 5 / 6, abs=0.1)
    # An untrained policy is random, on the same random numbers.
    model, random = (results[name].scores["return"] for name in ("a model", "random"))
    assert (model == random).float().mean() > 0.9


def test_more_pulls_than_can_be_solved_and_gaussian_arms():
    shape = EpisodeShape(1, 1, 1)
    assert "Bayes optimum" not in Bandit().players(shape) and "Gittins (0.99)" in Bandit().players(shape)
    assert "Bayes optimum" not in Bandit(arms=10, pulls=100).players(SHAPE)
    rows = rows_beside(Bandit(pulls=30, rewards="gaussian"), SHAPE, 200)
    means = {name: cell.result.mean for name, cell in rows.items() if cell.result}
    assert "Gittins (0.99)" not in means
    assert (
        means["Thompson"] > means["UCB1, constant 0.2"] - 5
        and means["greedy"] > 15 > abs(means["random"]) + 10
    )


def test_players_of_tables():
    """PSRL is between a random player and the optimum, and learns from episode to episode."""
    rows = rows_beside(Tabular(), EpisodeShape(1, 0, 10), 50)
    means = {name: cell.result.mean for name, cell in rows.items() if cell.result}
    assert list(means) == ["a model", "random", "greedy", "PSRL", "optimum, task known"]
    assert means["random"] + 2 < means["PSRL"] < means["greedy"] < means["optimum, task known"] - 3
    later = rows_beside(Tabular(), EpisodeShape(1, 12, 2), 50)["PSRL"].result
    assert later is not None and later.mean > means["PSRL"] + 1.5


def test_a_planner_that_knows_the_task_takes_the_best_actions():
    family = Tabular(states=3, choices=2, horizon=4)
    drawn = parameters_of(family)
    planner = players.Planner(torch.arange(TASKS), 3, 2, 4, samples=False)
    planner.visits += 1e12
    planner.total = (drawn["means"] * 1e12).numpy()
    planner.moves = (1e12 * drawn["next"]).numpy()
    planner.begin()
    values = planner.plan[-1][:, 0].max(-1)
    assert values.tolist() == pytest.approx(family.optimum(drawn).tolist(), abs=1e-6)


@pytest.mark.parametrize(("family", "name"), [(Bandit(), "Thompson"), (Tabular(), "PSRL")])
def test_random_choices_of_a_player_depend_on_the_seed_of_the_task_alone(family: Environments, name: str):
    shape, source = EpisodeShape(1, 1, 2), family.load("test")
    draw = source.draw(4, shape, torch.Generator().manual_seed(2))
    make = family.players(shape)[name]
    whole, parts = source.gather(draw, shape), []
    for rows in (slice(0, 1), slice(1, 4)):
        tasks, player = source.gather(tuple(x[rows] for x in draw), shape), make(draw[-1][rows])
        parts.append([tasks.played(player, phase).returns for phase in (BEFORE, SCORED)])
    player = make(draw[-1])
    for number, phase in enumerate((BEFORE, SCORED)):
        assert torch.equal(whole.played(player, phase).returns, torch.cat([part[number] for part in parts]))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Bandit(arms=1), "dataset.arms=1"),
        (lambda: Bandit(pulls=0), "dataset.pulls=0"),
        (lambda: Tabular(choices=1), "dataset.choices=1"),
        (lambda: Tabular(horizon=0), "dataset.horizon=0"),
        (lambda: Pendulum(mass=(0.0, 1.0)), r"dataset.mass=\[0.0, 1.0\]"),
        (lambda: Pendulum(length=(2.0, 1.0)), r"dataset.length=\[2.0,1.0\]"),
        (lambda: Pendulum(gravity=(1.0,)), r"dataset.gravity=\[1.0\]"),
    ],
)
def test_settings_out_of_range(make, message: str):
    with pytest.raises(ConfigError, match=message):
        make()
