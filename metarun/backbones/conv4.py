"""The four-block convolutional network of few-shot learning (Vinyals et al. 2016)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from torch import nn

from metarun.errors import ConfigError, check_least, counted
from metarun.nn.layers import Norm, feature_count, norm_layer, require_images

BLOCKS = 4  # by default


class Conv4(nn.Sequential):
    """Blocks of 3x3 convolution, normalisation, ReLU and downsampling by 2.

    Args:
        item_shape: passed by the builder: [C, H, W].
        width: channels of every convolution.
        downsample: "max_pool" pools 2x2 after the ReLU (Vinyals et al.). "stride": the convolutions have
            stride 2 instead, which is a quarter of the computation (MAML, Reptile and iMAML on Omniglot).
        norm: the kind of normalisation.
        halvings: how many of the blocks downsample, the first ones; less than 4 keeps larger feature maps,
            for methods that compare them.
        slope: of a leaky ReLU for negative numbers, at least 0; 0: ReLU.
        padding: pixels of zeros around the input of each block, one number for each: 1 keeps the size of the
            maps, 0 takes 2 pixels from it. There are as many blocks as numbers.
        pool: whether the last feature map is averaged; false: flattened, as by Reptile and iMAML. None: with
            downsample="stride" alone, as in MAML's network.

    Attributes:
        map_shape: the shape [C, H, W] of the feature maps before they are flattened.

    Raises:
        ConfigError: if a setting is outside of its range, or the images are too small.
    """

    def __init__(
        self,
        item_shape: tuple[int, ...],
        width: int = 64,
        downsample: Literal["max_pool", "stride"] = "max_pool",
        norm: Norm = "batch",
        halvings: int = 4,
        slope: float = 0.0,
        padding: Sequence[int] = (1, 1, 1, 1),
        pool: bool | None = None,
    ) -> None:
        channels, *sides = require_images("conv4", item_shape)
        check_settings(halvings, slope, list(padding))
        check_size(sides, halvings)
        strides = downsample == "stride"
        blocks = []
        for i, zeros in enumerate(padding):
            halves = i < halvings
            stride = 2 if strides and halves else 1
            layers = [
                nn.Conv2d(width if i else channels, width, 3, stride=stride, padding=zeros),
                norm_layer(norm, width),
                nn.LeakyReLU(slope) if slope else nn.ReLU(),
            ]
            sides = [(side + 2 * zeros - 3) // stride + 1 for side in sides]
            if halves and not strides:
                layers.append(nn.MaxPool2d(2))
                sides = [side // 2 for side in sides]
            if min(sides) < 1:
                raise ConfigError(
                    f"backbone.padding={list(padding)}: leaves nothing of images of {item_shape[1]}x"
                    f"{item_shape[2]} in block {i + 1}; choose 1 for it, or larger images"
                )
            blocks.append(nn.Sequential(*layers))
        averages = strides if pool is None else pool
        last = [nn.AvgPool2d((sides[0], sides[1]))] if averages else []
        super().__init__(*blocks, *last, nn.Flatten())
        self.features = feature_count(self, item_shape)
        self.map_shape = (width, 1, 1) if averages else (width, sides[0], sides[1])


def check_settings(halvings: int, slope: float, padding: Sequence[int]) -> None:
    """Raise ConfigError if a setting is outside of its range."""
    blocks = len(padding)
    if not blocks or min(padding) < 0:
        raise ConfigError(f"backbone.padding={padding}: must be a number of at least 0 for each block")
    if blocks < halvings <= BLOCKS:
        raise ConfigError(
            f"backbone.padding={padding}: has a number for {counted(blocks, 'block')}, and {halvings} blocks "
            f"halve; name one for each block, as in {[1] * BLOCKS}, or set backbone.halvings={blocks}"
        )
    if not 0 <= halvings <= blocks:
        raise ConfigError(
            f"backbone.halvings={halvings}: must be 0 to {blocks}, the number of blocks (of backbone.padding)"
        )
    check_least("backbone", 0, slope=slope)


def check_size(sides: Sequence[int], halvings: int) -> None:
    """Raise ConfigError if images are too small to be halved so often."""
    least = 2**halvings
    if min(sides) < least:
        times = "four times" if halvings == 4 else f"{halvings} times"
        raise ConfigError(
            f"backbone=conv4: halves images {times}, so they must be at least {least}x{least}, not "
            f"{sides[0]}x{sides[1]}; lower backbone.halvings, or choose larger images"
        )
