"""Base class of methods with a shared backbone that tasks do not adapt: they learn from its features."""

from __future__ import annotations

from abc import abstractmethod
from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from metarun.algorithms.base import Adapted, Algorithm
from metarun.errors import ConfigError
from metarun.nn.layers import uses_batch_statistics
from metarun.nn.per_task import AUTO
from metarun.nn.shared_weights import run_shared, runs_at_once
from metarun.tasks.episodes import Episodes, Outcome

QUERIES_AT_ONCE = 75  # of a task, in evaluation


class FeatureMethod(Algorithm):
    """A backbone embeds examples; a method says what it makes of a task's features.

    With running averages (norm=running) a task's support and query pass the backbone together
    in training, and evaluation does not use query statistics. With norm=batch they pass apart,
    as they do in evaluation. In training each task has its own batch statistics.
    """

    needs = Episodes
    needs_classes = True

    def __init__(self, backbone: nn.Module, most_ways: int | None = None) -> None:
        super().__init__()
        self.backbone = backbone
        self.most_ways = most_ways  # where the network's size says how many; fewer use the first ones
        self.batching = AUTO

    def own_backbone(self) -> nn.Module:
        return self.backbone

    def check(self, ways: int) -> None:
        if self.most_ways is not None and ways > self.most_ways:
            raise ConfigError(f"its network has {self.most_ways} ways, not {ways}; train with ways={ways}")

    @abstractmethod
    def fit(self, features: Tensor, targets: Tensor, ways: int) -> Adapted:
        """Learn T tasks from support features [T, S, F] and targets [T, S]."""

    @abstractmethod
    def score(self, adapted: Adapted, features: Tensor) -> Tensor:
        """Logits [T, B, N] of query features [T, B, F]."""

    @property
    def features(self) -> int:
        """F, numbers the backbone makes of an example."""
        return self.backbone.features  # type: ignore[return-value]

    @cached_property
    def uses_query_statistics(self) -> bool:  # type: ignore[override]
        return uses_batch_statistics(self)

    def adapt(self, tasks: Episodes) -> Adapted:
        self.check(tasks.ways)
        return self.fit(self.embed(tasks.support_x), tasks.support_y, tasks.ways)

    def predict(self, adapted: Adapted, query_x: Tensor) -> Tensor:
        if self.training or self.uses_query_statistics:
            return self.score(adapted, self.embed(query_x))
        # Graphs and pairs of hundreds of queries at once would need gigabytes.
        parts = query_x.split(QUERIES_AT_ONCE, 1)
        return torch.cat([self.score(adapted, self.embed(part)) for part in parts], 1)

    def meta_loss(self, tasks: Episodes) -> Outcome:
        support, query = self.embed_episodes(tasks)
        logits = self.score(self.fit(support, tasks.support_y, tasks.ways), query)
        return tasks.outcome(logits, self.loss)

    def embed_episodes(self, tasks: Episodes) -> tuple[Tensor, Tensor]:
        """Features of the support [T, S, F] and the query [T, B, F], for training."""
        self.check(tasks.ways)
        if uses_batch_statistics(self.backbone):
            return self.embed(tasks.support_x), self.embed(tasks.query_x)
        features = self.embed(torch.cat([tasks.support_x, tasks.query_x], 1))
        shots = tasks.support_x.shape[1]
        return features[:, :shots], features[:, shots:]

    def embed(self, x: Tensor) -> Tensor:
        """Features [T, B, F] of x [T, B, *item]."""
        return self.by_task(self.backbone, x)

    def by_task(self, module: nn.Module, x: Tensor) -> Tensor:
        """A module on x [T, B, ...]: each task by itself where its batch statistics count."""
        if runs_at_once(module, x, self.batching):
            return run_shared(module, x, self.batching)
        return torch.cat([run_shared(module, task, self.batching) for task in x.split(1)])


def one_hot(targets: Tensor, ways: int, like: Tensor) -> Tensor:
    """Targets [T, S] as vectors [T, S, N] of the type of `like`."""
    return (targets.unsqueeze(-1) == torch.arange(ways, device=targets.device)).to(like.dtype)


def prototypes(features: Tensor, targets: Tensor, ways: int) -> Tensor:
    """Class means [T, N, F] of features [T, S, F] by targets [T, S]; classes may be of unequal size."""
    members = one_hot(targets, ways, features).mT  # [T, N, S]
    return members @ features / members.sum(-1, keepdim=True)


def squared_distances(query: Tensor, prototypes: Tensor) -> Tensor:
    """[T, B, N] from query [T, B, F] and prototypes [T, N, F]."""
    query, prototypes = precise(query), precise(prototypes)
    with without_autocast(query):  # the squares nearly cancel
        squares = query.square().sum(-1, keepdim=True) + prototypes.square().sum(-1).unsqueeze(1)
        return squares - 2 * query @ prototypes.mT


def cosines(a: Tensor, b: Tensor) -> Tensor:
    """[..., B, N] from a [..., B, F] and b [..., N, F]."""
    return F.normalize(a, dim=-1) @ F.normalize(b, dim=-1).mT


def precise(x: Tensor) -> Tensor:
    """In float32 where it was bfloat16."""
    return x.float() if x.dtype == torch.bfloat16 else x


def without_autocast(x: Tensor) -> torch.autocast:
    """What is inside is computed in the types it has: solvers and differences of squares need them."""
    return torch.autocast(x.device.type, enabled=False)


def require(holds: bool, message: str) -> None:
    """Raise ConfigError where a setting cannot be."""
    if not holds:
        raise ConfigError(message)
