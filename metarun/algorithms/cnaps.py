"""CNAPs: task embeddings modulate the network (Requeima, Gordon, Bronskill, Nowozin and Turner 2019)."""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from metarun.algorithms.feature_method import FeatureMethod, prototypes, require
from metarun.errors import ConfigError
from metarun.nn.layers import NORMS, Norm, is_called, norm_layer, replace_layers
from metarun.nn.per_task import Params, is_groupable, plain_attention
from metarun.nn.shared_weights import run_shared, runs_at_once
from metarun.tasks.episodes import Episodes, Outcome
from metarun.tasks.objectives import class_weights


class CNAPs(FeatureMethod):
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

    embeds_first = False  # it changes the backbone for each task, and encodes the images themselves

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
        self.frozen, self.penalty = frozen, penalty
        if frozen:
            backbone.requires_grad_(False)
        self.modulations = add_modulations(backbone)
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


class Modulated(nn.Sequential):
    """A layer and its modulation, which can be loaded from the weights of the layer alone.

    A network that loads its weights from a file does so by the names that its layers had before.
    """

    def _load_from_state_dict(self, state: dict[str, Any], prefix: str, *others: Any) -> None:
        for name in self[0].state_dict():
            if (weights := state.pop(prefix + name, None)) is not None:
                state[f"{prefix}0.{name}"] = weights
        super()._load_from_state_dict(state, prefix, *others)


def add_modulations(backbone: nn.Module) -> list[Modulation]:
    """Insert a Modulation after every normalisation layer; without these, after every weight layer."""
    kinds = NORMS if any(isinstance(m, NORMS) for m in backbone.modules()) else (nn.Conv2d, nn.Linear)
    added: list[Modulation] = []

    def modulated(layer: nn.Module) -> nn.Module | None:
        if not isinstance(layer, kinds) or not is_called(layer):
            return None
        channels = next(getattr(layer, n) for n in CHANNELS if hasattr(layer, n))
        added.append(Modulation(channels, last=isinstance(layer, nn.Linear)))
        return Modulated(layer, added[-1])

    replace_layers(backbone, modulated)
    if not added:
        raise ConfigError(
            "algorithm=cnaps: the backbone has no layer with channels to modulate; choose backbone=conv4"
        )
    return added


CHANNELS = ("num_features", "num_channels", "out_channels", "out_features")


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
