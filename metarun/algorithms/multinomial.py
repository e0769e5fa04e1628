"""Multinomial logistic regression, for T tasks at once and without a value read back from the device."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

MEMORY = 10  # steps that it remembers
TRIALS = 3  # Newton's steps of a line search


def multinomial_regression(
    x: Tensor, wanted: Tensor, weights: Tensor, penalty: float = 1.0, steps: int = 60
) -> Tensor:
    """W [T, F+1, N], the constant last, that minimises the penalised cross entropy of each task.

    The sum over examples of weight * cross entropy, plus penalty/2 |W|^2 without the constant: scikit-learn's
    LogisticRegression with C = 1/penalty. By L-BFGS (Nocedal and Wright 2006, algorithm 7.4), whose line
    search is Newton's method within a bracket: on a line, logits are known without another product with x.

    Args:
        x: [T, S, F].
        wanted: the classes as one-hot vectors, [T, S, N].
        weights: of the examples, [T, S].
        penalty: above 0.
        steps: of L-BFGS.
    """
    x, wanted, weights = F.pad(x, (0, 1), value=1.0), wanted.mT.contiguous(), weights.unsqueeze(1)
    penalties = x.new_full((x.shape[-1],), penalty)
    penalties[-1] = 0

    def slope(w: Tensor, logits: Tensor) -> Tensor:  # the gradient, [T, N, F+1]
        return (weights * (logits.softmax(1) - wanted)) @ x + penalties * w

    w, logits = x.new_zeros(len(x), wanted.shape[1], x.shape[-1]), torch.zeros_like(wanted)
    past: list[tuple[Tensor, Tensor]] = []
    gradient = slope(w, logits)
    for step in range(steps):
        direction = -inverse_hessian_times(gradient, past)
        if not step:
            direction = direction / inner(gradient, gradient).sqrt().clamp_min(TINY)
        along = direction @ x.mT
        line = inner(w, penalties * direction), inner(direction, penalties * direction)
        length = line_minimum(logits, along, wanted, weights, line)
        move = length * direction
        w, logits, before = w + move, logits + length * along, gradient
        gradient = slope(w, logits)
        past = [*past, (move, gradient - before)][-MEMORY:]
    return w.mT


def inverse_hessian_times(gradient: Tensor, past: list[tuple[Tensor, Tensor]]) -> Tensor:
    """L-BFGS's estimate of the inverse Hessian times a gradient [T, ...], from past steps and changes."""
    taken = []
    for move, change in reversed(past):
        product = inner(move, change)
        rate = torch.where(product > TINY, 1 / product.clamp_min(TINY), 0)  # 0: the step has no effect
        share = rate * inner(move, gradient)
        gradient = gradient - share * change
        taken.append((move, change, rate, share))
    if past:
        move, change = past[-1]
        square = inner(change, change)
        gradient = gradient * torch.where(square > TINY, inner(move, change) / square.clamp_min(TINY), 1)
    for move, change, rate, share in reversed(taken):
        gradient = gradient + (share - rate * inner(change, gradient)) * move
    return gradient


def line_minimum(
    logits: Tensor, along: Tensor, wanted: Tensor, weights: Tensor, line: tuple[Tensor, Tensor]
) -> Tensor:
    """The length a [T, 1, 1] at which logits + a * along have the least loss.

    Args:
        logits, along, wanted: [T, N, S].
        weights: of the examples, [T, 1, S].
        line: the slope of the penalty at 0, and its curvature, [T, 1, 1].
    """
    length = torch.ones_like(line[0])
    low, high = torch.zeros_like(length), torch.full_like(length, torch.inf)
    for _ in range(TRIALS):
        p = (logits + length * along).softmax(1)
        mean = (p * along).sum(1, keepdim=True)
        slope = inner(weights * (p - wanted), along) + line[0] + length * line[1]
        curvature = inner(weights * p, (along - mean).square()) + line[1]
        low, high = torch.where(slope < 0, length, low), torch.where(slope < 0, high, length)
        newton = length - slope / curvature.clamp_min(TINY)
        middle = torch.where(high.isinf(), 2 * length, (low + high) / 2)
        length = torch.where((newton > low) & (newton < high), newton, middle)
    return length


def inner(a: Tensor, b: Tensor) -> Tensor:
    """The inner product of each task, [T, 1, 1]."""
    return (a * b).sum((1, 2), keepdim=True)


TINY = 1e-30  # the least product that is divided by
