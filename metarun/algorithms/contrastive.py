"""Contrastive pretraining: SimCLR and SupCon."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from metarun.algorithms.feature_method import FeatureMethod, cosines, precise, prototypes, require
from metarun.tasks.episodes import Episodes, Outcome


class Contrastive(FeatureMethod):
    """SimCLR (Chen, Kornblith, Norouzi and Hinton 2020) and SupCon (Khosla et al. 2020).

    The examples of a task are one batch. Their features go through a projection head (SimCLR, section 2.1:
    two layers with a ReLU) and are scaled to length 1. The loss is the supervised loss "out" of SupCon
    (equation 2), with the examples of the same way as positives. With two views of one image in each way
    (`train_tasks=views`), it is NT-Xent (SimCLR, equation 1 and algorithm 1).

    A new task is solved by the nearest class mean of the backbone's features, by the cosine; the head is not
    used. With `init=RUN`, the backbone is the start of any other method.

    Departures: a class has the same number of examples in each batch of SupCon; the papers draw images at
    random. The optimizer is Adam by default, in batches of 256 images (128 with SupCon); the papers use LARS
    or SGD with batches of thousands. SupCon's code multiplies its loss by temperature / 0.07.

    Args:
        backbone: passed by the builder; see `Algorithm`.
        temperature: divides the cosines, above 0.
        projection: the size of the projected features.
    """

    minimises_query_loss = False

    def __init__(self, backbone: nn.Module, temperature: float = 0.5, projection: int = 128) -> None:
        super().__init__(backbone)
        require(temperature > 0, f"algorithm.temperature={temperature}: must be above 0")
        require(projection >= 1, f"algorithm.projection={projection}: must be at least 1")
        self.temperature = temperature
        width = self.features
        self.projection = nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Linear(width, projection))

    def meta_loss(self, tasks: Episodes) -> Outcome:
        whole = tasks.joined()
        features = self.embed(whole.support_x)
        loss = contrastive_loss(self.projection(features), whole.support_y, self.temperature)
        support, query = features.detach().split([tasks.support_x.shape[1], tasks.query_x.shape[1]], 1)
        return tasks.outcome(self.score(self.fit_tasks(tasks, support), query), loss)

    def fit(self, features: Tensor, targets: Tensor, ways: int) -> Tensor:
        """The class means of features of length 1, [T, N, F]."""
        return prototypes(F.normalize(precise(features), dim=-1), targets, ways)

    def score(self, adapted: Tensor, features: Tensor) -> Tensor:
        return cosines(precise(features), adapted) / self.temperature


def contrastive_loss(projected: Tensor, targets: Tensor, temperature: float) -> Tensor:
    """The supervised contrastive loss of batches of examples, averaged over examples, [T].

    Khosla et al. 2020, equation 2 (L_out): of each example, the mean over its positives of the negative
    log-probability of the positive among all other examples.

    Args:
        projected: [T, B, D], of any length.
        targets: [T, B]; examples with the same target are positives of each other.
        temperature: divides the cosines.
    """
    projected = precise(projected)
    itself = torch.eye(projected.shape[1], dtype=torch.bool, device=projected.device)
    logits = cosines(projected, projected) / temperature  # [T, B, B]
    log_p = logits.masked_fill(itself, -torch.inf).log_softmax(-1)
    positive = (targets.unsqueeze(-1) == targets.unsqueeze(-2)) & ~itself
    sums = log_p.masked_fill(~positive, 0.0).sum(-1)
    return -(sums / positive.sum(-1).clamp_min(1)).mean(-1)
