r"""SIR: an epidemic in a closed population, seen through ten surveys of a thousand people.

The equations are integrated in :math:`\log(S/N)` and :math:`\log(I/N)`, which keeps the digits of the few who are infected
at the beginning and at the end, by Runge-Kutta steps of fixed length: a row's values do not depend on the rows
that are simulated with it. A survey is binomial, so that the likelihood is exact.

Source: Kermack & McKendrick (1927), as task T.9 of Lueckmann et al. (2021), arXiv:2101.04653. The benchmark surveys each
17th day from day 0, so the last survey is on day 153 of its 160; day 0 says nothing of theta, and is kept as there.
"""

import numpy as np
from scipy.special import gammaln

from sbiplat.prior import LogNormal, Prior
from sbiplat.simulator import simulator

POPULATION = 1_000_000
INFECTED_AT_FIRST = 1
SURVEYED = 1000
DAYS = np.arange(0, 160, 17)
STEPS_A_DAY = 24


def log_infected_share(theta: np.ndarray) -> np.ndarray:
    """log(I / N) on the days of the surveys, (N, 10), to about 1e-8 for beta up to 5 / day."""
    beta, gamma = theta.T
    step = 1 / STEPS_A_DAY

    def slope(y: np.ndarray) -> np.ndarray:
        susceptible, infected = np.exp(y)
        return np.stack([-beta * infected, beta * susceptible - gamma])

    share = INFECTED_AT_FIRST / POPULATION
    y = np.stack([np.full(len(theta), np.log1p(-share)), np.full(len(theta), np.log(share))])
    days = [y[1]]
    for steps in np.diff(DAYS) * STEPS_A_DAY:
        for _ in range(steps):
            k1 = slope(y)
            k2 = slope(y + step / 2 * k1)
            k3 = slope(y + step / 2 * k2)
            k4 = slope(y + step * k3)
            y = y + step / 6 * (k1 + 2 * k2 + 2 * k3 + k4)
        days.append(y[1])
    return np.stack(days, axis=-1)


def log_likelihood(theta: np.ndarray, x: np.ndarray) -> np.ndarray:
    """log p(x | theta), (N,): ten binomials."""
    x = np.asarray(x, float)
    log_share = log_infected_share(theta)
    log_ways = gammaln(SURVEYED + 1) - gammaln(x + 1) - gammaln(SURVEYED - x + 1)
    return (log_ways + x * log_share + (SURVEYED - x) * np.log1p(-np.exp(log_share))).sum(-1)


@simulator(
    prior=Prior({"beta": LogNormal(np.log(0.4), 0.5, unit="1/day"), "gamma": LogNormal(np.log(1 / 8), 0.2, unit="1/day")}),
    x_shape=(len(DAYS),), batched=True, x_axis=("day", DAYS), x_unit="people",
    log_likelihood=log_likelihood,
    citation="Kermack & McKendrick (1927), A contribution to the mathematical theory of epidemics, Proc. R. Soc. A 115",
)
def sir(theta: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    r"""An SIR epidemic: how many of 1000 surveyed people are infected, each 17th day.

    .. math::

        \frac{dS}{dt} &= -\beta \frac{S I}{N}, \qquad \frac{dI}{dt} = \beta \frac{S I}{N} - \gamma I, \qquad
        \frac{dR}{dt} = \gamma I, \\
        x_k &\sim \mathrm{Binomial}\big(1000, \; I(t_k) / N\big), \qquad t_k = 0, 17, \ldots, 153 \text{ days},

    with N = 1,000,000, I(0) = 1, R(0) = 0, log beta ~ N(log 0.4, 0.5^2) and log gamma ~ N(log 1/8, 0.2^2).

    theta: (B, 2), the contact rate beta and the recovery rate gamma; x: (B, 10).
    """
    return rng.binomial(SURVEYED, np.exp(log_infected_share(theta)))
