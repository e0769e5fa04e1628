"""TaskNorm: normalisation by the support of a task (Bronskill, Gordon, Requeima, Nowozin and Turner 2020)."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal

import torch
from torch import Tensor, nn


class TaskNorm(nn.Module):
    """Normalise maps by a learned mixture of the moments of the support and those of each example alone.

    The moments of the support are one mean and one variance for each channel of a task (MetaBN, equation 6);
    those of an example are for each of its channels (TaskNorm-I) or for all of its channels together
    (TaskNorm-L), section 4.1. Their mixture is a distribution of two components with the weights `share` and
    1 - `share`, whose mean and variance normalise (equations 7 and 8). Queries are normalised by the
    support's moments and their own, so that no query depends on another one.

    `share` is sigmoid(scale * S + offset) for a support of S examples (equation 9), one pair of numbers for
    each layer, 0 at the start as in the paper's code. It is meta-learned and no task adapts it. Where the
    meta-gradient is one of the weights that tasks adapt alone (Reptile, iMAML), it stays 1/2.

    MetaBN is the support's moments alone, without a mixture.

    Departures: variances are divided by the number of values, as those of batch norm (the paper's code by
    one less, which is undefined for maps of one pixel). After steps of an inner loop, the support's moments
    are those of the adapted weights.

    Args:
        channels: C.
        alone: "instance": TaskNorm-I. "layer": TaskNorm-L. None: MetaBN.
        eps: added to variances.

    Attributes:
        support: how many of the first examples of a batch are the support; None: all. See `support_first`.
    """

    def __init__(self, channels: int, alone: Literal["instance", "layer"] | None, eps: float = 1e-5) -> None:
        super().__init__()
        self.num_features, self.alone, self.eps = channels, alone, eps
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))
        self.share = Share() if alone else None
        self.support: int | None = None

    @property
    def setting(self) -> str:
        """As it is chosen by `norm=`."""
        return {"instance": "task", "layer": "task_layer", None: "support"}[self.alone]

    def forward(self, x: Tensor) -> Tensor:
        """x [B, C, H, W], the support first."""
        own = {"weight": self.weight.unsqueeze(0), "bias": self.bias.unsqueeze(0)}
        return self.on_tasks(own, x, 1)

    def on_tasks(self, own: dict[str, Tensor], x: Tensor, tasks: int) -> Tensor:
        """x [B, T*C, H, W], the support of every task first, with weight and bias [T, C]."""
        maps = x.float() if x.dtype in (torch.bfloat16, torch.float16) else x
        variance, mean = torch.var_mean(maps, (2, 3), correction=0)  # [B, T*C]
        mean, variance = (moment.unflatten(1, (tasks, -1)) for moment in (mean, variance))  # [B, T, C]
        support = pooled(mean[: self.support], variance[: self.support], 0)
        if self.alone == "layer":
            mean, variance = pooled(mean, variance, 2)
        if self.share is None:
            mean, variance = support
        else:
            share = self.share(len(x) if self.support is None else self.support)
            mean, variance = mixed(share, support, (mean, variance))
        scale = own["weight"] * (variance + self.eps).rsqrt()
        shift = own["bias"] - mean * scale
        return (maps * at_pixels(scale) + at_pixels(shift)).to(x.dtype)


class Share(nn.Module):
    """The share of the support's moments, by the size of the support; the same for all tasks."""

    shared_by_tasks = True

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.zeros(()))
        self.offset = nn.Parameter(torch.zeros(()))

    def forward(self, size: int) -> Tensor:
        return (self.scale * size + self.offset).sigmoid()


def pooled(mean: Tensor, variance: Tensor, dim: int) -> tuple[Tensor, Tensor]:
    """Mean and variance of groups of equal size together, given those of each group along `dim`, kept."""
    whole = mean.mean(dim, keepdim=True)
    return whole, (variance + (mean - whole).square()).mean(dim, keepdim=True)


def mixed(share: Tensor, one: tuple[Tensor, Tensor], other: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """Mean and variance of a mixture of `one`, with the weight `share`, and `other` (equations 7 and 8)."""
    mean = share * one[0] + (1 - share) * other[0]
    within = [variance + (own - mean).square() for own, variance in (one, other)]
    return mean, share * within[0] + (1 - share) * within[1]


def at_pixels(numbers: Tensor) -> Tensor:
    """[B, T, C] or [1, T, C] as [B, T*C, 1, 1]."""
    return numbers.flatten(1)[..., None, None]


def task_norms(network: nn.Module) -> list[TaskNorm]:
    """The TaskNorm layers of a network."""
    return [layer for layer in network.modules() if isinstance(layer, TaskNorm)]


@contextmanager
def support_first(network: nn.Module, count: int) -> Iterator[None]:
    """A context in which the first `count` examples of every batch of the network are the support."""
    layers = task_norms(network)
    before = [layer.support for layer in layers]
    for layer in layers:
        layer.support = count
    try:
        yield
    finally:
        for layer, support in zip(layers, before, strict=True):
            layer.support = support
