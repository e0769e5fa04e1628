"""ResNet-18, with torchvision's ImageNet weights if wanted."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Literal
from urllib.error import URLError

import torch
from torch import Tensor, nn

from metarun.errors import ConfigError, first_line
from metarun.nn.layers import Norm, Residual, convolution, initialise_convolutions, norm_layer, require_images


class ResNet18(nn.Sequential):
    """He et al. 2016, as torchvision has it, without its classifier.

    `stem="imagenet"` begins with a strided 7x7 convolution and max pooling; `"small"` with a 3x3
    convolution, for images that would soon be gone (He et al., section 4.2); `"auto"` is small under
    64 pixels. `weights`, "imagenet" or the path of such a file, are loaded by `load_weights`; inputs in
    [0, 1] are then normalised as they were for these, and one channel is repeated.
    """

    def __init__(
        self,
        item_shape: tuple[int, ...],
        width: int = 64,
        stem: Literal["auto", "small", "imagenet"] = "auto",
        weights: str | None = None,
        norm: Norm = "batch",
    ) -> None:
        channels, height, side = require_images("resnet18", item_shape, least=8)
        if stem == "auto":
            stem = "small" if weights is None and min(height, side) < 64 else "imagenet"
        if weights is not None:
            check_weights(weights, width, stem, norm, channels)
        begin: list[nn.Module] = [ImageNetInput()] if weights is not None else []
        begin += stem_layers(stem, channels if weights is None else 3, width, norm)
        widths = [width * 2 ** (i // 2) for i in range(8)]  # two blocks a stage
        blocks = [block(widths[max(i - 1, 0)], widths[i], norm) for i in range(8)]
        super().__init__(*begin, *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten())
        initialise_convolutions(self)
        self.features, self.weights = widths[-1], weights

    def load_weights(self) -> None:
        """Start from `weights`, where there are any. Raises ConfigError where they cannot be had."""
        if self.weights is None:
            return
        try:
            self.load_state_dict(own_names(read_weights(self.weights), self))
        except (RuntimeError, AttributeError, TypeError):  # other weights, or none at all
            raise ConfigError(
                f"backbone.weights={self.weights}: not the weights of torchvision's ResNet-18; "
                "choose others, or backbone.weights=null"
            ) from None


def stem_layers(stem: Literal["small", "imagenet"], channels: int, width: int, norm: Norm) -> list[nn.Module]:
    """What comes before the blocks."""
    if stem == "small":
        return [convolution(channels, width), norm_layer(norm, width), nn.ReLU()]
    first = convolution(channels, width, kernel=7, stride=2)
    return [first, norm_layer(norm, width), nn.ReLU(), nn.MaxPool2d(3, 2, padding=1)]


def block(inputs: int, width: int, norm: Norm) -> nn.Sequential:
    """Two 3x3 convolutions; a wider block halves the image."""
    stride = 1 if inputs == width else 2
    body = nn.Sequential(
        convolution(inputs, width, stride=stride),
        norm_layer(norm, width),
        nn.ReLU(),
        convolution(width, width),
        norm_layer(norm, width),
    )
    if stride == 1:
        return nn.Sequential(Residual(body), nn.ReLU())
    shortcut = nn.Sequential(convolution(inputs, width, 1, stride), norm_layer(norm, width))
    return nn.Sequential(Residual(body, shortcut), nn.ReLU())


class ImageNetInput(nn.Module):
    """Images in [0, 1], grey or of three colours, normalised as torchvision's weights expect."""

    mean: Tensor
    deviation: Tensor

    def __init__(self) -> None:
        super().__init__()
        for name, values in (("mean", (0.485, 0.456, 0.406)), ("deviation", (0.229, 0.224, 0.225))):
            self.register_buffer(name, torch.tensor(values).view(3, 1, 1), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """x [B, 1 or 3, H, W]: [B, 3, H, W]."""
        return (x - self.mean) / self.deviation


def check_weights(weights: str, width: int, stem: str, norm: Norm, channels: int) -> None:
    """Raise ConfigError where the network is not one that ImageNet's weights fit."""
    if norm != "running":
        raise ConfigError(
            f"backbone.weights={weights}: they come with running averages; choose norm=running, not {norm}"
        )
    if stem != "imagenet":
        raise ConfigError(
            f"backbone.weights={weights}: they have another stem; choose backbone.stem=imagenet"
        )
    if width != 64:
        raise ConfigError(f"backbone.weights={weights}: they have another width; choose backbone.width=64")
    if channels not in (1, 3):
        raise ConfigError(
            f"backbone.weights={weights}: they are for images of 1 or 3 channels, not {channels}; "
            "choose backbone.weights=null"
        )


def read_weights(weights: str) -> Mapping[str, Tensor]:
    """ImageNet's, downloaded once and checked by torchvision; or those of a file."""
    from torchvision.models import ResNet18_Weights

    published = ResNet18_Weights.IMAGENET1K_V1
    try:
        if weights == "imagenet":
            return published.get_state_dict(check_hash=True, weights_only=True, map_location="cpu")
        return torch.load(Path(weights).expanduser(), map_location="cpu", weights_only=True)
    except Exception as error:  # of the network, of the disk, of a damaged file
        remedy = (
            f"check the network, or get {published.url} some other way and set backbone.weights=FILE"
            if weights == "imagenet"
            else "name a .pth file that holds a state_dict, or backbone.weights=imagenet"
        )
        reason = error.reason if isinstance(error, URLError) else first_line(error)
        raise ConfigError(f"backbone.weights={weights}: {reason}; {remedy}") from error


def own_names(state: Mapping[str, Tensor], network: ResNet18) -> dict[str, Tensor]:
    """Torchvision's weights by the names that they have in `network`, which come in the same order."""
    from torchvision.models import resnet18

    with torch.device("meta"):
        theirs = [name for name in resnet18().state_dict() if not name.startswith("fc.")]
    names = dict(zip(theirs, network.state_dict(), strict=True))
    return {names.get(name, name): p for name, p in state.items() if not name.startswith("fc.")}
