"""TADAM: task dependent adaptive metric (Oreshkin, Rodriguez and Lacoste 2018)."""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from metarun.algorithms.feature_method import precise, prototypes, require, squared_distances
from metarun.algorithms.modulation import ModulatedMethod, add_modulations
from metarun.tasks.episodes import Episodes, Outcome
from metarun.tasks.objectives import cross_entropy

STEPS, RATE = 20, 0.9  # the decay of the auxiliary task (section 2.4)
FACTOR = 0.1  # of the variance of the initial weights, as in the paper's code


class TADAM(ModulatedMethod):
    """Prototypes in a space that depends on the task, with a learned scale and an auxiliary task.

    - Metric scaling (section 2.1): logits are -scale * d, where d is the Euclidean distance to a class mean,
      not squared, as in the paper's code.
    - Task conditioning (section 2.2): the mean of the class means is the task embedding. Networks map it to
      scales and shifts of the channels, gamma = gamma_0 * h + 1 and beta = beta_0 * g, for every convolution
      after its normalisation; those of shortcuts are not conditioned, as in the code. The multipliers gamma_0
      and beta_0, two numbers for each layer, start at 0 and have an L2 penalty. Then the support and the
      queries pass through the conditioned network.
    - Auxiliary co-training (section 2.4): with a probability that decays as 0.9^(1 + floor(20 t / T)) in
      iteration t, the unconditioned network also classifies all training classes with a linear layer.

    Departures: the auxiliary loss is that of the examples of the iteration's tasks, and is added to the loss
    of the tasks (the code: a step of its own, on 64 images of any classes). Whether it is added is decided by
    the number of the iteration, so that all tasks of a step agree. The scale is learned, as in the paper's
    equations (in its code it is chosen by validation).

    Args:
        backbone, classes: passed by the builder; see `Algorithm`.
        scale: the initial factor of the distances, above 0.
        layers: linear layers of each network of the task embedding, all but the first with a shortcut.
        penalty: half of it times the sum of the squared multipliers is added to the loss.
        auxiliary: T, the iterations of the decay; 0: no auxiliary task.
    """

    of_all_iterations = ("auxiliary",)
    share: Tensor

    def __init__(
        self,
        backbone: nn.Module,
        classes: int | None = None,
        scale: float = 7.5,
        layers: int = 3,
        penalty: float = 0.01,
        auxiliary: int = 0,
    ) -> None:
        super().__init__(backbone)
        require(scale > 0, f"algorithm.scale={scale}: must be above 0")
        require(layers >= 1, f"algorithm.layers={layers}: must be at least 1")
        require(penalty >= 0, f"algorithm.penalty={penalty}: must not be negative")
        require(auxiliary >= 0, f"algorithm.auxiliary={auxiliary}: must be a number of iterations, or 0")
        self.penalty, self.auxiliary = penalty, auxiliary
        self.classifies_training_classes = auxiliary > 0
        self.scale = nn.Parameter(torch.tensor(float(scale)))
        self.modulations = add_modulations(backbone, "tadam", shortcuts=False)
        self.conditions = nn.ModuleList(
            Condition(self.features, layer.channels, layers) for layer in self.modulations
        )
        self.classifier = nn.Linear(self.features, classes or 1) if auxiliary else None
        self.register_buffer("share", torch.ones(()), persistent=False)

    def on_step_start(self, iteration: int) -> bool:
        if self.auxiliary:
            drawn = torch.rand((), generator=torch.Generator().manual_seed(iteration), dtype=torch.float32)
            self.share.fill_(drawn.item() < probability(iteration, self.auxiliary))
        return False

    def adapt(self, tasks: Episodes) -> dict[str, Any]:
        """{"film": scales and shifts, [T, 2, C] each, "prototypes": [T, N, F]}."""
        film = self.film_of(self.embed(tasks.support_x), tasks)
        features = self.embed_with(film, tasks.support_x)
        return {"film": film, "prototypes": self.fit(features, tasks.support_y, tasks.ways)}

    def predict(self, adapted: dict[str, Any], query_x: Tensor) -> Tensor:
        return self.score(adapted["prototypes"], self.embed_with(adapted["film"], query_x))

    def meta_loss(self, tasks: Episodes) -> Outcome:
        """The loss of the queries, the penalty, and in some iterations the loss of the auxiliary task."""
        film = self.film_of(self.embed(tasks.support_x), tasks)  # apart from queries, which it must not see
        support, query = self.embed_episodes(tasks, partial(self.embed_with, film))
        logits = self.score(self.fit(support, tasks.support_y, tasks.ways), query)
        loss = self.loss_of(tasks)(logits, tasks.query_y).mean()
        multipliers = torch.stack([condition.multipliers for condition in self.conditions])  # type: ignore[misc]
        loss = loss + self.penalty / 2 * multipliers.square().sum()
        if self.classifier is not None:
            assert tasks.classes is not None
            labels = tasks.classes.gather(1, torch.cat([tasks.support_y, tasks.query_y], 1))
            plain = torch.cat(self.embed_episodes(tasks), 1)
            others = cross_entropy(self.classifier(plain), labels).mean()
            loss = loss + self.share * others
        return tasks.outcome(logits, loss)

    def film_of(self, support: Tensor, tasks: Episodes) -> list[Tensor]:
        """Scales and shifts, [T, 2, C] each, from the features [T, S, F] of the unconditioned network."""
        task = prototypes(support, tasks.support_y, tasks.ways).mean(1)
        return [condition(task) for condition in self.conditions]

    def fit(self, features: Tensor, targets: Tensor, ways: int) -> Tensor:
        return prototypes(features, targets, ways)

    def score(self, adapted: Tensor, features: Tensor) -> Tensor:
        # The slope of the root at 0 is infinite: a query may be the only example of a class.
        least = torch.finfo(precise(features).dtype).eps
        return -self.scale * squared_distances(features, adapted).clamp_min(least).sqrt()


class Condition(nn.Module):
    """Maps task embeddings [T, F] to scales and shifts [T, 2, C] of a layer (section 2.2)."""

    def __init__(self, features: int, channels: int, layers: int) -> None:
        super().__init__()
        self.scale, self.shift = (ResidualLayers(features, channels, layers) for _ in range(2))
        self.multipliers = nn.Parameter(torch.zeros(2))  # gamma_0 and beta_0

    def forward(self, task: Tensor) -> Tensor:
        scale, shift = self.multipliers
        return torch.stack([1 + scale * self.scale(task), shift * self.shift(task)], 1)


class ResidualLayers(nn.Module):
    """Linear layers, of which all but the first have a shortcut, with SiLU between them."""

    def __init__(self, inputs: int, outputs: int, layers: int) -> None:
        super().__init__()
        sizes = [inputs] + [outputs] * (layers - 1)
        self.layers = nn.ModuleList(nn.Linear(size, outputs) for size in sizes)
        for layer in self.layers:
            nn.init.normal_(layer.weight, std=math.sqrt(2 * FACTOR / outputs))  # type: ignore[arg-type]
            nn.init.zeros_(layer.bias)  # type: ignore[arg-type]

    def forward(self, x: Tensor) -> Tensor:
        x = self.layers[0](x)
        for layer in self.layers[1:]:
            x = F.silu(x)
            x = layer(x) + x
        return x


def probability(iteration: int, decay: int) -> float:
    """The probability of the auxiliary task in an iteration, with `decay` iterations in all (section 2.4)."""
    return RATE ** (1 + STEPS * iteration // decay)
