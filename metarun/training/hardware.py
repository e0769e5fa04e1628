"""Where and how to compute: device, precision, tasks at once."""

from __future__ import annotations

import contextlib
import ctypes
from collections.abc import Callable
from typing import Literal, TypeVar

import torch
from torch import nn

from metarun.errors import ConfigError
from metarun.nn.per_task import TaskBatching

Module = TypeVar("Module", bound=nn.Module)

# What was fastest on a CPU without needing half as much memory again as a loop (docs/speed.md): small tasks
# by the dozen, large ones three at a time, fewer where these would not fit.
CPU_SMALL_TASK, CPU_BYTES_OF_SMALL, CPU_BYTES_OF_LARGE = 16 << 20, 256 << 20, 384 << 20
TINY_TASK = 1 << 20
GPU_SHARE_OF_IMAGES = 0.5  # of the free memory; what training needs must fit beside them
GPU_SHARE = 0.8  # of the free memory; the rest is for what measuring one task does not show


class Hardware:
    """The settings of group `hardware`, resolved for this machine.

    Precision: `float32`; `tf32` (float32 with TensorFloat-32 matrix products, GPU); `bf16`
    (autocast; too coarse for second-order meta-gradients); `float64` (for checks).
    `tasks_at_once` splits a meta-batch into chunks whose gradients are added up: the same
    gradient, in less memory; `auto` measures one task. `compile` compiles the meta-gradient; `auto`
    only traces it, in half a second, and only for tiny tasks on a CPU, where Python takes the time;
    `graph` captures an outer step as one CUDA graph (GPU). `batching` and `channels_last` say
    how per-task weights are run (metarun.nn.per_task). `images` says where a split's images are kept:
    on the device, or in host memory, from which each meta-batch is copied.
    """

    def __init__(
        self,
        device: str = "auto",
        precision: Literal["float32", "tf32", "bf16", "float64"] = "float32",
        tasks_at_once: int | Literal["auto"] = "auto",
        threads: int | None = None,
        compile: bool | Literal["auto"] = "auto",
        graph: bool = True,
        batching: Literal["auto", "grouped", "unfold", "vmap", "loop"] = "auto",
        channels_last: bool | Literal["auto"] = "auto",
        images: Literal["auto", "device", "host"] = "auto",
    ) -> None:
        self.device = resolve_device(device)
        if self.device.type == "cpu":
            keep_freed_memory()
        elif self.device.index is not None:
            torch.cuda.set_device(self.device)  # streams and graphs are the current device's
        self.precision = precision
        if precision == "tf32" and self.device.type != "cuda":
            raise ConfigError("hardware.precision=tf32 is for GPUs; choose float32")
        self.dtype = torch.float64 if precision == "float64" else torch.float32
        if isinstance(tasks_at_once, int) and tasks_at_once < 1:
            raise ConfigError(f"hardware.tasks_at_once={tasks_at_once}: must be at least 1, or auto")
        self._tasks_at_once = tasks_at_once
        self.images = images
        self.compile, self.graph = compile, graph
        self.batching = TaskBatching(batching, channels_last)
        if threads is not None:
            if threads < 1:
                raise ConfigError(f"hardware.threads={threads}: must be at least 1")
            torch.set_num_threads(threads)

    def keeps_on_host(self, size: int) -> bool:
        """Whether so many bytes of images stay in host memory, from which each meta-batch is copied."""
        if self.images != "auto" or self.device.type != "cuda":
            return self.images == "host"
        return size > GPU_SHARE_OF_IMAGES * torch.cuda.mem_get_info(self.device)[0]

    def tasks_at_once(self, tasks: int, bytes_of_one: Callable[[], int]) -> int:
        """How many of `tasks` tasks to run in one pass, when one needs `bytes_of_one()` at its peak."""
        if self._tasks_at_once != "auto":
            return min(tasks, int(self._tasks_at_once))
        need = max(bytes_of_one(), 1)
        if self.device.type == "cuda":
            torch.cuda.empty_cache()  # what is kept for reuse is free too
            fit = int(GPU_SHARE * torch.cuda.mem_get_info(self.device)[0]) // need
        elif need <= CPU_SMALL_TASK:
            fit = CPU_BYTES_OF_SMALL // need
        else:
            fit = min(3, CPU_BYTES_OF_LARGE // need)
        return max(1, min(tasks, fit))

    def traces(self, bytes_of_one: Callable[[], int]) -> bool:
        """Whether to run the meta-gradient from a trace, without Python's and autograd's overhead."""
        return self.compile == "auto" and self.device.type == "cpu" and bytes_of_one() <= TINY_TASK

    def place(self, module: Module) -> Module:
        """The module on this device, in this precision, its per-task networks run by this batching."""
        for part in module.modules():
            if isinstance(getattr(part, "batching", None), TaskBatching):
                part.batching = self.batching  # type: ignore[assignment]
        return module.to(device=self.device, dtype=self.dtype)

    @contextlib.contextmanager
    def forked_random(self):
        """Leave the global random numbers as they were."""
        with torch.random.fork_rng([self.device] if self.device.type == "cuda" else []):
            yield

    def without_autocast(self) -> contextlib.AbstractContextManager:
        """Run what is inside in the types it has; costs nothing where there is no autocast."""
        if self.precision != "bf16":
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, enabled=False)

    def captures_optimizer(self, optimizer: torch.optim.Optimizer) -> bool:
        """Whether a step of this optimizer can be part of a CUDA graph."""
        return all(group.get("capturable", group.get("fused")) for group in optimizer.param_groups)

    @contextlib.contextmanager
    def compute(self):
        """The precision, for everything inside."""
        with contextlib.ExitStack() as stack:
            if self.precision == "tf32":
                before = torch.get_float32_matmul_precision()
                torch.set_float32_matmul_precision("high")
                torch.backends.cudnn.allow_tf32 = True
                stack.callback(torch.set_float32_matmul_precision, before)
            elif self.device.type == "cuda":
                torch.backends.cudnn.allow_tf32 = False
            if self.precision == "bf16":
                # No cache: it would keep the first step's weights for as long as this context lasts.
                stack.enter_context(torch.autocast(self.device.type, torch.bfloat16, cache_enabled=False))
            yield

    def describe(self) -> str:
        """One line for people."""
        name = torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else "CPU"
        threads = f" ({torch.get_num_threads()} threads)" if name == "CPU" else ""
        return f"{name}{threads}, {self.precision}"


