"""Matching networks (Vinyals, Blundell, Lillicrap, Kavukcuoglu and Wierstra 2016)."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from metarun.algorithms.feature_method import FeatureMethod, cosines, one_hot, require
from metarun.tasks.episodes import Episodes
from metarun.tasks.objectives import class_weights


class MatchingNet(FeatureMethod):
    """Classify a query by a weighted vote of the support examples.

    The weights are a softmax over scaled cosines (equation 1 and the attention of section 2.1.1). If classes
    have different numbers of shots, which the paper does not consider, the votes of a class are averaged
    instead of summed, so that a class with more shots is not preferred.

    In tasks of regression, which the paper does not have, a query gets the mean of the support's values with
    the same weights.

    Args:
        backbone: passed by the builder; see `Algorithm`.
        full_context: with True (section 2.1.2), a bidirectional LSTM encodes the support examples, in the
            order of their classes in the task, and each query attends to the support repeatedly
            (appendix A). False is the network without full context embeddings.
        reads: how often a query attends to the support, at least 1.
        scale: multiplies the cosines; 1 in the paper, with which no weight can be near 1 and little is
            learned.
    """

    unread: ClassVar = {"reads": "full_context=false"}
    needs_classes = False
    predicts_distributions = False

    def __init__(
        self,
        backbone: nn.Module,
        full_context: bool = False,
        reads: int = 5,
        scale: float = 1.0,
    ) -> None:
        super().__init__(backbone)
        require(reads >= 1, f"algorithm.reads={reads}: must be at least 1")
        require(scale > 0, f"algorithm.scale={scale}: must be above 0")
        self.reads, self.scale = reads, scale
        size = self.features
        self.support_context = (
            nn.LSTM(size, size, batch_first=True, bidirectional=True) if full_context else None
        )
        self.query_context = nn.LSTMCell(2 * size, size) if full_context else None

    def fit_tasks(self, tasks: Episodes, features: Tensor) -> dict[str, Any]:
        adapted = super().fit_tasks(tasks, features)
        return adapted if tasks.classes is not None else {**adapted, "there": tasks.there}

    def fit(self, features: Tensor, targets: Tensor, ways: int) -> dict[str, Any]:
        """The support embeddings [T, S, F], their one-hot classes [T, S, N] and the logarithms of their
        weights [T, S], which are zero if all classes have the same number of shots. In a regression, the
        support embeddings, their values [T, S, V], and which of them there are [T, S].
        """
        if self.support_context is not None:
            forward, backward = self.support_context(features)[0].chunk(2, -1)
            features = forward + backward + features
        if targets.is_floating_point():
            return {"support": features, "values": targets.to(features.dtype)}
        weights = class_weights(targets, ways).to(features.dtype).log()
        return {"support": features, "classes": one_hot(targets, ways, features), "log weights": weights}

    def score(self, adapted: dict[str, Any], features: Tensor) -> Tensor:
        """The logarithm of the summed attention of each class, [T, B, N], up to a constant for each query."""
        support = adapted["support"]
        if self.query_context is not None:
            features = self.read(support, features)
        logits = self.scale * cosines(features, support)  # [T, B, S]
        if "values" in adapted:
            logits = logits.masked_fill(~adapted["there"].unsqueeze(1), -torch.inf)
            return logits.softmax(-1) @ adapted["values"]
        classes, logits = adapted["classes"], logits + adapted["log weights"].unsqueeze(1)
        outside = (classes == 0).mT.unsqueeze(1)  # [T, 1, N, S]
        return logits.unsqueeze(2).masked_fill(outside, -torch.inf).logsumexp(-1)

    def read(self, support: Tensor, features: Tensor) -> Tensor:
        """Full context embeddings [T, B, F] of queries [T, B, F] (equations 3 to 6 of the appendix).

        In the paper, the read vector is concatenated with the hidden state; here it is concatenated with the
        input, which is equivalent.
        """
        assert self.query_context is not None
        query = features.flatten(0, 1)  # [T*B, F]
        hidden = cell = read = torch.zeros_like(query)
        for _ in range(self.reads):
            hidden, cell = self.query_context(torch.cat([query, read], 1), (hidden, cell))
            hidden = hidden + query
            attention = (hidden.view_as(features) @ support.mT).softmax(-1)  # [T, B, S]
            read = (attention @ support).flatten(0, 1)
        return hidden.view_as(features)
