"""Calibration and information on held-out pairs: what a posterior must hold, each with its threshold, its figure and its mend.

Coverage is refused only where a departure is both significant (Holm-corrected over all ranks) and large enough to
matter: more pairs sharpen the test without making it refuse what is good enough. Under- and over-coverage have limits of
their own, since a posterior that is too narrow misleads and one that is too wide only wastes.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import special

from sbiplat.diagnostics.coverage import LEVELS, Coverage, holm
from sbiplat.diagnostics.examined import Examined
from sbiplat.diagnostics.held_out import HeldOutFigures, held_out_figures
from sbiplat.gate.criterion import Criterion, Part, enough
from sbiplat.settings import setting

MAY_BE_CHANCE = "; passed though over the limit, since that may be chance with so few pairs"
FIGURES = ("p_value", "deviation", "deviation_band", "under", "under_band", "over", "over_band")


@dataclass(frozen=True)
class CalibrationCriteria:
    """How much is tested of calibration and information, and the thresholds."""

    pairs: int = setting(1000, "held-out pairs", low=1)
    draws: int = setting(1000, "draws a pair", low=1)
    least_pairs: int = setting(200, "fewer pairs than this certify nothing", low=1)
    least_draws: int = setting(500, "fewer draws than this certify nothing", low=1)
    false_alarm: float = setting(0.01, "chance that a calibrated posterior is refused for uniformity", low=1e-6, high=0.5)
    deviation: float = setting(0.03, "max |ECP - alpha| up to which a significant departure is let pass", low=0.0, high=1.0)
    under_coverage: float = setting(0.06, "largest shortfall of a central interval's coverage", low=0.0, high=1.0)
    over_coverage: float = setting(0.10, "largest excess of a central interval's coverage", low=0.0, high=1.0)
    information: float = setting(0.1, "nats by which the held-out log-density must beat the prior", low=0.0)


def examine(examined: Examined, criteria: CalibrationCriteria) -> Part:
    """The part of the gate that asks whether probabilities are frequencies, and whether they know more than the prior."""
    figures = held_out_figures(examined, criteria.draws)
    told = {"pairs": figures.pairs, "draws": figures.draws, "information": asdict(figures.information),
            "coverage": {c.name: {k: getattr(c, k) for k in FIGURES} for c in figures.coverages}}
    return Part(tuple(decide(figures, criteria)), told, _arrays(figures))


def _arrays(figures: HeldOutFigures) -> dict[str, NDArray[Any]]:
    """Ranks and curves."""
    return {
        "names": np.array([c.name for c in figures.coverages]), "ranks": figures.ranks, "levels": LEVELS,
        **{key: np.stack([getattr(c, key) for c in figures.coverages]) for key in ("ecp", "central")},
        **{f"{key}_{end}": np.stack([getattr(c, f"{key}_band")[k] for c in figures.coverages])
           for key in ("ecp", "central") for k, end in ((0, "low"), (1, "high"))},
    }


def decide(figures: HeldOutFigures, criteria: CalibrationCriteria) -> list[Criterion]:
    """Every criterion's verdict, failed or not."""
    coverages = figures.coverages
    adjusted = holm([c.p_value for c in coverages])
    pairs = f"{figures.pairs} pairs" + (f" ({criteria.pairs} were asked for)" if figures.pairs < criteria.pairs else "")
    pairs += f", which tell max |ECP - alpha| from chance from {smallest_seen(figures.pairs, criteria.false_alarm / len(coverages)):.2f} on"
    return [
        enough("pairs", figures.pairs, criteria.least_pairs, pairs, "make a larger bank (simulate --n), or gate with a larger --n"),
        enough("draws", figures.draws, criteria.least_draws, f"{figures.draws} draws a pair", "set the gate's draws higher"),
        *(_uniform(c, p, criteria) for c, p in zip(coverages, adjusted, strict=True)),
        _interval("under-coverage", coverages, criteria.under_coverage, lambda c: (c.under, c.under_band[0]),
                  "the posterior is too narrow: more simulations, a smaller net, or earlier stopping (lower patience)"),
        _interval("over-coverage", coverages, criteria.over_coverage, lambda c: (c.over, c.over_band[0]),
                  "the posterior is too wide: train longer, or with a larger net"),
        _informative(figures, criteria),
    ]


def smallest_seen(pairs: int, level: float) -> float:
    """The max |ECP - alpha| from which the Kolmogorov-Smirnov test refuses at this level."""
    return float(special.kolmogi(level) / math.sqrt(pairs))


def _uniform(c: Coverage, p_value: float, criteria: CalibrationCriteria) -> Criterion:
    passed = p_value >= criteria.false_alarm or c.deviation <= criteria.deviation
    statement = (f"ranks uniform: max |ECP - alpha| {c.deviation:.3f} (95 % band {c.deviation_band[0]:.3f}-{c.deviation_band[1]:.3f}), "
                 f"Holm p = {p_value:.2g}; refused below {criteria.false_alarm:g} if over {criteria.deviation:g}"
                 f"{MAY_BE_CHANCE if passed and c.deviation > criteria.deviation else ''}")
    return Criterion(f"coverage {c.name}", passed, c.deviation, criteria.deviation, statement, "" if passed else _uniform_mend(c))


def _uniform_mend(c: Coverage) -> str:
    shift = float(c.ecp.mean() - 0.5)  # the truth ranks low where the posterior lies too high
    if c.name != "TARP" and abs(shift) > max(c.under, c.over) / 2:
        return f"biased {'high' if shift > 0 else 'low'} in {c.name.removeprefix('SBC ')}: train longer, or with a larger embedding"
    if c.under > c.over:
        return "too narrow: more simulations or a smaller net"
    return "too wide or misshapen: train longer, or with a larger net"


def _interval(
    name: str, coverages: tuple[Coverage, ...], limit: float, of: Callable[[Coverage], tuple[float, float]], mend: str
) -> Criterion:
    """The worst of the parameters' central intervals; the band's lower end decides, so that noise refuses nobody."""
    parameters = [c for c in coverages if c.name != "TARP"]
    worst = max(parameters, key=lambda c: of(c)[1])
    value, low = of(worst)
    passed = low <= limit
    statement = (f"worst in {worst.name.removeprefix('SBC ')}: {value:.3f} (at least {low:.3f}), limit {limit:g}"
                 f"{MAY_BE_CHANCE if passed and value > limit else ''}")
    return Criterion(name, passed, value, limit, statement, "" if passed else mend)


def _informative(figures: HeldOutFigures, criteria: CalibrationCriteria) -> Criterion:
    gain, error = figures.information.gain, figures.information.error
    passed = gain - 2 * error >= criteria.information
    statement = (f"held-out log-density beats the prior by {gain:.3f} +- {error:.3f} nats; less two errors, "
                 f"at least {criteria.information:g} is needed")
    blind = "the posterior hardly uses x: check the embedding, x_transform and the learning rate, or x may not inform theta"
    mend = blind if gain < 0.5 else "train longer, or with a larger net or bank"
    return Criterion("information", passed, gain, criteria.information, statement, "" if passed else mend)
