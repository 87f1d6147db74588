"""Calibration and information on held-out pairs: what a posterior must hold, each with its threshold, its figure and its mend.

Coverage is refused only where a departure is both significant (Holm-corrected over all tests of coverage) and large enough to
matter: more pairs sharpen the tests without making them refuse what is good enough. Under- and over-coverage have limits of
their own, since a posterior that is too narrow misleads and one that is too wide only wastes.

Sequential: with `looks` above 1 the same tests are made at several numbers of pairs, and the gate ends where the verdict is clear. The
chance of a false alarm is spent in proportion to the pairs (a linear spending function; Lan & DeMets, 1983), and the looks' shares add up
to it, so the level is kept whatever depends on what. Refused early: refused at that look's level. Passed early: all pass, and no band of
a departure reaches its limit.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import special

from sbiplat.diagnostics.coverage import LEVELS, Coverage, holm
from sbiplat.diagnostics.examined import Examined
from sbiplat.diagnostics.held_out import HeldOut, HeldOutFigures
from sbiplat.diagnostics.information import Information
from sbiplat.gate.criterion import Criterion, Part, enough
from sbiplat.settings import setting

MAY_BE_CHANCE = "; passed though over the limit, since that may be chance with so few pairs"
FIGURES = ("kind", "p_value", "folded_p_value", "deviation", "deviation_band", "under", "under_band", "over", "over_band")
BLIND = "the posterior hardly uses x: check the embedding, x_transform and the learning rate, or x may not inform theta"
SAME = 0.01  # of the prior's variance: a posterior mean that moves less between observations is the same for all
UNLEARNT, KNOWN = 0.05, 0.2  # contraction of a parameter by the posterior, and by the bank's nearest rows


@dataclass(frozen=True)
class CalibrationCriteria:
    """How much is tested of calibration and information, and the thresholds."""

    pairs: int = setting(1000, "held-out pairs", low=1)
    draws: int = setting(1000, "draws a pair", low=2)
    least_pairs: int = setting(200, "fewer pairs than this certify nothing", low=1)
    least_draws: int = setting(500, "fewer draws than this certify nothing", low=1)
    reference_points: int = setting(4, "reference points of TARP a pair", low=1, high=64)
    density_draws: int = setting(100, "draws a pair at which the density is evaluated, for HPD coverage; 0: none", low=0, high=100)
    looks: int = setting(1, "numbers of pairs at which the gate may end, the last being all; 1: only all", low=1, high=20)
    false_alarm: float = setting(0.01, "chance that a calibrated posterior is refused by any test of coverage", low=1e-6, high=0.5)
    deviation: float = setting(0.03, "max |ECP - alpha| up to which a significant departure is let pass", low=0.0, high=1.0)
    under_coverage: float = setting(0.05, "largest shortfall of a central region's coverage", low=0.0, high=1.0)
    over_coverage: float = setting(0.075, "largest excess of a central region's coverage", low=0.0, high=1.0)
    tails: float = setting(0.01, "largest share of truths outside of all draws, beyond chance", low=0.0, high=1.0)
    local: float = setting(0.1, "largest departure in a tenth of x of mean u or mean |2u - 1| from 1/2", low=0.0, high=1.0)
    regions: float = setting(0.05, "largest gap between probability and frequency of a tenth of the prior", low=0.0, high=1.0)
    c2st: float = setting(0.55, "largest area under a classifier's ROC curve, truths against draws", low=0.5, high=1.0)
    information: float = setting(0.1, "nats by which the held-out log-density must beat the prior", low=0.0)
    energy: float = setting(0.02, "share by which the energy score must beat the prior's, where there is no density", low=0.0, high=1.0)
    chains: float = setting(0.02, "largest share of pairs whose chains disagree or have not converged (nle, nre, gnpe)", low=0.0, high=1.0)
    nearest: float = setting(0.05, "share by which the energy score may be worse than that of the bank's nearest rows", low=0.0, high=1.0)


def examine(examined: Examined, criteria: CalibrationCriteria) -> Part:
    """The part of the gate that asks whether probabilities are frequencies, and whether they know more than the prior."""
    measured = HeldOut(examined, criteria.draws, references=criteria.reference_points, density_draws=criteria.density_draws)
    pairs = len(measured.truth)
    if criteria.draws < criteria.least_draws:
        examined.progress.say(f"draws = {criteria.draws} are fewer than least_draws = {criteria.least_draws}: this gate can only refuse")
    level, figures, verdicts = 0.0, None, []
    with examined.progress.task("gate", pairs) as advance:
        for look in looks(pairs, criteria):
            level = criteria.false_alarm * (min(look, pairs) - (figures.pairs if figures else 0)) / pairs
            figures = measured.until(look, advance).figures(resolution=resolution(measured, level))
            verdicts = decide(figures, criteria, level, pairs)
            if clear(figures, verdicts, criteria):
                break
    assert figures is not None
    local, regions = figures.by_x, figures.by_theta
    told = {
        "pairs": figures.pairs, "draws": figures.draws, "information": asdict(figures.information),
        "coverage": {c.name: {k: getattr(c, k) for k in FIGURES} | {"outside": asdict(c.outside) if c.outside else None}
                     for c in figures.coverages},
        "local_coverage": {k: getattr(local, k) for k in ("p_value", "departure", "name", "axis", "tenth", "kind")},
        "regions": {k: getattr(regions, k) for k in ("p_value", "departure", "name", "tenth")},
        "c2st": asdict(figures.joint), "density_draws": figures.density_draws, "refused_pairs": figures.refused,
        **({"gibbs": dict(figures.gibbs)} if figures.gibbs is not None else {}),
        "level": level, "pairs_at_most": pairs,
    }
    untested = ("coverage of regions of highest density",) if not figures.density_draws else ()
    return Part(tuple(verdicts), told, _arrays(figures), untested)


def looks(pairs: int, criteria: CalibrationCriteria) -> list[int]:
    """The numbers of pairs to look at, evenly spaced, from what certifies anything on."""
    spaced = [math.ceil(pairs * k / criteria.looks) for k in range(1, criteria.looks + 1)]
    return [n for n in spaced if n == pairs or n >= criteria.least_pairs]


def resolution(measured: HeldOut, level: float) -> int:
    """Monte Carlo draws that can reach Holm's strictest level, twice over."""
    tests = 6 + 3 * (measured.truth.shape[1] + len(measured.functions))
    return max(1000, math.ceil(2 * tests / level))


