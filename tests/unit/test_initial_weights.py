"""`initial_weights=`: where weights start; bounds and deviations by the formulas of the papers."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from metarun.algorithms.cavia import CAVIA
from metarun.algorithms.maml import MAML
from metarun.algorithms.pretrain import Pretrain
from metarun.algorithms.relation import RelationNet
from metarun.backbones.conv4 import Conv4
from metarun.errors import ConfigError
from metarun.inner_loops.sgd import SGD
from metarun.nn.initial import InitialWeights
from metarun.nn.layers import FiLM

pytestmark = pytest.mark.quick
SHAPE, WIDTH = (1, 28, 28), 64


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


def started(algorithm, *words, **settings):
    InitialWeights(*words, **settings)(algorithm.own_backbone(), algorithm.own_heads())
    return algorithm


def maml(cls: type = MAML, **settings):
    return cls(Conv4(SHAPE, width=WIDTH), SGD(0.1, 1), outputs=5, **settings)


def check_uniform(weight: torch.Tensor, bound: float) -> None:
    """All are inside the bounds and reach them, and their deviation is that of uniform numbers."""
    assert 0.9 * bound < weight.abs().max() <= bound
    torch.testing.assert_close(weight.std().item(), bound / math.sqrt(3), rtol=0.1, atol=0)


@pytest.mark.parametrize("gain", [1.0, 1.73])
def test_xavier_is_uniform_by_fan_in_and_fan_out(gain: float):
    algorithm = started(maml(), "xavier", gain=gain, bias=[0.0, 0.05])
    first, last = algorithm.learner.backbone[0][0], algorithm.learner.backbone[3][0]
    check_uniform(first.weight, gain * math.sqrt(6 / (9 * 1 + 9 * WIDTH)))
    check_uniform(last.weight, gain * math.sqrt(6 / (9 * WIDTH + 9 * WIDTH)))
    check_uniform(algorithm.learner.head.weight, gain * math.sqrt(6 / (WIDTH + 5)))
    assert 0 <= last.bias.min() < 0.01 and 0.04 < last.bias.max() <= 0.05


def test_kaiming_as_in_cavias_code():
    """Twice the variance before ReLU; the head and FiLM have none after them."""
    algorithm = started(maml(CAVIA), "kaiming")
    convolutions = [m for m in algorithm.modules() if isinstance(m, nn.Conv2d)]
    check_uniform(convolutions[3].weight, math.sqrt(6 / (9 * WIDTH)))
    check_uniform(algorithm.learner.head.weight, math.sqrt(3 / WIDTH))
    (film,) = (m for m in algorithm.modules() if isinstance(m, FiLM))
    check_uniform(film.weight, math.sqrt(3 / 100))
    assert film.bias.abs().max() > 0  # as PyTorch starts it: at zero, a context could not move the scales
    assert not film.context.any() and not convolutions[3].bias.any() and not algorithm.learner.head.bias.any()


def test_fan_out_as_in_the_code_of_relation_networks():
    backbone = Conv4(SHAPE, width=WIDTH, halvings=2)
    algorithm = started(RelationNet(backbone), "fan_out", head=0.01, head_bias=1.0)
    for convolution in (backbone[1][0], algorithm.relation[0]):
        deviation = math.sqrt(2 / (9 * WIDTH))
        torch.testing.assert_close(convolution.weight.std().item(), deviation, rtol=0.03, atol=0)
        assert convolution.weight.abs().max() > 3 * deviation  # normal
        assert not convolution.bias.any()
    linear = [m for m in algorithm.relation.modules() if isinstance(m, nn.Linear)]
    assert all((m.bias == 1).all() for m in linear)
    torch.testing.assert_close(linear[0].weight.std().item(), 0.01, rtol=0.1, atol=0)


def test_a_head_that_starts_at_zero_stays_there():
    algorithm = started(maml(Pretrain, classes=20), "xavier")
    assert not algorithm.learner.head.weight.any()


@pytest.mark.parametrize(
    ("settings", "message"),
    [({"gain": 0.0}, "gain=0.0"), ({"bias": [1.0, 0.0]}, "bias="), ({"head": -1.0}, "head=-1.0")],
)
def test_numbers_that_cannot_be_used(settings, message: str):
    with pytest.raises(ConfigError, match=message):
        InitialWeights("xavier", **settings)
