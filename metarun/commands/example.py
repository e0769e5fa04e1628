"""What `metarun train` records for `metarun report`: a test task with its predictions, and confusions."""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from metarun.algorithms.base import Algorithm
from metarun.commands import environments
from metarun.commands.predictions import class_rows, value_rows
from metarun.datasets.environments.base import EnvironmentSource
from metarun.storage.files import write_json
from metarun.tasks.class_store import ClassStore
from metarun.tasks.episodes import Episodes
from metarun.tasks.rollouts import Rollouts
from metarun.tasks.sampling import fixed_draws
from metarun.tasks.source import Draw, EpisodeSource
from metarun.training.evaluation import EvalSettings, Result, evaluating
from metarun.training.hardware import Hardware

FILE = "test_task.json"
MOST_CLASSES = 500  # in a confusion matrix that is counted without being asked for
MOST_SUPPORT, MOST_QUERIES = 20, 30  # examples that are shown
SIDE = 56  # pixels of a picture at most


def counts_confusion(source: EpisodeSource) -> bool:
    """Whether the test counts which classes were taken for which."""
    return 0 < len(source.names) <= MOST_CLASSES


def write_example(
    algorithm: Algorithm,
    source: EpisodeSource,
    test: EvalSettings,
    result: Result,
    hardware: Hardware,
    folder: Path,
) -> None:
    """Write test_task.json: the first task of a test with its predictions, and the confusions of the test.

    Args:
        algorithm: with the tested weights.
        source: the test split; of several datasets, a task of the first is shown.
        test: the tasks.
        result: the result of the test.
        hardware: the device and the precision.
        folder: the run folder.
    """
    name, source_of_task = next(iter(source.parts.items()), ("", source))
    draw = next(fixed_draws(source_of_task, test.shape, 1, test.seed))
    with evaluating(algorithm, hardware, test.seed):
        task = example_of(algorithm, source_of_task, test, draw, hardware)
    parts = result.parts or {"": result}
    confusions = {
        part: confusion_of(own.confusion, (source.parts or {"": source})[part].names)
        for part, own in parts.items()
        if own.confusion is not None
    }
    content = {"dataset": name, "shape": source.spec.task_name(test.shape), **task, "confusions": confusions}
    write_json(folder / FILE, content, indent=None)


def example_of(
    algorithm: Algorithm, source: EpisodeSource, test: EvalSettings, draw: Draw, hardware: Hardware
) -> dict[str, Any]:
    """The task of a draw with T = 1, as plain values; empty for a kind of tasks that cannot be shown."""
    tasks = source.gather(draw, test.shape).to(hardware.dtype)
    if isinstance(tasks, Rollouts) and isinstance(source, EnvironmentSource):
        rows, *_ = environments.follow(algorithm, tasks)
        words = environments.task_in_words(source.parameters(draw))
        return {"about": words, "steps": [{key: finite(value) for key, value in row.items()} for row in rows]}
    if not isinstance(tasks, Episodes):
        return {}
    balanced = algorithm.balanced(tasks)
    outputs = algorithm.predictor(algorithm.adapt(balanced), balanced)(tasks.query_x)
    support, queries = examples_in(source, tasks, draw, test)
    predicted = predictions_of(source, tasks, outputs.to(hardware.dtype))
    return {
        "support": support[:MOST_SUPPORT],
        "queries": [row | own for row, own in zip(queries, predicted, strict=True)][:MOST_QUERIES],
        "examples": [len(support), len(queries)],
    }


def examples_in(
    source: EpisodeSource, tasks: Episodes, draw: Draw, test: EvalSettings
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """The support and the queries as rows: pictures, words, or numbers with their classes."""
    if source.readable:
        rows = source.examples(draw, test.shape)
        parts = [row.get("role", row.get("part")) for row in rows]
        renamed = {"label": "class", "role": "", "part": ""}
        shown = [{name: row[key] for key in row if (name := renamed.get(key, key))} for row in rows]
        support, queries = (
            [row for row, part in zip(shown, parts, strict=True) if (part == "query") == is_query]
            for is_query in (False, True)
        )
        return support, queries
    classes = [] if tasks.classes is None else [source.names[i] for i in tasks.classes[0].tolist()]
    both = (tasks.support_x, tasks.support_y), (tasks.query_x, tasks.query_y)
    support, queries = ([*plain_rows(source, x[0], y[0], classes)] for x, y in both)
    return support, queries


def plain_rows(
    source: EpisodeSource, items: Tensor, targets: Tensor, classes: Sequence[str]
) -> Iterator[dict[str, Any]]:
    """Examples [B, *item] as rows, with their classes; of a regression, numbers with their values."""
    pictures = isinstance(source, ClassStore) and source.spec.kind == "images"
    values = targets if classes else source.spec.objective.to_units(targets)
    for item, target in zip(items, values.tolist(), strict=True):
        answer = {"class": classes[target]} if classes else named("y", target)
        yield answer | ({"picture": picture(item)} if pictures else named("x", item.flatten().tolist()))


def named(name: str, numbers: Sequence[float], most: int = 5) -> dict[str, float | None]:
    """The first numbers of a vector by name."""
    if len(numbers) == 1:
        return {name: finite(numbers[0])}
    return {f"{name} {i}": finite(value) for i, value in enumerate(numbers[:most], start=1)}


def predictions_of(source: EpisodeSource, tasks: Episodes, outputs: Tensor) -> list[dict[str, Any]]:
    """What was predicted of each query: its class and the probability, or the values."""
    names = [""] * outputs.shape[1]
    if tasks.classes is None:
        objective = source.spec.objective
        rows = value_rows(names, objective.to_units(outputs), objective.to_units(tasks.query_y))
        return [{key: finite(row[key]) for key in row if key.startswith("prediction")} for row in rows]
    classes = [source.names[i] for i in tasks.classes[0].tolist()]
    kept = ("class", "prediction", "probability")
    rows = class_rows(names, classes, outputs, tasks.query_y)
    return [{key: row[key] for key in kept} for row in rows]


def confusion_of(counts: Tensor, names: Sequence[str]) -> dict[str, Any]:
    """The classes of a confusion matrix that occur, and its counts above 0: [class, prediction, count]."""
    present = (counts.sum(0) + counts.sum(1)).nonzero().flatten()
    kept = counts[present][:, present]
    cells = kept.nonzero()
    triples = torch.cat([cells, kept[tuple(cells.T)].unsqueeze(1)], 1)
    return {"classes": [names[i] for i in present.tolist()], "counts": triples.tolist()}


def picture(item: Tensor) -> str:
    """An image [C, H, W] with values from 0 to 1 as a small picture, in the form of an address."""
    pixels = (item[:3] if item.shape[0] >= 3 else item[:1]).clamp(0, 1).mul(255).round().to(torch.uint8)
    array = pixels.permute(1, 2, 0).numpy(force=True)
    colour = array.shape[2] == 3
    image = Image.fromarray(array if colour else array[:, :, 0])
    image.thumbnail((SIDE, SIDE))
    buffer = io.BytesIO()
    image.save(buffer, "JPEG" if colour else "PNG", **({"quality": 80} if colour else {"optimize": True}))
    kind = "jpeg" if colour else "png"
    return f"data:image/{kind};base64,{base64.b64encode(buffer.getvalue()).decode()}"


def finite(value: float) -> float | None:
    """A number; None in place of one that JSON does not have."""
    return value if math.isfinite(value) else None
