"""The small network of the classic 20-way 5-shot Omniglot tutorial."""

from __future__ import annotations

from torch import nn

from metarun.nn.layers import Norm, feature_count, norm_layer, require_images


class OmniglotCNN(nn.Sequential):
    """Two 3x3 convolutions, each with 2x2 max pooling, then a hidden layer.

    Args:
        item_shape: passed by the builder: [C, H, W].
        width: channels of the convolutions.
        hidden: units of the hidden layer, the number of features.
        norm: the kind of normalisation.
    """

    def __init__(
        self, item_shape: tuple[int, ...], width: int = 64, hidden: int = 128, norm: Norm = "none"
    ) -> None:
        channels, *_ = require_images("omniglot_cnn", item_shape)
        blocks = [
            nn.Sequential(
                nn.Conv2d(inputs, width, 3, padding=1), norm_layer(norm, width), nn.ReLU(), nn.MaxPool2d(2)
            )
            for inputs in (channels, width)
        ]
        convolutions = nn.Sequential(*blocks, nn.Flatten())
        flat = feature_count(convolutions, item_shape)
        super().__init__(*convolutions, nn.Linear(flat, hidden), nn.ReLU())
        self.features = hidden
