"""CNAPs: task embeddings modulate the network (Requeima, Gordon, Bronskill, Nowozin and Turner 2019)."""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from metarun.algorithms.feature_method import prototypes, require
from metarun.algorithms.modulation import ModulatedMethod, add_modulations
from metarun.errors import check_least
from metarun.nn.layers import Norm, norm_layer
from metarun.tasks.episodes import Episodes, Outcome
from metarun.tasks.objectives import class_weights


class CNAPs(ModulatedMethod):
    """Networks map a task embedding to FiLM parameters of the backbone, and class means to a classifier.

    A set encoder embeds the support examples; their mean is the task embedding (section 3.1), in which every
    class counts equally if classes have different numbers of shots. From it, generator networks compute a
    scale and a shift for the channels of every normalisation layer of the backbone (FiLM), close to the
    identity at the start. Classifier weights and biases are computed from the class means of the modulated
    features (section 3.2, equations 3 to 5).

    In the paper the backbone is pretrained and frozen: set `init=RUN` (or backbone weights) and
    `frozen=true`; a frozen backbone keeps its running averages. Otherwise everything is trained jointly. The
    autoregressive variant, where the scales of a layer also depend on earlier layers, is not implemented.
    Departures: every normalisation layer is modulated (in the paper those of the stem and of the shortcuts
    are not), each by its own generator with ELUs (in the paper generators share a first layer within a
    stage).

    Args:
        backbone, item_shape: passed by the builder; see `Algorithm`.
        width: the size of the task embedding, and of the layers of the set encoder.
        frozen: whether the backbone is not trained.
        penalty: the weight of the L2 penalty on the FiLM parameters.
        norm: the normalisation in the set encoder.
    """

    def __init__(
        self,
        backbone: nn.Module,
        item_shape: tuple[int, ...],
        width: int = 64,
        frozen: bool = False,
        penalty: float = 0.001,
        norm: Norm = "running",
    ) -> None:
        super().__init__(backbone)
        check_least("algorithm", 0, penalty=penalty)
        self.frozen, self.penalty = frozen, penalty
        if frozen:
            backbone.requires_grad_(False)
        self.modulations = add_modulations(backbone, "cnaps")
        self.encoder = set_encoder(item_shape, width, norm)
        self.film = nn.ModuleList(FilmGenerator(width, layer.channels) for layer in self.modulations)
        self.weight, self.bias = residual(self.features, self.features), residual(self.features, 1)

    def train(self, mode: bool = True) -> CNAPs:
        super().train(mode)
        if self.frozen:
            self.backbone.eval()
        return self

    def adapt(self, tasks: Episodes) -> dict[str, Any]:
        """{"film": scales and shifts, [T, 2, C] each, "weight": [T, N, F], "bias": [T, N]}."""
        film = self.modulate(self.task_embedding(tasks))
        return {"film": film} | self.fit(self.embed_with(film, tasks.support_x), tasks.support_y, tasks.ways)

    def predict(self, adapted: dict[str, Any], query_x: Tensor) -> Tensor:
        return self.score(adapted, self.embed_with(adapted["film"], query_x))

    def meta_loss(self, tasks: Episodes) -> Outcome:
        """The loss of the queries plus the penalty on the FiLM parameters."""
        film = self.modulate(self.task_embedding(tasks))
        support, query = self.embed_episodes(tasks, partial(self.embed_with, film))
        logits = self.score(self.fit(support, tasks.support_y, tasks.ways), query)
        sizes = [generator.size.square().sum() for generator in self.film]  # type: ignore[operator,union-attr]
        loss = self.loss_of(tasks)(logits, tasks.query_y).mean()
        return tasks.outcome(logits, loss + self.penalty * torch.stack(sizes).sum() if sizes else loss)

    def task_embedding(self, tasks: Episodes) -> Tensor:
        """The mean of the encoded support examples, in which every class counts equally, [T, width]."""
        encoded = self.by_task(self.encoder, tasks.support_x)
        return (encoded * class_weights(tasks.support_y, tasks.ways).to(encoded.dtype).unsqueeze(-1)).mean(1)

    def modulate(self, task: Tensor) -> list[Tensor]:
        """Scale and shift for each normalisation layer, [T, 2, C] each, from task embeddings [T, width]."""
        return [generator(task) for generator in self.film]

    def fit(self, features: Tensor, targets: Tensor, ways: int) -> dict[str, Any]:
        means = prototypes(features, targets, ways)
        return {"weight": means + self.weight(means), "bias": self.bias(means).squeeze(-1)}

    def score(self, adapted: dict[str, Any], features: Tensor) -> Tensor:
        return features @ adapted["weight"].mT + adapted["bias"].unsqueeze(1)


class FilmGenerator(nn.Module):
    """Maps a task embedding [T, width] to scales and shifts [T, 2, C] (section 3.1 and appendix)."""

    def __init__(self, width: int, channels: int) -> None:
        super().__init__()
        self.first = nn.Linear(width, channels)
        self.rest = nn.ModuleList(residual(channels, channels) for _ in range(2))
        self.size = nn.Parameter(0.001 * torch.randn(2, channels))

    def forward(self, task: Tensor) -> Tensor:
        first = self.first(task).relu()
        scale, shift = (size * (first + rest(first)) for size, rest in zip(self.size, self.rest, strict=True))
        return torch.stack([1 + scale, shift], 1)


def residual(inputs: int, outputs: int) -> nn.Sequential:
    """Three linear layers, to whose output the caller adds the input."""
    return nn.Sequential(
        nn.Linear(inputs, inputs), nn.ELU(), nn.Linear(inputs, inputs), nn.ELU(), nn.Linear(inputs, outputs)
    )


def set_encoder(item_shape: tuple[int, ...], width: int, norm: Norm) -> nn.Sequential:
    """The encoder of single examples: [B, *item_shape] to [B, width].

    It has five blocks of convolution, normalisation, ReLU and pooling, and fewer for small images.
    """
    require(len(item_shape) == 3, "algorithm=cnaps: needs images; choose algorithm=versa")
    channels, side = item_shape[0], min(item_shape[1:])
    layers: list[nn.Module] = []
    for i in range(min(5, int(math.log2(side)))):
        layers += [nn.Conv2d(width if i else channels, width, 3, padding=1), norm_layer(norm, width)]
        layers += [nn.ReLU(), nn.MaxPool2d(2)]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten())
