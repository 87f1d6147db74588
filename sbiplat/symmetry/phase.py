"""Phases: complex amplitudes, held as pairs (real, imaginary), times exp(i m phi)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from sbiplat.errors import SymmetryError
from sbiplat.symmetry.action import Fields, whole
from sbiplat.symmetry.circle import Circle, turned_pairs

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Phase(Circle):
    """phi + angle on [low, low + 2 pi / fold), and pairs of the field times exp(i order angle).

    axis: the one, from behind, that holds real and imaginary parts: -1 of (..., 2), -2 of spectra (..., 2, F). order: m, such as 2 for
    the orbital phase of a quadrupole; with fold = m the parameter has the period of the data.
    """

    parameter: str
    field: str = "x"
    axis: int = -1
    order: int = 1
    low: float = -math.pi
    fold: int = 1
    exact: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        whole("order", self.order)
        if self.axis not in (-1, -2, -3):
            raise SymmetryError(f"axis = {self.axis!r}: expected -1, -2 or -3, the axis of real and imaginary parts")
        if self.order % self.fold:
            raise SymmetryError(f"fold = {self.fold}: the data must look the same after a turn by 2 pi / fold, so it must divide order = "
                                f"{self.order}")

    def act_data(self, g: Tensor, x: Fields) -> Fields:
        return {**x, self.field: turned_pairs(x[self.field], self.order * g[:, 0], self.axis)}
