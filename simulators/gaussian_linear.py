r"""Gaussian linear: the mean of a Gaussian under a Gaussian prior, in ten dimensions.

Prior and noise have the same covariance, so the posterior lies halfway between the prior's mean, 0, and x:

.. math:: p(\theta | x) = N(\theta; x / 2, \; 0.05 \, I) .

Source: task T.1 of Lueckmann et al. (2021), arXiv:2101.04653.
"""

import numpy as np

from sbiplat.prior import Normal, Prior, standard_normal_log_prob
from sbiplat.simulator import simulator

DIM = 10
SCALE = np.sqrt(0.1)
POSTERIOR_SCALE = np.sqrt(0.05)


def log_likelihood(theta: np.ndarray, x: np.ndarray) -> np.ndarray:
    """log N(x; theta, 0.1 I), (N,)."""
    return (standard_normal_log_prob((x - theta) / SCALE) - np.log(SCALE)).sum(-1)


def posterior_log_prob(theta: np.ndarray, x: np.ndarray) -> np.ndarray:
    """log N(theta; x / 2, 0.05 I), (N,)."""
    return (standard_normal_log_prob((theta - x / 2) / POSTERIOR_SCALE) - np.log(POSTERIOR_SCALE)).sum(-1)


def posterior_sampler(x: np.ndarray, n: int, rng: np.random.Generator) -> np.ndarray:
    """n draws of N(x / 2, 0.05 I), (n, 10)."""
    return x / 2 + POSTERIOR_SCALE * rng.standard_normal((n, DIM))


@simulator(
    prior=Prior({f"theta_{k}": Normal(0, SCALE) for k in range(1, DIM + 1)}),
    x_shape=(DIM,), batched=True, x_labels=[f"x_{k}" for k in range(1, DIM + 1)],
    log_likelihood=log_likelihood, posterior_log_prob=posterior_log_prob, posterior_sampler=posterior_sampler,
    citation="Lueckmann, Boelts, Greenberg, Gonçalves & Macke (2021), Benchmarking simulation-based inference, AISTATS",
)
def gaussian_linear(theta: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    r"""The mean of a ten-dimensional Gaussian, seen once: the posterior is Gaussian.

    .. math:: x \sim N(\theta, \; 0.1 \, I), \qquad \theta \sim N(0, \; 0.1 \, I) .

    theta: (B, 10); x: (B, 10).
    """
    return theta + SCALE * rng.standard_normal(theta.shape)
