"""Initial weights in place of PyTorch's, as in the code of a paper."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Literal, TypeGuard

import torch
from torch import Tensor, nn

from metarun.errors import ConfigError
from metarun.nn.layers import FiLM, is_called


class InitialWeights:
    """Where the weights of convolutions and linear layers start.

    Args:
        weights: "xavier": uniform (Glorot and Bengio 2010). "kaiming": uniform by the fan-in (He et al.
            2015). "fan_out": normal by the fan-out. The last two make up for ReLU, except in linear layers of
            the head and in FiLM.
        gain: multiplies the weights.
        bias: biases are uniform between these two numbers.
        head: the deviation of normal weights of linear layers of the head; None: as other layers.
        head_bias: the biases of these; None: as other layers.
    """

    def __init__(
        self,
        weights: Literal["xavier", "kaiming", "fan_out"],
        gain: float = 1.0,
        bias: Sequence[float] = (0.0, 0.0),
        head: float | None = None,
        head_bias: float | None = None,
    ) -> None:
        if gain <= 0:
            raise ConfigError(f"initial_weights.gain={gain}: must be above 0")
        if len(bias) != 2 or bias[0] > bias[1]:
            raise ConfigError(
                f"initial_weights.bias={list(bias)}: must be two numbers, the second not below the first"
            )
        if head is not None and head < 0:
            raise ConfigError(f"initial_weights.head={head}: must be at least 0")
        self.weights, self.gain, self.bias = weights, gain, tuple(bias)
        self.head, self.head_bias = head, head_bias

    @torch.no_grad()
    def __call__(self, backbone: nn.Module, heads: Iterable[nn.Module] = ()) -> None:
        """Start all layers.

        Args:
            backbone: the network.
            heads: what maps its features to outputs.
        """
        for layer in backbone.modules():
            if isinstance(layer, FiLM) and layer.bias is not None:
                self.draw(layer.weight, "linear")
            elif is_weighted(layer):
                self.draw(layer.weight, "relu")
                self.set_bias(layer.bias, None)
        for layer in (each for head in heads for each in head.modules()):
            if isinstance(layer, nn.Conv2d):
                self.draw(layer.weight, "relu")
                self.set_bias(layer.bias, None)
            elif isinstance(layer, nn.Linear):
                self.draw_head(layer)

    def draw(self, weight: Tensor, before: Literal["relu", "linear"]) -> None:
        """Draw the weights of a layer before a ReLU, or before none."""
        if self.weights == "xavier":
            nn.init.xavier_uniform_(weight)
        elif self.weights == "kaiming":
            nn.init.kaiming_uniform_(weight, nonlinearity=before)
        else:
            nn.init.kaiming_normal_(weight, mode="fan_out", nonlinearity=before)
        weight.mul_(self.gain)

    def draw_head(self, layer: nn.Linear) -> None:
        """Draw the weights and biases of a linear layer of the head."""
        if self.head is None:
            self.draw(layer.weight, "linear")
        else:
            nn.init.normal_(layer.weight, std=self.head)
        self.set_bias(layer.bias, self.head_bias)

    def set_bias(self, bias: Tensor | None, value: float | None) -> None:
        """Set the biases of a layer, if it has some; `value` None: as the setting `bias` says."""
        low, high = self.bias if value is None else (value, value)
        if bias is not None and low < high:
            nn.init.uniform_(bias, low, high)
        elif bias is not None:
            nn.init.constant_(bias, low)


def is_weighted(layer: nn.Module) -> TypeGuard[nn.Conv2d | nn.Linear]:
    """Whether this is a convolution or a linear layer that its network calls."""
    return isinstance(layer, (nn.Conv2d, nn.Linear)) and is_called(layer)
