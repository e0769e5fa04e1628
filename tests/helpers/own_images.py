"""A user's drawings as arrays and as files."""

from __future__ import annotations

import csv
from pathlib import Path

import numpy as np
from PIL import Image

from metarun.datasets.glyphs import Glyphs


def drawings() -> tuple[np.ndarray, list[str]]:
    """Dark drawings of three unseen characters, 6 of each, uint8 [18, 28, 28], and their classes."""
    store = Glyphs(test_classes=3, seed=11).split("test")
    rows = [20 * k + i for k in range(3) for i in range(6)]
    return 255 - store.items[rows, 0].numpy(), [name for name in "abc" for _ in range(6)]


def folders(shots: int = 2) -> tuple[list[Path], list[Path]]:
    """The drawings as files in support/ and query/ of the current folder; the paths of both."""
    made: dict[str, list[Path]] = {"support": [], "query": []}
    for i, (image, label) in enumerate(zip(*drawings(), strict=True)):
        kind = "support" if i % 6 < shots else "query"
        path = Path(kind) / label / f"{i:02}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(path)
        made[kind].append(path)
    return made["support"], made["query"]


def of_file(path: Path) -> np.ndarray:
    """The probabilities in a predictions.csv, [queries, classes]."""
    with path.open() as file:
        return np.array([[float(v) for k, v in row.items() if k[:2] == "p("] for row in csv.DictReader(file)])
