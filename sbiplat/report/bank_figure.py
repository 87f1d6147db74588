"""A picture of a bank: how often rows failed, and how long they took, over each parameter."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import NDArray

from sbiplat import files
from sbiplat.bank.bank import Bank
from sbiplat.bank.layout import STATUS
from sbiplat.bank.sight import Look, look
from sbiplat.errors import BankError, SettingError
from sbiplat.report.figures import DARK, LIGHT, MOST_CORNER, WARM, style, with_unit

BINS = 20
FORMATS = (".png", ".svg", ".pdf")


def draw(bank: Bank, out: str | Path) -> Path:
    """Write the picture to a .png, .svg or .pdf."""
    out = Path(out)
    if out.suffix.lower() not in FORMATS:
        raise SettingError(f"--out {out}: a picture is written as {', '.join(FORMATS)}")
    with files.disk_errors(out), files.atomic_path(out) as temporary:
        picture(bank).savefig(temporary, format=out.suffix.lower()[1:], dpi=144)
    return out


@style()
def picture(bank: Bank) -> Figure:
    """Two panels a parameter, the first twelve: the share of rows that failed, and the time of a row, in bins of equal count."""
    seen = look(bank)
    if not len(seen.status):
        raise BankError(f"bank {bank.path} has no rows yet")
    prior = bank.header.prior
    count = min(prior.dim, MOST_CORNER)
    figure = Figure(figsize=(2.7 * count + 0.6, 4.6), layout="constrained")
    axes = figure.subplots(2, count, sharey="row", squeeze=False)
    for k in range(count):
        values = seen.theta[:, k]
        edges = np.unique(np.quantile(values, np.linspace(0, 1, BINS + 1)))
        which = np.clip(np.searchsorted(edges, values, "right") - 1, 0, max(len(edges) - 2, 0))
        centres = np.array([np.median(values[which == b]) for b in np.unique(which)])
        _failures(axes[0, k], centres, which, seen)
        _times(axes[1, k], centres, which, seen)
        axes[1, k].set_xlabel(with_unit(prior.names[k], prior.units[k]))
        low, high = np.quantile(values, [0.05, 0.95])
        if values.min() > 0 and high > 30 * low:
            axes[0, k].set_xscale("log")
            axes[1, k].set_xscale("log")
    axes[0, 0].set_ylabel("share of rows that failed")
    axes[1, 0].set_ylabel("time of a row [s]")
    axes[0, -1].legend(loc="upper right")
    figure.suptitle(f"{bank.header.simulator['name']}: {len(seen.status)} of {bank.rows} rows, "
                    f"{np.mean(seen.status != 0):.2%} failed".replace("$", r"\$"), fontsize=10)
    return figure


def _failures(axes: Axes, centres: NDArray[np.float64], which: NDArray[np.int64], seen: Look) -> None:
    bins, colours = np.unique(which), (DARK, WARM, "#5a8f3c", "#8a5fa8")
    for (name, code), colour in zip([s for s in STATUS.items() if s[1]], colours, strict=True):
        bad = seen.status == code
        if not bad.any():
            continue
        counts = np.array([(which == b).sum() for b in bins])
        share = np.array([(bad & (which == b)).sum() for b in bins]) / counts
        axes.errorbar(centres, share, np.sqrt(share * (1 - share) / counts), fmt="o-", markersize=2.5, color=colour, label=name)
    if not (seen.status != 0).any():
        axes.plot(centres, 0 * centres, color=DARK, label="none")
    axes.set_ylim(bottom=0)


def _times(axes: Axes, centres: NDArray[np.float64], which: NDArray[np.int64], seen: Look) -> None:
    low, middle, high = np.array([np.quantile(seen.seconds[which == b], [0.1, 0.5, 0.9]) for b in np.unique(which)]).T
    axes.fill_between(centres, low, high, color=LIGHT)
    axes.plot(centres, middle, color=DARK)
    if low.min() > 0:
        axes.set_yscale("log")
