"""`metarun eval instances=N`: accuracy at the first, second, ... appearance of a class."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rich.table import Table

from metarun.commands.cells import Cell
from metarun.config.schema import EvalConfig
from metarun.errors import ConfigError
from metarun.reporting.console import Bar, console
from metarun.storage.files import write_csv
from metarun.tasks.episodes import EpisodeShape
from metarun.tasks.objectives import ACCURACY
from metarun.training.evaluation import EvalSettings, instance_scores, interval
from metarun.training.hardware import Hardware


def instance_cells(cells: list[Cell], command: EvalConfig) -> list[Cell]:
    """One cell for each model that processes examples in sequence, dataset and number of ways.

    Raises:
        ConfigError: if no model supports this.
    """
    if command.instances is None:
        return []
    found = [cell for cell in cells if cell.algorithm.sees_examples_in_turn]
    if not found:
        raise ConfigError(
            f"instances={command.instances}: needs a method that processes examples in sequence; train with "
            "algorithm=mann, or leave instances out"
        )
    for cell in found:
        if cell.algorithm.normalises_by_support:
            raise ConfigError(
                f"instances={command.instances}: with norm={cell.algorithm.support_norm} the first examples "
                "of a sequence would be normalised by later ones; leave instances out, or train with "
                "norm=running or layer"
            )
        cell.source.check(EpisodeShape(cell.shape.ways, 1, command.instances - 1))
    return list({(id(cell.model), cell.dataset, cell.shape.ways): cell for cell in found}.values())


def instance_rows(cells: list[Cell], command: EvalConfig, hardware: Hardware) -> list[dict[str, Any]]:
    """Rows of the accuracy at each appearance of a class."""
    assert command.instances is not None
    rows = []
    with Bar("instances", len(cells) * command.episodes, "episodes") as bar:
        for cell in cells:
            shape = EpisodeShape(cell.shape.ways, 1, command.instances - 1)
            tasks = EvalSettings(shape, command.episodes, command.seed)
            scores = instance_scores(cell.algorithm, cell.source, tasks, hardware, bar.advance)
            rows += [
                {
                    "model": cell.model.name,
                    "dataset": cell.dataset,
                    "ways": shape.ways,
                    "instance": i + 1,
                    "mean": column.mean().item(),
                    "interval": interval(column),
                }
                for i, column in enumerate(scores.unbind(1))
            ]
    return rows


def report_instances(rows: list[dict[str, Any]], folder: Path) -> None:
    """Print the table and write instances.csv."""
    table = Table(title="accuracy at the n-th appearance of a class, before its label is shown")
    for heading in ("model", "task", "n", "accuracy, 95 % interval"):
        table.add_column(heading, justify="right" if heading == "n" else "left")
    for row in rows:
        text = ACCURACY.show_interval(row["mean"], row["interval"])
        table.add_row(row["model"], f"{row['dataset']} {row['ways']}-way", str(row["instance"]), text)
    console.print(table)
    write_csv(folder / "instances.csv", rows)
