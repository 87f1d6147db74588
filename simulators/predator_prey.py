r"""Predators and prey: lynx and hares in the Hudson's Bay Company's books, 1900-1920.

Hares :math:`u` and lynx :math:`v` obey the Lotka-Volterra equations, and the yearly pelt counts have log-normal errors:

.. math:: \dot u = (\alpha - \beta v)\,u, \qquad \dot v = (-\gamma + \delta u)\,v, \qquad
          x_{t,k} \sim \mathrm{LogNormal}(\log (u, v)_k(t), \sigma_k).

Model and priors: Carpenter, *Predator-prey population dynamics: the Lotka-Volterra model in Stan* (2018). Data: Hewitt (1921), as
tabulated by Howard (2009), in data/hudson_bay.csv, thousands of pelts a year.

The equations are solved for many parameters at once by Taylor series. In the rates :math:`x = \delta u`, :math:`y = \beta v` the
coefficients about the present time need a single Cauchy product,

.. math:: c_k = \sum_{j \le k} x_j y_{k-j}, \quad (k+1)\,x_{k+1} = \alpha x_k - c_k, \quad (k+1)\,y_{k+1} = c_k - \gamma y_k,

and the log populations follow by integrating :math:`(\log u)' = \alpha - y` and :math:`(\log v)' = x - \gamma` term by term, so that
nothing overflows and no population reaches zero. Every row takes its own steps, as long as its last two terms allow (Jorba & Zou,
Experimental Mathematics 14, 2005). No step is ever rejected, and a row's result does not depend on the rows beside it.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

import sbiplat as sp

Array = NDArray[np.float64]

YEARS = 20
FIRST_YEAR = 1900
ORDER = 14
TOLERANCE = 1e-11  # of one step, in the log populations
LANES = 4096  # rows in flight: their coefficients fit in the cache

_LEAST_TERM = 1e-200  # so that a population at rest does not divide by zero


def solve(theta: Array) -> Array:
    """Return log populations (B, 21, 2), hare then lynx, at t = 0 ... 20 years.

    theta: (B, >= 6), its first columns alpha, beta, gamma, delta, hare0, lynx0, all positive.
    """
    theta = np.asarray(theta, dtype=np.float64)
    rates = np.ascontiguousarray(theta[:, :4].T)
    out = np.empty((len(theta), YEARS + 1, 2))
    out[:, 0] = np.log(theta[:, 4:6])

    waiting = min(LANES, len(theta))  # the first row that is not in flight yet
    row = np.arange(waiting)
    year, left = np.zeros(waiting, dtype=np.int64), np.ones(waiting)  # the last year reached, the time to the next one
    rate, log_state = rates[:, row], out[row, 0].T.copy()
    while row.size:
        step, log_state = _advance(rate, log_state, left)
        landed = np.flatnonzero(step >= left)
        left -= step
        left[landed] = 1.0
        year[landed] += 1
        out[row[landed], year[landed]] = log_state[:, landed].T

        free = landed[year[landed] == YEARS]
        if free.size == 0:
            continue
        taken = free[: len(theta) - waiting]
        row[taken] = np.arange(waiting, waiting + taken.size)
        waiting += taken.size
        year[taken] = 0
        rate[:, taken], log_state[:, taken] = rates[:, row[taken]], out[row[taken], 0].T
        if taken.size < free.size:
            flying = np.flatnonzero(year < YEARS)
            row, year, left = row[flying], year[flying], left[flying]
            rate, log_state = rate[:, flying], log_state[:, flying]
    return out


def _advance(rate: Array, log_state: Array, left: Array) -> tuple[Array, Array]:
    """Take one Taylor step in every lane: the step lengths (L,), none beyond `left`, and the log populations (2, L) after it."""
    alpha, _, gamma, _ = rate
    x, y = _coefficients(rate, log_state)
    step = _step_length(x, y, left)
    hare, lynx = y[ORDER] / -(ORDER + 1), x[ORDER] / (ORDER + 1)
    for k in range(ORDER - 1, -1, -1):
        hare *= step
        lynx *= step
        hare -= y[k] / (k + 1)
        lynx += x[k] / (k + 1)
    return step, log_state + step * np.stack([hare + alpha, lynx - gamma])


def _coefficients(rate: Array, log_state: Array) -> tuple[Array, Array]:
    """Taylor coefficients of x = delta u and of y = beta v, each (ORDER + 1, L)."""
    alpha, beta, gamma, delta = rate
    x = np.empty((ORDER + 1, alpha.size))
    y = np.empty_like(x)
    x[0], y[0] = delta * np.exp(log_state[0]), beta * np.exp(log_state[1])
    for k in range(ORDER):
        product = np.einsum("kl,kl->l", x[: k + 1], y[k::-1])
        x[k + 1] = (alpha * x[k] - product) / (k + 1)
        y[k + 1] = (product - gamma * y[k]) / (k + 1)
    return x, y


def _step_length(x: Array, y: Array, left: Array) -> Array:
    """The longest steps whose last two terms keep the tolerance, cut into equal steps to the next year."""
    step = np.full(left.size, np.inf)
    for k in (ORDER - 1, ORDER):
        term = np.maximum(np.maximum(np.abs(x[k]), np.abs(y[k])) / (k + 1), _LEAST_TERM)
        step = np.minimum(step, (TOLERANCE / term) ** (1.0 / (k + 1)))
    return left / np.ceil(left / step)


def log_likelihood(theta: Array, x: Array) -> Array:
    """log p(x | theta), (N,), for theta (N, 8) and one record x (21, 2) of hares and lynx."""
    sigma = theta[:, None, 6:8]
    log_x = np.log(x)
    residual = (log_x - solve(theta)) / sigma
    return -np.sum(0.5 * residual**2 + np.log(sigma) + log_x + 0.5 * np.log(2.0 * np.pi), axis=(1, 2))


@sp.simulator(
    prior=sp.Prior({
        "alpha": sp.TruncatedNormal(1.0, 0.5, low=0.0, unit="1/yr"),
        "beta": sp.TruncatedNormal(0.05, 0.05, low=0.0, unit="1/yr per 1000 lynx"),
        "gamma": sp.TruncatedNormal(1.0, 0.5, low=0.0, unit="1/yr"),
        "delta": sp.TruncatedNormal(0.05, 0.05, low=0.0, unit="1/yr per 1000 hares"),
        "hare0": sp.LogNormal(np.log(10.0), 1.0, unit="1000 hares"),
        "lynx0": sp.LogNormal(np.log(10.0), 1.0, unit="1000 lynx"),
        "sigma_hare": sp.LogNormal(-1.0, 1.0),
        "sigma_lynx": sp.LogNormal(-1.0, 1.0),
    }),
    x_shape=(YEARS + 1, 2),
    x_labels=("hare", "lynx"),
    x_axis=("year", range(FIRST_YEAR, FIRST_YEAR + YEARS + 1)),
    x_unit="1000 pelts",
    x_transform="log",
    dtype="float64",  # populations span hundreds of decades over the prior
    batched=True,
    citation="Carpenter, Predator-prey population dynamics: the Lotka-Volterra model in Stan (2018); data: Hewitt (1921)",
    log_likelihood=log_likelihood,
)
def predator_prey(theta: Array, rng: np.random.Generator) -> Array:
    """Yearly pelts of hares and lynx from 1900 to 1920.

    theta (B, 8) -> x (B, 21, 2).
    """
    noise = rng.standard_normal((len(theta), YEARS + 1, 2))
    return np.exp(solve(theta) + theta[:, None, 6:8] * noise)
