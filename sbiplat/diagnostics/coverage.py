r"""Coverage: are the posterior's probabilities the frequencies they claim to be?

For held-out pairs (theta*, x) and draws theta_1..theta_L ~ q(theta | x), three kinds of randomised rank

.. math:: u = \frac{k + U}{L + 1}, \qquad k = \#\{l : t_l < t^*\}, \quad U \sim \mathrm{Uniform}(0, 1),

are exactly uniform if q is the posterior, for any L:

- SBC, one per parameter (Talts et al., 2018; Cook et al., 2006): t is the parameter itself;
- TARP (Lemos et al., 2023): t is the distance to a reference theta_r(x), a noisy point estimate from x. References that
  ignore x cannot tell the prior from the posterior; ours come from a regression fitted to training rows, never from q.

Uniformity is tested by the one-sample Kolmogorov-Smirnov test. The size of a departure is max over alpha of
|ECP(alpha) - alpha|, where ECP is the empirical distribution of the ranks; the coverage of central intervals,
Pr(|2u - 1| <= alpha), tells too narrow (under-coverage) from too wide (over-coverage). Bands are bootstrap over
pairs, of the departure at the level where it is largest.

All of it works in z, where the prior is of unit scale; ranks of parameters do not depend on that.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import special

Array = NDArray[np.float64]
LEVELS = np.linspace(0.0, 1.0, 101)


@dataclass(frozen=True)
class Coverage:
    """Figures of one set of ranks.

    p_value: of uniformity. deviation: max |ECP - alpha|, with its bootstrap band. under, over: the largest shortfall and
    excess of central intervals' coverage, with their bands. levels, ecp, central and the bands of the latter two are for plots.
    """

    name: str
    p_value: float
    deviation: float
    deviation_band: tuple[float, float]
    under: float
    under_band: tuple[float, float]
    over: float
    over_band: tuple[float, float]
    ecp: Array
    ecp_band: tuple[Array, Array]
    central: Array
    central_band: tuple[Array, Array]


def ranks(draws: Array, truth: Array, rng: np.random.Generator) -> Array:
    """Randomised ranks of `truth` (P,) among `draws` (P, L): (P,), in (0, 1). Ties are broken at random."""
    below = (draws < truth[:, None]).sum(1)
    ties = (draws == truth[:, None]).sum(1)
    return (below + rng.uniform(size=len(truth)) * (ties + 1)) / (draws.shape[1] + 1)


def sbc_ranks(draws: Array, truth: Array, rng: np.random.Generator) -> Array:
    """Ranks of each parameter: draws (P, L, D), truth (P, D) -> (P, D)."""
    return np.stack([ranks(draws[..., k], truth[:, k], rng) for k in range(truth.shape[1])], axis=1)


def tarp_ranks(draws: Array, truth: Array, reference: Array, scale: Array, rng: np.random.Generator) -> Array:
    """Ranks of the truth's distance to a reference among the draws' distances: reference (P, D), scale (D,) -> (P,)."""
    distance = np.square((draws - reference[:, None]) / scale).sum(-1)
    own = np.square((truth - reference) / scale).sum(-1)
    return ranks(distance, own, rng)


@dataclass(frozen=True)
class References:
    """A noisy point estimate of z from features of x: ridge regression on the features and on random tanh units of them."""

    weights: Array
    inner: Array
    centre: Array
    spread: Array
    residual: Array

    @classmethod
    def fit(cls, features: Array, z: Array, rng: np.random.Generator, units: int = 200) -> References:
        """Fit on training rows: features (N, F), z (N, D)."""
        centre, spread = features.mean(0), features.std(0)
        spread = np.where(spread > 1e-9, spread, 1.0)
        inner = rng.standard_normal((features.shape[1] + 1, units)) / np.sqrt(features.shape[1])
        self = cls(np.zeros(0), inner, centre, spread, np.zeros(0))
        design = self._design(features)
        gram = design.T @ design + 1e-3 * len(design) * np.eye(design.shape[1])
        weights = np.linalg.solve(gram, design.T @ z)
        residual = np.maximum((z - design @ weights).std(0), 1e-6)
        return cls(weights, inner, centre, spread, residual)

    def _design(self, features: Array) -> Array:
        u = np.clip((features - self.centre) / self.spread, -10, 10)
        one = np.ones((len(u), 1))
        return np.concatenate([one, u, np.tanh(np.concatenate([u, one], 1) @ self.inner)], axis=1)

    def draw(self, features: Array, rng: np.random.Generator) -> Array:
        """A reference for each row: the estimate plus noise of the regression's own residual size, (P, D)."""
        estimate = self._design(features) @ self.weights
        return estimate + self.residual * rng.standard_normal(estimate.shape)


def uniformity_p_value(u: Array) -> float:
    """One-sample two-sided Kolmogorov-Smirnov test of ranks (P,) against U(0, 1)."""
    ordered, n = np.sort(u), len(u)
    grid = np.arange(n)
    statistic = max((ordered - grid / n).max(), ((grid + 1) / n - ordered).max())
    return float(np.clip(special.kolmogorov(statistic * (np.sqrt(n) + 0.12 + 0.11 / np.sqrt(n))), 0, 1))


def coverage(name: str, u: Array, rng: np.random.Generator, bootstraps: int = 200, level: float = 0.95) -> Coverage:
    """All figures of one set of ranks (P,)."""
    def curves(counts: Array) -> tuple[Array, Array]:
        return counts @ (u[:, None] <= LEVELS), counts @ (np.abs(2 * u - 1)[:, None] <= LEVELS)

    n = len(u)
    ecp, central = curves(np.full((1, n), 1 / n))
    many_ecp, many_central = curves(rng.multinomial(n, np.full(n, 1 / n), bootstraps) / n)
    tails = [(1 - level) / 2, (1 + level) / 2]

    def band(values: Array) -> tuple[float, float]:
        low, high = np.maximum(np.quantile(values, tails), 0.0)
        return float(low), float(high)

    def curve_band(values: Array) -> tuple[Array, Array]:
        low, high = np.quantile(values, tails, axis=0)
        return low, high

    gap, gaps = ecp[0] - LEVELS, many_ecp - LEVELS
    widest = int(np.abs(gap).argmax())
    space, spaces = central[0] - LEVELS, many_central - LEVELS
    short, excess = int(space.argmin()), int(space.argmax())
    return Coverage(
        name, uniformity_p_value(u),
        float(abs(gap[widest])), band(np.sign(gap[widest]) * gaps[:, widest]),
        float(-space[short]), band(-spaces[:, short]),
        float(space[excess]), band(spaces[:, excess]),
        ecp[0], curve_band(many_ecp), central[0], curve_band(many_central),
    )


def holm(p_values: list[float]) -> list[float]:
    """Holm's adjusted p-values: the chance of one false alarm among all is at most the level they are held against."""
    order = np.argsort(p_values)
    adjusted, worst = np.empty(len(p_values)), 0.0
    for rank, k in enumerate(order):
        worst = max(worst, (len(p_values) - rank) * p_values[k])
        adjusted[k] = min(1.0, worst)
    return adjusted.tolist()
