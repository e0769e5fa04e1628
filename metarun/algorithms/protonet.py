"""Prototypical networks (Snell, Swersky and Zemel 2017)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from metarun.algorithms.base import Algorithm
from metarun.episodes import Episodes
from metarun.errors import ConfigError
from metarun.learner import uses_batch_statistics
from metarun.lowering import AUTO, is_groupable
from metarun.objectives import task_loss


class ProtoNet(Algorithm):
    """A class is the mean of its embedded shots (equation 1); a query belongs to the nearest.

    Logits are negative squared Euclidean distances (equation 2). Batch norm keeps running
    averages by default (norm=running), as the paper's code does, so evaluation does not use
    query statistics; in training each task has its own batch statistics.
    """

    def __init__(self, backbone: nn.Module, classification: bool = True) -> None:
        super().__init__()
        if not classification:
            raise ConfigError(
                "algorithm=protonet classifies and cannot regress; choose algorithm=maml or reptile"
            )
        self.backbone = backbone
        self.lowering = AUTO
        self.uses_query_statistics = uses_batch_statistics(backbone)

    def adapt(self, support_x: Tensor, support_y: Tensor, ways: int) -> Tensor:
        """The prototypes [T, N, features]; classes may have unequal numbers of shots."""
        return prototypes(self.embed(support_x), support_y, ways)

    def predict(self, adapted: Tensor, query_x: Tensor) -> Tensor:
        return -squared_distances(self.embed(query_x), adapted)

    def meta_loss(self, episodes: Episodes) -> tuple[Tensor, Tensor]:
        """Cross entropy of the query logits, and these [T, N*Q, N].

        With running averages, support and query pass together, as in the paper's code; with
        batch statistics apart, as they do in evaluation.
        """
        if self.uses_query_statistics:
            return super().meta_loss(episodes)
        shots = episodes.support_x.shape[1]
        features = self.embed(torch.cat([episodes.support_x, episodes.query_x], 1))
        support, query = features[:, :shots], features[:, shots:]
        logits = -squared_distances(query, prototypes(support, episodes.support_y, episodes.ways))
        return task_loss(logits, episodes.query_y).mean(), logits

    def embed(self, x: Tensor) -> Tensor:
        """Features [T, B, features] of x [T, B, *item]."""
        tasks, together = x.shape[:2], x.flatten(0, 1)
        if x.dim() == 5 and is_groupable(self.backbone):  # its layers take any memory layout
            together = self.lowering.laid_out(together)
        if self.training or self.uses_query_statistics:
            # A task's batch statistics are its own, however many tasks share the step.
            return torch.stack([self.backbone(task) for task in together.split(tasks[1])])
        return self.backbone(together).unflatten(0, tasks)


def prototypes(features: Tensor, targets: Tensor, ways: int) -> Tensor:
    """Class means [T, N, features] of features [T, S, features] by targets [T, S]."""
    every = torch.arange(ways, device=targets.device).unsqueeze(1)
    members = (targets.unsqueeze(1) == every).to(features)  # [T, N, S]
    return members @ features / members.sum(-1, keepdim=True)


def squared_distances(query: Tensor, prototypes: Tensor) -> Tensor:
    """[T, B, N] from query [T, B, features] and prototypes [T, N, features]."""
    if query.dtype == torch.bfloat16:  # the squares nearly cancel
        query, prototypes = query.float(), prototypes.float()
    squares = query.square().sum(-1, keepdim=True) + prototypes.square().sum(-1).unsqueeze(1)
    return squares - 2 * query @ prototypes.mT
