"""Products of actions that commute."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from sbiplat.errors import SymmetryError
from sbiplat.lazy import Lazy
from sbiplat.symmetry.action import Fields, GroupAction

if TYPE_CHECKING:
    import torch
    from torch import Tensor
else:
    torch = Lazy("torch")


class Product(GroupAction):
    """The direct product: each factor acts with its own part of g, the last one first (so that a Permutation, which sorts, is given first).

    Factors may share parameters of which poses are made, but at most one moves a parameter; a factor's pose must not change when another
    acts (an arrival-time difference under a common shift of time).
    """

    def __init__(self, *factors: GroupAction) -> None:
        if wrong := next((f for f in factors if not isinstance(f, GroupAction)), None):
            raise SymmetryError(f"a Product is of actions, got {wrong!r}")
        self._factors = tuple(part for f in factors for part in f.factors)
        self.parameters = tuple(dict.fromkeys(p for f in self._factors for p in f.parameters))
        self._columns = [[self.parameters.index(p) for p in f.parameters] for f in self._factors]
        self.exact = all(f.exact for f in self._factors)
        self.moves = any(f.moves for f in self._factors)
        self.canonical = any(f.canonical for f in self._factors)
        if not self._factors:
            raise SymmetryError("a Product needs at least one action")
        if twice := next((c for c in self.coordinates if self.coordinates.count(c) > 1), None):
            raise SymmetryError(f"two factors of a Product have a coordinate {twice!r}: each moves or measures something else")

    def __repr__(self) -> str:
        return f"Product({', '.join(map(repr, self._factors))})"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Product) and self._factors == other._factors

    def __hash__(self) -> int:
        return hash(self._factors)

    @property
    def factors(self) -> tuple[GroupAction, ...]:
        return self._factors

    @property
    def coordinates(self) -> tuple[str, ...]:
        return tuple(c for f in self._factors for c in f.coordinates)

    @property
    def moved(self) -> tuple[str, ...]:
        return tuple(p for f in self._factors for p in f.moved)

    @property
    def size(self) -> int:
        return sum(f.size for f in self._factors)

    def _elements(self, g: Tensor) -> Sequence[Tensor]:
        return g.split([f.size for f in self._factors], dim=-1)

    def _tangents(self, v: Tensor) -> Sequence[Tensor]:
        return v.split([len(f.coordinates) for f in self._factors], dim=-1)

    def identity(self, count: int) -> Tensor:
        return torch.cat([f.identity(count) for f in self._factors], -1)

    def compose(self, g: Tensor, h: Tensor) -> Tensor:
        return torch.cat([f.compose(a, b) for f, a, b in zip(self._factors, self._elements(g), self._elements(h), strict=True)], -1)

    def inverse(self, g: Tensor) -> Tensor:
        return torch.cat([f.inverse(a) for f, a in zip(self._factors, self._elements(g), strict=True)], -1)

    def exp(self, v: Tensor) -> Tensor:
        return torch.cat([f.exp(a) for f, a in zip(self._factors, self._tangents(v), strict=True)], -1)

    def log(self, g: Tensor) -> Tensor:
        return torch.cat([f.log(a) for f, a in zip(self._factors, self._elements(g), strict=True)], -1)

    def preimages(self, v: Tensor) -> Sequence[Tensor]:
        each = [f.preimages(a) for f, a in zip(self._factors, self._tangents(v), strict=True)]
        return [torch.cat(parts, -1) for parts in itertools.product(*each)]

    def stabiliser(self) -> Tensor:
        return torch.stack([torch.cat(parts) for parts in itertools.product(*(f.stabiliser() for f in self._factors))])

    def between(self, pose: Tensor, other: Tensor) -> Tensor:
        parts = zip(self._factors, self._elements(pose), self._elements(other), strict=True)
        return torch.cat([f.between(a, b) for f, a, b in parts], -1)

    def log_volume(self, v: Tensor) -> Tensor:
        return sum(f.log_volume(a) for f, a in zip(self._factors, self._tangents(v), strict=True))

    def log_kernel(self, proxy: Tensor, pose: Tensor, widths: Tensor) -> Tensor:
        parts = zip(self._factors, self._elements(proxy), self._elements(pose), self._tangents(widths), strict=True)
        return sum(f.log_kernel(a, b, w) for f, a, b, w in parts)

    def pose_of(self, theta: Tensor) -> Tensor:
        return torch.cat([f.pose_of(theta[:, c]) for f, c in zip(self._factors, self._columns, strict=True)], -1)

    def act_data(self, g: Tensor, x: Fields) -> Fields:
        for f, a in reversed(list(zip(self._factors, self._elements(g), strict=True))):
            x = f.act_data(a, x)
        return x

    def act_theta(self, g: Tensor, theta: Tensor) -> tuple[Tensor, Tensor]:
        total = theta.new_zeros(len(theta))
        for f, a, c in zip(self._factors, self._elements(g), self._columns, strict=True):
            if f.moves:
                moved, log_det = f.act_theta(a, theta[:, c])
                theta, total = theta.index_copy(1, torch.as_tensor(c, device=theta.device), moved), total + log_det
        return theta, total

    def scramble(self, x: Fields, generator: torch.Generator) -> Fields:
        for f in self._factors:
            x = f.scramble(x, generator)
        return x

    def chart(self, theta: Tensor) -> tuple[Tensor, Tensor]:
        total = theta.new_zeros(len(theta))
        for f, c in zip(self._factors, self._columns, strict=True):
            if f.moves:
                u, log_det = f.chart(theta[:, c])
                theta, total = theta.index_copy(1, torch.as_tensor(c, device=theta.device), u), total + log_det
        return theta, total

    def unchart(self, u: Tensor) -> Tensor:
        for f, c in zip(self._factors, self._columns, strict=True):
            if f.moves:
                u = u.index_copy(1, torch.as_tensor(c, device=u.device), f.unchart(u[:, c]))
        return u

    def to_json(self) -> dict[str, Any] | None:
        parts = [f.to_json() for f in self._factors]
        return None if type(self) is not Product or any(p is None for p in parts) else {"action": "Product", "factors": parts}
