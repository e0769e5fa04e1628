"""Fixed episodes, intervals, paired comparison."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from metarun.algorithms.maml import MAML
from metarun.algorithms.protonet import ProtoNet
from metarun.algorithms.reptile import Reptile
from metarun.backbones.conv4 import Conv4
from metarun.datasets.glyphs import Glyphs
from metarun.inner_loops.sgd import SGD
from metarun.tasks.episodes import EpisodeShape
from metarun.tasks.objectives import ACCURACY
from metarun.tasks.sampling import fixed_draws
from metarun.training.evaluation import EvalSettings, Result, evaluate, interval, paired_difference
from metarun.training.hardware import Hardware

pytestmark = pytest.mark.quick

GEOMETRY = EpisodeShape(3, 1, 2)
CPU = Hardware("cpu")


@pytest.fixture(scope="module")
def source():
    return Glyphs(test_classes=20).split("test")


def test_the_interval_is_over_episodes():
    values = torch.rand(50, generator=torch.Generator().manual_seed(0))
    expected = 1.96 * np.std(values.numpy(), ddof=1) / math.sqrt(50)
    assert interval(values) == pytest.approx(expected, rel=1e-5)


def test_the_first_episodes_of_many_are_those_of_few(source):
    many = torch.cat([draw[1] for draw in fixed_draws(source, GEOMETRY, 130, seed=0)])
    few = torch.cat([draw[1] for draw in fixed_draws(source, GEOMETRY, 60, seed=0)])
    other = torch.cat([draw[1] for draw in fixed_draws(source, GEOMETRY, 60, seed=1)])
    assert len(many) == 130
    assert torch.equal(many[:60], few)
    assert not torch.equal(few, other)


@pytest.mark.parametrize("at_once", [1, 7, 50])
def test_scores_do_not_depend_on_how_many_run_at_once(source, at_once: int):
    torch.manual_seed(0)
    algorithm = MAML(Conv4((1, 28, 28), width=8), SGD(0.1, 1), 3)
    expected = evaluate(algorithm, source, EvalSettings(GEOMETRY, 20, 0), Hardware("cpu", tasks_at_once=20))
    result = evaluate(
        algorithm, source, EvalSettings(GEOMETRY, 20, 0), Hardware("cpu", tasks_at_once=at_once)
    )
    assert result.episodes_hash == expected.episodes_hash
    torch.testing.assert_close(result.losses, expected.losses, rtol=1e-4, atol=1e-5)


def test_evaluating_changes_nothing_in_the_algorithm_or_the_random_state(source):
    torch.manual_seed(0)
    algorithm = ProtoNet(Conv4((1, 28, 28), width=8, norm="running")).train()
    before = {name: value.clone() for name, value in algorithm.state_dict().items()}
    random = torch.get_rng_state()
    evaluate(algorithm, source, EvalSettings(GEOMETRY, 20, 0), CPU)
    assert algorithm.training
    assert torch.equal(torch.get_rng_state(), random)
    assert all(torch.equal(value, before[name]) for name, value in algorithm.state_dict().items())


def test_random_inner_loops_evaluate_the_same_twice(source):
    """Reptile's mini-batches are drawn from a seed of the evaluation's own."""
    algorithm = Reptile(Conv4((1, 28, 28), width=8), SGD(0.1, 3, order=1), 3, batch=2)
    results = [evaluate(algorithm, source, EvalSettings(EpisodeShape(3, 2, 2), 20, 0), CPU) for _ in range(2)]
    assert torch.equal(results[0].losses, results[1].losses)


def result(scores: list[float], episodes_hash: str = "same") -> Result:
    values = torch.tensor(scores)
    return Result(GEOMETRY, (ACCURACY,), {"accuracy": values}, values, episodes_hash, False, 0.0)


def test_differences_are_taken_in_pairs():
    a, b = result([0.9, 0.5, 0.7, 0.1]), result([0.8, 0.4, 0.6, 0.0])
    difference, half = paired_difference(a, b, ACCURACY)
    assert difference == pytest.approx(0.1)
    assert half < 1e-6 < interval(a.scores["accuracy"])
    with pytest.raises(ValueError, match="different episodes"):
        paired_difference(a, result([0.1] * 4, "other"), ACCURACY)
