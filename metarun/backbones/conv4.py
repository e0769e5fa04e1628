"""The four-block convolutional network of few-shot learning (Vinyals et al. 2016)."""

from __future__ import annotations

import math
from typing import Literal

from torch import nn

from metarun.backbones.layers import Norm, feature_count, norm_layer, require_images
from metarun.errors import ConfigError


class Conv4(nn.Sequential):
    """Four times: 3x3 convolution, normalisation, ReLU, halving of the image.

    `downsample="max_pool"` pools 2x2 after the ReLU and flattens the last feature map
    (Vinyals et al.). `"stride"` is MAML's Omniglot network: the convolutions stride by 2
    instead, a quarter of the work, and the last feature map is averaged.
    """

    def __init__(
        self,
        item_shape: tuple[int, ...],
        width: int = 64,
        downsample: Literal["max_pool", "stride"] = "max_pool",
        norm: Norm = "batch",
    ) -> None:
        channels, height, side = require_images("conv4", item_shape)
        if min(height, side) < 16:
            raise ConfigError(f"backbone=conv4 halves images four times; {height}x{side} is under 16x16")
        strides = downsample == "stride"
        blocks = []
        for i in range(4):
            layers = [
                nn.Conv2d(width if i else channels, width, 3, stride=2 if strides else 1, padding=1),
                norm_layer(norm, width),
                nn.ReLU(),
            ]
            blocks.append(nn.Sequential(*layers, *([] if strides else [nn.MaxPool2d(2)])))
        end = [nn.AvgPool2d((math.ceil(height / 16), math.ceil(side / 16)))] if strides else []
        super().__init__(*blocks, *end, nn.Flatten())
        self.features = feature_count(self, item_shape)
