"""Convolutional networks of papers' code, against plain layers of PyTorch."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from metarun.algorithms.cavia import CAVIA
from metarun.algorithms.relation import RelationNet
from metarun.backbones.conv4 import Conv4
from metarun.backbones.conv4_joined import Conv4Joined
from metarun.errors import ConfigError
from metarun.inner_loops.sgd import SGD
from metarun.nn.layers import FiLM
from metarun.nn.per_task import TaskBatching, run_on_tasks

pytestmark = [pytest.mark.quick, pytest.mark.usefixtures("float64")]


def block(
    inputs: int, padding: int = 1, stride: int = 1, slope: float = 0.0, pooling: bool = False
) -> list[nn.Module]:
    """A block of 4 channels."""
    layers = [
        nn.Conv2d(inputs, 4, 3, stride, padding),
        nn.BatchNorm2d(4, track_running_stats=False),
        nn.LeakyReLU(slope),
    ]
    return [*layers, nn.MaxPool2d(2)] if pooling else layers


#: Settings of Conv4, the images, the network of the code, and its number of features for each channel.
OF_CODE = {
    "MAML++": (  # VGGReLUNormNetwork in AntreasAntoniou/HowToTrainYourMAMLPytorch
        {"slope": 0.01},
        (3, 28, 28),
        lambda: [layer for inputs in (3, 4, 4, 4) for layer in block(inputs, slope=0.01, pooling=True)],
        1,
    ),
    "Reptile": (  # OmniglotModel in openai/supervised-reptile; make_conv_network in aravindr93/imaml_dev
        {"downsample": "stride", "pool": False},
        (1, 28, 28),
        lambda: [layer for inputs in (1, 4, 4, 4) for layer in block(inputs, stride=2)],
        4,
    ),
    "relation networks": (  # CNNEncoder in floodsung/LearningToCompare_FSL
        {"halvings": 2, "padding": (0, 0, 1, 1)},
        (1, 28, 28),
        lambda: block(1, 0, pooling=True) + block(4, 0, pooling=True) + block(4) + block(4),
        25,
    ),
    "graph networks": (  # EmbeddingOmniglot in vgsatorras/few-shot-gnn, but for its last slope
        {"halvings": 2, "padding": (1, 1, 0, 0, 0), "slope": 0.1},
        (1, 28, 28),
        lambda: [
            *block(1, slope=0.1, pooling=True),
            *block(4, slope=0.1, pooling=True),
            *block(4, 0, slope=0.1),
            *block(4, 0, slope=0.1),
            *(nn.Flatten(), nn.Linear(4 * 9, 4), nn.BatchNorm1d(4, track_running_stats=False)),
            nn.LeakyReLU(0.1),
        ],
        1,
    ),
}


@pytest.mark.parametrize("name", OF_CODE)
def test_conv4_is_the_network_of_the_code(name: str):
    settings, shape, layers, features = OF_CODE[name]
    network, plain = Conv4(shape, width=4, **settings), nn.Sequential(*layers(), nn.Flatten())
    assert network.features == 4 * features
    assert math.prod(network.map_shape) == network.features
    for mine, own in zip(network.parameters(), plain.parameters(), strict=True):
        own.data.copy_(nn.init.normal_(mine, std=0.5).view_as(own))
    x = torch.randn(3, *shape)
    expected = plain(x)
    torch.testing.assert_close(network(x), expected)
    once = {n: p.detach().unsqueeze(0) for n, p in network.named_parameters()}
    torch.testing.assert_close(run_on_tasks(network, once, x[None], TaskBatching("grouped"))[0], expected)


def test_film_of_cavia_after_pooling():
    """As in `CondConvNet` of lmzintgraf/cavia; with negative scales, FiLM before pooling is not the same."""
    backbone = Conv4((1, 16, 16), width=4)
    convolutions = layers_of(backbone)
    algorithm = CAVIA(backbone, SGD(0.1, 1), 2, context=3, film="pooling")
    film = next(m for m in algorithm.modules() if isinstance(m, FiLM))
    nn.init.normal_(film.context)
    nn.init.normal_(film.bias, std=2)
    scale, shift = F.linear(film.context, film.weight, film.bias).chunk(2)
    assert (scale < 0).any()
    images = torch.randn(3, 1, 16, 16)
    x = images
    for i, (convolution, norm) in enumerate(convolutions):
        x = F.max_pool2d(norm(convolution(x)), 2)
        x = F.relu(x * scale[:, None, None] + shift[:, None, None] if i == 2 else x)
    torch.testing.assert_close(backbone(images), x.flatten(1))
    once = {n: p.detach().unsqueeze(0) for n, p in backbone.named_parameters()}
    torch.testing.assert_close(run_on_tasks(backbone, once, images[None])[0], x.flatten(1))


def test_a_relation_module_without_padding():
    """Maps of 19x19 of miniImageNet become 3x3, as in `RelationNetwork` of the code."""
    backbone = Conv4((3, 84, 84), width=2, halvings=2, padding=(0, 0, 1, 1))
    assert backbone.map_shape == (2, 19, 19)
    algorithm = RelationNet(backbone, width=2, padding=0).eval()
    linear = next(m for m in algorithm.relation if isinstance(m, nn.Linear))
    assert linear.in_features == 2 * 3 * 3
    classes, queries = torch.randn(1, 2, backbone.features), torch.randn(1, 3, backbone.features)
    pairs = [torch.cat([c.view(2, 19, 19), q.view(2, 19, 19)]) for q in queries[0] for c in classes[0]]
    expected = algorithm.relation(torch.stack(pairs)).view(1, 3, 2)
    torch.testing.assert_close(algorithm.score(classes, queries), expected)


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
        (lambda: Conv4((1, 28, 28), slope=-0.1), "backbone.slope=-0.1: must be at least 0"),
        (lambda: Conv4((1, 28, 28), padding=[]), "backbone.padding=[]: must be a number of at least 0"),
        (lambda: Conv4((1, 28, 28), padding=[1, -1]), "backbone.padding=[1, -1]: must be a number of"),
        (
            lambda: Conv4((1, 28, 28), padding=[1, 1]),
            "backbone.padding=[1, 1]: has a number for 2 blocks, and 4",
        ),
        (lambda: Conv4((1, 28, 28), halvings=5), "backbone.halvings=5: must be 0 to 4, the number of blocks"),
        (lambda: Conv4((1, 28, 28), padding=[0] * 4), "leaves nothing of images of 28x28 in block 4"),
        (lambda: RelationNet(Conv4((1, 16, 16)), padding=0), "algorithm.padding=0: leaves nothing of"),
        (
            lambda: CAVIA(Conv4((1, 16, 16), halvings=2), SGD(0.1, 1), 2, film="pooling"),
            "algorithm.film=pooling: there is no max pooling",
        ),
        (lambda: Conv4Joined((1, 12, 16)), "backbone=conv4_joined needs images of at least 16x16"),
    ],
)
def test_what_cannot_be_is_said_in_a_line(build, words: str):
    with pytest.raises(ConfigError) as error:
        build()
    assert words in str(error.value) and "\n" not in str(error.value)
