r"""Motions of the plane, SE(2), of images: a position angle and a centre.

.. math:: (a, t) (b, s) = (a + b, \; R(a) s + t)

Turning an image about its centre moves a galaxy's centre too, so the product is semidirect. The measure da dt is Haar, on both sides.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from sbiplat.errors import SymmetryError
from sbiplat.lazy import Lazy
from sbiplat.symmetry.action import Fields, ReadyMade, names_of, positive, whole
from sbiplat.symmetry.circle import whole_turns, wrap
from sbiplat.symmetry.images import check_sampling, warped

if TYPE_CHECKING:
    import torch
    from torch import Tensor
else:
    torch = Lazy("torch")


@dataclass(frozen=True)
class Euclidean2(ReadyMade):
    """parameters: the position angle, on [low, low + 2 pi / fold) (fold = 2: an ellipse), and the centre's X and Y; images (..., H, W).

    pixel: a pixel's size in the centre's unit. middle: the X and Y of the image's centre in it. X goes along the last axis, Y along the
    one before, the angle from X to Y. Approximate: images are interpolated by `mode`, and what comes in from outside is made up by
    `padding` (see ImageRotation).
    """

    parameters: tuple[str, ...]
    field: str = "x"
    pixel: float = 1.0
    middle: tuple[float, ...] = (0.0, 0.0)
    low: float = -math.pi
    fold: int = 1
    mode: str = "bicubic"
    padding: str = "zeros"
    exact: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "parameters", names_of("parameters", self.parameters))
        object.__setattr__(self, "middle", tuple(self.middle))
        if len(self.parameters) != 3:
            raise SymmetryError(f"parameters = {self.parameters!r}: expected three, the angle and the centre's X and Y")
        if len(self.middle) != 2 or not all(isinstance(m, int | float) and math.isfinite(m) for m in self.middle):
            raise SymmetryError(f"middle = {self.middle!r}: expected the X and Y of the image's centre")
        positive("pixel", self.pixel)
        whole("fold", self.fold)
        check_sampling(self.mode, self.padding)

    @property
    def period(self) -> float:
        """Of the angle."""
        return 2 * math.pi / self.fold

    def compose(self, g: Tensor, h: Tensor) -> Tensor:
        return torch.cat([wrap(g[:, :1] + h[:, :1]), _turned(g[:, 0], h[:, 1:]) + g[:, 1:]], -1)

    def inverse(self, g: Tensor) -> Tensor:
        return torch.cat([wrap(-g[:, :1]), -_turned(-g[:, 0], g[:, 1:])], -1)

    def exp(self, v: Tensor) -> Tensor:
        return torch.cat([wrap(v[:, :1]), v[:, 1:]], -1)

    def preimages(self, v: Tensor) -> Sequence[Tensor]:
        return whole_turns(v)

    def stabiliser(self) -> Tensor:
        angles = wrap(torch.arange(self.fold, dtype=torch.float64)[:, None] * self.period)
        return torch.cat([angles, torch.zeros(self.fold, 2, dtype=torch.float64)], -1)

    def pose_of(self, theta: Tensor) -> Tensor:
        return torch.cat([wrap(theta[:, :1]), theta[:, 1:] - theta.new_tensor(self.middle)], -1)

    def act_data(self, g: Tensor, x: Fields) -> Fields:
        return {**x, self.field: warped(x[self.field], g[:, 0], g[:, 1:] / self.pixel, self.mode, self.padding)}

    def act_theta(self, g: Tensor, theta: Tensor) -> tuple[Tensor, Tensor]:
        middle = theta.new_tensor(self.middle)
        centre = _turned(g[:, 0], theta[:, 1:] - middle) + g[:, 1:] + middle
        return torch.cat([wrap(theta[:, :1] + g[:, :1], self.low, self.period), centre], -1), theta.new_zeros(len(theta))

    def chart(self, theta: Tensor) -> tuple[Tensor, Tensor]:
        angle = wrap(theta[:, :1], -self.period / 2, self.period)
        return torch.cat([angle, theta[:, 1:] - theta.new_tensor(self.middle)], -1), theta.new_zeros(len(theta))

    def unchart(self, u: Tensor) -> Tensor:
        return torch.cat([wrap(u[:, :1], self.low, self.period), u[:, 1:] + u.new_tensor(self.middle)], -1)


def _turned(angle: Tensor, points: Tensor) -> Tensor:
    """Points (B, 2) turned by angle (B,)."""
    cosine, sine, (a, b) = angle.cos(), angle.sin(), points.unbind(-1)
    return torch.stack([cosine * a - sine * b, sine * a + cosine * b], -1)
