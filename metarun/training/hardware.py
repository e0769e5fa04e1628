"""Device, precision, memory limits and compilation settings."""

from __future__ import annotations

import contextlib
import ctypes
import os
import platform
import re
import sys
from collections.abc import Callable, Iterator
from typing import Literal, TypeVar

import torch
from torch import nn

from metarun.errors import ConfigError, counted
from metarun.nn.per_task import TaskBatching
from metarun.training import parallel

Module = TypeVar("Module", bound=nn.Module)

# Limits in bytes, tuned on a CPU: the fastest number of tasks at once with a peak memory below 1.5 times that
# of a sequential loop (docs/speed.md). Small tasks run in groups within CPU_BYTES_OF_SMALL; large tasks at
# most three at once, within CPU_BYTES_OF_LARGE.
CPU_SMALL_TASK, CPU_BYTES_OF_SMALL, CPU_BYTES_OF_LARGE = 16 << 20, 256 << 20, 384 << 20
THREADS_PER_CPU = 16  # more threads than this for each CPU are a mistake; the system may not have so many
TINY_TASK = 1 << 20  # bytes; hardware.compile=auto traces tasks up to this size
GPU_SHARE_OF_IMAGES = 0.5  # images may use this share of the free GPU memory; the rest is for training
PACKAGES = ("metarun", "torch", "torchvision", "numpy", "timm", "transformers", "gymnasium", "mujoco")
GPU_SHARE = 0.8  # tasks may use this share; measuring one task does not include all overheads


