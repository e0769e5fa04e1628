"""ResNet-18, optionally with torchvision's ImageNet weights."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal
from urllib.error import URLError

import torch
from torch import Tensor, nn

from metarun.errors import ConfigError, first_line
from metarun.nn.layers import Norm, Residual, convolution, initialise_convolutions, norm_layer, require_images
from metarun.storage.files import user_path


class ResNet18(nn.Sequential):
    """ResNet-18 (He et al. 2016) as in torchvision, without its classifier.

    Args:
        item_shape: passed by the builder: [C, H, W].
        width: channels of the first stage; each of the other three stages doubles them.
        stem: "imagenet": a 7x7 convolution with stride 2, and max pooling. "small": a 3x3 convolution, for
            small images (He et al., section 4.2). "auto": "small" for images below 64 pixels, unless
            `weights` are given.
        weights: "imagenet", or the path of a file with weights of torchvision's ResNet-18; `load_weights`
            loads them. Inputs in [0, 1] are then normalised as for ImageNet, and a single channel is
            repeated.
        norm: the kind of normalisation.

    Raises:
        ConfigError: if the weights do not fit the other settings.
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
        widths = [width * 2 ** (i // 2) for i in range(8)]  # four stages of two blocks
        blocks = [block(widths[max(i - 1, 0)], widths[i], norm) for i in range(8)]
        super().__init__(*begin, *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten())
        initialise_convolutions(self)
        self.features, self.weights = widths[-1], weights

    def load_weights(self) -> None:
        """Load `weights`, if any. Raises ConfigError if they cannot be read or do not fit."""
        if self.weights is None:
            return
        try:
            self.load_state_dict(own_names(read_weights(self.weights), self))
        except (RuntimeError, AttributeError, TypeError):  # weights of another network, or not weights
            raise ConfigError(
                f"backbone.weights={self.weights}: not the weights of torchvision's ResNet-18; "
                "choose another file, or backbone.weights=null"
            ) from None


def stem_layers(stem: Literal["small", "imagenet"], channels: int, width: int, norm: Norm) -> list[nn.Module]:
    """The layers before the residual blocks."""
    if stem == "small":
        return [convolution(channels, width), norm_layer(norm, width), nn.ReLU()]
    first = convolution(channels, width, kernel=7, stride=2)
    return [first, norm_layer(norm, width), nn.ReLU(), nn.MaxPool2d(3, 2, padding=1)]


def block(inputs: int, width: int, norm: Norm) -> nn.Sequential:
    """A residual block of two 3x3 convolutions; it downsamples by 2 if it changes the width."""
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
    """Normalises greyscale or RGB images in [0, 1], by default as torchvision's weights expect."""

    mean: Tensor
    deviation: Tensor

    def __init__(
        self,
        mean: Sequence[float] = (0.485, 0.456, 0.406),
        deviation: Sequence[float] = (0.229, 0.224, 0.225),
    ) -> None:
        super().__init__()
        for name, values in (("mean", mean), ("deviation", deviation)):
            self.register_buffer(name, torch.tensor(values).view(-1, 1, 1), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """x [B, 1 or C, H, W] -> [B, C, H, W], for C means."""
        return (x - self.mean) / self.deviation


def check_weights(weights: str, width: int, stem: str, norm: Norm, channels: int) -> None:
    """Raise ConfigError if torchvision's ImageNet weights do not fit the network."""
    if norm != "running":
        raise ConfigError(
            f"backbone.weights={weights}: they contain running averages; choose norm=running, not {norm}"
        )
    if stem != "imagenet":
        raise ConfigError(
            f"backbone.weights={weights}: they do not fit backbone.stem={stem}; choose backbone.stem=imagenet"
        )
    if width != 64:
        raise ConfigError(
            f"backbone.weights={weights}: they do not fit backbone.width={width}; choose backbone.width=64"
        )
    if channels not in (1, 3):
        raise ConfigError(
            f"backbone.weights={weights}: they are for images of 1 or 3 channels, not {channels}; "
            "choose backbone.weights=null"
        )


def read_weights(weights: str) -> Mapping[str, Tensor]:
    """The weights by torchvision's names: ImageNet's, downloaded once and verified, or those of a file."""
    from torchvision.models import ResNet18_Weights

    published = ResNet18_Weights.IMAGENET1K_V1
    try:
        if weights == "imagenet":
            return published.get_state_dict(check_hash=True, weights_only=True, map_location="cpu")
        return torch.load(user_path(weights), map_location="cpu", weights_only=True)
    except Exception as error:  # network errors, file system errors and damaged files
        remedy = (
            f"check the network, or download {published.url} by other means and set backbone.weights=FILE"
            if weights == "imagenet"
            else "name a .pth file that contains a state_dict, or set backbone.weights=imagenet"
        )
        reason = error.reason if isinstance(error, URLError) else first_line(error)
        raise ConfigError(f"backbone.weights={weights}: {reason}; {remedy}") from error


def own_names(state: Mapping[str, Tensor], network: ResNet18) -> dict[str, Tensor]:
    """Torchvision's weights renamed to the names in `network`; both list them in the same order."""
    from torchvision.models import resnet18

    with torch.device("meta"):
        theirs = [name for name in resnet18().state_dict() if not name.startswith("fc.")]
    names = dict(zip(theirs, network.state_dict(), strict=True))
    return {names.get(name, name): p for name, p in state.items() if not name.startswith("fc.")}
