r"""Shifts in time of sampled signals and of spectra,

.. math:: (T_t x)(s) = x(s - t), \qquad (T_t \tilde x)(f) = e^{-2 \pi i f t} \, \tilde x(f).

A series is shifted by its discrete Fourier transform, so it is periodic, and t need not be a whole number of samples: the group law
:math:`T_s T_t = T_{s + t}` holds to rounding, and :math:`T_t` is orthogonal, so that white noise (and any that is stationary on the
circle) keeps its law. With an even number of samples the highest frequency is real, and no continuous group can turn it: it stays as it
is. So a whole number of samples is a roll of the series but for the sign of that one frequency, of which a band-limited signal has
nothing.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from sbiplat.errors import SymmetryError
from sbiplat.lazy import Lazy
from sbiplat.symmetry.action import Fields, ReadyMade, positive

if TYPE_CHECKING:
    import torch
    from torch import Tensor
else:
    torch = Lazy("torch")


FEW_TURNS, FEW_OF_SERIES = 8.0, 64.0  # of which float32 leaves a fraction of a turn right to a millionth, and to a few


def shift_series(x: Tensor, t: Tensor, spacing: float) -> Tensor:
    """Series x (B, ..., T) later by t seconds, (B,) or as many leading axes of x as it has; `spacing`: seconds a sample."""
    return _later(torch.fft.rfft(x), t, x.shape[-1], spacing)


def _later(spectrum: Tensor, t: Tensor, samples: int, spacing: float) -> Tensor:
    """The series of a spectrum (B, ..., K), t seconds later."""
    cycles = torch.arange(spectrum.shape[-1], dtype=torch.float64, device=spectrum.device) / (samples * spacing)
    if samples % 2 == 0:
        cycles[-1] = 0.0
    cosine, sine = _phases(t, cycles, spectrum.real, FEW_OF_SERIES)
    return torch.fft.irfft(spectrum * torch.complex(cosine, -sine), n=samples)


def shift_spectrum(x: Tensor, t: Tensor, frequencies: Tensor) -> Tensor:
    """Spectra x (B, ..., 2, F), real and imaginary parts at the frequencies (F,), later by t seconds, (B,) or more leading axes of x."""
    real, imaginary = x.unbind(-2)
    cosine, sine = _phases(t, frequencies, real)
    return torch.stack([real * cosine + imaginary * sine, imaginary * cosine - real * sine], -2)


def _phases(t: Tensor, frequencies: Tensor, like: Tensor, few: float = FEW_TURNS) -> tuple[Tensor, Tensor]:
    """cos and sin of 2 pi f t in the dtype of `like` (B, ..., F); whole turns are taken off in float64 where they are many."""
    precision = torch.float32 if like.dtype == torch.float32 and _fewer(few, t, frequencies) else torch.float64
    t = t.to(like.device, precision)
    turns = t.reshape(*t.shape, *[1] * (like.ndim - t.ndim)) * frequencies.to(like.device, precision)
    angle = ((turns - turns.round()) * (2 * math.pi)).to(like.dtype)
    return angle.cos(), angle.sin()


def _fewer(turns: float, t: Tensor, frequencies: Tensor) -> bool:
    return not t.numel() or float(t.abs().max()) * float(frequencies.abs().max()) < turns


def on_channels(x: Tensor, channels: tuple[int, ...] | None, axis: int, function: Callable[[Tensor], Tensor]) -> Tensor:
    """x with `function` of some channels along a (negative) axis in their place; None: of all of x."""
    if channels is None:
        return function(x)
    at = torch.as_tensor(channels, device=x.device)
    return x.index_copy(axis, at, function(x.index_select(axis, at)))


def checked_channels(channels: Any) -> tuple[int, ...] | None:
    """Channels as a tuple of whole numbers from 0; raises SymmetryError."""
    if channels is None:
        return None
    found = tuple(channels) if isinstance(channels, tuple | list) else (channels,)
    if not found or not all(isinstance(c, int) and not isinstance(c, bool) and c >= 0 for c in found) or len(set(found)) < len(found):
        raise SymmetryError(f"channels = {channels!r}: expected different whole numbers from 0, the rows that are shifted")
    return found


@dataclass(frozen=True)
class TimeShift(ReadyMade):
    """theta + t, and series of the field, shape (..., T), later by t; `spacing`: seconds a sample.

    channels: the rows of (..., C, T) that are shifted, by default all.
    """

    parameter: str
    spacing: float
    field: str = "x"
    channels: tuple[int, ...] | None = None
    exact: bool = True

    def __post_init__(self) -> None:
        positive("spacing", self.spacing)
        object.__setattr__(self, "channels", checked_channels(self.channels))

    @property
    def parameters(self) -> tuple[str, ...]:
        return (self.parameter,)

    def act_data(self, g: Tensor, x: Fields) -> Fields:
        return {**x, self.field: on_channels(x[self.field], self.channels, -2, lambda s: shift_series(s, g[:, 0], self.spacing))}

    def orbits(self, x: Fields) -> Callable[[Tensor, Tensor], Fields]:
        if self.channels is not None:
            return super().orbits(x)
        series = x[self.field]
        spectrum = torch.fft.rfft(series)

        def moved(g: Tensor, owner: Tensor) -> Fields:
            rest = {k: v[owner] for k, v in x.items() if k != self.field}
            return {**rest, self.field: _later(spectrum[owner], g[:, 0], series.shape[-1], self.spacing)}

        return moved


@dataclass(frozen=True)
class SpectrumShift(ReadyMade):
    """theta + t, and spectra of the field, shape (..., 2, F), real and imaginary parts at f_min + k df, times exp(-2 pi i f t).

    channels: the rows of (..., C, 2, F) that are shifted, by default all.
    """

    parameter: str
    df: float
    f_min: float = 0.0
    field: str = "x"
    channels: tuple[int, ...] | None = None
    exact: bool = True

    def __post_init__(self) -> None:
        positive("df", self.df)
        object.__setattr__(self, "channels", checked_channels(self.channels))

    @property
    def parameters(self) -> tuple[str, ...]:
        return (self.parameter,)

    def act_data(self, g: Tensor, x: Fields) -> Fields:
        values = x[self.field]
        frequencies = self.f_min + self.df * torch.arange(values.shape[-1], dtype=torch.float64, device=values.device)
        return {**x, self.field: on_channels(values, self.channels, -3, lambda s: shift_spectrum(s, g[:, 0], frequencies))}
