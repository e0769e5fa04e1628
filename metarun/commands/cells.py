"""What `metarun eval` evaluates: one checkpoint on one task."""

from __future__ import annotations

from dataclasses import dataclass

from metarun.commands.models import Model
from metarun.episodes import EpisodeSource, Geometry
from metarun.errors import MetarunError
from metarun.evaluation import Result


@dataclass
class Cell:
    """One checkpoint on one geometry after so many inner steps: a result, or why there is none."""

    model: Model
    geometry: Geometry
    steps: int | None  # None: as trained
    source: EpisodeSource
    dataset: str
    result: Result | None = None
    reason: str = ""


def plan_cell(cell: Cell) -> Cell:
    """The cell, with the reason where it cannot be evaluated."""
    try:
        cell.source.check(cell.geometry)
        cell.model.algorithm.check(cell.geometry.ways)
    except MetarunError as error:
        cell.reason = str(error)
    return cell


def name_of(cell: Cell) -> str:
    """The task, and the inner steps where they were asked for."""
    if cell.steps is None:
        return str(cell.geometry)
    return f"{cell.geometry}, {cell.steps} step{'' if cell.steps == 1 else 's'}"
