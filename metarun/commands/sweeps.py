"""The results of a sweep: rows, tables and means over seeds, from the files in the folders of its jobs.

A job has result.json (a finished training run), job.json (another finished command), or failure.json, which
is written before it starts and stays until it has finished. PyTorch is not imported here.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.table import Table
from rich.text import Text

from metarun.reporting.console import console, print_line
from metarun.training.records import content_of

Row = dict[str, Any]
SPLITS = ("validation", "test")
RECORDS = ("job", "result", "failure")  # the files of a job; the last that is there counts


def record_files(folder: Path) -> list[Path]:
    """The files that record jobs, below a folder."""
    return [path for name in RECORDS for path in folder.rglob(f"{name}.json")]


def content_of_job(folder: Path) -> Row:
    """The content of the record of a job; empty if it has none."""
    return next((found for name in reversed(RECORDS) if (found := content_of(folder / f"{name}.json"))), {})


def jobs_in(sweep: Path) -> dict[str, Row]:
    """The records of the jobs of a sweep by their folders, in the order of their numbers.

    Files without overrides are of something else, such as a report in the folder of a job.
    """
    names = {str(path.parent.relative_to(sweep)) for path in record_files(sweep)}
    found = {name: content_of_job(sweep / name) for name in sorted(names, key=job_number)}
    return {name: content for name, content in found.items() if isinstance(content.get("overrides"), list)}


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
    for split in SPLITS:
        if split in result:
            row[f"{split} {result['metric']}"] = result[split]["mean"]
            row[f"{split} interval"] = result[split]["interval"]
    if "result" in result:  # of eval or adapt, which write files of their own
        return row | {"result": result["result"]}
    best = result["validation"]["iteration"]
    return row | {"best iteration": best, "seconds": result["seconds"], "checkpoint": result["checkpoint"]}


def table_of(results: dict[str, Row]) -> Table:
    """The table on the screen: the settings that differ between the jobs, and the scores."""
    swept = swept_settings(results)
    table = Table()
    others = any("result" in each for each in results.values())  # of eval or adapt
    for heading in ("job", *swept, *(["result"] if others else ["validation", "test", "seconds"])):
        table.add_column(heading, overflow="fold")
    for job, result in results.items():
        cells = [job, *(typed(result).get(key, "") for key in swept)]
        if "error" in result:
            table.add_row(*cells, Text(result["error"], style="red"))
            continue
        if "result" in result:
            value = result["result"]
            table.add_row(*cells, "finished" if value is None else f"{value:.4f}")
            continue
        figures = [figure(result, split) for split in SPLITS]
        table.add_row(*cells, *figures, f"{result['seconds']:.0f}")
    return table


def swept_settings(results: dict[str, Row]) -> list[str]:
    """The typed settings that differ between the jobs that have them."""
    settings = [typed(result) for result in results.values()]
    keys = dict.fromkeys(key for own in settings for key in own)
    return [key for key in keys if len({own[key] for own in settings if key in own}) > 1]


def over_seeds(results: dict[str, Row]) -> list[Row]:
    """The mean scores of finished training jobs that differ in their seeds only.

    Returns:
        For each two or more: their `settings`, the number of `seeds`, the `metric`, and for each split that
        all of them have its `mean` and `interval`: half of the 95 % interval of the mean over seeds, by
        Student's t distribution. That of a single job is over episodes, and says nothing about seeds.
    """
    groups: dict[tuple[tuple[str, str], ...], dict[str, Row]] = {}
    swept = swept_settings(results)
    for result in results.values():
        if "validation" in result and "seed" in (own := typed(result)):
            key = tuple((name, own[name]) for name in swept if name != "seed" and name in own)
            groups.setdefault(key, {})[own["seed"]] = result
    rows = []
    for key, jobs in groups.items():
        if len(jobs) > 1:
            row: Row = {
                "settings": dict(key),
                "seeds": len(jobs),
                "metric": next(iter(jobs.values()))["metric"],
            }
            for split in SPLITS:
                if all(split in each for each in jobs.values()):
                    row[split] = mean_over([each[split]["mean"] for each in jobs.values()])
            rows.append(row)
    return rows


def curves_of(results: dict[str, Row]) -> tuple[str, dict[str, dict[str, list[Row]]]]:
    """The points of the figure of a sweep (`metarun.reporting.swept`), and the split that they are of.

    A point is a mean over seeds if there are several, otherwise the score of a job. The split is the test if
    all finished jobs have one. A setting has curves if its values are two or more different numbers.
    """
    jobs = {job: each for job, each in results.items() if "validation" in each}
    split = SPLITS[all("test" in each for each in jobs.values())]
    points = [(row["settings"], row[split]) for row in over_seeds(jobs)]
    swept = [key for key in swept_settings(jobs) if key != "seed"]
    if not points:
        points = [({key: typed(each).get(key, "") for key in swept}, each[split]) for each in jobs.values()]
    curves: dict[str, dict[str, list[Row]]] = {}
    for key in swept:
        having = [(settings, score) for settings, score in points if settings.get(key, "") != ""]
        numbers = [(number(settings[key]), settings, score) for settings, score in having]
        if any(x is None for x, *_ in numbers) or len({x for x, *_ in numbers}) < 2:
            continue
        own = curves.setdefault(key, {})
        for x, settings, score in numbers:
            others = {other: value for other, value in settings.items() if other != key and value != ""}
            name = ", ".join(f"{other}={value}" for other, value in others.items())
            own.setdefault(name, []).append({"x": x, **score})
        if len(own) == len(numbers):  # a search, in which all settings are different
            curves[key] = {OTHERS_DIFFER: [point for points in own.values() for point in points]}
    return split, curves


OTHERS_DIFFER = "other settings differ"  # the name of points that are not connected


def number(text: str) -> float | None:
    """The finite number that a setting is, or None."""
    try:
        return value if math.isfinite(value := float(text)) else None
    except ValueError:
        return None


def draw(results: dict[str, Row], path: Path) -> bool:
    """Draw the figure of a sweep, if its jobs have one metric and a setting whose values are numbers."""
    metrics = {each["metric"] for each in results.values() if "validation" in each}
    if len(metrics) != 1:
        return False
    from metarun.reporting.swept import setting_curves  # imports torch and matplotlib
    from metarun.tasks.objectives import metric_named

    split, curves = curves_of(results)
    metric = metric_named(metrics.pop())
    if not curves or metric is None:
        return False
    seeds = " over seeds" if over_seeds(results) else ""
    joined = all(OTHERS_DIFFER not in own for own in curves.values())
    others = "" if joined else ", other settings differ"
    setting_curves(curves, metric, f"{split}, 95 % intervals{seeds}{others}", path, joined)
    return True


def mean_over(values: Sequence[float]) -> Row:
    """The mean of two or more values, and half of its 95 % interval by Student's t distribution."""
    from scipy.special import stdtrit  # scipy.stats takes a second to import

    half = float(stdtrit(len(values) - 1, 0.975)) * statistics.stdev(values) / math.sqrt(len(values))
    return {"mean": statistics.fmean(values), "interval": half}


