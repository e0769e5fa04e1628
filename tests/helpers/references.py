"""Independent references: the algorithms as plain loops over tasks, written from the papers.

Nothing of metarun's learner, inner loops or algorithms is used: weights live in the modules
themselves, copied for each task.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from metarun.tasks.episodes import Episodes


def network(backbone: nn.Module, head: nn.Linear) -> nn.Sequential:
    return nn.Sequential(copy.deepcopy(backbone), copy.deepcopy(head))


def loss_of(outputs: Tensor, targets: Tensor) -> Tensor:
    return F.mse_loss(outputs, targets) if targets.is_floating_point() else F.cross_entropy(outputs, targets)


def support_loss_of(outputs: Tensor, targets: Tensor) -> Tensor:
    """With classes, the mean over classes of the mean loss of a class."""
    if targets.is_floating_point():
        return loss_of(outputs, targets)
    classes = targets.unique()
    return torch.stack([loss_of(outputs[targets == k], targets[targets == k]) for k in classes]).mean()


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
            outputs = functional_call(net, fast, (episodes.support_x[t],))
            support = support_loss_of(outputs, episodes.support_y[t])
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
            support_loss_of(own(x), y).backward()
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


# Inner loops of other kinds, one task and one weight at a time.

Weights = dict[str, Tensor]
Update = Callable[[Weights, Weights, Tensor, int], Weights]  # (weights, gradients, loss, step) -> weights


def unrolled_gradient(
    net: nn.Module,
    meta: Weights,
    episodes: Episodes,
    steps: int,
    update: Callable[[Weights], Update],
    order: int = 2,
    fast: Callable[[str], bool] = lambda name: True,
    at_step: Callable[[Weights, int], Weights] = lambda weights, step: weights,
    loss_weights: list[float] | None = None,
) -> Weights:
    """The gradient of the mean query loss with respect to the net's weights and `meta`.

    `update` gets the meta-parameters and gives one task's rule; `at_step` picks the weights of a
    step; `loss_weights` weigh the query losses after every step instead of the last alone.
    """
    theta = {name: p.detach().clone().requires_grad_(p.requires_grad) for name, p in net.named_parameters()}
    meta = {name: p.detach().clone().requires_grad_() for name, p in meta.items()}
    losses = []
    for t in range(len(episodes)):
        weights, rule = dict(theta), update(meta)

        def loss(weights: Weights, step: int, x: Tensor, y: Tensor, of=loss_of) -> Tensor:
            return of(functional_call(net, at_step(weights, step), (x,)), y)

        for step in range(steps):
            names = [name for name in weights if fast(name)]
            own = weights if order == 2 else {name: p.detach() for name, p in weights.items()}
            own = {n: p if p.requires_grad else p.clone().requires_grad_() for n, p in own.items()}
            support = loss(own, step, episodes.support_x[t], episodes.support_y[t], support_loss_of)
            grads = torch.autograd.grad(support, [own[n] for n in names], create_graph=order == 2)
            before = {name: weights[name] for name in names}
            weights |= rule(before, dict(zip(names, grads, strict=True)), support.detach(), step)
            if loss_weights:
                query = loss(weights, step, episodes.query_x[t], episodes.query_y[t])
                losses.append(loss_weights[step] * query)
        if not loss_weights:
            losses.append(loss(weights, max(steps - 1, 0), episodes.query_x[t], episodes.query_y[t]))
    everything = {name: p for name, p in (theta | meta).items() if p.requires_grad}
    grads = torch.autograd.grad(
        torch.stack(losses).sum() / len(episodes), list(everything.values()), materialize_grads=True
    )
    return dict(zip(everything, grads, strict=True))


def curved(gradient: Tensor, matrices: list[Tensor]) -> Tensor:
    """A gradient multiplied by one matrix in each of its dimensions, the kernel's two as one."""
    flat = gradient.reshape(*gradient.shape[:2], -1) if gradient.dim() == 4 else gradient
    for dim, matrix in enumerate(matrices):
        flat = torch.movedim(torch.tensordot(matrix, flat, dims=([1], [dim])), 0, dim)
    return flat.reshape(gradient.shape)


