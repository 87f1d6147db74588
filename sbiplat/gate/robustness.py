"""Robustness: does a small change of the data, chosen to mislead, move the posterior out of proportion to what noise does?

A raw KL under attack is no criterion: an exact posterior moves too, the further the more its data tell. What is refused is an answer out of
proportion (`diagnostics.fragility`): beyond F times that of noise of the same size, of which no exact linear-Gaussian posterior has more.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from sbiplat.diagnostics.adversarial import AttackSettings
from sbiplat.diagnostics.examined import Examined
from sbiplat.diagnostics.fragility import HARMLESS, NOMINAL, Fragility, beside, fragility
from sbiplat.diagnostics.targets import target_of
from sbiplat.diagnostics.whitened import Whitening
from sbiplat.errors import SettingError, UserError
from sbiplat.gate.criterion import Criterion, Part
from sbiplat.observation import flat
from sbiplat.settings import setting

SIZES = (0.1, 0.3, 1.0)  # in units of `attack_eps`
ERRORS = 2.0  # standard errors by which a limit must be passed
PAIR_DRAWS = 1000
DEFEND = "train it again with a defence, such as defend = slab:0.05, or on more simulations with a smaller net"


@dataclass(frozen=True)
class RobustnessCriteria:
    """How hard the posterior is attacked, and the thresholds."""

    attacked: int = setting(100, "held-out observations that are attacked", low=10)
    attack_eps: float = setting(1.0, "largest attack: root mean square over features, in robust sds; a tenth and three tenths of it are "
                                "tried too", low=1e-6, high=1e6)
    attack_steps: int = setting(25, "gradient steps of an attack", low=1, high=100_000)
    attack_restarts: int = setting(2, "random starts of an attack", low=1, high=1000)
    attack_queries: int = setting(150, "steps of the gradient-free search", low=1, high=10**7)
    excess: float = setting(4.0, "worst KL over F times that of noise, F the number of features", low=1.0)
    attacked_coverage: float = setting(0.1, "largest shortfall of central intervals under attack, beyond what is in proportion", low=0.0,
                                       high=1.0)
    masking: float = setting(2.0, "KL that a search without gradients reaches, over that by gradients", low=1.0)


def examine(examined: Examined, criteria: RobustnessCriteria) -> Part:
    """The part of the gate that attacks."""
    settings = AttackSettings(steps=criteria.attack_steps, restarts=criteria.attack_restarts, queries=criteria.attack_queries)
    try:
        found, gradients = fragility(examined.first(criteria.attacked), [criteria.attack_eps * s for s in SIZES], settings)
    except (NotImplementedError, SettingError) as reason:  # no density, or nothing that may be perturbed
        return Part((), {"robustness": {"not_tested": str(reason) or "no density"}}, not_tested=("robustness",))
    return Part(tuple(decide(found, gradients, examined.posterior.prior.names, criteria)),
                {"robustness": {"norm": "l2", "unit": "robust sd of each feature over the bank, root mean square over features",
                                "observations": len(found[0].worst), "gradients": gradients, "eps": [told(f) for f in found]}},
                {**_arrays(found), **_pair(examined, found)}, () if gradients else ("attacks by gradient",))


def decide(found: Sequence[Fragility], gradients: bool, names: Sequence[str], criteria: RobustnessCriteria) -> list[Criterion]:
    """Every criterion's verdict, failed or not."""
    verdicts = [_excess(found, criteria), _coverage(found, names, criteria)]
    return [*verdicts, _masking(found, criteria)] if gradients else verdicts


def told(f: Fragility) -> dict[str, Any]:
    """Figures at one eps for the certificate. KL in nats, of the median observation and the tenth part on either side."""
    def spread(values: NDArray[np.float64]) -> list[float]:
        return [float(v) for v in np.quantile(values, [0.1, 0.5, 0.9])] if len(values) else []

    both = np.isfinite(f.search) & np.isfinite(f.gradient)
    return {"eps": f.eps, "worst_kl": spread(f.worst), "noise_kl": spread(f.noise), "ratio": f.ratio,
            "excess": math.exp(f.log_excess.mean()), "features": float(f.features.mean()),
            "search_kl": spread(f.search[np.isfinite(f.search)]), "gradient_kl_there": spread(f.gradient[both]), "vanished": f.vanished,
            "refused": 1 - float(np.isfinite(f.attacked[:, 0, 0]).sum()) / f.asked,
            "coverage": [{"nominal": alpha, "attacked": _mean(f.attacked[:, k]), "noise": _mean(f.noisy[:, k]),
                          "in_proportion": f.proportionate(alpha)} for k, alpha in enumerate(NOMINAL)]}


def _mean(covered: NDArray[np.float64]) -> list[float]:
    good = covered[np.isfinite(covered[:, 0])]
    return [float(v) for v in good.mean(0)] if len(good) else []


def _arrays(found: Sequence[Fragility]) -> dict[str, NDArray[Any]]:
    """By eps, then observation."""
    return {"attack_eps": np.array([f.eps for f in found]),
            **{f"attack_{name}": np.stack([getattr(f, name) for f in found]) for name in ("worst", "noise", "search", "delta")}}


