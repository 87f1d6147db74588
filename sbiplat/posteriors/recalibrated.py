r"""Recalibration: each parameter's draws stretched so that pairs which training did not fit get uniform ranks.

With the mean m(x) and standard deviation s(x) of q(z_k | x), a monotone map h_k of the standardised parameter moves the draws,

.. math:: z_k' = m_k(x) + s_k(x) \, h_k(y_k), \quad y_k = \frac{z_k - m_k(x)}{s_k(x)}, \qquad
          \log q'(z' | x) = \log q(z | x) - \sum_k \log h_k'(y_k) .

h_k is the quantile-quantile map from the pooled y of the draws to the pooled y of the truths, piecewise linear through seven quantiles:
for a posterior whose standardised shape is the same for all x it makes the ranks uniform (the marginal map of Kuleshov et al., 2018,
in standardised coordinates); elsewhere it corrects the average. Order and dependence of the draws stay. It mends width and bias on
average over the prior and nothing local: so a recalibrated posterior goes through the gate like any other, on other pairs.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sbiplat.errors import RunError
from sbiplat.observation import Fields
from sbiplat.posteriors.base import Sampler
from sbiplat.posteriors.convergence import judging
from sbiplat.posteriors.steps import describe

Array = NDArray[np.float64]
QUANTILES = (0.03, 0.12, 0.3, 0.5, 0.7, 0.88, 0.97)
MOMENT_DRAWS = 1000  # from which m(x) and s(x) are taken, always the same
MOMENT_SEED = 0x5EED
OBSERVATIONS = 64  # at a time
LEAST = 1e-6


@dataclass(frozen=True)
class Maps:
    """h_k by its knots and their images, (D, K) each, increasing along the last axis; linear beyond with the slope of the outer knots."""

    knots: Array
    images: Array

    @classmethod
    def fit(cls, draws: Array, truths: Array) -> Maps:
        """From standardised draws (P, L, D) and truths (P, D) of P pairs."""
        flat = draws.reshape(-1, draws.shape[-1])
        return cls(_increasing(np.quantile(flat, QUANTILES, axis=0).T), _increasing(np.quantile(truths, QUANTILES, axis=0).T))

    def to_json(self) -> dict[str, Any]:
        return {"knots": self.knots.tolist(), "images": self.images.tolist()}

    @classmethod
    def from_json(cls, data: Mapping[str, Any], dim: int) -> Maps:
        """Raises RunError where it describes no maps of D parameters."""
        try:
            made = cls(*(np.asarray(data[name], float) for name in ("knots", "images")))
            for values in (made.knots, made.images):
                assert values.shape == (dim, len(QUANTILES))
                assert np.isfinite(values).all()
                assert (np.diff(values, axis=1) > 0).all()
        except (KeyError, TypeError, ValueError, AssertionError):
            raise RunError("run.json is damaged: its recalibration is not that of these parameters") from None
        return made

    def forward(self, y: Array) -> Array:
        """h of y (..., D)."""
        return _through(y, self.knots, self.images)[0]

    def inverse(self, y: Array) -> tuple[Array, Array]:
        """h^-1 of y (..., D), and the sum over parameters of log dh^-1/dy, (...)."""
        values, slopes = _through(y, self.images, self.knots)
        return values, np.log(slopes).sum(-1)


class RecalibratedSampler:
    """Draws and densities of a sampler through the maps."""

    def __init__(self, inner: Sampler, maps: Maps) -> None:
        self.inner, self.maps = inner, maps

    @property
    def diagnostics(self) -> Mapping[str, Any]:
        """Of the last draws, where the inner sampler has any."""
        return getattr(self.inner, "diagnostics", {})

    def sample(self, x: Fields, n: int, seed: int) -> NDArray[np.float32]:
        mean, sd = moments(self.inner, x)
        z = np.asarray(self.inner.sample(x, n, seed), float)
        return (mean[:, None] + sd[:, None] * self.maps.forward((z - mean[:, None]) / sd[:, None])).astype(np.float32)

    def log_prob(self, z: NDArray[np.float32], x: Fields) -> Array:
        mean, sd = moments(self.inner, x)
        y, log_slope = self.maps.inverse((np.asarray(z, float) - mean[:, None]) / sd[:, None])
        return self.inner.log_prob((mean[:, None] + sd[:, None] * y).astype(np.float32), x) + log_slope

    def describe(self) -> list[dict[str, Any]]:
        inner = describe(self.inner)
        return [*inner, {"step": "reparametrisation", "name": "recalibration", "needs": [*inner[-1]["gives"]], "gives": ["stretched z"],
                         "takes": [*inner[-1]["gives"]]}]


def moments(sampler: Sampler, x: Fields) -> tuple[Array, Array]:
    """Mean and standard deviation of q(z | x) for B observations, (B, D) each, by draws that are the same every time. Chains are not
    judged by these: the draws and densities themselves are."""
    size, means, sds = len(next(iter(x.values()))), [], []
    with judging(sampler):
        for b in range(size):  # one by one: a seed's draws may depend on the batch, and m(x) must not
            z = np.asarray(sampler.sample({k: v[b:b + 1] for k, v in x.items()}, MOMENT_DRAWS, MOMENT_SEED), float)[0]
            means.append(z.mean(0))
            sds.append(np.maximum(z.std(0), LEAST))
    return np.stack(means), np.stack(sds)


def fit(sampler: Sampler, z: Array, x: Fields) -> Maps:
    """The maps that make the ranks of z (P, D) uniform on average."""
    draws, truths = [], []
    for a in range(0, len(z), OBSERVATIONS):
        part = {k: v[a:a + OBSERVATIONS] for k, v in x.items()}
        mean, sd = moments(sampler, part)
        made = np.asarray(sampler.sample(part, MOMENT_DRAWS, MOMENT_SEED + 1 + a), float)
        draws.append((made - mean[:, None]) / sd[:, None])
        truths.append((z[a:a + OBSERVATIONS] - mean) / sd)
    return Maps.fit(np.concatenate(draws), np.concatenate(truths))


def _increasing(values: Array) -> Array:
    steps = np.maximum(np.diff(values, axis=1), LEAST)
    return np.concatenate([values[:, :1], values[:, :1] + np.cumsum(steps, axis=1)], axis=1)


def _through(y: Array, start: Array, end: Array) -> tuple[Array, Array]:
    """The piecewise linear map from knots `start` to `end`, (D, K), of y (..., D), and its slopes."""
    out, slopes = np.empty_like(y), np.empty_like(y)
    for k in range(y.shape[-1]):
        slope = np.diff(end[k]) / np.diff(start[k])
        outer = (end[k, -1] - end[k, 0]) / (start[k, -1] - start[k, 0])
        slope = np.concatenate([[outer], slope, [outer]])
        place = np.searchsorted(start[k], y[..., k])
        left = np.clip(place - 1, 0, None)
        slopes[..., k] = slope[place]
        out[..., k] = end[k, left] + slopes[..., k] * (y[..., k] - start[k, left])
    return out, slopes
