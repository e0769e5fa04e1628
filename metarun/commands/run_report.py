"""The part of `metarun report` for training runs: figures of all, their differences, each one's own."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from torch import Tensor

from metarun.commands.example import FILE
from metarun.config.schema import path_kind
from metarun.config.variants import method_of
from metarun.errors import counted, printable
from metarun.reporting.classes import class_rows
from metarun.reporting.console import relative, shortened
from metarun.reporting.destinations import flat
from metarun.reporting.pictures import confusion_figure
from metarun.reporting.report import (
    MOST_CURVES,
    CellText,
    Example,
    Section,
    cell,
    curves,
    matrix,
    number,
    picture,
    pixels,
    regression,
    text,
)
from metarun.tasks.objectives import metric_named
from metarun.training.records import Figure, Record, content_of, rows_of

COLUMNS = 5  # runs beside each other in a table of settings, so that it fits a printed page
DRAWN = 30  # the most classes of a confusion matrix that is drawn; of more, the worst classes are listed
WORST = 15
RUN_COLUMNS = (
    *("run", "started", "method", "dataset", "status"),
    *("validation", "test", "seconds", "verdict or error"),
)
ALL_THE_SAME = "These runs have the same settings."


def run_sections(runs: Sequence[Record]) -> Iterator[Section]:
    """The parts of a report on training runs."""
    if not runs:
        return
    yield Section("Runs", columns=RUN_COLUMNS, rows=[run_row(each) for each in runs])
    for metric in dict.fromkeys(each.metric for each in runs if each.metric):
        yield from curve_sections(metric, [each for each in runs if each.metric == metric])
    if len(runs) > 1:
        text = "Only runs on the same dataset are compared. A group with other options is one line."
        yield Section("Settings that differ", text, parts=list(differing_settings(runs)))
    folded = len(runs) > 1
    yield Section("Each run", parts=[run_section(each, folded) for each in runs])


def curve_sections(metric: str, runs: Sequence[Record]) -> Iterator[Section]:
    """The learning curves of a metric: a figure for each dataset, whose scores cannot be compared."""
    figures, more = [], ""
    for dataset, own in by_dataset(runs).items():
        rows = {name_of(each): found for each in own if (found := validations(each))}
        if rows:
            figures.append(curves(rows, metric, scale_of(metric), dataset or "unknown dataset"))
        if len(rows) > MOST_CURVES:
            more = f" The first {MOST_CURVES} of {len(rows)} runs on {dataset} are drawn."
    if figures:
        what = "Bands are 95 % intervals over the validation tasks." + more
        yield Section(f"Learning curves: {metric}", what, figures=figures)


def by_dataset(runs: Sequence[Record]) -> dict[str, list[Record]]:
    """The runs of each dataset."""
    found: dict[str, list[Record]] = {}
    for each in runs:
        found.setdefault(each.choices.get("dataset", ""), []).append(each)
    return found


def run_row(each: Record) -> list[CellText]:
    """The row of a run."""
    verdict = "; ".join(each.verdicts) or each.why
    seconds = each.result.get("seconds")
    return [
        text(name_of(each)),
        CellText(when := f"{each.started:%Y-%m-%d %H:%M}", when, number=True),
        text(method_of(each)),
        text(each.choices.get("dataset")),
        text(each.status),
        score(each.validation, each.metric),
        score(each.test, each.metric),
        number(seconds if isinstance(seconds, (int, float)) else None),
        text(verdict),
    ]


def name_of(each: Record) -> str:
    """The folder of a run, as it is typed."""
    return printable(relative(each.folder))


def scale_of(metric: str) -> int:
    """What scores of a metric are multiplied by before they are shown."""
    known = metric_named(metric)
    return known.scale if known else 1


def score(figure: Figure | None, metric: str) -> CellText:
    """A score with its interval."""
    return number(None) if figure is None else interval(figure.mean, figure.interval, metric)


def interval(mean: float, half: float, metric: str) -> CellText:
    """A mean with half of its interval."""
    known = metric_named(metric)
    shown = known.show_interval(mean, half) if known else f"{mean:.4f} ± {half:.4f}"
    return number(mean, shown)


def validations(each: Record) -> list[dict[str, Any]]:
    """The validation rows of a run."""
    rows = rows_of(each.folder / "metrics.jsonl")
    return [row for row in rows if row.get("split") == "validation" and isinstance(row.get("iteration"), int)]


# settings


def differing_settings(runs: Sequence[Record]) -> Iterator[Section]:
    """The settings that differ, for each dataset with several runs; a few runs beside each other."""
    for dataset, own in by_dataset(runs).items():
        if len(own) == 1:
            continue
        differing = differences(own)
        if not differing:
            yield Section(dataset, ALL_THE_SAME)
        for some in (range(len(own))[i : i + COLUMNS] for i in range(0, len(own), COLUMNS)):
            rows = [[text(key), *(cell(values[i]) for i in some)] for key, values in differing.items()]
            yield Section(dataset, columns=["setting", *(name_of(own[i]) for i in some)], rows=rows)


def differences(runs: Sequence[Record]) -> dict[str, list[Any]]:
    """The settings that are not the same in all runs, with the value of each run.

    Where runs have other options of a group, its settings are not compared one by one.
    """
    configs = [dict(flat(config_of(each.folder))) for each in runs]
    groups = dict.fromkeys(group for each in runs for group in each.choices if "/" not in group)
    chosen = {group: [each.choices.get(group, "") for each in runs] for group in groups}
    other = {group: options for group, options in chosen.items() if differ(options)}
    keys = dict.fromkeys(key for config in configs for key in config)
    compared = [key for key in keys if key.partition(".")[0] not in {*other, "published"}]
    every = {key: [config.get(key, "") for config in configs] for key in compared}
    other.pop("pairing", None)  # it follows from the dataset and the algorithm
    return other | {key: values for key, values in every.items() if differ(values)}


def differ(values: Sequence[Any]) -> bool:
    """Whether values are not all the same."""
    return any(value != values[0] for value in values)


def config_of(folder: Path) -> dict[str, Any]:
    """The config of a run, empty where it cannot be read."""
    try:
        content = OmegaConf.to_container(OmegaConf.load(folder / ".hydra" / "config.yaml"), resolve=False)
    except (OSError, ValueError, OmegaConfBaseException):
        return {}
    except Exception as error:  # of the YAML parser
        if "yaml" not in type(error).__module__:
            raise
        return {}
    return content if isinstance(content, dict) else {}  # type: ignore[return-value]


# each run


def run_section(each: Record, folded: bool) -> Section:
    """What there is to show of one run alone."""
    task = content_of(each.folder / FILE)
    what, machine = each.result.get("name", ""), content_of(each.folder / "machine.json")
    facts = {"status": " ".join(filter(None, (each.status, each.why)))}
    facts |= {"best iteration": str(part_of(each.result, "validation").get("iteration", ""))}
    facts |= {str(key): str(value) for key, value in machine.items()}
    parts = [*example_sections(task), *confusion_sections(task)]
    shown = {key: printable(value) for key, value in facts.items() if value}
    codes = [command_of(each)]
    return Section(name_of(each), printable(str(what)), facts=shown, codes=codes, parts=parts, folded=folded)


def part_of(content: Mapping[str, Any], key: str) -> dict[str, Any]:
    """A part of the content of a file if it is a mapping, else nothing."""
    value = content.get(key)
    return value if isinstance(value, dict) else {}


def command_of(each: Record) -> str:
    """What to type to repeat a run."""
    overrides = each.result.get("overrides")
    words = [as_typed(str(word)) for word in overrides] if isinstance(overrides, list) else []
    return printable(shlex.join(["metarun", "train", *words]))


def as_typed(word: str) -> str:
    """A recorded setting as it is typed: paths are recorded with quotes, which the command line adds."""
    key, _, value = word.partition("=")
    quoted = re.fullmatch(r"'([^'\\]*)'", value) if path_kind("train", key) else None
    return f"{key}={quoted[1]}" if quoted else word


def example_sections(task: Mapping[str, Any]) -> Iterator[Section]:
    """The support and the queries of a task with the predictions; of an environment, its inner steps."""
    title = f"A test task: {task.get('shape')}" + (f" of {task['dataset']}" if task.get("dataset") else "")
    steps, support, queries = (rows_in(task, key) for key in ("steps", "support", "queries"))
    if steps:
        columns, rows = table_of(steps)
        yield Section(title, str(task.get("about", "")), columns=columns, rows=rows)
    if not queries:
        return
    if is_curve(support, queries):
        yield Section(title, figures=[regression(support, queries, title)])
        return
    sizes = task.get("examples")
    sizes = sizes if isinstance(sizes, list) else []
    for (what, rows_of_part), size in zip(
        {"support": support, "queries with predictions": queries}.items(), [*sizes, 0, 0], strict=False
    ):
        first = f"The first {len(rows_of_part)} of {size}." if size > len(rows_of_part) else ""
        heading = f"{title}, {what}"
        if any(picture(row.get("picture")) for row in rows_of_part):
            yield Section(heading, first, examples=[example(row) for row in rows_of_part])
        elif rows_of_part:
            columns, rows = table_of(rows_of_part)
            yield Section(heading, first, columns=columns, rows=rows)


def rows_in(task: Mapping[str, Any], key: str) -> list[dict[str, Any]]:
    """The rows of a part of a task."""
    value = task.get(key)
    return [row for row in value if isinstance(row, dict)] if isinstance(value, list) else []


def is_curve(support: Sequence[Mapping[str, Any]], queries: Sequence[Mapping[str, Any]]) -> bool:
    """Whether the examples of a regression are points of a plane."""
    keys = [*((row, ("x", "y")) for row in support), *((row, ("x", "y", "prediction")) for row in queries)]
    return all(isinstance(row.get(key), float) for row, wanted in keys for key in wanted)


def table_of(rows: Sequence[Mapping[str, Any]]) -> tuple[list[str], list[list[CellText]]]:
    """The columns and the cells of rows from a file."""
    columns = list(dict.fromkeys(str(key) for row in rows for key in row))
    return columns, [[cell(row.get(key)) for key in columns] for row in map(marked, rows)]


def marked(row: Mapping[str, Any]) -> dict[str, Any]:
    """A row whose predicted class is marked as right or wrong."""
    if "class" not in row or "prediction" not in row:
        return dict(row)
    return {**row, "prediction": f"{'✓' if row['prediction'] == row['class'] else '✗'} {row['prediction']}"}


def example(row: Mapping[str, Any]) -> Example:
    """A picture of a task, with its class and what was predicted."""
    true, predicted = (shortened(str(row.get(key, "")), 24) for key in ("class", "prediction"))
    if "prediction" not in row:
        return Example(picture(row.get("picture")), [true])
    right = row["prediction"] == row.get("class")
    probability = row.get("probability")
    shown = f"{probability:.2f}" if isinstance(probability, float) else ""
    lines = [f"✓ {true}" if right else f"✗ {predicted}", *([] if right else [f"is {true}"]), shown]
    return Example(picture(row.get("picture")), lines, "right" if right else "wrong")


def confusion_sections(task: Mapping[str, Any]) -> Iterator[Section]:
    """The confusion matrices of a test: drawn, or of many classes the worst of them."""
    for dataset, content in part_of(task, "confusions").items():
        try:
            names = [printable(str(name)) for name in content["classes"]]
            counts = torch.from_numpy(matrix(len(names), content["counts"]))
        except (TypeError, KeyError, ValueError, IndexError, OverflowError):
            continue
        yield from matrix_sections(f"of the test{f', {dataset}' if dataset else ''}", names, counts)


def matrix_sections(what: str, names: Sequence[str], counts: Tensor) -> Iterator[Section]:
    """A confusion matrix, drawn unless it has many classes, and the worst of its classes."""
    rows = sorted(class_rows(counts, names), key=lambda row: row["f1"])
    if len(names) <= DRAWN:
        label = (
            f"Confusion matrix {what}: {counted(len(names), 'class', 'classes')}; the table has the numbers"
        )
        figures = [pixels(confusion_figure(counts, names, ""), label)]
        yield Section(f"Confusion matrix {what}", figures=figures)
    columns = ["class", "queries", "precision", "recall", "f1", "most often taken for"]
    shown = f"The {WORST} classes with the lowest F1 of {len(rows)}." if len(rows) > WORST else ""
    cells = [[share(row, key) for key in columns] for row in rows[:WORST]]
    yield Section(f"Classes {what}", shown, columns=columns, rows=cells)


def share(row: Mapping[str, Any], key: str) -> CellText:
    """The cell of a figure of a class."""
    percent = key in ("precision", "recall", "f1")
    return number(row[key], f"{100 * row[key]:.1f} %") if percent else cell(row[key])
