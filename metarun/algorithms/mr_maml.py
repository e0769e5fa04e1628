"""MR-MAML, meta-regularised MAML (Yin et al. 2020, "Meta-Learning without Memorization")."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from metarun.algorithms.maml import MAML
from metarun.errors import ConfigError, check_above_0, check_least
from metarun.inner_loops.base import InnerLoop, Loss, PerWeight
from metarun.nn.per_task import Params, run_on_tasks
from metarun.nn.task_norm import support_first
from metarun.tasks.episodes import Episodes, Outcome
from metarun.tasks.numbers import noise_like


class MRMAML(MAML):
    """MAML whose constant layers receive little information about the training tasks (algorithm 2).

    The inner loop adapts a decoder and the head; the layers before them, the encoder, are the same for all
    tasks. Where one function of the examples solves all training tasks, as with `fixed_labels=true`, MAML may
    learn that function and ignore the support. The meta-loss therefore is the query loss plus `weight` times
    a divergence D:

    - `regularises: weights` (section 4.2): the weights of the encoder are drawn from N(mean, deviation^2),
      and D is the sum over weights of KL(N(mean, deviation^2) || N(0, 1)). Biases and the affine weights of
      norms are no random numbers, as in the code (TensorFlow Probability's `DenseReparameterization`).
    - `regularises: activations` (section 4.1): the encoder maps an example to the mean and the deviation (by
      a softplus) of `bottleneck` normal numbers, which the decoder receives. D is the mean over queries and
      numbers of KL(N(mean, deviation^2) || N(0, 1)).

    Without a divergence (`weight: 0`) nothing is drawn, and it is MAML that adapts the same layers.

    Departures: each task has its own draw of the weights (algorithm 2 draws once for a meta-batch, the code
    for each use); evaluation uses the means (algorithm 3 averages predictions over draws); deviations are
    learned by their logarithms (the code learns the inverse of a softplus, which starts at -50, where its
    gradient vanishes in single precision).

    Args:
        backbone, inner_loop, outputs, constants: see `MAML`. The backbone is the encoder.
        regularises: "weights" or "activations".
        weight: the weight of D, beta in the paper, at least 0.
        bottleneck: the numbers that an encoder of linear outputs ends with; None: those of the backbone.
        decoder: the sizes of the hidden layers of the decoder, with ReLUs; may be empty.
        deviation: the initial standard deviation of the weights, above 0.

    Raises:
        ConfigError: if a setting is out of range, or `regularises: activations` has no bottleneck.
    """

    needs = Episodes
    plays = False
    embeds_first = False
    unread: ClassVar = {"deviation": "regularises=activations"}

    def __init__(
        self,
        backbone: nn.Module,
        inner_loop: InnerLoop,
        outputs: int,
        head: Literal["fixed", "shared"] = "fixed",
        regularises: Literal["weights", "activations"] = "weights",
        weight: float = 1e-4,
        bottleneck: int | None = None,
        decoder: Sequence[int] = (),
        deviation: float = 1e-3,
        constants: int = 0,
    ) -> None:
        check_least("algorithm", 0, weight=weight)
        check_above_0("algorithm", deviation=deviation)
        if min(decoder, default=1) < 1 or (bottleneck is not None and bottleneck < 1):
            raise ConfigError(
                f"algorithm.bottleneck={bottleneck}, algorithm.decoder={list(decoder)}: layers must have at "
                "least 1 unit; leave out what is not needed"
            )
        if regularises == "activations" and not bottleneck:
            raise ConfigError(
                "algorithm.regularises=activations: needs a bottleneck; set algorithm.bottleneck=5"
            )
        self.regularises, self.weight, self.has_decoder = regularises, weight, len(decoder) > 0
        network = with_decoder(backbone, bottleneck, 2 if regularises == "activations" else 1, decoder)
        super().__init__(network, inner_loop, outputs, head, constants=constants)
        if regularises == "weights":
            encoder = {n: p for n, p in self.learner.own_parameters().items() if not self.is_fast(n)}
            start = {n: torch.full_like(p, math.log(deviation)) for n, p in encoder.items() if p.dim() > 1}
            self.deviations = PerWeight(start)

    def own_backbone(self) -> nn.Module:
        return self.learner.get_submodule("backbone.encoder.0")

    def is_fast(self, name: str) -> bool:
        return not name.startswith("backbone.encoder.")

    def inner_problem(self, tasks: Episodes) -> tuple[Loss, Params, Params]:  # type: ignore[override]
        _, slow, fast = super().inner_problem(tasks)
        slow = self.drawn(slow)
        codes = self.code(slow, tasks.support_x)  # once for all steps
        return lambda p, step: tasks.support_loss(lambda x: self.decode(p, codes), step), slow, fast

    def predict(self, adapted: dict[str, Any], query_x: Tensor) -> Tensor:
        return self.decode(adapted["params"], self.code(adapted["params"], query_x))

    def meta_loss(self, tasks: Episodes) -> Outcome:
        """The loss of the queries plus the weighted divergence."""
        adapted = self.adapt(tasks)
        if not self.weight:
            return self.outcome(adapted, tasks)
        if self.regularises == "weights":
            outcome, divergence = self.outcome(adapted, tasks), self.divergence_of_weights()
        else:
            mean, deviation = self.distribution_of_queries(adapted["params"], tasks)
            codes = mean + deviation * self.noise(mean)
            outcome = tasks.outcome(self.decode(adapted["params"], codes), self.loss)
            divergence = divergence_from_standard(mean, deviation).mean((1, 2))
        return replace(outcome, loss=outcome.loss + self.weight * divergence)

    def distribution_of_queries(self, params: Params, tasks: Episodes) -> tuple[Tensor, Tensor]:
        """The `distribution` of queries, in one batch with the support if that normalises them (TaskNorm)."""
        if not self.normalises_by_support:
            return self.distribution(params, tasks.query_x)
        shots = tasks.support_x.shape[1]
        with support_first(self, shots):
            both = self.distribution(params, torch.cat([tasks.support_x, tasks.query_x], 1))
        return both[0][:, shots:], both[1][:, shots:]

    def drawn(self, slow: Params) -> Params:
        """The constant weights of T tasks, with those of the encoder drawn for each."""
        if self.regularises == "activations" or not self.weight:
            return slow
        deviations = {name: self.deviations(name).exp() for name in slow if self.is_random(name)}
        return slow | {name: slow[name] + d * self.noise(slow[name]) for name, d in deviations.items()}

    def is_random(self, name: str) -> bool:
        return PerWeight.key(name) in self.deviations

    def divergence_of_weights(self) -> Tensor:
        """The sum of the divergences of all random weights, a scalar."""
        own = self.learner.own_parameters()
        parts = [
            divergence_from_standard(p, self.deviations(name).exp()).sum()
            for name, p in own.items()
            if self.is_random(name)
        ]
        return torch.stack(parts).sum()

    def code(self, params: Params, x: Tensor) -> Tensor:
        """What the decoder receives of examples [T, B, *item]: [T, B, F]."""
        if self.regularises == "weights":
            return self.run("encoder", params, x)
        mean, deviation = self.distribution(params, x)
        return mean + deviation * self.noise(mean) if self.weight else mean

    def distribution(self, params: Params, x: Tensor) -> tuple[Tensor, Tensor]:
        """The means and the deviations of the activations of examples [T, B, *item]: [T, B, bottleneck]."""
        mean, free = self.run("encoder", params, x).chunk(2, -1)
        return mean, F.softplus(free)

    def decode(self, params: Params, codes: Tensor) -> Tensor:
        """Outputs [T, B, N] of what the decoder receives."""
        if self.has_decoder:
            codes = self.run("decoder", params, codes)
        return self.learner.classify(params, codes)

    def run(self, part: Literal["encoder", "decoder"], params: Params, x: Tensor) -> Tensor:
        """The features [T, B, F] of a part of the network, by the weights of each task."""
        prefix = f"backbone.{part}."
        own = {name.removeprefix(prefix): p for name, p in params.items() if name.startswith(prefix)}
        return run_on_tasks(self.learner.get_submodule(prefix[:-1]), own, x, self.learner.batching)

    def noise(self, like: Tensor) -> Tensor:
        """Standard normal numbers in training, zeros in evaluation."""
        return noise_like(like) if self.training else torch.zeros_like(like)


def divergence_from_standard(mean: Tensor, deviation: Tensor) -> Tensor:
    """KL(N(mean, deviation^2) || N(0, 1)) of each number."""
    return 0.5 * (mean.square() + deviation.square() - 1) - deviation.log()


def with_decoder(
    backbone: nn.Module, bottleneck: int | None, numbers: int, decoder: Sequence[int]
) -> nn.Sequential:
    """The encoder and the hidden layers of the decoder, as one network.

    A bottleneck adds to the encoder a linear layer with so many times `numbers` outputs.
    """
    size: int = backbone.features  # type: ignore[assignment]
    ends = [nn.Linear(size, bottleneck * numbers)] if bottleneck else []
    widths = [bottleneck or size, *decoder]
    hidden = [layer for sizes in pairwise(widths) for layer in (nn.Linear(*sizes), nn.ReLU())]
    network = nn.Sequential()
    network.add_module("encoder", nn.Sequential(backbone, *ends))
    network.add_module("decoder", nn.Sequential(*hidden))
    network.features = widths[-1]  # type: ignore[assignment]
    return network
