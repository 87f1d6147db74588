r"""Detectors of gravitational waves on the turning earth: when and how strongly each sees a source, and the symmetries of time that follow.

A source in the direction n reaches the detector at r later than the earth's centre by :math:`-n \cdot r / c`, and its strain there is
:math:`F_+ h_+ + F_\times h_\times` with

.. math:: F_+ = D^{ij} (X_i X_j - Y_i Y_j), \qquad F_\times = D^{ij} (X_i Y_j + Y_i X_j), \qquad D = \tfrac12 (x \otimes x - y \otimes y),

x and y the directions of its arms and X, Y the axes of the wave, turned by the polarisation angle (Anderson, Brady, Creighton &
Flanagan, PRD 63, 042003, 2001, appendix B). All in the earth-fixed frame of WGS 84; wavelengths are long against the arms. The sidereal
time is fixed.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from sbiplat.lazy import Lazy
from sbiplat.symmetry import GroupAction
from sbiplat.symmetry.action import Fields
from sbiplat.symmetry.shift import on_channels, shift_spectrum
from simulators.chirp_waveform import LIGHT

if TYPE_CHECKING:
    import torch
    from torch import Tensor
else:
    torch = Lazy("torch")

Array = NDArray[np.float64]

SIDEREAL = 2.456504  # rad: Greenwich mean sidereal time of GPS 1126259462 (2015-09-14 09:50:45 UTC), when GW150914 arrived


@dataclass(frozen=True)
class Detector:
    """vertex: of the arms, in m from the earth's centre; x_arm, y_arm: unit vectors along them."""

    name: str
    vertex: tuple[float, float, float]
    x_arm: tuple[float, float, float]
    y_arm: tuple[float, float, float]

    @property
    def tensor(self) -> Array:
        """D, (3, 3)."""
        return 0.5 * (np.outer(self.x_arm, self.x_arm) - np.outer(self.y_arm, self.y_arm))

    def delay(self, ra: Any, sin_dec: Any, lib: Any = np) -> Any:
        """Seconds by which a wave arrives later than at the earth's centre; of arrays of numpy, or of `lib`."""
        return -sum(r * n for r, n in zip(self.vertex, direction(ra, sin_dec, lib), strict=True)) / LIGHT

    def patterns(self, ra: Array, sin_dec: Array, polarisation: Array) -> tuple[Array, Array]:
        """F_+ and F_x, (B,)."""
        x, y = wave_axes(ra, sin_dec, polarisation)
        d = self.tensor
        return (np.einsum("ij,ib,jb->b", d, x, x) - np.einsum("ij,ib,jb->b", d, y, y), 2.0 * np.einsum("ij,ib,jb->b", d, x, y))


# Vertices and arms: Anderson et al., LIGO-T980044 (2001), tables 1 and 2 (V1: of Virgo's survey), as LALDetectors.h has them.
H1 = Detector("H1", (-2161414.92636, -3834695.17889, 4600350.22664), (-0.22389266154, 0.79983062746, 0.55690487831),
              (-0.91397818574, 0.02609403989, -0.40492342125))
L1 = Detector("L1", (-74276.0447238, -5496283.71971, 3224257.01744), (-0.95457412153, -0.14158077340, -0.26218911324),
              (0.29774156894, -0.48791033647, -0.82054461286))
V1 = Detector("V1", (4546374.09900, 842989.697626, 4378576.96241), (-0.70045821479, 0.20848948619, 0.68256166277),
              (-0.05379255368, -0.96908180549, 0.24080451708))


def direction(ra: Any, sin_dec: Any, lib: Any = np) -> tuple[Any, Any, Any]:
    """The unit vector to the source in the earth-fixed frame; of arrays of numpy, or of `lib`."""
    cos_dec = lib.sqrt(1.0 - sin_dec**2)
    return cos_dec * lib.cos(ra - SIDEREAL), cos_dec * lib.sin(ra - SIDEREAL), sin_dec