def _arrays(figures: HeldOutFigures) -> dict[str, NDArray[Any]]:
    """Ranks, curves and heat maps."""
    local, regions = figures.by_x, figures.by_theta
    return {
        "names": np.array([c.name for c in figures.coverages]), "ranks": figures.ranks, "levels": LEVELS,
        **{key: np.stack([getattr(c, key) for c in figures.coverages]) for key in ("ecp", "central")},
        **{f"{key}_{end}": np.stack([getattr(c, f"{key}_band")[k] for c in figures.coverages])
           for key in ("ecp", "central") for k, end in ((0, "low"), (1, "high"))},
        "local_names": np.array([c.name for c in figures.coverages if c.kind != "TARP"]), "local_axes": np.array(local.axes),
        "local_edges": local.edges, "local_bias": local.bias, "local_spread": local.spread,
        "regions_found": regions.found, "regions_stated": regions.stated,
    }


@dataclass(frozen=True)
class _Verdict:
    """A test of coverage: whose figure, its size with its band, the limit on it, and Holm's p-value."""

    of: Coverage
    size: float
    band: tuple[float, float]
    limit: float
    p_value: float

    def fails(self, level: float) -> bool:
        return self.p_value < level and self.size > self.limit


def joint_factor(dim: int) -> float:
    r"""How much more a small factor on the sd of every one of D parameters shows in a joint test than in that of one parameter.

    The coverage of regions of highest density moves by :math:`t f_D(t)` a unit of log-variance, f_D the density of chi^2 with D degrees, at
    most :math:`D f_D(D)`; it grows as sqrt(D). The limits on joint figures are those of one parameter times this, so that what is good
    enough in each parameter is good enough in all.
    """
    def most(d: int) -> float:
        return math.exp(0.5 * d * math.log(0.5 * d) - 0.5 * d - math.lgamma(0.5 * d))

    return most(dim) / most(1)


