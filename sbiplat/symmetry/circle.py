r"""The circle: parameters that are angles.

An element is an angle of the whole group R / 2 pi, held in [-pi, pi). Where the data look the same after a turn by 2 pi / n (n = 2: an
ellipse), n elements give one pose: the parameter lies on [low, low + 2 pi / n), and the kernel is the mean over them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from sbiplat.errors import SymmetryError
from sbiplat.lazy import Lazy
from sbiplat.symmetry.action import ReadyMade, whole

if TYPE_CHECKING:
    import torch
    from torch import Tensor
else:
    torch = Lazy("torch")

TURNS = 3  # to either side, in the kernel's sum: all that a width up to pi can reach


def wrap(angle: Tensor, low: float = -math.pi, period: float = 2 * math.pi) -> Tensor:
    """The angle in [low, low + period)."""
    turned = torch.remainder(angle - low, period) + low
    return torch.where(turned < low + period, turned, torch.full_like(turned, low))


def whole_turns(v: Tensor) -> list[Tensor]:
    """v (B, P) and what whole turns make of its first coordinate, an angle."""
    return [torch.cat([v[..., :1] + 2 * math.pi * k, v[..., 1:]], -1) for k in range(-TURNS, TURNS + 1)]


def turned_pairs(x: Tensor, angle: Tensor, axis: int) -> Tensor:
    """x (B, ...), whose (negative) axis holds pairs, each turned by angle (B,): (a cos - b sin, a sin + b cos)."""
    a, b = x.unbind(axis)
    shape = (-1, *[1] * (a.ndim - 1))
    cosine, sine = angle.cos().to(x).reshape(shape), angle.sin().to(x).reshape(shape)
    return torch.stack([a * cosine - b * sine, a * sine + b * cosine], axis)


class Circle(ReadyMade):
    """Base of actions of one angle, with fields `parameter`, `low` and `fold` (n)."""

    parameter: str
    low: float
    fold: int

    def __post_init__(self) -> None:
        whole("fold", self.fold)
        if isinstance(self.low, bool) or not isinstance(self.low, int | float) or not math.isfinite(self.low):
            raise SymmetryError(f"low = {self.low!r}: expected a number, the smallest angle of {self.parameter!r}")

    @property
    def parameters(self) -> tuple[str, ...]:
        return (self.parameter,)

    @property
    def period(self) -> float:
        """Of the parameter."""
        return 2 * math.pi / self.fold

    def compose(self, g: Tensor, h: Tensor) -> Tensor:
        return wrap(g + h)

    def inverse(self, g: Tensor) -> Tensor:
        return wrap(-g)

    def exp(self, v: Tensor) -> Tensor:
        return wrap(v)

    def preimages(self, v: Tensor) -> Sequence[Tensor]:
        return whole_turns(v)

    def stabiliser(self) -> Tensor:
        return wrap(torch.arange(self.fold, dtype=torch.float64)[:, None] * self.period)

    def pose_of(self, theta: Tensor) -> Tensor:
        return wrap(theta)

    def act_theta(self, g: Tensor, theta: Tensor) -> tuple[Tensor, Tensor]:
        return wrap(theta + g, self.low, self.period), theta.new_zeros(len(theta))

    def chart(self, theta: Tensor) -> tuple[Tensor, Tensor]:
        return wrap(theta, -self.period / 2, self.period), theta.new_zeros(len(theta))

    def unchart(self, u: Tensor) -> Tensor:
        return wrap(u, self.low, self.period)
