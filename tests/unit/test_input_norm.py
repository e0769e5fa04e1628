"""`normalise=`: images less the mean of each channel, by its deviation, inside the network."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from helpers.methods import METHODS, SHAPE, episodes_of, gradient, maml, relative_error
from torch import nn
from torch.func import functional_call

from metarun.backbones.cells import Cells
from metarun.backbones.conv4 import Conv4
from metarun.backbones.input_norm import InputNorm, moments, normalise_inputs
from metarun.backbones.resnet18 import ImageNetInput
from metarun.config.restore import start_from
from metarun.errors import ConfigError
from metarun.tasks.class_store import ClassStore
from metarun.tasks.spec import TaskSpec

pytestmark = [pytest.mark.quick, pytest.mark.usefixtures("float64")]
MEAN, DEVIATION = [0.3], [0.2]
GREY, RGB = TaskSpec(SHAPE), TaskSpec((3, 8, 8))


def with_layer(backbone: nn.Module) -> nn.Module:
    normalise_inputs(backbone, InputNorm(GREY, MEAN, DEVIATION))
    return backbone


@pytest.mark.parametrize(
    ("name", "how"),
    [
        *(("maml", how) for how in ("grouped", "vmap", "loop", "unfold")),
        *((name, "grouped") for name in ("cavia", "meta_networks", "protonet", "relation")),
        ("protonet", "unfold"),  # all tasks in one pass
    ],
)
def test_inside_the_network_is_outside_of_it(name: str, how: str):
    """The meta-gradient, and what is predicted, for all ways of running tasks at once."""
    network = Conv4(SHAPE, width=8)
    made = []
    for backbone in (copy.deepcopy(network), with_layer(network)):
        torch.manual_seed(1)
        made.append(METHODS[name].build(backbone, 2))
    plain, inside = made
    episodes = episodes_of()
    outside = episodes.map(lambda x: (x - MEAN[0]) / DEVIATION[0] if x.is_floating_point() else x)
    settings = {"batching": how, "channels_last": how == "grouped"}
    found, expected = gradient(inside, episodes, **settings), gradient(plain, outside, **settings)
    renamed = dict(zip(expected, found.values(), strict=True))
    assert relative_error(renamed, expected) < 1e-10
    assert relative_error(renamed, gradient(plain, episodes, **settings)) > 1e-4


def test_a_network_that_is_no_chain():
    """Its layers keep their names; a copy has a layer of its own, also where weights are given."""
    plain = Cells(SHAPE, width=2, cells=1, nodes=1, reductions=(0,), drop_path=0.0)
    inside = copy.deepcopy(with_layer(copy.deepcopy(plain)))
    x = torch.rand(4, *SHAPE)
    torch.testing.assert_close(inside(x), plain((x - MEAN[0]) / DEVIATION[0]))
    assert {name for name, _ in inside.named_parameters()} == {name for name, _ in plain.named_parameters()}
    inside.input_norm.mean.fill_(0.5)
    called = functional_call(inside, dict(plain.named_parameters()), (x,))
    torch.testing.assert_close(called, plain((x - 0.5) / DEVIATION[0]))


def test_the_numbers_are_those_of_all_training_pixels():
    images = torch.randint(0, 256, (1500, *RGB.item_shape), dtype=torch.uint8)  # more than one block
    images[:, 2] = 77
    store = ClassStore(images, [1500], ["a"], "toy train")
    pixels = images.numpy().transpose(1, 0, 2, 3).reshape(3, -1) / 255
    layer = InputNorm(RGB)
    layer.on_run_start(store)
    mean, deviation = moments(store)
    np.testing.assert_allclose(mean, pixels.mean(1), rtol=1e-6)
    np.testing.assert_allclose(deviation[:2], pixels.std(1)[:2], rtol=1e-6)
    assert deviation[2] == 1  # of a constant channel
    torch.testing.assert_close(layer.mean.flatten(), mean)
    fixed = InputNorm(RGB, [0.1, 0.2, 0.3], [1, 1, 1])
    fixed.on_run_start(store)
    assert fixed.mean.flatten().tolist() == [0.1, 0.2, 0.3]


@pytest.mark.parametrize("layered", [(True, True), (True, False), (False, True)])
def test_init_takes_the_numbers_of_the_run_or_says_that_inputs_differ(tmp_path, layered):
    source, target = (maml()(Conv4(SHAPE, width=8), 1) for _ in range(2))
    for algorithm, wanted, level in zip((source, target), layered, (0.1, 0.9), strict=True):
        if wanted:
            normalise_inputs(algorithm.own_backbone(), InputNorm(GREY, [level], DEVIATION))
    content = {"algorithm": source.state_dict(), "choices": {"algorithm": "maml", "dataset": "glyphs"}}
    if all(layered):
        start_from(target, tmp_path, content)
        assert target.own_backbone()[0].mean.item() == 0.1
    else:
        with pytest.raises(ConfigError, match="normalise="):
            start_from(target, tmp_path, content)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"mean": [0.5]}, "set both mean and deviation"),
        ({"mean": [0.5], "deviation": [0.5]}, "has 1 numbers, and images have 3 channels"),
        ({"mean": [0.5] * 3, "deviation": [0.5, 0.0, 1.0]}, "must be above 0"),
    ],
)
def test_numbers_that_cannot_be_used(settings: dict[str, list[float]], message: str):
    with pytest.raises(ConfigError, match=message):
        InputNorm(RGB, **settings)


def test_other_examples_and_networks_with_a_norm_of_their_own_are_refused():
    with pytest.raises(ConfigError, match="is for images, and this dataset has vectors"):
        InputNorm(TaskSpec((5,)), MEAN, DEVIATION)
    with pytest.raises(ConfigError, match="normalise=none"):
        with_layer(nn.Sequential(ImageNetInput()))
