"""A multilayer perceptron."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

from torch import nn


class MLP(nn.Sequential):
    """Hidden layers with ReLU. With a linear head, (40, 40) is MAML's sinusoid network (section 5.1).

    Args:
        item_shape: passed by the builder: the shape of one example.
        hidden: the sizes of the hidden layers.
    """

    def __init__(self, item_shape: tuple[int, ...], hidden: Sequence[int] = (40, 40)) -> None:
        widths = [math.prod(item_shape), *hidden]
        layers = [(nn.Linear(inputs, outputs), nn.ReLU()) for inputs, outputs in pairwise(widths)]
        super().__init__(nn.Flatten(), *(layer for pair in layers for layer in pair))
        self.features = widths[-1]
