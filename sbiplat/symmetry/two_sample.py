"""Whether two sets of simulations have one law: a permutation test, exact whatever the law of x.

Within a point all x are exchangeable under the null, so the p-value of the largest of several standardised statistics is exact. The
statistics: means and spreads of normal scores, a number of x at a time, by point and over all points; the energy distance; and the
difference of means along the median itself and its slope, which is where a slightly wrong scale or shift shows.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray
from scipy import special, stats

from sbiplat.errors import SymmetryError

PERMUTATIONS = 1999
FEWEST = 8  # simulations of a kind at a point
NUMBERS = 2048  # of x that the test looks at, at most


def two_sample(a: NDArray[np.float64], b: NDArray[np.float64], seed: int) -> tuple[float, float, float]:
    """The p-value of the permutation test, the shift of the means and the factor between the sds; a and b (points, n, numbers)."""
    rng = np.random.default_rng([seed, 2])
    if a.shape[-1] > NUMBERS:
        some = np.sort(rng.choice(a.shape[-1], NUMBERS, replace=False))
        a, b = a[..., some], b[..., some]
    whole = np.isfinite(a).all(-1) & np.isfinite(b).all(-1)
    totals, shifts, ratios = [], [], []
    pooled = 0.0
    for ours, theirs, good in zip(a, b, whole, strict=True):
        ours, theirs = ours[good], theirs[good]
        n = len(ours)
        if n < FEWEST:
            continue
        together = np.concatenate([ours, theirs])
        signs = np.repeat([1.0, -1.0], n)
        labels = np.stack([signs, *(rng.permutation(signs) for _ in range(PERMUTATIONS))]).astype(np.float32)
        kept, sums = _statistics(together, labels)
        totals.append(kept)
        pooled = pooled + sums
        variances = ours.var(0, ddof=1), theirs.var(0, ddof=1)
        noise = (variances[0] + variances[1]) / 2
        alive = noise > 0
        shifts.append(np.mean(np.square(ours.mean(0) - theirs.mean(0))[alive] / noise[alive]) - 2 / n)
        both = (variances[0] > 0) & (variances[1] > 0)
        if both.any():  # less what chance gives of Gaussian noise
            ratios.append((np.mean(np.log(variances[0][both] / variances[1][both])) / 2) ** 2 - 1 / ((n - 1) * both.sum()))
    if not totals:
        raise SymmetryError(f"too few finite simulations to compare: at no point {FEWEST} pairs; mend the simulator, or narrow its prior")
    statistics = np.concatenate([np.sum(totals, axis=0), np.square(pooled).sum(-1).T], axis=0)
    spread = statistics.std(1, keepdims=True)
    standard = (statistics - statistics.mean(1, keepdims=True)) / np.where(spread > 0, spread, 1)
    largest = standard.max(0)
    p_value = float(np.mean(largest >= largest[0] - 1e-9))
    return p_value, float(np.sqrt(max(np.mean(shifts), 0.0))), float(np.exp(np.sqrt(max(np.mean(ratios), 0.0)))) if ratios else 1.0


def _statistics(x: NDArray[np.float64], labels: NDArray[np.float32]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Of one point, x (2n, numbers), for each of the labels (P, 2n): statistics (S, P), and sums (P, 2, numbers) to pool over points."""
    count = len(x)
    ranks = stats.rankdata(x, axis=0)
    scores = special.ndtri((ranks - 0.5) / count)
    scores -= scores.mean(0)
    squares = np.square(scores)
    squares -= squares.mean(0)
    size = np.sqrt(np.mean(np.square(squares), axis=0))
    features = np.stack([scores, squares / np.where(size > 0, size, 1)]).astype(np.float32)  # (2, 2n, numbers)
    sums = np.stack([labels @ f for f in features], 1) / math.sqrt(count)
    low, middle, high = np.quantile(x, (0.25, 0.5, 0.75), axis=0)
    width = np.where(high > low, (high - low) / 1.35, x.std(0))  # an sd that heavy tails leave alone
    width = np.where(width > 0, width, 1.0)
    z = np.clip((x - middle) / width, -4, 4)
    distance = np.sqrt(np.maximum(np.square(z).sum(-1)[:, None] + np.square(z).sum(-1)[None] - 2 * z @ z.T, 0)).astype(np.float32)
    energy = -np.einsum("pi,pi->p", labels @ distance, labels) / count
    along = [middle / width, np.gradient(middle) / width] if x.shape[1] > 1 else [middle / width]
    directions = np.stack([d / (np.linalg.norm(d) or 1.0) for d in along])
    projected = np.square(labels @ (z @ directions.T).astype(np.float32)) / count
    return np.stack([*np.square(sums).sum(-1).T, np.square(sums).max((1, 2)), energy, *projected.T]), sums
