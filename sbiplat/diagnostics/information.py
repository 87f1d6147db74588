r"""Information: does the posterior know more than the prior?

.. math:: G = \frac{1}{P} \sum_{(\theta^*, x)} \big[ \log q(\theta^* | x) - \log p(\theta^*) \big]

over held-out pairs estimates a lower bound on the mutual information of theta and x, which it reaches for the exact
posterior (Barber & Agakov, 2003). The prior itself has G = 0, and coverage alone cannot tell it from the posterior.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Information:
    """gain: G in nats; its standard error; contraction: 1 - (posterior sd / prior sd)^2 of each z, averaged over pairs."""

    gain: float
    error: float
    contraction: tuple[float, ...]


def information(log_q: Array, log_prior: Array, variances: Array, prior_sd: Array) -> Information:
    """log_q and log_prior at the true z of each pair, (P,); variances of q, (P, D); prior_sd (D,)."""
    gain = np.clip(log_q - log_prior, -1e6, None)
    ratio = variances.mean(0) / np.square(prior_sd)
    return Information(float(gain.mean()), float(gain.std() / np.sqrt(len(gain))), tuple(float(v) for v in 1 - ratio))
