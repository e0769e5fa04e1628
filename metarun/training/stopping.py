"""Rules that end training before its last iteration, by the validations of the run."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from metarun.errors import ConfigError
from metarun.tasks.objectives import Metric


@dataclass(frozen=True)
class EarlyStopping:
    """When training ends early. There is no state: the rows of the validations decide, so a run resumes.

    Args:
        patience: the number of validations in a row without a new best score; None: no limit.
        at: a score of the main metric that is enough; None: no score is.
        hopeless: whether a run is to end, by the name of its main metric and its rows, if somebody is asked.
    """

    patience: int | None = None
    at: float | None = None
    hopeless: Callable[[str, Iterable[Mapping[str, Any]]], bool] | None = None

    def check(self, metric: Metric) -> None:
        """Raise ConfigError if the main metric cannot have the score `at`."""
        low, high = metric.limits
        if self.at is None or (math.isfinite(self.at) and low <= self.at <= high):
            return
        hint = f"; {self.at:g} % is {self.at / 100:g}" if metric.percent and 1 < self.at <= 100 else ""
        raise ConfigError(f"stop.at={self.at:g}: {metric.name} is between {low:g} and {high:g}{hint}")

    def reason(self, metric: Metric, score: float, iteration: int, rows: Iterable[Mapping[str, Any]]) -> str:
        """The setting that ends training now; "" if none does.

        Args:
            metric: the main metric.
            score, iteration: of the best validation so far.
            rows: all rows of the run.
        """
        if self.at is not None and not metric.is_better(self.at, than=score):
            return f"stop.at={self.at:g}"
        worse = sum(row["split"] == "validation" and row["iteration"] > iteration for row in rows)
        if self.patience is not None and worse >= self.patience:
            return f"stop.patience={self.patience}"
        if self.hopeless is not None and self.hopeless(metric.name, rows):
            return "stop.hopeless=true"
        return ""
