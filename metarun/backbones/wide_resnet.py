"""Wide residual networks."""

from __future__ import annotations

from torch import nn

from metarun.errors import ConfigError
from metarun.nn.layers import Norm, Residual, convolution, initialise_convolutions, norm_layer, require_images


class WideResNet(nn.Sequential):
    """WRN-depth-width (Zagoruyko and Komodakis 2016, table 1), 28-10 in few-shot learning.

    Three groups of pre-activation blocks of two 3x3 convolutions, with 16, 32 and 64 times `width`
    filters; the second and third group halve the image, and the last feature map is averaged.
    So it is in S2M2 (Mangla et al. 2020), and in LEO (Rusu et al. 2019), which trains it beforehand and
    keeps its features. `drop_rate` is of dropout between a block's convolutions (section 2.4).
    """

    def __init__(
        self,
        item_shape: tuple[int, ...],
        depth: int = 28,
        width: int = 10,
        drop_rate: float = 0.0,
        norm: Norm = "batch",
    ) -> None:
        channels, *_ = require_images("wrn28_10", item_shape, least=8)
        if depth < 10 or depth % 6 != 4:
            raise ConfigError(f"backbone.depth={depth}: must be 10, 16, 22, 28 or another 6 more")
        layers: list[nn.Module] = [convolution(channels, 16)]
        inputs = 16
        for stride, outputs in ((1, 16 * width), (2, 32 * width), (2, 64 * width)):
            for i in range((depth - 4) // 6):
                layers += block(inputs, outputs, 1 if i else stride, drop_rate, norm)
                inputs = outputs
        end = [norm_layer(norm, inputs), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()]
        super().__init__(*layers, *end)
        initialise_convolutions(self)
        self.features = inputs


def block(inputs: int, outputs: int, stride: int, drop_rate: float, norm: Norm) -> list[nn.Module]:
    """Each convolution comes after normalisation and activation; so does the shortcut where widths differ."""
    activated = [norm_layer(norm, inputs), nn.ReLU()]
    body = [
        convolution(inputs, outputs, stride=stride),
        norm_layer(norm, outputs),
        nn.ReLU(),
        nn.Dropout(drop_rate),
        convolution(outputs, outputs),
    ]
    if inputs == outputs:
        return [Residual(nn.Sequential(*activated, *body))]
    return [*activated, Residual(nn.Sequential(*body), convolution(inputs, outputs, 1, stride))]
