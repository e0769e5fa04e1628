"""Networks of cells and MetaNAS (`metarun.backbones.cells`, `metarun.algorithms.meta_nas`)."""

from __future__ import annotations

import copy

import pytest
import torch
from helpers.methods import SHAPE, episodes_of, gradient, relative_error
from helpers.search_references import features

from metarun.algorithms.meta_nas import MetaNAS
from metarun.algorithms.reptile import Reptile
from metarun.backbones.cells import Cells
from metarun.backbones.mlp import MLP
from metarun.errors import ConfigError
from metarun.inner_loops.adam import Adam
from metarun.inner_loops.architecture_adam import ArchitectureAdam

pytestmark = pytest.mark.usefixtures("float64")


def cells(**settings) -> Cells:
    return Cells(
        SHAPE, **{"width": 2, "cells": 2, "nodes": 2, "reductions": (1,), "drop_path": 0.0, **settings}
    )


def test_the_features_are_those_of_a_plain_loop_over_operations_and_pairs():
    net = cells(cells=3, reductions=(0, 1), threshold=0.2)  # also a cell after a reduction
    with torch.no_grad():
        for p in net.architecture.values():
            p.normal_()
    x = torch.rand(4, *SHAPE)
    expected = features(net, x, temperature=1.0)
    assert expected.shape == (4, net.features)
    assert expected.abs().max() > 1e-3  # not all is pruned
    torch.testing.assert_close(net(x), expected)


@pytest.mark.parametrize("side", [8, 10, 15, 28])
def test_maps_of_any_size_are_halved(side: int):
    net = Cells((1, side, side), width=2, cells=3, nodes=2, reductions=(0, 1), drop_path=0.0)
    assert net(torch.rand(2, 1, side, side)).shape == (2, net.features)


def test_an_operation_is_left_out_for_some_examples_in_training_alone():
    net, x = cells(cells=1, reductions=(), drop_path=0.5), torch.rand(64, *SHAPE)
    torch.testing.assert_close(net.eval()(x), net(x))
    assert not torch.allclose(net.train()(x), net(x))


def test_at_a_constant_temperature_and_one_rate_it_is_reptile():
    """A network with an architecture that is learned like other weights."""
    net, tasks = cells(cells=1, nodes=1, reductions=()), episodes_of()
    settings = {"temperature": 1.0, "last_temperature": 1.0, "test_share": 1.0, "architecture_lr": 1.0}
    searched = MetaNAS(net, ArchitectureAdam(0.01, 0.01, 2), outputs=3, **settings)
    plain = Reptile(net, Adam(0.01, 2), outputs=3, batch=0)
    plain.learner.head = searched.learner.head
    assert relative_error(gradient(searched, tasks), gradient(plain, tasks)) < 1e-12


def test_the_architecture_waits_for_the_warm_up_and_stays_in_the_second_half_of_a_test():
    tasks = episodes_of()
    method = MetaNAS(cells(), ArchitectureAdam(0.01, 0.02, 2, test_steps=4), outputs=3, warm_up=5)
    names = [name for name in method.learner.own_parameters() if method.is_architecture(name)]
    assert not method.on_step_start(4)
    moved = method.adapt(tasks)["params"]
    assert all((moved[name] == method.learner.get_parameter(name)).all() for name in names)
    assert not torch.equal(moved["backbone.stem.0.weight"][0], method.learner.backbone.stem[0].weight)
    before = copy.deepcopy(method.eval()).adapt(tasks)["params"]  # a checkpoint of the warm-up
    assert all((before[name] == method.learner.get_parameter(name)).all() for name in names)
    assert method.temperature_at(4) == 1.0
    assert method.train().on_step_start(5)  # the graph changes
    twin = MetaNAS(cells(), ArchitectureAdam(0.01, 0.02, 2, test_steps=4), outputs=3, warm_up=5)
    twin.load_state_dict(method.state_dict())
    assert twin.searches
    assert [method.temperature_at(step) for step in range(3)] == pytest.approx([1.0, 0.05, 0.05])
    states = [state["params"] for state in method.eval().trajectory(tasks)]
    last = method.adapt(tasks)["params"]
    for name in names:  # the states have the logits of their temperatures, relative to the last one
        torch.testing.assert_close(states[2][name], last[name])
        torch.testing.assert_close(states[4][name], states[2][name])
        assert not torch.allclose(states[1][name] * 0.05, states[2][name])


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: cells(reductions=(2,)), "backbone.reductions=[2]: must be numbers of cells, 0 to 1"),
        (lambda: cells(width=3), "backbone.width=3: must be even"),
        (lambda: cells(drop_path=1.0), "backbone.drop_path=1.0: must be at least 0 and below 1"),
        (lambda: nas(MLP(SHAPE, hidden=(4,))), "algorithm=meta_nas: the backbone has no architecture"),
        (lambda: nas(cells(), last_temperature=0.0), "algorithm.last_temperature=0.0: must be above 0"),
        (lambda: nas(cells(), test_share=1.5), "algorithm.test_share=1.5: must be between 0 and 1"),
        (lambda: nas(cells(), warm_up=-1), "algorithm.warm_up=-1: must be at least 0"),
        (
            lambda: MetaNAS(cells(), ArchitectureAdam(steps=1, beta1=0.9), outputs=3),
            "inner_loop.beta1=0.9: momentum would move the architecture",
        ),
    ],
)
def test_impossible_settings_are_refused(build, message: str):
    with pytest.raises(ConfigError) as error:
        build()
    assert message in str(error.value)


def nas(backbone: torch.nn.Module, **settings) -> MetaNAS:
    return MetaNAS(backbone, ArchitectureAdam(steps=1), outputs=3, **settings)
