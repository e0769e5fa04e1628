"""Images less the mean of each channel, divided by its deviation, as the first layer of a network."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from metarun.backbones.resnet18 import ImageNetInput
from metarun.errors import ConfigError
from metarun.nn.per_task import Params
from metarun.tasks.class_store import ClassStore
from metarun.tasks.source import EpisodeSource
from metarun.tasks.spec import TaskSpec

AT_ONCE = 1024  # images whose sums are computed at once


class InputNorm(ImageNetInput):
    """The layer that `normalise=` puts before a backbone.

    Images stay in [0, 1] everywhere else: they are augmented, drawn and read from files as without it. The
    numbers are buffers of the network, which a checkpoint, an adapted model and an exported one contain.

    Args:
        spec: passed by the builder.
        mean, deviation: of each channel, of images in [0, 1]; None: those of all training images.

    Raises:
        ConfigError: examples are not images, or the numbers do not fit them.
    """

    independent = True

    def __init__(
        self,
        spec: TaskSpec,
        mean: Sequence[float] | None = None,
        deviation: Sequence[float] | None = None,
    ) -> None:
        if spec.kind != "images":
            raise ConfigError(f"normalise: is for images, and this dataset has {spec.kind}; leave it out")
        if (mean is None) != (deviation is None):
            raise ConfigError("normalise: set both mean and deviation, or neither of them")
        self.of_training = mean is None or deviation is None
        channels = spec.item_shape[0]
        chosen = {"mean": mean or [0.0] * channels, "deviation": deviation or [1.0] * channels}
        for name, values in chosen.items():
            if len(values) != channels:
                raise ConfigError(
                    f"normalise.{name}={list(values)}: has {len(values)} numbers, and images have {channels} "
                    f"channel{'s' * (channels > 1)}; choose normalise=train"
                )
        if min(chosen["deviation"]) <= 0:
            raise ConfigError(f"normalise.deviation={list(chosen['deviation'])}: must be above 0")
        super().__init__(**chosen)
        for name in chosen:  # a checkpoint contains them
            self.register_buffer(name, getattr(self, name))

    def on_tasks(self, own: Params, x: Tensor, tasks: int) -> Tensor:
        """x [B, T*C, H, W]."""
        mean, deviation = (each.repeat(tasks, 1, 1) for each in (self.mean, self.deviation))
        return (x - mean) / deviation

    def on_run_start(self, train: EpisodeSource) -> None:
        """Take the numbers of the training images, unless the settings name some."""
        if not self.of_training:
            return
        if not isinstance(train, ClassStore):
            raise ConfigError(
                f"normalise=train: {train.name} has no images that are kept; set normalise.mean and "
                "normalise.deviation"
            )
        for buffer, values in zip((self.mean, self.deviation), moments(train), strict=True):
            buffer.copy_(values.view_as(buffer))


def moments(store: ClassStore) -> tuple[Tensor, Tensor]:
    """Mean and deviation of each channel over all images of a split, float64 [C].

    The deviation of a channel that is constant is 1.
    """
    parts = []
    for items in store.items.split(AT_ONCE):
        images = store.decode(items).double()
        parts.append(torch.stack([images.sum((0, 2, 3)), images.square().sum((0, 2, 3))]))
    mean, square = torch.stack(parts).sum(0) / (len(store.items) * math.prod(store.item_shape[1:]))
    deviation = (square - mean.square()).clamp_min(0).sqrt()
    return mean, torch.where(deviation > 1e-6, deviation, 1.0)


def normalise_inputs(backbone: nn.Module, layer: InputNorm) -> None:
    """Put the layer before a network, in place, without renaming more than the layers of a chain.

    Raises:
        ConfigError: the network brings a normalisation of its own.
    """
    if any(isinstance(part, ImageNetInput) for part in backbone.modules()):
        raise ConfigError(
            f"normalise: backbone={type(backbone).__name__} normalises images as its weights need it; "
            "choose normalise=none"
        )
    if isinstance(backbone, nn.Sequential) and type(backbone).forward is nn.Sequential.forward:
        backbone.insert(0, layer)
    else:
        backbone.input_norm = layer
        backbone.register_forward_pre_hook(normalised)


def normalised(backbone: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """A hook that normalises the inputs of a network that is no chain."""
    return backbone.input_norm(inputs[0]), *inputs[1:]  # type: ignore[operator]
