r"""How far values lie from rows of a bank, in one space: Mahalanobis' distance, the distance to the nearest rows, and MMD of many.

Values are brought to :math:`u`, centred by the median, scaled by the interquartile range and softly clipped, so that wild rows do not set
the scale. With the mean :math:`\mu` and the eigenvectors :math:`v_k` and eigenvalues :math:`\lambda_k` of the covariance of u, shrunk
towards a multiple of the identity (Ledoit & Wolf, 2004),

.. math:: d_M^2 = \sum_k \frac{(v_k^\top (u - \mu))^2}{\lambda_k}, \qquad d_N = |u - u_{(5)}|,

with :math:`u_{(5)}` the fifth nearest of up to 2000 rows. Of more than 256 values only the leading components are kept; what they leave
has one variance a value (probabilistic principal components: Tipping & Bishop, 1999), by which its square is divided and added to
:math:`d_M^2`. Then :math:`d_N` is within the components alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.spatial.distance import cdist

from sbiplat.nets.standardise import robust_scale, soft_clip

Array = NDArray[np.float64]
MOST_WHOLE = 256  # values whose whole covariance is kept
MOST_COMPONENTS, MOST_BASIS = 64, 2**22
LEAST_BASIS_ROWS, MOST_BASIS_ROWS, MOST_BASIS_NUMBERS = 64, 1024, 2**24
ROWS, NEIGHBOUR = 2000, 5
PASS_NUMBERS = 2**22
_LEAST = 1e-9  # of the mean variance


@dataclass(frozen=True)
class Space:
    """Rows of a bank in one space of F values. basis: (F, K). variances: (K,). rest: variance of each value beyond the components, 0 where
    K = F. rows: (R, K), reference rows by their components."""

    loc: Array
    scale: Array
    mean: Array
    basis: NDArray[np.float32]
    variances: Array
    rest: float
    rows: NDArray[np.float32]

    @classmethod
    def fit(cls, values: NDArray[np.floating], rng: np.random.Generator) -> Space:
        """From rows of a bank (N, F), N at least 2."""
        count, size = values.shape
        loc, scale = _robust_scales(values)
        chosen = rng.permutation(count)
        bare = cls(loc, scale, np.zeros(size), np.zeros((size, 0), np.float32), np.zeros(0), 0.0, np.zeros((0, 0), np.float32))
        if size <= MOST_WHOLE:
            u = bare.scaled(values)
            mean = u.mean(0)
            u -= mean
            variances, basis = np.linalg.eigh(shrunk_covariance(u))
            rest = 0.0
        else:
            u = bare.scaled(values[chosen[:int(np.clip(MOST_BASIS_NUMBERS // size, LEAST_BASIS_ROWS, MOST_BASIS_ROWS))]])
            mean = u.mean(0)
            u -= mean
            variances, basis, rest = _leading(u)
        variances = np.maximum(variances, _LEAST * max(float(variances.mean()), 1e-300))
        made = cls(loc, scale, mean, basis.astype(np.float32), variances, rest, np.zeros((0, 0), np.float32))
        parts = [made.components(values[rows])[0] for rows in _passes(chosen[:ROWS], size)]
        return cls(loc, scale, mean, made.basis, variances, rest, np.concatenate(parts).astype(np.float32))

    def scaled(self, values: NDArray[np.floating]) -> Array:
        """u of values (B, F); what is not finite lies as far out as the clip goes."""
        with np.errstate(over="ignore", invalid="ignore"):
            u = np.nan_to_num((np.asarray(values, float) - self.loc) / self.scale, nan=1e30, posinf=1e30, neginf=-1e30)
        return soft_clip(torch.as_tensor(u)).numpy()

    def components(self, values: NDArray[np.floating]) -> tuple[Array, Array]:
        """(B, K) components of u - mu, and the square of what they leave of it, (B,)."""
        gap = self.scaled(values) - self.mean
        found = gap @ self.basis
        left = np.maximum(np.square(gap).sum(1) - np.square(found).sum(1), 0.0) if self.rest else np.zeros(len(gap))
        return found, left

    def measure(self, values: NDArray[np.floating]) -> tuple[Array, NDArray[np.float32]]:
        """(B, 2): Mahalanobis' distance and that to the nearest rows; and the components, (B, K). In passes."""
        distances, kept = [], []
        for rows in _passes(np.arange(len(values)), max(len(self.loc), len(self.rows))):
            found, left = self.components(values[rows])
            square = (np.square(found) / self.variances).sum(1) + (left / self.rest if self.rest else 0.0)
            k = min(NEIGHBOUR, len(self.rows)) - 1
            near = np.partition(cdist(found, self.rows), k, axis=1)[:, k]
            distances.append(np.stack([np.sqrt(square), near], axis=1))
            kept.append(found.astype(np.float32))
        return np.concatenate(distances), np.concatenate(kept)

    def conditional(self, values: NDArray[np.floating]) -> Array | None:
        r"""How many sd each value lies from what the others let expect, :math:`(P (u - \mu))_j / \sqrt{P_{jj}}`, P the precision: (B, F).

        None where only leading components are kept.
        """
        if self.rest:
            return None
        found, _ = self.components(values)
        precision = (np.square(self.basis.astype(float)) / self.variances).sum(1)
        return (found / self.variances) @ self.basis.T / np.sqrt(precision)


