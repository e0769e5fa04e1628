"""Layers and checks that convolutional backbones have in common."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from metarun.errors import ConfigError
from metarun.nn import double_backward
from metarun.nn.task_norm import TaskNorm, task_norms

Norm = Literal[
    "batch", "batch_shift", "running", "group", "layer", "instance", "task", "task_layer", "support", "none"
]
NORMS: tuple[type[nn.Module], ...] = (nn.modules.batchnorm._BatchNorm, nn.GroupNorm, TaskNorm)


def norm_layer(norm: Norm, channels: int) -> nn.Module:
    """A normalisation layer for maps [B, C, H, W], by name.

    Args:
        norm: "batch": the statistics of the current batch, also in evaluation; predictions are transductive.
            "batch_shift": the same with a learned shift alone, that of MAML's code (`ShiftNorm`).
            "running": running averages in evaluation (not for weights adapted per task).
            "group" (8 groups), "layer", "instance": the statistics of each image. "task", "task_layer":
            TaskNorm-I and TaskNorm-L, those of the support and of each image. "support": MetaBN, those of the
            support alone. "none": the identity.
        channels: C.

    Raises:
        ConfigError: for norm="group" if C is not a multiple of 8.
    """
    match norm:
        case "batch":
            return nn.BatchNorm2d(channels, track_running_stats=False)
        case "batch_shift":
            return ShiftNorm(channels)
        case "running":
            return nn.BatchNorm2d(channels)
        case "group":
            if channels % 8:
                raise ConfigError(f"norm=group needs a multiple of 8 channels, not {channels}")
            return nn.GroupNorm(8, channels)
        case "layer":
            return nn.GroupNorm(1, channels)
        case "instance":
            return nn.GroupNorm(channels, channels)
        case "task":
            return TaskNorm(channels, "instance")
        case "task_layer":
            return TaskNorm(channels, "layer")
        case "support":
            return TaskNorm(channels, None)
        case "none":
            return nn.Identity()


def without_support(norm: Norm) -> Norm:
    """The norm of layers whose batches have no support: of TaskNorm, the part of each example alone.

    MetaBN has no such part; it becomes layer norm.
    """
    alone: dict[Norm, Norm] = {"task": "instance", "task_layer": "layer", "support": "layer"}
    return alone.get(norm, norm)


def normalises_batches(module: nn.Module) -> bool:
    """Whether training normalises by statistics of the batch: batch norm of any kind, or TaskNorm."""
    return any(
        getattr(part, "uses_batch_statistics", False)
        or isinstance(part, (nn.modules.batchnorm._BatchNorm, TaskNorm))
        for part in module.modules()
    )


def uses_batch_statistics(network: nn.Module) -> bool:
    """Whether evaluation does so too: a prediction depends on the other examples (transductive)."""
    return any(
        getattr(module, "uses_batch_statistics", False)
        or (isinstance(module, nn.modules.batchnorm._BatchNorm) and module.running_mean is None)
        for module in network.modules()
    )


def relates_examples(network: nn.Module) -> bool:
    """Whether evaluation normalises an example by others of its batch, queries or the support."""
    return uses_batch_statistics(network) or bool(task_norms(network))


def require_images(name: str, item_shape: tuple[int, ...], least: int = 1) -> tuple[int, int, int]:
    """Check that items are images of sufficient size.

    Args:
        name: the backbone's name, for the message.
        item_shape: [C, H, W] if items are images.
        least: smallest height and width that the backbone takes.

    Returns:
        Channels, height and width.

    Raises:
        ConfigError: if items are not images, or are too small.
    """
    if len(item_shape) != 3:
        raise ConfigError(
            f"backbone={name} takes images, and this dataset's items have shape {tuple(item_shape)}; "
            "choose backbone=mlp"
        )
    channels, height, width = item_shape
    if min(height, width) < least:
        raise ConfigError(
            f"backbone={name} needs images of at least {least}x{least}, and these are {height}x{width}; "
            "choose backbone=omniglot_cnn or mlp"
        )
    return channels, height, width


def convolution(inputs: int, outputs: int, kernel: int = 3, stride: int = 1) -> nn.Conv2d:
    """A convolution of a residual network: without bias, padded so that only the stride changes the size."""
    return nn.Conv2d(inputs, outputs, kernel, stride, padding=kernel // 2, bias=False)


def initialise_convolutions(network: nn.Module) -> None:
    """Normal weights of variance 2 / fan-out (He et al. 2015, section 2.2), as in residual networks."""
    for layer in network.modules():
        if isinstance(layer, nn.Conv2d):
            nn.init.kaiming_normal_(layer.weight, mode="fan_out")


class Residual(nn.Module):
    """body(x) + shortcut(x); the shortcut is x itself by default (He et al. 2016, equations 1 and 2).

    `join` combines the branches. Branches that are layers with a grouped form, or nn.Sequentials of them,
    run on many tasks at once in that form (metarun.nn.per_task).
    """

    def __init__(self, body: nn.Module, shortcut: nn.Module | None = None) -> None:
        super().__init__()
        self.body = body
        self.shortcut = shortcut or nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return self.join(self.body(x), self.shortcut(x))

    @staticmethod
    def join(body: Any, shortcut: Any) -> Any:
        """The output of the block for those of its branches."""
        return body + shortcut


class Joined(Residual):
    """The features [B, F] of the shortcut and of the body, side by side."""

    @staticmethod
    def join(body: Tensor, shortcut: Tensor) -> Tensor:
        """[B, F + F'], or [T, B, F + F'] of T tasks."""
        return torch.cat([shortcut, body], -1)


def feature_count(network: nn.Module, item_shape: tuple[int, ...]) -> int:
    """The number of features of one example of shape `item_shape`, found by running the network."""
    training = network.training
    with torch.no_grad():
        features = network.eval()(torch.zeros(2, *item_shape)).shape[1]
    network.train(training)
    return features


class FiLM(nn.Module):
    """Channels scaled and shifted by a task's context (CAVIA, Zintgraf et al. 2019, equations 3 and 4).

    The context starts as zeros and is adapted by each task; its effect on the channels is meta-learned.
    Feature maps are scaled and shifted. Vectors are only shifted, which equals a context appended to the
    input of the linear layer before.

    Args:
        channels: C, or the number of features of a vector.
        size: numbers in the context.
        inputs: for vectors, the number of inputs of the linear layer before; it sets the range of the
            initial weights. None: for feature maps.
    """

    def __init__(self, channels: int, size: int, inputs: int | None = None) -> None:
        super().__init__()
        self.context = nn.Parameter(torch.zeros(size), requires_grad=False)
        if inputs is None:
            first = nn.Linear(size, 2 * channels)
            self.weight = first.weight
            self.bias: nn.Parameter | None = first.bias
        else:
            first = nn.Linear(inputs + size, channels)
            self.weight = nn.Parameter(first.weight[:, inputs:].detach().clone())
            self.bias = None

    def forward(self, x: Tensor) -> Tensor:
        """x [B, C, H, W] or [B, features], by the module's own weights."""
        own = {name: p.unsqueeze(0) for name, p in self.named_parameters()}
        return self.on_tasks(own, x, 1) if x.dim() == 4 else self.on_tasks(own, x.unsqueeze(0), 1)[0]

    def on_tasks(self, own: dict[str, Tensor], x: Tensor, tasks: int) -> Tensor:
        """x [B, T*C, H, W] or [T, B, features], by the weights `own` [T, *shape] of each task."""
        to = torch.einsum("tcn,tn->tc", own["weight"], own["context"])  # [T, C] or [T, 2C]
        if self.bias is None:
            return x + to.unsqueeze(1)
        scale, shift = (to + own["bias"]).chunk(2, 1)
        if x.dim() == 4:
            return x * scale.reshape(1, -1, 1, 1) + shift.reshape(1, -1, 1, 1)
        return x * scale.unsqueeze(1) + shift.unsqueeze(1)


