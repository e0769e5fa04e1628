"""Random numbers that belong to tasks, such as the order of their examples or noise of their weights.

A task has the same numbers however many tasks run at once, and where processes share the tasks of a step as
in a single process: those of all tasks are drawn, from the same generator, and each task takes its own.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from metarun.tasks.episodes import Tasks, UnequalEpisodes


class TaskNumbers:
    """The numbers of the tasks of one step, or of one evaluation, of which this process runs a part.

    Args:
        tasks: the number of all tasks.
        generator: the same in all processes, on the CPU; None: that of the device of the tasks.
        on_gpu: whether the numbers of a generator are also those of tasks on a GPU, to which they are copied.
            If not, tasks on a GPU have numbers of its generator, which depend on how many tasks run at once.

    Attributes:
        drawn: the numbers of all tasks, one entry for each time that a task asks for some.
    """

    def __init__(self, tasks: int, generator: torch.Generator | None, on_gpu: bool = False) -> None:
        self.tasks, self.generator, self.on_gpu = tasks, generator, on_gpu
        self.drawn: list[Tensor] = []
        self.first = self.calls = 0

    def has(self, device: torch.device) -> bool:
        """Whether they are the numbers of tasks on this device."""
        return self.generator is None or self.on_gpu or device.type == "cpu"

    def next(self, tasks: int, length: int, device: torch.device) -> Tensor:
        """The next numbers of the tasks from number `first` on, [tasks, length]."""
        if self.calls == len(self.drawn):
            place = device if self.generator is None else "cpu"
            self.drawn.append(torch.rand(self.tasks, length, generator=self.generator, device=place))
        self.calls += 1
        return self.drawn[self.calls - 1][self.first : self.first + tasks].to(device)


_current: TaskNumbers | None = None


@contextmanager
def drawn_from(numbers: TaskNumbers | None, first: int, tasks: Tasks) -> Iterator[None]:
    """A context for the code that runs tasks.

    Args:
        numbers: where their numbers come from; None: the generator of the process.
        first: the number of the first of these tasks among all.
        tasks: the tasks. Those of unequal shapes need unequal amounts of numbers, which processes cannot draw
            for each other.
    """
    global _current
    before = _current
    _current = None if isinstance(tasks, UnequalEpisodes) else numbers
    if numbers is not None:
        numbers.first, numbers.calls = first, 0
    try:
        yield
    finally:
        _current = before


def uniform(tasks: int, length: int, device: torch.device) -> Tensor:
    """Uniform random numbers [T, L] in [0, 1) for the T tasks that are run."""
    if _current is None or not _current.has(device):
        return torch.rand(tasks, length, device=device)
    return _current.next(tasks, length, device)


def normal(tasks: int, length: int, device: torch.device) -> Tensor:
    """Standard normal random numbers [T, L] for the T tasks that are run; see `uniform`."""
    least = 2.0**-25  # half of the smallest positive uniform number in float32
    numbers = uniform(tasks, length, device)
    return torch.special.ndtri(numbers.double().clamp(least, 1 - least)).to(numbers.dtype)


def noise_like(x: Tensor) -> Tensor:
    """Standard normal random numbers like x [T, ...] of the T tasks that are run."""
    return normal(len(x), x[0].numel(), x.device).view_as(x).to(x.dtype)


def dropped(x: Tensor, share: float) -> Tensor:
    """x [T, ...] of the T tasks that are run, with a share of its numbers dropped and the others scaled."""
    kept = uniform(len(x), x[0].numel(), x.device).view_as(x) >= share
    return x * kept / (1 - share)
