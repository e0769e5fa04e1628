"""One HTML file that opens without a network: sections of text, sortable tables and figures."""

from __future__ import annotations

import base64
import io
import re
from collections.abc import Mapping, Sequence
from dataclasses import KW_ONLY, dataclass, field
from datetime import datetime
from importlib.resources import files
from typing import Any, Literal

import numpy as np
from jinja2 import Environment, StrictUndefined
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from PIL import Image

import metarun
from metarun.reporting.drawing import COLOURS, fitted, panels, rendered, style

MOST_CURVES = 20  # in one figure; of more runs the first ones are drawn
MOST_POINTS = 300  # of a curve
WIDTH = 4.8  # inches of a figure of curves, whose text is then readable on a phone
LEGEND_LINE = 0.19  # inches
# Figures with many cells are pixels, of few colours.
DPI, PALETTE = 90, 128
MOST_CLASSES = 2000  # of a confusion matrix in a file
PICTURE = re.compile(r"data:image/(png|jpeg);base64,[A-Za-z0-9+/=]+")


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
class Drawn:
    """A figure.

    Args:
        label: what it shows, for readers who do not see it.
        svg: the figure as an element of HTML, or "".
        image: the figure as the address of a picture (`PICTURE`), or "".
        width: of a picture, in points.
    """

    label: str
    svg: str = ""
    image: str = ""
    width: int = 0


@dataclass(frozen=True)
class Example:
    """A picture of a task: an example with its class, and what was predicted of it.

    Args:
        image: the address of the picture (`PICTURE`).
        lines: of text below it.
        mark: whether the prediction is right; "" for a support example.
    """

    image: str
    lines: Sequence[str]
    mark: Literal["right", "wrong", ""] = ""


@dataclass(frozen=True)
class Section:
    """A part of a report: a heading, and what of the other things there is.

    Args:
        heading: in a few words.
        text: a sentence.
        facts: names with their values.
        columns: the headings of the table.
        rows: its cells.
        examples: pictures of a task.
        figures: curves and matrices.
        codes: texts to be copied.
        parts: smaller sections.
        folded: whether the reader opens it.
    """

    heading: str
    text: str = ""
    _: KW_ONLY
    facts: Mapping[str, str] = field(default_factory=dict)
    columns: Sequence[str] = ()
    rows: Sequence[Sequence[CellText]] = ()
    examples: Sequence[Example] = ()
    figures: Sequence[Drawn] = ()
    codes: Sequence[str] = ()
    parts: Sequence[Section] = ()
    folded: bool = False


@dataclass
class Report:
    """The content of a report."""

    title: str
    summary: str
    sections: list[Section] = field(default_factory=list)

    def html(self) -> str:
        """The report as one HTML file. All text is escaped."""
        template = files("metarun.reporting").joinpath("report.html.j2").read_text("utf-8")
        environment = Environment(
            autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
        )
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


def cell(value: Any) -> CellText:
    """A cell of a value from a file: a number, or text."""
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        return number(value, f"{value:.4g}")
    return text(value)


def curves(runs: Mapping[str, Sequence[Mapping[str, Any]]], metric: str, scale: int, title: str) -> Drawn:
    """The validations of several runs over iterations, with 95 % intervals.

    Args:
        runs: the validation rows of each run, by its name.
        metric: the name of the score in them.
        scale: what scores are multiplied by: 100 for percentages.
        title: of the figure.
    """
    drawn = list(runs.items())[:MOST_CURVES]
    figure, (axis,) = panels(1, 1, (WIDTH, 3.3 + LEGEND_LINE * len(drawn)))
    for i, (name, rows) in enumerate(drawn):
        every = max(len(rows) // MOST_POINTS, 1)
        own = [row for row in rows[::every] if isinstance(row.get(metric), (int, float))]
        x, y = [row["iteration"] for row in own], [scale * row[metric] for row in own]
        look = style(i) | {"marker": style(i)["marker"] if len(own) < 30 else ""}
        axis.plot(x, y, label=fitted(name, WIDTH - 1.2, 8), linewidth=1.5, markersize=4, **look)
        half = [scale * row.get("interval", 0.0) for row in own]
        low, high = ([v + sign * h for v, h in zip(y, half, strict=True)] for sign in (-1, 1))
        axis.fill_between(x, low, high, color=look["color"], alpha=0.12, linewidth=0)
    axis.set(xlabel="iteration", ylabel=f"validation {metric}{', %' if scale == 100 else ''}")
    axis.set_title(fitted(title, WIDTH - 1, 10), fontsize=10)
    axis.xaxis.set_major_locator(MaxNLocator(6, integer=True, min_n_ticks=1))
    axis.grid(alpha=0.3)
    figure.legend(loc="outside lower center", ncols=1, fontsize=8, handlelength=3)
    return Drawn(f"Curves of the validation {metric} over iterations: {title}", svg=svg(figure))


def regression(
    support: Sequence[Mapping[str, Any]], queries: Sequence[Mapping[str, Any]], title: str
) -> Drawn:
    """The support, the true values and the predictions of a task whose examples and values are numbers."""
    figure, (axis,) = panels(1, 1, (WIDTH, 3.4))
    ordered = sorted(queries, key=lambda row: row["x"])
    x = [row["x"] for row in ordered]
    axis.plot(x, [row["y"] for row in ordered], "o-", color="k", markersize=3, linewidth=1, label="truth")
    look: dict[str, Any] = {"color": COLOURS[5], "linestyle": "--", "marker": "s", "markersize": 4}
    axis.plot(x, [row["prediction"] for row in ordered], **look, label="prediction")
    axis.plot(*([row[key] for row in support] for key in "xy"), "^", color=COLOURS[0], label="support")
    axis.set(xlabel="x", ylabel="y")
    axis.grid(alpha=0.3)
    figure.legend(loc="outside lower center", ncols=3, fontsize=8)
    return Drawn(title, svg=svg(figure))


def svg(figure: Figure) -> str:
    """A figure as the element of an HTML file."""
    content = rendered(figure, "svg", metadata=dict.fromkeys(("Date", "Creator"))).decode()
    found = re.search(r"<svg.*</svg>", content, re.DOTALL)
    assert found is not None
    return found[0]


def pixels(figure: Figure, label: str) -> Drawn:
    """A figure as a picture of few colours."""
    content = io.BytesIO(rendered(figure, "png", dpi=2 * DPI))
    image = Image.open(content).convert("RGB").quantize(PALETTE)
    packed = io.BytesIO()
    image.save(packed, "PNG", optimize=True)
    address = f"data:image/png;base64,{base64.b64encode(packed.getvalue()).decode()}"
    return Drawn(label, image=address, width=image.width // 2)


def picture(value: Any) -> str:
    """The address of a picture from a file; "" for anything else, which a page must not load."""
    return value if isinstance(value, str) and PICTURE.fullmatch(value) else ""


def matrix(classes: int, counts: Sequence[Any]) -> np.ndarray:
    """The counts [class, predicted class, count] as a matrix, [classes, classes].

    Raises ValueError, IndexError or TypeError for something else.
    """
    cells = np.asarray(counts, dtype=np.int64).reshape(-1, 3)
    if not 0 < classes <= MOST_CLASSES or (cells < 0).any():
        raise ValueError("not a confusion matrix")
    full = np.zeros((classes, classes), np.int64)
    full[cells[:, 0], cells[:, 1]] = cells[:, 2]
    return full
