"""Results by the languages of support and queries, as grids."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

from rich.table import Table
from rich.text import Text

from metarun.commands.cells import Cell
from metarun.datasets.text.store import TextStore
from metarun.reporting import pictures
from metarun.reporting.classes import stem_of
from metarun.reporting.console import console, print_line
from metarun.storage.files import write_csv


def report_languages(cells: Sequence[Cell], folder: Path) -> list[str]:
    """Print a grid of languages for each model and task, with a row for each language of the support.

    Returns:
        The names of the files that were written for each grid: languages.csv and languages.png, with the
        model and the task if there are several.
    """
    grids: dict[tuple[str, str], dict[tuple[str, str], Cell]] = {}
    for cell in cells:
        if cell.result and isinstance(cell.source, TextStore) and cell.source.pair:
            grids.setdefault((cell.model.name, cell.task), {})[cell.source.pair] = cell
    files = []
    for key, grid in grids.items():
        title = ", ".join(key)
        stem = "languages" if len(grids) == 1 else f"languages_{stem_of(title)}"
        report_grid(grid, title, folder / stem)
        files += [f"{stem}.csv", f"{stem}.png"]
    return files


def report_grid(grid: Mapping[tuple[str, str], Cell], title: str, stem: Path) -> None:
    """Print one grid of languages, and write it to `stem`.csv and `stem`.png."""
    support, query = (list(dict.fromkeys(pair[i] for pair in grid)) for i in (0, 1))
    metric = next(iter(grid.values())).metrics[0]
    means = {pair: cell.result.mean for pair, cell in grid.items() if cell.result}
    print_line(f"{title}: {metric.name} by the languages of the support (rows) and of the queries")
    table = Table()
    table.add_column("")
    for name in query:
        table.add_column(Text(name), justify="right")
    for name in support:
        shown = (metric.show(means[name, b]) if (name, b) in means else "" for b in query)
        table.add_row(Text(name), *shown)
    console.print(table)
    rows = [{"support": a} | {b: means.get((a, b)) for b in query} for a in support]
    write_csv(stem.with_name(f"{stem.name}.csv"), rows)  # its name may contain dots
    values = [[means.get((a, b), math.nan) for b in query] for a in support]
    pictures.score_grid(values, support, query, metric, title, stem.with_name(f"{stem.name}.png"))
