"""Where the tasks of several processes are combined: gradients, figures and buffers."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from metarun.inner_loops.adam import CarriedMoment
from metarun.training.parallel import Ranks


class SharedGradient:
    """Adds up the ranks' shares of a gradient.

    Running averages (of a batch norm, of the moments of `inner_loop.carry=true`) are combined as if the tasks
    had updated them one after the other. Other floating point buffers move by the mean of the ranks' changes,
    weighted by their tasks, and counters by the sum of the changes.

    Args:
        ranks: the processes.
        module: its buffers are combined, those that a checkpoint has.
        params: what the gradient is of.
        tasks: the number of tasks of a step.
    """

    def __init__(self, ranks: Ranks, module: nn.Module, params: Sequence[Tensor], tasks: int) -> None:
        self.ranks, self.params, self.tasks, self.share = ranks, params, tasks, ranks.share(tasks)
        self.own = self.share.stop - self.share.start
        self.before: dict[Tensor, Tensor] = {}
        self.used: list[bool] = []
        saved = module.state_dict(keep_vars=True).values() if ranks.joined else []
        buffers = [each for each in saved if not isinstance(each, nn.Parameter)]
        self.buffers = [each for each in buffers if each.dtype != torch.bool]
        self.averages: dict[Tensor, tuple[float, Tensor]] = {}  # the momentum and the counter of each
        for layer in module.modules() if ranks.joined else []:
            self.averages |= averages_of(layer)

    def begin(self) -> None:
        """Note the buffers; called before the share of a step is computed."""
        self.before = {each: each.clone() for each in self.buffers}

    def any_failed(self, grads: Sequence[Tensor | None] | None) -> bool:
        """Whether any rank has failed to compute its share; if so, what the others changed is undone.

        Args:
            grads: this rank's share, in which a weight that the loss does not depend on has None; None: it
                has failed.
        """
        flags = [False] * len(self.params) if grads is None else [grad is not None for grad in grads]
        failed, *self.used = self.ranks.any(grads is None, *flags)
        if failed:
            for each, before in self.before.items():
                each.copy_(before)
        return failed

    def combined(self, grads: Sequence[Tensor | None], figures: Tensor) -> tuple[list[Tensor | None], Tensor]:
        """The sums over ranks of gradients, in which None counts as zero, and of figures."""
        if not self.ranks.joined:
            return list(grads), figures
        own = [
            torch.zeros_like(p) if grad is None else grad
            for p, grad, used in zip(self.params, grads, self.used, strict=True)
            if used
        ]
        *sums, figures = self.ranks.sum([*own, *map(self.part_of_buffer, self.buffers), figures])
        for each, total in zip(self.buffers, sums[len(own) :], strict=True):
            each.copy_(total if each in self.averages else self.before[each] + total)
        rest = iter(sums)
        return [next(rest) if used else None for used in self.used], figures

    def part_of_buffer(self, buffer: Tensor) -> Tensor:
        """This rank's part in a running average, or in the change of another buffer."""
        before = self.before[buffer]
        if buffer not in self.averages:
            change = torch.where(buffer == before, 0, buffer - before)  # of an infinite constant, zero
            return change * (self.own / self.tasks) if buffer.is_floating_point() else change
        momentum, counter = self.averages[buffer]
        each = (counter - self.before[counter]) // self.own  # updates of a task

        def kept(tasks: int) -> Tensor:
            """The factor by which the updates of some tasks scale what was averaged before them."""
            return torch.pow(1 - momentum, (each * tasks).to(buffer.dtype))

        part = kept(self.tasks - self.share.stop) * (buffer - kept(self.own) * before)
        return part + kept(self.tasks) * before if self.ranks.first else part


def averages_of(layer: nn.Module) -> dict[Tensor, tuple[float, Tensor]]:
    """The running averages of a layer that forget exponentially: the momentum and the counter of each."""
    if isinstance(layer, CarriedMoment):
        return dict.fromkeys(layer.averages.values(), (1 - layer.beta2, layer.steps))
    if isinstance(layer, nn.modules.batchnorm._BatchNorm) and layer.momentum is not None:
        averages, counter = (layer.running_mean, layer.running_var), layer.num_batches_tracked
        if counter is not None:
            return {each: (layer.momentum, counter) for each in averages if each is not None}
    return {}
