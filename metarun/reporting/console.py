"""What people see on the terminal: results, messages and progress bars."""

from __future__ import annotations

import contextlib
import time
from pathlib import Path

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
)

# Messages and progress go to standard error, so that standard output holds results only.
console = Console()
messages = Console(stderr=True)


def print_line(text: str) -> None:
    """A line of results on standard output, which can be copied in one piece: not wrapped, without markup."""
    _line(console, text)


def inform(text: str) -> None:
    """A message on standard error, such as what was decided or where a file was saved."""
    _line(messages, text)


def _line(where: Console, text: str) -> None:
    where.print(text, markup=False, highlight=False, soft_wrap=True)


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
        console=messages,
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
        _line(self.progress.console, text)


def relative(path: Path) -> str:
    """The path as a person here would type it."""
    with contextlib.suppress(ValueError):
        return str(path.resolve().relative_to(Path.cwd()))
    return str(path)
