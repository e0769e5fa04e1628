"""The results table of a sweep: a Hydra callback, so that it works with every launcher."""

from __future__ import annotations

import json
import math
import sys
import time
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from hydra.experimental.callback import Callback
from omegaconf import DictConfig
from rich.table import Table
from rich.text import Text

from metarun.reporting.console import print_line

Row = dict[str, Any]


class SweepTable(Callback):
    """Prints a table with one row for each job when a multirun ends, and saves it as sweep.csv."""

    def on_multirun_start(self, config: DictConfig, **kwargs: Any) -> None:
        self.began = time.time()
        folder = Path(config.hydra.sweep.dir)
        if (folder / "0" / "last.pt").exists():  # the new sweep would overwrite its table
            message = f"hydra.sweep.dir={folder}: this folder already contains a sweep; choose another one"
            print(f"metarun: error: {message}", file=sys.stderr)
            sys.exit(1)

    def on_multirun_end(self, config: DictConfig, **kwargs: Any) -> None:
        from metarun.reporting.console import console
        from metarun.storage.files import write_csv

        folder = Path(config.hydra.sweep.dir)
        found = [*folder.glob("*/result.json"), *folder.glob("*/failure.json")]
        # The folder may contain files of an earlier sweep, which are older.
        new = [path for path in found if path.stat().st_mtime >= self.began - 1]
        paths = sorted(new, key=job_number)
        results = {path.parent.name: json.loads(path.read_text()) for path in paths}
        if not results:
            return
        write_csv(folder / "sweep.csv", [row_of(job, result) for job, result in results.items()])
        console.print(table_of(results, str(folder)))
        print_line(f"saved {folder / 'sweep.csv'}")
        if any("error" in result for result in results.values()):
            sys.exit(1)


def record_failure(folder: Path, message: str) -> float:
    """Write failure.json for a failed job, so that the sweep continues and its table shows the error.

    Other files in the folder of the job are not changed.

    Returns:
        NaN, as the result of the job.
    """
    from metarun.storage.files import write_json

    overrides = list(HydraConfig.get().overrides.task)
    write_json(folder / "failure.json", {"overrides": overrides, "error": message})
    return math.nan


def job_number(path: Path) -> tuple[int, str]:
    """The sort key of a job's file: the number of the job; folders with other names come last."""
    name = path.parent.name
    return (int(name), "") if name.isdigit() else (1 << 30, name)


def typed(result: Row) -> dict[str, str]:
    """The typed settings of a job, by key."""
    pairs = (override.lstrip("+").partition("=") for override in result["overrides"])
    return {key: value for key, _, value in pairs if key != "pairing"}


def row_of(job: str, result: Row) -> Row:
    """The row of a job in sweep.csv; accuracies are in [0, 1]."""
    row: Row = {"job": job, **typed(result)}
    if "error" in result:
        return row | {"error": result["error"]}
    for split in ("validation", "test"):
        if split in result:
            row[f"{split} {result['metric']}"] = result[split]["mean"]
            row[f"{split} interval"] = result[split]["interval"]
    best = result["validation"]["iteration"]
    return row | {"best iteration": best, "seconds": result["seconds"], "checkpoint": result["checkpoint"]}


def table_of(results: dict[str, Row], folder: str) -> Table:
    """The table on the screen: the settings that differ between the jobs, and the scores."""
    settings = {job: typed(result) for job, result in results.items()}
    keys = list(dict.fromkeys(key for own in settings.values() for key in own))
    swept = [key for key in keys if len({own.get(key) for own in settings.values()}) > 1]
    table = Table(title=f"{len(results)} jobs in {folder}")
    for heading in ("job", *swept, "validation", "test", "seconds"):
        table.add_column(heading, overflow="fold")
    for job, result in results.items():
        cells = [job, *(settings[job].get(key, "") for key in swept)]
        if "error" in result:
            table.add_row(*cells, Text(result["error"], style="red"))
            continue
        figures = [figure(result, split) for split in ("validation", "test")]
        table.add_row(*cells, *figures, f"{result['seconds']:.0f}")
    return table


def figure(result: Row, split: str) -> str:
    """The main metric of a job on a split with its interval, for people; empty where it was not measured."""
    from metarun.tasks.objectives import metric_named  # imports torch

    if split not in result:
        return ""
    mean, half = result[split]["mean"], result[split]["interval"]
    metric = metric_named(result["metric"])
    return f"{mean:.4f} ± {half:.4f}" if metric is None else metric.show_interval(mean, half)
