r"""Reference draws from a posterior whose density is known up to a factor, by adaptive importance sampling and rejection.

A mixture of Student t laws begins at the modes, with the curvature there, and is fitted to the target pi by population Monte Carlo: for
draws :math:`z_i \sim q` with weights :math:`w_i = \pi(z_i) / q(z_i)`, components :math:`\rho_k = \alpha_k q_k / q` and
:math:`\gamma_k = (\nu + D) / (\nu + d_k^2)`,

.. math:: \alpha_k \propto \sum_i w_i \rho_k, \quad \mu_k = \frac{\sum_i w_i \rho_k \gamma_k z_i}{\sum_i w_i \rho_k \gamma_k}, \quad
          \Sigma_k = \frac{\sum_i w_i \rho_k \gamma_k (z_i - \mu_k)(z_i - \mu_k)^T}{\sum_i w_i \rho_k},

which lowers KL(pi || q) in each step (Cappé et al., Adaptive importance sampling in general mixture classes, 2008). Draws are then kept
with probability :math:`\min(w / M, 1)`: they are independent, and follow :math:`\min(w, M) q` in place of :math:`w q`. M is the least
bound whose excess, :math:`\sum (w - M)_+ / \sum w` over a pool of 20,000 draws, is at most 0.002: so far in total variation is the law
of the draws from pi.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import least_squares
from scipy.special import gammaln, logsumexp

from sbiplat.errors import ObservationError

Array = NDArray[np.float64]
LogDensity = Callable[[Array], Array]  # (N, D) -> (N,), -inf where it vanishes

FREEDOM = 6.0
COPIES = 4  # components a mode, so that bent and skewed modes are covered
ROUNDS, ROUND = 6, 3000
MOST = 50_000  # proposals at once
CHUNK = 1000  # densities at once, so that what they need stays in the cache
TWIN_SHARE, TWIN_WIDTH = 0.15, 1.7  # of a wider twin that each component gets in the end, which bounds the weights in the tails
POOL = 20_000  # draws behind the greatest weight and the evidence
EXCESS = 2e-3  # of the weights beyond the bound of rejection
LEAST_EFFECTIVE = 0.05  # effective sample size of the pool over its size
WITHIN = 25.0  # nats below the best mode: a mode that holds less than e^-25 is left out
CLEAR = 25.0  # nats by which the best mode must beat no signal at all: below, there may be modes that no start leads to
APART = 3.0  # standard deviations between modes that count as two


def finite(x: Any, name: str) -> Array:
    """x in float64; raises ObservationError where some of it is not finite. name: of the simulator."""
    x = np.asarray(x, float)
    if not np.isfinite(x).all():
        raise ObservationError(f"{name}: x has {np.sum(~np.isfinite(x))} values that are not finite; give one without gaps")
    return x


@dataclass(frozen=True)
class Mode:
    """A local maximum z (D,) of a posterior's log density, and the covariance (D, D) from its curvature."""

    z: Array
    covariance: Array
    log_density: float


def modes(residuals: Callable[[Array], Array], starts: Sequence[Array], free: int = 0) -> list[Mode]:
    """The distinct local maxima of -|residuals(z)|^2 / 2 that these starts (D,) lead to, the best first.

    The posterior under Gaussian noise, whose residuals are those of x and z itself, for parameters with the prior N(0, 1).
    free: how many coordinates, the first ones, have no residual of their own.
    """
    found: list[Mode] = []
    for start in starts:
        fit = least_squares(residuals, start, method="lm", xtol=1e-10, ftol=1e-10, max_nfev=200 * len(start))
        precision = fit.jac.T @ fit.jac + 1e-9 * np.eye(len(start))
        new = Mode(fit.x, np.linalg.inv(precision), -fit.cost)
        if all((new.z - m.z) @ np.linalg.solve(m.covariance, new.z - m.z) > APART**2 for m in found):
            found.append(new)
    found.sort(key=lambda m: -m.log_density)
    return [m for m in found if m.log_density > found[0].log_density - WITHIN]


def clear(found: Sequence[Mode], x: Array, noise: float, name: str) -> Sequence[Mode]:
    """The modes; raises ObservationError where x (any shape) under white noise may as well hold no signal."""
    gain = found[0].log_density + 0.5 * np.sum((x / noise) ** 2)
    if gain < CLEAR:
        raise ObservationError(f"{name}: x has no clear signal (the best fit gains {gain:.3g} nats, {CLEAR:g} are needed), and its "
                               "posterior may have modes that the reference sampler does not see; take an x that the simulator gave")
    return found


