"""Texts as bags of weighted words and n-grams."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from metarun.errors import check_above_0
from metarun.tasks.class_store import ClassStore, padding_mask
from metarun.tasks.source import EpisodeSource

UNIT = 20.0  # of the weights: a step of 0.001 of Adam changes them by 0.02
MODEST = 1e-12  # added to a squared length, so that an empty text has derivatives


class Bag(nn.Sequential):
    """Texts as bags of words and n-grams with learned weights, for texts of any language.

    The feature vector of a text sums a signed unit vector for each of its tokens, which is the same for the
    same token, times the token's weight (feature hashing, Weinberger et al. 2009, section 2). The weights
    start at the inverse document frequencies of the training texts and are learned. The vectors have
    the same length, so that distances are those of angles.

    Args:
        vocabulary: passed by the builder: the number of token ids.
        features: the size of the vectors. Angles between texts are kept the better the larger it is.
        length: the length of the vectors.
        adapts: whether the weights of tokens are adapted to each task; False: they are the same for all
            tasks, and gradient-based methods adapt their head alone.
    """

    def __init__(
        self, vocabulary: int, features: int = 2048, length: float = 3.0, adapts: bool = False
    ) -> None:
        check_above_0("backbone", features=features, length=length)
        super().__init__(WeightedTokens(vocabulary, features, length, shared=not adapts))
        self.features = features

    def on_run_start(self, train: EpisodeSource) -> None:
        """Set the weights to the inverse document frequencies of the training texts."""
        layer = self[0]
        assert isinstance(layer, WeightedTokens) and isinstance(train, ClassStore)
        with torch.no_grad():
            layer.weight.copy_(inverse_document_frequencies(train.items, len(layer.weight)) / UNIT)


class WeightedTokens(nn.Module):
    """Token ids [B, L] to vectors [B, features]; see `Bag`."""

    places: Tensor
    signs: Tensor

    def __init__(self, vocabulary: int, features: int, length: float, shared: bool) -> None:
        super().__init__()
        self.features, self.length, self.shared_by_tasks = features, length, shared
        self.weight = nn.Parameter(torch.full((vocabulary,), 1 / UNIT))
        # Always the same vectors, so that they need not be in a checkpoint.
        generator = torch.Generator().manual_seed(0)
        places = torch.randint(features, (vocabulary,), generator=generator)
        signs = torch.randint(2, (vocabulary,), generator=generator) * 2.0 - 1
        self.register_buffer("places", places, persistent=False)
        self.register_buffer("signs", signs, persistent=False)

    def forward(self, ids: Tensor) -> Tensor:
        return self.summed(self.weight[ids], ids)

    def on_tasks(self, own: dict[str, Tensor], ids: Tensor, tasks: int) -> Tensor:
        """Ids [T, B, L] to vectors [T, B, features], by weights [T, vocabulary] of each task."""
        if self.shared_by_tasks:
            return self(ids)
        return self.summed(own["weight"].gather(1, ids.flatten(1)).view(ids.shape), ids)

    def summed(self, weights: Tensor, ids: Tensor) -> Tensor:
        """The vectors [..., features] of ids and their weights [..., L]."""
        signs = self.signs.to(weights.dtype)[ids] * padding_mask(ids)
        sums = weights.new_zeros(*ids.shape[:-1], self.features)
        sums = sums.scatter_add(-1, self.places[ids], UNIT * weights * signs)
        return self.length * sums * (sums.square().sum(-1, keepdim=True) + MODEST).rsqrt()


def inverse_document_frequencies(items: Tensor, vocabulary: int) -> Tensor:
    """log((1 + n) / (1 + m)) + 1 for each token id, which m of n texts contain; as in scikit-learn.

    Args:
        items: token ids [n, L].
        vocabulary: the number of token ids.
    """
    ordered = items.sort(1).values
    first = torch.ones_like(ordered, dtype=torch.bool)
    first[:, 1:] = ordered[:, 1:] != ordered[:, :-1]  # a text counts once for each of its tokens
    counts = torch.bincount(ordered[first].long(), minlength=vocabulary)
    return ((1 + len(items)) / (1 + counts.double())).log().float() + 1
