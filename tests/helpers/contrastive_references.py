"""Independent references for contrastive losses: plain loops, written from the papers."""

from __future__ import annotations

import copy
import math

import torch
from torch import Tensor

from helpers.embedded_references import cosine, tasks_of
from metarun.algorithms.base import Algorithm
from metarun.tasks.episodes import Episodes


def supcon_loss(z: Tensor, labels: Tensor, temperature: float) -> Tensor:
    """Khosla et al. 2020, equation 2, example by example."""
    total = torch.zeros(())
    for i in range(len(z)):
        others = [a for a in range(len(z)) if a != i]
        below = sum(torch.exp(cosine(z[i], z[a]) / temperature) for a in others)
        positives = [p for p in others if labels[p] == labels[i]]
        for p in positives:
            above = torch.exp(cosine(z[i], z[p]) / temperature)
            total = total - torch.log(above / below) / len(positives) / len(z)
    return total


def nt_xent(first: Tensor, second: Tensor, temperature: float) -> Tensor:
    """Chen et al. 2020, algorithm 1: views 2k-1 and 2k of image k are next to each other."""
    views = [each for pair in zip(first, second, strict=True) for each in pair]
    count = len(views)

    def loss(i: int, j: int) -> Tensor:
        below = sum(math.e ** (cosine(views[i], views[k]) / temperature) for k in range(count) if k != i)
        return -torch.log(math.e ** (cosine(views[i], views[j]) / temperature) / below)

    return sum(loss(k, k + 1) + loss(k + 1, k) for k in range(0, count, 2)) / count  # type: ignore[return-value]


def contrastive(algorithm: Algorithm, episodes: Episodes, steps: int) -> dict[str, Tensor]:
    """Support and query are one batch, as in training."""
    net = copy.deepcopy(algorithm)
    total = torch.zeros(())
    for x, y, query_x, query_y in tasks_of(episodes):
        h = net.backbone(torch.cat([x, query_x]))
        first, _, last = net.projection
        hidden = (h @ first.weight.mT + first.bias).clamp(min=0)
        z = hidden @ last.weight.mT + last.bias
        total = total + supcon_loss(z, torch.cat([y, query_y]), net.temperature) / len(episodes)
    params = dict(net.named_parameters())
    grads = torch.autograd.grad(total, list(params.values()))
    return dict(zip(params, grads, strict=True))
