"""A sweep's closing table: a Hydra callback, so that it works with every launcher."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from hydra.experimental.callback import Callback
from omegaconf import DictConfig
from rich.table import Table


class SweepTable(Callback):
    """Prints one row a job when a multirun ends, and saves sweep.csv beside the jobs."""

    def on_multirun_end(self, config: DictConfig, **kwargs: Any) -> None:
        from metarun.files import write_csv
        from metarun.tracking import console

        folder = Path(config.hydra.sweep.dir)
        results = [
            json.loads(path.read_text()) for path in sorted(folder.glob("*/result.json"), key=job_number)
        ]
        if not results:
            return
        rows = [row_of(result) for result in results]
        keys = list(dict.fromkeys(key for row in rows for key in row))
        table = Table(title=f"{len(rows)} jobs, {folder}")
        shown = [key for key in keys if key != "checkpoint"]
        for key in shown:
            table.add_column(key)
        for row in rows:
            table.add_row(*(str(row.get(key, "")) for key in shown))
        console.print(table)
        write_csv(folder / "sweep.csv", rows)
        console.print(f"saved {folder / 'sweep.csv'}", highlight=False, soft_wrap=True)
        if any("error" in row for row in rows):
            sys.exit(1)


def record_failure(folder: Path, message: str) -> float:
    """Note a job that failed, so that the sweep goes on and its table tells."""
    from metarun.files import write_json

    overrides = list(HydraConfig.get().overrides.task)
    write_json(folder / "result.json", {"overrides": overrides, "error": message})
    return math.nan


def job_number(path: Path) -> tuple[int, str]:
    name = path.parent.name
    return (int(name), "") if name.isdigit() else (1 << 30, name)


def row_of(result: dict[str, Any]) -> dict[str, Any]:
    """What was swept, and what came out; accuracies in %."""
    row: dict[str, Any] = dict(override.lstrip("+").split("=", 1) for override in result["overrides"])
    row.pop("pairing", None)
    if "error" in result:
        return row | {"error": result["error"]}
    scale = 100 if result["metric"] == "accuracy" else 1
    for split in ("validation", "test"):
        if split in result:
            figures = result[split]
            row[f"{split} {result['metric']}"] = round(scale * figures["mean"], 3)
            row[f"{split} ±"] = round(scale * figures["interval"], 3)
    return row | {
        "best iteration": result["validation"]["iteration"],
        "seconds": result["seconds"],
        "checkpoint": result["checkpoint"],
    }
