"""What a run leaves behind and shows on the way: JSON lines, TensorBoard, progress."""

from __future__ import annotations

import contextlib
import json
import os
import time
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
)

from metarun.files import write_text

# Progress and notes go to standard error, so that standard output holds results only.
console = Console()
notes = Console(stderr=True)

Row = dict[str, Any]


def say(where: Console, text: str) -> None:
    """A line that can be copied in one piece: not wrapped, and no part of it read as markup."""
    where.print(text, markup=False, highlight=False, soft_wrap=True)


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


def progress_bar(unit: str) -> Progress:
    """A progress bar with count, speed, remaining time, and free text; it fits 80 columns."""
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(bar_width=6),
        MofNCompleteColumn(),
        TextColumn("{task.fields[rate]}" + f" {unit}/s"),
        TextColumn("ETA"),
        TimeRemainingColumn(),
        TextColumn("{task.fields[text]}"),
        console=notes,
        transient=False,
    )


class Bar:
    """One bar of a known length; on a terminal live, elsewhere a plain line now and then."""

    def __init__(self, description: str, total: int, unit: str = "it", start: int = 0) -> None:
        self.progress = progress_bar(unit)
        self.task = self.progress.add_task(description, total=total, completed=start, rate="-", text="")
        self.total, self.start, self.done, self.text = total, start, start, ""
        self.began = self.shown = time.perf_counter()

    def __enter__(self) -> Bar:
        self.progress.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self.progress.stop()

    def advance(self, count: int = 1, text: str | None = None) -> None:
        self.done += count
        now = time.perf_counter()
        self.text = self.text if text is None else text
        if now - self.shown < 0.1 and self.done < self.total:
            return
        self.shown = now
        rate = (self.done - self.start) / max(now - self.began, 1e-9)
        shown = f"{rate:.0f}" if rate >= 100 else f"{rate:.1f}"
        self.progress.update(self.task, completed=self.done, rate=shown, text=self.text)

    def line(self, text: str) -> None:
        """A lasting line above the bar."""
        say(self.progress.console, text)


def with_interval(metric: str, mean: float, half: float, signed: bool = False) -> str:
    """A mean with its 95 % interval; in % for accuracy."""
    sign = "+" if signed else ""
    if metric == "accuracy":
        return f"{100 * mean:{sign}.2f} ± {100 * half:.2f} %"
    digits = ".4f" if abs(mean) < 1e4 else ".1e"  # what diverged need not fill the line
    return f"{mean:{sign}{digits}} ± {half:{digits}}"


def relative(path: Path) -> str:
    """The path as a person here would type it."""
    with contextlib.suppress(ValueError):
        return str(path.resolve().relative_to(Path.cwd()))
    return str(path)
