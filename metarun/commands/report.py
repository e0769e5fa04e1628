"""`metarun report`: one HTML file of training runs and evaluations."""

from __future__ import annotations

import shlex
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from metarun.commands.models import values_of
from metarun.config.check import check
from metarun.config.schema import ReportConfig, typed
from metarun.errors import DataError, counted, printable
from metarun.reporting.console import inform, relative
from metarun.reporting.destinations import flat
from metarun.reporting.report import MOST_CURVES, CellText, Report, Section, curves, number, text
from metarun.storage.files import user_path, write_text
from metarun.tasks.objectives import metric_named
from metarun.training.records import Figure, Record, content_of, rows_of, runs_in


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


def run_sections(runs: Sequence[Record]) -> Iterator[Section]:
    """The parts of a report on training runs."""
    if not runs:
        return
    columns = [
        "run",
        "started",
        "method",
        "dataset",
        "status",
        "validation",
        "test",
        "seconds",
        "verdict or error",
    ]
    yield Section("Runs", columns=columns, rows=[run_row(each) for each in runs])
    for metric in dict.fromkeys(each.metric for each in runs if each.metric):
        rows = {name_of(each): validations(each) for each in runs if each.metric == metric}
        drawn = {name: own for name, own in rows.items() if own}
        if drawn:
            more = f"The first {MOST_CURVES} of {len(drawn)}. " if len(drawn) > MOST_CURVES else ""
            bands = f"{more}Bands are 95 % intervals over the validation tasks."
            yield Section(
                f"Learning curves: {metric}", bands, figures=[curves(drawn, metric, scale_of(metric))]
            )
    differing = differences(runs)
    if len(runs) > 1:
        yield Section(
            "Settings that differ",
            "" if differing else "All runs have the same settings.",
            ["setting", *map(name_of, runs)],
            [[text(key), *map(text, values)] for key, values in differing.items()],
        )
    yield Section(
        "To repeat", "Type these again; a seed repeats a run.", codes=[command_of(each) for each in runs]
    )


def run_row(each: Record) -> list[CellText]:
    """The row of a run."""
    verdict = "; ".join(each.verdicts) or each.why
    seconds = each.result.get("seconds")
    return [
        text(name_of(each)),
        CellText(when := f"{each.started:%Y-%m-%d %H:%M}", when, number=True),
        text(each.choices.get("algorithm")),
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


def differences(runs: Sequence[Record]) -> dict[str, list[Any]]:
    """The settings that are not the same in all runs, with the value of each run."""
    configs = [dict(flat(config_of(each.folder))) for each in runs]
    keys = dict.fromkeys(key for config in configs for key in config)
    every = {key: [config.get(key, "") for config in configs] for key in keys if key != "published"}
    return {key: values for key, values in every.items() if any(value != values[0] for value in values)}


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


def command_of(each: Record) -> str:
    """What to type to repeat a run."""
    overrides = each.result.get("overrides")
    words = [str(word) for word in overrides] if isinstance(overrides, list) else []
    return printable(shlex.join(["metarun", "train", *words]))


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
            yield Section(f"Evaluation {relative(path.parent)}", "", columns, list(map(grid_row, listed)))
        if pairs:
            columns = ["task", "metric", "models", "difference, 95 % interval", "excludes 0"]
            yield Section("Paired differences on the same episodes", "", columns, list(map(pair_row, pairs)))


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
