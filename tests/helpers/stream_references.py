"""Independent reference for follow the meta leader: one task after another, by autograd alone."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def fine_tuned(net: nn.Module, weights: dict[str, Tensor], x: Tensor, y: Tensor, rate: float, steps: int):
    """The weights after gradient descent on all examples."""
    for _ in range(steps):
        loss = F.cross_entropy(torch.func.functional_call(net, weights, (x,)), y)
        grads = torch.autograd.grad(loss, list(weights.values()), create_graph=True)
        weights = {name: w - rate * g for (name, w), g in zip(weights.items(), grads, strict=True)}
    return weights


def meta_update(net: nn.Module, optimizer, minibatches, rate: float, steps: int) -> None:
    """A step on the mean over tasks of the loss after gradient descent; with 0 steps, of the loss on all."""
    total = torch.zeros(())
    for x, y, query_x, query_y in minibatches:
        own = fine_tuned(net, dict(net.named_parameters()), x, y, rate, steps)
        if not steps:
            query_x, query_y = torch.cat([x, query_x]), torch.cat([y, query_y])
        total = total + F.cross_entropy(torch.func.functional_call(net, own, (query_x,)), query_y)
    optimizer.zero_grad()
    (total / len(minibatches)).backward()
    optimizer.step()
