"""The results table of a sweep: a Hydra callback, so that it works with every launcher."""

from __future__ import annotations

import contextlib
import json
import math
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.utils import JobReturn
from hydra.experimental.callback import Callback
from hydra.types import RunMode
from omegaconf import DictConfig
from rich.table import Table
from rich.text import Text

from metarun.config.comments import without_pairing
from metarun.errors import counted, message_line
from metarun.reporting.console import inform, print_line, relative

Row = dict[str, Any]
MARKS = ("multirun.yaml", "sweep.csv")  # files of a sweep: the first is from Hydra


class SweepTable(Callback):
    """Keeps sweep.csv, with one row for each job, and prints it as a table when the sweep ends or is stopped.

    The rows come from files in the folders of the jobs: result.json of a finished training run, job.json of
    another finished command, and failure.json of any other job. The last is written before a job starts, so
    that it has a row however it ends.
    """

    running: ClassVar[SweepTable | None] = None  # the sweep of this process, until it has ended

    def on_multirun_start(self, config: DictConfig, **kwargs: Any) -> None:
        self.folder = folder = Path(config.hydra.sweep.dir)
        if any((folder / mark).exists() for mark in MARKS) and any(folder.rglob("last.pt")):
            message = f"hydra.sweep.dir={folder}: this folder already contains a sweep; choose another one"
            print(f"metarun: error: {message_line(message)}", file=sys.stderr)
            sys.exit(1)
        # Files of an earlier sweep. Not by their times: the clock of a file server may be another one.
        self.before = {path: version_of(path) for path in record_files(folder)}
        self.jobs = planned_jobs(config)
        SweepTable.running = self

    def on_job_start(self, config: DictConfig, **kwargs: Any) -> None:
        if config.hydra.mode != RunMode.MULTIRUN:
            return
        number, jobs = config.hydra.job.num, self.jobs
        words = list(config.hydra.overrides.task)
        if jobs:
            words = [word for word in jobs[number] if not all(word in job for job in jobs)]
        inform(f"job {number + 1}{f' of {len(jobs)}' if jobs else ''}: {' '.join(words)}".rstrip(": "))
        folder = Path(config.hydra.runtime.output_dir)
        again = f"; metarun train resume={relative(folder)} continues it"
        record_failure(folder, "not finished" + (again if config.hydra.job.config_name == "train" else ""))
        self.write()

    def on_job_end(self, config: DictConfig, job_return: JobReturn, **kwargs: Any) -> None:
        if config.hydra.mode == RunMode.MULTIRUN:
            self.write()

    def on_multirun_end(self, config: DictConfig, **kwargs: Any) -> None:
        if any("error" in result for result in self.end().values()):
            sys.exit(1)

    def end(self) -> dict[str, Row]:
        """Write and print the table, and return the results by job."""
        from metarun.reporting.console import console

        SweepTable.running = None
        results = self.results()
        if results:
            part = f"{len(results)} of " if len(results) < len(self.jobs) else ""
            jobs = counted(max(len(self.jobs), len(results)), "job")
            print_line(f"{part}{jobs} in {self.folder}")  # no title, which would be wrapped inside the path
            console.print(table_of(results))
            if self.write():
                print_line(f"saved {self.folder / 'sweep.csv'}")
        elif self.folder.is_dir() and [path.name for path in self.folder.iterdir()] == ["multirun.yaml"]:
            (self.folder / "multirun.yaml").unlink()  # no job was started, since its settings are invalid
            with contextlib.suppress(OSError):  # a folder that contains something else stays
                self.folder.rmdir()
                self.folder.parent.rmdir()
        return results

    def results(self) -> dict[str, Row]:
        """The content of the files of this sweep's jobs, by the folder of the job."""
        found = [path for path in record_files(self.folder) if version_of(path) != self.before.get(path)]
        jobs = {str(path.parent.relative_to(self.folder)): path for path in found}
        return {job: json.loads(jobs[job].read_text()) for job in sorted(jobs, key=job_number)}

    def write(self) -> bool:
        """Write sweep.csv, and return whether that was possible; a full disk must not end the sweep."""
        from metarun.storage.files import write_csv

        path = self.folder / "sweep.csv"
        try:
            write_csv(path, [row_of(job, result) for job, result in self.results().items()])
        except OSError as error:
            inform(f"{path}: cannot be written ({error.strerror})")
            return False
        return True


