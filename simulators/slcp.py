r"""SLCP, simple likelihood, complex posterior: four points of a two-dimensional Gaussian.

The likelihood is a product of four Gaussians, but the signs of :math:`\theta_3` and :math:`\theta_4` cannot be told from x,
and the prior cuts: the posterior has four symmetric modes with sharp edges. It is known only up to its evidence.

Source: Papamakarios, Sterratt & Murray (2019), as task T.3 of Lueckmann et al. (2021), arXiv:2101.04653.
"""

import numpy as np

from sbiplat.prior import Prior, Uniform, standard_normal_log_prob
from sbiplat.simulator import simulator

POINTS = 4
JITTER = 1e-6  # on both variances, as in the benchmark's code: keeps them positive where theta_3 or theta_4 is 0


def cholesky(theta: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """L_11, L_21, L_22 of the covariance, each (N, 1)."""
    s1, s2, correlation = theta[:, 2:3] ** 2, theta[:, 3:4] ** 2, np.tanh(theta[:, 4:5])
    first = np.sqrt(s1**2 + JITTER)
    across = correlation * s1 * s2 / first
    return first, across, np.sqrt(s2**2 + JITTER - across**2)


def log_likelihood(theta: np.ndarray, x: np.ndarray) -> np.ndarray:
    """log p(x | theta), (N,): the sum over the four points."""
    first, across, second = cholesky(theta)
    z1 = (x[0::2] - theta[:, 0:1]) / first
    z2 = (x[1::2] - theta[:, 1:2] - across * z1) / second
    return (standard_normal_log_prob(z1) + standard_normal_log_prob(z2) - np.log(first * second)).sum(-1)


@simulator(
    prior=Prior({f"theta_{k}": Uniform(-3, 3) for k in range(1, 6)}),
    x_shape=(2 * POINTS,), batched=True, x_labels=[f"point_{k}_{axis}" for k in range(1, POINTS + 1) for axis in (1, 2)],
    log_likelihood=log_likelihood,
    citation="Papamakarios, Sterratt & Murray (2019), Sequential neural likelihood, AISTATS",
)
def slcp(theta: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    r"""Four points of a Gaussian with unknown mean and covariance: a simple likelihood, a complex posterior.

    .. math::

        x &= (x_1, \ldots, x_4), \quad x_i \sim N(m_\theta, S_\theta), \quad m_\theta = (\theta_1, \theta_2), \\
        S_\theta &= \begin{pmatrix} s_1^2 & \rho s_1 s_2 \\ \rho s_1 s_2 & s_2^2 \end{pmatrix}, \quad
        s_1 = \theta_3^2, \; s_2 = \theta_4^2, \; \rho = \tanh \theta_5, \quad \theta \sim U(-3, 3)^5 .

    theta: (B, 5); x: (B, 8), the points one after another.
    """
    first, across, second = cholesky(theta)
    z1, z2 = rng.standard_normal((2, len(theta), POINTS))
    points = np.stack([theta[:, 0:1] + first * z1, theta[:, 1:2] + across * z1 + second * z2], axis=-1)
    return points.reshape(-1, 2 * POINTS)
