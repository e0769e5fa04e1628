"""A residual adapter of frozen vectors, which starts as the identity."""

from __future__ import annotations

import math

from torch import Tensor, nn

from metarun.errors import ConfigError, check_above_0
from metarun.nn.layers import Residual

MODEST = 1e-12  # added to a squared length, so that a vector of zeros has derivatives


class Adapter(nn.Sequential):
    """x + W2 relu(W1 x + b1) + b2, scaled to the same length, for vectors of a trained model.

    A residual adapter (Houlsby et al. 2019, "Parameter-Efficient Transfer Learning for NLP", section 2.1)
    behind the model instead of inside its layers. W2 and b2 start at zero, so that untrained features are the
    directions of the vectors themselves; the first validation measures these. As all features have the same
    length, distances are those of angles.

    Args:
        item_shape: passed by the builder: the shape of one example, a vector.
        hidden: the size of the hidden layer.
        length: the length of the features.
    """

    def __init__(self, item_shape: tuple[int, ...], hidden: int = 256, length: float = 3.0) -> None:
        if len(item_shape) != 1:
            raise ConfigError(
                f"backbone=adapter takes vectors, and this dataset's items have shape {tuple(item_shape)}; "
                "choose another backbone"
            )
        check_above_0("backbone", hidden=hidden, length=length)
        size = math.prod(item_shape)
        last = nn.Linear(hidden, size)
        nn.init.zeros_(last.weight)
        nn.init.zeros_(last.bias)
        super().__init__(
            Residual(nn.Sequential(nn.Linear(size, hidden), nn.ReLU(), last)), SameLength(length)
        )
        self.features = size


class SameLength(nn.Module):
    """Vectors [..., features] scaled to one length; zeros stay zeros."""

    def __init__(self, length: float) -> None:
        super().__init__()
        self.length = length

    def forward(self, x: Tensor) -> Tensor:
        return self.length * x * (x.square().sum(-1, keepdim=True) + MODEST).rsqrt()

    def on_tasks(self, own: dict[str, Tensor], x: Tensor, tasks: int) -> Tensor:
        """Vectors [T, B, features] of T tasks."""
        return self(x)
