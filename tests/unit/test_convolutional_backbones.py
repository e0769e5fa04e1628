"""Convolutional networks of papers' code, against plain loops of torch.nn.functional."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from metarun.backbones.conv4_joined import Conv4Joined
from metarun.errors import ConfigError

pytestmark = [pytest.mark.quick, pytest.mark.usefixtures("float64")]


def layers_of(network: nn.Module) -> list[tuple[nn.Conv2d, nn.BatchNorm2d]]:
    """The convolutions with their batch norms, in the order in which they run."""
    kinds = (nn.Conv2d, nn.BatchNorm2d)
    convolutions, norms = ([m for m in network.modules() if isinstance(m, kind)] for kind in kinds)
    return list(zip(convolutions, norms, strict=True))


def of_r2d2(network: nn.Module, x: Tensor) -> Tensor:
    """The features of `RRFeatures` in bertinetto/r2d2, in training."""
    maps = []
    for i, (convolution, norm) in enumerate(layers_of(network)):
        x = F.conv2d(x, convolution.weight, convolution.bias, padding=1)
        x = F.batch_norm(x, None, None, norm.weight, norm.bias, training=True, eps=1e-5)
        x = F.leaky_relu(F.max_pool2d(x, 2, stride=1 if i == 3 else 2), 0.1)
        maps.append(F.dropout(x, 0.4) if i >= 2 else x)
        x = maps[-1]
    return torch.cat([F.max_pool2d(maps[2], 2, stride=1).flatten(1), maps[3].flatten(1)], 1)


@pytest.mark.parametrize(
    ("shape", "widths", "features"),
    [
        ((3, 32, 32), (64, 64, 64, 64), 2 * 576),  # the number in the code
        ((1, 28, 28), (4, 6, 8, 10), 2 * 2 * (8 + 10)),
    ],
)
def test_the_joined_features_are_those_of_the_code(shape: tuple, widths: tuple, features: int):
    network = Conv4Joined(shape, widths, norm="running")
    assert network.features == features
    for p in network.parameters():  # batch norms with gains and shifts of their own
        nn.init.normal_(p, std=0.3)
    x = torch.randn(2, *shape)
    torch.manual_seed(1)
    found = network(x)
    torch.manual_seed(1)
    torch.testing.assert_close(found, of_r2d2(network, x))


@pytest.mark.parametrize(
    ("build", "words"),
    [
        (lambda: Conv4Joined((1, 16, 16), (8, 8)), "backbone.widths=[8, 8]: must be four numbers"),
        (lambda: Conv4Joined((1, 16, 16), drop_rate=1.0), "backbone.drop_rate=1.0: must be at least 0 and"),
        (lambda: Conv4Joined((1, 16, 16), slope=-1.0), "backbone.slope=-1.0: must be at least 0"),
        (lambda: Conv4Joined((1, 12, 16)), "backbone=conv4_joined needs images of at least 16x16"),
    ],
)
def test_what_cannot_be_is_said_in_a_line(build, words: str):
    with pytest.raises(ConfigError) as error:
        build()
    assert words in str(error.value) and "\n" not in str(error.value)
