"""The worst change of an observation that was found: drawn over it, with the posteriors at x and at x + delta over one another.

For a certified run it is a change of the user's observation. Where that posterior may not be shown, or no observation is given, it is one
of a held-out simulation, whose truth is known.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sbiplat.diagnostics.attack import attack, rows_of
from sbiplat.diagnostics.examined import tensors
from sbiplat.diagnostics.fragility import beside
from sbiplat.diagnostics.misspecification import inverse, transformed
from sbiplat.diagnostics.targets import target_of
from sbiplat.diagnostics.whitened import Whitening
from sbiplat.gate.certificate import Certificate
from sbiplat.gate.robustness import SIZES
from sbiplat.observation import Fields, fields_of, flat
from sbiplat.posteriors.base import Posterior
from sbiplat.report import figures, predictive
from sbiplat.report.tested import DAMAGED, Arrays, array
from sbiplat.runs import Run

Array = NDArray[np.float64]
SIZE = SIZES[1]  # of those at which the gate attacks: small, but large enough to be seen
NOISES, NOISE_NUMBERS = 200, 2**23
WORDS = figures.Words("x + δ", "x", "δ", "90 % of noise of that size", "50 %", "change, in sd of that noise", difference=True)


@dataclass(frozen=True)
class Change:
    """rows: x, x + delta and x raised by eps in every feature that may be moved, (3, F). here, there: draws of the posteriors at x and
    x + delta, (n, D). kl: between them, noise: of noise of that size, in nats. features: that may be moved. truth: (D,), where known."""

    rows: Array
    here: Array
    there: Array
    eps: float
    kl: float
    noise: float
    features: float
    truth: Array | None = None


def of_observation(run: Run, certificate: Certificate, posterior: Posterior, x: Fields, theta: Array, seed: int) -> Change:
    """The user's observation under the gate's own attack; theta: draws of its posterior. Raises UserError or NotImplementedError where
    there is no density, or the bank is not at hand."""
    held, batch = certificate.content["thresholds"], {name: values[None] for name, values in x.items()}
    eps, rows = SIZE * float(held["attack_eps"]), rows_of(run)
    settings = {"steps": held["attack_steps"], "restarts": held["attack_restarts"], "queries": held["attack_queries"]}
    target = target_of(posterior)
    found = attack(posterior, run.x.unwrap(x), eps=eps, rows=run.x.unwrap(rows), seed=seed, gradients=target.gradients, **settings)
    whitening = Whitening.fit(run.x, rows, target.masks)
    shown = beside(whitening, batch, found.delta[0], eps)
    there = posterior.unconstrained_sample({name: values[1:2] for name, values in shown.items()}, len(theta), seed)[0]
    return Change(flat(run.x, shown).astype(float), theta, posterior.prior.constrain(there), eps, float(found.kl[0]),
                  float(found.noise_kl[0]), float(whitening.free(tensors(batch)).sum()))


def of_pair(run: Run, arrays: Arrays, measured: Mapping[str, Any]) -> Change | None:
    """The held-out simulation that moved most; None where the gate kept none. Raises ValueError for damaged arrays."""
    if "attack_pair" not in arrays:
        return None
    k, pair = array(arrays, "attack_pair", 2).astype(int)
    eps, worst = array(arrays, "attack_eps", None), array(arrays, "attack_worst", None, None)
    noise, dim = array(arrays, "attack_noise", *worst.shape), run.prior.dim
    if not (0 <= k < len(eps) == len(worst) and 0 <= pair < worst.shape[1]):
        raise ValueError(DAMAGED)
    rows, truth = array(arrays, "attack_pair_x", 3, run.x.size), array(arrays, "attack_pair_truth", dim)
    draws = array(arrays, "attack_pair_draws", 2, None, dim)
    if not all(np.isfinite(values).all() for values in (rows, truth, draws)) or draws.shape[1] < 2:
        raise ValueError(DAMAGED)
    return Change(rows, *draws, float(eps[k]), float(worst[k, pair]), float(noise[k, pair]), float(measured["eps"][k]["features"]), truth)


def section(run: Run, change: Change, seed: int) -> dict[str, Any]:
    """The two figures, with what stands under them."""
    spec = run.x
    moved = {name: values[0] for name, values in fields_of(spec, change.rows[1:2]).items()}
    shown, notes = predictive.panels(spec, moved, fields_of(spec, noises(run, change, seed)), WORDS)
    marginals = figures.beside(change.here, change.there, run.prior.names, run.prior.units, run.prior.support,
                               ("posterior at x", "posterior at x + δ"), change.truth)
    return {"x": figures.image(figures.observed(shown, WORDS)), "marginals": figures.image(marginals), "notes": notes,
            "eps": change.eps, "kl": change.kl, "noise": max(change.noise, 0.0), "features": change.features,
            "most": change.features * max(change.noise, 0.0), "held_out": change.truth is not None,
            "left_out": max(0, run.prior.dim - figures.MOST_BESIDE)}


def noises(run: Run, change: Change, seed: int) -> Array:
    """x with Gaussian noise of size eps in each feature, (n, F), in pairs of opposite sign."""
    rng = np.random.default_rng(np.random.SeedSequence(seed, spawn_key=(0x9211,)))
    count = int(np.clip(NOISE_NUMBERS // run.x.size, 10, NOISES)) // 2
    half = rng.standard_normal((count, run.x.size))
    whitened = transformed(run.x, change.rows)
    return inverse(run.x, whitened[0] + np.concatenate([half, -half]) * (whitened[2] - whitened[0]))
