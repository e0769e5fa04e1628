"""Scores of predictions: functions of outputs and targets of T tasks, one number for each task, [T].

The shapes are those of `metarun.tasks.objectives`.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

CALIBRATION_BINS = 15


def accuracy(logits: Tensor, targets: Tensor) -> Tensor:
    """The share of right predictions of each task, [T]."""
    return (logits.argmax(-1) == targets).float().mean(1)


def confusion(logits: Tensor, targets: Tensor) -> Tensor:
    """How many examples of class i were predicted as class j, [T, N, N]."""
    ways = logits.shape[-1]
    cells = targets * ways + logits.argmax(-1)  # [T, B]
    counts = torch.zeros(len(targets), ways * ways, dtype=torch.float64, device=logits.device)
    return counts.scatter_add_(1, cells, torch.ones_like(cells, dtype=counts.dtype)).view(-1, ways, ways)


def balanced_accuracy(logits: Tensor, targets: Tensor) -> Tensor:
    """The mean recall over the classes that occur among a task's targets, [T]."""
    counts = confusion(logits, targets)
    sizes = counts.sum(2)  # [T, N]
    recalls = counts.diagonal(dim1=1, dim2=2) / sizes.clamp_min(1)
    return (recalls.sum(1) / (sizes > 0).sum(1)).float()


def macro_f1(logits: Tensor, targets: Tensor) -> Tensor:
    """The mean F1 score over the classes that occur among a task's targets or predictions, [T]."""
    counts = confusion(logits, targets)
    sizes = counts.sum(2) + counts.sum(1)  # true and predicted, [T, N]
    f1 = 2 * counts.diagonal(dim1=1, dim2=2) / sizes.clamp_min(1)
    return (f1.sum(1) / (sizes > 0).sum(1)).float()


def calibration_error(logits: Tensor, targets: Tensor) -> Tensor:
    """Expected calibration error of each task, [T] (Guo, Pleiss, Sun and Weinberger 2017, equation 3).

    With 15 bins of equal width. A task has few queries, and so the error of each bin is an average over few
    examples: compare it only between runs with the same number of queries.
    """
    confidence, predicted = logits.float().softmax(-1).max(-1)  # [T, B]
    gap = (predicted == targets).float() - confidence
    # Bins are (0, 1/15], (1/15, 2/15], ...
    bins = (confidence * CALIBRATION_BINS).ceil().long().clamp(1, CALIBRATION_BINS) - 1
    sums = torch.zeros(len(gap), CALIBRATION_BINS, device=gap.device).scatter_add_(1, bins, gap)
    return sums.abs().sum(1) / targets.shape[1]


def roc_auc(logits: Tensor, targets: Tensor) -> Tensor:
    """The probability that an example of a class gets a higher score for it than another example, [T].

    The area under the ROC curve, with a half for ties: the mean over the classes that occur among a task's
    targets, each against the rest. Of two classes, it is that of either. NaN where all targets are equal.
    """
    odds = _log_odds(logits.double())  # in float32, a large difference of logits could become a tie
    scores = odds.mT.contiguous()  # [T, N, B]
    ordered = scores.sort(-1).values
    below = torch.searchsorted(ordered, scores)
    ranks = (below + torch.searchsorted(ordered, scores, right=True) + 1) / 2.0  # the mean rank of ties
    members = targets.unsqueeze(1) == torch.arange(logits.shape[-1], device=targets.device)[:, None]
    inside = members.sum(-1).double()  # [T, N]
    pairs = inside * (targets.shape[1] - inside)
    areas = ((ranks * members).sum(-1) - inside * (inside + 1) / 2) / pairs.clamp_min(1)
    return ((areas * (pairs > 0)).sum(1) / (pairs > 0).sum(1)).float()


def _log_odds(logits: Tensor) -> Tensor:
    """The logarithm of the odds of each class, [T, B, N]; in the order of its probability.

    Equal odds are equal numbers, and others are not: the largest logit is taken off, and the others are
    summed in order of size, so that rounding is the same.
    """
    others = torch.eye(logits.shape[-1], dtype=torch.bool, device=logits.device)
    relative = logits - logits.amax(-1, keepdim=True)
    rest = relative.unsqueeze(-2).masked_fill(others, -math.inf).sort(-1).values.logsumexp(-1)
    return relative - rest


def mean_squared_error(outputs: Tensor, targets: Tensor) -> Tensor:
    """Mean squared error of each task, [T]."""
    _check_shapes(outputs, targets)
    return F.mse_loss(outputs, targets, reduction="none").flatten(1).mean(1)


def mean_absolute_error(outputs: Tensor, targets: Tensor) -> Tensor:
    """Mean absolute error of each task, [T]."""
    _check_shapes(outputs, targets)
    return F.l1_loss(outputs, targets, reduction="none").flatten(1).mean(1)


def r_squared(outputs: Tensor, targets: Tensor) -> Tensor:
    """The share of the targets' variance that is explained, a mean over the V values of an example, [T].

    A value whose targets are all equal counts as 1 where they are predicted exactly and as 0 elsewhere, as
    in scikit-learn: it has no variance to explain.
    """
    _check_shapes(outputs, targets)
    residual = (outputs - targets).square().sum(1)  # [T, V]
    total = (targets - targets.mean(1, keepdim=True)).square().sum(1)
    constant = targets.amax(1) == targets.amin(1)  # the mean is rounded, so `total` may be just above zero
    explained = 1 - residual / torch.where(constant, 1.0, total)
    return torch.where(constant, (residual == 0).to(explained), explained).mean(1)


def _check_shapes(outputs: Tensor, targets: Tensor) -> None:
    """Raise ValueError where broadcasting would pair outputs with the targets of other examples."""
    if outputs.shape != targets.shape:
        raise ValueError(f"outputs {tuple(outputs.shape)} and targets {tuple(targets.shape)} differ in shape")
