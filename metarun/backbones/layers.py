"""What convolutional backbones share."""

from __future__ import annotations

from typing import Literal

import torch
from torch import nn

from metarun.errors import ConfigError

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


def require_images(name: str, item_shape: tuple[int, ...]) -> tuple[int, int, int]:
    """The item's channels, height and width; ConfigError where items are no images."""
    if len(item_shape) != 3:
        raise ConfigError(
            f"backbone={name} takes images, and this dataset's items have shape {tuple(item_shape)}; "
            "choose backbone=mlp"
        )
    channels, height, width = item_shape
    return channels, height, width


def feature_count(network: nn.Module, item_shape: tuple[int, ...]) -> int:
    """The number of features of one example, found by running one."""
    training = network.training
    with torch.no_grad():
        features = network.eval()(torch.zeros(2, *item_shape)).shape[1]
    network.train(training)
    return features
