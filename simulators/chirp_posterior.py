r"""Exact draws of a chirp's posterior, by rejection from the prior.

A signal is :math:`s = r e^{i \phi} h(\mathcal{M}, q, \text{sky}) e^{-2 \pi i f t_c}` with r = 1 Mpc / D. With the matched filter
:math:`z = \sum \bar h x \, e^{2 \pi i f t_c}` and :math:`N = \sum |h|^2` the likelihood ratio to noise alone, and its mean over phases, are

.. math:: \log \Lambda = r \, \mathrm{Re}(e^{-i \phi} z) - \tfrac12 r^2 N, \qquad \bar \Lambda = I_0(r |z|) \, e^{-r^2 N / 2}.

So one h serves any times and distances. For each proposal of masses and sky from the prior, the weight w is the mean of :math:`\bar \Lambda` over one
time and one distance in each stratum: an unbiased estimate of its integral. A proposal is kept with a probability in proportion to w, its
time and distance are drawn by their shares of w, and its phase from the von Mises law that is left. The draws are independent, and no
mode can be missed for want of a path to it.

Proposals lie in a box of chirp mass and time: what a pilot run over the whole prior finds within `DEPTH` nats of its best, and a margin. A
draw in the outer half of the margin says that the box was too small: it is widened, and all is drawn again. Where a weight is above the
bound, the bound rises to it, and what was kept is held against the new one.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.special import i0e, logsumexp

Array = NDArray[np.float64]
Templates = Callable[[Array], Array]

PILOT, PILOT_TIMES = 32_768, 256  # proposals that find the box, and their times
BLOCK = 2048  # proposals at once
TIMES, DISTANCES = 64, 8  # strata
DEPTH = 12.0
MARGIN = 0.25  # of the width, on either side
MOST = 50_000_000  # proposals, after which an observation is refused
MASS, DISTANCE, TIME, PHASE = 0, 2, 3, 4  # columns of theta


@dataclass(frozen=True)
class Problem:
    """support: (7, 2), of uniform priors of chirp mass, mass ratio, distance in Mpc, t_c, phase, ra and sin_dec; templates: theta (B, 7) ->
    signals (B, detectors, 2, F) at these frequencies."""

    support: Array
    templates: Templates
    frequencies: Array

    def draw(self, x: NDArray[np.floating], n: int, rng: np.random.Generator) -> Array:
        """n draws (n, 7) of the posterior given x (detectors, 2, F). Raises ValueError where x is too loud for rejection."""
        data = x[:, 0].astype(float) + 1j * x[:, 1]
        core = self._core(data, rng)
        while True:
            width = core[:, 1] - core[:, 0]
            box = np.stack([np.maximum(core[:, 0] - MARGIN * width, self.support[:, 0]),
                            np.minimum(core[:, 1] + MARGIN * width, self.support[:, 1])], 1)
            theta = self._reject(data, n, box, rng)
            halfway = 0.5 * (core + box)
            cut = box != self.support  # where the prior ends there is no more to find
            if not np.any((cut[:, 0] & (theta.min(0) < halfway[:, 0])) | (cut[:, 1] & (theta.max(0) > halfway[:, 1]))):
                return theta
            core = box

    def _core(self, data: NDArray[np.complex128], rng: np.random.Generator) -> Array:
        """The support with chirp mass and time cut to where a pilot run finds any likelihood."""
        found = [self._propose(data, self.support, PILOT_TIMES, rng) for _ in range(PILOT // BLOCK)]
        best = max((np.abs(z) ** 2 / (2.0 * energy[:, None])).max() for _, _, z, energy in found)
        core = self.support.copy()
        masses, times = [], []
        for theta, grid, z, energy in found:
            good = np.abs(z) ** 2 / (2.0 * energy[:, None]) > best - DEPTH
            masses.append(theta[good.any(1), MASS])
            times.append(grid[good.any(0)])
        for k, values in ((MASS, np.concatenate(masses)), (TIME, np.concatenate(times))):
            core[k] = values.min(), values.max()
        return core

    def _reject(self, data: NDArray[np.complex128], n: int, box: Array, rng: np.random.Generator) -> Array:
        """n draws within the box."""
        kept, level, bound = np.empty((0, len(box))), np.empty(0), -np.inf
        for _ in range(MOST // BLOCK):
            theta, times, z, energy = self._propose(data, box, TIMES, rng)
            distances = _strata(box[DISTANCE], DISTANCES, rng)
            luck = rng.exponential(size=BLOCK)  # kept where log u < log w - bound, luck = -log u
            rows = np.flatnonzero(np.abs(z).max(1) ** 2 / (2.0 * energy) + luck > bound)  # no mean is above the largest Lambda
            r = 1.0 / distances
            size = np.abs(z[rows])[..., None] * r
            log_each = (np.log(i0e(size)) + size - 0.5 * energy[rows, None, None] * r**2).reshape(len(rows), TIMES * DISTANCES)
            log_w = logsumexp(log_each, axis=1) - np.log(TIMES * DISTANCES)
            bound = max(bound, log_w.max(initial=-np.inf))
            chosen = np.flatnonzero(log_w + luck[rows] > bound)
            shares = np.exp(log_each[chosen] - log_w[chosen, None]).cumsum(1)
            i, j = np.divmod((shares < rng.random((len(chosen), 1)) * shares[:, -1:]).sum(1), DISTANCES)
            rows, above = rows[chosen], log_w[chosen] + luck[rows[chosen]]
            z, theta = z[rows, i], theta[rows]
            theta[:, TIME], theta[:, DISTANCE] = times[i], distances[j]
            theta[:, PHASE] = (np.angle(z) + rng.vonmises(0.0, np.abs(z) / distances[j])) % (2.0 * np.pi)
            kept, level = np.concatenate([kept, theta]), np.concatenate([level, above])
            kept, level = kept[level > bound], level[level > bound]
            if len(kept) >= n:
                return kept[:n]
        raise ValueError(f"{len(kept)} of {n} draws after {MOST} proposals: the observation is too loud for rejection from the prior")

    def _propose(self, data: NDArray[np.complex128], box: Array, count: int,
                 rng: np.random.Generator) -> tuple[Array, Array, NDArray[np.complex128], Array]:
        """A block of proposals theta (B, 7) at 1 Mpc, times (T,), the matched filter z (B, T) at these, and N (B,)."""
        theta = box[:, 0] + (box[:, 1] - box[:, 0]) * rng.random((BLOCK, len(box)))
        theta[:, DISTANCE], theta[:, TIME], theta[:, PHASE] = 1.0, 0.0, 0.0
        times = _strata(box[TIME], count, rng)
        h = self.templates(theta)
        filtered = np.einsum("bdf,df->bf", h[:, :, 0] - 1j * h[:, :, 1], data)
        z = filtered @ np.exp(2j * np.pi * self.frequencies[:, None] * times)
        return theta, times, z, np.einsum("bdcf,bdcf->b", h, h)


def _strata(span: Array, count: int, rng: np.random.Generator) -> Array:
    """One uniform number in each of `count` equal parts of a span."""
    return span[0] + (span[1] - span[0]) * (np.arange(count) + rng.random(count)) / count
