"""Posteriors: the corner plot, and marginals of two posteriors over one another."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, ScalarFormatter
from scipy.ndimage import gaussian_filter

from sbiplat.report.figures.common import DARK, INK, LIGHT, MIDDLE, PRIOR, WARM, WIDTH, Array, plain, style, with_unit

MOST_CORNER, MOST_BESIDE = 12, 8
BINS_1D, BINS_2D = 40, 80
SMOOTHINGS = (1.0, 1.5, 2.25, 3.4, 5.0)  # candidates for the kernel's sd, in bins
PRIOR_DOTS = 1500


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
        magnitudes = support[0] >= 0 and (support[0] > 0 or not math.isfinite(support[1]))  # an angle from 0 to 2 pi is none
        if magnitudes and np.quantile(draws, 0.001) > 0 and np.quantile(draws, 0.999) > 30 * np.quantile(draws, 0.001) and low > 0:
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


@style()
def beside(
    here: Array, there: Array, names: Sequence[str], units: Sequence[str], support: tuple[Array, Array], labels: tuple[str, str],
    truth: Array | None = None,
) -> Figure:
    """Marginals of two posteriors over one another, draws (n, D) and (m, D), with the truth (D,); the first 8 parameters."""
    dim = min(here.shape[1], MOST_BESIDE)
    columns = min(dim, 4)
    rows = -(-dim // columns)
    figure = Figure(figsize=(WIDTH if columns > 2 else 3.6 * columns + 1.6, 2.4 * rows + 0.4), layout="constrained")
    grid = figure.subplots(rows, columns, squeeze=False).ravel()
    both = np.concatenate([here, there])
    for k, ax in enumerate(grid):
        if k >= dim:
            ax.set_axis_off()
            continue
        values = both[:, k] if truth is None else np.append(both[:, k], truth[k])
        edge = np.array([values.min(), values.max()]) if truth is not None else np.quantile(values, [0.001, 0.999])
        c = _Coordinate.of(names[k], units[k], values, edge, (float(support[0][k]), float(support[1][k])))
        edges = np.linspace(c.low, c.high, BINS_1D + 1)
        for draws, colour, label in ((here, DARK, labels[0]), (there, WARM, labels[1])):
            density = np.histogram(c(draws[:, k]), edges)[0] / (len(draws) * np.diff(edges))
            ax.stairs(density, edges, fill=True, color=colour, alpha=0.22, lw=0)
            ax.stairs(density, edges, color=colour, lw=1.2, label=label)
        if truth is not None:
            ax.axvline(float(c(truth[k:k + 1])[0]), color=INK, lw=1.3, ls="--", label="truth")
        ax.set(xlim=(c.low, c.high), xlabel=c.label(34))
        ax.set_ylim(0)
        ax.set_yticks([])
        ax.spines["left"].set_visible(False)
        ax.xaxis.set_major_locator(MaxNLocator(4, min_n_ticks=2))
        ax.xaxis.set_major_formatter(ScalarFormatter(useOffset=False))
    figure.legend(*grid[0].get_legend_handles_labels(), loc="outside upper left", ncols=3)
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


def _log10(value: float) -> float:
    return math.log10(value) if value > 0 else -math.inf
