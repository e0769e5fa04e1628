"""Predicted distributions of the values of a regression: Gaussians, or mixtures of them.

Outputs [T, B, 2 V L] are L predictions of all queries of a task, each as probable as the others: for each,
the means of the V values of a query, then the logarithms of their standard deviations. Given one of the L
predictions, all values are independent. With L = 1 they are Gaussians; methods that average over samples of a
latent variable or of weights have one prediction for each sample.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

NUMBERS = 2  # of each value in a prediction


def packed(means: Tensor, log_deviations: Tensor) -> Tensor:
    """Outputs [T, B, 2 V L] of means and logarithms of standard deviations, [T, B, L, V] each."""
    return torch.stack([means, log_deviations], -2).flatten(-3)


def unpacked(outputs: Tensor, values: int) -> tuple[Tensor, Tensor]:
    """The means and the logarithms of the standard deviations, [..., L, V] each, of outputs [..., 2 V L]."""
    means, log_deviations = outputs.unflatten(-1, (-1, NUMBERS, values)).unbind(-2)
    return means, log_deviations


def point(outputs: Tensor, values: int) -> Tensor:
    """The means [..., V] of predicted distributions [..., 2 V L]; values [..., V] stay as they are."""
    return outputs if outputs.shape[-1] == values else unpacked(outputs, values)[0].mean(-2)


def deviation(outputs: Tensor, values: int) -> Tensor:
    """The standard deviations [..., V] of predicted distributions [..., 2 V L]."""
    means, log_deviations = unpacked(outputs, values)
    within = (2 * log_deviations).exp().mean(-2)
    return (within + means.var(-2, correction=0)).sqrt()


def log_densities(outputs: Tensor, targets: Tensor) -> Tensor:
    """The logarithm of the density of each query by each of the L predictions, [T, B, L].

    Args:
        outputs: [T, B, 2 V L].
        targets: [T, B, V].
    """
    means, log_deviations = unpacked(outputs, targets.shape[-1])
    z = (targets.unsqueeze(-2) - means) * (-log_deviations).exp()
    return -(0.5 * z.square() + log_deviations + 0.5 * math.log(2 * math.pi)).sum(-1)


def log_likelihood(outputs: Tensor, targets: Tensor) -> Tensor:
    """The logarithm of the joint density of a task's queries, divided by their number, [T]."""
    joint = log_densities(outputs, targets).sum(1)  # [T, L]
    return (joint.logsumexp(1) - math.log(joint.shape[1])) / targets.shape[1]


def negative_log_likelihood(outputs: Tensor, targets: Tensor) -> Tensor:
    return -log_likelihood(outputs, targets)


def coverage(outputs: Tensor, targets: Tensor, level: float) -> Tensor:
    """The share of the values that are inside of their central interval of a probability, [T].

    Args:
        outputs: [T, B, 2 V L].
        targets: [T, B, V].
        level: the probability, such as 0.9: the interval is from the 5 % to the 95 % quantile.
    """
    means, log_deviations = unpacked(outputs, targets.shape[-1])
    z = (targets.unsqueeze(-2) - means) * (-log_deviations).exp()
    below = torch.special.ndtr(z).mean(-2)  # the distribution function at the value
    return ((below - 0.5).abs() <= level / 2).to(targets.dtype).flatten(1).mean(1)
