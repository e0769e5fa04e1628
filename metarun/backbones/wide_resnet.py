"""Wide residual networks."""

from __future__ import annotations

from torch import nn

from metarun.errors import ConfigError
from metarun.nn.layers import Norm, Residual, convolution, initialise_convolutions, norm_layer, require_images


class WideResNet(nn.Sequential):
    """WRN-depth-width (Zagoruyko and Komodakis 2016, table 1); WRN-28-10 is used in few-shot learning.

    Three groups of pre-activation blocks of two 3x3 convolutions, with 16, 32 and 64 times `width`
    channels; the second and third group downsample by 2, and the last feature map is averaged.
    S2M2 (Mangla et al. 2020) uses this network, and so does LEO (Rusu et al. 2019), which pretrains it and
    keeps its features.

    Args:
        item_shape: passed by the builder: [C, H, W].
        depth: the number of layers, 6 n + 4.
        width: the widening factor.
        drop_rate: the rate of dropout between the convolutions of a block (section 2.4).
        norm: the kind of normalisation.
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
            raise ConfigError(f"backbone.depth={depth}: must be 10, 16, 22, 28, ... (6 n + 4)")
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
    """A pre-activation block: normalisation and ReLU precede each convolution and a shortcut with weights."""
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
