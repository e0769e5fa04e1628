"""Networks whose channels are scaled and shifted for each task (FiLM, Perez et al. 2018)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from metarun.algorithms.feature_method import FeatureMethod
from metarun.errors import ConfigError
from metarun.nn.layers import NORMS, Residual, is_called, replace_layers
from metarun.nn.per_task import Params, is_groupable, plain_attention
from metarun.nn.shared_weights import run_shared, runs_at_once


class ModulatedMethod(FeatureMethod):
    """Base class of methods that modulate the backbone for each task; see `FeatureMethod`.

    A subclass sets `modulations`, the layers that `add_modulations` inserted.
    """

    embeds_first = False  # it changes the backbone for each task
    modulations: list[Modulation]

    def embed_with(self, film: list[Tensor], x: Tensor) -> Tensor:
        """Features [T, B, F] of x [T, B, *item], modulated by the scales and shifts of each task."""
        # Any other network may reorder its batch, so that the modulation would not match the tasks.
        if is_groupable(self.backbone) and runs_at_once(self.backbone, x, self.batching):
            return self.modulated(film, x)
        tasks = [self.modulated([one[t : t + 1] for one in film], x[t : t + 1]) for t in range(len(x))]
        return torch.cat(tasks)

    def modulated(self, film: list[Tensor], x: Tensor) -> Tensor:
        for layer, by in zip(self.modulations, film, strict=True):
            layer.by = by
        with plain_attention():  # the fast path of a transformer would pass over its modulations
            features = run_shared(self.backbone, x, self.batching)
        for layer in self.modulations:
            layer.by = None
        return features


class Modulation(nn.Module):
    """A layer that scales and shifts channels by `by` [T, 2, C], which is set before the forward pass.

    Args:
        channels: C.
        last: whether channels are the last dimension, as after a linear layer, or the second one.
    """

    def __init__(self, channels: int, last: bool) -> None:
        super().__init__()
        self.channels, self.last = channels, last
        self.by: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        """x [B*T, C, ...] or [B*T, ..., C], in the order of `run_shared`."""
        if self.by is None:
            return x
        ones = [1] * (x.dim() - 2)
        shape = [*ones, self.channels] if self.last else [self.channels, *ones]
        scale, shift = self.by.view(-1, 2, *shape).unbind(1)
        return (x.unflatten(0, (-1, len(scale))) * scale + shift).flatten(0, 1)

    def on_tasks(self, own: Params, x: Tensor, tasks: int) -> Tensor:
        """x [B, T*C, H, W]."""
        if self.by is None:
            return x
        scale, shift = self.by.unbind(1)  # [T, C]
        return x * scale.reshape(-1, 1, 1) + shift.reshape(-1, 1, 1)


class Modulated(nn.Sequential):
    """A layer and its modulation, which can be loaded from the weights of the layer alone.

    A network that loads its weights from a file does so by the names that its layers had before.
    """

    def _load_from_state_dict(self, state: dict[str, Any], prefix: str, *others: Any) -> None:
        for name in self[0].state_dict():
            if (weights := state.pop(prefix + name, None)) is not None:
                state[f"{prefix}0.{name}"] = weights
        super()._load_from_state_dict(state, prefix, *others)


def add_modulations(backbone: nn.Module, name: str, shortcuts: bool = True) -> list[Modulation]:
    """Insert a Modulation after every normalisation layer; without these, after every weight layer.

    Args:
        backbone: the network, which is changed.
        name: of the algorithm, for messages.
        shortcuts: whether layers of shortcuts are modulated, too.
    """
    kinds = NORMS if any(isinstance(m, NORMS) for m in backbone.modules()) else (nn.Conv2d, nn.Linear)
    branches = [block.shortcut for block in backbone.modules() if isinstance(block, Residual)]
    left_out = set() if shortcuts else {id(layer) for branch in branches for layer in branch.modules()}
    added: list[Modulation] = []

    def modulated(layer: nn.Module) -> nn.Module | None:
        if not isinstance(layer, kinds) or not is_called(layer) or id(layer) in left_out:
            return None
        channels = next(getattr(layer, n) for n in CHANNELS if hasattr(layer, n))
        added.append(Modulation(channels, last=isinstance(layer, nn.Linear)))
        return Modulated(layer, added[-1])

    replace_layers(backbone, modulated)
    if not added:
        raise ConfigError(
            f"algorithm={name}: the backbone has no layer with channels to modulate; choose backbone=conv4"
        )
    return added


CHANNELS = ("num_features", "num_channels", "out_channels", "out_features")
