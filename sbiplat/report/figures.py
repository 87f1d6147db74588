"""Figures of the report: data in, a matplotlib Figure out; no pyplot, no window, and none of the reader's own rc settings.

Every text that comes from a bank or run goes through `plain`, which keeps `$` from being read as mathematics.
"""

from __future__ import annotations

import base64
import io
import math
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm, Normalize
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator, ScalarFormatter
from numpy.typing import NDArray
from scipy.ndimage import gaussian_filter
from scipy.stats import binom

Array = NDArray[np.float64]
WIDTH = 10.6  # inches: the width of the page's text at 96 pixels an inch
DARK, MIDDLE, LIGHT, PRIOR, INK, WARM = "#1b4f8a", "#7ba6d3", "#cfe0f1", "#b4b4b4", "#1c1c1c", "#b3541e"
MOST_CORNER = 12
MOST_PANELS = 24
MOST_TICKS = 14
RANK_BINS = 20
BINS_1D, BINS_2D = 40, 80
SMOOTHINGS = (1.0, 1.5, 2.25, 3.4, 5.0)  # candidates for the kernel's sd, in bins
PRIOR_DOTS = 1500
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


def _log10(value: float) -> float:
    return math.log10(value) if value > 0 else -math.inf


# -------------------------------------------------------------------------------------------------------- corner


