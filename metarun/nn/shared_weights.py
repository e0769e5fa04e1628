"""One network whose weights are the same for T tasks, each task normalised by its own statistics.

In `metarun.nn.per_task` every task has weights of its own. Here the weights are shared, so all examples
form one batch [B*T, ...], and only layers that compute statistics over a batch need to know
which task an example belongs to. For these the tasks are moved into the channels, [B, T*C, H, W]:
batch norm over T*C channels then takes the statistics of each task separately. Examples are in the
order [B*T], not [T*B], because then this is a view without a copy unless feature maps are channels-last.
With channels-last maps on a CPU, one task after another is up to three times as fast: a task's feature
maps stay in the caches.
"""

from __future__ import annotations

from typing import TypeGuard

import torch.nn.functional as F
from torch import Tensor, nn

from metarun.nn.layers import ShiftNorm, move_average, normalises_batches, relates_examples
from metarun.nn.per_task import AUTO, OnTasks, TaskBatching, is_groupable, leaves, run_chain
from metarun.nn.task_norm import TaskNorm


def runs_at_once(module: nn.Module, x: Tensor, batching: TaskBatching = AUTO) -> bool:
    """Whether several tasks of x [T, B, *item] may share one forward pass, `run_shared`.

    They may not where it is slower (channels-last images), where it was turned off ("loop"), or where a
    layer would mix the statistics of tasks: one that normalises batches and that `batch_norm` does not cover.
    """
    if batching.how == "loop" or (x.dim() == 5 and batching.is_channels_last(x.device)):
        return False
    if not relates_examples(module) and not (module.training and normalises_batches(module)):
        return True
    every = leaves(module)
    known = all(
        is_batch_norm(layer) or isinstance(layer, (TaskNorm, ShiftNorm)) or not normalises_batches(layer)
        for layer in every
    )
    # The averages of a layer that is used twice would be updated in another order than task by task.
    once = len({id(layer) for layer in every}) == len(every)
    return known and once


def is_batch_norm(layer: nn.Module) -> TypeGuard[nn.BatchNorm2d]:
    """Whether this is a layer that `batch_norm` computes: with momentum=None the average is another one."""
    return type(layer) is nn.BatchNorm2d and layer.momentum is not None


def run_shared(module: nn.Module, x: Tensor, batching: TaskBatching = AUTO) -> Tensor:
    """Run one network with the same weights on T tasks.

    Args:
        module: the network. For T > 1 it must be one for which `runs_at_once` is true.
        x: each task's examples, [T, B, *item].
        batching: its memory layout is used.

    Returns:
        [T, B, *out]. In training, running averages are updated by the tasks in turn, as in a loop.

    With T > 1 in training, forward hooks of batch norms and of containers are not called.
    """
    tasks = len(x)
    y = x.transpose(0, 1).flatten(0, 1)
    if y.dim() == 4 and is_groupable(module):  # other layers may expect contiguous maps, for .view()
        y = batching.laid_out(y)
    examples_are_independent = not module.training and not relates_examples(module)
    if examples_are_independent or tasks == 1:
        y = module(y)
    else:
        y = run_chain(module, y, lambda _, layer, x: run_layer(layer, x, tasks))
    return y.unflatten(0, (-1, tasks)).transpose(0, 1)


def run_layer(layer: nn.Module, x: Tensor, tasks: int) -> Tensor:
    """A layer on x [B*T, ...], in which the statistics of each task are its own."""
    if is_batch_norm(layer) and (layer.training or layer.running_mean is None):
        return apart(batch_norm(layer, together(x, tasks), tasks), tasks)
    if isinstance(layer, OnTasks) and x.dim() == 4 and not getattr(layer, "independent", False):
        own = {name: p.expand(tasks, *p.shape) for name, p in layer.named_parameters()}
        return apart(layer.on_tasks(own, together(x, tasks), tasks), tasks)
    return layer(x)


def together(x: Tensor, tasks: int) -> Tensor:
    """[B*T, C, H, W] as [B, T*C, H, W]."""
    return x.unflatten(0, (-1, tasks)).flatten(1, 2)


def apart(x: Tensor, tasks: int) -> Tensor:
    """[B, T*C, H, W] as [B*T, C, H, W]."""
    return x.unflatten(1, (tasks, -1)).flatten(0, 1)


def batch_norm(layer: nn.BatchNorm2d, x: Tensor, tasks: int) -> Tensor:
    """x [B, T*C, H, W] by the statistics of each task; running averages are updated by the tasks in turn.

    Why not the layer itself: it has averages of C channels, and one update by statistics of all tasks'
    examples together would be another average than T updates by each task's statistics. Training would
    then depend on how many tasks run at once.
    """
    weight, bias = (None if p is None else p.repeat(tasks) for p in (layer.weight, layer.bias))
    if layer.running_mean is None or layer.running_var is None:
        return F.batch_norm(x, None, None, weight, bias, True, 0.0, layer.eps)
    assert layer.momentum is not None and layer.num_batches_tracked is not None
    mean, variance = (average.repeat(tasks) for average in (layer.running_mean, layer.running_var))
    # With a momentum of 1 the kernel replaces these copies by the statistics of x, which it computes anyway.
    y = F.batch_norm(x, mean, variance, weight, bias, True, 1.0, layer.eps)
    move_average(layer.running_mean, mean.view(tasks, -1), layer.momentum)
    move_average(layer.running_var, variance.view(tasks, -1), layer.momentum)
    layer.num_batches_tracked += tasks
    return y
