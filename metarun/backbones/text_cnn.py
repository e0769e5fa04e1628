"""The convolutional network for sentences (Kim 2014)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from metarun.backbones.embedding import TokenEmbedding
from metarun.errors import ConfigError


class TextCNN(nn.Sequential):
    """Word vectors, convolutions over words, and the maximum over positions.

    Kim 2014, "Convolutional Neural Networks for Sentence Classification", section 2, without dropout. The
    dataset gives words in their order (`dataset.ngrams=[]`).

    Args:
        vocabulary: passed by the builder: the number of token ids.
        width: the size of a word's vector.
        filters: of each width.
        widths: of the filters, in words.
        adapts: whether word vectors are adapted to each task; False: they are the same for all tasks.
    """

    def __init__(
        self,
        vocabulary: int,
        width: int = 128,
        filters: int = 128,
        widths: Sequence[int] = (1, 3, 5),
        adapts: bool = False,
    ) -> None:
        if min(width, filters, *widths) < 1 or not widths or any(each % 2 == 0 for each in widths):
            raise ConfigError(f"backbone.widths={list(widths)}: choose odd numbers of words, such as [1,3,5]")
        super().__init__(
            TokenEmbedding(vocabulary, width, shared=not adapts), WordFilters(width, filters, widths)
        )
        self.features = filters * len(widths)


class WordFilters(nn.Module):
    """Filters of several widths, ReLU, and the maximum over positions.

    Maps [B, C, 1, L] to vectors [B, filters * widths].
    """

    independent = True

    def __init__(self, width: int, filters: int, widths: Sequence[int]) -> None:
        super().__init__()
        self.convolutions = nn.ModuleList(
            nn.Conv2d(width, filters, (1, each), padding=(0, each // 2)) for each in widths
        )

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([F.relu(layer(x)).amax((2, 3)) for layer in self.convolutions], 1)

    def on_tasks(self, own: dict[str, Tensor], x: Tensor, tasks: int) -> Tensor:
        """Maps [B, T*C, 1, L] to vectors [T, B, filters * widths]."""
        found = []
        for i in range(len(self.convolutions)):
            weight, bias = (own[f"convolutions.{i}.{key}"].flatten(0, 1) for key in ("weight", "bias"))
            maps = F.conv2d(x, weight, bias, padding=(0, weight.shape[3] // 2), groups=tasks)
            found.append(F.relu(maps).amax((2, 3)).unflatten(1, (tasks, -1)).transpose(0, 1))
        return torch.cat(found, 2)
