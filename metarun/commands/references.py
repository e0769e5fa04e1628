"""Rows of an evaluation beside those of models: what the source of the tasks is compared with."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch

from metarun.commands.cells import Cell, Reference
from metarun.config.schema import EvalConfig
from metarun.tasks.sampling import fixed_draws
from metarun.tasks.source import ReferenceOutcome
from metarun.training.evaluation import Result


def with_references(cells: Sequence[Cell], command: EvalConfig) -> list[Cell]:
    """The cells, with one more for the tasks of each and each reference of their source.

    Where models have different episodes of a task, as of two class splits, their names are added.
    """
    tasks = {
        (cell.dataset, cell.shape, cell.result.episodes_hash): cell for cell in reversed(cells) if cell.result
    }
    own = list(reversed(tasks.values()))
    different = Counter((cell.dataset, cell.shape) for cell in own)
    found, shared = list(cells), dict[Any, Any]()
    for cell in own:
        for name, reference in cell.source.references(cell.shape, shared).items():
            title = name if different[cell.dataset, cell.shape] == 1 else f"{name} ({cell.model.name})"
            result = scored(cell, reference, command)
            found.append(replace(cell, model=Reference(title), steps=None, rate=None, result=result))
    return found


def scored(cell: Cell, reference: ReferenceOutcome, command: EvalConfig) -> Result:
    """The result of a reference on the episodes of an evaluated cell, whose number and seed `command` has."""
    began = time.perf_counter()
    assert cell.result
    draws = fixed_draws(cell.source, cell.shape, command.episodes, command.seed)
    outcomes = [reference(draw, cell.shape) for draw in draws]
    return replace(
        cell.result,
        scores={m.name: torch.cat([one.scores[m.name] for one in outcomes]).cpu() for m in cell.metrics},
        losses=torch.cat([one.loss for one in outcomes]).cpu(),
        uses_query_statistics=False,
        seconds=time.perf_counter() - began,
        confusion=None,
    )
