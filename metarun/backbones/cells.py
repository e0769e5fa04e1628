"""Networks of cells whose architecture is a set of weights (DARTS, Liu, Simonyan and Yang 2019; MetaNAS)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import combinations
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from metarun.errors import ConfigError, check_least
from metarun.nn.layers import convolution, require_images

ARCHITECTURE = "architecture"  # the module whose parameters weigh operations and inputs


class Cells(nn.Module):
    """A stack of cells in which every edge is a weighted sum of operations.

    The search space of MetaNAS (Elsken, Staffler, Metzen and Hutter 2020, section 4.2, and its code). A cell
    has two inputs, the outputs of the two cells before it, and `nodes` nodes. Node i sums its 2 + i inputs:

    - The edge from an input to a node is sum_o softmax(alpha)_o o(x) over the seven operations (DARTS,
      equation 2).
    - The node is sum_(a, b) softmax(beta)_(a, b) (x_a + x_b) over all pairs of its inputs (MetaNAS,
      section 3.3), so that one pair remains as the softmax becomes sharp.

    All normal cells share alpha and beta, and so do all reduction cells. The cell's output is the
    concatenation of its nodes. Weights up to `threshold` count as 0 (soft pruning). The operations that they
    weigh are still computed, because tasks that run at once may prune different ones.

    The weights alpha and beta are parameters like others, under the name `architecture`, so that every
    gradient-based method learns and adapts them; `algorithm=meta_nas` is the method of the paper.

    Args:
        item_shape: passed by the builder: [C, H, W].
        width: channels of a node in the first cell. The stem has three times as many.
        cells: the number of cells.
        nodes: the number of nodes of a cell.
        reductions: which cells, from 0, halve the map and double the channels.
        threshold: weights of operations and of pairs up to this value count as 0.
        drop_path: the share of examples for which an operation is left out in training.
    """

    def __init__(
        self,
        item_shape: tuple[int, ...],
        width: int = 28,
        cells: int = 4,
        nodes: int = 3,
        reductions: Sequence[int] = (1, 3),
        threshold: float = 0.01,
        drop_path: float = 0.2,
    ) -> None:
        super().__init__()
        check_least("backbone", 1, width=width, cells=cells, nodes=nodes)
        if not all(0 <= i < cells for i in reductions):
            raise ConfigError(
                f"backbone.reductions={list(reductions)}: must be numbers of cells, 0 to {cells - 1}"
            )
        for name, value in (("threshold", threshold), ("drop_path", drop_path)):
            if not 0 <= value < 1:
                raise ConfigError(f"backbone.{name}={value}: must be at least 0 and below 1")
        if width % 2:
            raise ConfigError(f"backbone.width={width}: must be even")
        channels, _, _ = require_images("cells", item_shape, least=2 ** (len(reductions) + 1))
        self.nodes, self.threshold = nodes, threshold
        self.architecture = nn.ParameterDict()
        for kind in sorted({"reduction" if i in reductions else "normal" for i in range(cells)}):
            for i in range(nodes):
                pairs = len(list(combinations(range(2 + i), 2)))
                self.architecture[f"{kind}_operations_{i}"] = small(2 + i, len(OPERATIONS))
                self.architecture[f"{kind}_inputs_{i}"] = small(pairs)
        self.stem = nn.Sequential(convolution(channels, 3 * width), norm(3 * width))
        before, last, halved = 3 * width, 3 * width, False
        self.cells = nn.ModuleList()
        for i in range(cells):
            halves = i in reductions
            width *= 2 if halves else 1
            self.cells.append(Cell((before, last), width, nodes, halved, halves, drop_path))
            before, last, halved = last, width * nodes, halves
        self.features = last

    def forward(self, x: Tensor) -> Tensor:
        """Features [B, features] of images [B, C, H, W]."""
        weights = {kind: self.weights(kind) for kind in ("normal", "reduction")}
        before = last = self.stem(x)
        for cell in self.cells:
            before, last = last, cell(before, last, *weights["reduction" if cell.halves else "normal"])
        return last.mean((2, 3))

    def weights(self, kind: str) -> tuple[list[Tensor], list[Tensor]]:
        """The weights of operations [2 + i, O] and of pairs of inputs [P] of each node of a kind of cell."""

        def normalised(part: str) -> list[Tensor]:
            found = (self.architecture.get(f"{kind}_{part}_{i}") for i in range(self.nodes))
            return [self.pruned(F.softmax(p, -1)) for p in found if p is not None]

        return normalised("operations"), normalised("inputs")

    def pruned(self, weights: Tensor) -> Tensor:
        """Weights with those up to the threshold set to 0."""
        return weights * (weights > self.threshold)


class Cell(nn.Module):
    """One cell (see `Cells`).

    Args:
        inputs: channels of the two inputs.
        width: channels of a node.
        nodes: the number of nodes.
        halved: whether the second input has half the height and width of the first one.
        halves: whether operations on the inputs have stride 2.
        drop_path: see `Cells`.
    """

    def __init__(
        self, inputs: tuple[int, int], width: int, nodes: int, halved: bool, halves: bool, drop_path: float
    ) -> None:
        super().__init__()
        self.halves, self.drop_path = halves, drop_path
        self.first = HalvedMap(inputs[0], width) if halved else pointwise(inputs[0], width)
        self.second = pointwise(inputs[1], width)
        self.edges = nn.ModuleList(
            nn.ModuleList(edge(width, stride=2 if halves and j < 2 else 1) for j in range(2 + i))
            for i in range(nodes)
        )

    def forward(
        self, before: Tensor, last: Tensor, operations: Sequence[Tensor], inputs: Sequence[Tensor]
    ) -> Tensor:
        """The nodes' maps [B, nodes * width, H, W].

        Args:
            before, last: the outputs of the two cells before.
            operations, inputs: see `Cells.weights`.
        """
        states = [self.first(before), self.second(last)]
        for node, of_operations, of_pairs in zip(self.edges, operations, inputs, strict=True):
            edges = cast(nn.ModuleList, node)
            # The sum over pairs of p_ab (x_a + x_b) counts each input with the weights of its pairs.
            pairs = combinations(range(len(states)), 2)
            share = [torch.zeros_like(of_pairs[0]) for _ in states]
            for weight, (a, b) in zip(of_pairs, pairs, strict=True):
                share[a], share[b] = share[a] + weight, share[b] + weight
            mixed = [
                part * self.mix(cast(nn.ModuleList, edge), state, weights)
                for part, edge, state, weights in zip(share, edges, states, of_operations, strict=True)
            ]
            states.append(sum_of(mixed))
        return torch.cat(states[2:], 1)

    def mix(self, operations: nn.ModuleList, x: Tensor, weights: Tensor) -> Tensor:
        """The weighted sum of the operations."""
        return sum_of([w * self.dropped(o, x) for w, o in zip(weights, operations, strict=True)])

    def dropped(self, operation: nn.Module, x: Tensor) -> Tensor:
        """An operation's output, left out at random for examples [B] in training."""
        y = operation(x)
        if isinstance(operation, nn.Identity) or not self.training or not self.drop_path:
            return y
        return y * F.dropout(y.new_ones(len(y), 1, 1, 1), self.drop_path)