def around_baseline(a: Detector, b: Detector, u: Array) -> Array:
    """(ra, sin_dec) (B, 2) of points u (B, 2) of the unit square, equal areas of the sky for equal areas: u_1 is linear in the delay
    between two detectors, u_2 the angle around their baseline."""
    axis = np.subtract(a.vertex, b.vertex)
    axis = axis / np.linalg.norm(axis)
    one = np.cross(axis, (0.0, 0.0, 1.0))
    one /= np.linalg.norm(one)
    cos, angle = 2.0 * u[:, :1] - 1.0, 2.0 * np.pi * u[:, 1:]
    n = cos * axis + np.sqrt(1.0 - cos**2) * (np.cos(angle) * one + np.sin(angle) * np.cross(axis, one))
    return np.stack([(np.arctan2(n[:, 1], n[:, 0]) + SIDEREAL) % (2.0 * np.pi), n[:, 2].clip(-1.0, 1.0)], 1)


def wave_axes(ra: Array, sin_dec: Array, polarisation: Array) -> tuple[Array, Array]:
    """X and Y, (3, B): west and north at the source as the earth sees it, turned by the polarisation angle."""
    longitude, cos_dec = ra - SIDEREAL, np.sqrt(1.0 - sin_dec**2)
    west = np.stack([np.sin(longitude), -np.cos(longitude), np.zeros_like(ra)])
    north = np.stack([-np.cos(longitude) * sin_dec, -np.sin(longitude) * sin_dec, cos_dec])
    cos, sin = np.cos(polarisation), np.sin(polarisation)
    return cos * west + sin * north, cos * north - sin * west


# ------------------------------------------------------------------------------------------------------ symmetries


@dataclass(frozen=True)
class ArrivalTime(GroupAction):
    """A common shift of time, exact: the pose is the time of coalescence at one detector, t_c + delay(ra, sin_dec); all detectors are
    shifted, and t_c with them.

    frequencies: (F,), Hz, of spectra x of shape (detectors, 2, F), real and imaginary parts.
    """

    detector: Detector
    frequencies: tuple[float, ...]

    parameters = ("t_c", "ra", "sin_dec")
    moved = ("t_c",)

    @property
    def coordinates(self) -> tuple[str, ...]:
        return (f"arrival_{self.detector.name}",)

    def pose_of(self, theta: Tensor) -> Tensor:
        t_c, ra, sin_dec = theta.unbind(-1)
        return (t_c + self.detector.delay(ra, sin_dec, torch))[:, None]

    def act_data(self, g: Tensor, x: Fields) -> Fields:
        return {**x, "x": shift_spectrum(x["x"], g[:, 0], _on(self.frequencies, x["x"]))}

    def act_theta(self, g: Tensor, theta: Tensor) -> tuple[Tensor, Tensor]:
        moved = torch.cat([theta[:, :1] + g, theta[:, 1:]], -1)
        return moved, theta.new_zeros(len(theta))


@dataclass(frozen=True)
class ArrivalDelay(GroupAction):
    """A shift of one detector's time alone, approximate: the pose is by how much later a wave arrives there than at the first one.

    It moves no parameter: another direction with that delay has other antenna patterns too, and none has one beyond the light-travel time.
    """

    detector: Detector
    first: Detector
    channel: int
    frequencies: tuple[float, ...]

    parameters = ("ra", "sin_dec")
    exact = False
    moves = False

    @property
    def coordinates(self) -> tuple[str, ...]:
        return (f"delay_{self.detector.name}",)

    def pose_of(self, theta: Tensor) -> Tensor:
        ra, sin_dec = theta.unbind(-1)
        return (self.detector.delay(ra, sin_dec, torch) - self.first.delay(ra, sin_dec, torch))[:, None]

    def act_data(self, g: Tensor, x: Fields) -> Fields:
        shifted = on_channels(x["x"], (self.channel,), -3, lambda s: shift_spectrum(s, g[:, 0], _on(self.frequencies, s)))
        return {**x, "x": shifted}

    def act_theta(self, g: Tensor, theta: Tensor) -> tuple[Tensor, Tensor]:
        return theta, theta.new_zeros(len(theta))


def _on(frequencies: tuple[float, ...], like: Tensor) -> Tensor:
    return torch.tensor(frequencies, dtype=torch.float64, device=like.device)