def shrunk_covariance(centred: Array) -> Array:
    """Ledoit and Wolf's covariance of centred rows (N, F)."""
    count, size = centred.shape
    sample = centred.T @ centred / count
    level = np.trace(sample) / size
    spread = np.square(sample).sum() / size - level**2
    error = (np.square(np.square(centred).sum(1)).sum() / count - np.square(sample).sum()) / (count * size)
    share = 1.0 if spread <= 0 else min(1.0, error / spread)
    return (1 - share) * sample + share * level * np.eye(size)


def _leading(centred: Array) -> tuple[Array, Array, float]:
    """Leading eigenvalues and eigenvectors of the covariance of rows (N, F) with N or F large, and the mean variance of the rest."""
    count, size = centred.shape
    keep = max(1, min(MOST_COMPONENTS, count // 4, MOST_BASIS // size))
    weights, left = np.linalg.eigh(centred @ centred.T / count)
    weights, left = weights[::-1][:keep], left[:, ::-1][:, :keep]
    basis = centred.T @ left / np.sqrt(np.maximum(weights * count, 1e-300))
    basis = np.linalg.qr(basis)[0]
    total = np.square(centred).sum() / count
    rest = max((total - weights.sum()) / (size - keep), _LEAST * max(total / size, 1e-300))
    return np.maximum(weights, rest), basis, float(rest)


def _robust_scales(values: NDArray[np.floating]) -> tuple[Array, Array]:
    """`robust_scale` of each column, some columns at a time."""
    step = max(1, PASS_NUMBERS // len(values))
    parts = [robust_scale(values[:, a:a + step]) for a in range(0, values.shape[1], step)]
    return np.concatenate([p[0] for p in parts]), np.concatenate([p[1] for p in parts])


def _passes(rows: NDArray[np.int64], size: int) -> list[NDArray[np.int64]]:
    step = max(1, PASS_NUMBERS // max(1, size))
    return [rows[a:a + step] for a in range(0, len(rows), step)]


def mmd_p_value(
    batch: Sequence[NDArray[np.floating]], rows: Sequence[NDArray[np.floating]], rng: np.random.Generator, permutations: int = 999,
) -> tuple[float, float]:
    r"""The squared maximum mean discrepancy of a batch and rows of a bank, and its permutation p-value (Gretton et al., 2012),

    .. math:: M = \sum_{ij} a_i a_j \kappa(y_i, y_j), \quad a = 1/B \text{ for the batch}, -1/n \text{ for the rows}, \quad
              p = \frac{1 + \#\{M_\pi \ge M\}}{1 + \text{permutations}},

    with the mean over spaces of Gaussian kernels whose width is the median distance. batch: a (B, K) for each space. rows: (n, K).
    Exact where all are exchangeable: for observations of one and the same theta they are not.
    """
    kernel = np.zeros(())
    for some, others in zip(batch, rows, strict=True):
        both = np.concatenate([some, others]).astype(float)
        square = cdist(both, both, "sqeuclidean")
        kernel = kernel + np.exp(-0.5 * square / max(float(np.median(square)), 1e-300)) / len(batch)
    size, count = len(batch[0]), len(kernel)
    weights = np.where(np.arange(count) < size, 1 / size, -1 / (count - size))
    shuffled = np.concatenate([weights[None], rng.permuted(np.tile(weights, (permutations, 1)), axis=1)])
    found = np.einsum("pi,pi->p", shuffled @ kernel, shuffled)
    return float(found[0]), float((found >= found[0] * (1 - 1e-12)).sum() / (permutations + 1))
