"""What the files of a run folder tell about a run, without its checkpoints; PyTorch is not imported."""

from __future__ import annotations

import contextlib
import json
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any, Literal

from metarun.errors import printable
from metarun.storage.files import read_regular, write_json
from metarun.storage.locks import is_taken

Status = Literal["running", "ended", "stopped", "failed"]
FILES = {"metrics.jsonl", "last.pt", "best.pt", "result.json"}  # each of them makes a folder a run
NOT_FINISHED = "not finished"  # how failure.json begins of a job that was started and has not failed
NOT_FIGURES = ("iteration", "split", "loss", "interval", "seconds")
STARTED = re.compile(r"\d{4}-\d\d-\d\d_\d\d-\d\d-\d\d")  # in the name that metarun gives a folder
CHOICES = re.compile(r"^    choices:\n((?:      .*\n)+)", re.MULTILINE)  # in .hydra/hydra.yaml
SETTING = re.compile(r"^(\w+): (\S+)$", re.MULTILINE)  # in .hydra/config.yaml, those that are in no group


@dataclass(frozen=True)
class Figure:
    """A score of a run: its mean over episodes, and half of its 95 % interval."""

    mean: float
    interval: float


@dataclass(frozen=True)
class Record:
    """A training run.

    Args:
        folder: the run folder.
        started: when it was started.
        status: "stopped" is a run without a result that no process works on.
        why: of a failed run, the error; of others "".
        choices: the options of its groups, such as {"algorithm": "maml"}; what is not known is missing.
        settings: the settings that are in no group, such as {"norm": "batch"}; likewise.
        iteration: the last one that was logged.
        metric: the name of the first metric; "" where it is not known.
        validation, test: the best validation, and the test of the best checkpoint, if there were any.
        verdicts: how the test compares with published results, if the run is one of a recipe.
        result: the content of result.json; empty without one.
    """

    folder: Path
    started: datetime
    status: Status
    why: str
    choices: dict[str, str]
    settings: dict[str, str | bool]
    iteration: int
    metric: str
    validation: Figure | None
    test: Figure | None
    verdicts: tuple[str, ...]
    result: dict[str, Any]


def runs_in(folder: Path) -> list[Record]:
    """The runs in a folder and below it, and the folder itself if it is one, in the order of their paths."""
    found = []
    for path, folders, files in os.walk(folder):
        folders[:] = sorted(name for name in folders if not name.startswith(".") and name != "tensorboard")
        if FILES & {*files} or ("failure.json" in files and is_training(Path(path))):
            with contextlib.suppress(OSError):  # it was removed while it was read
                found.append(record_of(Path(path)))
    return found


def record_of(folder: Path) -> Record:
    """The record of a run folder, whatever of it is there. Raises OSError if there is no such folder."""
    result, failure = content_of(folder / "result.json"), content_of(folder / "failure.json")
    rows = [row for row in rows_of(folder / "metrics.jsonl") if isinstance(row.get("iteration"), int)]
    validated = [row for row in rows if row.get("split") == "validation"]
    metric = result.get("metric")
    if not isinstance(metric, str):
        metric = next((key for key in (validated or [{}])[0] if key not in NOT_FIGURES), "")
    figures = [found for row in validated if (found := figure_of(row, metric))]
    settings = settings_of(folder)
    so_far = figures[-1:] if settings.get("trainval") is True else figures  # as best.pt
    best = figure_of(result.get("validation"), "mean") or best_of(so_far, metric)
    error = printable(str(failure.get("error", "")))
    failed = bool(failure) and not error.startswith(NOT_FINISHED)
    status: Status = "ended" if result else "failed" if failed else "stopped"
    if is_taken(folder / "run"):
        status = "running"
    last = max((row["iteration"] for row in rows), default=0)
    return Record(
        folder=folder,
        started=datetime.fromtimestamp(started(folder)),
        status=status,
        why=error if status == "failed" else "",
        choices=choices_of(folder, result),
        settings=settings,
        iteration=last,
        metric=metric,
        validation=best,
        test=figure_of(result.get("test"), "mean"),
        verdicts=verdicts_of(result),
        result=result,
    )


