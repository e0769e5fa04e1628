"""The few-shot ResNet-12 and DropBlock."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from metarun.errors import ConfigError
from metarun.nn.layers import Norm, Residual, convolution, initialise_convolutions, norm_layer, require_images


class ResNet12(nn.Sequential):
    """Four residual blocks of three 3x3 convolutions, each of which downsamples by 2.

    From SNAIL (Mishra et al. 2018) and TADAM (Oreshkin et al. 2018); widths and regularisation
    are MetaOptNet's (Lee et al. 2019): dropout after the first two blocks, DropBlock after the
    last two.

    Departure: pooling comes before the activation, which is equivalent.

    Args:
        item_shape: passed by the builder: [C, H, W].
        widths: channels of the four blocks.
        drop_rate: the share that dropout and DropBlock drop.
        block_size: the side of the squares that DropBlock drops, in pixels of the feature map.
        ramp: the number of iterations in which the rate of DropBlock rises from 0 to `drop_rate`.
        pool: whether the last feature map is averaged; MetaOptNet flattens it (`false`: 16000 features of
            84x84 images).
        norm: the kind of normalisation.
    """

    unread: ClassVar = dict.fromkeys(("ramp", "block_size"), ("drop_rate=0", "drop_rate=0.0"))

    def __init__(
        self,
        item_shape: tuple[int, ...],
        widths: Sequence[int] = (64, 160, 320, 640),
        drop_rate: float = 0.1,
        block_size: int = 5,
        ramp: int = 0,
        pool: bool = True,
        norm: Norm = "batch",
    ) -> None:
        channels, height, side = require_images("resnet12", item_shape, least=16)
        if len(widths) != 4:
            raise ConfigError(f"backbone.widths={list(widths)}: must be four numbers, one for each block")
        if not 0 <= drop_rate < 1:
            raise ConfigError(f"backbone.drop_rate={drop_rate}: must be at least 0 and below 1")
        if block_size < 1:
            raise ConfigError(f"backbone.block_size={block_size}: must be at least 1")
        if ramp < 0:
            raise ConfigError(f"backbone.ramp={ramp}: must be at least 0")
        blocks = []
        for i, (inputs, width) in enumerate(zip((channels, *widths), widths, strict=False)):
            drop = nn.Dropout(drop_rate) if i < 2 else DropBlock(drop_rate, block_size, ramp)
            blocks.append(nn.Sequential(*block(inputs, width, norm), drop))
        end = [nn.AdaptiveAvgPool2d(1)] if pool else []
        super().__init__(*blocks, *end, nn.Flatten())
        initialise_convolutions(self)
        self.map_shape = (widths[-1], 1, 1) if pool else (widths[-1], height // 16, side // 16)
        self.features = math.prod(self.map_shape)


def block(inputs: int, width: int, norm: Norm) -> list[nn.Module]:
    """The layers of a residual block that downsamples by 2."""
    body: list[nn.Module] = []
    for i in range(3):
        body += [convolution(width if i else inputs, width), norm_layer(norm, width), nn.LeakyReLU(0.1)]
    shortcut = nn.Sequential(convolution(inputs, width, kernel=1), norm_layer(norm, width))
    return [Residual(nn.Sequential(*body[:-1]), shortcut), nn.MaxPool2d(2), nn.LeakyReLU(0.1)]


class DropBlock(nn.Module):
    """Sets squares of each feature map to zero in training (Ghiasi, Lin and Le 2018, algorithm 1).

    The remaining activations are divided by the share that remains, separately for each task.

    Args:
        rate: the approximate share that is dropped (squares may overlap).
        block_size: the side of a square; the side of the feature map, if that is smaller.
        ramp: the number of iterations in which the rate rises linearly from 0; 0: it is constant.
    """

    reached: Tensor

    def __init__(self, rate: float, block_size: int = 5, ramp: int = 0) -> None:
        super().__init__()
        if not 0 <= rate < 1:
            raise ValueError(f"rate={rate}: must be at least 0 and below 1")
        if block_size < 1:
            raise ValueError(f"block_size={block_size}: must be at least 1")
        self.rate, self.block_size, self.ramp = rate, block_size, ramp
        # The share of the rate that is reached, a tensor so that it can change in a recorded step.
        self.register_buffer("reached", torch.zeros(()) if ramp else None, persistent=False)

    def at_iteration(self, iteration: int) -> None:
        """Called before every outer step."""
        if self.ramp:
            self.reached.fill_(min((iteration + 1) / self.ramp, 1))

    def forward(self, x: Tensor) -> Tensor:
        """x [B, C, H, W]."""
        return self.on_tasks({}, x, 1)

    def on_tasks(self, own: dict[str, Tensor], x: Tensor, tasks: int) -> Tensor:
        """x [B, T*C, H, W], scaled for each task separately."""
        if not self.training or self.rate == 0:
            return x
        mask = self.mask(x).unflatten(1, (tasks, -1))  # [B, T, C, H, W]
        share = mask.mean((0, 2, 3, 4)).clamp_min(1e-12)  # [T]; a small map may be dropped entirely
        return x * (mask / share.view(-1, 1, 1, 1)).flatten(1, 2).to(x.dtype)

    def mask(self, x: Tensor) -> Tensor:
        """A mask [B, C, H, W] for x [B, C, H, W]: 0 where x is dropped, else 1.

        Squares lie completely within the map and are sampled at the rate of equation 1.
        """
        height, width = x.shape[2:]
        size = min(self.block_size, height, width)
        starts = (height - size + 1) * (width - size + 1)
        rate = self.rate / size**2 * (height * width) / starts
        limit = rate * self.reached if self.ramp else rate
        # Always in float32: uniform numbers in half precision are too coarse for a small rate.
        uniform = torch.rand_like(x[:, :, size - 1 :, size - 1 :], dtype=torch.float32)
        corners = F.pad((uniform < limit).float(), (size - 1,) * 4)
        return 1 - F.max_pool2d(corners, size, stride=1)