@dataclass(frozen=True)
class _Coordinate:
    """How one parameter is drawn: its range, in logarithms or in units of a power of ten where ticks would be long."""

    low: float
    high: float
    log: bool
    exponent: int
    name: str
    unit: str

    @classmethod
    def of(cls, name: str, unit: str, draws: Array, prior: Array, support: tuple[float, float]) -> _Coordinate:
        low, high = np.quantile(draws, [0.001, 0.999])
        before = np.quantile(prior, [0.005, 0.995])
        if high - low > (before[1] - before[0]) / 3:  # a posterior this wide is best seen against all of its prior
            low, high = min(low, before[0]), max(high, before[1])
        pad = 0.05 * (high - low) or 0.05 * abs(high) or 1.0
        if np.quantile(draws, 0.001) > 0 and np.quantile(draws, 0.999) > 30 * np.quantile(draws, 0.001) and low > 0:
            pad = 0.05 * math.log10(high / low)
            return cls(max(math.log10(low) - pad, _log10(support[0])), min(math.log10(high) + pad, _log10(support[1])),
                       True, 0, "log₁₀ " + name, unit)
        low, high = max(low - pad, support[0]), min(high + pad, support[1])
        size = math.floor(math.log10(max(abs(low), abs(high), 1e-300)))
        exponent = 0 if -3 < size < 4 else 3 * (size // 3)
        factor = "10" + str(exponent).translate(str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")) if exponent else ""
        return cls(low / 10.0**exponent, high / 10.0**exponent, False, exponent, name, f"{factor} {unit}".strip())

    def label(self, room: int) -> str:
        """Name and unit, on two lines where they do not fit on one of `room` characters."""
        one_line = with_unit(self.name, self.unit, room)
        if len(self.name) + len(self.unit) + 3 <= 0.85 * room or not self.unit:
            return one_line
        return plain(self.name, room) + "\n" + f"[{plain(self.unit, room - 2)}]"

    def __call__(self, values: Array) -> Array:
        return np.log10(np.maximum(values, 1e-300)) if self.log else values / 10.0**self.exponent


@style()
def corner(draws: Array, prior: Array, names: Sequence[str], units: Sequence[str], support: tuple[Array, Array]) -> Figure:
    """Marginals on the diagonal, 50 % and 90 % highest-density regions below it, and the prior in grey.

    draws: (n, D). prior: (m, D). support: bounds, each (D,). At most the first 12 parameters are drawn.
    """
    dim = min(draws.shape[1], MOST_CORNER)
    bounds = [(float(low), float(high)) for low, high in zip(*support, strict=True)]
    axes_of = [_Coordinate.of(names[k], units[k], draws[:, k], prior[:, k], bounds[k]) for k in range(dim)]
    u = np.stack([c(draws[:, k]) for k, c in enumerate(axes_of)], 1)
    v = np.stack([c(prior[:, k]) for k, c in enumerate(axes_of)], 1)
    width = min(WIDTH, 3.2 + 2.0 * (dim - 1)) if dim > 1 else 5.0
    figure = Figure(figsize=(width, width if dim > 1 else 3.4), layout="constrained")
    figure.get_layout_engine().set(w_pad=0.02, h_pad=0.02, wspace=0.0, hspace=0.0)
    grid = figure.subplots(dim, dim, squeeze=False)
    small = 8 if dim <= 6 else 7 if dim <= 9 else 6.5
    room = int(72 * width / dim / (0.5 * (small + 1)))
    for i in range(dim):
        for j in range(dim):
            ax = grid[i, j]
            if j > i:
                ax.set_axis_off()
                continue
            if i == j:
                _marginal(ax, u[:, i], v[:, i], axes_of[i])
            else:
                _region(ax, u[:, j], u[:, i], v[:, j], v[:, i], axes_of[j], axes_of[i])
            _corner_ticks(ax, i, j, axes_of, small, room)
    grid[0, 0].plot([], [], color=DARK, label="posterior")
    grid[0, 0].plot([], [], color=PRIOR, label="prior")
    if dim > 1:
        figure.legend(*grid[0, 0].get_legend_handles_labels(), loc="upper right", bbox_to_anchor=(0.98, 0.97), fontsize=10)
    else:
        grid[0, 0].legend()
    figure.align_ylabels(grid[:, 0])
    figure.align_xlabels(grid[-1, :])
    return figure


def _marginal(ax: Axes, u: Array, v: Array, c: _Coordinate) -> None:
    edges = np.linspace(c.low, c.high, BINS_1D + 1)
    for values, colour, fill in ((v, PRIOR, 0.35), (u, DARK, 0.25)):
        density = np.histogram(values, edges)[0] / (len(values) * np.diff(edges))
        ax.stairs(density, edges, fill=True, color=colour, alpha=fill, lw=0)
        ax.stairs(density, edges, color=colour, lw=1.2)
    for q in np.quantile(u, [0.05, 0.5, 0.95]):
        ax.axvline(q, color=DARK, lw=0.8, ls=(0, (2, 2)))
    ax.set_xlim(c.low, c.high)
    ax.set_ylim(0)


def _region(ax: Axes, x: Array, y: Array, x_prior: Array, y_prior: Array, cx: _Coordinate, cy: _Coordinate) -> None:
    inside = (x_prior >= cx.low) & (x_prior <= cx.high) & (y_prior >= cy.low) & (y_prior <= cy.high)
    ax.plot(x_prior[inside][:PRIOR_DOTS], y_prior[inside][:PRIOR_DOTS], "o", color=PRIOR, ms=1.3, mew=0, zorder=0)
    counts, x_edges, y_edges = np.histogram2d(x, y, BINS_2D, [[cx.low, cx.high], [cy.low, cy.high]])
    if counts.sum() > 1 and (counts > 0).sum() > 1:
        density = np.pad(smoothed(counts), 1, mode="edge").T
        centres = [np.concatenate([e[:1], (e[1:] + e[:-1]) / 2, e[-1:]]) for e in (x_edges, y_edges)]
        levels = highest_density_levels(density[1:-1, 1:-1], (0.9, 0.5))
        if levels[0] < levels[1] < density.max():
            ax.contourf(*centres, density, [*levels, density.max() * 1.01], colors=[LIGHT, MIDDLE], zorder=1)
            ax.contour(*centres, density, levels, colors=[DARK], linewidths=0.7, zorder=2)
    ax.set_xlim(cx.low, cx.high)
    ax.set_ylim(cy.low, cy.high)


def smoothed(counts: Array) -> Array:
    """A 2-D histogram smoothed by the widest Gaussian that cross-validation (least squares) likes: thin crescents stay thin."""
    n = counts.sum()
    centre = np.zeros(counts.shape[0])
    centre[len(centre) // 2] = 1

    def score(density: Array, sigma: float) -> float:
        own = gaussian_filter(centre, sigma).max() ** 2
        return float(np.square(density).sum() / n**2 - 2 * ((counts * density).sum() - n * own) / (n * (n - 1)))

    candidates = [gaussian_filter(counts, sigma, mode="reflect") for sigma in SMOOTHINGS]
    scores = [score(density, sigma) for density, sigma in zip(candidates, SMOOTHINGS, strict=True)]
    worst = min(scores) + 0.005 * abs(min(scores))
    return [density for density, value in zip(candidates, scores, strict=True) if value <= worst][-1]


def highest_density_levels(density: Array, shares: Sequence[float]) -> list[float]:
    """The density above which each share of the mass lies."""
    ordered = np.sort(density, axis=None)[::-1]
    mass = np.cumsum(ordered) / ordered.sum()
    return [float(ordered[min(np.searchsorted(mass, share), len(ordered) - 1)]) for share in shares]


def _corner_ticks(ax: Axes, i: int, j: int, axes_of: Sequence[_Coordinate], small: float, room: int) -> None:
    dim = len(axes_of)
    ticks = 4 if dim <= 5 else 3
    ax.tick_params(labelsize=small, length=2.5, pad=2)
    for axis, shown in ((ax.xaxis, i == dim - 1), (ax.yaxis, j == 0 and i > 0)):
        axis.set_major_locator(MaxNLocator(ticks, prune="both", min_n_ticks=2))
        axis.set_major_formatter(ScalarFormatter(useOffset=False))
        axis.set_tick_params(labelleft=shown, labelbottom=shown)
    if i == j:
        ax.set_yticks([])
        ax.spines["left"].set_visible(False)
    if i == dim - 1:
        ax.set_xlabel(axes_of[j].label(room), fontsize=small + 1)
        if dim > 4:
            ax.tick_params(axis="x", labelrotation=45)
    if j == 0 and i > 0:
        ax.set_ylabel(axes_of[i].label(room), fontsize=small + 1)


# ------------------------------------------------------------------------------------------------------ coverage


def _panels(count: int, height: float = 1.0, most_columns: int = 5) -> tuple[Figure, list[Axes]]:
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


@style()
def coverage_curves(
    names: Sequence[str], levels: Array, curves: Array, low: Array, high: Array, xlabel: str, ylabel: str,
) -> Figure:
    """Stated against found probability, a panel a curve: curves, low and high are (K, levels)."""
    figure, panels = _panels(len(names))
    for k, ax in enumerate(panels):
        ax.plot([0, 1], [0, 1], color="#888888", lw=0.9, ls="--")
        ax.fill_between(levels, low[k], high[k], color=MIDDLE, alpha=0.55, lw=0)
        ax.plot(levels, curves[k], color=DARK)
        ax.set_title(plain(names[k]))
        ax.set(xlim=(0, 1), ylim=(0, 1), aspect="equal")
        ax.set_xticks([0, 0.5, 1], ["0", "0.5", "1"])
        ax.set_yticks([0, 0.5, 1], ["0", "0.5", "1"])
    figure.supxlabel(xlabel, fontsize=9)
    figure.supylabel(ylabel, fontsize=9)
    return figure


@style()
def rank_histograms(names: Sequence[str], ranks: Array) -> Figure:
    """Histograms of ranks (P, K) over the count that uniform ranks would give, with its 95 % band a bar."""
    figure, panels = _panels(len(names), height=0.75)
    count = len(ranks)
    expected = count / RANK_BINS
    low, high = binom.ppf([0.025, 0.975], count, 1 / RANK_BINS) / expected
    for k, ax in enumerate(panels):
        heights, edges = np.histogram(ranks[:, k], RANK_BINS, (0, 1))
        ax.axhspan(low, high, color="#dddddd", lw=0)
        ax.axhline(1, color="#888888", lw=0.9, ls="--")
        ax.stairs(heights / expected, edges, fill=True, color=MIDDLE, alpha=0.6)
        ax.stairs(heights / expected, edges, color=DARK, lw=1)
        ax.set_title(plain(names[k]))
        ax.set_xlim(0, 1)
        ax.set_xticks([0, 0.5, 1], ["0", "0.5", "1"])
    panels[0].set_ylim(0, max(1.8, panels[0].get_ylim()[1]))
    figure.supxlabel("rank of the truth among the draws (0: below all, 1: above all)", fontsize=9)
    figure.supylabel("count / expected", fontsize=9)
    return figure


# ------------------------------------------------------------------------------------------------------ training


@style()
def loss_curves(metrics: Sequence[Mapping[str, Any]], best_epoch: int | None, unit: str = "") -> Figure:
    """Loss by epoch on training and on validation rows, the best epoch marked; the learning rate beside it."""
    def column(name: str) -> Array:
        return np.array([float(m[name]) if isinstance(m.get(name), int | float) else np.nan for m in metrics])

    epoch, train, held_out = column("epoch"), column("train_loss"), column("validation_loss")
    figure = Figure(figsize=(WIDTH, 3.2), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=[2.2, 1])
    marker = "." if len(metrics) < 30 else None
    left.plot(epoch, train, color=WARM, label="training rows", lw=1.1, marker=marker)
    left.plot(epoch, held_out, color=DARK, label="validation rows", marker=marker)
    best = held_out[epoch == best_epoch] if best_epoch is not None else np.zeros(0)
    if len(best):
        left.plot(best_epoch, best[0], "o", color=DARK, mfc="white", ms=7, mew=1.6,
                  label=f"best: epoch {best_epoch}, {best[0]:.3f}")
    left.set_ylim(*_most_of(np.stack([train, held_out])))
    left.set(xlabel="epoch", ylabel=f"loss [{unit}]" if unit else "loss")
    left.legend()
    right.plot(epoch, column("learning_rate"), color=INK, lw=1.1, marker=marker)
    right.set(xlabel="epoch", ylabel="learning rate at the epoch's end")
    right.set_ylim(0)
    right.ticklabel_format(axis="y", style="sci", scilimits=(-2, 3), useMathText=True)
    for ax in (left, right):
        ax.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    return figure


def _most_of(curves: Array) -> tuple[float | None, float | None]:
    """Limits that show all after the first twentieth, which may be orders of magnitude above the rest."""
    late = curves[:, max(1, curves.shape[1] // 20):] if curves.shape[1] > 5 else curves
    late = late[np.isfinite(late)]
    if not len(late):
        return None, None
    pad = 0.06 * float(np.ptp(late)) or 0.5
    return float(late.min()) - pad, float(late.max()) + 2 * pad


# ---------------------------------------------------------------------------------------------------- predictive


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
def predictive(panels: Sequence[Panel]) -> Figure:
    """The data against what the simulator gives for draws of the posterior; a picture takes a whole row."""
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
            _picture(figure, grid[row], panel)
        elif isinstance(panel, Series):
            _series(grid[row, column], panel, legend=panel is first)
        else:
            _dots(grid[row, column], panel, legend=panel is first, room=110 // columns)
    for row in range(rows):
        for column in range(columns):
            if (row, column) not in used:
                grid[row, column].set_axis_off()
    return figure


def _series(ax: Axes, panel: Series, legend: bool) -> None:
    _scale(ax, panel.scale)
    ax.fill_between(panel.x, panel.bands[0], panel.bands[4], color=LIGHT, lw=0, label="90 % of simulations")
    ax.fill_between(panel.x, panel.bands[1], panel.bands[3], color=MIDDLE, lw=0, label="50 %")
    ax.plot(panel.x, panel.bands[2], color=DARK, label="median")
    ax.plot(panel.x, panel.data, "o", color=INK, ms=4.2 if len(panel.x) <= 120 else 1.8, mew=0, label="data", zorder=4)
    ax.set(xlabel=panel.xlabel, ylabel=panel.ylabel, title=panel.title)
    ax.xaxis.set_major_locator(MaxNLocator(8, integer=bool((panel.x == panel.x.round()).all())))
    ax.xaxis.set_major_formatter(ScalarFormatter(useOffset=False))
    ax.margins(x=0.01)
    _log_ticks(ax, panel.scale)
    if legend:
        ax.legend(ncols=4, loc="lower left", bbox_to_anchor=(0.0, 1.0), fontsize=7.5, columnspacing=1.0, handlelength=1.4)


def _dots(ax: Axes, panel: Dots, legend: bool, room: int) -> None:
    _scale(ax, panel.scale)
    places = np.arange(len(panel.data))
    ax.vlines(places, panel.bands[0], panel.bands[4], color=MIDDLE, lw=2.5, label="90 % of simulations")
    ax.vlines(places, panel.bands[1], panel.bands[3], color=DARK, lw=6, label="50 %")
    ax.plot(places, panel.bands[2], "_", color="white", ms=8, mew=1.6)
    ax.plot(places, panel.data, "o", color="white", mec=INK, ms=5.5, mew=1.5, label="data", zorder=4)
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


def _picture(figure: Figure, row: Sequence[Axes], panel: Picture) -> None:
    values = np.concatenate([panel.data.ravel(), panel.mean.ravel()])
    low, high = np.quantile(values, [0.002, 0.998])
    if panel.scale == "log" and (values > 0).any():
        norm: Normalize = LogNorm(max(low, values[values > 0].min()), max(high, values[values > 0].min() * 1.01), clip=True)
    else:
        norm = Normalize(low, high if high > low else low + 1)
    for ax, values, title in zip(row, (panel.data, panel.mean), ("data", "mean of the simulations"), strict=True):
        shown = ax.imshow(values, cmap="cividis", norm=norm, origin="lower", interpolation="nearest")
        ax.set_title(f"{panel.title}: {title}" if panel.title else title)
        ax.spines[:].set_visible(False)
    figure.colorbar(shown, ax=list(row), label=panel.label, shrink=0.85)


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
