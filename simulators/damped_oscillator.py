r"""Damped oscillator: the toy problem of GNPE, a kicked oscillator with an unknown time of the kick.

.. math:: \ddot s + 2 \beta \dot s + \omega_0^2 s = \sum_m \delta(t - \tau - m T), \qquad
          s(t) = \frac{1}{T} \sum_{|k| \leq K} H(w_k) \, e^{i w_k (t - \tau)}, \qquad
          H(w) = \frac{1}{\omega_0^2 - w^2 + 2 i \beta w}, \quad w_k = \frac{2 \pi k}{T} .

The oscillator is kicked each T = 20.1 s, and between two kicks it loses at least exp(-0.2 T) = 98 % of its amplitude: within the window it
looks as if it had been kicked once. It is sampled behind an ideal anti-aliasing filter, which keeps the harmonics below the Nyquist
frequency, at an odd number N = 2 K + 1 of times. So the sum is a trigonometric polynomial that its samples determine, the shift of the
samples by any time, a fraction of a step included, is an orthogonal matrix, and white noise stays white:

.. math:: p(T_g x \,|\, \omega_0, \beta, \tau + g) = p(x \,|\, \omega_0, \beta, \tau) \quad \text{exactly.}

What is not exact is the prior, whose edges in tau a shift may cross: this concerns x within a kernel's width of tau = -5 s or 0.

Source: Dax et al. (2022), Group equivariant neural posterior estimation, which has the oscillator and its three parameters. The
window, the filter, the noise and the priors' ranges are set here, so that the shift is exact.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from scipy.ndimage import maximum_filter

from sbiplat.lazy import Lazy
from sbiplat.prior import Prior, Uniform, standard_normal_log_prob
from sbiplat.simulator import simulator
from sbiplat.symmetry import TimeShift
from simulators.reference import Reference, clear, finite, modes

if TYPE_CHECKING:
    import torch
    from torch import Tensor
else:
    torch = Lazy("torch")

SAMPLES = 201
SPACING = 0.1  # s
PERIOD = SAMPLES * SPACING
TIMES = -5 + SPACING * np.arange(SAMPLES)
NOISE = 0.02
FREQUENCIES = 2 * np.pi * np.fft.rfftfreq(SAMPLES, SPACING)  # w_k >= 0, rad/s

prior = Prior({"omega_0": Uniform(3, 10, unit="rad/s"), "beta": Uniform(0.2, 0.5, unit="1/s"), "tau": Uniform(-5, 0, unit="s")})


def transfer(omega_0: np.ndarray, beta: np.ndarray) -> np.ndarray:
    """H(w_k) at the harmonics w_k >= 0, (N, 101)."""
    omega_0, beta = np.asarray(omega_0)[:, None], np.asarray(beta)[:, None]
    return 1 / (omega_0**2 - FREQUENCIES**2 + 2j * beta * FREQUENCIES)


def signal(theta: np.ndarray) -> np.ndarray:
    """s at TIMES, (N, 201)."""
    late = np.exp(1j * FREQUENCIES * (TIMES[0] - theta[:, 2:3]))
    return np.fft.irfft(transfer(theta[:, 0], theta[:, 1]) * late, SAMPLES) / SPACING


def log_likelihood(theta: np.ndarray, x: np.ndarray) -> np.ndarray:
    """log p(x | theta), (N,)."""
    residual = (np.asarray(x, float) - signal(theta)) / NOISE
    return -0.5 * (residual**2).sum(-1) - SAMPLES * np.log(NOISE * np.sqrt(2 * np.pi))


def rough_fits(x: np.ndarray, most: int = 6) -> np.ndarray:
    """theta (at most `most`, 3) where the likelihood is high on a grid: the peaks over tau, by FFT, at each omega_0 and beta."""
    omega_0, beta = (g.ravel() for g in np.meshgrid(np.arange(3.05, 10, 0.1), [0.23, 0.32, 0.45], indexing="ij"))
    filters = transfer(omega_0, beta)
    fine = 4 * SAMPLES
    correlation = np.fft.irfft(np.fft.rfft(np.asarray(x, float)) * filters.conj(), fine) * (fine / SAMPLES) / SPACING
    energy = (signal(np.stack([omega_0, beta, np.zeros_like(beta)], -1)) ** 2).sum(-1)
    gain = (correlation - energy[:, None] / 2) / NOISE**2
    gain = gain[:, : int(5 / SPACING * 4) + 1]  # tau from -5 s to 0
    best = np.maximum.reduceat(gain, np.arange(0, len(gain), 3))  # over beta
    peak = best == maximum_filter(best, 3, mode="nearest")
    rows, columns = np.nonzero(peak)
    first = np.argsort(-best[rows, columns])[:most]
    rows, columns = rows[first], columns[first]
    which = 3 * rows + np.array([gain[3 * r : 3 * r + 3, c].argmax() for r, c in zip(rows, columns, strict=True)])
    return np.stack([omega_0[which], beta[which], np.clip(TIMES[0] + columns * SPACING / 4, -4.99, -0.01)], -1)


def reference(x: np.ndarray, rng: np.random.Generator) -> Reference:
    """The exact posterior of z, the prior's normal coordinates."""
    x = finite(x, "damped_oscillator")

    def residuals(z: np.ndarray) -> np.ndarray:
        return np.append((signal(prior.constrain(z[None]))[0] - x) / NOISE, z)

    def log_density(z: np.ndarray) -> np.ndarray:
        return log_likelihood(prior.constrain(z), x) + standard_normal_log_prob(z).sum(-1)

    found = clear(modes(residuals, prior.unconstrain(rough_fits(x))), x, NOISE, "damped_oscillator")
    return Reference(log_density, found, rng, "damped_oscillator")


