"""Training: losses, and the learning curve."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from sbiplat.report.figures.common import DARK, INK, WARM, WIDTH, Array, style


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


@style()
def learning_curve(rows: Sequence[int], log_density: Sequence[float], gains: Sequence[tuple[float, float]], next_gain: float) -> Figure:
    """Held-out log-density of three trainings against their rows, and of the next doubling as the curve has it.

    gains: of each doubling, with its standard error."""
    figure = Figure(figsize=(5.6, 3.0), layout="constrained")
    ax = figure.subplots()
    ax.set_xscale("log", base=2)
    ax.plot(rows, log_density, "o-", color=DARK, label="trained on so many")
    ax.errorbar(rows[1:], log_density[1:], [2 * error for _, error in gains], fmt="none", color=DARK, capsize=3, lw=1,
                label="gain of the doubling, ± 2 standard errors")
    ax.plot([rows[-1], 2 * rows[-1]], [log_density[-1], log_density[-1] + next_gain], "o--", color=WARM, mfc="white",
            markevery=[1], label="the next doubling, if it goes on so")
    ticks = [*rows, 2 * rows[-1]]
    ax.set_xticks(ticks, [f"{n:,}" for n in ticks])
    ax.minorticks_off()
    ax.set_xlim(rows[0] / 1.4, 2 * rows[-1] * 1.4)
    ax.set(xlabel="simulations in the bank", ylabel="held-out log-density [nats]")
    ax.legend(loc="lower right", fontsize=7.5)
    low, high = ax.get_ylim()
    ax.set_ylim(low - 0.35 * (high - low), high)
    return figure
