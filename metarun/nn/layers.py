"""What convolutional backbones share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from metarun.errors import ConfigError
from metarun.nn import double_backward

Norm = Literal["batch", "running", "group", "layer", "instance", "none"]


def norm_layer(norm: Norm, channels: int) -> nn.Module:
    """A normalisation by name.

    `batch`: statistics of the batch at hand, always; predictions are transductive.
    `running`: running averages in evaluation (not for weights adapted per task).
    `group` (8 groups), `layer`, `instance`: statistics of each image. `none`: identity.
    """
    match norm:
        case "batch":
            return nn.BatchNorm2d(channels, track_running_stats=False)
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
        case "none":
            return nn.Identity()


def normalises_batches(module: nn.Module) -> bool:
    """Whether training normalises by the batch's statistics."""
    return any(
        getattr(part, "uses_batch_statistics", False) or isinstance(part, nn.modules.batchnorm._BatchNorm)
        for part in module.modules()
    )


def uses_batch_statistics(network: nn.Module) -> bool:
    """Whether a prediction depends on the other examples beside it (transductive)."""
    return any(
        getattr(module, "uses_batch_statistics", False)
        or (isinstance(module, nn.modules.batchnorm._BatchNorm) and module.running_mean is None)
        for module in network.modules()
    )


def require_images(name: str, item_shape: tuple[int, ...], least: int = 1) -> tuple[int, int, int]:
    """The item's channels, height and width; ConfigError where items are no images, or too small ones."""
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
    """One of a residual network: it keeps the image's size but for the stride, and has no bias."""
    return nn.Conv2d(inputs, outputs, kernel, stride, padding=kernel // 2, bias=False)


def initialise_convolutions(network: nn.Module) -> None:
    """Normal weights of variance 2 / fan-out (He et al. 2015, section 2.2), as in residual networks."""
    for layer in network.modules():
        if isinstance(layer, nn.Conv2d):
            nn.init.kaiming_normal_(layer.weight, mode="fan_out")


class Residual(nn.Module):
    """body(x) + shortcut(x), the shortcut being x itself by default (He et al. 2016, equations 1 and 2).

    Branches that are plain layers, or nn.Sequentials of them, run on many tasks at once by the
    fastest lowering (metarun.nn.per_task).
    """

    def __init__(self, body: nn.Module, shortcut: nn.Module | None = None) -> None:
        super().__init__()
        self.body = body
        self.shortcut = shortcut or nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x) + self.shortcut(x)


def feature_count(network: nn.Module, item_shape: tuple[int, ...]) -> int:
    """The number of features of one example, found by running one."""
    training = network.training
    with torch.no_grad():
        features = network.eval()(torch.zeros(2, *item_shape)).shape[1]
    network.train(training)
    return features


class FiLM(nn.Module):
    """Channels scaled and shifted by a task's context (CAVIA, Zintgraf et al. 2019, equations 3 and 4).

    The context is a vector of `size` zeros that each task adapts; what it does to the channels is
    meta-learned. Vectors are only shifted, which equals a context appended to the input of
    the linear layer before, whose number of `inputs` sets the range of the first weights.
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
        """x [B, T*C, H, W] or [T, B, features], by weights of each task."""
        to = torch.einsum("tcn,tn->tc", own["weight"], own["context"])  # [T, C] or [T, 2C]
        if self.bias is None:
            return x + to.unsqueeze(1)
        scale, shift = (to + own["bias"]).chunk(2, 1)
        if x.dim() == 4:
            return x * scale.reshape(1, -1, 1, 1) + shift.reshape(1, -1, 1, 1)
        return x * scale.unsqueeze(1) + shift.unsqueeze(1)


class StepNorm(nn.Module):
    """Batch norm with statistics and affine weights of each inner step's own (MAML++, section 4).

    `step` says which rows are used. `statistics` > 0 keeps that many rows of running averages,
    used in evaluation; training always normalises by the batch. 0: the batch's statistics always.
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
        """x [B, C, H, W], by the module's own weights; vmap and a loop over tasks come here.

        Raises ConfigError where averages are to be kept, which is done for all tasks in one place.
        """
        if self.training and not self.uses_batch_statistics:
            raise ConfigError(
                "algorithm.step_statistics=true needs a backbone that is a chain of plain layers, and "
                "hardware.batching=auto, grouped or unfold"
            )
        weight, bias = (p[min(self.step, len(p) - 1)] for p in (self.weight, self.bias))
        if self.uses_batch_statistics:
            return F.batch_norm(x, None, None, weight, bias, True, 0.0, self.eps)
        return self.by_averages(x, weight, bias)

    def on_tasks(self, own: dict[str, Tensor], x: Tensor, tasks: int) -> Tensor:
        """x [B, T*C, H, W], by weights [T, rows, C] of each task."""
        row = min(self.step, own["weight"].shape[1] - 1)
        weight, bias = own["weight"][:, row].flatten(), own["bias"][:, row].flatten()
        if self.uses_batch_statistics:
            return double_backward.batch_norm(x, weight, bias, self.eps)
        if not self.training:
            return self.by_averages(x, weight, bias)
        self.keep(x.detach().to(self.mean.dtype), tasks)
        return double_backward.batch_norm(x, weight, bias, self.eps)

    def by_averages(self, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        """x [B, T*C, H, W] normalised by the averages of the step, with weight and bias [T*C]."""
        row, tasks = min(self.step, len(self.mean) - 1), len(weight) // self.mean.shape[1]
        scale = weight * (self.variance[row].repeat(tasks) + self.eps).rsqrt()
        shift = bias - self.mean[row].repeat(tasks) * scale
        return x * scale.view(-1, 1, 1) + shift.view(-1, 1, 1)

    @torch.no_grad()
    def keep(self, x: Tensor, tasks: int) -> None:
        """Move the averages of the step towards each task's statistics, one task after the other.

        So that they do not depend on how many tasks run at once.
        """
        row = min(self.step, len(self.mean) - 1)
        variance, mean = torch.var_mean(x, (0, 2, 3), correction=1)
        move_average(self.mean[row], mean.view(tasks, -1), self.momentum)
        move_average(self.variance[row], variance.view(tasks, -1), self.momentum)


def move_average(average: Tensor, towards: Tensor, share: float) -> None:
    """What `average = (1 - share) * average + share * row` for each row of `towards` [T, C] comes to."""
    tasks = len(towards)
    later = torch.arange(tasks - 1, -1, -1, device=towards.device)  # rows that come after each
    shares = share * (1 - share) ** later.to(towards.dtype)
    average.mul_((1 - share) ** tasks)
    average.add_((shares.unsqueeze(1) * towards).sum(0))  # a product of matrices would be rounded in bf16


def replace_layers(network: nn.Module, new: Callable[[nn.Module], nn.Module | None]) -> None:
    """Put `new(layer)` in the place of every layer for which it gives one."""
    for parent in list(network.modules()):
        for name, layer in list(parent.named_children()):
            if (other := new(layer)) is not None:
                setattr(parent, name, other)
