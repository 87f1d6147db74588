"""Sets: data whose elements come in no order.

Every order is as likely, p(pi x | theta) = p(x | theta), and no parameter tells the order: there is no pose, no proxy and no kernel,
only a standard form. act_data sorts the elements by a key, whatever the group's element (there are 0 numbers in it), so that a net sees
one order of many. The sorted elements are sufficient. The contract check shuffles simulations to see whether they are a set.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from sbiplat.errors import SymmetryError
from sbiplat.lazy import Lazy
from sbiplat.symmetry.action import Fields, ReadyMade, names_of

if TYPE_CHECKING:
    import torch
    from torch import Tensor
else:
    torch = Lazy("torch")


@dataclass(frozen=True)
class Permutation(ReadyMade):
    """fields: those that share the order, such as places and sizes of the same objects. axis: theirs of the elements, counted from 0 after
    the rows. by: the number of the key within an element of the first field, once flattened; equal keys keep their order."""

    fields: tuple[str, ...] = ("x",)
    axis: int = 0
    by: int = 0

    parameters = ()
    exact = True
    moves = False
    canonical = True

    def __post_init__(self) -> None:
        object.__setattr__(self, "fields", names_of("fields", self.fields))
        for name in ("axis", "by"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 0:
                raise SymmetryError(f"{name} = {value!r}: expected a whole number from 0")

    def act_data(self, g: Tensor, x: Fields) -> Fields:
        elements = x[self.fields[0]].movedim(1 + self.axis, 1)
        keys = elements.reshape(*elements.shape[:2], -1)
        if self.by >= keys.shape[-1]:
            raise SymmetryError(f"by = {self.by}: an element of {self.fields[0]!r} has {keys.shape[-1]} numbers, counted from 0")
        return self._ordered(x, keys[..., self.by].argsort(dim=1, stable=True))

    def scramble(self, x: Fields, generator: torch.Generator) -> Fields:
        first = x[self.fields[0]]
        keys = torch.rand(len(first), first.shape[1 + self.axis], generator=generator, device=first.device)
        return self._ordered(x, keys.argsort(dim=1))

    def _ordered(self, x: Fields, order: Tensor) -> Fields:
        """The elements of all fields in the order (B, n)."""
        moved = {}
        for name in self.fields:
            elements = x[name].movedim(1 + self.axis, 1)
            index = order.reshape(*order.shape, *[1] * (elements.ndim - 2)).expand(elements.shape)
            moved[name] = elements.gather(1, index).movedim(1, 1 + self.axis)
        return {**x, **moved}
