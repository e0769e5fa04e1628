"""`norm=batch_shift`: batch norm as in MAML's code, with a shift that is meta-learned and not adapted."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from helpers.methods import RATE, SHAPE, episodes_of, gradient, maml, relative_error, rename
from torch import Tensor, nn
from torch.func import functional_call

from metarun.backbones.conv4 import Conv4
from metarun.inference.network import NormBeside
from metarun.nn.layers import ShiftNorm, norm_layer, uses_batch_statistics

pytestmark = [pytest.mark.quick, pytest.mark.usefixtures("float64")]


def moved() -> Conv4:
    """A small network whose shifts are not those of the start."""
    network = Conv4(SHAPE, width=8, norm="batch_shift")
    for layer in network.modules():
        if isinstance(layer, ShiftNorm):
            nn.init.normal_(layer.shift.bias, std=0.3)
    return network


def by_formula(x: Tensor, shift: Tensor) -> Tensor:
    mean, square = x.mean((0, 2, 3)), x.square().mean((0, 2, 3))
    scale = 1 / (square - mean.square() + 1e-3).sqrt()
    return ((x.movedim(1, -1) - mean) * scale + shift).movedim(-1, 1)


def test_no_gain_a_shift_and_a_larger_epsilon():
    layer, x = norm_layer("batch_shift", 5), 0.1 * torch.randn(4, 5, 3, 3) + 2
    assert [name for name, _ in layer.named_parameters()] == ["shift.bias"]
    assert not layer.shift.bias.any() and uses_batch_statistics(layer)
    nn.init.normal_(layer.shift.bias)
    for mode in (True, False):
        torch.testing.assert_close(layer.train(mode)(x), by_formula(x, layer.shift.bias))
    beside = NormBeside(layer, [2])  # an exported model, each group by its own statistics
    both = torch.cat([x, 3 * x])
    torch.testing.assert_close(beside(both), torch.cat([layer(x), layer(3 * x)]))


@pytest.mark.parametrize("batching", ["grouped", "vmap"])
def test_mamls_gradient_is_that_of_a_plain_loop(batching: str):
    algorithm, episodes = maml()(moved(), 2), episodes_of()
    net = nn.Sequential(copy.deepcopy(algorithm.learner.backbone), copy.deepcopy(algorithm.learner.head))
    for block in net[0]:
        if isinstance(block, nn.Sequential):
            block[1] = Plain(block[1].shift.bias.detach())
    params = dict(net.named_parameters())
    adapted = [name for name in params if "shift" not in name]
    losses = []
    for t in range(len(episodes)):
        own = dict(params)
        for _ in range(2):
            loss = F.cross_entropy(functional_call(net, own, (episodes.support_x[t],)), episodes.support_y[t])
            grads = torch.autograd.grad(loss, [own[name] for name in adapted], create_graph=True)
            own |= {name: own[name] - RATE * g for name, g in zip(adapted, grads, strict=True)}
        losses.append(F.cross_entropy(functional_call(net, own, (episodes.query_x[t],)), episodes.query_y[t]))
    grads = torch.autograd.grad(torch.stack(losses).mean(), list(params.values()))
    expected = {name.replace("1.shift", "1.shift.bias"): g for name, g in zip(params, grads, strict=True)}
    expected = rename(expected, {"0": "learner.backbone", "1": "learner.head"})
    assert relative_error(gradient(algorithm, episodes, batching=batching), expected) < 1e-10


class Plain(nn.Module):
    def __init__(self, shift: Tensor) -> None:
        super().__init__()
        self.shift = nn.Parameter(shift)

    def forward(self, x: Tensor) -> Tensor:
        return by_formula(x, self.shift)
