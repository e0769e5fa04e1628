"""How much memory a computation needs, found by doing it once."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


def peak_bytes(function: Callable[[], object], device: torch.device) -> int:
    """The most bytes of tensors that were alive at once and made by `function`."""
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
    """Counts the bytes of every storage from its making to its end."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self.known: set[int] = set()
        self.watches: list[weakref.finalize] = []

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        for watch in self.watches:
            watch.detach()

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # there is no compiling here, and the alternative imports the compiler: 1.5 s

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        for tensor in tree_leaves((args, kwargs)):
            if isinstance(tensor, Tensor):  # not made here, unless known already
                self.follow(tensor.untyped_storage(), 0)
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor):
                self.follow(tensor.untyped_storage(), tensor.untyped_storage().nbytes())
        self.peak = max(self.peak, self.now)
        return result

    def follow(self, storage: torch.UntypedStorage, size: int) -> None:
        key = storage._cdata
        if key in self.known:
            return
        self.known.add(key)
        self.now += size
        self.watches.append(weakref.finalize(storage, self.forget, key, size))

    def forget(self, key: int, size: int) -> None:
        self.known.discard(key)
        self.now -= size
