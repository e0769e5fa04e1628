"""The network of R2D2 (Bertinetto et al. 2019): four blocks, whose last two feature maps are joined."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from metarun.errors import ConfigError, check_least
from metarun.nn.layers import Joined, Norm, feature_count, norm_layer, require_images


class Conv4Joined(nn.Sequential):
    """Blocks of 3x3 convolution, normalisation, 2x2 max pooling and leaky ReLU; dropout ends the last two.

    As in the authors' code (bertinetto/r2d2, `RRFeatures`), the pooling of the last block has stride 1. The
    features are those of the third block, pooled likewise, and those of the last block: 2 x 576 of images of
    32x32 with 64 filters.

    Args:
        item_shape: passed by the builder: [C, H, W].
        widths: channels of the four blocks.
        slope: of the leaky ReLU for negative numbers, at least 0.
        drop_rate: the share that dropout drops.
        norm: the kind of normalisation.

    Raises:
        ConfigError: if a setting is outside of its range, or the images are too small.
    """

    def __init__(
        self,
        item_shape: tuple[int, ...],
        widths: Sequence[int] = (64, 64, 64, 64),
        slope: float = 0.1,
        drop_rate: float = 0.4,
        norm: Norm = "batch",
    ) -> None:
        channels, *_ = require_images("conv4_joined", item_shape, least=16)
        if len(widths) != 4:
            raise ConfigError(f"backbone.widths={list(widths)}: must be four numbers, one for each block")
        if not 0 <= drop_rate < 1:
            raise ConfigError(f"backbone.drop_rate={drop_rate}: must be at least 0 and below 1")
        check_least("backbone", 0, slope=slope)
        first, second, third, last = (
            nn.Sequential(
                nn.Conv2d(inputs, outputs, 3, padding=1),
                norm_layer(norm, outputs),
                nn.MaxPool2d(2, stride=1 if i == 3 else 2),
                nn.LeakyReLU(slope),
                *([nn.Dropout(drop_rate)] if i >= 2 else []),
            )
            for i, (inputs, outputs) in enumerate(zip((channels, *widths), widths, strict=False))
        )
        ends = nn.Sequential(last, nn.Flatten()), nn.Sequential(nn.MaxPool2d(2, stride=1), nn.Flatten())
        super().__init__(first, second, third, Joined(*ends))
        self.features = feature_count(self, item_shape)
