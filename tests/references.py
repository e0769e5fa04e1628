"""Independent references: the algorithms as plain loops over tasks, written from the papers.

Nothing of metarun's learner, inner loops or algorithms is used: weights live in the modules
themselves, copied for each task.
"""

from __future__ import annotations

import copy

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from metarun.episodes import Episodes


def network(backbone: nn.Module, head: nn.Linear) -> nn.Sequential:
    return nn.Sequential(copy.deepcopy(backbone), copy.deepcopy(head))


def loss_of(outputs: Tensor, targets: Tensor) -> Tensor:
    return F.mse_loss(outputs, targets) if targets.is_floating_point() else F.cross_entropy(outputs, targets)


def maml_loss(
    net: nn.Module,
    params: dict[str, Tensor],
    episodes: Episodes,
    rate: float,
    steps: int,
    order: int,
    head_only: bool,
) -> Tensor:
    """Mean over tasks of the query loss after `steps` of gradient descent (Finn et al., algorithm 2)."""
    losses = []
    for t in range(len(episodes)):
        fast = dict(params)
        for _ in range(steps):
            support = loss_of(functional_call(net, fast, (episodes.support_x[t],)), episodes.support_y[t])
            names = [name for name in fast if name.startswith("1.") or not head_only]
            grads = torch.autograd.grad(support, [fast[name] for name in names], create_graph=order == 2)
            for name, grad in zip(names, grads, strict=True):
                fast[name] = fast[name] - rate * grad
        losses.append(loss_of(functional_call(net, fast, (episodes.query_x[t],)), episodes.query_y[t]))
    return torch.stack(losses).mean()


def maml_gradient(net: nn.Module, episodes: Episodes, **settings) -> tuple[float, dict[str, Tensor]]:
    params = {name: p.detach().clone().requires_grad_() for name, p in net.named_parameters()}
    loss = maml_loss(net, params, episodes, **settings)
    grads = torch.autograd.grad(loss, list(params.values()))
    return loss.item(), dict(zip(params, grads, strict=True))


def reptile_update(
    net: nn.Module, episodes: Episodes, optimizer: type[torch.optim.Optimizer], steps: int, **settings
) -> dict[str, Tensor]:
    """theta - mean of phi: the negative of algorithm 2's direction, by torch's own optimizer."""
    totals = {name: torch.zeros_like(p) for name, p in net.named_parameters()}
    for t in range(len(episodes)):
        own = copy.deepcopy(net)
        inner = optimizer(own.parameters(), **settings)
        x = torch.cat([episodes.support_x[t], episodes.query_x[t]])
        y = torch.cat([episodes.support_y[t], episodes.query_y[t]])
        for _ in range(steps):
            inner.zero_grad()
            loss_of(own(x), y).backward()
            inner.step()
        for (name, theta), phi in zip(net.named_parameters(), own.parameters(), strict=True):
            totals[name] += (theta - phi).detach() / len(episodes)
    return totals


def protonet_loss(net: nn.Module, episodes: Episodes, together: bool) -> Tensor:
    """Snell et al., algorithm 1, one class and one query at a time.

    `together`: support and query share one pass, and so batch norm's statistics in training.
    """
    losses = []
    for t in range(len(episodes)):
        shots = len(episodes.support_x[t])
        if together:
            features = net(torch.cat([episodes.support_x[t], episodes.query_x[t]]))
            support, queries = features[:shots], features[shots:]
        else:
            support, queries = net(episodes.support_x[t]), net(episodes.query_x[t])
        centres = [support[episodes.support_y[t] == k].mean(0) for k in range(episodes.ways)]
        total = 0.0
        for query, label in zip(queries, episodes.query_y[t], strict=True):
            distances = torch.stack([(query - centre).pow(2).sum() for centre in centres])
            total = total + distances[label] + torch.logsumexp(-distances, 0)
        losses.append(total / len(queries))
    return torch.stack(losses).mean()
