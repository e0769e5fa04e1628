"""Results as grids: of several models on several datasets, and by the languages of support and queries."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from rich.table import Table
from rich.text import Text

from metarun.commands.cells import Cell
from metarun.datasets.text.store import TextStore
from metarun.inference.model import Model
from metarun.reporting import pictures
from metarun.reporting.classes import stem_of
from metarun.reporting.console import console, print_line
from metarun.storage.files import write_csv

#: The scores of a grid by the names of row and column.
Grid = dict[tuple[str, str], Cell]


def report_grids(cells: Sequence[Cell], folder: Path) -> list[str]:
    """Print the grids that evaluated cells make, and write each as a csv file and a picture.

    - domains: the models by the datasets, for each task, if there are several of both.
    - languages: those of the support by those of the queries, for each model and task.

    Returns:
        The names of the files.
    """
    by_domain = grids_of([cell for cell in cells if not language_pair(cell)], domain)
    several = {title: grid for title, grid in by_domain.items() if is_grid(grid)}
    files = report(several, "domains", ("trained model", "dataset of the test"), folder)
    axes = "language of the support", "language of the queries"
    return files + report(grids_of(cells, languages), "languages", axes, folder)


def is_grid(grid: Grid) -> bool:
    """Whether a model was evaluated on several datasets, and a dataset has several models."""
    return all(len(grid) > len({pair[i] for pair in grid}) for i in (0, 1))


def domain(cell: Cell) -> tuple[str, tuple[str, str]]:
    """The grid of a cell by its task, and its place: the model and the dataset."""
    if not isinstance(cell.model, Model):
        return cell.task, (cell.model.name, cell.dataset)
    trained = str(cell.model.content["choices"]["dataset"])
    name = cell.model.name if trained in cell.model.name else f"{cell.model.name} on {trained}"
    return cell.task, (name, cell.dataset)


def languages(cell: Cell) -> tuple[str, tuple[str, str]] | None:
    """The grid of a cell by its model and task, and its place: two languages; None without."""
    pair = language_pair(cell)
    return (f"{cell.model.name}, {cell.task}", pair) if pair else None


def language_pair(cell: Cell) -> tuple[str, str] | None:
    return cell.source.pair if isinstance(cell.source, TextStore) else None


def grids_of(
    cells: Sequence[Cell], place: Callable[[Cell], tuple[str, tuple[str, str]] | None]
) -> dict[str, Grid]:
    """The evaluated cells of the same metric by the title of their grid."""
    grids: dict[str, Grid] = {}
    for cell in cells:
        if cell.result and (found := place(cell)):
            grid = grids.setdefault(found[0], {})
            if all(each.metrics[0] == cell.metrics[0] for each in grid.values()):
                grid[found[1]] = cell
    return grids


def report(grids: Mapping[str, Grid], kind: str, axes: tuple[str, str], folder: Path) -> list[str]:
    """Print grids of one kind and write their files, with the title in their names if there are several."""
    files = []
    for title, grid in grids.items():
        stem = kind if len(grids) == 1 else f"{kind}_{stem_of(title)}"
        report_grid(grid, title, axes, folder / stem)
        files += [f"{stem}.csv", f"{stem}.png"]
    return files


def report_grid(grid: Grid, title: str, axes: tuple[str, str], stem: Path) -> None:
    """Print one grid, and write it to `stem`.csv and `stem`.png."""
    rows, columns = (list(dict.fromkeys(pair[i] for pair in grid)) for i in (0, 1))
    metric = next(iter(grid.values())).metrics[0]
    means = {pair: cell.result.mean for pair, cell in grid.items() if cell.result}
    print_line(f"{title}: {metric.name} by the {axes[0]} (rows) and the {axes[1]}")
    table = Table()
    table.add_column("", overflow="fold")
    for name in columns:
        table.add_column(Text(name), justify="right")
    for name in rows:
        shown = (metric.show(means[name, b]) if (name, b) in means else "" for b in columns)
        table.add_row(Text(name), *shown)
    console.print(table)
    plain = [{axes[0]: a} | {b: means.get((a, b)) for b in columns} for a in rows]
    write_csv(stem.with_name(f"{stem.name}.csv"), plain)  # its name may contain dots
    values = [[means.get((a, b), math.nan) for b in columns] for a in rows]
    pictures.score_grid(values, rows, columns, axes, metric, title, stem.with_name(f"{stem.name}.png"))
