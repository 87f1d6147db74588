r"""Coverage: are the posterior's probabilities the frequencies they claim to be?

For held-out pairs (theta*, x), draws theta_1..theta_L ~ q(theta | x) and any function t(theta, x), the randomised rank

.. math:: u = \frac{k + U}{L + 1}, \qquad k = \#\{l : t_l < t^*\}, \quad U \sim \mathrm{Uniform}(0, 1),

is exactly uniform if q is the posterior, for any L. The functions here:

- SBC (Talts et al., 2018; Cook et al., 2006): t is a parameter, or a function of theta that the user names;
- TARP (Lemos et al., 2023): t is the distance to a reference theta_r(x), a function of x that never sees q. References that
  ignore x cannot tell the prior from the posterior. Several references a pair give several sets of ranks, which depend on each other:
  their p-values are joined by the Cauchy combination (Liu & Xie, 2020), and their curves by their mean;
- HPD (Deistler et al., 2022): t is -log q, so that u <= alpha where the truth lies in the region of highest density of probability alpha.

Uniformity is tested by the one-sample Kolmogorov-Smirnov test of u, and of the folded rank |2u - 1|, in which too narrow and too
wide do not cancel. The size of a departure is max over alpha of |ECP(alpha) - alpha|, where ECP is the empirical distribution of the
ranks; the coverage of central regions, Pr(|2u - 1| <= alpha), tells too narrow (under-coverage) from too wide (over-coverage). The truth
lies outside of all draws, t* < min t_l or t* > max t_l, with probability 2 / (L + 1): what the tails are held against, by the binomial law.

Bands are bootstrap over pairs, of the departure at the level where it is largest.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import special

Array = NDArray[np.float64]
LEVELS = np.linspace(0.0, 1.0, 101)
TWO_SIDED = ("SBC", "function")  # kinds whose central regions are intervals: extreme ranks of either end lie outside


@dataclass(frozen=True)
class Outside:
    """Truths outside of all draws: their share, the chance of it under calibration, a 95 % band (Clopper-Pearson), and the p-value of as
    many or more."""

    share: float
    chance: float
    band: tuple[float, float]
    p_value: float


@dataclass(frozen=True)
class Coverage:
    """Figures of one set of ranks, of a kind: "TARP", "HPD", "SBC" or "function".

    p_value: of uniformity; folded_p_value: of |2u - 1|, None where the ranks themselves tell narrow from wide (HPD) or nothing does
    (TARP). deviation: max |ECP - alpha|, with its bootstrap band. under, over: the largest shortfall and excess of the central regions'
    coverage, with their bands. levels, ecp, central and the bands of the latter two are for plots.
    """

    name: str
    kind: str
    p_value: float
    folded_p_value: float | None
    deviation: float
    deviation_band: tuple[float, float]
    under: float
    under_band: tuple[float, float]
    over: float
    over_band: tuple[float, float]
    outside: Outside | None
    ecp: Array
    ecp_band: tuple[Array, Array]
    central: Array
    central_band: tuple[Array, Array]

    @property
    def dispersion_p_value(self) -> float | None:
        """That of the test which tells too narrow and too wide from right."""
        return self.p_value if self.kind == "HPD" else self.folded_p_value


def ranks(draws: Array, truth: Array, rng: np.random.Generator) -> Array:
    """Randomised ranks of `truth` (P, ...) among `draws` (P, L, ...): as truth, in (0, 1). Ties are broken at random."""
    own, among = truth.reshape(len(truth), -1), draws.reshape(*draws.shape[:2], -1)
    columns = [(among[..., k], own[:, k, None]) for k in range(own.shape[1])]  # one by one: several times faster than along an axis
    below = np.stack([np.count_nonzero(d < t, axis=1) for d, t in columns], axis=1).reshape(truth.shape)
    ties = np.stack([np.count_nonzero(d == t, axis=1) for d, t in columns], axis=1).reshape(truth.shape)
    return (below + rng.uniform(size=truth.shape) * (ties + 1)) / (draws.shape[1] + 1)


def outside(draws: Array, truth: Array) -> NDArray[np.bool_]:
    """Whether the truth (P, ...) lies outside of all draws (P, L, ...)."""
    return (truth < draws.min(1)) | (truth > draws.max(1))


def distances(draws: Array, references: Array) -> Array:
    """Squared distances of draws (P, L, D) to references (P, R, D): (P, L, R), up to a constant of each reference."""
    return np.einsum("...d,...d->...", draws, draws)[..., None] - 2 * draws @ np.swapaxes(references, 1, 2)


def tarp_ranks(draws: Array, truth: Array, references: Array, rng: np.random.Generator) -> Array:
    """Ranks of the truth's distance to each reference (P, R, D) among the draws' distances: (P, R)."""
    return ranks(distances(draws, references), distances(truth[:, None], references)[:, 0], rng)


def uniformity_p_value(u: Array) -> float:
    """One-sample two-sided Kolmogorov-Smirnov test of ranks (P,) against U(0, 1)."""
    ordered, n = np.sort(u), len(u)
    grid = np.arange(n)
    statistic = max((ordered - grid / n).max(), ((grid + 1) / n - ordered).max())
    return float(np.clip(special.kolmogorov(statistic * (np.sqrt(n) + 0.12 + 0.11 / np.sqrt(n))), 0, 1))


def cauchy(p_values: Sequence[float]) -> float:
    """One p-value of several that may depend on each other: the Cauchy combination, of right level in the tail (Liu & Xie, 2020)."""
    p = np.clip(p_values, 1e-300, 1 - 1e-12)
    mean = np.where(p < 1e-15, 1 / (p * np.pi), np.tan((0.5 - p) * np.pi)).mean()
    return float(1 / (mean * np.pi) if mean > 1e15 else 0.5 - np.arctan(mean) / np.pi)


def outside_figures(count: int, pairs: int, chance: float, level: float = 0.95) -> Outside:
    """Of so many truths outside of all draws among so many pairs."""
    tail = (1 - level) / 2
    low = float(special.betaincinv(count, pairs - count + 1, tail)) if count else 0.0
    high = float(special.betaincinv(count + 1, pairs - count, 1 - tail)) if count < pairs else 1.0
    return Outside(count / pairs, chance, (low, high), float(special.bdtrc(count - 1, pairs, chance)) if count else 1.0)


def coverage(
    name: str, u: Array, rng: np.random.Generator, kind: str = "SBC", beyond: Outside | None = None, weights: Array | None = None,
    level: float = 0.95,
) -> Coverage:
    """All figures of one set of ranks (P,), or of several that are joined (P, R). weights: `bootstrap_weights`, which sets may share."""
    u = u.reshape(len(u), -1)
    weights = bootstrap_weights(len(u), rng) if weights is None else weights
    tails = [(1 - level) / 2, (1 + level) / 2]

    def curves(values: Array) -> tuple[Array, Array]:
        inside = np.zeros((len(values), len(LEVELS)), np.float32)
        for column in values.T:
            inside += column[:, None] <= LEVELS
        inside /= values.shape[1]
        return inside.mean(0, dtype=float), weights @ inside

    def band(values: Array) -> tuple[float, float]:
        low, high = np.maximum(np.quantile(values, tails), 0.0)
        return float(low), float(high)

    def curve_band(values: Array) -> tuple[Array, Array]:
        low, high = np.quantile(values, tails, axis=0)
        return low, high

    ecp, many_ecp = curves(u)
    central, many_central = (ecp, many_ecp) if kind == "HPD" else curves(np.abs(2 * u - 1))
    gap, gaps = ecp - LEVELS, many_ecp - LEVELS
    widest = int(np.abs(gap).argmax())
    space, spaces = central - LEVELS, many_central - LEVELS
    short, excess = int(space.argmin()), int(space.argmax())
    folded = uniformity_p_value(np.abs(2 * u[:, 0] - 1)) if kind in TWO_SIDED else None
    return Coverage(
        name, kind, cauchy([uniformity_p_value(column) for column in u.T]), folded,
        float(abs(gap[widest])), band(np.sign(gap[widest]) * gaps[:, widest]),
        float(-space[short]), band(-spaces[:, short]),
        float(space[excess]), band(spaces[:, excess]),
        beyond, ecp, curve_band(many_ecp), central, curve_band(many_central),
    )


def bootstrap_weights(pairs: int, rng: np.random.Generator, bootstraps: int = 200) -> NDArray[np.float32]:
    """The share of each pair in each bootstrap: (bootstraps, P)."""
    chosen = rng.integers(pairs, size=(bootstraps, pairs)) + pairs * np.arange(bootstraps)[:, None]
    counts = np.bincount(chosen.ravel(), minlength=bootstraps * pairs)
    return (counts.reshape(bootstraps, pairs) / pairs).astype(np.float32)


def holm(p_values: list[float]) -> list[float]:
    """Holm's adjusted p-values: the chance of one false alarm among all is at most the level they are held against."""
    order = np.argsort(p_values)
    adjusted, worst = np.empty(len(p_values)), 0.0
    for rank, k in enumerate(order):
        worst = max(worst, (len(p_values) - rank) * p_values[k])
        adjusted[k] = min(1.0, worst)
    return adjusted.tolist()
