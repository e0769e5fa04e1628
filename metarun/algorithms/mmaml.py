"""MMAML: multimodal MAML (Vuorio, Sun, Hu and Lim 2019, "... via Task-Aware Modulation")."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping
from itertools import pairwise
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from metarun.algorithms.maml import MAML
from metarun.errors import ConfigError
from metarun.inner_loops.base import InnerLoop
from metarun.nn.modulation import TaskScale, add_after_norms
from metarun.nn.per_task import AUTO, Params, run_on_tasks
from metarun.tasks.episodes import Episodes
from metarun.tasks.objectives import class_weights


class MMAML(MAML):
    """A task encoder modulates the initial weights, from which the inner steps then adapt (algorithm 1).

    The encoder maps the support to an embedding, from which a linear layer for each modulated layer computes
    the scale (around 1) and the shift of its channels (FiLM). They are constant in the inner loop, which
    adapt all weights of the network. Modulated are the normalisation layers of the backbone; without these,
    its weight layers, before their activations.

    - Regression: the encoder is a bidirectional LSTM of two layers over the pairs (x, y) in their order, as
      in the code; the embedding is its last output in each direction.
    - Classes: it is four convolutions with stride 2, batch norm and ReLU, the mean over the image, and a
      linear layer with ReLU; the embedding is the mean over the support images, in which every class counts
      equally. It does not see the labels, as in the code.

    Departures from the code: inner gradients are not clipped (there, at 10), and the first layer of the base
    MAML has no additional learned inputs ("bias transformation").

    Args:
        backbone, inner_loop, outputs, item_shape, classes, head, transductive, constants: see `MAML` and
            `Algorithm`.
        hidden: the units of the LSTM in each direction, or of the linear layer of the image encoder.
        width: the channels of the first convolution of the image encoder, which each further one doubles.

    Raises:
        ConfigError: if the backbone has no layer to modulate, or tasks with classes have no images.
    """

    needs = Episodes
    plays = False
    embeds_first = False

    predicts_distributions = False  # its encoder reads as many values as there are outputs

    def __init__(
        self,
        backbone: nn.Module,
        inner_loop: InnerLoop,
        outputs: int,
        item_shape: tuple[int, ...],
        classes: int | None = None,
        head: Literal["fixed", "shared"] = "fixed",
        transductive: bool = True,
        hidden: int = 40,
        width: int = 32,
        constants: int = 0,
    ) -> None:
        layers = add_after_norms(backbone, TaskScale)
        if not layers:
            raise ConfigError(
                "algorithm=mmaml: the backbone has no layer with channels to modulate; choose backbone=conv4"
            )
        super().__init__(backbone, inner_loop, outputs, head, "all", transductive, constants)
        if classes is None:
            self.encoder: nn.Module = PairEncoder(math.prod(item_shape) + outputs, hidden)
        else:
            self.encoder = ImageEncoder(item_shape, width, hidden)
        places = {id(layer): name for name, layer in self.learner.named_modules()}
        self.names = [places[id(layer)] for layer in layers]
        size: int = self.encoder.size  # type: ignore[assignment]
        self.modulators = nn.ModuleList(nn.Linear(size, 2 * layer.task_scale.numel()) for layer in layers)  # type: ignore[operator,union-attr]

    @property
    def unused_settings(self) -> Mapping[str, str]:
        images = isinstance(self.encoder, ImageEncoder)
        return {
            **super().unused_settings,
            **({} if images else {"algorithm.width": "for tasks without classes of images"}),
        }

    def is_fast(self, name: str) -> bool:
        return not name.endswith((".task_scale", ".task_shift"))

    def start(self, tasks: Episodes) -> Params:  # type: ignore[override]
        """The initial weights, with the scales and the shifts of each task."""
        params = super().start(tasks)
        embedding = self.encoder(tasks)
        for name, modulator in zip(self.names, self.modulators, strict=True):
            scale, shift = modulator(embedding).chunk(2, 1)
            params |= {f"{name}.task_scale": scale, f"{name}.task_shift": shift}
        return params


class PairEncoder(nn.Module):
    """A bidirectional LSTM over the support examples of a regression with their values.

    Args:
        inputs: the numbers of an example and its values.
        hidden: the units in each direction.
    """

    def __init__(self, inputs: int, hidden: int) -> None:
        super().__init__()
        self.lstm = nn.LSTM(inputs, hidden, num_layers=2, bidirectional=True, batch_first=True)
        self.size = 2 * hidden

    def forward(self, tasks: Episodes) -> Tensor:
        """The embeddings of T tasks, [T, size]."""
        pairs = torch.cat([tasks.support_x.flatten(2), tasks.support_y], 2)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about settings of Intel GPUs
            with torch.backends.mkldnn.flags(enabled=False):  # its fused LSTM has no backward in a trace
                outputs, _ = self.lstm(pairs)
        forward, backward = outputs.chunk(2, 2)  # [T, S, hidden] each
        return torch.cat([forward[:, -1], backward[:, 0]], 1)


class ImageEncoder(nn.Module):
    """The mean of encoded support images; batch norm takes the statistics of the support of each task.

    Args:
        item_shape: [C, H, W].
        width: the channels of the first convolution.
        hidden: the size of the embedding.
    """

    def __init__(self, item_shape: tuple[int, ...], width: int, hidden: int) -> None:
        super().__init__()
        if len(item_shape) != 3:
            raise ConfigError(
                "algorithm=mmaml: with classes it encodes images, and this dataset has none; choose "
                "algorithm=maml"
            )
        widths = [item_shape[0], *(width * 2**i for i in range(4))]
        layers: list[nn.Module] = []
        for inputs, outputs in pairwise(widths):
            convolution = nn.Conv2d(inputs, outputs, 3, stride=2, padding=1)
            layers += [convolution, nn.BatchNorm2d(outputs, track_running_stats=False), nn.ReLU()]
        self.convolutions = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten())
        self.linear = nn.Linear(widths[-1], hidden)
        self.size, self.batching = hidden, AUTO

    def forward(self, tasks: Episodes) -> Tensor:
        """The embeddings of T tasks, [T, size]."""
        own = {name: p.expand(len(tasks), *p.shape) for name, p in self.convolutions.named_parameters()}
        encoded = run_on_tasks(self.convolutions, own, tasks.support_x, self.batching)
        features = F.relu(self.linear(encoded))  # [T, S, size]
        weights = class_weights(tasks.support_y, tasks.ways).to(features.dtype)
        return (features * weights.unsqueeze(-1)).mean(1)
