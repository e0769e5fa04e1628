"""Nearest centroids of TF-IDF vectors: what a method on texts must be better than, on the same episodes."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from metarun.datasets.text.tokens import is_word, normalised, words
from metarun.reporting.console import inform
from metarun.tasks.episodes import Episodes, EpisodeShape, Outcome
from metarun.tasks.source import Draw, EpisodeSource, ReferenceOutcome

if TYPE_CHECKING:
    from metarun.datasets.text.store import TextStore

SCALE = 10.0  # of cosines as logits; accuracies do not depend on it
VECTORIZERS: dict[str, dict[str, Any]] = {
    # Not the pattern of scikit-learn, which cuts words at combining marks; punctuation is left out as there.
    "TF-IDF words": {"tokenizer": lambda text: list(filter(is_word, words(text))), "token_pattern": None},
    "TF-IDF characters": {"analyzer": "char_wb", "ngram_range": (3, 5)},
}


def tfidf_references(source: TextStore, shared: dict[Any, Any]) -> dict[str, ReferenceOutcome]:
    """Two rows of TF-IDF vectors for tasks on texts; needs scikit-learn. See `EpisodeSource.references`."""
    try:
        from sklearn.feature_extraction.text import CountVectorizer, TfidfTransformer
    except ImportError:
        if shared.setdefault("scikit-learn", True):
            inform("pip install scikit-learn to see the accuracy of TF-IDF vectors on the same episodes")
        shared["scikit-learn"] = False
        return {}
    found: dict[str, ReferenceOutcome] = {}
    for name, settings in VECTORIZERS.items():
        key = id(source.texts), name  # sources of several languages have the same texts
        if key not in shared:
            # Every word is counted, also one that is in no training text; its weight is then the largest.
            texts = [*source.texts, *source.descriptions, *source.background]
            try:
                counts = CountVectorizer(preprocessor=normalised, **settings).fit_transform(texts)
            except ValueError:  # there is nothing to count
                inform(f"{source.name}: no text has a word, so there is no row of {name}")
                continue
            weights = TfidfTransformer().fit(counts[-len(source.background) :])
            shared[key] = weights.transform(counts)
        found[name] = partial(scored, source.numbered(), shared[key])
    return found


def scored(source: EpisodeSource, vectors: Any, draw: Draw, shape: EpisodeShape) -> Outcome:
    """The outcome of nearest centroids on tasks.

    Args:
        source: whose examples are the numbers of texts.
        vectors: a sparse matrix with a row for each text, and for each description of a class after them.
        draw, shape: the tasks.
    """
    tasks = source.gather(draw, shape)
    assert isinstance(tasks, Episodes)
    return tasks.outcome(torch.stack([SCALE * each for each in nearest_centroids(vectors, tasks)]))


def nearest_centroids(vectors: Any, tasks: Episodes) -> Iterator[Tensor]:
    """The cosines of queries and class means [B, N] of one task after the other.

    Args:
        vectors: a sparse matrix with a row for each text.
        tasks: with the number of a text as example, [T, S, 1] and [T, B, 1].
    """
    for support, y, query in zip(tasks.support_x, tasks.support_y, tasks.query_x, strict=True):
        members = (y == torch.arange(tasks.ways).unsqueeze(1)).numpy().astype(float)  # [N, S]
        means = members @ vectors[support.flatten().numpy()]  # [N, words]
        means /= np.linalg.norm(means, axis=1, keepdims=True).clip(1e-12)
        yield torch.from_numpy(vectors[query.flatten().numpy()] @ means.T)
