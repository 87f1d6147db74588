r"""Lotka-Volterra, the benchmark's task: predators and prey from a known beginning, seen ten times in twenty days.

.. math:: \dot u = (\alpha - \beta v)\,u, \qquad \dot v = (-\gamma + \delta u)\,v, \qquad (u, v)(0) = (30, 1), \qquad
          x_{k} \sim \mathrm{LogNormal}(\log (u, v)(2.1\,k), \; 0.1), \quad k = 0 \dots 9 .

x holds the ten values of u and then those of v, as there. The equations are solved as in `predator_prey`, with a step of 2.1
days for its year. For the record of lynx and hares, with unknown beginnings and noise, see there.

Source: Lotka (1920), as task T.10 of Lueckmann et al. (2021), arXiv:2101.04653.
"""

import numpy as np

from sbiplat.prior import LogNormal, Prior, standard_normal_log_prob
from sbiplat.simulator import simulator
from simulators.predator_prey import solve

DAYS = 2.1 * np.arange(10)
START = np.log([30.0, 1.0])
NOISE = 0.1


def log_populations(theta: np.ndarray) -> np.ndarray:
    """log u and log v at the ten times, (N, 20)."""
    rates = np.concatenate([theta * DAYS[1], np.tile(np.exp(START), (len(theta), 1))], axis=1)
    return solve(rates)[:, : len(DAYS)].transpose(0, 2, 1).reshape(len(theta), -1)


def log_likelihood(theta: np.ndarray, x: np.ndarray) -> np.ndarray:
    """log p(x | theta), (N,): twenty log-normals."""
    log_x = np.log(x)
    return (standard_normal_log_prob((log_x - log_populations(theta)) / NOISE) - np.log(NOISE) - log_x).sum(-1)


@simulator(
    prior=Prior({name: LogNormal(loc, 0.5, unit="1/day") for name, loc in
                 {"alpha": -0.125, "beta": -3.0, "gamma": -0.125, "delta": -3.0}.items()}),
    x_shape=(2 * len(DAYS),), batched=True, x_transform="log",
    x_labels=[f"{kind}_{day:.1f}" for kind in ("prey", "predators") for day in DAYS],
    log_likelihood=log_likelihood,
    citation="Lotka (1920), Analytical note on certain rhythmic relations in organic systems, PNAS 6",
)
def lotka_volterra(theta: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    r"""Predators and prey from a known beginning, ten noisy counts of each in twenty days.

    theta: (B, 4); x: (B, 20).
    """
    log_x = log_populations(theta)
    return np.exp(np.clip(log_x + NOISE * rng.standard_normal(log_x.shape), -80.0, 80.0))
