r"""Scalings: parameters and data that change by powers of one factor,

.. math:: \theta_j \to \lambda^{a_j} \theta_j, \qquad x_k \to \lambda^{b_k} x_k.

An element is :math:`\log \lambda`. Exact only if the noise scales with the data. A prior that is flat under it is LogUniform.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from sbiplat.errors import SymmetryError
from sbiplat.lazy import Lazy
from sbiplat.symmetry.action import Fields, ReadyMade

if TYPE_CHECKING:
    import torch
    from torch import Tensor
else:
    torch = Lazy("torch")

Powers = tuple[tuple[str, float], ...]


class Rescaling(ReadyMade):
    """Base of scalings, of `parameter_powers` and `field_powers`; the first parameter is the pose."""

    parameter_powers: Powers
    field_powers: Powers

    @property
    def parameters(self) -> tuple[str, ...]:
        return tuple(name for name, _ in self.parameter_powers)

    @property
    def coordinates(self) -> tuple[str, ...]:
        return self.parameters[:1]

    def pose_of(self, theta: Tensor) -> Tensor:
        return theta[:, :1].log() / self.parameter_powers[0][1]

    def act_data(self, g: Tensor, x: Fields) -> Fields:
        moved = {k: x[k] * torch.exp(power * g[:, 0]).to(x[k]).reshape(-1, *[1] * (x[k].ndim - 1)) for k, power in self.field_powers}
        return {**x, **moved}

    def act_theta(self, g: Tensor, theta: Tensor) -> tuple[Tensor, Tensor]:
        powers = theta.new_tensor([power for _, power in self.parameter_powers])
        return theta * torch.exp(g * powers), g[:, 0] * powers.sum()

    def chart(self, theta: Tensor) -> tuple[Tensor, Tensor]:
        u = theta.log()
        return u, -u.sum(-1)

    def unchart(self, u: Tensor) -> Tensor:
        return u.exp()


@dataclass(frozen=True)
class Scaling(Rescaling):
    """A parameter above 0 and one field of x, both times the factor."""

    parameter: str
    field: str = "x"
    exact: bool = True

    @property
    def parameter_powers(self) -> Powers:
        return ((self.parameter, 1.0),)

    @property
    def field_powers(self) -> Powers:
        return ((self.field, 1.0),)


@dataclass(frozen=True)
class Units(Rescaling):
    """A change of units: parameters above 0 and fields of x, each times its power of the factor.

    parameter_powers: {"length": 1, "volume": 3}; not 0 for the first, which tells the scale. field_powers: the same for fields of x.
    """

    parameter_powers: Powers | Mapping[str, float]
    field_powers: Powers | Mapping[str, float]
    exact: bool = True

    def __post_init__(self) -> None:
        for name in ("parameter_powers", "field_powers"):
            object.__setattr__(self, name, _powers(name, getattr(self, name)))
        if self.parameter_powers[0][1] == 0:
            raise SymmetryError(f"parameter_powers: the first, {self.parameter_powers[0][0]!r}, tells the scale: its power cannot be 0")


def _powers(what: str, given: Any) -> Powers:
    """(name, power) of each, from a mapping or pairs; raises SymmetryError."""
    pairs = given.items() if isinstance(given, Mapping) else given
    try:
        found = tuple((name, float(power)) for name, power in pairs)
    except (TypeError, ValueError):
        found = ()
    if not found or not all(isinstance(n, str) and n and math.isfinite(p) for n, p in found) or len(dict(found)) < len(found):
        raise SymmetryError(f"{what} = {given!r}: expected powers by name, such as {{'length': 1, 'volume': 3}}")
    return found
