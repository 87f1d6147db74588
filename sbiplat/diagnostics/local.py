r"""Local coverage: where in x, and where in the prior, does calibration fail?

**By x.** If q is the posterior, ranks are uniform given x, so no function of x explains them. The ranks' shifted Legendre polynomials

.. math:: h_1(u) = \sqrt{12}\,(u - \tfrac12), \qquad h_2(u) = \sqrt5\,\big(6 (u - \tfrac12)^2 - \tfrac12\big)

are regressed on the tenths of each feature of x: the largest standardised mean over tenths, features and ranks is held against
permutations of whole rows of ranks among pairs. They keep the dependence between ranks and what is wrong everywhere, so only what
differs between places counts. :math:`h_1` sees a bias and :math:`h_2` a wrong width.

**By theta.** The rank given theta* is *not* uniform, even for the exact posterior: a truth in the prior's tail lies in its posterior's
tail. What holds is that the posteriors' probability of a region, averaged over pairs, is the frequency of truths in it,

.. math:: \sum_i 1\{\theta^*_i \in R\} \approx \sum_i q(R | x_i),

for each tenth R of the prior of each parameter. The null is exact: the truth changes places with one of its draws, at random.

Both p-values are Monte Carlo and stop early where the answer is clear (Besag & Clifford, 1991).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
TENTHS = 10
MOST_AXES = 16
EXCEEDANCES, MOST_NULLS, NULLS_AT_ONCE = 10, 20_000, 100


@dataclass(frozen=True)
class LocalByX:
    """p_value; the worst place: its rank set, axis and tenth (0-9) with |mean u - 1/2| (bias) and mean |2u - 1| - 1/2 (spread) there;
    departure: the larger of their sizes. For heat maps, (axes, tenths, rank sets): bias and spread; edges (axes, tenths + 1)."""

    p_value: float
    departure: float
    name: str
    axis: str
    tenth: int
    kind: str
    bias: Array
    spread: Array
    axes: tuple[str, ...]
    edges: Array


@dataclass(frozen=True)
class LocalByTheta:
    """p_value; departure: the largest |found - stated| share of truths over tenths of the prior, in the parameter `name`, tenth `tenth`.
    found, stated: shares of truths and mean probabilities, (D, tenths)."""

    p_value: float
    departure: float
    name: str
    tenth: int
    found: Array
    stated: Array


def sequential_p_value(observed: float, null: Callable[[int], Array], most: int = MOST_NULLS) -> float:
    """Monte Carlo p-value of a statistic; null(n) gives n of it under the hypothesis. Ends at ten that are as large: p = 10 / drawn."""
    drawn, reached = 0, 0
    while drawn < most:
        larger = np.flatnonzero(null(min(NULLS_AT_ONCE, most - drawn)) >= observed)
        if reached + len(larger) >= EXCEEDANCES:
            return EXCEEDANCES / (drawn + int(larger[EXCEEDANCES - reached - 1]) + 1)
        reached += len(larger)
        drawn += NULLS_AT_ONCE
    return (reached + 1) / (most + 1)


def legendre(u: Array) -> Array:
    """h_1 and h_2 of ranks (P, K), side by side: (P, 2 K)."""
    centred = u - 0.5
    return np.concatenate([np.sqrt(12) * centred, np.sqrt(5) * (6 * np.square(centred) - 0.5)], axis=1)


def by_x(u: Array, names: tuple[str, ...], features: Array, axes: tuple[str, ...], rng: np.random.Generator,
         resolution: int = MOST_NULLS) -> LocalByX:
    """Do ranks (P, K) depend on features of x (P, F)? Features that take fewer than ten values are split as far as they go."""
    if not features.shape[1]:  # of an x that never varies
        none = np.zeros((0, TENTHS, u.shape[1]))
        return LocalByX(1.0, 0.0, names[0], "x", 0, "right", none, none, (), np.zeros((0, TENTHS + 1)))
    edges = np.quantile(features, np.linspace(0, 1, TENTHS + 1), axis=0).T
    place = np.stack([np.searchsorted(e[1:-1], f, side="right") for e, f in zip(edges, features.T, strict=True)], axis=1)
    cells = (place[..., None] == np.arange(TENTHS)).reshape(len(u), -1)
    share = np.maximum(cells.mean(0), 1 / len(u))
    indicator = ((cells - cells.mean(0)) / np.sqrt(len(u) * share * np.maximum(1 - share, 1e-9))).astype(np.float32)
    values = legendre(u)
    values = ((values - values.mean(0)) / np.maximum(values.std(0), 1e-9)).astype(np.float32)
    rows = len(u)

    def null(n: int) -> Array:
        return np.array([np.abs(indicator.T @ values[rng.permutation(rows)]).max() for _ in range(n)])

    score = np.abs(indicator.T @ values)
    worst_cell, worst_value = np.unravel_index(int(score.argmax()), score.shape)
    k, axis, tenth = worst_value % u.shape[1], worst_cell // TENTHS, worst_cell % TENTHS
    counts = np.maximum(cells.sum(0), 1)[:, None]
    shape = (features.shape[1], TENTHS, u.shape[1])
    bias = ((cells.T @ (u - 0.5)) / counts).reshape(shape)
    spread = ((cells.T @ (np.abs(2 * u - 1) - 0.5)) / counts).reshape(shape)
    kind = "bias" if worst_value < u.shape[1] else "spread"
    size = float((bias if kind == "bias" else spread)[axis, tenth, k])
    if kind == "bias" and names[k] == "HPD":  # a truth ranks high where its density is low
        said = "narrow" if size > 0 else "wide"
    else:
        said = ("high" if size < 0 else "low") if kind == "bias" else ("narrow" if size > 0 else "wide")
    return LocalByX(sequential_p_value(float(score.max()), null, resolution), abs(size), names[k], axes[axis], int(tenth), f"too {said}",
                    bias, spread, axes, edges)


def by_theta(found: NDArray[np.integer], stated: Array, among: NDArray[np.integer], names: tuple[str, ...],
             rng: np.random.Generator, resolution: int = MOST_NULLS) -> LocalByTheta:
    """found: the tenth that each truth lies in, (P, D). stated: probabilities of the tenths, (P, D, tenths), of draws and truth together.
    among: the tenths of the truth and of some of its draws, (P, M, D)."""
    pairs, dim = found.shape
    scale = np.sqrt(np.maximum((stated * (1 - stated)).sum(0), 1e-9))
    expected = stated.sum(0)
    offset = TENTHS * np.arange(dim)
    enough = expected >= 1

    def statistic(tenths: NDArray[np.integer]) -> Array:
        """Of truths (B, P, D): (B,)."""
        flat = tenths + offset + TENTHS * dim * np.arange(len(tenths))[:, None, None]
        counts = np.bincount(flat.ravel(), minlength=len(tenths) * dim * TENTHS).reshape(len(tenths), dim, TENTHS)
        return (np.abs(counts - expected) / scale * enough).max((1, 2))

    def null(n: int) -> Array:
        chosen = rng.integers(among.shape[1], size=(n, pairs))
        return statistic(among[np.arange(pairs), chosen])

    shares = (found[..., None] == np.arange(TENTHS)).mean(0)
    gap = shares - stated.mean(0)
    k, tenth = np.unravel_index(int((np.abs(gap * pairs) / scale * enough).argmax()), gap.shape)
    p_value = sequential_p_value(float(statistic(found[None])[0]), null, resolution)
    return LocalByTheta(p_value, float(abs(gap[k, tenth])), names[k], int(tenth), shares, stated.mean(0))


def axes_of(estimates: Array, features: Array, names: tuple[str, ...]) -> tuple[Array, tuple[str, ...]]:
    """Functions of x to look along, at most 16 of each kind: what the regression says of each parameter, and features of x.

    Where there are more, their principal components."""
    parts, labels = [], []
    for values, plain, joint in ((estimates, [f"estimate of {n}" for n in names], "estimate, component"),
                                 (features, [f"x, feature {k}" for k in range(features.shape[1])], "x, component")):
        if values.shape[1] > MOST_AXES:
            centred = values - values.mean(0)
            values = centred @ np.linalg.svd(centred, full_matrices=False)[2][:MOST_AXES].T
            plain = [f"{joint} {k}" for k in range(values.shape[1])]
        moves = values.std(0) > 1e-9
        parts.append(values[:, moves])
        labels += [label for label, m in zip(plain, moves, strict=True) if m]
    return np.concatenate(parts, axis=1), tuple(labels)