def _pair(examined: Examined, found: Sequence[Fragility]) -> dict[str, NDArray[Any]]:
    """For the report, the held-out pair that moved most at the eps that decides: its x, x + delta and x raised by eps in every feature,
    (3, features of x), the truth, and draws of the posteriors at the first two, (2, n, D). Nothing where the sampler refuses x + delta."""
    k = max(range(len(found)), key=lambda k: _at_least(found[k]))
    pair, posterior = int(np.nan_to_num(found[k].worst, nan=-math.inf).argmax()), examined.posterior
    whitening = Whitening.fit(posterior.x, examined.training["x"], target_of(posterior).masks)
    shown = beside(whitening, {name: v[pair:pair + 1] for name, v in examined.pairs["x"].items()}, found[k].delta[pair], found[k].eps)
    seed = int(examined.stream(0xA77B).generate_state(1)[0] >> 1)
    try:
        z = posterior.unconstrained_sample({name: v[:2] for name, v in shown.items()}, PAIR_DRAWS, seed)
    except UserError:
        return {}
    return {"attack_pair": np.array([k, pair]), "attack_pair_x": flat(posterior.x, shown).astype(np.float32),
            "attack_pair_truth": posterior.prior.constrain(examined.truth[pair]).astype(np.float32),
            "attack_pair_draws": posterior.prior.constrain(z).astype(np.float32)}


def _at_least(f: Fragility) -> float:
    """log E, less two standard errors over observations."""
    return f.log_excess.mean() - ERRORS * f.log_excess.std() / math.sqrt(len(f.log_excess))


def _excess(found: Sequence[Fragility], criteria: RobustnessCriteria) -> Criterion:
    """At the eps where it is largest."""
    f = max(found, key=_at_least)
    passed = _at_least(f) <= math.log(criteria.excess)
    value = math.exp(f.log_excess.mean())
    statement = (f"at eps {f.eps:g} the worst change of x moves the posterior by {np.median(f.worst):.3g} nats, noise of that size by "
                 f"{np.median(f.noise):.3g} (medians); {f.features.mean():.0f} features in proportion account for 1, found is {value:.3g} "
                 f"(at least {math.exp(_at_least(f)):.3g}), limit {criteria.excess:g}")
    return Criterion("fragility", passed, value, criteria.excess, statement, "" if passed else f"fragile far from its data: {DEFEND}")


def _coverage(found: Sequence[Fragility], names: Sequence[str], criteria: RobustnessCriteria) -> Criterion:
    """The worst shortfall over eps, levels and parameters, less the error that chance makes over all of them."""
    worst: tuple[float, float, str] = (-math.inf, -math.inf, "")
    tests = len(found) * len(NOMINAL) * len(names)
    for f in found:
        for k, alpha in enumerate(NOMINAL):
            covered = f.attacked[:, k][np.isfinite(f.attacked[:, k, 0])]
            if not len(covered):
                continue
            wanted = f.proportionate(alpha)
            error = stats.norm.isf(0.01 / tests) * math.sqrt(max(wanted * (1 - wanted), 1e-3) / len(covered))
            share = covered.mean(0)
            j = int(share.argmin())
            where = (f"{names[j]} at eps {f.eps:g}: intervals of nominal {alpha:g} hold the truth in {share[j]:.2f} under attack, in "
                     f"{np.nanmean(f.noisy[:, k, j]):.2f} under noise; {wanted:.2f} is in proportion")
            worst = max(worst, (wanted - share[j] - error, wanted - share[j], where))
    low, value, where = worst
    if not where:
        return Criterion("coverage under attack", True, 0.0, criteria.attacked_coverage, "the sampler refuses all attacked data")
    passed, value = low <= criteria.attacked_coverage, round(value, 6)
    statement = f"worst in {where}; short by {value:.2f} (at least {low:.2f}), limit {criteria.attacked_coverage:g}"
    return Criterion("coverage under attack", passed, value, criteria.attacked_coverage, statement, "" if passed else DEFEND)


def _masking(found: Sequence[Fragility], criteria: RobustnessCriteria) -> Criterion:
    """Whether a search without gradients finds more than the gradient does, at any eps."""
    def low(f: Fragility) -> float:
        return f.masking.mean() - ERRORS * f.masking.std() / math.sqrt(len(f.masking))

    f = max(found, key=low)
    value, passed = math.exp(f.masking.mean()), low(f) <= math.log(criteria.masking)
    statement = (f"at eps {f.eps:g} a search without gradients reaches {value:.2f} times the KL that gradients do, each with {HARMLESS:g} "
                 f"nat (limit {criteria.masking:g}); {f.vanished:.0%} of gradient steps had none")
    return Criterion("gradient masking", passed, value, criteria.masking, statement, "" if passed else
                     "gradients with respect to x vanish or mislead, so the figures understate the worst: look for rounding, clipping or "
                     "saturation between x and the context")
