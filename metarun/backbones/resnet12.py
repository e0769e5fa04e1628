"""The few-shot ResNet-12 and DropBlock."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from metarun.errors import ConfigError
from metarun.nn.layers import Norm, Residual, convolution, initialise_convolutions, norm_layer, require_images


class ResNet12(nn.Sequential):
    """Four residual blocks of three 3x3 convolutions, each block halving the image.

    From SNAIL (Mishra et al. 2018) and TADAM (Oreshkin et al. 2018); widths and regularisation
    are MetaOptNet's (Lee et al. 2019): dropout after the first two blocks, DropBlock after the
    last two, each dropping a share `drop_rate`. `pool` averages the last feature map; MetaOptNet
    flattens it (`false`: 16000 features of 84x84 images).

    Departures: the rate of DropBlock is constant, where MetaOptNet's code raises it from 0 in its
    first 40,000 batches. Pooling comes before the activation, which gives the same.
    """

    def __init__(
        self,
        item_shape: tuple[int, ...],
        widths: Sequence[int] = (64, 160, 320, 640),
        drop_rate: float = 0.1,
        block_size: int = 5,
        pool: bool = True,
        norm: Norm = "batch",
    ) -> None:
        channels, height, side = require_images("resnet12", item_shape, least=16)
        if len(widths) != 4:
            raise ConfigError(f"backbone.widths={list(widths)}: must be four numbers, one for each block")
        blocks = []
        for i, (inputs, width) in enumerate(zip((channels, *widths), widths, strict=False)):
            drop = nn.Dropout(drop_rate) if i < 2 else DropBlock(drop_rate, block_size)
            blocks.append(nn.Sequential(*block(inputs, width, norm), drop))
        end = [nn.AdaptiveAvgPool2d(1)] if pool else []
        super().__init__(*blocks, *end, nn.Flatten())
        initialise_convolutions(self)
        self.map_shape = (widths[-1], 1, 1) if pool else (widths[-1], height // 16, side // 16)
        self.features = math.prod(self.map_shape)


def block(inputs: int, width: int, norm: Norm) -> list[nn.Module]:
    """A residual block that halves the image, up to its activation."""
    body: list[nn.Module] = []
    for i in range(3):
        body += [convolution(width if i else inputs, width), norm_layer(norm, width), nn.LeakyReLU(0.1)]
    shortcut = nn.Sequential(convolution(inputs, width, kernel=1), norm_layer(norm, width))
    return [Residual(nn.Sequential(*body[:-1]), shortcut), nn.MaxPool2d(2), nn.LeakyReLU(0.1)]


class DropBlock(nn.Module):
    """Squares of each feature map set to zero in training (Ghiasi, Lin and Le 2018, algorithm 1).

    `rate` is about the share that is dropped (squares may overlap). What is left is scaled up by the
    share that is left, of each task by itself. Squares are smaller where the map is.
    """

    def __init__(self, rate: float, block_size: int = 5) -> None:
        super().__init__()
        if not 0 <= rate < 1:
            raise ValueError(f"drop_rate={rate}: must be at least 0 and below 1")
        if block_size < 1:
            raise ValueError(f"block_size={block_size}: must be at least 1")
        self.rate, self.block_size = rate, block_size

    def forward(self, x: Tensor) -> Tensor:
        """x [B, C, H, W]."""
        return self.on_tasks({}, x, 1)

    def on_tasks(self, own: dict[str, Tensor], x: Tensor, tasks: int) -> Tensor:
        """x [B, T*C, H, W], with squares of each task's own."""
        if not self.training or self.rate == 0:
            return x
        kept = self.kept(x).unflatten(1, (tasks, -1))  # [B, T, C, H, W]
        share = kept.mean((0, 2, 3, 4)).clamp_min(1e-12)  # [T]; a tiny map may be dropped whole
        return x * (kept / share.view(-1, 1, 1, 1)).flatten(1, 2).to(x.dtype)

    def kept(self, x: Tensor) -> Tensor:
        """1 where x [B, C, H, W] stays and 0 where it is dropped, of x's shape.

        Squares begin where they lie wholly within the map, at the rate of equation 1.
        """
        height, width = x.shape[2:]
        size = min(self.block_size, height, width)
        starts = (height - size + 1) * (width - size + 1)
        rate = self.rate / size**2 * (height * width) / starts
        # Never in half precision, whose uniform numbers are too coarse for a small rate.
        uniform = torch.rand_like(x[:, :, size - 1 :, size - 1 :], dtype=torch.float32)
        begins = F.pad((uniform < rate).float(), (size - 1,) * 4)
        return 1 - F.max_pool2d(begins, size, stride=1)