def decide(figures: HeldOutFigures, criteria: CalibrationCriteria, level: float | None = None, pairs: int | None = None) -> list[Criterion]:
    """Every criterion's verdict, failed or not. level: of all tests of coverage together. pairs: how many there are to look at."""
    level = criteria.false_alarm if level is None else level
    wide = joint_factor(len(_parameters(figures)))
    p_values = _Adjusted.of(figures)
    told = f"{figures.pairs} pairs" + (f" ({criteria.pairs} were asked for)" if (pairs or figures.pairs) < criteria.pairs else "")
    if pairs is not None and figures.pairs < pairs:
        told += f" of {pairs}, the verdict being clear"
    told += f", which tell max |ECP - alpha| from chance from {smallest_seen(figures.pairs, level / len(figures.coverages)):.2f} on"
    dispersion = [(c, p) for c, p in zip(figures.coverages, p_values.dispersion, strict=True) if p is not None]
    under = [_Verdict(c, c.under, c.under_band, _limit(c, criteria.under_coverage, wide), p) for c, p in dispersion]
    over = [_Verdict(c, c.over, c.over_band, _limit(c, criteria.over_coverage, wide), p) for c, p in dispersion]
    tails = [_Verdict(c, c.outside.share - c.outside.chance, (c.outside.band[0] - c.outside.chance, c.outside.band[1] - c.outside.chance),
                      criteria.tails, p)
             for c, p in zip(figures.coverages, p_values.tails, strict=True) if c.outside is not None and p is not None]
    return [
        enough("pairs", figures.pairs, criteria.least_pairs, told, "make a larger bank (simulate --n), or gate with a larger --n"),
        enough("draws", figures.draws, criteria.least_draws, f"{figures.draws} draws a pair", "set the gate's draws higher"),
        _usable(figures), *([] if figures.refused is None else [_chains(figures.refused, criteria)]),
        *(_uniform(_Verdict(c, c.deviation, c.deviation_band, deviation_limit(c, criteria, wide), p), level)
          for c, p in zip(figures.coverages, p_values.uniform, strict=True)),
        _worst("under-coverage", under, level,
               "the posterior is too narrow: more simulations, a smaller net, or earlier stopping (lower patience)"),
        _worst("over-coverage", over, level, "the posterior is too wide: train longer, or with a larger net"),
        _worst("tails", tails, level,
               "truths lie outside of all draws: the posterior's tails are cut; a flow with more layers, or more simulations"),
        _local(figures, p_values.local, criteria, level), _regions(figures, p_values.regions, criteria, level),
        _joint(figures, p_values.joint, 0.5 + wide * (criteria.c2st - 0.5), level),
        _informative(figures.information, criteria), _better_than_nearest(figures, criteria),
    ]


@dataclass(frozen=True)
class _Adjusted:
    """Holm's p-values of all tests of coverage, one family; of each rank set those of uniformity, dispersion and tails, None where there is
    no such test. HPD's uniformity is that of its dispersion."""

    uniform: tuple[float, ...]
    dispersion: tuple[float | None, ...]
    tails: tuple[float | None, ...]
    local: float
    regions: float
    joint: float

    @classmethod
    def of(cls, figures: HeldOutFigures) -> _Adjusted:
        coverages = figures.coverages
        raw = [*(c.p_value for c in coverages), *(c.folded_p_value for c in coverages),
               *(c.outside.p_value if c.outside else None for c in coverages),
               figures.by_x.p_value, figures.by_theta.p_value, figures.joint.p_value]
        tested = iter(holm([p for p in raw if p is not None]))
        adjusted = [None if p is None else next(tested) for p in raw]
        count = len(coverages)
        uniform = tuple(p for p in adjusted[:count] if p is not None)
        folded = tuple(u if c.kind == "HPD" else f for c, u, f in zip(coverages, uniform, adjusted[count:2 * count], strict=True))
        local, regions, joint = (p for p in adjusted[3 * count:] if p is not None)
        return cls(uniform, folded, tuple(adjusted[2 * count:3 * count]), local, regions, joint)


def deviation_limit(c: Coverage, criteria: CalibrationCriteria, wide: float) -> float:
    """The limit on max |ECP - alpha|: of joint tests `joint_factor` times it, and twice that of HPD, whose ranks are folded already."""
    return min(1.0, _limit(c, criteria.deviation, wide) * (2 if c.kind == "HPD" else 1))


def _limit(c: Coverage, limit: float, wide: float) -> float:
    return min(1.0, limit * (wide if c.kind in ("TARP", "HPD") else 1))


