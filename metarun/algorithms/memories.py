"""Memories: networks that read a sequence one step after the other, or all of it at once.

T tasks, L steps, F numbers of an input, D numbers of an output. The state of a memory is a list of tensors
whose first dimension is T.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Literal

import torch
from torch import Tensor, nn

from metarun.algorithms.snail import snail_layers

State = list[Tensor]


class Memory(nn.Module, ABC):
    """The base class of memories.

    Attributes:
        features: D.
    """

    features: int

    @abstractmethod
    def start(self, like: Tensor) -> State:
        """The state before the first step, with the dtype and the device of inputs [T, ...]."""

    @abstractmethod
    def step(self, x: Tensor, state: State) -> tuple[Tensor, State]:
        """The output [T, D] for the next input [T, F], and the state after it."""

    @abstractmethod
    def along(self, x: Tensor) -> Tensor:
        """The outputs [T, L, D] of all steps of a sequence [T, L, F]."""


class Recurrent(Memory):
    """A GRU (Cho et al. 2014) or an LSTM.

    Args:
        inputs: F.
        size: D, the number of units.
        kind: "gru" or "lstm".
    """

    def __init__(self, inputs: int, size: int, kind: Literal["gru", "lstm"]) -> None:
        super().__init__()
        self.features = size
        self.network = (nn.GRU if kind == "gru" else nn.LSTM)(inputs, size, batch_first=True)
        for name, p in self.network.named_parameters():
            if name.startswith("weight_hh"):
                for gate in p.detach().chunk(len(p) // size):
                    nn.init.orthogonal_(gate)
            elif name.startswith("bias"):
                nn.init.zeros_(p)

    def start(self, like: Tensor) -> State:
        zeros = like.new_zeros(len(like), self.features)
        return [zeros] if isinstance(self.network, nn.GRU) else [zeros, zeros]

    def step(self, x: Tensor, state: State) -> tuple[Tensor, State]:
        hidden = tuple(each.unsqueeze(0) for each in state)
        output, after = self.network(x.unsqueeze(1), hidden if len(hidden) > 1 else hidden[0])
        after = after if isinstance(after, tuple) else (after,)
        return output.squeeze(1), [each.squeeze(0) for each in after]

    def along(self, x: Tensor) -> Tensor:
        return self.network(x)[0]


class Attentive(Memory):
    """The layers of SNAIL (Mishra et al. 2018): its state are the inputs of each layer at all steps so far.

    Args:
        inputs: F.
        width: scales the sizes of all layers; 1 in the paper.
        longest: the number of steps that the convolutions cover.
    """

    def __init__(self, inputs: int, width: float, longest: int) -> None:
        super().__init__()
        layers, self.features = snail_layers(inputs, width, longest)
        self.layers = nn.ModuleList(layers)

    def start(self, like: Tensor) -> State:
        return []

    def step(self, x: Tensor, state: State) -> tuple[Tensor, State]:
        x, after = x.unsqueeze(1), []
        for number, layer in enumerate(self.layers):
            before = state[number] if state else x[:, :0]
            after.append(torch.cat([before, x], 1))
            x = torch.cat([x, layer.after(before, x)], -1)  # type: ignore[operator]
        return x.squeeze(1), after

    def along(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = torch.cat([x, layer.along(x)], -1)  # type: ignore[operator]
        return x
