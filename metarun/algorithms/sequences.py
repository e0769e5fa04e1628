"""Functions for methods that process the examples of a task as a sequence."""

from __future__ import annotations

import torch
from torch import Tensor

from metarun.tasks.numbers import uniform


def order_of(like: Tensor, at_random: bool) -> Tensor:
    """An order of the examples [T, L, ...] of each task, int64 [T, L]: random, or always the same."""
    tasks, length = like.shape[:2]
    if at_random:
        return uniform(tasks, length, like.device).argsort(1)
    # A hash instead of a generator, which cannot be used in a trace or a CUDA graph.
    hashed = (torch.arange(1, length + 1, device=like.device) * 2654435761) % (1 << 32)
    return hashed.argsort().expand(tasks, -1)


def reordered(sequence: Tensor, order: Tensor) -> Tensor:
    """A sequence [T, L, ...] with its examples in the order [T, L]."""
    return sequence[torch.arange(len(order), device=order.device).unsqueeze(1), order]