def clear(figures: HeldOutFigures, verdicts: list[Criterion], criteria: CalibrationCriteria) -> bool:
    """Whether more pairs are not needed: refused, or passed with every band within its limit."""
    if not all(v.passed for v in verdicts):
        return True
    wide = joint_factor(len(_parameters(figures)))
    sized = [c for c in figures.coverages if c.kind != "TARP"]
    return (
        all(c.deviation_band[1] <= deviation_limit(c, criteria, wide) for c in figures.coverages)
        and all(c.under_band[1] <= _limit(c, criteria.under_coverage, wide) for c in sized)
        and all(c.over_band[1] <= _limit(c, criteria.over_coverage, wide) for c in sized)
        and all(c.outside.band[1] - c.outside.chance <= criteria.tails for c in sized if c.outside)
        and figures.joint.area + 2 * figures.joint.error <= 0.5 + wide * (criteria.c2st - 0.5)
        and figures.by_x.departure <= criteria.local and figures.by_theta.departure <= criteria.regions
    )


def smallest_seen(pairs: int, level: float) -> float:
    """The max |ECP - alpha| from which the Kolmogorov-Smirnov test refuses at this level."""
    return float(special.kolmogi(level) / math.sqrt(pairs))


def _rule(p_value: float, level: float, size: float, limit: float) -> str:
    told = f"Holm p = {p_value:.2g}; refused below {level:g} if over {limit:.3g}"
    if p_value < level and size <= limit:
        return f"{told}; passed though no chance, since it is small"
    return told + (MAY_BE_CHANCE if p_value >= level and size > limit else "")


def _usable(figures: HeldOutFigures) -> Criterion:
    passed = figures.unusable == 0
    statement = f"{figures.unusable:.2%} of the pairs have draws or a log-density that are not finite; none may"
    return Criterion("finite", passed, figures.unusable, 0.0, statement, "" if passed else "train again, with a lower learning rate")


def _chains(refused: float, criteria: CalibrationCriteria) -> Criterion:
    passed = refused <= criteria.chains
    statement = (f"in {refused:.1%} of the pairs chains disagree or have not converged, or the evidence is uncertain; limit "
                 f"{criteria.chains:.0%}")
    return Criterion("chains", passed, refused, criteria.chains, statement, "" if passed else
                     "train longer; nle and nre with more chains or moves (--set chains=..., --set moves=... of train), gnpe with a wider "
                     "kernel or more steps (--set kernel_ratio=..., --set gibbs_steps=...)")


def _uniform(v: _Verdict, level: float) -> Criterion:
    passed = not v.fails(level)
    statement = (f"uniformity of ranks: max |ECP - alpha| {v.size:.3f} (95 % band {v.band[0]:.3f}-{v.band[1]:.3f}), "
                 f"{_rule(v.p_value, level, v.size, v.limit)}")
    return Criterion(f"coverage {v.of.name}", passed, v.size, v.limit, statement, "" if passed else _uniform_mend(v.of))


def _uniform_mend(c: Coverage) -> str:
    shift = float(c.ecp.mean() - 0.5)  # the truth ranks low where the posterior lies too high
    if c.kind in ("SBC", "function") and abs(shift) > max(c.under, c.over) / 2:
        name = c.name.removeprefix("SBC ").removeprefix("function ")
        return f"biased {'high' if shift > 0 else 'low'} in {name}: train longer, or with a larger embedding"
    if c.under > c.over:
        return "too narrow: more simulations or a smaller net"
    return "too wide or misshapen: train longer, or with a larger net"


def _worst(name: str, verdicts: list[_Verdict], level: float, mend: str) -> Criterion:
    """The worst of several rank sets, relative to its limit: of those that fail, else of all."""
    failing = [v for v in verdicts if v.fails(level)]
    worst = max(failing or verdicts, key=lambda v: v.size / max(v.limit, 1e-9))
    statement = (f"worst in {worst.of.name.removeprefix('SBC ')}: {worst.size:.3f} (95 % band {worst.band[0]:.3f} to {worst.band[1]:.3f}), "
                 f"{_rule(worst.p_value, level, worst.size, worst.limit)}")
    return Criterion(name, not failing, worst.size, worst.limit, statement, mend if failing else "")


