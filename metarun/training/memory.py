"""Measures the peak memory of a computation by running it once."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


def peak_bytes(function: Callable[[], object], device: torch.device) -> int:
    """Run `function` and measure the peak memory of the tensors that it creates.

    Args:
        function: the computation, called once; its result is discarded.
        device: where it runs. On CUDA the statistics of the allocator are used, and its peak is reset. The
            allocator of the CPU has no statistics, so every operation is observed, which is slower.

    Returns:
        Bytes.
    """
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        function()
        return torch.cuda.max_memory_allocated(device) - before
    with LiveBytes() as counter:
        function()
    return counter.peak


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of every storage from its creation until it is freed.

    `now` and `peak` are bytes. Storages that existed before count as zero; several tensors that share a
    storage count once. Memory inside one operation (its workspace) is not seen.
    """

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self.known: set[int] = set()
        self.watches: list[weakref.finalize] = []

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        for watch in self.watches:
            watch.detach()  # tensors may outlive this counter

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # True would import the compiler, which takes 1.5 s and is not needed

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        for tensor in tree_leaves((args, kwargs)):
            if isinstance(tensor, Tensor):  # an unknown storage was created before and counts as zero
                self.follow(tensor.untyped_storage(), 0)
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor):
                self.follow(tensor.untyped_storage(), tensor.untyped_storage().nbytes())
        self.peak = max(self.peak, self.now)
        return result

    def follow(self, storage: torch.UntypedStorage, size: int) -> None:
        """Count `size` bytes until the storage is freed, unless it is counted already."""
        key = storage._cdata
        if key in self.known:
            return
        self.known.add(key)
        self.now += size
        self.watches.append(weakref.finalize(storage, self.forget, key, size))

    def forget(self, key: int, size: int) -> None:
        self.known.discard(key)
        self.now -= size
