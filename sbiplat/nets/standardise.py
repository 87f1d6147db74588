r"""Standardisation of observations, robust to heavy tails and constant features.

Each feature is transformed as its simulator declares (none, log, asinh), centred by its median and scaled by its
interquartile range, then clipped softly,

.. math:: u = \frac{t(x) - \mathrm{median}}{\mathrm{IQR} / 1.349}, \qquad
          c(u) = u \ \text{for}\ |u| \le k, \quad \mathrm{sign}(u)\, \big(k + \log(1 + |u| - k)\big) \ \text{beyond},

so that one wild row in a bank neither sets the scale nor dominates a gradient, and order is kept. A feature with no
spread gets scale 1.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from sbiplat.observation import ObservationSpec

KNEE = 5.0


def soft_clip(u: Tensor, knee: float = KNEE) -> Tensor:
    """The identity up to the knee, logarithmic beyond, with a continuous slope."""
    excess = (u.abs() - knee).clamp(0, 1e30)
    return u.clamp(-knee, knee) + u.sign() * torch.log1p(excess)


def robust_scale(values: NDArray[np.floating]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Median and IQR / 1.349 over the first axis; the standard deviation where the IQR is 0, and 1 where that is too."""
    values = np.asarray(values, float)
    low, middle, high = np.quantile(values, [0.25, 0.5, 0.75], axis=0)
    scale = (high - low) / 1.349
    tiny = 64 * np.finfo(float).eps * np.abs(middle)  # what rounding alone makes of a constant
    scale = np.where(scale > tiny, scale, values.std(0))
    return middle, np.where(scale > tiny, scale, 1.0)


def transform(x: Tensor, how: str) -> Tensor:
    """The declared transform, in the dtype of x (a float64 x keeps its range until it is transformed)."""
    if how == "log":
        return torch.log(x.clamp_min(torch.finfo(x.dtype).tiny))
    return torch.asinh(x) if how == "asinh" else x


class Standardise(nn.Module):
    """x, a dict of (B, ...) tensors, to a dict of float32 tensors of order one. `scale=False`: only the declared transforms."""

    def __init__(self, spec: ObservationSpec, scale: bool = True) -> None:
        super().__init__()
        self.transforms = dict(spec.transform)
        self.scale = scale
        dtype = getattr(torch, spec.dtype)  # x's own: a large offset goes before digits do
        for name, shape in spec.shapes.items():
            self.register_buffer(f"loc_{name}", torch.zeros(shape, dtype=dtype))
            self.register_buffer(f"scale_{name}", torch.ones(shape, dtype=dtype))

    def fit(self, x: dict[str, Tensor]) -> None:
        """Set location and scale from rows of the bank."""
        for name, how in self.transforms.items():
            loc, scale = robust_scale(transform(x[name], how).cpu().numpy())
            getattr(self, f"loc_{name}").copy_(torch.as_tensor(loc))
            getattr(self, f"scale_{name}").copy_(torch.as_tensor(scale))

    def forward(self, x: dict[str, Tensor]) -> dict[str, Tensor]:
        out = {}
        for name, how in self.transforms.items():
            value = transform(x[name], how)
            if self.scale:
                value = soft_clip((value - getattr(self, f"loc_{name}")) / getattr(self, f"scale_{name}"))
            out[name] = value.float()
        return out

    def log_slopes(self, x: dict[str, Tensor]) -> dict[str, Tensor]:
        """log |d out / d x| of every feature."""
        out = {}
        for name, how in self.transforms.items():
            value, slope = transform(x[name], how), torch.zeros_like(x[name])
            if how == "log":
                slope = -value
            elif how == "asinh":
                slope = -0.5 * torch.log1p(x[name].square())
            if self.scale:
                scale = getattr(self, f"scale_{name}")
                excess = ((value - getattr(self, f"loc_{name}")) / scale).abs() - KNEE
                slope = slope - scale.log() - torch.log1p(excess.clamp_min(0))
            out[name] = slope
        return out
