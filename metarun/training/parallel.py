"""Processes that train or evaluate together, each on a share of the tasks.

`torchrun` starts the same command several times. The tasks of an iteration depend on the seed and the
iteration alone, so every process (a *rank*) draws the same meta-batch, runs its share, and adds up gradients
and figures with the others. All ranks then take the same step, and their weights stay equal bit by bit.

No other module uses torch.distributed.
"""

from __future__ import annotations

import atexit
import os
import re
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from metarun.errors import ConfigError, RankLost, first_line
from metarun.training.interrupts import Requests, ignore_requests

VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")  # as torchrun sets them
# Seconds in which a process that fails says why, before others say that it has ended; and in which rank 0
# reports what all find wrong.
TIME_TO_REPORT, TIME_OF_FIRST = 2.0, 0.5
TIME_TO_CONNECT = timedelta(minutes=5)


class Ranks:
    """The processes of a command. `Ranks()` is one process that torchrun has not started.

    Every method that exchanges something must be called by all ranks in the same order. It raises RankLost if
    another process has ended.

    Args:
        rank: the number of this process, from 0; only rank 0 writes.
        count: the number of processes.
        store: where a process that fails says why; None: the processes are not connected.
    """

    def __init__(self, rank: int = 0, count: int = 1, store: Any = None) -> None:
        self.rank, self.count, self.store = rank, count, store
        self.requests, self.agreed = Requests(), False

    def __reduce__(self) -> tuple[Any, ...]:
        """Connections are of a process: a copy, such as one of a model in another process, has its own."""
        return current, ()

    @property
    def joined(self) -> bool:
        """Whether processes are connected, even if it is only one."""
        return self.store is not None

    @property
    def first(self) -> bool:
        """Whether this is rank 0, which alone writes files and messages."""
        return self.rank == 0

    @property
    def program(self) -> str:
        """How to start the same command again, for messages."""
        return f"torchrun --nproc-per-node {self.count} -m metarun" if self.count > 1 else "metarun"

    @property
    def capture_mode(self) -> str:
        """Whose calls may spoil the capture of a CUDA graph: not those of the threads of NCCL."""
        return "thread_local" if self.joined else "global"

    def share(self, tasks: int) -> slice:
        """This rank's part of the tasks of a step; the sizes of the parts differ by at most one.

        Raises:
            ConfigError: there are fewer tasks than ranks.
        """
        if self.count > tasks:
            raise ConfigError(
                f"meta_batch={tasks}: fewer tasks than the {self.count} processes of torchrun; raise "
                "meta_batch, or start fewer processes"
            )
        bounds = [tasks // self.count * r + min(r, tasks % self.count) for r in (self.rank, self.rank + 1)]
        return slice(*bounds)

    def generator(self) -> torch.Generator | None:
        """A generator in the state of the global one, which all ranks have at the start; else None."""
        if not self.joined:
            return None
        generator = torch.Generator()
        generator.set_state(torch.get_rng_state())
        return generator

    # what is exchanged

    def any(self, *flags: bool) -> list[bool]:
        """For each flag, whether it is true on any rank; without flags, a point that all ranks must reach.

        The ranks also agree on whether to stop, see `stopping`.
        """
        if not self.joined:
            return list(flags)
        asked = bool(self.requests.signals), self.requests.late
        votes = torch.tensor([*flags, *asked], dtype=torch.uint8)
        self._exchange(dist.all_reduce, votes, op=dist.ReduceOp.MAX)
        *results, signalled, late = votes.bool().tolist()
        self.agreed = self.agreed or signalled or late
        self.requests.add(signalled, late)
        return results

    def hear(self, requests: Requests) -> None:
        """Take into account requests to stop, those of all ranks."""
        self.requests, self.agreed = requests, False

    @property
    def stopping(self) -> bool:
        """Whether a request to stop had arrived on any rank when they last called `any`, as a step does."""
        return self.agreed if self.joined else bool(self.requests)

    def least(self, number: int) -> int:
        """The smallest of the ranks' numbers."""
        if not self.joined:
            return number
        smallest = torch.tensor(number)
        self._exchange(dist.all_reduce, smallest, op=dist.ReduceOp.MIN)
        return int(smallest)

    def sum(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """The sums over ranks of tensors, by one exchange of all tensors of a type."""
        sums = list(tensors)
        if not self.joined:
            return sums
        for kind in dict.fromkeys((each.device, each.dtype) for each in tensors):
            places = [i for i, each in enumerate(tensors) if (each.device, each.dtype) == kind]
            flat = torch.cat([tensors[i].reshape(-1) for i in places])
            self._exchange(dist.all_reduce, flat)
            parts = flat.split([tensors[i].numel() for i in places])
            for i, part in zip(places, parts, strict=True):
                sums[i] = part.view(tensors[i].shape)
        return sums

    def whole(self, part: Tensor, tasks: int) -> Tensor:
        """The values of all tasks [tasks], of which `part` has those of this rank's share."""
        if not self.joined:
            return part
        own = part.new_zeros(tasks)
        own[self.share(tasks)] = part
        return self.sum([own])[0]

    def from_first(self, value: Any = None) -> Any:
        """The value that rank 0 gives."""
        if not self.joined:
            return value
        values = [value]
        self._exchange(dist.broadcast_object_list, values, src=0)
        return values[0]

    def gathered(self, value: Any) -> list[Any]:
        """The values of all ranks."""
        if not self.joined:
            return [value]
        values = [None] * self.count
        self._exchange(dist.all_gather_object, values, value)
        return values

    def copy_first(self, module: nn.Module) -> None:
        """Give a module the weights and buffers that it has on rank 0."""
        for tensor in [*module.parameters(), *module.buffers()] if self.joined else []:
            held = tensor.detach().contiguous()
            self._exchange(dist.broadcast, held, src=0)
            tensor.detach().copy_(held)

    def require_equal(self, facts: dict[str, Any], advice: str) -> None:
        """Raise ConfigError unless all ranks have the same facts, as rank 0 has them.

        Args:
            facts: values by what messages call them.
            advice: how to fix it.
        """
        every = self.gathered(facts)
        for rank, own in enumerate(every):
            for what in every[0] | own:
                if own.get(what) != (first := every[0].get(what)):
                    raise ConfigError(
                        f"{what} of rank {rank} is {own.get(what)} and that of rank 0 is {first}; {advice}"
                    )

    def _exchange(self, collective: Callable[..., object], *arguments: Any, **options: Any) -> None:
        try:
            collective(*arguments, **options)
        except RuntimeError as error:
            ignore_requests()  # torchrun now stops this process, too, which has to say something first
            known = self.failure(TIME_TO_REPORT)
            detail = re.sub(r"^\[[^]]*\]\s*", "", first_line(error)).partition(". ")[0]
            raise RankLost(
                known or f"another process of this run has ended or cannot be reached ({detail})"
            ) from error

    # how a failure is reported

    def failure(self, seconds: float = 0.0) -> str:
        """What a process that failed has said; "" if none says anything for so many seconds."""
        until = time.monotonic() + seconds
        while True:
            with suppress(RuntimeError):  # the store may have ended with the process that held it
                if self.store.check(["failure"]):
                    return self.store.get("failure").decode()
            if time.monotonic() >= until:
                return ""
            time.sleep(0.05)

    def is_first_failure(self, message: str) -> bool:
        """Whether no other process has reported a failure yet; this process then has to report its own."""
        if not self.joined:
            return True
        if not self.first and self.failure(TIME_OF_FIRST):
            return False
        try:
            if self.store.add("failures", 1) > 1:
                return False
            self.store.set("failure", message)
        except RuntimeError:
            return self.first
        return True

    # devices

    def own_device(self, device: torch.device) -> torch.device:
        """The device of this process: each rank of a machine has a GPU of its own.

        Raises:
            ConfigError: a GPU is named by its index, or the machine has fewer GPUs than processes.
        """
        if not self.joined or device.type != "cuda":
            return device
        if device.index is not None and self.count > 1:
            raise ConfigError(
                f"hardware.device={device}: every process of torchrun has a GPU of its own; choose "
                "hardware=gpu"
            )
        local, visible = int(os.environ["LOCAL_RANK"]), torch.cuda.device_count()
        if visible > 1 and local >= visible:
            raise ConfigError(
                f"this machine has {visible} GPUs, too few for a process with LOCAL_RANK={local}; start "
                f"torchrun with --nproc-per-node {visible}"
            )
        # Where each process sees one GPU only, as under Slurm with --gpus-per-task, it is number 0.
        return torch.device("cuda", local if visible > 1 else 0)

    def check_devices(self, device: torch.device) -> None:
        """Raise ConfigError if ranks have different kinds of devices, or share a GPU."""
        if not self.joined:
            return
        self.require_equal({"the kind of device": device.type}, "choose hardware=cpu or hardware=gpu for all")
        if device.type == "cuda":
            one = (socket.gethostname(), str(torch.cuda.get_device_properties(device).uuid))
            if len(set(self.gathered(one))) < self.count:
                raise ConfigError(
                    "several processes have the same GPU; start torchrun with --nproc-per-node set to the "
                    "number of GPUs, or choose hardware=cpu"
                )


_current = Ranks()
unreached = False  # whether this process could not connect with the others


def current() -> Ranks:
    """The processes of this command."""
    return _current


def start() -> Ranks:
    """Connect with the other processes that torchrun has started, by Gloo for CPUs and NCCL for GPUs.

    Raises:
        ConfigError: the environment is not complete, or the processes cannot be reached.
    """
    global _current, unreached
    if _current.joined:
        return _current
    missing = [name for name in VARIABLES if not os.environ.get(name)]
    if missing:
        found = next(name for name in VARIABLES if os.environ.get(name))
        raise ConfigError(
            f"the environment sets {found} but not {', '.join(missing)}; for one process unset {found}, "
            "for several start `torchrun --nproc-per-node N -m metarun ...`, which sets all of them"
        )
    check_numbers()
    if not dist.is_available():
        raise ConfigError("this build of PyTorch has no torch.distributed; install another, or unset RANK")
    gpus = torch.cuda.is_available() and dist.is_nccl_available()
    where = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
    try:
        with ended_by_signals():
            store, rank, count = next(dist.rendezvous("env://", timeout=TIME_TO_CONNECT))
            store = dist.PrefixStore("metarun", store)
            dist.init_process_group(
                "cpu:gloo,cuda:nccl" if gpus else "gloo", store=store, rank=rank, world_size=count
            )
    except (RuntimeError, ValueError) as error:
        unreached = True
        raise ConfigError(
            f"rank {os.environ['RANK']} cannot connect with the others by {where}: {first_line(error)}; "
            "check RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT, which torchrun sets"
        ) from error
    _current = Ranks(rank, count, store)
    atexit.register(stop)
    return _current


def check_numbers() -> None:
    """Raise ConfigError unless the variables of torchrun that are numbers have possible values."""
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_PORT"):
        if not os.environ[name].isdecimal():
            raise ConfigError(f"{name}={os.environ[name]}: must be a whole number, as torchrun sets it")
    rank, count = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    if rank >= count:
        raise ConfigError(f"RANK={rank}: must be below WORLD_SIZE={count}, as torchrun sets it")


@contextmanager
def ended_by_signals() -> Iterator[None]:
    """A context in which a signal ends the process: Python's handlers wait until PyTorch has connected."""
    main = threading.current_thread() is threading.main_thread()  # Python changes handlers only there
    numbers = (signal.SIGINT, signal.SIGTERM) if main else ()
    before = {number: signal.signal(number, signal.SIG_DFL) for number in numbers}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)


def stop() -> None:
    """Disconnect from the other processes."""
    global _current
    if _current.joined:
        dist.destroy_process_group()
        _current = Ranks()
