"""What methods share that see a task's examples one after the other."""

from __future__ import annotations

import torch
from torch import Tensor


def order_of(like: Tensor, at_random: bool) -> Tensor:
    """An order for each task's examples [T, L, ...]: its own at random, or one that never changes; [T, L]."""
    tasks, length = like.shape[:2]
    if at_random:
        return torch.rand(tasks, length, device=like.device).argsort(1)
    # Scattered by a hash instead of a generator, which a recorded step could not repeat.
    scattered = (torch.arange(1, length + 1, device=like.device) * 2654435761) % (1 << 32)
    return scattered.argsort().expand(tasks, -1)


def reordered(sequence: Tensor, order: Tensor) -> Tensor:
    """[T, L, ...] with its examples in the order [T, L]."""
    return sequence[torch.arange(len(order), device=order.device).unsqueeze(1), order]
