"""Independent reference for OML: one example after another, by autograd alone."""

from __future__ import annotations

import copy

import torch
import torch.nn.functional as F
from torch import Tensor

from helpers.embedded_references import tasks_of
from metarun.algorithms.base import Algorithm
from metarun.tasks.episodes import Episodes


def learned_online(weight: Tensor, bias: Tensor, x: Tensor, y: Tensor, rate: float) -> tuple[Tensor, Tensor]:
    """The last layer after a step on each example."""
    for example, label in zip(x, y, strict=True):
        loss = F.cross_entropy((weight @ example + bias)[None], label[None])
        grads = torch.autograd.grad(loss, [weight, bias], create_graph=True)
        weight, bias = weight - rate * grads[0], bias - rate * grads[1]
    return weight, bias


def oml(algorithm: Algorithm, episodes: Episodes, steps: int) -> dict[str, Tensor]:
    """Two of three ways are learned online; the queries of all are classified among 11 classes."""
    net = copy.deepcopy(algorithm)
    total = torch.zeros(())
    for t, (x, y, query_x, query_y) in enumerate(tasks_of(episodes)):
        classes = episodes.classes[t]
        kept = torch.ones(11)
        for way in (0, 1):
            kept[classes[way]] = 0
        weight, bias = net.classifier.weight * kept[:, None], net.classifier.bias * kept
        features, online = net.backbone(x), y < 2
        labels = torch.stack([classes[way] for way in y])
        for _ in range(steps):
            weight, bias = learned_online(weight, bias, features[online], labels[online], rate=0.1)
        targets = torch.stack([classes[way] for way in query_y])
        outputs = net.backbone(query_x) @ weight.mT + bias
        total = total + F.cross_entropy(outputs, targets) / len(episodes)
    params = dict(net.named_parameters())
    return dict(zip(params, torch.autograd.grad(total, list(params.values())), strict=True))
