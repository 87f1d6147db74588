"""Translations of R^k: parameters that add to every number of x alike."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from sbiplat.symmetry.action import Fields, GroupAction

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Translation(GroupAction):
    """theta + g and x + g: k parameters, and one field whose last axis has length k (k > 1), or of any shape (k = 1)."""

    parameters: tuple[str, ...]
    field: str = "x"
    exact: bool = True

    def act_data(self, g: Tensor, x: Fields) -> Fields:
        values = x[self.field]
        shift = g.to(values.dtype).reshape(len(g), *[1] * (values.ndim - 2), -1)
        return {**x, self.field: values + shift}

    def to_json(self) -> dict[str, Any]:
        return {"action": "Translation", "parameters": list(self.parameters), "field": self.field, "exact": self.exact}
