"""One network whose weights are the same for T tasks, each task normalised by its own statistics.

In `metarun.lowering` every task has weights of its own. Here only the layers that look across a
batch have to know of tasks: they see the tasks side by side in the channels, [B, T*C, H, W], which
costs no copy where the examples of all tasks take turns in the batch and feature maps are not
channels-last. Where they are, on a CPU, one task after another is up to three times as fast: its
feature maps stay in the caches.
"""

from __future__ import annotations

from typing import TypeGuard

import torch.nn.functional as F
from torch import Tensor, nn

from metarun.backbones.layers import move_average, normalises_batches, uses_batch_statistics
from metarun.lowering import AUTO, Lowering, OnTasks, is_groupable, leaves, run_chain


def runs_at_once(module: nn.Module, x: Tensor, lowering: Lowering = AUTO) -> bool:
    """Whether `run_shared` is to meet more than one task of x [T, B, *item] at once."""
    if lowering.how == "loop" or (x.dim() == 5 and lowering.is_channels_last(x.device)):
        return False
    if not uses_batch_statistics(module) and not (module.training and normalises_batches(module)):
        return True
    every = leaves(module)
    known = all(is_batch_norm(layer) or not normalises_batches(layer) for layer in every)
    once = len({id(layer) for layer in every}) == len(every)  # else its averages would take another order
    return known and once


def is_batch_norm(layer: nn.Module) -> TypeGuard[nn.BatchNorm2d]:
    """Whether this is one that `batch_norm` does the work of."""
    return type(layer) is nn.BatchNorm2d and layer.momentum is not None


def run_shared(module: nn.Module, x: Tensor, lowering: Lowering = AUTO) -> Tensor:
    """`module` on x [T, B, *item]: [T, B, *out]. Inside, examples are in the order [B*T].

    Forward hooks of batch norms and of containers are not called where several tasks are trained on.
    """
    tasks = len(x)
    y = x.transpose(0, 1).flatten(0, 1)
    if y.dim() == 4 and is_groupable(module):  # its layers take any memory layout
        y = lowering.laid_out(y)
    alone = not module.training and not uses_batch_statistics(module)  # no example knows of another
    y = (
        module(y)
        if alone or tasks == 1
        else run_chain(module, y, lambda _, layer, y: run_layer(layer, y, tasks))
    )
    return y.unflatten(0, (-1, tasks)).transpose(0, 1)


def run_layer(layer: nn.Module, x: Tensor, tasks: int) -> Tensor:
    """A layer on x [B*T, ...], in which the statistics of each task are its own."""
    if is_batch_norm(layer) and (layer.training or layer.running_mean is None):
        return apart(batch_norm(layer, together(x, tasks), tasks), tasks)
    if isinstance(layer, OnTasks) and x.dim() == 4:
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
    """x [B, T*C, H, W] by the statistics of each task; running averages take the tasks in turn."""
    weight, bias = (None if p is None else p.repeat(tasks) for p in (layer.weight, layer.bias))
    if layer.running_mean is None or layer.running_var is None:
        return F.batch_norm(x, None, None, weight, bias, True, 0.0, layer.eps)
    assert layer.momentum is not None and layer.num_batches_tracked is not None
    mean, variance = (average.repeat(tasks) for average in (layer.running_mean, layer.running_var))
    y = F.batch_norm(x, mean, variance, weight, bias, True, 1.0, layer.eps)  # leaves x's statistics in them
    move_average(layer.running_mean, mean.view(tasks, -1), layer.momentum)
    move_average(layer.running_var, variance.view(tasks, -1), layer.momentum)
    layer.num_batches_tracked += tasks
    return y
