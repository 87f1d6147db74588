"""Robustness: how far the posterior moves, and how often it still holds the truth, against the size of a change of the data."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

from sbiplat.report.figures.common import INK, PRIOR, WARM, WIDTH, Array, style

FLOOR = 1e-4  # nats: less than this is drawn there
SPREAD = (0.1, 0.5, 0.9)
NOISE = "#6d747d"


@dataclass(frozen=True)
class Robust:
    """Figures by eps (E,). worst, noise, search: KL in nats of P observations, (E, P); search is NaN where none was made. features: how
    many may be changed. harmless: a KL that means nothing. nominal (A,); attacked, noisy: coverage of D parameters, (E, A, D);
    in_proportion (E, A)."""

    eps: Array
    worst: Array
    noise: Array
    search: Array
    features: float
    harmless: float
    nominal: Array
    attacked: Array
    noisy: Array
    in_proportion: Array


@style()
def robustness(found: Robust) -> Figure:
    """KL against eps on log axes, and coverage against eps, a panel a nominal level."""
    count = len(found.nominal)
    figure = Figure(figsize=(WIDTH, 3.9), layout="constrained")
    axes = figure.subplots(1, 1 + count, width_ratios=[1.55, *[1] * count], squeeze=False)[0]
    _moved(axes[0], found)
    for k, ax in enumerate(axes[1:]):
        _covered(ax, found, k, legend=k == 0)
    return figure


def _moved(ax: Axes, found: Robust) -> None:
    ax.set_xscale("log")
    ax.set_yscale("log")
    for values, colour, label, marker in ((found.worst, WARM, "worst change found", "o"),
                                          (found.noise, NOISE, "noise of the same size", "s")):
        low, middle, high = np.maximum(np.nanquantile(values, SPREAD, axis=1), FLOOR)
        ax.fill_between(found.eps, low, high, color=colour, alpha=0.18, lw=0)
        ax.plot(found.eps, middle, color=colour, marker=marker, ms=5, label=f"{label}: median")
    some = np.isfinite(found.search).any(axis=1)
    if some.any() and not np.array_equal(found.search, found.worst, equal_nan=True):
        ax.plot(found.eps[some], np.maximum(np.nanmedian(found.search[some], axis=1), FLOOR), "D", color="white", mec=WARM, ms=5,
                label="found without gradients")
    ax.plot(found.eps, np.maximum(found.features * np.median(found.noise, axis=1), FLOOR), color=INK, ls="--", lw=1.1,
            label=f"most that is in proportion:\n{found.features:.3g} × noise")
    ax.axhspan(FLOOR / 10, found.harmless, color="#f0f1f3", lw=0, zorder=0)
    low = min(float(np.quantile(found.noise, SPREAD[0])), found.harmless) / 5
    ax.set_ylim(max(FLOOR / 2, low), None)
    ax.set(xlabel="eps: size of the change, in sd of a feature", ylabel="KL: how far the posterior moves [nats]")
    _ticks(ax, found.eps)
    ax.legend(loc="upper left", fontsize=7.5)
    low, high = ax.get_ylim()
    ax.set_ylim(low, high * (high / low) ** 0.45)


def _covered(ax: Axes, found: Robust, k: int, legend: bool) -> None:
    ax.set_xscale("log")
    nominal = float(found.nominal[k])
    ax.axhline(nominal, color=PRIOR, lw=0.9, label="nominal")
    for values, colour, label, marker in ((found.attacked[:, k], WARM, "under attack", "o"),
                                          (found.noisy[:, k], NOISE, "under noise", "s")):
        ax.plot(found.eps, values.min(axis=1), color=colour, marker=marker, ms=5, label=label)
        for j in range(values.shape[1]):
            ax.plot(found.eps, values[:, j], marker, color=colour, ms=3, alpha=0.35, mew=0)
    ax.plot(found.eps, found.in_proportion[:, k], color=INK, ls="--", lw=1.1, label="least in proportion")
    ax.set(ylim=(-0.03, 1.03), xlabel="eps", title=f"intervals of {nominal:.0%} hold the truth".replace("%", " %"))
    ax.set_ylabel("in this share of observations" if legend else "")
    _ticks(ax, found.eps)
    if legend:
        ax.legend(loc="upper right", fontsize=7.5)


def _ticks(ax: Axes, eps: Array) -> None:
    ax.xaxis.set_major_locator(FixedLocator(eps.tolist()))
    ax.xaxis.set_minor_locator(NullLocator())
    ax.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    ax.set_xlim(eps.min() / 1.25, eps.max() * 1.25)