class ShiftNorm(nn.BatchNorm2d):
    """Batch norm by batch statistics, without a gain, and with a shift that no task adapts.

    It is `tf.contrib.layers.batch_norm` with its defaults, as in MAML's code (Finn et al. 2017): the shift is
    a variable beside the adapted weights, so that it is meta-learned. Where the meta-gradient is one of the
    weights that tasks adapt alone (Reptile, iMAML), it stays 0.

    Args:
        channels: C.
        eps: added to variances.
    """

    def __init__(self, channels: int, eps: float = 1e-3) -> None:
        super().__init__(channels, eps, affine=False, track_running_stats=False)
        self.shift = Shift(channels)

    def forward(self, x: Tensor) -> Tensor:
        return self.shift(super().forward(x))

    def on_tasks(self, own: dict[str, Tensor], x: Tensor, tasks: int) -> Tensor:
        """x [B, T*C, H, W], each task by its own statistics."""
        return (
            double_backward.batch_norm(x, None, None, self.eps) + self.shift.bias.repeat(tasks)[:, None, None]
        )


class Shift(nn.Module):
    """A number for each channel that is added to its maps, the same for all tasks."""

    shared_by_tasks = True

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(channels))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.bias[:, None, None]


class StepNorm(nn.Module):
    """Batch norm with statistics and affine weights for each inner step (MAML++, section 4).

    The attribute `step` is set before a forward pass and selects the rows.

    Args:
        channels: C.
        affine: rows of affine weights, one for each step; or 1, the same for all steps.
        statistics: rows of running averages, used in evaluation; training normalises by the batch. 0: no
            averages, evaluation normalises by the batch too.
        eps: added to variances.
        momentum: share of a task's statistics in the averages, as in nn.BatchNorm2d.

    Why on_tasks and forward differ: with T tasks in the channels, statistics per channel are statistics per
    task, and the one set of averages [C], shared by all tasks, can be updated from all of them in order.
    """

    mean: Tensor
    variance: Tensor

    def __init__(
        self, channels: int, affine: int, statistics: int, eps: float, momentum: float = 0.1
    ) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(affine, channels))
        self.bias = nn.Parameter(torch.zeros(affine, channels))
        self.uses_batch_statistics = statistics == 0
        self.register_buffer("mean", torch.zeros(statistics, channels))
        self.register_buffer("variance", torch.ones(statistics, channels))
        self.eps, self.momentum, self.step = eps, momentum, 0

    def forward(self, x: Tensor) -> Tensor:
        """x [B, C, H, W] by the module's own weights. A loop over tasks and torch.vmap call this method.

        Raises:
            ConfigError: in training with averages, which `on_tasks` alone updates, for all tasks in one call.
                Under vmap an update would write a tensor of every task into one buffer.
        """
        if self.training and not self.uses_batch_statistics:
            raise ConfigError(
                "algorithm.step_statistics=true needs a backbone that is a chain of plain layers, and "
                "hardware.batching=auto, grouped or unfold"
            )
        weight, bias = self.at_step(self.weight), self.at_step(self.bias)
        if self.uses_batch_statistics:
            # Not double_backward.batch_norm, which has no vmap rule.
            return F.batch_norm(x, None, None, weight, bias, True, 0.0, self.eps)
        return self.by_averages(x, weight, bias)

    def on_tasks(self, own: dict[str, Tensor], x: Tensor, tasks: int) -> Tensor:
        """x [B, T*C, H, W] by weights [T, rows, C] of each task, and by each task's own statistics."""
        weight, bias = (self.at_step(own[key], dim=1).flatten() for key in ("weight", "bias"))
        if self.uses_batch_statistics:
            return double_backward.batch_norm(x, weight, bias, self.eps)
        return self.by_batch(x, weight, bias, tasks) if self.training else self.by_averages(x, weight, bias)

    def at_step(self, rows: Tensor, dim: int = 0) -> Tensor:
        """The row of the current step. Steps beyond the last row, of a longer test, use the last one."""
        return rows.select(dim, min(self.step, rows.shape[dim] - 1))

    def by_averages(self, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        """x [B, T*C, H, W] normalised by the averages of the step, with weight and bias [T*C]."""
        mean, variance = self.at_step(self.mean), self.at_step(self.variance)
        tasks = len(weight) // len(mean)
        scale = weight * (variance.repeat(tasks) + self.eps).rsqrt()
        shift = bias - mean.repeat(tasks) * scale
        return x * scale.view(-1, 1, 1) + shift.view(-1, 1, 1)

    def by_batch(self, x: Tensor, weight: Tensor, bias: Tensor, tasks: int) -> Tensor:
        """x [B, T*C, H, W] normalised by each task's statistics, which the averages of the step move towards.

        One task after the other, so that the averages do not depend on how many tasks run at once.
        """
        averages = self.at_step(self.mean), self.at_step(self.variance)
        statistics = averages[0].repeat(tasks), averages[1].repeat(tasks)
        y = double_backward.batch_norm(x, weight, bias, self.eps, statistics)
        for average, of_tasks in zip(averages, statistics, strict=True):
            move_average(average, of_tasks.view(tasks, -1), self.momentum)
        return y


def move_average(average: Tensor, towards: Tensor, share: float) -> None:
    """Update a running average [C] in place by each row of `towards` [T, C] in turn.

    The same as `average = (1 - share) * average + share * row` in a loop over rows, but the number of
    operations does not depend on T: row t is scaled down by the T - 1 - t rows that come after it.
    """
    tasks = len(towards)
    later = torch.arange(tasks - 1, -1, -1, device=towards.device)
    shares = share * (1 - share) ** later.to(towards.dtype)
    average.mul_((1 - share) ** tasks)
    # Not a product of matrices, which autocast would round to bf16.
    average.add_((shares.unsqueeze(1) * towards).sum(0))


def is_called(layer: nn.Module) -> bool:
    """Whether its network calls it: `nn.MultiheadAttention` reads the weights of its last layer instead."""
    return not isinstance(layer, nn.modules.linear.NonDynamicallyQuantizableLinear)


def replace_layers(network: nn.Module, new: Callable[[nn.Module], nn.Module | None]) -> None:
    """Replace every layer of the network, in place, for which `new(layer)` is not None."""
    for parent in list(network.modules()):
        for name, layer in list(parent.named_children()):
            if (other := new(layer)) is not None:
                setattr(parent, name, other)
