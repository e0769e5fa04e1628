"""The rows of TF-IDF beside results on texts, against scikit-learn's vectors in a plain loop."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from metarun.commands.cells import Cell, Reference
from metarun.commands.references import with_references
from metarun.config.schema import EvalConfig
from metarun.datasets.text.store import TextStore
from metarun.datasets.text.tokens import Tokens
from metarun.tasks.episodes import EpisodeShape
from metarun.tasks.sampling import fixed_draws
from metarun.training.evaluation import Result

pytestmark = pytest.mark.quick
sklearn = pytest.importorskip("sklearn.feature_extraction.text")


def rows_beside(store: TextStore, shape: EpisodeShape, episodes: int) -> list[Cell]:
    metrics = store.spec.objective.metrics
    result = Result(shape, metrics, {}, torch.zeros(episodes), "", False, 0.0)
    cell = Cell(Reference("a model"), shape, None, store, "made", result)
    return with_references([cell], EvalConfig(episodes=episodes, seed=3))[1:]


@pytest.mark.parametrize("shots", [0, 2])
def test_words_of_the_classes_that_are_left_in_a_plain_loop(shots):
    random = np.random.default_rng(0)
    names = [f"w{i} w{i + 1}" for i in range(7)]
    corpus = {
        name: {"": [" ".join(f"w{j}" for j in random.integers(0, 9, 3)) + f" w{i}" for _ in range(6)]}
        for i, name in enumerate(names)
    }
    train = {"seen": {"": [f"w{i} w{j}" for i in range(6) for j in range(i)]}}  # w6 to w8 are new words
    store = TextStore(corpus, names, Tokens((), 8), "made test", background=train).keeping([1, 2, 4, 6])
    shape = EpisodeShape(3, shots, 2)
    words = rows_beside(store, shape, 20)[0].result
    counted = sklearn.TfidfVectorizer(vocabulary=[f"w{i}" for i in range(9)]).fit(train["seen"][""])
    (draw,) = fixed_draws(store, shape, 20, 3)
    for task, (classes, places) in enumerate(zip(*map(torch.Tensor.tolist, draw), strict=True)):
        texts = [[corpus[store.names[c]][""][p] for p in own] for c, own in zip(classes, places, strict=True)]
        support = [own[:shots] or [store.names[c]] for c, own in zip(classes, texts, strict=True)]
        means = np.stack([counted.transform(own).toarray().mean(0) for own in support])
        queries = counted.transform([text for own in texts for text in own[shots:]]).toarray()
        found = (queries @ (means / np.linalg.norm(means, axis=1, keepdims=True)).T).argmax(1)
        assert words.scores["accuracy"][task] == pytest.approx((found == [0, 0, 1, 1, 2, 2]).mean())


def test_texts_without_words_have_no_row_of_words(capsys):
    corpus = {f"c{i}": {"": [mark * j for j in range(1, 6)]} for i, mark in enumerate("!?;")}
    store = TextStore(corpus, list("!?;"), Tokens((), 8), "made test")
    (row,) = rows_beside(store, EpisodeShape(2, 1, 2), 4)
    assert row.model.name == "TF-IDF characters"
    cells = [
        replace(row, model=Reference(name), result=replace(row.result, episodes_hash=episodes))
        for name, episodes in [("first", "1"), ("second", "1"), ("other split", "2")]
    ]
    names = [cell.model.name for cell in with_references(cells, EvalConfig(episodes=4, seed=3))[3:]]
    assert names == ["TF-IDF characters (first)", "TF-IDF characters (other split)"]
    assert "no text has a word, so there is no row of TF-IDF words" in capsys.readouterr().err
