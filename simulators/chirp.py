r"""The inspiral of a compact binary in a network of gravitational-wave detectors, in two sizes: `chirp` and `chirp_full`.

x is strain in the frequency domain, whitened by the detectors' design noise. Detector d at f_k, in a bin :math:`\Delta_k` wide, has

.. math:: x_{dk} = s_{dk}(\theta) + n_{dk}, \qquad
          s_{dk} = \sqrt{\frac{4 \Delta_k}{S_d(f_k)}} \, \big( F_+^d \tilde h_+ + F_\times^d \tilde h_\times \big)(f_k) \,
                   e^{-2 \pi i f_k \tau_d},

with n of unit variance in the real and in the imaginary part: stationary Gaussian noise with the one-sided power spectrum S_d. So
the likelihood is Gaussian (Whittle's), and :math:`\rho^2 = \sum |s_{dk}|^2` is the square of the optimal signal-to-noise ratio of
matched filtering. See chirp_waveform.py for h and S, and chirp_detectors.py for the antenna patterns F and the delays :math:`\tau_d`.

Bins are as fine as the signal needs: at f, :math:`\Delta = 1/T` with T the shortest power of two of seconds that holds the
slowest chirp of the prior from f to its end (as in Vinciguerra, Veitch & Mandel, CQG 34, 115006, 2017). A bank holds the signals s;
noise is drawn at training time. Times are in seconds about a trigger time whose sidereal time is fixed.

Symmetry: a common shift of time, exact, whose pose is the arrival time at the first detector; beside it, approximate, the further
delay at each other one (Dax et al., PRL 127, 241103, 2021).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, partial
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

import sbiplat as sp
from sbiplat.lazy import Lazy
from sbiplat.symmetry import Product
from simulators.chirp_detectors import H1, L1, V1, ArrivalDelay, ArrivalTime, Detector, around_baseline
from simulators.chirp_posterior import Problem
from simulators.chirp_waveform import (
    advanced_ligo,
    advanced_virgo,
    amplitude,
    chirp_time,
    isco_frequency,
    phase_basis,
    phase_weights,
    total_mass,
)

if TYPE_CHECKING:
    import torch
    from torch import Tensor
else:
    torch = Lazy("torch")

Array = NDArray[np.float64]

MARGIN = 0.25  # s, of every band after the leading-order chirp time: higher orders, arrival times and t_c
ROWS = 4096  # rows at once: their phases fit in the cache


def bands(f_min: float, f_max: float, chirp_mass: float, shortest: float) -> tuple[Array, Array]:
    """Frequencies from f_min to below f_max, and the bins' widths, for signals of that chirp mass and heavier.

    No T is below `shortest`, a power of two.
    """

    def spacing(f: float) -> float:
        return 1.0 / max(shortest, 2.0 ** math.ceil(math.log2(chirp_time(f, chirp_mass) + MARGIN)))

    frequencies, widths = [f_min], [spacing(f_min)]
    while (f := frequencies[-1] + widths[-1]) < f_max:
        fits = spacing(f) if f % spacing(f) == 0.0 else widths[-1]  # a band begins on a frequency of its own grid
        frequencies.append(f)
        widths.append(fits)
    return np.array(frequencies), np.array(widths)


@dataclass(frozen=True)
class Network:
    """Detectors with their noise, and the frequencies at which x is kept."""

    detectors: tuple[Detector, ...]
    noise: tuple[Callable[[Array], Array], ...]
    f_min: float
    f_max: float
    chirp_mass: float
    shortest: float = 1.0

    @cached_property
    def bins(self) -> tuple[Array, Array]:
        """Frequencies and widths, (F,) each."""
        return bands(self.f_min, self.f_max, self.chirp_mass, self.shortest)

    @property
    def frequencies(self) -> Array:
        return self.bins[0]

    @property
    def shape(self) -> tuple[int, int, int]:
        """Of x: detectors, real and imaginary part, frequencies."""
        return len(self.detectors), 2, len(self.frequencies)

    @cached_property
    def _basis(self) -> Array:
        return phase_basis(self.frequencies)

    @cached_property
    def _envelope(self) -> Array:
        """f^(-7/6) sqrt(4 df / S), (detectors, F)."""
        f, df = self.bins
        return np.stack([f ** (-7.0 / 6.0) * np.sqrt(4.0 * df / noise(f)) for noise in self.noise])

    def symmetry(self) -> Product:
        """The common shift of time, and the delay of each detector after the first."""
        first, *others = self.detectors
        f = tuple(self.frequencies.tolist())
        return Product(ArrivalTime(first, f), *[ArrivalDelay(d, first, k, f) for k, d in enumerate(others, 1)])

    def signals(self, chirp_mass: Array, mass_ratio: Array, distance: Array, cos_inclination: Array, polarisation: Array, t_c: Array,
                phase: Array, ra: Array, sin_dec: Array, dtype: Any = np.float32) -> NDArray[Any]:
        """s (B, detectors, 2, F) of parameters (B,)."""
        out = np.empty((len(chirp_mass), *self.shape), dtype)
        for at in range(0, len(out), ROWS):
            rows = slice(at, at + ROWS)
            columns = (chirp_mass, mass_ratio, distance, cos_inclination, polarisation, t_c, phase, ra, sin_dec)
            self._fill(out[rows], *[c[rows] for c in columns])
        return out

    def _fill(self, out: NDArray[Any], chirp_mass: Array, mass_ratio: Array, distance: Array, cos_inclination: Array, polarisation: Array,
              t_c: Array, phase: Array, ra: Array, sin_dec: Array) -> None:
        size = amplitude(chirp_mass, distance)
        total, _ = total_mass(chirp_mass, mass_ratio)
        below = self.frequencies <= isco_frequency(total)[:, None]
        for k, detector in enumerate(self.detectors):
            plus, cross = detector.patterns(ra, sin_dec, polarisation)
            response = size * (-0.5 * (1.0 + cos_inclination**2) * plus + 1j * cos_inclination * cross)
            weights = phase_weights(chirp_mass, mass_ratio, t_c + detector.delay(ra, sin_dec), phase - np.angle(response))
            psi = weights @ self._basis
            envelope = np.abs(response)[:, None] * self._envelope[k] * below
            np.multiply(envelope, np.cos(psi), out=out[:, k, 0], casting="same_kind")
            np.multiply(envelope, -np.sin(psi), out=out[:, k, 1], casting="same_kind")


def detector_noise(signal: Tensor, theta: Tensor, rng: torch.Generator) -> Tensor:
    """x of signals s: unit white noise in every bin."""
    return signal + torch.randn(signal.shape, generator=rng, dtype=signal.dtype, device=signal.device)


def whittle(signals: Callable[..., NDArray[Any]]) -> Callable[[Array, NDArray[Any]], Array]:
    """log p(x | theta) of theta (N, D) and one x, for signals that are a function of theta."""

    def log_likelihood(theta: Array, x: NDArray[Any]) -> Array:
        out = np.empty(len(theta))
        for at in range(0, len(theta), ROWS):
            rest = (signals(theta[at:at + ROWS], np.float64) - np.asarray(x, float)).reshape(-1, np.size(x))
            out[at:at + ROWS] = -0.5 * np.einsum("nf,nf->n", rest, rest) - 0.5 * np.size(x) * math.log(2.0 * math.pi)
        return out

    return log_likelihood


CITATION = ("TaylorF2: Buonanno et al., PRD 80, 084043 (2009); GNPE: Dax et al., PRL 127, 241103 (2021); noise: Sathyaprakash & Schutz, "
            "Living Rev. Relativity 12, 2 (2009), Manzotti & Dietz, arXiv:1202.4031 (2012)")

# ------------------------------------------------------------------------------------------------ the small one

SMALL = Network((H1, L1), (advanced_ligo, advanced_ligo), f_min=30.0, f_max=128.0, chirp_mass=10.0)
COS_INCLINATION = math.cos(math.pi / 6.0)
POLARISATION = 0.0


def small_signals(theta: Array, dtype: Any = np.float32) -> NDArray[Any]:
    """s of theta (B, 7), with the inclination at 30 degrees and the polarisation angle at 0."""
    fixed = np.ones(len(theta))
    masses, sky = theta[:, :3].T, theta[:, 3:].T
    return SMALL.signals(*masses, COS_INCLINATION * fixed, POLARISATION * fixed, *sky, dtype=dtype)


SMALL_PRIOR = sp.Prior({
    "chirp_mass": sp.Uniform(10.0, 13.5, unit="Msun"),
    "mass_ratio": sp.Uniform(0.5, 1.0),
    "distance": sp.Uniform(400.0, 1200.0, unit="Mpc"),
    "t_c": sp.Uniform(-0.1, 0.1, unit="s"),
    "phase": sp.Uniform(0.0, 2.0 * math.pi, unit="rad"),
    "ra": sp.Uniform(0.0, 2.0 * math.pi, unit="rad"),
    "sin_dec": sp.Uniform(-1.0, 1.0),
})


def posterior_sampler(x: NDArray[Any], n: int, rng: np.random.Generator) -> Array:
    """n exact draws (n, 7) given x (2, 2, F): see chirp_posterior.py."""
    support = np.array([marginal.support for marginal in SMALL_PRIOR.law.marginals])
    sky = partial(around_baseline, *SMALL.detectors)
    return Problem(support, lambda theta: small_signals(theta, np.float64), SMALL.frequencies, sky).draw(np.asarray(x), n, rng)


@sp.simulator(
    prior=SMALL_PRIOR,
    x_shape=SMALL.shape,
    batched=True,
    observe=detector_noise,
    log_likelihood=whittle(small_signals),
    posterior_sampler=posterior_sampler,
    symmetry=SMALL.symmetry(),
    citation=CITATION,
)
def chirp(theta: Array, rng: np.random.Generator) -> NDArray[np.float32]:
    """A binary black hole's inspiral in two detectors, 30 to 128 Hz, at a fixed inclination and polarisation.

    theta (B, 7) -> whitened signals (B, 2, 2, F). All of the band lies below the last stable orbit of every mass in the prior.
    """
    return small_signals(theta)


# ------------------------------------------------------------------------------------------------- the full one

FULL = Network((H1, L1, V1), (advanced_ligo, advanced_ligo, advanced_virgo), f_min=20.0, f_max=512.0, chirp_mass=6.0)


def full_signals(theta: Array, dtype: Any = np.float32) -> NDArray[Any]:
    """s of theta (B, 9)."""
    return FULL.signals(*theta.T, dtype=dtype)


@sp.simulator(
    prior=sp.Prior({
        "chirp_mass": sp.Uniform(6.0, 12.0, unit="Msun"),
        "mass_ratio": sp.Uniform(0.25, 1.0),
        "distance": sp.Uniform(300.0, 1000.0, unit="Mpc"),
        "cos_inclination": sp.Uniform(-1.0, 1.0),
        "polarisation": sp.Uniform(0.0, 0.5 * math.pi, unit="rad"),
        "t_c": sp.Uniform(-0.1, 0.1, unit="s"),
        "phase": sp.Uniform(0.0, 2.0 * math.pi, unit="rad"),
        "ra": sp.Uniform(0.0, 2.0 * math.pi, unit="rad"),
        "sin_dec": sp.Uniform(-1.0, 1.0),
    }),
    x_shape=FULL.shape,
    batched=True,
    observe=detector_noise,
    log_likelihood=whittle(full_signals),
    symmetry=FULL.symmetry(),
    citation=CITATION,
)
def chirp_full(theta: Array, rng: np.random.Generator) -> NDArray[np.float32]:
    """A binary black hole's inspiral in three detectors, 20 to 512 Hz, with its orientation free.

    theta (B, 9) -> whitened signals (B, 3, 2, F). Turning the polarisation by pi/2 and the phase by pi changes nothing, so a
    quarter turn holds all polarisations.
    """
    return full_signals(theta)
