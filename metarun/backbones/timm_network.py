"""The image networks of timm (PyTorch Image Models), optionally with pretrained weights and frozen."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from metarun.backbones.resnet18 import ImageNetInput
from metarun.errors import ConfigError, first_line
from metarun.nn.frozen import Frozen
from metarun.nn.layers import require_images
from metarun.nn.per_task import plain_attention
from metarun.storage.files import user_path

INSTALL = 'pip install "metarun[timm]"'


class TimmNetwork(nn.Sequential):
    """A network of timm without its classifier: images [B, C, H, W] in [0, 1] to features [B, features].

    Images are scaled to the size, and normalised by the mean and the deviation, that timm's config of the
    network states. A single channel is repeated. The whole image is scaled: nothing is cropped.

    Args:
        item_shape: passed by the builder: [C, H, W].
        name: of the network in timm, with or without the tag of its weights.
        weights: the path of a file with its weights: .safetensors, or what torch.save wrote. A classifier
            in it is ignored; `load_weights` loads the rest.
        pretrained: whether `load_weights` loads the weights that timm publishes under this name.
        frozen: whether the network keeps its weights and running averages. It is then in evaluation mode
            throughout, and gradient-based methods adapt the head alone.

    Raises:
        ConfigError: timm is missing or has no such network, or the settings do not fit each other.
    """

    def __init__(
        self,
        item_shape: tuple[int, ...],
        name: str,
        weights: str | None = None,
        pretrained: bool = False,
        frozen: bool = False,
    ) -> None:
        if weights is not None and pretrained:
            raise ConfigError("backbone.weights and backbone.pretrained: leave one of them out")
        channels, _, _ = require_images("timm", item_shape)
        layer = TimmLayer(name, weights, pretrained)
        if channels not in (1, layer.input_size[0]):
            raise ConfigError(
                f"backbone.name={name}: is for images of {layer.input_size[0]} channels, and these have "
                f"{channels}; choose backbone=conv4 or resnet12"
            )
        super().__init__(Frozen(layer) if frozen else layer)
        self.features = layer.width


class TimmLayer(nn.Module):
    """The network of `TimmNetwork` as one layer, which T tasks share or adapt."""

    independent = True

    def __init__(self, name: str, weights: str | None, pretrained: bool) -> None:
        super().__init__()
        self.name, self.pretrained = name, pretrained
        self.weights = None if weights is None else Path(weights)  # not a text: features do not depend on it
        check_name(name)
        self.network = network_of(name)
        config = stated(self.network)
        self.input_size: tuple[int, int, int] = tuple(config["input_size"])
        self.interpolation = "bilinear" if config["interpolation"] == "bilinear" else "bicubic"
        self.normalise = ImageNetInput(config["mean"], config["std"])
        with torch.no_grad():
            outputs = self.network.eval()(torch.zeros(1, *self.input_size))
        if outputs.dim() != 2:
            raise ConfigError(
                f"backbone.name={name}: an image's features are {tuple(outputs.shape[1:])}, not a vector; "
                "choose another network"
            )
        self.width = outputs.shape[1]
        self.train()

    def forward(self, x: Tensor) -> Tensor:
        if x.shape[-2:] != self.input_size[1:]:
            size = self.input_size[1:]
            x = F.interpolate(x, size, mode=self.interpolation, antialias=True).clamp(0, 1)
        return self.network(self.normalise(x))

    def on_tasks(self, own: dict[str, Tensor], x: Tensor, tasks: int) -> Tensor:
        """Images [B, T*C, H, W] to features [T, B, width], by the weights of each task."""
        images = x.unflatten(1, (tasks, -1)).transpose(0, 1)
        with plain_attention():
            weights = ({name: p[t] for name, p in own.items()} for t in range(tasks))
            return torch.stack(
                [functional_call(self, p, (one,)) for p, one in zip(weights, images, strict=True)]
            )

    def load_weights(self) -> None:
        """Load the weights that the settings name, if any. Raises ConfigError."""
        if self.pretrained:
            self.network.load_state_dict(downloaded(self.name))
        elif self.weights is not None:
            state = without_classifier(read_weights(self.weights), self.network)
            try:
                self.network.load_state_dict(state)
            except RuntimeError as error:  # a list of all differences, of which the first one is enough
                reason = str(error).partition("\n")[2].split(",")[0].strip() or first_line(error)
                raise ConfigError(
                    f"backbone.weights={self.weights}: not the weights of backbone.name={self.name} "
                    f"({reason}); choose another file or name"
                ) from None


def library() -> Any:
    """The package timm. Raises ConfigError if it is not installed."""
    try:
        import timm
        import timm.data
    except ImportError as error:
        raise ConfigError(f"backbone=timm: needs a package ({first_line(error)}); {INSTALL}") from None
    return timm


def check_name(name: str) -> None:
    """Raise ConfigError if timm has no network of this name.

    timm itself also takes addresses of other networks ("hf-hub:..."), which are not for a config that may be
    from somebody's checkpoint.
    """
    timm = library()
    known = [*timm.list_models(), *timm.list_pretrained()]
    if name not in known:
        close = difflib.get_close_matches(name, known, n=1)
        advice = f"did you mean {close[0]!r}?" if close else "timm.list_models() lists the names"
        raise ConfigError(f"backbone.name={name}: timm {timm.__version__} has no such network; {advice}")


def network_of(name: str, pretrained: bool = False) -> nn.Module:
    """The network of this name without its classifier."""
    return library().create_model(name, pretrained=pretrained, num_classes=0)


def stated(network: nn.Module) -> Mapping[str, Any]:
    """The input size [C, H, W], mean, deviation and interpolation in timm's config of a network."""
    return library().data.resolve_model_data_config(network)


def downloaded(name: str) -> Mapping[str, Tensor]:
    """The weights that timm publishes, from its cache or downloaded. Raises ConfigError."""
    try:
        with torch.random.fork_rng([]):  # building a network draws random numbers
            return network_of(name, pretrained=True).state_dict()
    except Exception as error:  # of the network, of the file system, or because there are no such weights
        raise ConfigError(
            f"backbone.pretrained=true: the weights of {name} cannot be downloaded ({first_line(error)}); "
            "check the network, or get them by other means and set backbone.weights=FILE"
        ) from error


def read_weights(weights: Path) -> Mapping[str, Any]:
    """The state_dict in a file. Raises ConfigError if it cannot be read."""
    path = user_path(str(weights))
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            return load_file(path)
        state = torch.load(path, map_location="cpu", weights_only=True)
        state = state.get("state_dict", state)
        if not all(isinstance(name, str) for name in state):
            raise TypeError("its names are not text")
        return state
    except Exception as error:  # file system errors and damaged files
        reason = "no such file" if not path.exists() else first_line(error)
        raise ConfigError(
            f"backbone.weights={weights}: {reason}; name a .safetensors or .pth file that contains a "
            "state_dict, or set backbone.weights=null"
        ) from error


def without_classifier(state: Mapping[str, Any], network: nn.Module) -> dict[str, Any]:
    """A state_dict without the weights of the classifiers that timm's config of the network names."""
    heads = network.pretrained_cfg.get("classifier") or ()  # type: ignore[union-attr,operator]
    begins = tuple(f"{head}." for head in ([heads] if isinstance(heads, str) else heads))
    return {name: p for name, p in state.items() if not name.startswith(begins)}
