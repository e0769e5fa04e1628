"""The look of figures: colours, markers and lines that tell models apart, and text that fits its place."""

from __future__ import annotations

import io
import math
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties
from matplotlib.text import Text
from matplotlib.textpath import text_to_path
from matplotlib.ticker import LogFormatter

from metarun.storage.files import atomic_write

# Figures are made without pyplot, whose backend, settings and open figures are those of the user's program.

# The colours of Okabe and Ito (2008), which people with any colour vision can tell apart; without yellow,
# which is too light for a line on white.
COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#000000")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "<", "*", ">")
LINES = ("-", "--", "-.", ":")
TITLE_LINES = 3
SMALLEST = 0.095  # inches; the height of the smallest text that can be read


def style(index: int) -> dict[str, Any]:
    """Colour, marker and line of a model; colour and marker together repeat after 70 models."""
    return {
        "color": COLOURS[index % len(COLOURS)],
        "marker": MARKERS[index % len(MARKERS)],
        "linestyle": LINES[index // len(COLOURS) % len(LINES)],
    }


@contextmanager
def without_glyph_warnings() -> Iterator[None]:
    """A context in which matplotlib does not warn of characters that its font lacks; it draws boxes."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="(?s)Glyph .* missing")
        yield


def width_of(text: str, size: float) -> float:
    """The width in inches of one line of text in a font of `size` points."""
    with without_glyph_warnings():
        width, *_ = text_to_path.get_text_width_height_descent(text, FontProperties(size=size), ismath=False)
    return 1.04 * width / 72  # the renderer rounds the widths of characters to pixels


def fitted(text: str, inches: float, size: float) -> str:
    """One line of text, with an ellipsis in its middle if it would be wider than `inches`.

    Args:
        text: any text; names from outside may be long.
        inches: the greatest width.
        size: of the font, in points.
    """
    text = " ".join(text.split())
    kept = len(text)
    short = text
    while kept > 1 and (width := width_of(short, size)) > inches:
        kept = min(kept - 1, math.ceil(kept * inches / width))
        short = f"{text[: kept - kept // 2]}…{text[len(text) - kept // 2 :]}"
    return short


def panels(count: int, columns: int, size: tuple[float, float], **settings: Any) -> tuple[Figure, list[Axes]]:
    """A figure with `count` axes of `size` inches (width, height), in even rows of at most `columns`."""
    lines = math.ceil(count / columns)
    columns = math.ceil(count / lines)
    figure = Figure((size[0] * columns, size[1] * lines), layout="constrained")
    axes = figure.subplots(lines, columns, squeeze=False, **settings)
    for axis in axes.flat[count:]:
        axis.set_visible(False)
    return figure, list(axes.flat[:count])


def headline(figure: Figure, text: str, size: float = 10, beside: float = 0.0) -> None:
    """A title above all panels, in lines of the width of the figure without the `beside` inches at its right.

    Lines end at commas. There are at most three, of which the last is cut if it is too long.
    """
    width = figure.get_figwidth()
    inches = width - beside - 0.2
    lines: list[str] = []
    for part in text.split(", "):
        longer = f"{lines[-1]}, {part}" if lines else part
        if lines and (len(lines) == TITLE_LINES or width_of(longer, size) <= inches):
            lines[-1] = longer
        else:
            lines.append(part)
    figure.set_figheight(figure.get_figheight() + (len(lines) - 1) * size / 60)
    shown = ",\n".join(fitted(line, inches, size) for line in lines)
    figure.suptitle(shown, x=0.1 / width, ha="left", fontsize=size)


def class_ticks(axis: Any, names: Sequence[str], inches: float, widest: float = 2.5, **settings: Any) -> None:
    """Label the classes along an axis; where there is no space for their names, number every tenth or so.

    Args:
        axis: the x or y axis, with a class at each integer.
        names: of the classes.
        inches: the space of a class along the axis.
        widest: the greatest width of a name, in inches.
        settings: of the text.
    """
    size = min(8.0, 72 * inches * 0.72)
    if inches >= SMALLEST:
        axis.set_ticks(range(len(names)), [fitted(name, widest, size) for name in names])
    else:
        size = 7.0
        every = 10 ** math.ceil(math.log10(0.25 / inches))
        axis.set_ticks(range(0, len(names), every), [str(i + 1) for i in range(0, len(names), every)])
    for label in axis.get_ticklabels():
        label.set(fontsize=size, **settings)


class PlainLogFormatter(LogFormatter):
    """The labels of a logarithmic axis as plain numbers, at the ticks that matplotlib labels."""

    def __call__(self, x: float, pos: int | None = None) -> str:
        return f"{x:g}" if super().__call__(x, pos) else ""


def logarithmic(axes: Axes, which: Literal["x", "y"]) -> None:
    """Make the x or y axis logarithmic, with plain numbers as labels."""
    axis = axes.xaxis if which == "x" else axes.yaxis
    (axes.set_xscale if which == "x" else axes.set_yscale)("log")
    axis.set_major_formatter(PlainLogFormatter())
    axis.set_minor_formatter(PlainLogFormatter())


def save(figure: Figure, path: Path) -> None:
    """Write a figure to a PNG file atomically."""
    dpi = min(110.0, 30_000 / max(figure.get_size_inches()))  # a PNG file has fewer than 65,536 pixels a side
    content = rendered(figure, "png", dpi=dpi)
    atomic_write(path, lambda file: file.write(content))


def rendered(figure: Figure, form: Literal["png", "svg"], **settings: Any) -> bytes:
    """A figure as a file. Names of models, datasets and classes are text, and may contain a dollar sign."""
    for each in figure.findobj(Text):
        each.set_parse_math(False)  # type: ignore[attr-defined]
    buffer = io.BytesIO()
    with without_glyph_warnings():
        figure.savefig(buffer, format=form, bbox_inches="tight", **settings)
    return buffer.getvalue()
