"""The four-block convolutional network of few-shot learning (Vinyals et al. 2016)."""

from __future__ import annotations

import math
from typing import Literal

from torch import nn

from metarun.errors import ConfigError
from metarun.nn.layers import Norm, feature_count, norm_layer, require_images


class Conv4(nn.Sequential):
    """Four times: 3x3 convolution, normalisation, ReLU, halving of the image.

    `downsample="max_pool"` pools 2x2 after the ReLU and flattens the last feature map
    (Vinyals et al.). `"stride"` is MAML's Omniglot network: the convolutions stride by 2
    instead, a quarter of the work, and the last feature map is averaged. `halvings` less than 4
    leaves the last blocks at the size they get, for methods that compare feature maps.
    `map_shape` is that of the maps which the features are, [C, H, W].
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
            raise ConfigError(f"backbone.halvings={halvings}: must be 0 to 4, one of each block at most")
        least = 2**halvings
        if min(height, side) < least:
            times = "four times" if halvings == 4 else f"{halvings} times"
            raise ConfigError(
                f"backbone=conv4 halves images {times}; {height}x{side} is under {least}x{least}"
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
