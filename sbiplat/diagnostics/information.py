r"""Information: does the posterior know more than the prior, and more than the bank's nearest rows?

.. math:: G = \frac{1}{P} \sum_{(\theta^*, x)} \big[ \log q(\theta^* | x) - \log p(\theta^*) \big]

over held-out pairs estimates a lower bound on the mutual information of theta and x, which it reaches for the exact
posterior (Barber & Agakov, 2003). The prior itself has G = 0, and coverage alone cannot tell it from the posterior.

Without a density, and against draws that have none, the energy score serves (Gneiting & Raftery, 2007). The posterior alone minimises it,

.. math:: E(q) = \frac{1}{P} \sum_{(\theta^*, x)} \big[ \mathbb E_q |\theta - \theta^*| - \tfrac12 \mathbb E_q |\theta - \theta'| \big],

in units of the residuals of a regression of z on x. The nearest-neighbour query, rejection ABC with regression adjustment over the
estimates of that regression, is what the bank says without any net.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from sbiplat.posteriors.nearest import adjusted

Array = NDArray[np.float64]
PRIOR_ROWS = 500
LEAST_KEPT, KEPT_SHARE = 100, 0.01
MOST_QUERIES = 500


@dataclass(frozen=True)
class Information:
    """gain: G in nats, with its standard error; both None where there is no density.

    energy_gain: 1 - E(q) / E(prior), and its error. nearest_gain: 1 - E(q) / E(nearest rows), negative where those are the better
    posterior, and its error. Of each z: contraction, 1 - (posterior sd / prior sd)^2, averaged over pairs; that of the nearest rows; and
    moved, the variance over pairs of the posterior's mean, in units of the prior's. context_moves: whether the embedding's context
    differs between observations; None where there is none.
    """

    gain: float | None
    error: float | None
    energy_gain: float
    energy_error: float
    nearest_gain: float
    nearest_error: float
    contraction: tuple[float, ...]
    nearest_contraction: tuple[float, ...]
    moved: tuple[float, ...]
    context_moves: bool | None = None


def energy_scores(draws: Array, truth: Array) -> Array:
    """Of independent draws (P, L, D) at truths (P, D): (P,). Draws are paired with those L / 2 away, so that the cost is linear."""
    off = np.linalg.norm(draws - truth[:, None], axis=-1).mean(1)
    half = draws.shape[1] // 2
    return off - 0.5 * np.linalg.norm(draws[:, :half] - draws[:, half:2 * half], axis=-1).mean(1)


def prior_energy_scores(rows: Array, truth: Array, chunk: int = 100) -> Array:
    """Of the prior, known by rows of the bank (N, D), at truths (P, D): (P,)."""
    rows = rows[:PRIOR_ROWS]
    own = np.linalg.norm(rows[:, None] - rows, axis=-1).sum() / (len(rows) * (len(rows) - 1))
    parts = [np.linalg.norm(truth[a:a + chunk, None] - rows, axis=-1).mean(1) for a in range(0, len(truth), chunk)]
    return np.concatenate(parts) - 0.5 * own


def nearest_figures(summaries: Array, z: Array, here: Array, truth: Array, scale: Array) -> tuple[Array, Array]:
    """Energy scores (P,) and variances of z (P, D) of the nearest-neighbour query: rows' summaries (N, S) and z (N, D), observations'
    summaries (P, S), truths (P, D), and the units of the energy score (D,)."""
    keep = min(len(z), max(LEAST_KEPT, round(KEPT_SHARE * len(z))))
    units = np.maximum(summaries.std(0), 1e-9)
    summaries, here = summaries / units, here / units
    scores, variances = np.empty(len(here)), np.empty_like(truth)
    square = np.square(summaries).sum(1)
    for k, target in enumerate(here):
        distance = square - 2 * summaries @ target
        best = np.argpartition(distance, keep - 1)[:keep]
        gap = summaries[best] - target
        size = np.linalg.norm(gap, axis=1)
        moved, weights = adjusted(z[best], gap, size, size.max())
        mean = weights @ moved
        variances[k] = weights @ np.square(moved - mean)
        moved = moved / scale
        square_moved = np.square(moved).sum(1)
        between = np.sqrt(np.maximum(square_moved[:, None] + square_moved - 2 * moved @ moved.T, 0))
        own = weights @ between @ weights / max(1 - np.square(weights).sum(), 1e-9)
        scores[k] = weights @ np.linalg.norm(moved - truth[k] / scale, axis=1) - 0.5 * own
    return scores, variances


def information(
    log_q: Array | None, log_prior: Array, energy: Array, prior_energy: Array, nearest_energy: Array, variances: Array, means: Array,
    nearest_variances: Array, prior_sd: Array, context_moves: bool | None = None,
) -> Information:
    """log_q and log_prior at the true z of each pair, (P,); energy scores (P,), of nearest rows for the first pairs; variances and means of
    q, (P, D); prior_sd (D,)."""
    gain = error = None
    if log_q is not None:
        gains = np.clip(log_q - log_prior, -1e6, None)
        gain, error = float(gains.mean()), float(gains.std() / np.sqrt(len(gains)))
    square = np.square(prior_sd)
    return Information(
        gain, error, *_better(energy, prior_energy),
        *_better(energy[:len(nearest_energy)], nearest_energy), _row(1 - variances.mean(0) / square),
        _row(1 - nearest_variances.mean(0) / square), _row(means.var(0) / square), context_moves,
    )


def _row(values: Array) -> tuple[float, ...]:
    return tuple(float(v) for v in values)


def _better(mine: Array, theirs: Array) -> tuple[float, float]:
    """1 - mean(mine) / mean(theirs) over the same pairs, and its standard error."""
    ratio = mine.mean() / theirs.mean()
    return float(1 - ratio), float((mine - ratio * theirs).std() / np.sqrt(len(mine)) / abs(theirs.mean()))
