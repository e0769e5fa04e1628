"""The four-block convolutional network of few-shot learning (Vinyals et al. 2016)."""

from __future__ import annotations

import math
from typing import Literal

from torch import nn

from metarun.errors import ConfigError
from metarun.nn.layers import Norm, feature_count, norm_layer, require_images


class Conv4(nn.Sequential):
    """Four blocks of 3x3 convolution, normalisation, ReLU and downsampling by 2.

    Args:
        item_shape: passed by the builder: [C, H, W].
        width: channels of every convolution.
        downsample: "max_pool" pools 2x2 after the ReLU and flattens the last feature map
            (Vinyals et al.). "stride" is MAML's Omniglot network: the convolutions have stride 2
            instead, which is a quarter of the computation, and the last feature map is averaged.
        norm: the kind of normalisation.
        halvings: how many of the blocks downsample, the first ones; less than 4 keeps larger feature maps,
            for methods that compare them.

    Attributes:
        map_shape: the shape [C, H, W] of the feature maps before they are flattened.

    Raises:
        ConfigError: if the images are too small.
    """

    def __init__(
        self,
        item_shape: tuple[int, ...],
        width: int = 64,
        downsample: Literal["max_pool", "stride"] = "max_pool",
        norm: Norm = "batch",
        halvings: int = 4,
    ) -> None:
        channels, height, side = require_images("conv4", item_shape)
        if not 0 <= halvings <= 4:
            raise ConfigError(f"backbone.halvings={halvings}: must be 0 to 4, at most one for each block")
        least = 2**halvings
        if min(height, side) < least:
            times = "four times" if halvings == 4 else f"{halvings} times"
            raise ConfigError(
                f"backbone=conv4: halves images {times}, so they must be at least {least}x{least}, not "
                f"{height}x{side}; lower backbone.halvings, or choose larger images"
            )
        strides = downsample == "stride"
        blocks = []
        for i in range(4):
            halves = i < halvings
            layers = [
                nn.Conv2d(
                    width if i else channels, width, 3, stride=2 if strides and halves else 1, padding=1
                ),
                norm_layer(norm, width),
                nn.ReLU(),
            ]
            blocks.append(nn.Sequential(*layers, *([nn.MaxPool2d(2)] if halves and not strides else [])))
        last = [nn.AvgPool2d((math.ceil(height / least), math.ceil(side / least)))] if strides else []
        super().__init__(*blocks, *last, nn.Flatten())
        self.features = feature_count(self, item_shape)
        self.map_shape = (width, 1, 1) if strides else (width, height // least, side // least)
