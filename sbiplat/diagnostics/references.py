r"""What is known of theta from x without the posterior: a regression of z on features of x, fitted to rows that are not held out.

Its estimate m(x) and the covariance S of its residuals give TARP its references, :math:`\theta_r(x) = m(x) + e,\ e \sim N(0, S)`, in
units in which S has unit variances (euclidean) or is the identity (Mahalanobis), and the local tests and the nearest-neighbour query their
summaries (semi-automatic ABC; Fearnhead & Prangle, 2012).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from sbiplat.diagnostics.examined import tensors
from sbiplat.nets.standardise import Standardise
from sbiplat.observation import Fields, ObservationSpec

Array = NDArray[np.float64]
MOST_FEATURES = 256


class Features:
    """x as standardised features (P, F); more than 256 are projected at random to 256."""

    def __init__(self, spec: ObservationSpec, x: Fields, rng: np.random.Generator) -> None:
        self._standardise = Standardise(spec)
        self._standardise.fit(tensors(x))
        self._project = rng.standard_normal((spec.size, MOST_FEATURES)) / np.sqrt(spec.size) if spec.size > MOST_FEATURES else None

    def __call__(self, x: Fields) -> Array:
        flat = torch.cat([v.reshape(len(v), -1) for v in self._standardise(tensors(x)).values()], dim=1).double().numpy()
        return flat if self._project is None else flat @ self._project


@dataclass(frozen=True)
class References:
    """A point estimate of z from features of x: ridge regression on the features and on random tanh units of them.

    residual: the residuals' standard deviations (D,). whiten: (D, D), which sends the residuals to covariance I.
    """

    weights: Array
    inner: Array
    centre: Array
    spread: Array
    residual: Array
    whiten: Array

    @classmethod
    def fit(cls, features: Array, z: Array, rng: np.random.Generator, units: int = 200) -> References:
        """Fit on training rows: features (N, F), z (N, D)."""
        centre, spread = features.mean(0), features.std(0)
        spread = np.where(spread > 1e-9, spread, 1.0)
        inner = rng.standard_normal((features.shape[1] + 1, units)) / np.sqrt(features.shape[1])
        design = _design(features, centre, spread, inner)
        gram = design.T @ design + 1e-3 * len(design) * np.eye(design.shape[1])
        weights = np.linalg.solve(gram, design.T @ z)
        errors = z - design @ weights
        residual = np.maximum(errors.std(0), 1e-6)
        covariance = np.cov(errors.T).reshape(z.shape[1], -1) + np.diag(np.square(1e-3 * residual))
        return cls(weights, inner, centre, spread, residual, np.linalg.inv(np.linalg.cholesky(covariance)).T)

    def estimate(self, features: Array) -> Array:
        """m(x), (P, D)."""
        return _design(features, self.centre, self.spread, self.inner) @ self.weights

    def draw(self, features: Array, count: int, rng: np.random.Generator) -> Array:
        """So many references for each row, (P, count, D): the estimate plus noise of the residuals' covariance."""
        estimate = self.estimate(features)[:, None]
        noise = rng.standard_normal((len(estimate), count, estimate.shape[-1]))
        return estimate + noise @ np.linalg.inv(self.whiten)


def _design(features: Array, centre: Array, spread: Array, inner: Array) -> Array:
    u = np.clip((features - centre) / spread, -10, 10)
    one = np.ones((len(u), 1))
    return np.concatenate([one, u, np.tanh(np.concatenate([u, one], 1) @ inner)], axis=1)
