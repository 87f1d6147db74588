"""The criteria: what a posterior must hold to be certified, each with its threshold, its figure and its mend.

Coverage is refused only where a departure is both significant (Holm-corrected over all ranks) and large enough to
matter: more pairs sharpen the test without making it refuse what is good enough. Under- and over-coverage have limits of
their own, since a posterior that is too narrow misleads and one that is too wide only wastes. Robustness and
misspecification have their place in every certificate; until they are measured they are named there as not tested.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from scipy import special

from sbiplat.diagnostics.coverage import Coverage, holm
from sbiplat.diagnostics.held_out import HeldOutFigures
from sbiplat.settings import setting

NOT_TESTED = ("robustness", "misspecification")


@dataclass(frozen=True)
class Criteria:
    """How much is tested, and the thresholds."""

    pairs: int = setting(1000, "held-out pairs", low=1)
    draws: int = setting(1000, "draws a pair", low=1)
    least_pairs: int = setting(200, "fewer pairs than this certify nothing", low=1)
    least_draws: int = setting(500, "fewer draws than this certify nothing", low=1)
    false_alarm: float = setting(0.01, "chance that a calibrated posterior is refused for uniformity", low=1e-6, high=0.5)
    deviation: float = setting(0.03, "max |ECP - alpha| up to which a significant departure is let pass", low=0.0, high=1.0)
    under_coverage: float = setting(0.06, "largest shortfall of a central interval's coverage", low=0.0, high=1.0)
    over_coverage: float = setting(0.10, "largest excess of a central interval's coverage", low=0.0, high=1.0)
    information: float = setting(0.1, "nats by which the held-out log-density must beat the prior", low=0.0)


@dataclass(frozen=True)
class Criterion:
    """One criterion's verdict: the figure, what it was held against, and what usually mends it."""

    name: str
    passed: bool
    figure: float
    threshold: float
    statement: str
    mend: str = ""


def decide(figures: HeldOutFigures, criteria: Criteria) -> list[Criterion]:
    """Every criterion's verdict, failed or not."""
    coverages = figures.coverages
    adjusted = holm([c.p_value for c in coverages])
    pairs = f"{figures.pairs} pairs" + (f" ({criteria.pairs} were asked for)" if figures.pairs < criteria.pairs else "")
    pairs += f", which tell max |ECP - alpha| from chance from {smallest_seen(figures.pairs, criteria.false_alarm / len(coverages)):.2f} on"
    return [
        _enough("pairs", figures.pairs, criteria.least_pairs, pairs, "make a larger bank (simulate --n), or gate with a larger --n"),
        _enough("draws", figures.draws, criteria.least_draws, f"{figures.draws} draws a pair", "set the gate's draws higher"),
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


def _enough(name: str, have: int, least: int, what: str, mend: str) -> Criterion:
    return Criterion(name, have >= least, have, least, f"{what}, at least {least} are needed", "" if have >= least else mend)


def _uniform(c: Coverage, p_value: float, criteria: Criteria) -> Criterion:
    passed = p_value >= criteria.false_alarm or c.deviation <= criteria.deviation
    statement = (f"ranks uniform: max |ECP - alpha| {c.deviation:.3f} (95 % band {c.deviation_band[0]:.3f}-{c.deviation_band[1]:.3f}), "
                 f"Holm p = {p_value:.2g}; refused below {criteria.false_alarm:g} if over {criteria.deviation:g}")
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
    statement = f"worst in {worst.name.removeprefix('SBC ')}: {value:.3f} (at least {low:.3f}), limit {limit:g}"
    return Criterion(name, passed, value, limit, statement, "" if passed else mend)


def _informative(figures: HeldOutFigures, criteria: Criteria) -> Criterion:
    gain, error = figures.information.gain, figures.information.error
    passed = gain - 2 * error >= criteria.information
    statement = (f"held-out log-density beats the prior by {gain:.3f} +- {error:.3f} nats; less two errors, "
                 f"at least {criteria.information:g} is needed")
    blind = "the posterior hardly uses x: check the embedding, x_transform and the learning rate, or x may not inform theta"
    mend = blind if gain < 0.5 else "train longer, or with a larger net or bank"
    return Criterion("information", passed, gain, criteria.information, statement, "" if passed else mend)