@contextlib.contextmanager
def ending_sweep() -> Iterator[None]:
    """A context that prints the table of a sweep also if the sweep is stopped."""
    SweepTable.running = None
    try:
        yield
    finally:
        if SweepTable.running is not None:
            SweepTable.running.end()


def planned_jobs(config: DictConfig) -> list[list[str]]:
    """The overrides of each job; empty for a sweeper that chooses its jobs while it runs."""
    from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
    from hydra.core.override_parser.overrides_parser import OverridesParser

    sweeper = config.hydra.sweeper
    if not sweeper._target_.endswith(".BasicSweeper"):
        return []
    words = [f"{key}={value}" for key, value in (sweeper.params or {}).items()]
    parser = OverridesParser.create(config_loader=GlobalHydra.instance().config_loader())
    overrides = parser.parse_overrides([*words, *config.hydra.overrides.task])
    (jobs,) = BasicSweeper.split_arguments(overrides, None)
    if not jobs:
        swept = [str(each.input_line) for each in overrides if each.is_sweep_override()]
        print(f"metarun: error: {', '.join(swept)}: no values, so there are no jobs", file=sys.stderr)
        sys.exit(1)
    return jobs


def record_failure(folder: Path, message: str) -> float:
    """Write failure.json for a job, so that the sweep continues and its table shows the error.

    Other files in the folder of the job are not changed. A full disk leaves the file as it was.

    Returns:
        NaN, as the result of the job.
    """
    from metarun.training.records import write_failure

    write_failure(folder, without_pairing(HydraConfig.get().overrides.task), message)
    return math.nan


def record_success(folder: Path, value: float | None) -> None:
    """Replace the failure.json of a job that has ended, by job.json if its command writes no result.json.

    Args:
        folder: of the job.
        value: what the command returned: the first result of `metarun eval` or `adapt`, None of `data`.
    """
    from metarun.storage.files import write_json

    (folder / "failure.json").unlink(missing_ok=True)
    if not (folder / "result.json").exists():
        with contextlib.suppress(OSError):
            overrides = without_pairing(HydraConfig.get().overrides.task)
            write_json(folder / "job.json", {"overrides": overrides, "result": value})


def record_files(folder: Path) -> list[Path]:
    """The files that record jobs; if a job has several, failure.json, the last one, counts."""
    return [path for name in ("job", "result", "failure") for path in folder.rglob(f"{name}.json")]


def version_of(path: Path) -> tuple[int, ...]:
    """Changes whenever the file is replaced."""
    stat = path.stat()
    return stat.st_ino, stat.st_mtime_ns, stat.st_size


def job_number(job: str) -> tuple[int, str]:
    """The sort key of a job: its number; folders with other names come last."""
    return (int(job), "") if job.isdigit() else (1 << 30, job)


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
    if "result" in result:  # of eval or adapt, which write files of their own
        return row | {"result": result["result"]}
    best = result["validation"]["iteration"]
    return row | {"best iteration": best, "seconds": result["seconds"], "checkpoint": result["checkpoint"]}


def table_of(results: dict[str, Row]) -> Table:
    """The table on the screen: the settings that differ between the jobs, and the scores."""
    settings = {job: typed(result) for job, result in results.items()}
    keys = list(dict.fromkeys(key for own in settings.values() for key in own))
    swept = [key for key in keys if len({own.get(key) for own in settings.values()}) > 1]
    table = Table()
    others = any("result" in each for each in results.values())  # of eval or adapt
    for heading in ("job", *swept, *(["result"] if others else ["validation", "test", "seconds"])):
        table.add_column(heading, overflow="fold")
    for job, result in results.items():
        cells = [job, *(settings[job].get(key, "") for key in swept)]
        if "error" in result:
            table.add_row(*cells, Text(result["error"], style="red"))
            continue
        if "result" in result:
            value = result["result"]
            table.add_row(*cells, "finished" if value is None else f"{value:.4f}")
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
