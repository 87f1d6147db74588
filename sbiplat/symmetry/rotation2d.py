"""Rotations of the plane: of vectors, and of images about their centre."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from sbiplat.symmetry.action import Fields
from sbiplat.symmetry.circle import Circle, turned_pairs
from sbiplat.symmetry.images import check_sampling, warped

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Rotation2D(Circle):
    """An angle on [low, low + 2 pi / fold), and vectors (..., 2) of the field, turned by it."""

    parameter: str
    field: str = "x"
    low: float = -math.pi
    fold: int = 1
    exact: bool = True

    def act_data(self, g: Tensor, x: Fields) -> Fields:
        return {**x, self.field: turned_pairs(x[self.field], g[:, 0], -1)}


@dataclass(frozen=True)
class ImageRotation(Circle):
    """An angle on [low, low + 2 pi / fold), and images (..., H, W) of the field, turned by it about their centre, from the last axis to
    the one before. Approximate: images are interpolated ("bilinear" or "bicubic"), and what comes in from outside is made up by `padding`
    ("zeros", "border" or "reflection")."""

    parameter: str
    field: str = "x"
    low: float = -math.pi
    fold: int = 1
    mode: str = "bicubic"
    padding: str = "zeros"
    exact: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        check_sampling(self.mode, self.padding)

    def act_data(self, g: Tensor, x: Fields) -> Fields:
        angle = g[:, 0]
        return {**x, self.field: warped(x[self.field], angle, angle.new_zeros(len(angle), 2), self.mode, self.padding)}