def table_over_seeds(rows: Sequence[Row]) -> Table:
    """The table on the screen of means over seeds."""
    keys = list(dict.fromkeys(key for row in rows for key in row["settings"]))
    table = Table()
    for heading in (*keys, "seeds", *SPLITS):
        table.add_column(heading, overflow="fold")
    for row in rows:
        settings = [row["settings"].get(key, "") for key in keys]
        table.add_row(*settings, str(row["seeds"]), *(figure(row, split) for split in SPLITS))
    return table


MARKS = ("multirun.yaml", "sweep.csv")  # files of a sweep: the first is from Hydra


def is_sweep(folder: Path) -> bool:
    """Whether a folder is that of a sweep."""
    return any((folder / mark).exists() for mark in MARKS)


def print_tables(results: dict[str, Row]) -> None:
    """Print the table of a sweep, and that of means over seeds if there are any."""
    console.print(table_of(results))
    if rows := over_seeds(results):
        print_line("mean over seeds, with the 95 % interval of that mean (Student's t)")
        console.print(table_over_seeds(rows))


def figure(result: Row, split: str) -> str:
    """The main metric of a job on a split with its interval, for people; empty where it was not measured."""
    from metarun.tasks.objectives import metric_named  # imports torch

    if split not in result:
        return ""
    mean, half = result[split]["mean"], result[split]["interval"]
    metric = metric_named(result["metric"])
    return f"{mean:.4f} ± {half:.4f}" if metric is None else metric.show_interval(mean, half)
