"""A network that keeps its weights, and whose features may take the place of its inputs."""

from __future__ import annotations

import hashlib
import inspect
from typing import Any

import torch
from torch import Tensor, nn

from metarun.nn.per_task import Params


class Frozen(nn.Module):
    """A network in evaluation mode that no method trains or adapts, as one layer.

    Images [B, C, H, W] become features [B, F]. Features that were computed before, [B, F], are returned as
    they are, so that a method runs on images and on their features.

    Args:
        network: maps examples to features; its weights get no gradient.
        dims: the number of dimensions of an example: 3 for images. Only images may be replaced by features.
    """

    frozen = True
    independent = True
    shared_by_tasks = True

    def __init__(self, network: nn.Module, dims: int = 3) -> None:
        super().__init__()
        self.dims = dims
        self.network = network.requires_grad_(False)
        self.train()

    def train(self, mode: bool = True) -> Frozen:
        return super().train(False)

    def forward(self, x: Tensor) -> Tensor:
        return x if self.dims == 3 and x.dim() == 2 else self.network(x)

    def on_tasks(self, own: Params, x: Tensor, tasks: int) -> Tensor:
        """Images [B, T*C, H, W], features [T, B, F] or other examples [T, B, ...] to features [T, B, F]."""
        examples = x.unflatten(1, (tasks, -1)).transpose(0, 1) if x.dim() == 4 else x
        return self(examples.flatten(0, 1)).unflatten(0, (tasks, -1))

    def digest(self) -> str:
        """A SHA-256 sum of all that features depend on beside the images.

        It covers the weights, the source of the classes of all layers, and their settings as far as these are
        numbers and texts.
        """
        digest = hashlib.sha256(f"{torch.__version__} {self.network}".encode())
        for source in sorted({source_of(type(layer)) for layer in self.network.modules()}):
            digest.update(source.encode())
        for name, layer in self.network.named_modules():
            settings = {key: value for key, value in sorted(vars(layer).items()) if is_plain(value)}
            digest.update(f"{name} {settings}".encode())
        for name, value in self.network.state_dict().items():
            digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
            digest.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
        return digest.hexdigest()


def source_of(cls: type) -> str:
    """The source of a class; its name where there is none, as for a class typed into an interpreter."""
    try:
        return inspect.getsource(cls)
    except (OSError, TypeError):
        return f"{cls.__module__}.{cls.__qualname__}"


def is_plain(value: Any) -> bool:
    """Whether a value is a number or a text, or a sequence of these."""
    if isinstance(value, (tuple, list)):
        return all(map(is_plain, value))
    return value is None or isinstance(value, (bool, int, float, str))


def frozen_part(backbone: nn.Module | None) -> Frozen | None:
    """The frozen network that a backbone begins with; None if there is none."""
    while isinstance(backbone, nn.Sequential) and len(backbone):
        backbone = backbone[0]
    return backbone if isinstance(backbone, Frozen) else None
