"""One HTML file that opens without a network: sections of text, sortable tables and figures."""

from __future__ import annotations

import io
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from importlib.resources import files
from typing import Any

import matplotlib.pyplot as plt
from jinja2 import Environment, StrictUndefined
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

import metarun
from metarun.reporting.drawing import panels, style, without_glyph_warnings

MOST_CURVES = 20  # in one figure; of more runs the first ones are drawn
MOST_POINTS = 300  # of a curve


@dataclass(frozen=True)
class CellText:
    """A cell of a table.

    Args:
        text: what is shown.
        value: what rows are sorted by.
        number: whether it is aligned to the right, in one line.
    """

    text: str
    value: Any = ""
    number: bool = False


@dataclass(frozen=True)
class Section:
    """A part of a report: a heading, and what of the other things there is.

    Args:
        heading: in a few words.
        text: a sentence.
        columns: the headings of the table.
        rows: its cells.
        figures: as SVG.
        codes: texts to be copied.
    """

    heading: str
    text: str = ""
    columns: Sequence[str] = ()
    rows: Sequence[Sequence[CellText]] = ()
    figures: Sequence[str] = ()
    codes: Sequence[str] = ()


@dataclass
class Report:
    """The content of a report."""

    title: str
    summary: str
    sections: list[Section] = field(default_factory=list)

    def html(self) -> str:
        """The report as one HTML file. All text is escaped."""
        template = files("metarun.reporting").joinpath("report.html.j2").read_text("utf-8")
        environment = Environment(autoescape=True, undefined=StrictUndefined)
        return environment.from_string(template).render(
            title=self.title,
            summary=self.summary,
            sections=self.sections,
            version=metarun.__version__,
            made=f"{datetime.now():%Y-%m-%d %H:%M}",
        )


def text(value: Any) -> CellText:
    """A cell of text."""
    shown = "" if value is None else str(value)
    return CellText(shown, shown)


def number(value: float | None, shown: str = "") -> CellText:
    """A cell of a number, which may be missing."""
    return CellText("") if value is None else CellText(shown or f"{value:g}", value, True)


def curves(runs: Mapping[str, Sequence[Mapping[str, Any]]], metric: str, scale: int) -> str:
    """The validations of several runs over iterations, with 95 % intervals, as SVG.

    Args:
        runs: the validation rows of each run, by its name.
        metric: the name of the score in them.
        scale: what scores are multiplied by: 100 for percentages.
    """
    figure, (axis,) = panels(1, 1, (8, 4.5))
    for i, (name, rows) in enumerate(list(runs.items())[:MOST_CURVES]):
        every = max(len(rows) // MOST_POINTS, 1)
        own = [row for row in rows[::every] if isinstance(row.get(metric), (int, float))]
        x, y = [row["iteration"] for row in own], [scale * row[metric] for row in own]
        look = style(i) | {"marker": style(i)["marker"] if len(own) < 30 else ""}
        axis.plot(x, y, label=name, linewidth=1.5, markersize=4, **look)
        half = [scale * row.get("interval", 0.0) for row in own]
        low, high = ([v + sign * h for v, h in zip(y, half, strict=True)] for sign in (-1, 1))
        axis.fill_between(x, low, high, color=look["color"], alpha=0.12, linewidth=0)
    axis.set(xlabel="iteration", ylabel=f"validation {metric}{', %' if scale == 100 else ''}")
    axis.xaxis.set_major_locator(MaxNLocator(8, integer=True, min_n_ticks=1))
    axis.grid(alpha=0.3)
    figure.legend(loc="outside lower center", ncols=1, fontsize=8)
    return svg(figure)


def svg(figure: Figure) -> str:
    """A figure as the element of an HTML file; it is closed."""
    buffer = io.StringIO()
    with without_glyph_warnings():
        figure.savefig(buffer, format="svg", bbox_inches="tight", metadata={"Date": None})
    plt.close(figure)
    found = re.search(r"<svg.*</svg>", buffer.getvalue(), re.DOTALL)
    assert found is not None
    return found[0]
