"""What all figures share: style, colours, text from outside, and the way into a page."""

from __future__ import annotations

import base64
import io
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import NDArray

Array = NDArray[np.float64]
WIDTH = 10.6  # inches: the width of the page's text at 96 pixels an inch
DARK, MIDDLE, LIGHT, PRIOR, INK, WARM = "#1b4f8a", "#7ba6d3", "#cfe0f1", "#b4b4b4", "#1c1c1c", "#b3541e"
MOST_SVG_BYTES = 300_000
NAME_LENGTH = 26


@contextmanager
def style() -> Iterator[None]:
    """matplotlib's own defaults with the report's few changes, whatever the reader's matplotlibrc says."""
    with matplotlib.rc_context(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing")
        matplotlib.rcParams.update({k: v for k, v in matplotlib.rcParamsDefault.items() if not k.startswith("backend")})
        matplotlib.rcParams.update({
            "font.size": 9, "axes.titlesize": 9.5, "axes.labelsize": 9,
            "xtick.labelsize": 8, "ytick.labelsize": 8, "legend.fontsize": 8.5,
            "axes.spines.top": False, "axes.spines.right": False, "axes.linewidth": 0.7, "axes.edgecolor": "#555555",
            "xtick.color": "#555555", "ytick.color": "#555555", "xtick.labelcolor": INK, "ytick.labelcolor": INK,
            "text.color": INK, "axes.labelcolor": INK, "lines.linewidth": 1.4, "legend.frameon": False,
            "svg.hashsalt": "sbiplat",
        })
        yield


class Image(NamedTuple):
    """A figure for <img>: a data: address, and the width in CSS pixels."""

    source: str
    width: int


@style()
def image(figure: Figure, raster: bool = False) -> Image:
    """A figure as SVG, or as PNG at twice the screen's resolution where SVG would be large."""
    out = io.BytesIO()
    if not raster:
        figure.savefig(out, format="svg", metadata={"Date": None, "Creator": None})
    if raster or out.tell() > MOST_SVG_BYTES:
        out = io.BytesIO()
        figure.savefig(out, format="png", dpi=192, metadata={"Software": None}, pil_kwargs={"optimize": True})
    kind = "png" if out.getvalue().startswith(b"\x89PNG") else "svg+xml"
    return Image(f"data:image/{kind};base64,{base64.b64encode(out.getvalue()).decode()}", round(96 * figure.get_figwidth()))


def plain(value: str, most: int = NAME_LENGTH) -> str:
    """Text from outside, for a figure: printable, not too long, and never mathematics."""
    shown = "".join(c if c.isprintable() else "?" for c in value)
    return (shown if len(shown) <= most else shown[:most - 1] + "…").replace("$", r"\$")


def with_unit(name: str, unit: str, most: int = NAME_LENGTH) -> str:
    """A name with its unit in brackets, for an axis."""
    return plain(name, most) + (f" [{plain(unit, most)}]" if unit else "")


def grid_of(count: int, height: float = 1.0, most_columns: int = 5) -> tuple[Figure, list[Axes]]:
    """A figure of small square panels that share their axes, with the empty ones left blank."""
    columns = min(count, most_columns)
    rows = -(-count // columns)
    side = WIDTH / most_columns
    figure = Figure(figsize=(side * columns + 0.35, (side * height + 0.2) * rows + 0.45), layout="constrained")
    grid = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False).ravel()
    for ax in grid[count:]:
        ax.set_axis_off()
    for k, ax in enumerate(grid[:count]):
        ax.tick_params(labelbottom=k + columns >= count)
    return figure, list(grid[:count])
