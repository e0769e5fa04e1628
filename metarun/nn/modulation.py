"""Layers that scale and shift the channels of a network for each task (FiLM, Perez et al. 2018)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from metarun.nn.layers import NORMS, Residual, is_called, replace_layers

CHANNELS = ("num_features", "num_channels", "out_channels", "out_features")


class Modulated(nn.Sequential):
    """A layer and its modulation, which can be loaded from the weights of the layer alone.

    A network that loads its weights from a file does so by the names that its layers had before.
    """

    def _load_from_state_dict(self, state: dict[str, Any], prefix: str, *others: Any) -> None:
        for name in self[0].state_dict():
            if (weights := state.pop(prefix + name, None)) is not None:
                state[f"{prefix}0.{name}"] = weights
        super()._load_from_state_dict(state, prefix, *others)


class TaskScale(nn.Module):
    """Channels scaled by 1 + `task_scale` and shifted by `task_shift`, which each task has as weights.

    Args:
        channels: C.
        last: whether channels are the last dimension, as after a linear layer, or the second one.
    """

    def __init__(self, channels: int, last: bool) -> None:
        super().__init__()
        self.last = last
        self.task_scale = nn.Parameter(torch.zeros(channels), requires_grad=False)
        self.task_shift = nn.Parameter(torch.zeros(channels), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        """x [B, C, ...] or [B, ..., C], by the module's own weights."""
        shape = [-1] if self.last else [-1, *[1] * (x.dim() - 2)]
        return x * (1 + self.task_scale.view(shape)) + self.task_shift.view(shape)

    def on_tasks(self, own: dict[str, Tensor], x: Tensor, tasks: int) -> Tensor:
        """x [B, T*C, H, W] or [T, B, C], by the weights `own` [T, C] of each task."""
        scale, shift = own["task_scale"], own["task_shift"]
        if x.dim() == 4:
            return x * (1 + scale.reshape(-1, 1, 1)) + shift.reshape(-1, 1, 1)
        return x * (1 + scale.unsqueeze(1)) + shift.unsqueeze(1)


def add_after_norms(
    network: nn.Module, make: Callable[[int, bool], nn.Module], shortcuts: bool = True
) -> list[nn.Module]:
    """Insert a layer after every normalisation layer; without these, after every weight layer.

    Args:
        network: changed in place.
        make: (number of channels, whether they are the last dimension) -> the layer to insert.
        shortcuts: whether layers of shortcuts are followed by one, too.

    Returns:
        The inserted layers, in the order of the network; empty if it has no layer with channels.
    """
    kinds = NORMS if any(isinstance(m, NORMS) for m in network.modules()) else (nn.Conv2d, nn.Linear)
    branches = [block.shortcut for block in network.modules() if isinstance(block, Residual)]
    left_out = set() if shortcuts else {id(layer) for branch in branches for layer in branch.modules()}
    added: list[nn.Module] = []

    def modulated(layer: nn.Module) -> nn.Module | None:
        if not isinstance(layer, kinds) or not is_called(layer) or id(layer) in left_out:
            return None
        channels = next(getattr(layer, n) for n in CHANNELS if hasattr(layer, n))
        added.append(make(channels, isinstance(layer, nn.Linear)))
        return Modulated(layer, added[-1])

    replace_layers(network, modulated)
    return added
