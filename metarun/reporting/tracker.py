"""Logs the metrics of a run to a JSON Lines file and to TensorBoard."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from metarun.storage.files import write_text

Row = dict[str, Any]


class Tracker:
    """Appends rows to metrics.jsonl and, optionally, to TensorBoard.

    When a run is resumed, rows after the checkpoint are removed: these iterations run again, so that the
    file has neither gaps nor duplicates.

    Args:
        folder: the run folder.
        resumed_at: the iteration of the checkpoint; 0 for a new run.
        tensorboard: whether to write TensorBoard files.

    Attributes:
        rows: all rows so far.
    """

    def __init__(self, folder: Path, resumed_at: int = 0, tensorboard: bool = True) -> None:
        self.path = folder / "metrics.jsonl"
        self.rows = [row for row in read_rows(self.path) if row["iteration"] <= resumed_at]
        write_text(self.path, "".join(json.dumps(row) + "\n" for row in self.rows))
        self.file = self.path.open("a")
        self.writer = None
        if tensorboard:
            from torch.utils.tensorboard import SummaryWriter  # slow to import

            self.writer = SummaryWriter(str(folder / "tensorboard"), purge_step=resumed_at + 1)

    def log(self, row: Row) -> None:
        """Write one row.

        Args:
            row: `iteration`, `split`, and values; float values go to TensorBoard.
        """
        self.rows.append(row)
        self.file.write(json.dumps(row) + "\n")
        self.file.flush()
        if self.writer:
            for key, value in row.items():
                if isinstance(value, float):
                    self.writer.add_scalar(f"{row['split']}/{key}", value, row["iteration"])

    def sync(self) -> None:
        """Flush the rows to disk; call it before saving a checkpoint, which relies on them."""
        os.fsync(self.file.fileno())

    def close(self) -> None:
        """Close the files."""
        self.file.close()
        if self.writer:
            self.writer.close()


def read_rows(path: Path) -> list[Row]:
    """The rows of a metrics.jsonl; an incomplete last line, left by a killed process, is ignored."""
    if not path.exists():
        return []
    rows = []
    for line in path.read_text().splitlines():
        try:
            rows.append(json.loads(line))
        except ValueError:
            break
    return rows
