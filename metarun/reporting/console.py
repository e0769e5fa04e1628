"""Output on the terminal: results, messages and progress bars."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rich.console import Console, ConsoleOptions, RenderableType
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
)
from rich.segment import Segment

from metarun.errors import printable


class TextConsole(Console):
    """A console that takes text as it is: names from outside are no markup and no codes."""

    def __init__(self, **settings: Any) -> None:
        # Text in a notebook, too, where rich would make HTML of each line and warn of missing widgets.
        super().__init__(markup=False, emoji=False, highlight=False, force_jupyter=False, **settings)

    def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterator[Segment]:
        """What is printed, with codes of a terminal (but for line ends) replaced by a sign."""
        for segment in super().render(renderable, options):
            if segment.control or segment.text.isprintable():
                yield segment
            else:
                lines = (printable(line, "\N{REPLACEMENT CHARACTER}") for line in segment.text.split("\n"))
                yield Segment("\n".join(lines), segment.style)


# Messages and progress go to standard error, so that standard output contains only results.
console = TextConsole()
messages = TextConsole(stderr=True)


def print_line(text: str) -> None:
    """Print a line of results on standard output, without wrapping or markup, so that it can be copied."""
    _line(console, text)


_named: tuple[str, set[str]] | None = None  # set by `naming`


def inform(text: str) -> None:
    """Print a message on standard error, such as an automatic decision or the location of a file."""
    if _named is not None:
        name, said = _named
        if text in said:
            return
        said.add(text)
        text = f"{name}: {text}"
    _line(messages, text)


@contextlib.contextmanager
def naming(name: str, said: set[str]) -> Iterator[None]:
    """A context in which messages name one of many tasks.

    Args:
        name: of the task.
        said: messages of tasks before, which are not repeated; those of this task are added.
    """
    global _named
    _named = name, said
    try:
        yield
    finally:
        _named = None


@contextlib.contextmanager
def silent() -> Iterator[None]:
    """A context without messages and progress bars, for programs that predict again and again."""
    before, messages.quiet = messages.quiet, True
    try:
        yield
    finally:
        messages.quiet = before


def _line(where: Console, text: str) -> None:
    where.print(printable(text), soft_wrap=True)


def shortened(text: str, most: int = 32) -> str:
    """A text of at most `most` characters, with an ellipsis in the middle of a longer one."""
    return text if len(text) <= most else f"{text[: (most - 1) // 2]}…{text[-(most // 2) :]}"


def progress_bar(unit: str, transient: bool = False) -> Progress:
    """A progress bar with count, speed, remaining time and a text, for terminals of 80 columns."""
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(bar_width=4),
        MofNCompleteColumn(),
        TextColumn("{task.fields[rate]}" + f" {unit}/s"),
        TextColumn("ETA"),
        TimeRemainingColumn(),
        TextColumn("{task.fields[text]}"),
        console=messages,
        transient=transient,
    )


class Bar:
    """A progress bar, used as a context. It is live on a terminal; otherwise rich prints its last state.

    Args:
        description: the text before the bar.
        total: the number of units when it is complete.
        unit: the name of a unit, for the speed.
        start: the number of units completed before, which do not count for the speed.
        transient: whether the bar disappears when it is complete. Where there is no terminal, a line says
            what is done before it is done.
    """

    def __init__(
        self, description: str, total: int, unit: str = "it", start: int = 0, transient: bool = False
    ) -> None:
        self.progress = progress_bar(unit, transient)
        self.shown_live = messages.is_terminal or not transient
        if not self.shown_live:
            inform(f"{description}: {total:,} {unit}")
        self.task = self.progress.add_task(description, total=total, completed=start, rate="-", text="")
        self.total, self.start, self.done, self.text = total, start, start, ""
        self.began = self.shown = time.perf_counter()

    def __enter__(self) -> Bar:
        if self.shown_live:
            self.progress.start()
        return self

    def __exit__(self, *exception: object) -> None:
        if self.shown_live:
            self.progress.stop()

    def advance(self, count: int = 1, text: str | None = None) -> None:
        """Advance the bar; it is redrawn at most ten times a second.

        Args:
            count: completed units.
            text: the new text behind the bar; None: no change.
        """
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
        """Print a permanent line above the bar."""
        _line(self.progress.console, text)


def relative(path: Path) -> str:
    """The path relative to the current folder if it is inside, else unchanged."""
    with contextlib.suppress(ValueError):
        return str(path.resolve().relative_to(Path.cwd()))
    return str(path)
