"""Few-shot learning with graph neural networks (Garcia and Bruna 2018)."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from metarun.algorithms.feature_method import FeatureMethod, one_hot, require
from metarun.nn.layers import Norm, norm_layer, without_support


class GNN(FeatureMethod):
    """A graph neural network over the support examples and one query propagates labels to the query.

    A node is initialised with the features and the one-hot label of an example; the label of the query is
    uniform over the ways (section 4.1). Every block computes edge weights from the absolute differences of
    the nodes (equations 2 and 3) and passes messages along the edges (equations 1 and 4). Each graph has one
    query, so that predictions do not depend on other queries.

    Differences are symmetric, those of a node to itself are never used, and the last block needs only the
    edges of the query; only the pairs that are needed are computed. Therefore statistics of the normalisation
    in the edge networks count each of these pairs once (in the paper's code all pairs, also unused ones).

    Args:
        backbone, outputs: passed by the builder; see `Algorithm`.
        layers: the number of blocks before the last one.
        width: the size of the first layers of the edge networks; each block appends width / 2 features to
            the nodes, as in the paper's code.
        norm: the normalisation in the graph networks. The paper uses batch norm over a whole meta-batch; over
            one task, as here, its running averages fit no single task well. "layer" normalises each graph
            separately. Graphs have no support: "task" is instance norm here, "task_layer" and "support" are
            layer norm.
    """

    def __init__(
        self,
        backbone: nn.Module,
        outputs: int,
        layers: int = 2,
        width: int = 96,
        norm: Norm = "layer",
    ) -> None:
        super().__init__(backbone, most_ways=outputs)
        require(layers >= 0, f"algorithm.layers={layers}: must not be negative")
        require(width >= 2, f"algorithm.width={width}: must be at least 2")
        self.graph = GraphNetwork(self.features + outputs, outputs, layers, width, without_support(norm))

    def fit(self, features: Tensor, targets: Tensor, ways: int) -> dict[str, Any]:
        """{"nodes": support nodes [T, S, F + N], "unknown": the label of a query [N], "ways": N}."""
        most = self.most_ways or ways
        labels = one_hot(targets, most, features)
        known = torch.arange(most, device=features.device) < ways
        return {
            "nodes": torch.cat([features, labels], -1),
            "unknown": known.to(features.dtype) / ways,
            "ways": ways,
        }

    def score(self, adapted: dict[str, Any], features: Tensor) -> Tensor:
        shape = *features.shape[:2], -1, -1  # [T, B, V, F + N]
        unknown = adapted["unknown"].to(features.dtype).expand(*features.shape[:2], -1)
        queries = torch.cat([features, unknown], -1).unsqueeze(2)
        support = adapted["nodes"].unsqueeze(1).expand(shape)
        nodes = torch.cat([queries, support], 2)
        return self.by_task(self.graph, nodes)[..., : adapted["ways"]]


class GraphNetwork(nn.Module):
    """Maps graphs of nodes [B, V, D] to the logits of their first node, [B, N]."""

    def __init__(self, size: int, outputs: int, layers: int, width: int, norm: Norm) -> None:
        super().__init__()
        added = width // 2
        sizes = [size + i * added for i in range(layers + 1)]
        self.adjacencies = nn.ModuleList(Adjacency(size, width, norm) for size in sizes)
        self.messages = nn.ModuleList(nn.Linear(2 * size, added) for size in sizes[:-1])
        self.norms = nn.ModuleList(norm_layer(norm, added) for _ in sizes[:-1])
        self.last = nn.Linear(2 * sizes[-1], outputs)

    def forward(self, nodes: Tensor) -> Tensor:
        for adjacency, message, norm in zip(self.adjacencies, self.messages, self.norms, strict=False):
            passed = message(torch.cat([nodes, adjacency(nodes) @ nodes], -1))  # [B, V, added]
            passed = norm(passed.mT.unsqueeze(-1)).squeeze(-1).mT
            nodes = torch.cat([nodes, F.leaky_relu(passed)], -1)
        last: Adjacency = self.adjacencies[-1]  # type: ignore[assignment]
        first, others = nodes[:, :1], nodes[:, 1:]
        received = last.to_first(first, others) @ others
        return self.last(torch.cat([first, received], -1).squeeze(1))


class Adjacency(nn.Module):
    """The edge weights of a graph (equations 2 and 3).

    A network maps the absolute difference of two nodes to a logit, which is the same for (i, j) and (j, i);
    the weights are a softmax over the other nodes.
    """

    def __init__(self, size: int, width: int, norm: Norm) -> None:
        super().__init__()
        sizes = [size, 2 * width, 2 * width, width, width]
        layers: list[nn.Module] = []
        for inputs, outputs in pairwise(sizes):
            layers += [nn.Conv2d(inputs, outputs, 1), norm_layer(norm, outputs), nn.LeakyReLU()]
        self.network = nn.Sequential(*layers, nn.Conv2d(width, 1, 1))

    def forward(self, nodes: Tensor) -> Tensor:
        """The weight of each node for each node, [B, V, V], from nodes [B, V, D]."""
        graphs, size = nodes.shape[:2]
        i, j = torch.triu_indices(size, size, 1, device=nodes.device)
        weights = self.weights(nodes[:, i] - nodes[:, j])
        both = weights.new_full((graphs, size, size), -torch.inf)  # the diagonal keeps -inf
        both[:, i, j] = weights
        both[:, j, i] = weights
        return both.softmax(-1)

    def to_first(self, first: Tensor, others: Tensor) -> Tensor:
        """The weights [B, 1, V - 1] of the other nodes [B, V - 1, D] for the first node [B, 1, D]."""
        return self.weights(first - others).softmax(-1).unsqueeze(1)

    def weights(self, differences: Tensor) -> Tensor:
        """A logit for each pair, [B, P], from differences [B, P, D]."""
        return self.network(differences.abs().mT.unsqueeze(-1)).flatten(1)
