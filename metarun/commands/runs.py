"""`metarun runs`: what is in a folder of runs."""

from __future__ import annotations

import fnmatch
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig
from rich.text import Text

from metarun.commands.sweeps import is_sweep, jobs_in, print_tables
from metarun.config.check import check
from metarun.config.schema import RunsConfig, typed
from metarun.config.variants import method_of
from metarun.errors import ConfigError, DataError, counted
from metarun.reporting.console import console, print_line, relative
from metarun.storage.files import user_path
from metarun.storage.locks import is_taken
from metarun.tasks.objectives import metric_named
from metarun.training.records import Figure, Record, runs_in

STYLES = {"running": "cyan", "ended": "", "stopped": "yellow", "failed": "red"}
SORTS: dict[str, Callable[[Record], object]] = {
    "date": lambda run: -run.started.timestamp(),
    "name": lambda run: str(run.folder),
    "validation": lambda run: rank(run, run.validation),
    "test": lambda run: rank(run, run.test),
}


def run(cfg: DictConfig) -> None:
    """List as configured."""
    check(cfg, "runs", typed=HydraConfig.get().overrides.task)
    command: RunsConfig = typed(cfg)
    if command.sort not in SORTS:
        raise ConfigError(f"sort={command.sort}: must be one of {', '.join(SORTS)}")
    if command.status not in (None, *STYLES):
        raise ConfigError(f"status={command.status}: must be one of {', '.join(STYLES)}")
    folder = user_path(command.folder)
    if not folder.is_dir():
        what = "is a file, not a folder" if folder.exists() else "no such folder"
        raise DataError(f"folder={command.folder}: {what}; name a folder of runs")
    every = runs_in(folder)
    if not every:
        raise DataError(f"folder={command.folder}: has no training runs; name a folder of runs")
    if is_sweep(folder):
        print_sweep(folder)
    chosen = sorted((each for each in every if is_chosen(each, command)), key=SORTS[command.sort])  # type: ignore[arg-type]
    print_line(summary(chosen, every, relative(folder)))
    listed = chosen if command.show is None else chosen[: command.show]
    if listed:
        print_runs(listed)
    if more := len(chosen) - len(listed):
        print_line(f"... and {more} more; show=null lists all")


def print_sweep(folder: Path) -> None:
    """Print the table of a sweep, also while it runs."""
    jobs = jobs_in(folder)
    for name, content in jobs.items():
        if is_taken(folder / name / "run"):
            content["error"] = "running"
    print_line(f"{counted(len(jobs), 'job')} so far of the sweep {relative(folder)}")
    print_tables(jobs)


def is_chosen(each: Record, command: RunsConfig) -> bool:
    """Whether a run fits the filters."""
    option, data = each.choices.get("algorithm", ""), each.choices.get("dataset", "?")
    wanted = ((command.method, {option, method_of(each)}), (command.data, {data}))
    named = all(
        pattern is None or any(fnmatch.fnmatchcase(name, pattern) for name in names)
        for pattern, names in wanted
    )
    return named and command.status in (None, each.status)


def rank(each: Record, figure: Figure | None) -> tuple[bool, str, str, float]:
    """The sort key of a figure: the best of each dataset first, by metric; runs without one last."""
    if figure is None or figure.mean != figure.mean:
        return True, "", "", 0.0
    metric = metric_named(each.metric)
    dataset = each.choices.get("dataset", "")
    return (
        False,
        dataset,
        each.metric,
        figure.mean if metric and not metric.higher_is_better else -figure.mean,
    )


def summary(chosen: Sequence[Record], every: Sequence[Record], place: str) -> str:
    """How many runs there are, by status."""
    counts = Counter(str(each.status) for each in chosen)
    listed = ", ".join(f"{counts[name]} {name}" for name in STYLES if counts[name])
    of = f" of {len(every)}" if len(chosen) < len(every) else ""
    return f"{counted(len(chosen), 'run')}{of} in {place}{': ' if listed else ''}{listed}"


def print_runs(runs: Sequence[Record]) -> None:
    """Two lines for each run: what it was and its figures; its folder, to be copied, and what happened.

    Not a table of rich, which would break the paths.
    """
    rows = [("started", "method", "dataset", "status", "validation", "test"), *map(cells_of, runs)]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for i, cells in enumerate(rows):
        style = STYLES[runs[i - 1].status] if i else "bold"
        padded = (cell.ljust(width) for cell, width in zip(cells, widths, strict=True))
        console.print(Text("  ".join(padded).rstrip(), style=style), soft_wrap=True)
        if i:
            print_line(f"    {relative(runs[i - 1].folder)}{happened(runs[i - 1])}")


def cells_of(each: Record) -> tuple[str, ...]:
    """The first line of a run."""
    names = method_of(each), each.choices.get("dataset", "?")
    figures = (shown(each, figure) for figure in (each.validation, each.test))
    return f"{each.started:%y-%m-%d %H:%M}", *names, each.status, *figures


def happened(each: Record) -> str:
    """What else there is to say about a run: where it is, why it failed, or what became of its recipe."""
    if each.why:
        return f": {each.why}"
    if each.status != "ended":
        return f": iteration {each.iteration}"
    return f": {'; '.join(each.verdicts)}" if each.verdicts else ""


def shown(each: Record, figure: Figure | None) -> str:
    """A figure for people."""
    if figure is None:
        return ""
    metric = metric_named(each.metric)
    return metric.show(figure.mean, 2) if metric and metric.percent else f"{figure.mean:.4g}"
