"""Actions of a policy: how the outputs of a network become a distribution over them.

T tasks, H time steps, E episodes; `...` are any such dimensions. N outputs of a network, A numbers of an
action.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod

import torch
import torch.nn.functional as F
from torch import Tensor

LEAST_LOG_STD = math.log(1e-6)  # as in the code of MAML: a smaller deviation would make ratios infinite


class Actions(ABC):
    """A kind of actions, and the distribution over them that outputs of a network [..., N] describe.

    Attributes:
        outputs: how many of the outputs the network predicts from an observation.
        constants: how many further outputs are learned numbers that do not depend on the observation.
        shape: of one action.
    """

    outputs: int
    constants: int
    shape: tuple[int, ...]

    @abstractmethod
    def noise(self, steps: int, episodes: int, generator: torch.Generator) -> Tensor:
        """The random numbers that `sample` needs, [steps, episodes, ...]; float32 on the CPU."""

    @abstractmethod
    def sample(self, outputs: Tensor, noise: Tensor) -> Tensor:
        """Actions [..., *shape] for outputs [..., N], given random numbers of `noise`."""

    @abstractmethod
    def mode(self, outputs: Tensor) -> Tensor:
        """The most probable actions [..., *shape] for outputs [..., N]."""

    @abstractmethod
    def log_prob(self, outputs: Tensor, actions: Tensor) -> Tensor:
        """The logarithm of the probability (or density) of actions, [...]."""

    @abstractmethod
    def divergence(self, old: Tensor, new: Tensor) -> Tensor:
        """The Kullback-Leibler divergence of the distribution of `new` outputs from that of `old`, [...]."""

    @abstractmethod
    def information(self, outputs: Tensor, vectors: Tensor) -> Tensor:
        """Products of the Fisher information of the distributions with vectors, [..., N] each."""

    @abstractmethod
    def entropy(self, outputs: Tensor) -> Tensor:
        """The entropy of the distributions, [...]."""


class Box(Actions):
    """Actions of `size` numbers with a diagonal Gaussian distribution.

    The network predicts the means; the logarithms of the standard deviations are constants, 0 at the start.
    """

    def __init__(self, size: int) -> None:
        self.outputs = self.constants = size
        self.shape = (size,)

    def noise(self, steps: int, episodes: int, generator: torch.Generator) -> Tensor:
        return torch.randn(steps, episodes, *self.shape, generator=generator)

    def sample(self, outputs: Tensor, noise: Tensor) -> Tensor:
        mean, log_std = self.split(outputs)
        return mean + log_std.exp() * noise

    def mode(self, outputs: Tensor) -> Tensor:
        return self.split(outputs)[0]

    def log_prob(self, outputs: Tensor, actions: Tensor) -> Tensor:
        mean, log_std = self.split(outputs)
        standard = (actions - mean) * (-log_std).exp()
        return -(0.5 * standard.square() + log_std + 0.5 * math.log(2 * math.pi)).sum(-1)

    def divergence(self, old: Tensor, new: Tensor) -> Tensor:
        (old_mean, old_log), (new_mean, new_log) = self.split(old), self.split(new)
        squares = (2 * old_log).exp() + (old_mean - new_mean).square()
        return (new_log - old_log + 0.5 * squares * (-2 * new_log).exp() - 0.5).sum(-1)

    def information(self, outputs: Tensor, vectors: Tensor) -> Tensor:
        means, log_stds = vectors.split(self.outputs, -1)
        return torch.cat([means * (-2 * self.split(outputs)[1]).exp(), 2 * log_stds], -1)

    def entropy(self, outputs: Tensor) -> Tensor:
        return (self.split(outputs)[1] + 0.5 * math.log(2 * math.pi * math.e)).sum(-1)

    def split(self, outputs: Tensor) -> tuple[Tensor, Tensor]:
        """The means and the logarithms of the standard deviations, [..., A] each."""
        mean, log_std = outputs.split(self.outputs, -1)
        return mean, log_std.clamp_min(LEAST_LOG_STD)


class Discrete(Actions):
    """One of `count` actions, with logits as outputs; an action is an int64 number."""

    def __init__(self, count: int) -> None:
        self.outputs, self.constants, self.shape = count, 0, ()

    def noise(self, steps: int, episodes: int, generator: torch.Generator) -> Tensor:
        return torch.rand(steps, episodes, generator=generator)

    def sample(self, outputs: Tensor, noise: Tensor) -> Tensor:
        """By the inverse of the distribution function, so that similar outputs give the same actions."""
        shares = outputs.softmax(-1).cumsum(-1)
        # The last share may be below 1 by rounding: scale the noise, and never go beyond the last action.
        below = noise.unsqueeze(-1).to(shares.dtype) * shares[..., -1:] >= shares
        return below.sum(-1).clamp_max(self.outputs - 1)

    def mode(self, outputs: Tensor) -> Tensor:
        return outputs.argmax(-1)

    def log_prob(self, outputs: Tensor, actions: Tensor) -> Tensor:
        return F.log_softmax(outputs, -1).gather(-1, actions.unsqueeze(-1)).squeeze(-1)

    def divergence(self, old: Tensor, new: Tensor) -> Tensor:
        old_log, new_log = F.log_softmax(old, -1), F.log_softmax(new, -1)
        return (old_log.exp() * (old_log - new_log)).sum(-1)

    def information(self, outputs: Tensor, vectors: Tensor) -> Tensor:
        weighted = outputs.softmax(-1) * vectors
        return weighted - outputs.softmax(-1) * weighted.sum(-1, keepdim=True)

    def entropy(self, outputs: Tensor) -> Tensor:
        log_shares = F.log_softmax(outputs, -1)
        return -(log_shares.exp() * log_shares).sum(-1)