def sum_of(tensors: Sequence[Tensor]) -> Tensor:
    """The sum of tensors of one shape."""
    total = tensors[0]
    for each in tensors[1:]:
        total = total + each
    return total


def small(*shape: int) -> nn.Parameter:
    """Initial weights of an architecture: nearly equal."""
    return nn.Parameter(1e-3 * torch.randn(shape))


def norm(channels: int) -> nn.Module:
    """Batch norm by the current batch, without weights, whose scale an operation's weight could undo."""
    return nn.BatchNorm2d(channels, affine=False, track_running_stats=False)


def edge(width: int, stride: int) -> nn.ModuleList:
    """The operations of an edge."""
    return nn.ModuleList(build(width, stride) for build in OPERATIONS.values())


def pointwise(inputs: int, outputs: int) -> nn.Sequential:
    """A 1x1 convolution after ReLU."""
    return nn.Sequential(nn.ReLU(), convolution(inputs, outputs, kernel=1), norm(outputs))


def pooling(layer: nn.Module, width: int) -> nn.Sequential:
    return nn.Sequential(layer, norm(width))


def skip(width: int, stride: int) -> nn.Module:
    return nn.Identity() if stride == 1 else HalvedMap(width, width)


def factorised(width: int, stride: int, size: int = 5) -> nn.Sequential:
    """A convolution of one row, then one of one column."""
    row = nn.Conv2d(width, width, (1, size), stride, (0, size // 2), bias=False)
    column = nn.Conv2d(width, width, (size, 1), 1, (size // 2, 0), bias=False)
    return nn.Sequential(nn.ReLU(), row, column, norm(width))


def separable(width: int, stride: int, dilation: int = 1) -> nn.Sequential:
    """A 3x3 convolution of each channel, then a 1x1 convolution of all."""
    each = nn.Conv2d(width, width, 3, stride, dilation, dilation, groups=width, bias=False)
    return nn.Sequential(nn.ReLU(), each, convolution(width, width, kernel=1), norm(width))


#: (channels, stride) -> a layer; the operations of MetaNAS's code, without "none".
OPERATIONS: dict[str, Callable[[int, int], nn.Module]] = {
    "max_pool_3x3": lambda width, stride: pooling(nn.MaxPool2d(3, stride, 1), width),
    "avg_pool_3x3": lambda width, stride: pooling(nn.AvgPool2d(3, stride, 1, count_include_pad=False), width),
    "skip": skip,
    "conv_1x5_5x1": factorised,
    "conv_3x3": separable,
    "sep_conv_3x3": lambda width, stride: nn.Sequential(separable(width, stride), separable(width, 1)),
    "dil_conv_3x3": lambda width, stride: separable(width, stride, dilation=2),
}


class HalvedMap(nn.Module):
    """A map of half the height and width (FactorizedReduce of DARTS).

    Two 1x1 convolutions of stride 2, the second one shifted by a pixel, give half of the channels each. A
    map of odd size is not shifted, as in MetaNAS's code.
    """

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.even = convolution(inputs, outputs // 2, kernel=1, stride=2)
        self.odd = convolution(inputs, outputs // 2, kernel=1, stride=2)
        self.norm = norm(outputs)

    def forward(self, x: Tensor) -> Tensor:
        """x [B, C, H, W]."""
        x = F.relu(x)
        rows, columns = (1 if size % 2 == 0 else 0 for size in x.shape[2:])
        return self.norm(torch.cat([self.even(x), self.odd(x[:, :, rows:, columns:])], 1))
