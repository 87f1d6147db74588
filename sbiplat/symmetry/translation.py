"""Translations of R^k: parameters that add to every number of x alike."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from sbiplat.symmetry.action import Fields, ReadyMade, names_of

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Translation(ReadyMade):
    """theta + g and x + g: k parameters, and one field whose last axis has length k (k > 1), or of any shape (k = 1)."""

    parameters: tuple[str, ...]
    field: str = "x"
    exact: bool = True

    def __post_init__(self) -> None:
        object.__setattr__(self, "parameters", names_of("parameters", self.parameters))

    def act_data(self, g: Tensor, x: Fields) -> Fields:
        values = x[self.field]
        shift = g.to(values).reshape(len(g), *[1] * (values.ndim - 2), -1)
        return {**x, self.field: values + shift}
