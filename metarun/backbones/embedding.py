"""The embedding of token ids, which tasks share or adapt."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from metarun.tasks.class_store import padding_mask


class TokenEmbedding(nn.Module):
    """Token ids [B, L] to vectors as feature maps [B, width, 1, L], zero where there is padding.

    Args:
        vocabulary: the number of token ids.
        width: the size of a vector.
        shared: whether all tasks have the same table, which the outer loop alone learns. With tables of
            their own, T tasks need T times its memory.
    """

    independent = True

    def __init__(self, vocabulary: int, width: int, shared: bool = True) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(vocabulary, width) * width**-0.5)
        self.shared_by_tasks = shared

    def forward(self, ids: Tensor) -> Tensor:
        return self.maps(F.embedding(ids, self.weight), ids)

    def on_tasks(self, own: dict[str, Tensor], ids: Tensor, tasks: int) -> Tensor:
        """Ids [T, B, L] to maps [B, T*width, 1, L], by tables [T, vocabulary, width] of each task."""
        if self.shared_by_tasks:
            vectors = F.embedding(ids, self.weight)
        else:  # one table of T * vocabulary rows
            table = own["weight"]
            first = torch.arange(tasks, device=ids.device).view(-1, 1, 1) * table.shape[1]
            vectors = F.embedding(ids + first, table.flatten(0, 1))
        return self.maps(vectors, ids).transpose(0, 1).flatten(1, 2)

    def maps(self, vectors: Tensor, ids: Tensor) -> Tensor:
        """Vectors [..., L, width] as maps [..., width, 1, L]."""
        return (vectors * padding_mask(ids).unsqueeze(-1)).mT.unsqueeze(-2)
