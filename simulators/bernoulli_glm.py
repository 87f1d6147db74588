r"""Bernoulli GLM: a neuron's offset and filter from its spikes under a white-noise current, by sufficient statistics.

With V the design matrix of the current, the spikes y enter the likelihood only through :math:`x = V^\top y`:

.. math:: \log p(y | \theta) = \theta^\top x - \sum_t \log\big(1 + e^{(V \theta)_t}\big) .

Source: task T.5 of Lueckmann et al. (2021), arXiv:2101.04653, after Gonçalves et al. (2020).
"""

import numpy as np
from scipy.special import expit

from sbiplat.prior import MultivariateNormal, Prior
from sbiplat.simulator import simulator

STEPS, LAGS = 100, 9


def design_matrix() -> np.ndarray:
    """V (100, 10): ones, then the current delayed by 0 to 8 steps. NumPy keeps RandomState's stream for ever."""
    current = np.random.RandomState(42).randn(STEPS).astype(np.float32)
    return np.stack([np.ones(STEPS), *(np.r_[np.zeros(lag), current[: STEPS - lag]] for lag in range(LAGS))], axis=1)


def prior_covariance() -> np.ndarray:
    """Variance 2 for the offset; (F^T F)^-1 for the filter, with F its second differences and a growing diagonal."""
    difference = np.eye(LAGS) - np.eye(LAGS, k=-1)
    smoothing = difference @ difference + np.diag(np.sqrt(np.arange(LAGS) / LAGS))
    covariance = np.zeros((LAGS + 1, LAGS + 1))
    covariance[0, 0] = 2
    covariance[1:, 1:] = np.linalg.inv(smoothing.T @ smoothing)
    return covariance.round(12)  # a bank records it: its digits must not depend on the machine's LAPACK


V = design_matrix()


def log_likelihood(theta: np.ndarray, x: np.ndarray) -> np.ndarray:
    """log p(x | theta), (N,), up to the log of the number of spike trains with this x, which theta does not enter."""
    return theta @ np.asarray(x, float) - np.logaddexp(0, theta @ V.T).sum(-1)


@simulator(
    prior=Prior.joint(["offset", *(f"filter_{lag}" for lag in range(LAGS))],
                      MultivariateNormal(np.zeros(LAGS + 1), prior_covariance())),
    x_shape=(LAGS + 1,), batched=True, x_labels=["spikes", *(f"current_{lag}_before_spikes" for lag in range(LAGS))],
    log_likelihood=log_likelihood,
    citation="Gonçalves et al. (2020), Training deep neural density estimators to identify mechanistic models, eLife 9",
)
def bernoulli_glm(theta: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    r"""A neuron's spikes under a known current, reduced to their number and the current summed before them.

    .. math::

        y_t &\sim \mathrm{Bernoulli}\big(\sigma((V \theta)_t)\big), \quad t = 1, \ldots, 100, \qquad x = V^\top y, \\
        \theta &= (\beta, f), \quad \beta \sim N(0, 2), \quad f \sim N\big(0, (F^\top F)^{-1}\big), \\
        F_{i, i-2} &= 1, \quad F_{i, i-1} = -2, \quad F_{i, i} = 1 + \sqrt{(i - 1) / 9}, \quad F_{i, j} = 0 \text{ otherwise.}

    theta: (B, 10), offset and filter; x: (B, 10).
    """
    spikes = rng.random((len(theta), STEPS)) < expit(theta @ V.T)
    return spikes @ V
