r"""Location: a mean in Gaussian noise, the group-equivariant problem in which every law is known.

.. math:: \mu \sim N(0, S^2), \qquad x_i = \mu + \sigma \epsilon_i, \qquad
          p(\mu | x) = N(m, v), \quad v^{-1} = S^{-2} + n \sigma^{-2}, \quad m = v n \bar x / \sigma^2 .

With a proxy :math:`\hat g = \mu + \kappa \xi` of the location the conditional is Gaussian too,

.. math:: p(\mu | x, \hat g) = N\Big(w m + (1 - w) \hat g, \; w v\Big), \qquad w = \frac{\kappa^2}{v + \kappa^2},

so the Gibbs chain that draws mu and the proxy in turn is an autoregression: its stationary law is N(m, v), and the lag-1
autocorrelation of mu is :math:`v / (v + \kappa^2)` (Dax et al., 2022, Group equivariant neural posterior estimation).

The translation of x by g is exact. The prior is not flat, but over the width of a kernel, of the posterior's size, nearly so.
"""

import numpy as np

from sbiplat.prior import Normal, Prior
from sbiplat.simulator import simulator
from sbiplat.symmetry import Translation

COUNT = 5  # numbers in x
NOISE = 1.0
SCALE = 10.0  # of the prior
VARIANCE = 1 / (SCALE**-2 + COUNT / NOISE**2)  # v, of the posterior


def posterior_mean(x: np.ndarray) -> np.ndarray:
    """m of x (..., 5): (...,)."""
    return VARIANCE * np.asarray(x, float).sum(-1) / NOISE**2


def log_likelihood(theta: np.ndarray, x: np.ndarray) -> np.ndarray:
    """log p(x | theta), (N,)."""
    residual = (np.asarray(x, float) - theta) / NOISE
    return -0.5 * (residual**2).sum(-1) - COUNT * np.log(NOISE * np.sqrt(2 * np.pi))


def posterior_log_prob(theta: np.ndarray, x: np.ndarray) -> np.ndarray:
    """log N(theta; m, v), (N,)."""
    return -0.5 * (theta[:, 0] - posterior_mean(x)) ** 2 / VARIANCE - 0.5 * np.log(2 * np.pi * VARIANCE)


def posterior_sampler(x: np.ndarray, n: int, rng: np.random.Generator) -> np.ndarray:
    """n exact draws of theta (n, 1)."""
    return posterior_mean(x) + np.sqrt(VARIANCE) * rng.standard_normal((n, 1))


def conditional(x: np.ndarray, proxy: np.ndarray, width: float) -> tuple[np.ndarray, float]:
    """The mean (...,) and the variance of p(mu | x, proxy), for x (..., 5), proxies (...,) and a Gaussian kernel of that width."""
    share = width**2 / (VARIANCE + width**2)
    return share * posterior_mean(x) + (1 - share) * proxy, share * VARIANCE


def autocorrelation(width: float) -> float:
    """Of mu from one Gibbs step to the next, v / (v + width^2)."""
    return VARIANCE / (VARIANCE + width**2)


@simulator(
    prior=Prior({"mu": Normal(0, SCALE)}), x_shape=(COUNT,), batched=True, symmetry=Translation(("mu",)),
    log_likelihood=log_likelihood, posterior_log_prob=posterior_log_prob, posterior_sampler=posterior_sampler,
    citation="Dax et al. (2022), Group equivariant neural posterior estimation, ICLR",
)
def location(theta: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    r"""Five numbers around an unknown mean: GNPE's Gibbs chain is known in closed form.

    .. math:: x_i \sim N(\mu, 1), \quad i = 1 \ldots 5, \qquad \mu \sim N(0, 10^2) .

    theta: (B, 1); x: (B, 5).
    """
    return theta + NOISE * rng.standard_normal((len(theta), COUNT))