def keep_freed_memory() -> None:
    """Have glibc reuse freed blocks instead of returning them to the system at once.

    Every outer step frees and asks for the same large activations; fresh pages for each cost up
    to a third of a CPU's time.
    """
    m_trim_threshold, m_mmap_threshold = -1, -3  # malloc.h
    with contextlib.suppress(OSError, AttributeError, TypeError):  # not glibc
        mallopt = ctypes.CDLL(None).mallopt
        if not mallopt(m_mmap_threshold, 1 << 30):
            mallopt(m_mmap_threshold, 32 << 20)  # the most that some versions allow
        mallopt(m_trim_threshold, (1 << 31) - 1)


def resolve_device(name: str) -> torch.device:
    """`auto` is the GPU where there is one. ConfigError where one was asked for in vain."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ConfigError(f"hardware.device={name}: not a device; choose auto, cpu or cuda") from None
    if device.type not in ("cpu", "cuda"):
        raise ConfigError(f"hardware.device={name}: metarun runs on cpu and cuda")
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ConfigError(
            f"hardware.device={name}: PyTorch {torch.__version__} finds no GPU here; "
            "choose hardware=auto or hardware=cpu"
        )
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ConfigError(f"hardware.device={name}: this machine has {torch.cuda.device_count()} GPUs")
    return device