def write_failure(
    folder: Path, overrides: list[str], error: str, choices: Mapping[str, Any] | None = None
) -> None:
    """Write failure.json: why a run, or another job of a sweep, has failed. A full disk leaves it unsaid.

    Args:
        folder: of the run.
        overrides: the typed settings.
        error: in one line.
        choices: the options of its groups, of a job that may fail before its settings are written.
    """
    with contextlib.suppress(OSError):
        content: dict[str, Any] = {"overrides": overrides, "error": error}
        write_json(folder / "failure.json", content | ({"choices": choices} if choices else {}))


def started(folder: Path) -> float:
    """When a run was started: the date in the name of its folder, or in its record of the machine.

    The config is written at that time, too, but a copy of the folder may be younger.
    """
    if named := STARTED.match(folder.name):
        with contextlib.suppress(ValueError):  # such as a 13th month
            return datetime.strptime(named[0], "%Y-%m-%d_%H-%M-%S").timestamp()
    with contextlib.suppress(ValueError, TypeError, KeyError):
        return datetime.fromisoformat(content_of(folder / "machine.json")["started"]).timestamp()
    config = folder / ".hydra" / "config.yaml"
    return (config if config.exists() else folder).stat().st_mtime


def is_training(folder: Path) -> bool:
    """Whether a job that failed was one of `metarun train`."""
    overrides = content_of(folder / "failure.json").get("overrides")
    return isinstance(overrides, list) and not any(str(each).startswith("checkpoint=") for each in overrides)


def content_of(path: Path) -> dict[str, Any]:
    """The content of a JSON file; empty if it is missing, damaged or something else."""
    try:
        content = json.loads(read_regular(path))
    except (OSError, ValueError, RecursionError):
        return {}
    return content if isinstance(content, dict) else {}


def rows_of(path: Path) -> Iterator[dict[str, Any]]:
    """The rows of a metrics.jsonl; lines that are no rows, such as half of one, are left out."""
    try:
        lines = read_regular(path).splitlines()
    except OSError:
        return
    for line in lines:
        with contextlib.suppress(ValueError, RecursionError):
            if isinstance(row := json.loads(line), dict):
                yield row


def figure_of(values: Any, name: str) -> Figure | None:
    """The figure in a row or a part of a result; None if there is none."""
    if not isinstance(values, dict):
        return None
    mean, half = values.get(name), values.get("interval")
    known = isinstance(mean, (int, float)) and isinstance(half, (int, float))
    return Figure(float(mean), float(half)) if known else None  # type: ignore[arg-type]


def best_of(figures: list[Figure], metric: str) -> Figure | None:
    """The best of the validations so far."""
    from metarun.tasks.objectives import metric_named  # imports torch

    known = metric_named(metric)
    sign = -1 if known and not known.higher_is_better else 1
    numbers = [each for each in figures if each.mean == each.mean]
    return max(numbers, key=lambda each: sign * each.mean, default=None)


def verdicts_of(result: dict[str, Any]) -> tuple[str, ...]:
    """The verdicts in a result."""
    listed = result.get("verdicts")
    entries = [each for each in listed if isinstance(each, dict)] if isinstance(listed, list) else []
    return tuple(printable(str(each["verdict"])) for each in entries if "verdict" in each)


def choices_of(folder: Path, result: dict[str, Any]) -> dict[str, str]:
    """The options of the groups of a run, from Hydra's record; else from its name, or its failure."""
    with contextlib.suppress(OSError, UnicodeDecodeError):
        text = read_regular(folder / ".hydra" / "hydra.yaml").decode()
        if found := CHOICES.search(text):
            pairs = (line.strip().partition(": ") for line in found[1].splitlines())
            return {name: printable(option) for name, _, option in pairs if option and option != "null"}
    if named := re.match(r"(\S+)(?: \S+=\S+)* on ([^,]+),", str(result.get("name", ""))):
        return dict(zip(("algorithm", "dataset"), map(printable, named.groups()), strict=True))
    noted = content_of(folder / "failure.json").get("choices")
    options = noted if isinstance(noted, dict) else {}
    return {name: printable(option) for name, option in options.items() if isinstance(option, str)}


def settings_of(folder: Path) -> dict[str, str | bool]:
    """The settings of a run that are in no group, from its config."""
    with contextlib.suppress(OSError, UnicodeDecodeError):
        pairs = SETTING.findall(read_regular(folder / ".hydra" / "config.yaml").decode())
        return {name: {"true": True, "false": False}.get(value, printable(value)) for name, value in pairs}
    return {}