def posterior_sampler(x: np.ndarray, n: int, rng: np.random.Generator) -> np.ndarray:
    """n independent draws of theta (n, 3), exact as `reference.py` says."""
    return prior.constrain(reference(x, rng).sample(n, rng))


def posterior_log_prob(theta: np.ndarray, x: np.ndarray) -> np.ndarray:
    """log p(theta | x), (N,), its evidence by importance sampling to about 0.01; -inf outside the prior."""
    log_evidence = reference(x, np.random.default_rng(0)).log_evidence
    inside = prior.contains(theta)
    return np.where(inside, log_likelihood(theta, x) + prior.log_prob(theta) - log_evidence, -np.inf)


def noisy(signal: Tensor, theta: Tensor, rng: torch.Generator) -> Tensor:
    """x of signals s."""
    return signal + NOISE * torch.randn(signal.shape, generator=rng, dtype=signal.dtype, device=signal.device)


@simulator(
    prior=prior, observe=noisy, x_shape=(SAMPLES,), batched=True, x_axis=("t / s", TIMES), symmetry=TimeShift("tau", spacing=SPACING),
    log_likelihood=log_likelihood, posterior_log_prob=posterior_log_prob, posterior_sampler=posterior_sampler,
    citation="Dax et al. (2022), Group equivariant neural posterior estimation, ICLR",
)
def damped_oscillator(theta: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    r"""A damped oscillator kicked at an unknown time: shifts of time act on it exactly.

    .. math::

        \ddot s + 2 \beta \dot s + \omega_0^2 s &= \delta(t - \tau), \qquad x_j = s(t_j) + 0.02 \, \epsilon_j, \\
        \omega_0 &\sim U(3, 10) \text{ rad/s}, \quad \beta \sim U(0.2, 0.5) \text{ /s}, \quad \tau \sim U(-5, 0) \text{ s},

    at 201 times from -5 to 15 s, repeated with that period and free of aliases.

    The bank holds s, (B, 201), and noise is drawn afresh in every epoch. theta: (B, 3); x: (B, 201).
    """
    return signal(theta)
