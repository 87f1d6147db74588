r"""Two moons: a posterior of two crescents, known in closed form.

A crescent lies at the same x for :math:`\theta_1 + \theta_2 = \pm d`, so the posterior has two modes, mirror images of each
other, each the crescent of the noise turned by 45 degrees. The edges of the prior and :math:`d \geq 0` may cut it:

.. math:: p(\theta | x) = \frac{p(x | \theta)}{\int_{[-1, 1]^2} p(x | \theta') \, d\theta'},

where the integral is 2 if nothing is cut.

Source: Greenberg, Nonnenmacher & Macke (2019), as task T.8 of Lueckmann et al. (2021), arXiv:2101.04653.
"""

import numpy as np
from scipy.special import ndtr

from sbiplat.errors import ObservationError
from sbiplat.prior import Prior, Uniform, standard_normal_log_prob
from sbiplat.simulator import simulator

CENTRE = 0.25
RADIUS, WIDTH = 0.1, 0.01

prior = Prior({"theta_1": Uniform(-1, 1), "theta_2": Uniform(-1, 1)})


def crescent(n: int, rng: np.random.Generator) -> np.ndarray:
    """n points p (n, 2) of the half ring."""
    a = rng.uniform(-np.pi / 2, np.pi / 2, n)
    r = rng.normal(RADIUS, WIDTH, n)
    return np.stack([r * np.cos(a) + CENTRE, r * np.sin(a)], axis=-1)


def shift(theta: np.ndarray) -> np.ndarray:
    """x - p, (N, 2)."""
    return np.stack([-np.abs(theta[:, 0] + theta[:, 1]), theta[:, 1] - theta[:, 0]], axis=-1) / np.sqrt(2)


def log_likelihood(theta: np.ndarray, x: np.ndarray) -> np.ndarray:
    """log p(x | theta), (N,): p has the density N(r; 0.1, 0.01^2) / (pi |r|), with the sign of r that of cos(a) r."""
    u, v = (x - shift(theta) - [CENTRE, 0]).T
    r = np.copysign(np.hypot(u, v), u)
    return standard_normal_log_prob((r - RADIUS) / WIDTH) - np.log(WIDTH * np.pi * np.abs(r))


def mass(x: np.ndarray) -> float:
    """The integral of p(x | theta) over the prior's square, to about 1e-5.

    With d = |theta_1 + theta_2| / sqrt(2), of either sign, d >= 0 and the square's edges bound r from both sides at each
    angle a; the Gaussian between the bounds is then averaged over a.
    """
    a = np.linspace(-np.pi / 2, np.pi / 2, 4096, endpoint=False) + np.pi / 8192
    slopes = np.stack([-np.cos(a), np.cos(a) - np.sin(a), np.cos(a) + np.sin(a)])
    edge = np.sqrt(2) - CENTRE + x[0]
    bounds = np.array([CENTRE - x[0], edge - x[1], edge + x[1]])[:, None] / slopes
    low = np.where(slopes < 0, bounds, -np.inf).max(0)
    high = np.where(slopes > 0, bounds, np.inf).min(0)
    value = 2 * np.maximum(ndtr((high - RADIUS) / WIDTH) - ndtr((low - RADIUS) / WIDTH), 0).mean()
    if value < 1e-6:
        raise ObservationError(f"two_moons: no theta in [-1, 1]^2 gives x = ({x[0]:g}, {x[1]:g}); take an x that it simulated")
    return float(value)


def posterior_log_prob(theta: np.ndarray, x: np.ndarray) -> np.ndarray:
    """log p(theta | x), (N,); -inf outside the prior's square."""
    return np.where(prior.contains(theta), log_likelihood(theta, x) - np.log(mass(x)), -np.inf)


def posterior_sampler(x: np.ndarray, n: int, rng: np.random.Generator) -> np.ndarray:
    """n exact draws of theta (n, 2): crescents turned back, one of the two modes each, kept where the prior allows."""
    kept = np.empty((0, 2))
    proposals = int(2 * n / mass(x)) + 100
    while len(kept) < n:
        p = crescent(proposals, rng)
        d, difference = p[:, 0] - x[0], x[1] - p[:, 1]
        total = d * rng.choice([-1, 1], proposals)
        theta = np.stack([total - difference, total + difference], axis=-1) / np.sqrt(2)
        kept = np.concatenate([kept, theta[(d >= 0) & prior.contains(theta)]])
    return kept[:n]


@simulator(
    prior=prior, x_shape=(2,), batched=True, x_labels=("x_1", "x_2"),
    log_likelihood=log_likelihood, posterior_log_prob=posterior_log_prob, posterior_sampler=posterior_sampler,
    citation="Greenberg, Nonnenmacher & Macke (2019), Automatic posterior transformation for likelihood-free inference, ICML",
)
def two_moons(theta: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    r"""A noisy half ring, shifted by theta: the posterior is two crescents.

    .. math::

        x &= \begin{pmatrix} r \cos a + 0.25 \\ r \sin a \end{pmatrix}
           + \frac{1}{\sqrt 2} \begin{pmatrix} -|\theta_1 + \theta_2| \\ -\theta_1 + \theta_2 \end{pmatrix}, \\
        a &\sim U(-\pi/2, \pi/2), \quad r \sim N(0.1, 0.01^2), \quad \theta \sim U(-1, 1)^2 .

    theta: (B, 2); x: (B, 2).
    """
    return crescent(len(theta), rng) + shift(theta)
