r"""Monotonic rational-quadratic splines (Durkan et al., 2019) in few passes over memory.

On [-c, c], cut into K bins, and with :math:`\xi \in [0, 1]` the place of x in its bin of width w, height h, slope s = h / w and
derivatives :math:`d_0, d_1` at its ends,

.. math:: y = y_0 + h \, \frac{s \xi^2 + d_0 \xi (1 - \xi)}{s + (d_0 + d_1 - 2 s) \, \xi (1 - \xi)},

and y = x outside. Of the net's parameters, each drawn towards zero by :math:`u \to u / (1 + |u| / r)`, widths and heights are softmaxes
and derivatives exponentials; those at the ends are 1. This is the map of `zuko.transforms.MonotonicRQSTransform`, parameter by parameter,
and `tests/nets/test_spline.py` holds it against that. What differs is the order of the work. Bins lie on the first axis, so that every
operation of an inverse runs along contiguous rows (torch's softmax over 8 numbers that lie side by side took a third of the time);
sums stay unnormalised until a bin's ends have been picked; and of the derivatives only those at these ends are made.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.distributions import Transform, constraints

BOUND = 5.0
LOG_SLOPE = -math.log(1e-3)  # slopes lie within e^-r .. e^r


def shapes(bins: int) -> list[tuple[int, ...]]:
    """Of the parameters of one coordinate: widths and heights, and the inner derivatives."""
    return [(2, bins), (bins - 1,)]


class Spline(Transform):
    """The spline of parameters bins (..., 2, K) and derivatives (..., K - 1), elementwise on (...)."""

    domain = constraints.real
    codomain = constraints.real
    bijective = True
    sign = +1

    def __init__(self, bins: Tensor, derivatives: Tensor) -> None:
        super().__init__()
        self.sizes = _towards_zero(bins.movedim((-2, -1), (0, 1)), LOG_SLOPE / 2).exp()  # (2, K, ...): widths and heights times `scale`
        self.ends = self.sizes.cumsum(1)
        self.scale = self.ends[:, -1] * (0.5 / BOUND)
        inner = derivatives.movedim(-1, 0)
        edge = torch.zeros_like(inner[:1])
        self.derivatives = torch.cat([edge, inner, edge])

    def _call(self, x: Tensor) -> Tensor:
        return self.call_and_ladj(x)[0]

    def log_abs_det_jacobian(self, x: Tensor, y: Tensor) -> Tensor:
        return self.call_and_ladj(x)[1]

    def call_and_ladj(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """y and log dy/dx, each (...)."""
        inside = x.abs() < BOUND
        xi, _, _, y0, h, s, d0, q = self._bin(x, 0)
        across = xi * (1 - xi)
        below = s + q * across
        y = (y0 + h * (s * xi.square() + d0 * across) / below) / self.scale[1]
        steep = s.square() * (d0 + 2 * (s - d0) * xi + q * xi.square()) / below.square()
        return torch.where(inside, y, x), torch.where(inside, steep, 1.0).log()

    def _inverse(self, y: Tensor) -> Tensor:
        r"""The root of :math:`(s - b) \xi^2 + b \xi - c = 0` in [0, 1], with b = d_0 - q eta, c = s eta and eta the place in the height."""
        eta, x0, w, _, _, s, d0, q = self._bin(y, 1)
        b = d0 - q * eta
        c = s * eta
        a = s - b
        root = b.abs() + (b.square() + 4 * a * c).sqrt()  # real, also when rounded: c <= s, and then b^2 + 4 (s - b) c >= (b - 2 s)^2
        xi = torch.where(b > 0, 2 * c / root, 0.5 * root / a)  # of two forms, the one in which nothing cancels
        x = (x0 + xi * w) / self.scale[0]
        return torch.where(y.abs() < BOUND, x, y)

    def _bin(self, value: Tensor, side: int) -> tuple[Tensor, ...]:
        r"""The bin of a value along the given side (0: x, 1: y): the place in it, in [0, 1]; its start and length in x and in y, in units
        of `sizes` with 0 in the middle; and s, d_0 and q = d_0 + d_1 - 2 s."""
        half = 0.5 * self.ends[:, -1]
        total = value * self.scale[side]
        k = (self.ends[side, :-1] < total + half[side]).sum(0)
        both = k.expand(2, 1, *k.shape)
        length = self.sizes.expand(-1, -1, *k.shape).gather(1, both).squeeze(1)
        start = self.ends.expand(-1, -1, *k.shape).gather(1, both).squeeze(1) - length - half
        d0, d1 = _towards_zero(self.derivatives.expand(-1, *k.shape).gather(0, torch.stack([k, k + 1])), LOG_SLOPE).exp()
        s = length[1] / length[0] * (self.scale[0] / self.scale[1])
        place = ((total - start[side]) / length[side]).clamp(0, 1)  # rounding must not lead out of the bin
        return place, start[0], length[0], start[1], length[1], s, d0, d0 + d1 - 2 * s


def _towards_zero(u: Tensor, limit: float) -> Tensor:
    return u / (1 + u.abs() / limit)
