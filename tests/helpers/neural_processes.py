"""Neural processes: how they are built for a test, and their loss as a plain loop over tasks and points."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from metarun.algorithms.neural_process import NeuralProcess
from metarun.tasks.episodes import Episodes
from metarun.tasks.objectives import DISTRIBUTIONS

WIDTH, HEADS, SAMPLES = 6, 2, 3
#: The deterministic path and whether there is a latent one; the last is the NP of Kim et al. 2019.
PROCESSES = {"cnp": ("mean", False), "np": (None, True), "anp": ("attention", True), "both": ("mean", True)}


def built(name: str) -> NeuralProcess:
    path, latent = PROCESSES[name]
    algorithm = NeuralProcess((1,), 2, path, latent, WIDTH, HEADS, SAMPLES)
    with torch.no_grad():
        for p in algorithm.parameters():  # biases, too
            p += 0.1 * torch.randn_like(p)
    return algorithm


def functions(tasks: int = 3, shots: int = 4, queries: int = 2) -> Episodes:
    """Tasks with 2, 3, ... support points; the rest of the support is left out."""
    x, y = torch.randn(2, tasks, shots + queries, 1)
    counts = (2 + torch.arange(tasks)).clamp_max(shots).unsqueeze(1)
    weights = (torch.arange(shots) < counts) * shots / counts
    sizes = [shots, queries]
    (support_x, query_x), (support_y, query_y) = x.split(sizes, 1), y.split(sizes, 1)
    return Episodes(support_x, support_y, query_x, query_y, objective=DISTRIBUTIONS, support_weights=weights)


class Reference:
    """The loss of a neural process by the equations, from its weights by name."""

    def __init__(self, name: str, weights: dict[str, Tensor]) -> None:
        (self.path, self.latent), self.weights = PROCESSES[name], weights

    def loss(self, tasks: Episodes, noise: Tensor) -> Tensor:
        """The mean over tasks; z is made of `noise` [D] in each."""
        return sum(self.task_loss(tasks, t, noise) for t in range(len(tasks))) / len(tasks)

    def task_loss(self, tasks: Episodes, t: int, noise: Tensor) -> Tensor:
        there = [i for i, weight in enumerate(tasks.support_weights[t]) if weight > 0]
        context = [(tasks.support_x[t, i], tasks.support_y[t, i]) for i in there]
        x, y = ([*getattr(tasks, f"support_{n}")[t], *getattr(tasks, f"query_{n}")[t]] for n in "xy")
        targets = list(zip(x, y, strict=True))
        z, divergence = None, 0.0
        if self.latent:
            q, p = self.distribution(targets), self.distribution(context)
            z = q[0] + q[1] * noise
            divergence = torch.distributions.kl_divergence(*map(normal, (q, p))).sum()
        total = divergence
        for x, y in targets:
            total = total - normal(self.predicted(context, x, z)).log_prob(y).sum()
        return total / len(targets)

    def predicted(self, context, x: Tensor, z: Tensor | None) -> tuple[Tensor, Tensor]:
        """The mean and the standard deviation of y at x."""
        inputs = [x]
        if self.path:
            points = [self.layers("encoder", torch.cat(pair)) for pair in context]
            inputs.append(self.attended(points, context, x) if self.path == "attention" else mean(points))
        if z is not None:
            inputs.append(z)
        m, w = self.layers("decoder", torch.cat(inputs))
        return m, 0.1 + 0.9 * torch.log(1 + torch.exp(w))

    def attended(self, points, context, x: Tensor) -> Tensor:
        keys = [self.layers("attention.inputs", each) for each, _ in context]
        query, size = self.layers("attention.inputs", x), WIDTH // HEADS
        w = {name: self.weights[f"attention.{name}.weight"] for name in ("query", "key", "value", "out")}
        total = 0.0
        for head in range(HEADS):
            rows = slice(head * size, (head + 1) * size)
            q = w["query"][rows] @ query
            logits = torch.stack([q @ (w["key"][rows] @ k) / math.sqrt(size) for k in keys])
            shares = torch.exp(logits) / torch.exp(logits).sum()
            mixed = sum(share * (w["value"][rows] @ r) for share, r in zip(shares, points, strict=True))
            total = total + w["out"][:, rows] @ mixed
        return total

    def distribution(self, points) -> tuple[Tensor, Tensor]:
        """q(z | points)."""
        hidden = mean([self.layers("latent.points", torch.cat(pair)) for pair in points])
        hidden = self.linear("latent.hidden", hidden).clamp_min(0)
        return (
            self.linear("latent.mean", hidden),
            0.1 + 0.9 / (1 + torch.exp(-self.linear("latent.deviation", hidden))),
        )

    def layers(self, name: str, x: Tensor) -> Tensor:
        """Linear layers with rectifiers between them."""
        numbers = sorted(
            int(key.split(".")[-2])
            for key in self.weights
            if key.startswith(f"{name}.") and key.endswith("weight")
        )
        for i in numbers:
            x = self.linear(f"{name}.{i}", x if i == 0 else x.clamp_min(0))
        return x

    def linear(self, name: str, x: Tensor) -> Tensor:
        return self.weights[f"{name}.weight"] @ x + self.weights[f"{name}.bias"]


def mean(points: list[Tensor]) -> Tensor:
    return sum(points) / len(points)


def normal(parameters: tuple[Tensor, Tensor]) -> torch.distributions.Normal:
    return torch.distributions.Normal(*parameters)
