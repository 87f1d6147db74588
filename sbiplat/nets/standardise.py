r"""Standardisation of observations, robust to heavy tails and constant features.

Each feature is transformed as its simulator declares (none, log, asinh), centred by its median and scaled by its
interquartile range, then clipped softly,

.. math:: u = \frac{t(x) - \mathrm{median}}{\mathrm{IQR} / 1.349}, \qquad
          c(u) = u \ \text{for}\ |u| \le k, \quad \mathrm{sign}(u)\, \big(k + \log(1 + |u| - k)\big) \ \text{beyond},

so that one wild row in a bank neither sets the scale nor dominates a gradient, and order is kept. A feature with no
spread gets scale 1. Features along axes that an embedding treats alike (the elements of a set, the places of a signal) share theirs.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from sbiplat.errors import SettingError
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
    """x, a dict of (B, ...) tensors, to a dict of float32 tensors of order one.

    shared: field -> the axes of x over which one location and scale holds, () where each number has its own (as where a field is not
    named), None where only the declared transform is to be applied. masks: field -> the field that is 1 where its first axis
    holds something: the rest sets no scale. Masks themselves stay as they are.
    """

    def __init__(self, spec: ObservationSpec, shared: Mapping[str, tuple[int, ...] | None] | None = None,
                 masks: Mapping[str, str] | None = None) -> None:
        super().__init__()
        self.masks = dict(masks or {})
        self.transforms = {k: how for k, how in spec.transform.items() if k not in self.masks.values()}
        self.shared = {k: (shared or {}).get(k, ()) for k in self.transforms}
        dtype = getattr(torch, spec.dtype)  # x's own: a large offset goes before digits do
        for name in self.transforms:
            axes = self.shared[name] or ()
            size = tuple(1 if k in axes else n for k, n in enumerate(spec.shapes[name]))
            self.register_buffer(f"loc_{name}", torch.zeros(size, dtype=dtype))
            self.register_buffer(f"scale_{name}", torch.ones(size, dtype=dtype))

    def fit(self, x: dict[str, Tensor]) -> None:
        """Set location and scale from rows of the bank; raises SettingError where a mask is none, or leaves nothing of them."""
        for name, how in self.transforms.items():
            values = transform(x[name], how).cpu().numpy()
            axes = self.shared[name] or ()
            rows = np.moveaxis(values, [k + 1 for k in axes], range(1, len(axes) + 1))
            rows = rows.reshape(-1, *rows.shape[len(axes) + 1:])
            if name in self.masks:
                mask = x[self.masks[name]].cpu().numpy().reshape(-1)
                if not (mask == 1).any() or not np.isin(mask, (0, 1)).all():
                    raise SettingError(f"x's {self.masks[name]} must be 1 where {name} holds an element and 0 elsewhere; it holds "
                                       f"{', '.join(f'{v:g}' for v in np.unique(mask)[:3])}")
                rows = rows[mask == 1]
            loc, scale = robust_scale(rows)
            for kind, value in (("loc", loc), ("scale", scale)):
                buffer = getattr(self, f"{kind}_{name}")
                buffer.copy_(torch.as_tensor(value).reshape(buffer.shape))

    def forward(self, x: dict[str, Tensor]) -> dict[str, Tensor]:
        out = {}
        for name, value in x.items():
            if name in self.transforms:
                value = transform(value, self.transforms[name])
                if self.shared[name] is not None:
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
            if self.shared[name] is not None:
                scale = getattr(self, f"scale_{name}")
                excess = ((value - getattr(self, f"loc_{name}")) / scale).abs() - KNEE
                slope = slope - scale.log() - torch.log1p(excess.clamp_min(0))
            out[name] = slope
        return out
