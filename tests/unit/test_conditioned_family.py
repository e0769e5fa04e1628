"""Methods that make parts of a network for each task: their limits and schedules."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
from helpers.methods import METHODS, SHAPE, Smooth, episodes_of, gradient, leo, lgm_net, relative_error, tadam
from torch import nn

from metarun.algorithms.lgm_net import LGMNet
from metarun.algorithms.tadam import TADAM, probability
from metarun.backbones.conv4 import Conv4
from metarun.backbones.resnet12 import ResNet12
from metarun.nn.frozen import Frozen, frozen_part
from metarun.nn.layers import Residual

pytestmark = [pytest.mark.quick, pytest.mark.usefixtures("float64")]


def test_tadam_starts_as_prototypical_networks_with_a_scaled_distance():
    """With multipliers of 0 the task changes nothing; with others it does."""
    algorithm, episodes = tadam(Smooth(), 0).eval(), episodes_of()
    moved = algorithm.predict(algorithm.adapt(episodes), episodes.query_x)
    for condition in algorithm.conditions:
        nn.init.zeros_(condition.multipliers)
    found = algorithm.predict(algorithm.adapt(episodes), episodes.query_x)
    for t in range(3):
        support, query = algorithm.backbone(episodes.support_x[t]), algorithm.backbone(episodes.query_x[t])
        means = torch.stack([support[episodes.support_y[t] == k].mean(0) for k in range(3)])
        torch.testing.assert_close(found[t], -0.7 * torch.cdist(query, means))
    assert (moved - found).abs().max() > 1e-3


def test_tadams_auxiliary_task_becomes_rare():
    """0.9 at first, 20 factors of 0.9 at last; drawn by the iteration, and never without a decay."""
    assert probability(0, 1000) == 0.9 and probability(999, 1000) == pytest.approx(0.9**20)
    algorithm, drawn = tadam(Smooth(), 0), []
    algorithm.auxiliary = 2000
    for iteration in range(2000):
        assert not algorithm.on_step_start(iteration)
        drawn.append(algorithm.share.item())
    expected = sum(probability(i, 2000) for i in range(2000))
    assert sum(drawn) == pytest.approx(expected, rel=0.1) and sum(drawn[:200]) > 2 * sum(drawn[-200:])
    assert TADAM(Smooth()).classifier is None


@pytest.mark.parametrize("auxiliary", [0, 10])
def test_the_task_embedding_of_training_does_not_depend_on_queries(auxiliary: int):
    algorithm = TADAM(Conv4(SHAPE, width=4), classes=11, auxiliary=auxiliary)
    seen, episodes = [], episodes_of()
    algorithm.film_of = lambda support, tasks: (
        seen.append(support) or TADAM.film_of(algorithm, support, tasks)
    )
    for tasks in (episodes, replace(episodes, query_x=episodes.query_x**2)):
        algorithm.meta_loss(tasks)
    torch.testing.assert_close(*seen)


def test_tadam_conditions_every_convolution_but_those_of_shortcuts():
    backbone = ResNet12(SHAPE, widths=(4, 4, 4, 4), drop_rate=0.0)
    algorithm = TADAM(backbone)
    assert len(algorithm.modulations) == 12
    shortcuts = [block.shortcut for block in backbone.modules() if isinstance(block, Residual)]
    assert not any(layer in algorithm.modulations for each in shortcuts for layer in each.modules())
    assert METHODS["tadam"].equal_classes


def test_leos_samples_are_averaged_over_the_shots_of_a_class():
    """The gradient with two samples for each class, that of evaluation with one sample and no noise."""
    algorithm, episodes = leo(Smooth(), 0), episodes_of()
    fixed = torch.randn(1, 3, 2, 1)
    algorithm.noise = lambda like: fixed.expand_as(like)
    expected = METHODS["leo"].reference(algorithm, episodes, 0)
    assert relative_error(gradient(algorithm, episodes), expected) < 1e-10
    algorithm.noise = torch.zeros_like
    with torch.no_grad():
        sampled, means = (algorithm.train(mode).adapt(episodes) for mode in (True, False))
    torch.testing.assert_close(sampled, means)
    algorithm.dropout = 0.5
    assert not torch.equal(algorithm.train().adapt(episodes), algorithm.adapt(episodes))


def test_leo_keeps_its_backbone_and_its_features_are_computed_once():
    algorithm = leo(Smooth(), 0)
    assert not any(p.requires_grad for p in algorithm.own_backbone().parameters())
    assert isinstance(frozen_part(algorithm.own_backbone()), Frozen) and algorithm.frozen


def test_lgm_nets_context_is_sampled_once_for_each_layer():
    algorithm, episodes = lgm_net(Conv4(SHAPE, width=8, halvings=2), 0), episodes_of()
    numbers = torch.randn(2, 1, 2)
    given: list[torch.Tensor] = []

    def noise(like: torch.Tensor) -> torch.Tensor:
        given.append(numbers[len(given) % 2])
        return given[-1].expand_as(like)

    algorithm.noise = noise
    algorithm.fixed = numbers
    expected = METHODS["lgm_net"].reference(algorithm, episodes, 0)
    del algorithm.fixed
    assert relative_error(gradient(algorithm, episodes), expected) < 1e-10
    assert len(given) == 2  # all tasks at once


def test_lgm_nets_batch_norm_takes_the_statistics_of_all_tasks_in_training():
    """Intertask normalization: support and queries of all tasks are one batch, but not in evaluation."""
    algorithm, tasks = (
        LGMNet(Conv4(SHAPE, width=4, norm="running"), width=4, intertask=True).train(),
        episodes_of(),
    )
    other = copy.deepcopy(algorithm.backbone)
    together = other(torch.cat([tasks.support_x, tasks.query_x], 1).flatten(0, 1)).unflatten(0, (3, -1))
    support, query = algorithm.embed_episodes(tasks)
    torch.testing.assert_close(torch.cat([support, query], 1), together)
    for average, wanted in zip(algorithm.backbone.buffers(), other.buffers(), strict=True):
        torch.testing.assert_close(average, wanted)
    alone = LGMNet(other, width=4, intertask=False).eval()
    torch.testing.assert_close(algorithm.eval().embed(tasks.query_x), alone.embed(tasks.query_x))
    assert not torch.allclose(alone.train().embed_episodes(tasks)[0], support)
    assert algorithm.couples_tasks and not alone.couples_tasks
    assert not LGMNet(
        Conv4(SHAPE, width=4, norm="layer"), width=4, norm="layer", intertask=True
    ).couples_tasks


@pytest.mark.parametrize("norm", ["task", "task_layer", "support"])
def test_lgm_net_normalises_by_the_support_of_each_task_in_training(norm: str):
    backbone = Conv4(SHAPE, width=4, norm=norm)
    algorithm, tasks = LGMNet(backbone, width=4, norm=norm, intertask=True).train(), episodes_of()
    _, query = algorithm.embed_episodes(tasks)
    for t in range(len(tasks)):
        alone = tasks.map(lambda tensor, t=t: tensor[t : t + 1])
        torch.testing.assert_close(query[t : t + 1], algorithm.embed_episodes(alone)[1])


def test_lgm_nets_weights_are_made_of_the_support_and_of_length_one():
    algorithm, episodes = lgm_net(Conv4(SHAPE, width=8, halvings=2), 0).eval(), episodes_of()
    weights = algorithm.adapt(episodes)["weights"]
    assert {name: tuple(p.shape) for name, p in weights.items()} == {
        "0.weight": (3, 4, 8, 3, 3),
        "0.bias": (3, 4),
        "3.weight": (3, 4, 4, 3, 3),
        "3.bias": (3, 4),
    }
    lengths = weights["3.weight"].flatten(2).norm(dim=-1)
    torch.testing.assert_close(lengths, torch.ones_like(lengths))
    assert (weights["0.weight"][0] - weights["0.weight"][1]).abs().max() > 1e-6
    own = {name.split(".")[0] for name, _ in algorithm.named_parameters()}
    assert own == {"backbone", "context", "generators"}
