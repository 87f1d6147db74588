r"""The inspiral of two point masses without spin in the frequency domain (TaylorF2), and analytic curves of detector noise.

In the stationary-phase approximation the polarisations of the quadrupole at frequency f > 0 are

.. math:: \tilde h_+ = -\tfrac{1 + \cos^2 \iota}{2} A f^{-7/6} e^{-i \Psi}, \qquad
          \tilde h_\times = i \cos \iota \, A f^{-7/6} e^{-i \Psi}, \qquad
          A = \frac{c}{D_L} \sqrt{\tfrac{5}{24}} \, \pi^{-2/3} \Big( \frac{G \mathcal{M}}{c^3} \Big)^{5/6},

.. math:: \Psi = 2 \pi f t_c - \phi_c - \frac{\pi}{4} + \psi(f), \qquad
          \psi = \frac{3}{128 \eta} \sum_{k=0}^{7} \varphi_k v^{k-5}, \qquad v = (\pi G M f / c^3)^{1/3},

with the phase to 3.5 post-Newtonian orders (Buonanno et al., PRD 80, 084043, 2009, eq. 3.18) and the Newtonian amplitude, up to the
frequency of the innermost stable circular orbit of Schwarzschild's geometry, :math:`f_{ISCO} = c^3 / (6^{3/2} \pi G M)`. The parameter
`phase` is not :math:`\phi_c`, which lies outside of the band and is hardly measured, but the wave's phase :math:`\phi` at the moment when
its frequency is :math:`f_r` = 50 Hz,

.. math:: \phi_c = \phi + \psi(f_r) - f_r \psi'(f_r),

so that a shift of time moves t_c alone. The Fourier transform is :math:`\int h(t) e^{-2 \pi i f t} dt`: a later signal is multiplied by
:math:`e^{-2 \pi i f t}`. Masses are redshifted, in solar masses; M the
total one, :math:`\mathcal{M} = \eta^{3/5} M` the chirp mass, :math:`\eta = q / (1 + q)^2`.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]

LIGHT = 299_792_458.0  # m/s, exact (SI)
SUN = 1.3271244e20 / LIGHT**3  # s: the nominal solar mass parameter GM of IAU 2015 resolution B3, over c^3
MEGAPARSEC = 1e6 * 648_000 / math.pi * 149_597_870_700.0 / LIGHT  # s: IAU 2015 resolution B2 and 2012 resolution B2, over c
REFERENCE = 50.0  # Hz, f_r
_POWERS = (0, 2, 3, 4, 5, 6, 7)  # k of v^(k - 5); a point particle's phase has no k = 1


def total_mass(chirp_mass: Array, mass_ratio: Array) -> tuple[Array, Array]:
    """The total mass in solar masses, and the symmetric mass ratio eta."""
    eta = mass_ratio / (1.0 + mass_ratio) ** 2
    return chirp_mass * eta**-0.6, eta


def isco_frequency(total: Array) -> Array:
    """The frequency of the wave at the innermost stable circular orbit, Hz."""
    return 1.0 / (6.0**1.5 * math.pi * SUN * total)


def chirp_time(frequency: float, chirp_mass: float) -> float:
    """Seconds from a frequency to coalescence, at the leading order."""
    return 5.0 / 256.0 * (SUN * chirp_mass) ** (-5.0 / 3.0) * (math.pi * frequency) ** (-8.0 / 3.0)


def coefficients(eta: Array) -> tuple[dict[int, Array], dict[int, Array]]:
    """varphi_k of v^(k - 5) by k, and those of v^(k - 5) log v."""
    five = math.pi * (38645.0 / 756.0 - 65.0 / 9.0 * eta)
    six_log = -6848.0 / 21.0 + 0.0 * eta
    plain = {
        0: 1.0 + 0.0 * eta,
        2: 3715.0 / 756.0 + 55.0 / 9.0 * eta,
        3: -16.0 * math.pi + 0.0 * eta,
        4: 15293365.0 / 508032.0 + 27145.0 / 504.0 * eta + 3085.0 / 72.0 * eta**2,
        5: five,
        6: 11583231236531.0 / 4694215680.0 - 640.0 / 3.0 * math.pi**2 - 6848.0 / 21.0 * np.euler_gamma + six_log * math.log(4.0)
           + (2255.0 / 12.0 * math.pi**2 - 15737765635.0 / 3048192.0) * eta + 76055.0 / 1728.0 * eta**2 - 127825.0 / 1296.0 * eta**3,
        7: math.pi * (77096675.0 / 254016.0 + 378515.0 / 1512.0 * eta - 74045.0 / 756.0 * eta**2),
    }
    return plain, {5: 3.0 * five, 6: six_log}


def phase_basis(frequencies: Array) -> Array:
    """The functions of f (10, F) of which every phase is a sum: powers and logarithms, a constant among them, and f itself last."""
    u = frequencies / REFERENCE
    powers = [u ** ((k - 5) / 3.0) for k in _POWERS]
    return np.stack([*powers, np.log(u), np.cbrt(u) * np.log(u), u])


def phase_weights(chirp_mass: Array, mass_ratio: Array, t_c: Array, phase: Array) -> Array:
    """Psi as weights (B, 10) of `phase_basis`: of parameters (B,), t_c in seconds, phase in radians at the reference frequency."""
    total, eta = total_mass(chirp_mass, mass_ratio)
    v = np.cbrt(math.pi * SUN * total * REFERENCE)
    plain, logs = coefficients(eta)
    front = 3.0 / (128.0 * eta)
    of = {k: front * a * v ** (k - 5) for k, a in plain.items()}
    for k, a in logs.items():
        of[k] = of[k] + front * a * v ** (k - 5) * np.log(v)
    log_weights = [front * a * v ** (k - 5) / 3.0 for k, a in logs.items()]  # log v = log v_r + log(u) / 3
    at_reference = sum(of[k] * (1.0 - (k - 5) / 3.0) for k in _POWERS) - sum(log_weights)  # psi - f psi' at u = 1
    of[5] = of[5] - at_reference - phase - 0.25 * math.pi
    return np.stack([*(of[k] for k in _POWERS), *log_weights, 2.0 * math.pi * REFERENCE * t_c], axis=1)


def amplitude(chirp_mass: Array, distance: Array) -> Array:
    """A, in s^(-1/6), of chirp masses in solar masses and luminosity distances in Mpc."""
    return math.sqrt(5.0 / 24.0) * math.pi ** (-2.0 / 3.0) * (SUN * chirp_mass) ** (5.0 / 6.0) / (MEGAPARSEC * distance)


# --------------------------------------------------------------------------------------------------------- noise


def advanced_ligo(frequency: Array) -> Array:
    """One-sided noise power of Advanced LIGO's design, 1/Hz, above 20 Hz: the fit of Sathyaprakash & Schutz (Living Rev. Relativity 12, 2,
    2009, table 1)."""
    x2 = (np.asarray(frequency) / 215.0) ** 2
    return 1e-49 * (x2**-2.07 - 5.0 / x2 + 111.0 * (1.0 - x2 + 0.5 * x2**2) / (1.0 + 0.5 * x2))


def advanced_virgo(frequency: Array) -> Array:
    """One-sided noise power of Advanced Virgo's design, 1/Hz: the fit of Manzotti & Dietz (arXiv:1202.4031, 2012, eq. 6)."""
    x = np.log(np.asarray(frequency) / 300.0)
    root = (0.07 * np.exp(-0.142 - 1.437 * x + 0.407 * x**2) + 3.1 * np.exp(-0.466 - 1.043 * x - 0.548 * x**2)
            + 0.4 * np.exp(-0.304 + 2.896 * x - 0.293 * x**2) + 0.09 * np.exp(1.466 + 3.722 * x - 0.984 * x**2))
    return (1.259e-24 * root) ** 2
