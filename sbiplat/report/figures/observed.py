"""Observations beside others: series, dots and pictures, with bands of what they are held against."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm, Normalize
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator, ScalarFormatter

from sbiplat.report.figures.common import DARK, INK, LIGHT, MIDDLE, WIDTH, Array, plain, style

MOST_TICKS = 14


@dataclass(frozen=True)
class Words:
    """What is drawn: `data`, the dots; `middle` and the bands `wide` and `narrow` of what they are held against, of pictures the `mean`.
    dots: label of numbers of different sizes, in units of their own. difference: pictures have data - mean beside them."""

    data: str
    middle: str
    mean: str
    wide: str
    narrow: str
    dots: str
    difference: bool = False


PREDICTIVE = Words("data", "median", "mean of the simulations", "90 % of simulations", "50 %", "(x - predictive median) / predictive sd")


@dataclass(frozen=True)
class Series:
    """Numbers over an axis. data (S,), bands (5, S): the 5, 25, 50, 75 and 95 % quantiles; x (S,)."""

    data: Array
    bands: Array
    x: Array
    xlabel: str
    ylabel: str
    title: str = ""
    scale: str = "linear"


@dataclass(frozen=True)
class Dots:
    """A few numbers side by side. data (S,), bands (5, S), one label each, of one line or more."""

    data: Array
    bands: Array
    labels: tuple[str, ...]
    ylabel: str
    title: str = ""
    scale: str = "linear"


@dataclass(frozen=True)
class Picture:
    """An image (H, W): the data and the predictive mean."""

    data: Array
    mean: Array
    label: str
    title: str = ""
    scale: str = "linear"


Panel = Series | Dots | Picture


@style()
def observed(panels: Sequence[Panel], words: Words = PREDICTIVE) -> Figure:
    """Data against what they are held against, such as simulations from the posterior; a picture takes a whole row."""
    columns = 1 if len(panels) == 1 and not isinstance(panels[0], Picture) else 2
    cells, place = [], 0
    for panel in panels:
        if isinstance(panel, Picture):
            place += place % 2
        cells.append((panel, *divmod(place, columns)))
        place += 2 if isinstance(panel, Picture) else 1
    rows = -(-place // columns)
    heights = [4.4 if any(isinstance(p, Picture) and row == r for p, row, _ in cells) else 3.0 for r in range(rows)]
    figure = Figure(figsize=(WIDTH, sum(heights)), layout="constrained")
    grid = figure.subplots(rows, columns, squeeze=False, height_ratios=heights)
    used = set()
    first = next((panel for panel in panels if not isinstance(panel, Picture)), None)
    for panel, row, column in cells:
        used |= {(row, column)} | ({(row, column + 1)} if isinstance(panel, Picture) else set())
        if isinstance(panel, Picture):
            _picture(figure, grid[row], panel, words)
        elif isinstance(panel, Series):
            _series(grid[row, column], panel, words, legend=panel is first)
        else:
            _dots(grid[row, column], panel, words, legend=panel is first, room=110 // columns)
    for row in range(rows):
        for column in range(columns):
            if (row, column) not in used:
                grid[row, column].set_axis_off()
    return figure


def _series(ax: Axes, panel: Series, words: Words, legend: bool) -> None:
    _scale(ax, panel.scale)
    ax.fill_between(panel.x, panel.bands[0], panel.bands[4], color=LIGHT, lw=0, label=words.wide)
    ax.fill_between(panel.x, panel.bands[1], panel.bands[3], color=MIDDLE, lw=0, label=words.narrow)
    ax.plot(panel.x, panel.bands[2], color=DARK, label=words.middle)
    ax.plot(panel.x, panel.data, "o", color=INK, ms=4.2 if len(panel.x) <= 120 else 1.8, mew=0, label=words.data, zorder=4)
    ax.set(xlabel=panel.xlabel, ylabel=panel.ylabel, title=panel.title)
    ax.xaxis.set_major_locator(MaxNLocator(8, integer=bool((panel.x == panel.x.round()).all())))
    ax.xaxis.set_major_formatter(ScalarFormatter(useOffset=False))
    ax.margins(x=0.01)
    _log_ticks(ax, panel.scale)
    if legend:
        ax.legend(ncols=4, loc="lower left", bbox_to_anchor=(0.0, 1.0), fontsize=7.5, columnspacing=1.0, handlelength=1.4)


def _dots(ax: Axes, panel: Dots, words: Words, legend: bool, room: int) -> None:
    _scale(ax, panel.scale)
    places = np.arange(len(panel.data))
    ax.vlines(places, panel.bands[0], panel.bands[4], color=MIDDLE, lw=2.5, label=words.wide)
    ax.vlines(places, panel.bands[1], panel.bands[3], color=DARK, lw=6, label=words.narrow)
    ax.plot(places, panel.bands[2], "_", color="white", ms=8, mew=1.6)
    ax.plot(places, panel.data, "o", color="white", mec=INK, ms=5.5, mew=1.5, label=words.data, zorder=4)
    labels = [[plain(line, 22) for line in label.split("\n")] for label in panel.labels]
    long = len(places) * max(len(line) for lines in labels for line in lines) > room
    every = -(-len(places) // MOST_TICKS)  # more names than this cannot be read
    ax.set_xticks(places[::every], ["\n".join(lines) for lines in labels[::every]], rotation=45 if long else 0,
                  ha="right" if long else "center", rotation_mode="anchor" if long else "default")
    ax.tick_params(axis="x", length=0)
    ax.set_xlim(-0.7, len(places) - 0.3)
    ax.set(ylabel=panel.ylabel, title=panel.title)
    _log_ticks(ax, panel.scale)
    if legend:
        ax.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0))


def _picture(figure: Figure, row: Sequence[Axes], panel: Picture, words: Words) -> None:
    values = np.concatenate([panel.data.ravel(), panel.mean.ravel()])
    low, high = np.quantile(values, [0.002, 0.998])
    if panel.scale == "log" and (values > 0).any():
        norm: Normalize = LogNorm(max(low, values[values > 0].min()), max(high, values[values > 0].min() * 1.01), clip=True)
    else:
        norm = Normalize(low, high if high > low else low + 1)
    change = panel.data - panel.mean
    most = float(np.abs(change).max()) or 1.0
    second = (change, words.mean, "RdBu_r", Normalize(-most, most)) if words.difference else (panel.mean, words.mean, "cividis", norm)
    drawn = []
    for ax, (shown, title, colours, scale) in zip(row, ((panel.data, words.data, "cividis", norm), second), strict=True):
        drawn.append(ax.imshow(shown, cmap=colours, norm=scale, origin="lower", interpolation="nearest"))
        ax.set_title(f"{panel.title}: {title}" if panel.title else title)
        ax.spines[:].set_visible(False)
    if words.difference:
        for ax, one in zip(row, drawn, strict=True):
            figure.colorbar(one, ax=ax, label=panel.label, shrink=0.85)
    else:
        figure.colorbar(drawn[-1], ax=list(row), label=panel.label, shrink=0.85)


def _scale(ax: Axes, scale: str) -> None:
    if scale != "linear":
        ax.set_yscale(scale)


def _log_ticks(ax: Axes, scale: str) -> None:
    """Ticks at 1, 2 and 5 where a log axis spans too few decades to be read by its powers of ten."""
    low, high = ax.get_ylim()
    if scale == "log" and high < 300 * low:
        ax.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
        ax.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        ax.yaxis.set_minor_locator(NullLocator())
