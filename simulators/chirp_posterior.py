r"""Exact draws of a chirp's posterior, by importance sampling and rejection.

A signal is :math:`s = r e^{i \phi} h(\mathcal{M}, q, \text{sky}) e^{-2 \pi i f t_c}` with r = 1 Mpc / D. With the matched filter
:math:`z = \sum \bar h x \, e^{2 \pi i f t_c}` and :math:`N = \sum |h|^2` the likelihood ratio to noise alone, and its mean over phases, are

.. math:: \log \Lambda = r \, \mathrm{Re}(e^{-i \phi} z) - \tfrac12 r^2 N, \qquad \bar \Lambda = I_0(r |z|) \, e^{-r^2 N / 2}.

So one h serves any times and distances. For each proposal of masses and sky from a density p, the weight w is the mean of
:math:`\bar \Lambda / p` over one time and one distance in each stratum: an unbiased estimate of its integral. A proposal is kept with a
probability in proportion to w, its time and distance are drawn by their shares of w, and its phase from the von Mises law that is left.
Most proposals need no integral: w is at most :math:`\exp(\max |z|^2 / 2 N) / p`.

p is a product of histograms on the unit cube (as VEGAS has it: Lepage, J. Comput. Phys. 27, 192, 1978), fitted in a few rounds to ever less
tempered weights and mixed with the prior, so that no mode is lost. Times lie in what the last round finds within `DEPTH` nats of its
best, and a margin; a draw in the outer half of the margin says that this was too small, and all is drawn again from a wider one. Where a
weight is above the bound, the bound rises to it, and what was kept is held against the new one.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.special import i0e, logsumexp

Array = NDArray[np.float64]

BLOCK = 2048  # proposals at once
ROUNDS, BLOCKS = 6, 8  # that fit p
BINS, PRIOR_SHARE, EFFECTIVE = 64, 0.1, 400.0  # of each histogram; of the prior in it; proposals that count, at the temperature of a round
TIMES, DISTANCES = 64, 8  # strata
ALL_TIMES = 256  # of the whole prior
DEPTH = 12.0
MARGIN = 0.25  # of the width, on either side
MOST = 20_000_000  # proposals, after which an observation is refused
DISTANCE, TIME, PHASE = 2, 3, 4  # columns of theta


@dataclass(frozen=True)
class Problem:
    """support: (7, 2), of uniform priors of chirp mass, mass ratio, distance in Mpc, t_c, phase, ra and sin_dec; templates: theta (B, 7) ->
    signals (B, detectors, 2, F) at these frequencies; sky: (ra, sin_dec) (B, 2) of numbers uniform on the unit square."""

    support: Array
    templates: Callable[[Array], Array]
    frequencies: Array
    sky: Callable[[Array], Array]

    def draw(self, x: NDArray[np.floating], n: int, rng: np.random.Generator) -> Array:
        """n draws (n, 7) of the posterior given x (detectors, 2, F). Raises ValueError where p does not come to cover it."""
        data = x[:, 0].astype(float) + 1j * x[:, 1]
        density, core = self._fit(data, rng)
        while True:
            width = core[1] - core[0]
            low, high = self.support[TIME]
            span = np.array([max(core[0] - MARGIN * width, low), min(core[1] + MARGIN * width, high)])
            theta = self._reject(data, n, density, span, rng)
            halfway = 0.5 * (core + span)
            below = span[0] > low and theta[:, TIME].min() < halfway[0]
            if not below and not (span[1] < high and theta[:, TIME].max() > halfway[1]):
                return theta
            core = span

    def _fit(self, data: NDArray[np.complex128], rng: np.random.Generator) -> tuple[Array, Array]:
        """The histograms (4, BINS), each of mean 1, and the times that matter."""
        density = np.ones((4, BINS))
        for _ in range(ROUNDS):
            found = [self._propose(data, density, self.support[TIME], ALL_TIMES, rng) for _ in range(BLOCKS)]
            cells = np.concatenate([c for c, *_ in found])
            depth = [np.abs(z) ** 2 / (2.0 * energy[:, None]) for *_, z, energy in found]
            log_w = np.concatenate([d.max(1) - log_p for d, (_, _, log_p, *_) in zip(depth, found, strict=True)])
            w = _tempered(log_w)
            fitted = np.stack([np.bincount(c, w, BINS) for c in cells.T]) * BINS / w.sum()
            wide = np.pad(fitted, ((0, 0), (1, 1)), mode="edge")
            density = PRIOR_SHARE + (1.0 - PRIOR_SHARE) * (wide[:, :-2] + 2.0 * fitted + wide[:, 2:]) / 4.0
            density /= density.mean(1, keepdims=True)
        best = max(d.max() for d in depth)
        times = np.concatenate([times[(d > best - DEPTH).any(0)] for d, (_, _, _, times, *_) in zip(depth, found, strict=True)])
        return density, np.array([times.min(), times.max()])

    def _reject(self, data: NDArray[np.complex128], n: int, density: Array, span: Array, rng: np.random.Generator) -> Array:
        """n draws with times in the span."""
        kept, level, bound = np.empty((0, len(self.support))), np.empty(0), -np.inf
        for _ in range(MOST // BLOCK):
            _, theta, log_p, times, z, energy = self._propose(data, density, span, TIMES, rng)
            distances = _strata(self.support[DISTANCE], DISTANCES, rng)
            luck = rng.exponential(size=BLOCK)  # kept where log u < log w - bound, luck = -log u
            rows = np.flatnonzero(np.abs(z).max(1) ** 2 / (2.0 * energy) - log_p + luck > bound)
            r = 1.0 / distances
            size = np.abs(z[rows])[..., None] * r
            log_each = (np.log(i0e(size)) + size - 0.5 * energy[rows, None, None] * r**2).reshape(len(rows), TIMES * DISTANCES)
            log_sum = logsumexp(log_each, axis=1)
            log_w = log_sum - np.log(TIMES * DISTANCES) - log_p[rows]
            bound = max(bound, log_w.max(initial=-np.inf))
            chosen = np.flatnonzero(log_w + luck[rows] > bound)
            shares = np.exp(log_each[chosen] - log_sum[chosen, None]).cumsum(1)
            i, j = np.divmod((shares < rng.random((len(chosen), 1)) * shares[:, -1:]).sum(1), DISTANCES)
            rows, above = rows[chosen], log_w[chosen] + luck[rows[chosen]]
            z, theta = z[rows, i], theta[rows]
            theta[:, TIME], theta[:, DISTANCE] = times[i], distances[j]
            theta[:, PHASE] = (np.angle(z) + rng.vonmises(0.0, np.abs(z) / distances[j])) % (2.0 * np.pi)
            kept, level = np.concatenate([kept, theta]), np.concatenate([level, above])
            kept, level = kept[level > bound], level[level > bound]
            if len(kept) >= n:
                return kept[:n]
        raise ValueError(f"{len(kept)} of {n} draws after {MOST} proposals: the sampler's density does not cover this posterior")

    def _propose(self, data: NDArray[np.complex128], density: Array, span: Array, count: int,
                 rng: np.random.Generator) -> tuple[NDArray[np.int64], Array, Array, Array, NDArray[np.complex128], Array]:
        """A block of proposals: their cells (B, 4) of the histograms, theta (B, 7) at 1 Mpc, log p (B,), times (T,), the matched filter z
        (B, T) at these, and N (B,)."""
        cells = np.stack([rng.choice(BINS, BLOCK, p=row / BINS) for row in density], 1)
        log_p = np.log(density[np.arange(4), cells]).sum(1)
        u = (cells + rng.random(cells.shape)) / BINS
        theta = np.zeros((BLOCK, len(self.support)))
        theta[:, :2] = self.support[:2, 0] + (self.support[:2, 1] - self.support[:2, 0]) * u[:, :2]
        theta[:, DISTANCE] = 1.0
        theta[:, 5:] = self.sky(u[:, 2:])
        times = _strata(span, count, rng)
        h = self.templates(theta)
        filtered = np.einsum("bdf,df->bf", h[:, :, 0] - 1j * h[:, :, 1], data)
        z = filtered @ np.exp(2j * np.pi * self.frequencies[:, None] * times)
        return cells, theta, log_p, times, z, np.einsum("bdcf,bdcf->b", h, h)


def _strata(span: Array, count: int, rng: np.random.Generator) -> Array:
    """One uniform number in each of `count` equal parts of a span."""
    return span[0] + (span[1] - span[0]) * (np.arange(count) + rng.random(count)) / count


def _tempered(log_w: Array) -> Array:
    """Weights w^b with the largest b <= 1 at which as many as EFFECTIVE of them count, to one part in 2^12."""

    def at(b: float) -> Array:
        return np.exp(b * (log_w - log_w.max()))

    low, high = 0.0, 1.0
    for _ in range(12):
        middle = 0.5 * (low + high)
        w = at(middle)
        low, high = (middle, high) if w.sum() ** 2 / np.sum(w**2) > EFFECTIVE else (low, middle)
    return at(low)
