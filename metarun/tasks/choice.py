"""Random choice without replacement, for many rows at once."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def different(counts: Tensor, wanted: int, most: int, many: int, generator: torch.Generator) -> Tensor:
    """Draw numbers without replacement: `wanted` different ones below each of `counts`, in random order.

    Args:
        counts: int64 [...], each at least `wanted`.
        wanted: how many numbers are drawn.
        most: the largest count that there can be.
        many: the largest `most` for which every number gets a random key. Above it, the cost depends on
            `wanted` alone; the numbers that a generator gives differ between the two.
        generator: the only source of randomness.

    Returns:
        int64 [..., wanted].
    """
    if most <= many:
        return by_keys(counts, wanted, most, generator)
    return by_redrawing(counts, wanted, generator)


def by_keys(counts: Tensor, wanted: int, most: int, generator: torch.Generator) -> Tensor:
    """As `different`. The largest of independent uniform keys are a uniform choice without replacement."""
    keys = torch.rand(*counts.shape, most, generator=generator, device=generator.device)
    if counts.numel() and int(counts.min()) < most:
        keys = keys.masked_fill(torch.arange(most, device=keys.device) >= counts[..., None], -1.0)
    return keys.topk(wanted).indices


def by_redrawing(counts: Tensor, wanted: int, generator: torch.Generator) -> Tensor:
    """As `different`. Numbers that were drawn before in their row are drawn again until there are none.

    Renaming the numbers below a count renames the result in the same way, so that all ordered choices are
    equally likely. Rows in which more than half of the numbers are wanted would take long: they get keys.
    """

    def uniform(below: Tensor) -> Tensor:
        real = torch.rand(below.shape, generator=generator, device=generator.device, dtype=torch.float64)
        return (real * below).long()

    below = counts[..., None].expand(*counts.shape, wanted)
    found = uniform(below)
    if (small := counts < 2 * wanted).any():
        found[small] = by_keys(counts[small], wanted, 2 * wanted, generator)
    while (again := repeated(found)).any():
        found[again] = uniform(below[again])
    return found


def one_of_each(counts: Tensor, groups: int, generator: torch.Generator) -> Tensor:
    """Draw one number of each group below each of `counts`; number i is in group i modulo `groups`.

    Args:
        counts: int64 [T], each at least `groups`.
        groups: how many groups there are.
        generator: the only source of randomness.

    Returns:
        int64 [T, groups]: in column n a number of group n.
    """
    group = torch.arange(groups, device=generator.device)
    sizes = (counts.unsqueeze(1) - group + groups - 1) // groups  # [T, groups]
    real = torch.rand(sizes.shape, generator=generator, device=generator.device, dtype=torch.float64)
    return group + groups * (real * sizes).long()


def repeated(numbers: Tensor) -> Tensor:
    """Where a number [..., n] is equal to an earlier one of its row."""
    ordered, places = torch.sort(numbers, dim=-1, stable=True)
    equal = F.pad(ordered[..., 1:] == ordered[..., :-1], (1, 0))
    return torch.zeros_like(equal).scatter(-1, places, equal)
