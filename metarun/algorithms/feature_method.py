"""Base class of methods with a shared, non-adapted backbone (metric, closed-form, memory-based)."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from metarun.algorithms.base import QUERIES_AT_ONCE, Adapted, Algorithm
from metarun.errors import ConfigError
from metarun.nn.layers import uses_batch_statistics
from metarun.nn.per_task import AUTO
from metarun.nn.shared_weights import run_shared, runs_at_once
from metarun.nn.task_norm import support_first
from metarun.tasks.episodes import Episodes, Outcome


class FeatureMethod(Algorithm):
    """Base class of methods that embed examples with a shared backbone and adapt on the features.

    The extension point for such a method: a subclass implements `fit` and `score`.

    With running averages (norm=running) the support and the query of a task are embedded in one batch
    in training, and evaluation does not use query statistics. So are they with TaskNorm (norm=task), also in
    evaluation. With norm=batch they are embedded in separate batches, as they are in evaluation. In training,
    batch statistics are computed for each task separately.

    Args:
        backbone: maps examples [B, *item] to features [B, F].
        most_ways: the most ways that the network supports, if its size depends on them; tasks with fewer ways
            use the first outputs. None: any number.
    """

    needs = Episodes
    needs_classes = True
    embeds_first = True

    def __init__(self, backbone: nn.Module, most_ways: int | None = None) -> None:
        super().__init__()
        self.backbone = backbone
        self.most_ways = most_ways
        self.batching = AUTO

    def own_backbone(self) -> nn.Module:
        return self.backbone

    def check(self, ways: int) -> None:
        if self.most_ways is not None and ways > self.most_ways:
            raise ConfigError(f"the network has {self.most_ways} ways, not {ways}; train with ways={ways}")

    @abstractmethod
    def fit(self, features: Tensor, targets: Tensor, ways: int) -> Adapted:
        """Adapt to T tasks.

        Args:
            features: of the support examples, [T, S, F].
            targets: the way of each support example, int64 [T, S], from 0 to ways - 1; or its values, float
                [T, S, V], if the method does not need classes.
            ways: N, or V.

        Returns:
            The task-specific state that `score` needs: a tensor, or dicts and lists of tensors, each with T
            as its first dimension.
        """

    @abstractmethod
    def score(self, adapted: Adapted, features: Tensor) -> Tensor:
        """Predict the queries.

        Args:
            adapted: the state that `fit` returned.
            features: of the queries, [T, B, F].

        Returns:
            Logits [T, B, N], or values [T, B, V].
        """

    def fit_tasks(self, tasks: Episodes, features: Tensor) -> Adapted:
        """`fit` with what it needs of the tasks, given the features of their support [T, S, F]."""
        return self.fit(features, tasks.support_y, tasks.outputs)

    @property
    def features(self) -> int:
        """F, the number of features of an example."""
        return self.backbone.features  # type: ignore[return-value]

    @cached_property
    def normalises_batches(self) -> bool:  # type: ignore[override]
        return uses_batch_statistics(self)

    def adapt(self, tasks: Episodes) -> Adapted:
        self.check(tasks.outputs)
        return self.fit_tasks(tasks, self.embed(tasks.support_x))

    def predict(self, adapted: Adapted, query_x: Tensor) -> Tensor:
        if self.training or self.normalises_batches or self.normalises_by_support:
            return self.score(adapted, self.embed(query_x))
        # Methods that build graphs or pairs would need gigabytes for hundreds of queries at once.
        parts = query_x.split(QUERIES_AT_ONCE, 1)
        return torch.cat([self.score(adapted, self.embed(part)) for part in parts], 1)

    def meta_loss(self, tasks: Episodes) -> Outcome:
        support, query = self.embed_episodes(tasks)
        logits = self.score(self.fit_tasks(tasks, support), query)
        return tasks.outcome(logits, self.loss)

    def embed_episodes(
        self, tasks: Episodes, embed: Callable[[Tensor], Tensor] | None = None
    ) -> tuple[Tensor, Tensor]:
        """Features of the support [T, S, F] and of the query [T, B, F] in training.

        Args:
            tasks: the tasks.
            embed: from examples [T, B, *item] to features [T, B, F]; None: `embed` of the method.
        """
        self.check(tasks.outputs)
        embed = embed or self.embed
        if uses_batch_statistics(self.backbone):
            return embed(tasks.support_x), embed(tasks.query_x)
        shots = tasks.support_x.shape[1]
        with support_first(self.backbone, shots):
            features = embed(torch.cat([tasks.support_x, tasks.query_x], 1))
        return features[:, :shots], features[:, shots:]

    def embed(self, x: Tensor) -> Tensor:
        """Features [T, B, F] of x [T, B, *item]."""
        if not x.shape[1]:  # a support of 0 shots
            return x.new_zeros(len(x), 0, self.features)
        return self.by_task(self.backbone, x)

    def by_task(self, module: nn.Module, x: Tensor) -> Tensor:
        """A module applied to x [T, B, ...]; one task after the other if it uses batch statistics."""
        if runs_at_once(module, x, self.batching):
            return run_shared(module, x, self.batching)
        return torch.cat([run_shared(module, task, self.batching) for task in x.split(1)])


def one_hot(targets: Tensor, ways: int, like: Tensor) -> Tensor:
    """One-hot vectors [T, S, N] of targets [T, S], with the dtype of `like`."""
    return (targets.unsqueeze(-1) == torch.arange(ways, device=targets.device)).to(like.dtype)


def prototypes(features: Tensor, targets: Tensor, ways: int) -> Tensor:
    """Class means [T, N, F] of features [T, S, F] by targets [T, S]; classes may have different sizes."""
    members = one_hot(targets, ways, features).mT  # [T, N, S]
    return members @ features / members.sum(-1, keepdim=True)


def squared_distances(query: Tensor, prototypes: Tensor) -> Tensor:
    """Squared Euclidean distances [T, B, N] of query [T, B, F] and prototypes [T, N, F]."""
    query, prototypes = precise(query), precise(prototypes)
    with without_autocast(query):  # the sum below suffers from cancellation in half precision
        squares = query.square().sum(-1, keepdim=True) + prototypes.square().sum(-1).unsqueeze(1)
        return squares - 2 * query @ prototypes.mT


def cosines(a: Tensor, b: Tensor) -> Tensor:
    """Cosine similarities [..., B, N] of a [..., B, F] and b [..., N, F]."""
    return F.normalize(a, dim=-1) @ F.normalize(b, dim=-1).mT


def precise(x: Tensor) -> Tensor:
    """x, converted to float32 if it is bfloat16."""
    return x.float() if x.dtype == torch.bfloat16 else x


def without_autocast(x: Tensor) -> torch.autocast:
    """A context that disables autocast, for solvers and differences of squares, which need full precision."""
    return torch.autocast(x.device.type, enabled=False)


def require(holds: bool, message: str) -> None:
    """Raise ConfigError with this message unless the condition holds."""
    if not holds:
        raise ConfigError(message)
