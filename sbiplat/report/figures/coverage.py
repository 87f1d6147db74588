"""Coverage: curves, ranks, and where calibration fails."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.image import AxesImage
from matplotlib.patches import Rectangle
from numpy.typing import NDArray
from scipy.stats import binom

from sbiplat.report.figures.common import DARK, INK, MIDDLE, WIDTH, Array, grid_of, plain, style

MOST_PANELS = 24
RANK_BINS = 20


@style()
def coverage_curves(
    names: Sequence[str], levels: Array, curves: Array, low: Array, high: Array, xlabel: str, ylabel: str,
) -> Figure:
    """Stated against found probability, a panel a curve: curves, low and high are (K, levels)."""
    figure, panels = grid_of(len(names))
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
    figure, panels = grid_of(len(names), height=0.75)
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


@dataclass(frozen=True)
class Map:
    """values: (rows, tenths), drawn around 0. limit: (rows, tenths), beyond which they stray further than chance; infinite where that is
    not known. edges: (tenths + 1,), written under the first, middle and last edge."""

    title: str
    values: Array
    limit: Array
    edges: Array | None = None

    @property
    def far(self) -> NDArray[np.bool_]:
        """Which cells stray further than chance."""
        return np.abs(self.values) > self.limit


@style()
def maps(panels: Sequence[Map], rows: Sequence[str], label: str, columns: int, xlabel: str) -> Figure:
    """Heat maps under one scale, centred at 0 and so wide that what chance makes is pale."""
    lines = -(-len(panels) // columns)
    height = 0.24 * len(rows) + 0.75
    figure = Figure(figsize=(WIDTH if columns > 1 else 0.62 * WIDTH, height * lines + 0.45), layout="constrained")
    grid = figure.subplots(lines, columns, squeeze=False, sharey=True)
    most = max(float(np.abs(panel.values).max()) for panel in panels)
    most = max([most, *(2 * float(panel.limit.max()) for panel in panels if np.isfinite(panel.limit).all())])
    for k, ax in enumerate(grid.ravel()):
        if k >= len(panels):
            ax.set_axis_off()
            continue
        shown = _heat(ax, panels[k], max(most, 1e-9))
        ax.set_yticks(range(len(rows)), [plain(name) for name in rows])
    figure.supxlabel(xlabel, fontsize=9)
    figure.colorbar(shown, ax=list(grid.ravel()), label=label, shrink=min(0.95, 2.4 / figure.get_figheight()), anchor=(0.0, 1.0),
                    aspect=18 if lines > 1 else 10)
    return figure


def _heat(ax: Axes, panel: Map, most: float) -> AxesImage:
    count = panel.values.shape[1]
    shown = ax.imshow(panel.values, cmap="RdBu_r", vmin=-most, vmax=most, aspect="auto", interpolation="nearest")
    for i, j in zip(*np.nonzero(panel.far), strict=True):
        ax.add_patch(Rectangle((j - 0.46, i - 0.44), 0.92, 0.88, fill=False, ec=INK, lw=1.3))
    ax.set_title(plain(panel.title, 60), fontsize=9)
    if panel.edges is None:
        ax.set_xticks(range(count), [str(k + 1) for k in range(count)])
    else:
        places = [0, count // 2, count]
        ax.set_xticks([p - 0.5 for p in places], [f"{panel.edges[p]:.2g}".replace("-", "−") for p in places])
    ax.tick_params(length=2)
    ax.spines[:].set_visible(False)
    return shown
