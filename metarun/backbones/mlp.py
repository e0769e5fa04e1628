"""A multilayer perceptron."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import Literal

from torch import nn

from metarun.nn.initial import InitialWeights


class MLP(nn.Sequential):
    """Hidden layers of linear units. With a linear head, (40, 40) is MAML's sinusoid network (section 5.1).

    Args:
        item_shape: passed by the builder: the shape of one example.
        hidden: the sizes of the hidden layers.
        activation: after each layer, "relu" or "tanh".
        init: "pytorch", or "xavier": uniform weights of Glorot and Bengio (2010), and biases of zero.
    """

    def __init__(
        self,
        item_shape: tuple[int, ...],
        hidden: Sequence[int] = (40, 40),
        activation: Literal["relu", "tanh"] = "relu",
        init: Literal["pytorch", "xavier"] = "pytorch",
    ) -> None:
        widths = [math.prod(item_shape), *hidden]
        function = nn.ReLU if activation == "relu" else nn.Tanh
        layers = [(nn.Linear(inputs, outputs), function()) for inputs, outputs in pairwise(widths)]
        super().__init__(nn.Flatten(), *(layer for pair in layers for layer in pair))
        self.features = widths[-1]
        if init == "xavier":
            InitialWeights("xavier")(self)
