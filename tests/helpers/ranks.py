"""Several processes that are connected, as torchrun connects them, but without a new interpreter for each."""

from __future__ import annotations

import io
import multiprocessing
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from metarun.training import parallel


def in_ranks(count: int, folder: Path, function: Callable[[], Any]) -> list[Any]:
    """What `function()` returns in each of `count` processes, or the exit status of one that does not return.

    Args:
        count: the number of ranks.
        folder: an empty folder, by whose files they connect.
        function: runs in a copy of this process; its result are tensors and plain values.
    """
    context = multiprocessing.get_context("fork")  # PyTorch is imported already
    ends = [context.Pipe(duplex=False) for _ in range(count)]
    processes = [
        context.Process(target=one_rank, args=(rank, count, folder, function, ends[rank][1]))
        for rank in range(count)
    ]
    for process in processes:
        process.start()
    results = [receive(process, end[0]) for process, end in zip(processes, ends, strict=True)]
    for process in processes:
        process.join()
    return results


def one_rank(rank: int, count: int, folder: Path, function: Callable[[], Any], end: Any) -> None:
    store = dist.FileStore(str(folder / "store"), count)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=count)
    parallel._current = parallel.Ranks(rank, count, dist.PrefixStore("metarun", store))
    content = io.BytesIO()  # tensors that are sent themselves would stay in memory that both processes share
    try:
        torch.save(function(), content)
    except Exception:
        traceback.print_exc()
        raise
    end.send_bytes(content.getvalue())


def receive(process: Any, end: Any) -> Any:
    """What a process sends, or its exit status if it ends without a word."""
    while not end.poll(0.05):
        if not process.is_alive() and not end.poll():
            return process.exitcode
    return torch.load(io.BytesIO(end.recv_bytes()), weights_only=True)
