"""The metrics of a run, row by row: JSON lines and TensorBoard."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from metarun.storage.files import write_text

Row = dict[str, Any]


class Tracker:
    """Appends rows to metrics.jsonl and, if wanted, to TensorBoard.

    On resuming, rows later than the checkpoint are dropped: they will be made again, so the
    file has neither gaps nor repeats.
    """

    def __init__(self, folder: Path, resumed_at: int = 0, tensorboard: bool = True) -> None:
        self.path = folder / "metrics.jsonl"
        self.rows = [row for row in read_rows(self.path) if row["iteration"] <= resumed_at]
        kept = "".join(json.dumps(row) + "\n" for row in self.rows)
        write_text(self.path, kept)
        self.file = self.path.open("a")
        self.writer = None
        if tensorboard:
            from torch.utils.tensorboard import SummaryWriter  # slow to import

            self.writer = SummaryWriter(str(folder / "tensorboard"), purge_step=resumed_at + 1)

    def log(self, row: Row) -> None:
        """Write one row; it has `iteration`, `split` and its figures."""
        self.rows.append(row)
        self.file.write(json.dumps(row) + "\n")
        self.file.flush()
        if self.writer:
            for key, value in row.items():
                if isinstance(value, float):
                    self.writer.add_scalar(f"{row['split']}/{key}", value, row["iteration"])

    def sync(self) -> None:
        """Make the rows safe before a checkpoint that relies on them."""
        os.fsync(self.file.fileno())

    def close(self) -> None:
        self.file.close()
        if self.writer:
            self.writer.close()


def read_rows(path: Path) -> list[Row]:
    """The rows of a metrics.jsonl; a last line cut off by a kill is left out."""
    if not path.exists():
        return []
    rows = []
    for line in path.read_text().splitlines():
        try:
            rows.append(json.loads(line))
        except ValueError:
            break
    return rows
