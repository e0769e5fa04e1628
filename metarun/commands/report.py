"""`metarun report`: one HTML file of training runs and evaluations."""

from __future__ import annotations

import csv
import io
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig

from metarun.commands.models import values_of
from metarun.commands.run_report import interval, matrix_sections, run_sections
from metarun.config.check import check
from metarun.config.schema import ReportConfig, typed
from metarun.errors import DataError, counted, printable
from metarun.reporting.console import inform, relative
from metarun.reporting.report import CellText, Report, Section, number, text
from metarun.storage.files import read_regular, user_path, write_text
from metarun.training.records import content_of, runs_in

MATRICES = 6  # the most confusion matrices of an evaluation


def run(cfg: DictConfig) -> None:
    """Write a report as configured."""
    check(cfg, "report", typed=HydraConfig.get().overrides.task)
    command: ReportConfig = typed(cfg)
    began = time.perf_counter()
    folders = [user_path(str(each)) for each in values_of(command.runs)]
    for folder in folders:
        if not folder.is_dir():
            what = "is a file, not a folder" if folder.exists() else "no such folder"
            raise DataError(f"runs={folder}: {what}; name a run or a folder of runs")
    runs = list({each.folder.resolve(): each for folder in folders for each in runs_in(folder)}.values())
    evaluations = [each for folder in folders for each in sorted(folder.rglob("results.json"))]
    if not runs and not evaluations:
        raise DataError(f"runs={relative(folders[0])}: has neither runs nor evaluations; name another folder")
    report = Report(
        "metarun report", f"{counted(len(runs), 'run')}, {counted(len(evaluations), 'evaluation')}"
    )
    report.sections += [*run_sections(runs), *evaluation_sections(evaluations)]
    path = Path(HydraConfig.get().runtime.output_dir) / "report.html"
    content = report.html()
    write_text(path, content)
    seconds = time.perf_counter() - began
    size = len(content.encode()) / 1e6
    inform(f"saved report.html ({size:.2f} MB, {seconds:.1f} s) in {relative(path.parent)}")


def evaluation_sections(paths: Sequence[Path]) -> Iterator[Section]:
    """The parts of a report on evaluations: the grid, and the paired differences."""
    for path in paths:
        content = content_of(path)
        listed, pairs = (
            [each for each in as_list(content.get(key)) if isinstance(each, dict)] for key in PARTS
        )
        if listed:
            columns = [
                "model",
                "dataset",
                "task",
                "metric",
                "mean, 95 % interval",
                "episodes",
                "transductive",
            ]
            yield Section(
                f"Evaluation {relative(path.parent)}", columns=columns, rows=list(map(grid_row, listed))
            )
        yield from confusions_beside(path.parent)
        if pairs:
            columns = ["task", "metric", "models", "difference, 95 % interval", "excludes 0"]
            yield Section(
                "Paired differences on the same episodes", columns=columns, rows=list(map(pair_row, pairs))
            )


def confusions_beside(folder: Path) -> Iterator[Section]:
    """The confusion matrices that `metarun eval confusion=true` has written to a folder."""
    for path in sorted(folder.glob("confusion_*.csv"))[:MATRICES]:
        try:
            rows = list(csv.reader(io.StringIO(read_regular(path).decode("utf-8", "replace"))))
            names = [printable(row[1]) for row in rows[1:]]
            counts = torch.tensor([[int(cell) for cell in row[2:]] for row in rows[1:]])
        except (OSError, csv.Error, ValueError, IndexError, RuntimeError):  # it is something else
            continue
        if names and counts.shape == (len(names), len(names)) and int(counts.min()) >= 0:
            what = f"in {path.stem.removeprefix('confusion_')}"
            yield Section(f"Confusions {what}", parts=list(matrix_sections(what, names, counts)))


def as_list(value: Any) -> list[Any]:
    """The value if it is a list, else nothing."""
    return value if isinstance(value, list) else []


PARTS = ("results", "comparisons")


def grid_row(row: dict[str, Any]) -> list[CellText]:
    """The row of an evaluated cell; a reason takes the place of a result."""
    mean, half, metric = row.get("mean"), row.get("interval"), str(row.get("metric"))
    known = isinstance(mean, (int, float)) and isinstance(half, (int, float))
    return [
        text(row.get("model")),
        text(row.get("dataset")),
        text(row.get("cell")),
        text(metric),
        interval(mean, half, metric) if known else text(row.get("reason")),  # type: ignore[arg-type]
        number(row.get("episodes")),
        text({True: "yes", False: "no"}.get(row.get("uses_query_statistics"), "")),  # type: ignore[arg-type]
    ]


def pair_row(pair: dict[str, Any]) -> list[CellText]:
    """The row of a paired difference."""
    difference, half, metric = pair.get("difference"), pair.get("interval"), str(pair.get("metric"))
    known = isinstance(difference, (int, float)) and isinstance(half, (int, float))
    return [
        text(pair.get("task")),
        text(metric),
        text(f"{pair.get('a')} - {pair.get('b')}"),
        interval(difference, half, metric) if known else text(""),  # type: ignore[arg-type]
        text("yes" if known and abs(difference) > half else "no"),  # type: ignore[arg-type]
    ]