class Reference:
    """A fitted proposal: `sample(n, rng)` gives exact draws (n, D); `log_evidence` is log of the integral of the density."""

    def __init__(self, log_density: LogDensity, found: Sequence[Mode], rng: np.random.Generator, name: str) -> None:
        """Raises ObservationError where the proposal does not come to cover the density."""
        self._log_density = log_density
        dim = len(found[0].z)
        roots = [np.linalg.cholesky(m.covariance) for m in found]
        self._means = np.concatenate([m.z + rng.standard_normal((COPIES, dim)) @ r.T for m, r in zip(found, roots, strict=True)])
        self._roots = np.repeat(1.2 * np.stack(roots), COPIES, axis=0)
        self._log_shares = np.full(len(self._means), -np.log(len(self._means)))
        for _ in range(ROUNDS):
            self._fit(self._propose(ROUND, rng))
        self._add_twins()
        weights = self._log_weights(self._propose(POOL, rng))
        self.log_evidence = float(logsumexp(weights) - np.log(POOL))
        self._log_bound = _bound(weights)
        self.efficiency = float(np.exp(np.minimum(weights, self._log_bound) - self._log_bound).mean())
        effective = float(np.exp(2 * logsumexp(weights) - logsumexp(2 * weights)) / POOL)
        if not effective > LEAST_EFFECTIVE:
            raise ObservationError(f"{name}: the reference sampler does not cover the posterior of this x (effective sample size "
                                   f"{effective:.1%} of its draws, {LEAST_EFFECTIVE:.0%} at least); take an x that the simulator gave")

    def sample(self, n: int, rng: np.random.Generator) -> Array:
        """n independent draws (n, D)."""
        kept, count = [], 0
        while count < n:
            z = self._propose(min(int(1.1 * (n - count) / self.efficiency) + 100, MOST), rng)
            kept.append(z[np.log(rng.random(len(z))) < self._log_weights(z) - self._log_bound])
            count += len(kept[-1])
        return np.concatenate(kept)[:n]

    def _add_twins(self) -> None:
        self._means = np.concatenate([self._means, self._means])
        self._roots = np.concatenate([self._roots, TWIN_WIDTH * self._roots])
        self._log_shares = np.concatenate([self._log_shares + np.log1p(-TWIN_SHARE), self._log_shares + np.log(TWIN_SHARE)])

    def _propose(self, n: int, rng: np.random.Generator) -> Array:
        which = rng.choice(len(self._means), n, p=np.exp(self._log_shares))
        steps = rng.standard_normal((n, self._means.shape[1])) / np.sqrt(rng.chisquare(FREEDOM, (n, 1)) / FREEDOM)
        return self._means[which] + np.einsum("nij,nj->ni", self._roots[which], steps)

    def _distances(self, z: Array) -> Array:
        """Squared Mahalanobis distances, (N, K)."""
        return np.stack([(np.linalg.solve(r, (z - m).T) ** 2).sum(0) for m, r in zip(self._means, self._roots, strict=True)], -1)

    def _log_components(self, z: Array) -> tuple[Array, Array]:
        """log alpha_k q_k(z) and the squared distances, both (N, K)."""
        dim, squared = z.shape[1], self._distances(z)
        scale = gammaln((FREEDOM + dim) / 2) - gammaln(FREEDOM / 2) - dim / 2 * np.log(FREEDOM * np.pi)
        log_det = np.log(np.diagonal(self._roots, axis1=1, axis2=2)).sum(-1)
        return self._log_shares + scale - log_det - (FREEDOM + dim) / 2 * np.log1p(squared / FREEDOM), squared

    def _log_weights(self, z: Array) -> Array:
        return self._target(z) - logsumexp(self._log_components(z)[0], axis=-1)

    def _target(self, z: Array) -> Array:
        return np.concatenate([self._log_density(z[k : k + CHUNK]) for k in range(0, len(z), CHUNK)])

    def _fit(self, z: Array) -> None:
        """One step of population Monte Carlo; components that hold nothing are dropped."""
        dim = z.shape[1]
        log_components, squared = self._log_components(z)
        log_q = logsumexp(log_components, axis=-1, keepdims=True)
        log_weights = self._target(z) - log_q[:, 0]
        weights = np.exp(log_weights - log_weights.max())[:, None]
        held = weights * np.exp(log_components - log_q)
        pulls = held * (FREEDOM + dim) / (FREEDOM + squared)
        effective = held.sum(0) ** 2 / np.maximum((held**2).sum(0), 1e-300)
        alive = np.flatnonzero(effective > 4 * dim)
        if not alive.size:  # the proposal is still far off: widen it
            self._roots = 2 * self._roots
            return
        held, pulls = held[:, alive], pulls[:, alive]
        means = pulls.T @ z / pulls.sum(0)[:, None]
        offsets = z[:, None] - means
        covariances = np.einsum("nk,nki,nkj->kij", pulls, offsets, offsets) / held.sum(0)[:, None, None]
        ridge = 1e-6 * np.einsum("kii->k", covariances)[:, None, None] / dim * np.eye(dim)
        self._means, self._roots = means, np.linalg.cholesky(covariances + ridge)
        self._log_shares = np.log(held.sum(0) / held.sum())


def _bound(log_weights: Array) -> float:
    """log of the least of these weights beyond which no more than EXCESS of their sum lies."""
    weights = np.sort(np.exp(log_weights - log_weights.max()))[::-1]
    above = np.cumsum(weights) - weights * np.arange(1, len(weights) + 1)  # sum of (w - M)_+ for M each of them
    last = np.flatnonzero(above <= EXCESS * weights.sum())[-1]
    return float(np.log(weights[last]) + log_weights.max())
