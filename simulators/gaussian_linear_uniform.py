r"""Gaussian linear uniform: the mean of a Gaussian under a uniform prior, in ten dimensions.

The posterior is the Gaussian about x, cut at the prior's box in every parameter by itself:

.. math:: p(\theta | x) \propto N(\theta; x, \; 0.1 \, I) \; 1[\, |\theta_k| \le 1 \,] .

Source: task T.2 of Lueckmann et al. (2021), arXiv:2101.04653.
"""

import numpy as np
from scipy.special import log_ndtr, ndtr, ndtri

from sbiplat.prior import Prior, Uniform, standard_normal_log_prob
from sbiplat.simulator import simulator

DIM = 10
SCALE = np.sqrt(0.1)


def log_likelihood(theta: np.ndarray, x: np.ndarray) -> np.ndarray:
    """log N(x; theta, 0.1 I), (N,)."""
    return (standard_normal_log_prob((x - theta) / SCALE) - np.log(SCALE)).sum(-1)


def _edges(x: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The box in units of the noise about x, on the side where its mass is told exactly, and that side's sign."""
    sign = np.where(np.asarray(x, float) > 0, -1.0, 1.0)
    centre = sign * x
    return (-1 - centre) / SCALE, (1 - centre) / SCALE, sign


def posterior_log_prob(theta: np.ndarray, x: np.ndarray) -> np.ndarray:
    """The cut Gaussian's log-density, (N,)."""
    low, high, _ = _edges(x)
    below, above = log_ndtr(-high), log_ndtr(-low)  # of the tails beyond each edge
    log_mass = above + np.log1p(-np.exp(below - above))
    inside = (np.abs(theta) <= 1).all(-1)
    return np.where(inside, log_likelihood(theta, x) - log_mass.sum(-1), -np.inf)


def posterior_sampler(x: np.ndarray, n: int, rng: np.random.Generator) -> np.ndarray:
    """n draws by inverting each parameter's distribution, (n, 10)."""
    low, high, sign = _edges(x)
    upper = ndtr(-high) + rng.uniform(size=(n, DIM)) * (ndtr(-low) - ndtr(-high))  # the chance of lying further out
    return np.clip(sign * (sign * x - SCALE * ndtri(upper)), -1, 1)


@simulator(
    prior=Prior({f"theta_{k}": Uniform(-1, 1) for k in range(1, DIM + 1)}),
    x_shape=(DIM,), batched=True, x_labels=[f"x_{k}" for k in range(1, DIM + 1)],
    log_likelihood=log_likelihood, posterior_log_prob=posterior_log_prob, posterior_sampler=posterior_sampler,
    citation="Lueckmann, Boelts, Greenberg, Gonçalves & Macke (2021), Benchmarking simulation-based inference, AISTATS",
)
def gaussian_linear_uniform(theta: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    r"""The mean of a ten-dimensional Gaussian in a box: the posterior is a Gaussian cut at the box.

    .. math:: x \sim N(\theta, \; 0.1 \, I), \qquad \theta_k \sim U(-1, 1) .

    theta: (B, 10); x: (B, 10).
    """
    return theta + SCALE * rng.standard_normal(theta.shape)
