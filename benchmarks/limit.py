"""A lower bound of the time of a meta-iteration on this machine (roofline model).

The matrix products and convolutions of the plain loop are counted: their floating point operations and the
bytes that they must read and write. Each takes at least the larger of two times: operations divided by the
measured peak of a large matrix product, and bytes divided by the measured peak of a large copy. Everything
else (normalisation, activations, pooling, updates) counts as free, as if it were fused with its neighbours;
therefore no program reaches this bound.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry


@dataclass(frozen=True)
class Peak:
    flops: float  # floating point operations per second
    bytes: float  # bytes per second


#: Rows of the square matrices that are multiplied, and float32 numbers that are copied, on each device.
SIZES = {"cuda": (8192, 1 << 29), "cpu": (4096, 1 << 26)}


def measured_peak(device: torch.device) -> Peak:
    """Measure a float32 matrix product and a copy, of the sizes in `SIZES`."""
    n, size = SIZES[device.type]
    a, b = torch.rand(n, n, device=device), torch.rand(n, n, device=device)
    x, y = torch.rand(size, device=device), torch.empty(size, device=device)
    product = median(seconds(lambda: torch.mm(a, b), device) for _ in range(7))
    copy = median(seconds(lambda: y.copy_(x), device) for _ in range(7))
    return Peak(flops=2 * n**3 / product, bytes=2 * 4 * size / copy)


def seconds(function: Callable[[], object], device: torch.device) -> float:
    synchronize(device)
    began = time.perf_counter()
    function()
    synchronize(device)
    return time.perf_counter() - began


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


class Roofline(TorchDispatchMode):
    """Counts the operations, the bytes and the minimum time of matrix products and convolutions."""

    def __init__(self, peak: Peak) -> None:
        super().__init__()
        self.peak, self.flops, self.bytes, self.seconds = peak, 0.0, 0.0, 0.0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if (count := flop_registry.get(func._overloadpacket)) is not None:
            flops = count(*args, **(kwargs or {}), out_val=result)
            tensors = [t for t in tree_leaves((args, kwargs, result)) if isinstance(t, Tensor)]
            moved = sum(t.numel() * t.element_size() for t in tensors)
            self.flops += flops
            self.bytes += moved
            self.seconds += max(flops / self.peak.flops, moved / self.peak.bytes)
        return result
