"""Networks whose channels are scaled and shifted for each task (FiLM, Perez et al. 2018)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from metarun.algorithms.feature_method import FeatureMethod
from metarun.errors import ConfigError
from metarun.nn.modulation import add_after_norms
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


def add_modulations(backbone: nn.Module, name: str, shortcuts: bool = True) -> list[Modulation]:
    """Insert a Modulation after every normalisation layer; without these, after every weight layer.

    Args:
        backbone: the network, which is changed.
        name: of the algorithm, for messages.
        shortcuts: whether layers of shortcuts are modulated, too.
    """
    added = add_after_norms(backbone, Modulation, shortcuts)
    if not added:
        raise ConfigError(
            f"algorithm={name}: the backbone has no layer with channels to modulate; choose backbone=conv4"
        )
    return added  # type: ignore[return-value]