def seen(x: Tensor) -> list[Tensor]:
    """The two inputs that a number becomes (Andrychowicz et al., appendix A), number by number."""
    pairs = [
        (math.log(abs(v)) / 10, math.copysign(1.0, v))
        if abs(v) >= math.exp(-10)
        else (-1.0, math.exp(10) * v)
        for v in x.flatten().tolist()
    ]
    return list(torch.tensor(pairs, dtype=x.dtype).unbind(1))


def lstm_cell(x: Tensor, h: Tensor, c: Tensor, weights: list[Tensor]) -> tuple[Tensor, Tensor]:
    """One step of an LSTM (Hochreiter and Schmidhuber 1997), in torch's order of gates."""
    w_ih, w_hh, b_ih, b_hh = weights
    i, f, g, o = (x @ w_ih.T + b_ih + h @ w_hh.T + b_hh).chunk(4, 1)
    c = f.sigmoid() * c + i.sigmoid() * g.tanh()
    return o.sigmoid() * c.tanh(), c


def proximal_update(net: nn.Module, episodes: Episodes, rate: float, steps: int, strength: float) -> Weights:
    """theta - mean of phi, phi from gradient descent on the loss and the pull."""
    totals = {name: torch.zeros_like(p) for name, p in net.named_parameters()}
    for t in range(len(episodes)):
        own = proximal_end(net, episodes, t, rate, steps, strength, with_queries=True)
        for (name, theta), phi in zip(net.named_parameters(), own.parameters(), strict=True):
            totals[name] += (theta - phi).detach() / len(episodes)
    return totals


def proximal_end(
    net: nn.Module, episodes: Episodes, t: int, rate: float, steps: int, strength: float, with_queries: bool
) -> nn.Module:
    """A task's network after gradient descent on its loss + strength/2 ||phi - theta||^2."""
    own = copy.deepcopy(net)
    x, y = episodes.support_x[t], episodes.support_y[t]
    if with_queries:
        x, y = torch.cat([x, episodes.query_x[t]]), torch.cat([y, episodes.query_y[t]])
    optimizer = torch.optim.SGD(own.parameters(), lr=rate)
    for _ in range(steps):
        optimizer.zero_grad()
        pull = sum(
            (phi - theta.detach()).square().sum()
            for phi, theta in zip(own.parameters(), net.parameters(), strict=True)
        )
        (support_loss_of(own(x), y) + strength / 2 * pull).backward()
        optimizer.step()
    return own


def implicit_gradient(
    net: nn.Module, episodes: Episodes, rate: float, steps: int, strength: float, cg_steps: int
) -> Weights:
    """Rajeswaran et al., algorithms 1 and 2, with conjugate gradient as in a textbook."""
    total = 0.0
    for t in range(len(episodes)):
        own = proximal_end(net, episodes, t, rate, steps, strength, with_queries=False)
        phi = list(own.parameters())

        def flat(tensors) -> Tensor:
            return torch.cat([tensor.flatten() for tensor in tensors])

        support = support_loss_of(own(episodes.support_x[t]), episodes.support_y[t])
        gradient = flat(torch.autograd.grad(support, phi, create_graph=True))
        query = loss_of(own(episodes.query_x[t]), episodes.query_y[t])
        b = flat(torch.autograd.grad(query, phi))

        def times(vector: Tensor, gradient: Tensor = gradient, phi: list = phi) -> Tensor:
            return vector + flat(torch.autograd.grad(gradient @ vector, phi, retain_graph=True)) / strength

        x = torch.zeros_like(b)
        r = p = b
        for step in range(cg_steps):
            image = times(p)
            if p @ image <= 0:
                x = x if step else b
                break
            alpha = (r @ r) / (p @ image)
            x, new = x + alpha * p, r - alpha * image
            r, p = new, new + (new @ new) / (r @ r) * p
        total = total + x / len(episodes)
    sizes = [p.numel() for p in net.parameters()]
    parts = zip(net.named_parameters(), total.split(sizes), strict=True)
    return {name: part.view(p.shape) for (name, p), part in parts}
