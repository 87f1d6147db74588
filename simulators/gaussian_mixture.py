r"""Gaussian mixture: the common mean of a wide and a narrow Gaussian.

The posterior is the mixture about x, cut at the prior's square, which seldom matters:

.. math:: p(\theta | x) \propto \tfrac12 N(\theta; x, I) + \tfrac12 N(\theta; x, 0.01 \, I), \qquad |\theta_k| \le 10 .

Source: Sisson et al. (2007), as task T.7 of Lueckmann et al. (2021), arXiv:2101.04653.
"""

import numpy as np
from scipy.special import ndtr

from sbiplat.prior import Prior, Uniform, standard_normal_log_prob
from sbiplat.simulator import simulator

SCALES = np.array([1.0, 0.1])
EDGE = 10.0


def log_likelihood(theta: np.ndarray, x: np.ndarray) -> np.ndarray:
    """log p(x | theta), (N,)."""
    gap = (x - theta)[..., None, :] / SCALES[:, None]
    each = standard_normal_log_prob(gap).sum(-1) - 2 * np.log(SCALES)
    return np.logaddexp(each[..., 0], each[..., 1]) - np.log(2)


def posterior_log_prob(theta: np.ndarray, x: np.ndarray) -> np.ndarray:
    """The cut mixture's log-density, (N,)."""
    x = np.asarray(x, float)
    mass = [np.prod(ndtr((EDGE - x) / s) - ndtr((-EDGE - x) / s)) for s in SCALES]
    return np.where((np.abs(theta) <= EDGE).all(-1), log_likelihood(theta, x) - np.log(np.mean(mass)), -np.inf)


def posterior_sampler(x: np.ndarray, n: int, rng: np.random.Generator) -> np.ndarray:
    """n draws of the mixture, those outside the square drawn again, (n, 2)."""
    out = np.empty((0, 2))
    while len(out) < n:
        scale = SCALES[rng.integers(0, 2, n)]
        draws = x + scale[:, None] * rng.standard_normal((n, 2))
        out = np.concatenate([out, draws[(np.abs(draws) <= EDGE).all(1)]])
    return out[:n]


@simulator(
    prior=Prior({"theta_1": Uniform(-EDGE, EDGE), "theta_2": Uniform(-EDGE, EDGE)}),
    x_shape=(2,), batched=True, x_labels=["x_1", "x_2"],
    log_likelihood=log_likelihood, posterior_log_prob=posterior_log_prob, posterior_sampler=posterior_sampler,
    citation="Sisson, Fan & Tanaka (2007), Sequential Monte Carlo without likelihoods, PNAS 104",
)
def gaussian_mixture(theta: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    r"""The common mean of two Gaussians, one ten times as wide as the other.

    .. math:: x \sim \tfrac12 N(\theta, I) + \tfrac12 N(\theta, 0.01 \, I), \qquad \theta_k \sim U(-10, 10) .

    theta: (B, 2); x: (B, 2).
    """
    return theta + SCALES[rng.integers(0, 2, len(theta))][:, None] * rng.standard_normal(theta.shape)