class Hardware:
    """The settings of group `hardware`, resolved for this machine.

    Args:
        device: "auto" (the GPU if there is one), "cpu", "cuda" or "cuda:INDEX".
        precision: "float32"; "tf32" (float32 with TensorFloat-32 matrix products, GPU only); "bf16"
            (autocast; too coarse for second-order meta-gradients); "float64" (for checks).
        tasks_at_once: the number of tasks in one forward pass. A meta-batch is split into chunks of this size
            and their gradients are added: the same gradient, with less memory. "auto" measures the memory of
            one task and chooses.
        threads: the number of CPU threads; None: PyTorch's default, and one for tiny tasks.
        compile: True compiles the meta-gradient by TorchInductor. "auto" only traces it, which takes half a
            second, and only for tiny tasks on a CPU, where the overhead of Python dominates. False does
            neither.
        graph: whether an outer step is captured as a CUDA graph (GPU only).
        batching: how networks with per-task weights are run; see metarun.nn.per_task.
        channels_last: the memory layout of images in networks with per-task weights; see metarun.nn.per_task.
        images: where the images of a split are kept: on the "device", or in "host" memory, from which each
            meta-batch is copied. "auto": on the device, unless they exceed half of the free GPU memory.

    Attributes:
        ranks: the processes that share the tasks of this command.

    Raises:
        ConfigError: if a setting is invalid or not available on this machine.
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
        self.ranks = parallel.current()
        self.device = self.ranks.own_device(resolve_device(device))
        if self.device.type == "cpu":
            keep_freed_memory()
        elif self.device.index is not None:
            torch.cuda.set_device(self.device)  # streams and graphs belong to the current device
        self.precision = precision
        if precision == "tf32" and self.device.type != "cuda":
            raise ConfigError("hardware.precision=tf32: needs a GPU; choose hardware.precision=float32")
        self.dtype = torch.float64 if precision == "float64" else torch.float32
        if isinstance(tasks_at_once, int) and tasks_at_once < 1:
            raise ConfigError(f"hardware.tasks_at_once={tasks_at_once}: must be at least 1, or auto")
        self._tasks_at_once = tasks_at_once
        self.images = images
        self.compile, self.graph = compile, graph
        self.batching = TaskBatching(batching, channels_last)
        self.threads = threads
        if threads is not None:
            most = THREADS_PER_CPU * (os.cpu_count() or 1)
            if not 1 <= threads <= most:
                raise ConfigError(f"hardware.threads={threads}: must be from 1 to {most} on this machine")
            torch.set_num_threads(threads)

    def keeps_on_host(self, size: int) -> bool:
        """Whether images of `size` bytes are kept in host memory, from which each meta-batch is copied."""
        if self.images != "auto" or self.device.type != "cuda":
            return self.images == "host"
        return size > GPU_SHARE_OF_IMAGES * torch.cuda.mem_get_info(self.device)[0]

    def tasks_at_once(self, tasks: int, bytes_of_one: Callable[[], int]) -> int:
        """The number of tasks in one forward pass.

        Args:
            tasks: the most tasks, for example the meta-batch.
            bytes_of_one: measures the peak memory of one task, in bytes. Called only if the setting is
                "auto".
        """
        if self._tasks_at_once != "auto":
            return min(tasks, int(self._tasks_at_once))
        need = max(bytes_of_one(), 1)
        if self.device.type == "cuda":
            torch.cuda.empty_cache()  # memory that PyTorch caches for reuse also counts as free
            fit = int(GPU_SHARE * torch.cuda.mem_get_info(self.device)[0]) // need
        elif need <= CPU_SMALL_TASK:
            fit = CPU_BYTES_OF_SMALL // need
        else:
            fit = min(3, CPU_BYTES_OF_LARGE // need)
        return max(1, min(tasks, fit))

    def traces(self, bytes_of_one: Callable[[], int]) -> bool:
        """Whether to run the meta-gradient from a trace, which avoids the overhead of Python and autograd.

        Args:
            bytes_of_one: measures the peak memory of one task, in bytes.
        """
        return self.compile == "auto" and self.device.type == "cpu" and bytes_of_one() <= TINY_TASK

    def spare_threads(self, say: Callable[[str], object]) -> None:
        """Use one CPU thread until the end of `compute`, unless the number was set: more are not faster."""
        if self.threads is None and torch.get_num_threads() > 1:
            torch.set_num_threads(1)
            say("one CPU thread for tiny tasks")

    def place(self, module: Module) -> Module:
        """Move a module to the device and dtype, and set how its networks run per-task weights."""
        for part in module.modules():
            if isinstance(getattr(part, "batching", None), TaskBatching):
                part.batching = self.batching  # type: ignore[assignment]
        return module.to(device=self.device, dtype=self.dtype)

    @contextlib.contextmanager
    def forked_random(self):
        """A context that restores the global random state on exit."""
        with torch.random.fork_rng([self.device] if self.device.type == "cuda" else []):
            yield

    def random_states(self) -> list[torch.Tensor]:
        """The state of the global random numbers of the CPU and of the GPU, if one is used."""
        gpu = [torch.cuda.get_rng_state(self.device)] if self.device.type == "cuda" else []
        return [torch.get_rng_state(), *gpu]

    def without_autocast(self) -> contextlib.AbstractContextManager:
        """A context that disables autocast; it does nothing unless the precision is bf16."""
        if self.precision != "bf16":
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, enabled=False)

    def captures_optimizer(self, optimizer: torch.optim.Optimizer) -> bool:
        """Whether a CUDA graph can contain a step of this optimizer."""
        return all(group.get("capturable", group.get("fused")) for group in optimizer.param_groups)

    @contextlib.contextmanager
    def compute(self):
        """A context that sets the precision; on exit, the settings of the process are restored."""
        with contextlib.ExitStack() as stack:
            stack.enter_context(threads_of_process())
            if self.device.type == "cuda":
                stack.enter_context(tensor_float_32(self.precision == "tf32"))
                stack.enter_context(deterministic_convolutions())
            if self.precision == "bf16":
                # The cache of autocast would return the weights of the first step in all later steps.
                stack.enter_context(torch.autocast(self.device.type, torch.bfloat16, cache_enabled=False))
            yield

    def unused(self) -> str:
        """How to use the other GPUs of this machine; "" if there are none, or one was chosen."""
        several = self.device.type == "cuda" and self.device.index is None and torch.cuda.device_count() > 1
        if self.ranks.joined or not several:
            return ""
        count = torch.cuda.device_count()
        return f"1 of {count} GPUs is used; `torchrun --nproc-per-node {count} -m metarun ...` uses all"

    def describe(self) -> str:
        """The device and the precision in one line, for messages."""
        name = torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else "CPU"
        threads = f" ({counted(torch.get_num_threads(), 'thread')})" if name == "CPU" else ""
        processes = f", {self.ranks.count} processes" if self.ranks.count > 1 else ""
        return f"{name}{threads}, {self.precision}{processes}"

    def facts(self) -> dict[str, str]:
        """The machine, the device and the versions of the packages in use, for the record of a run."""
        versions = {name: str(getattr(sys.modules.get(name), "__version__", "")) for name in PACKAGES}
        return {
            "device": self.describe(),
            "processor": f"{processor()}, {counted(os.cpu_count() or 1, 'core')}",
            "system": f"{platform.system()} {platform.release()}",
            "Python": platform.python_version(),
            **{name: version for name, version in versions.items() if version},
        }


@contextlib.contextmanager
def threads_of_process() -> Iterator[None]:
    """A context that restores the number of CPU threads on exit, for later jobs of a sweep, or a program."""
    before = torch.get_num_threads()
    try:
        yield
    finally:
        if torch.get_num_threads() != before:
            torch.set_num_threads(before)


def processor() -> str:
    """The name of the CPU, or of its architecture where the system does not tell."""
    with contextlib.suppress(OSError), open("/proc/cpuinfo", encoding="utf-8", errors="replace") as file:
        if found := re.search(r"^model name\s*: (.+)$", file.read(), re.MULTILINE):
            return found[1]
    return platform.processor() or platform.machine()


@contextlib.contextmanager
def tensor_float_32(allowed: bool) -> Iterator[None]:
    """A context in which float32 products are computed with TensorFloat-32, or in full precision."""
    before = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    torch.set_float32_matmul_precision("high" if allowed else "highest")
    torch.backends.cudnn.allow_tf32 = allowed
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before[0])
        torch.backends.cudnn.allow_tf32 = before[1]


@contextlib.contextmanager
def deterministic_convolutions() -> Iterator[None]:
    """A context in which cuDNN adds up gradients in a fixed order, so that a resumed run is bit-exact."""
    before = torch.backends.cudnn.deterministic
    torch.backends.cudnn.deterministic = True
    try:
        yield
    finally:
        torch.backends.cudnn.deterministic = before


def keep_freed_memory() -> None:
    """Make glibc keep freed blocks for reuse instead of returning them to the system immediately.

    Every outer step frees and allocates the same large activations; new pages for each cost up
    to a third of the CPU time.
    """
    m_trim_threshold, m_mmap_threshold = -1, -3  # malloc.h
    with contextlib.suppress(OSError, AttributeError, TypeError):  # the C library is not glibc
        mallopt = ctypes.CDLL(None).mallopt
        if not mallopt(m_mmap_threshold, 1 << 30):
            mallopt(m_mmap_threshold, 32 << 20)  # the maximum in some versions
        mallopt(m_trim_threshold, (1 << 31) - 1)


def resolve_device(name: str) -> torch.device:
    """The device of this name; "auto" is the GPU if there is one. Raises ConfigError if not available."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ConfigError(f"hardware.device={name}: not a device; choose auto, cpu or cuda") from None
    if device.type not in ("cpu", "cuda"):
        raise ConfigError(f"hardware.device={name}: not supported; choose auto, cpu or cuda")
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ConfigError(
            f"hardware.device={name}: PyTorch {torch.__version__} finds no GPU on this machine; "
            "choose hardware=auto or hardware=cpu"
        )
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ConfigError(
            f"hardware.device={name}: this machine has {torch.cuda.device_count()} GPUs, counted from 0; "
            "choose hardware=auto or another index"
        )
    return device
