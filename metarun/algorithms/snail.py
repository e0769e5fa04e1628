"""SNAIL: temporal convolutions and causal attention (Mishra, Rohaninejad, Chen and Abbeel 2018)."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from metarun.algorithms.feature_method import FeatureMethod, one_hot, require
from metarun.algorithms.sequences import order_of, reordered


class SNAIL(FeatureMethod):
    """A sequence model of the labelled support examples followed by one unlabelled query.

    The layers are Attention(64, 32), TC(128), Attention(256, 128), TC(128), Attention(512, 256) and a linear
    layer (appendix A), where TC is a stack of dense blocks of dilated causal convolutions (section 3).
    The loss is that of the last position (section 4.1).

    Every query is the end of its own sequence. The layers are causal, so activations of the support do not
    depend on the query and are computed once for all queries of a task.

    Args:
        backbone, outputs: passed by the builder; see `Algorithm`.
        longest: the number of support examples that the convolutions cover; attention has no such limit.
        width: scales the sizes of all layers; 1 in the paper.
        shuffles: whether the order of the support is random in training. In evaluation it is fixed, so that
            results are reproducible.
    """

    def __init__(
        self,
        backbone: nn.Module,
        outputs: int,
        longest: int = 25,
        width: float = 1.0,
        shuffles: bool = True,
    ) -> None:
        super().__init__(backbone, most_ways=outputs)
        require(longest >= 1, f"algorithm.longest={longest}: must be at least 1")
        self.shuffles = shuffles

        layers, size = snail_layers(self.features + outputs, width, longest)
        self.layers = nn.ModuleList(layers)
        self.last = nn.Linear(size, outputs)

    def fit(self, features: Tensor, targets: Tensor, ways: int) -> dict[str, Any]:
        """{"seen": the inputs of each layer for the support, [T, S, D] each, "ways": N}."""
        most = self.most_ways or ways
        sequence = torch.cat([features, one_hot(targets, most, features)], -1)
        sequence = reordered(sequence, order_of(sequence, self.shuffles and self.training))
        seen = []
        for layer in self.layers:
            seen.append(sequence)
            sequence = torch.cat([sequence, layer.along(sequence)], -1)  # type: ignore[operator]
        return {"seen": seen, "ways": ways}

    def score(self, adapted: dict[str, Any], features: Tensor) -> Tensor:
        unlabelled = features.new_zeros(*features.shape[:2], self.most_ways or 0)
        x = torch.cat([features, unlabelled], -1)
        for layer, before in zip(self.layers, adapted["seen"], strict=True):
            x = torch.cat([x, layer.after(before, x)], -1)  # type: ignore[operator]
        return self.last(x)[..., : adapted["ways"]]


def snail_layers(inputs: int, width: float, longest: int) -> tuple[list[Attention | Dense], int]:
    """The layers of appendix A without the last one, each of which adds its outputs to its inputs.

    Args:
        inputs: the size of an input.
        width, longest: see `SNAIL`.

    Returns:
        The layers, and the size of the inputs with the outputs of all layers.
    """

    def sized(size: int) -> int:
        return max(1, round(width * size))

    layers: list[Attention | Dense] = []
    size = inputs
    for keys, values, filters in ((64, 32, 128), (256, 128, 128), (512, 256, 0)):
        layers.append(Attention(size, sized(keys), sized(values)))
        size += sized(values)
        for i in range(math.ceil(math.log2(longest + 1)) if filters else 0):
            layers.append(Dense(size, sized(filters), dilation=2 ** (i + 1)))
            size += sized(filters)
    return layers, size


class Dense(nn.Module):
    """The new channels of a dense block: tanh times sigmoid of causal convolutions of size 2 (section 3)."""

    def __init__(self, inputs: int, filters: int, dilation: int) -> None:
        super().__init__()
        self.dilation = dilation
        # The two positions of the kernel are concatenated: `dilation` steps back, and the current position.
        self.content, self.gate = (nn.Linear(2 * inputs, filters) for _ in range(2))

    def along(self, x: Tensor) -> Tensor:
        """Outputs [T, S, filters] at every position of x [T, S, D]."""
        padded = F.pad(x, (0, 0, self.dilation, 0))
        return self.gated(padded[:, : x.shape[1]], x)

    def after(self, x: Tensor, last: Tensor) -> Tensor:
        """Outputs [T, B, filters] at the position after x [T, S, D], for B inputs `last` [T, B, D]."""
        position = x.shape[1] - self.dilation
        earlier = x[:, position : position + 1] if position >= 0 else torch.zeros_like(last[:, :1])
        return self.gated(earlier, last)

    def gated(self, earlier: Tensor, x: Tensor) -> Tensor:
        def convolved(layer: nn.Linear) -> Tensor:
            before, now = layer.weight.chunk(2, 1)
            return F.linear(earlier, before, layer.bias) + F.linear(x, now)

        return convolved(self.content).tanh() * convolved(self.gate).sigmoid()


class Attention(nn.Module):
    """The new channels of an attention block: causal self-attention (section 3)."""

    def __init__(self, inputs: int, keys: int, values: int) -> None:
        super().__init__()
        self.keys, self.queries, self.values = (nn.Linear(inputs, size) for size in (keys, keys, values))
        self.root = math.sqrt(keys)

    def along(self, x: Tensor) -> Tensor:
        """Outputs [T, S, values] at every position of x [T, S, D]."""
        logits = self.queries(x) @ self.keys(x).mT / self.root  # [T, S, S]
        later = torch.ones_like(logits[0], dtype=torch.bool).triu(1)
        return logits.masked_fill(later, -torch.inf).softmax(-1) @ self.values(x)

    def after(self, x: Tensor, last: Tensor) -> Tensor:
        """Outputs [T, B, values] at the position after x [T, S, D], for B inputs `last` [T, B, D]."""
        queries = self.queries(last)
        itself = (queries * self.keys(last)).sum(-1, keepdim=True)  # [T, B, 1]
        shares = (torch.cat([queries @ self.keys(x).mT, itself], -1) / self.root).softmax(-1)
        return shares[..., :-1] @ self.values(x) + shares[..., -1:] * self.values(last)
