"""Nearest centroids of TF-IDF vectors: what a method on texts must be better than, on the same episodes."""

from __future__ import annotations

import itertools
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from metarun.commands.cells import Cell, Reference
from metarun.config.schema import EvalConfig
from metarun.datasets.text.store import TextStore
from metarun.datasets.text.tokens import is_word, normalised, words
from metarun.reporting.console import inform
from metarun.tasks.episodes import Episodes
from metarun.tasks.sampling import fixed_draws
from metarun.training.evaluation import Result

SCALE = 10.0  # of cosines as logits; accuracies do not depend on it
VECTORIZERS: dict[str, dict[str, Any]] = {
    # Not the pattern of scikit-learn, which cuts words at combining marks; punctuation is left out as there.
    "TF-IDF words": {"tokenizer": lambda text: list(filter(is_word, words(text))), "token_pattern": None},
    "TF-IDF characters": {"analyzer": "char_wb", "ngram_range": (3, 5)},
}


def with_references(cells: Sequence[Cell], command: EvalConfig) -> list[Cell]:
    """The cells, with two cells of TF-IDF for the episodes of each task on texts; needs scikit-learn.

    Where models have different episodes of a task, as of two class splits, their names are added.
    """
    tasks = {
        (cell.dataset, cell.shape, cell.result.episodes_hash): cell for cell in reversed(cells) if cell.result
    }
    own = [cell for cell in reversed(tasks.values()) if isinstance(cell.source, TextStore)]
    if not own:
        return list(cells)
    try:
        from sklearn.feature_extraction.text import CountVectorizer, TfidfTransformer
    except ImportError:
        inform("pip install scikit-learn to see the accuracy of TF-IDF vectors on the same episodes")
        return list(cells)
    found, vectors = list(cells), {}
    different = Counter((cell.dataset, cell.shape) for cell in own)
    for cell, (name, settings) in itertools.product(own, VECTORIZERS.items()):
        source = cell.source
        assert isinstance(source, TextStore)
        key = id(source.texts), name  # cells of several languages have the same texts
        if key not in vectors:
            # Every word is counted, also one that is in no training text; its weight is then the largest.
            texts = [*source.texts, *source.descriptions, *source.background]
            try:
                counts = CountVectorizer(preprocessor=normalised, **settings).fit_transform(texts)
            except ValueError:  # there is nothing to count
                inform(f"{source.name}: no text has a word, so there is no row of {name}")
                continue
            weights = TfidfTransformer().fit(counts[-len(source.background) :])
            vectors[key] = weights.transform(counts)
        title = name if different[cell.dataset, cell.shape] == 1 else f"{name} ({cell.model.name})"
        found.append(
            replace(cell, model=Reference(title), steps=None, result=scored(cell, vectors[key], command))
        )
    return found


def scored(cell: Cell, vectors: Any, command: EvalConfig) -> Result:
    """The result of nearest centroids on the episodes of a cell.

    Args:
        cell: an evaluated cell on texts.
        vectors: a sparse matrix with a row for each text, and for each description of a class after them.
        command: the number and the seed of the episodes.
    """
    source, began = cell.source, time.perf_counter()
    assert isinstance(source, TextStore) and cell.result
    numbered, outcomes = source.numbered(), []
    for draw in fixed_draws(source, cell.shape, command.episodes, command.seed):
        tasks = numbered.gather(draw, cell.shape)
        logits = torch.stack([SCALE * each for each in nearest_centroids(vectors, tasks)])
        outcomes.append(tasks.outcome(logits))
    return replace(
        cell.result,
        scores={m.name: torch.cat([one.scores[m.name] for one in outcomes]) for m in cell.metrics},
        losses=torch.cat([one.loss for one in outcomes]),
        uses_query_statistics=False,
        seconds=time.perf_counter() - began,
        confusion=None,
    )


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