def _local(figures: HeldOutFigures, p_value: float, criteria: CalibrationCriteria, level: float) -> Criterion:
    found = figures.by_x
    passed = p_value >= level or found.departure <= criteria.local
    where = f"{found.name.removeprefix('SBC ')} {found.kind} in the {_ordinal(found.tenth)} tenth of {found.axis}"
    statement = f"most of all {where}: {found.departure:.3f}, {_rule(p_value, level, found.departure, criteria.local)}"
    mend = f"{where}: more simulations there, or a larger net" if not passed else ""
    return Criterion("local coverage", passed, found.departure, criteria.local, statement, mend)


def _regions(figures: HeldOutFigures, p_value: float, criteria: CalibrationCriteria, level: float) -> Criterion:
    found = figures.by_theta
    passed = p_value >= level or found.departure <= criteria.regions
    where = f"the {_ordinal(found.tenth)} tenth of the prior of {found.name}"
    place = _parameters(figures).index(found.name), found.tenth
    stated, seen = found.stated[place], found.found[place]
    statement = (f"most of all {where}: the posteriors give it {stated:.3f}, {seen:.3f} of the truths lie there, "
                 f"{_rule(p_value, level, found.departure, criteria.regions)}")
    mend = f"the posterior gives {where} too {'little' if seen > stated else 'much'}: more simulations, or train longer"
    return Criterion("coverage by theta", passed, found.departure, criteria.regions, statement, "" if passed else mend)


def _parameters(figures: HeldOutFigures) -> list[str]:
    """The parameters, in order."""
    return [c.name.removeprefix("SBC ") for c in figures.coverages if c.kind == "SBC"]


def _joint(figures: HeldOutFigures, p_value: float, limit: float, level: float) -> Criterion:
    found = figures.joint
    passed = p_value >= level or found.area <= limit
    statement = (f"a classifier tells truths from draws, given x, with an area under the curve of {found.area:.3f} +- {found.error:.3f} "
                 f"(0.5: not at all), {_rule(p_value, level, found.area, limit)}")
    mend = "the joint shape is wrong, as of correlations or modes: a larger net, another flow, or more simulations"
    return Criterion("C2ST", passed, found.area, limit, statement, "" if passed else mend)


def _ordinal(tenth: int) -> str:
    return ("1st", "2nd", "3rd", *(f"{k}th" for k in range(4, 11)))[tenth]


def _informative(told: Information, criteria: CalibrationCriteria) -> Criterion:
    if told.gain is not None and told.error is not None:
        value, error, limit = told.gain, told.error, criteria.information
        statement = f"held-out log-density beats the prior by {value:.3f} +- {error:.3f} nats"
        little = value < 0.5
    else:
        value, error, limit = told.energy_gain, told.energy_error, criteria.energy
        statement = f"energy score, there being no density, beats the prior's by {value:.1%} +- {error:.1%}"
        little = value < 0.1
    passed = value - 2 * error >= limit
    statement += f"; less two errors, at least {limit:g} is needed"
    mend = "" if passed else _cause(told) or (BLIND if little else "train longer, or with a larger net or bank")
    return Criterion("information", passed, value, limit, statement, mend)


def _cause(told: Information) -> str:
    """Why the posterior says little, where that can be named."""
    if told.context_moves is False:
        return "the embedding has collapsed, its context is the same for every x: the posterior hardly uses x; lower the learning rate, " \
               "check x_transform, or take another embedding"
    if max(told.moved) < SAME:
        return "the data are ignored, the posterior is the same for every x (posterior = prior): " + BLIND
    return ""


def _better_than_nearest(figures: HeldOutFigures, criteria: CalibrationCriteria) -> Criterion:
    told = figures.information
    worse, error = -told.nearest_gain, told.nearest_error
    passed = worse - 3 * error <= criteria.nearest
    unlearnt = [n for n, mine, rows in zip(_parameters(figures), told.contraction, told.nearest_contraction, strict=True)
                if mine < UNLEARNT and rows > KNOWN]
    statement = (f"energy score {abs(worse):.1%} +- {error:.1%} {'worse' if worse > 0 else 'better'} than that of the bank's nearest rows; "
                 f"less three errors, at most {criteria.nearest:.0%} worse is let pass")
    if unlearnt:
        statement += f"; not learnt, though the nearest rows know: {', '.join(unlearnt)}"
    mend = "a query of the bank does better without a net (sp.nearest): train longer, or look at the embedding"
    return Criterion("nearest rows", passed, -worse, criteria.nearest, statement, "" if passed else _cause(told) or mend)

