r"""What a group action is: a group that moves theta and x together.

.. math:: p(T_g x \,|\, g \theta) = p(x \,|\, \theta) \, |\det T_g|^{-1}

where it is exact, and about so where it is approximate. The pose p(theta) is the element that carries the standard pose to that of
theta, so that :math:`p(g \theta) = g \, p(\theta)`. A proxy is a blurred pose, :math:`\hat g = p(\theta) \exp(v)` with
:math:`v \sim N(0, \mathrm{diag}(\kappa^2))`: noise from the right, so that the kernel is equivariant,
:math:`K(h \hat g | h \theta) = K(\hat g | \theta)` (Dax et al., 2022). GNPE looks at x in the standard pose, :math:`T_{\hat g}^{-1} x`.

Arrays are torch's. Elements of the group and parameters are float64, g (B, S) and theta (B, k) in the user's units, with the columns
`parameters` in that order; x is a dict of fields (B, ...) as the simulator returns them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import fields
from typing import TYPE_CHECKING, Any

from sbiplat.errors import SymmetryError
from sbiplat.lazy import Lazy

if TYPE_CHECKING:
    import torch
    from torch import Tensor
else:
    torch = Lazy("torch")

Fields = dict[str, Any]  # name -> tensor (B, ...)


class GroupAction:
    """Base of actions. A subclass gives the group (identity, compose, inverse), how it acts (act_data, act_theta) and its coordinates
    (log, exp); what it leaves away is that of R^k acting on as many parameters.

    parameters: the columns of theta that it moves or that its pose is made of. coordinates: names of the P tangent coordinates, by which
    kernel widths are given. size: S, the numbers that hold an element. exact: whether the equation of the module holds; elsewhere it is
    approximate, and the net gets the proxy too. moves: whether act_theta moves theta; a derived pose that no motion of theta
    belongs to, such as arrival times from a sky position, is approximate and moves nothing. canonical: whether act_data also brings x to
    a standard form of what `scramble` leaves open, so that T_e x need not be x.
    """

    parameters: tuple[str, ...] = ()
    exact: bool = True
    moves: bool = True
    canonical: bool = False

    @property
    def coordinates(self) -> tuple[str, ...]:
        return self.parameters

    @property
    def size(self) -> int:
        return len(self.coordinates)

    @property
    def moved(self) -> tuple[str, ...]:
        """The parameters that act_theta moves: all, or with a derived pose those alone of them that it writes to."""
        return self.parameters if self.moves else ()

    @property
    def factors(self) -> tuple[GroupAction, ...]:
        """The actions that it is a product of: itself, where it is none."""
        return (self,)

    # ------------------------------------------------------------------------------------------------- the group

    def identity(self, count: int) -> Tensor:
        """(count, S)."""
        return torch.zeros(count, self.size, dtype=torch.float64)

    def compose(self, g: Tensor, h: Tensor) -> Tensor:
        """g h: first h acts, then g."""
        return g + h

    def inverse(self, g: Tensor) -> Tensor:
        return -g

    def exp(self, v: Tensor) -> Tensor:
        """The element (B, S) of tangent coordinates (B, P): any chart around the identity, with exp(0) the identity."""
        return v

    def log(self, g: Tensor) -> Tensor:
        """The coordinates (B, P) of an element nearest to 0: exp(log(g)) = g."""
        return g

    def stabiliser(self) -> Tensor:
        """The elements h (K, S), the identity first, for which p and p h are one pose: turns by 0 and pi of an ellipse."""
        return self.identity(1)

    def between(self, pose: Tensor, other: Tensor) -> Tensor:
        """The coordinates (B, P) of what carries a pose to another: the nearest to 0 over the stabiliser."""
        each = torch.stack([self.log(self.compose(self.inverse(pose), g)) for g in self._alike(other)])
        near = each.square().sum(-1).argmin(0)
        return each.gather(0, near[None, :, None].expand(1, -1, each.shape[-1]))[0]

    def _alike(self, pose: Tensor) -> list[Tensor]:
        """p h of poses (B, S), for each h of the stabiliser."""
        return [self.compose(pose, h.to(pose).expand_as(pose)) for h in self.stabiliser()] if len(self.stabiliser()) > 1 else [pose]

    def preimages(self, v: Tensor) -> Sequence[Tensor]:
        """The coordinates that give exp(v), with v among them; of a circle v + 2 pi k, as many as a kernel can reach."""
        return (v,)

    def log_volume(self, v: Tensor) -> Tensor:
        """log of the density of the group's left-invariant (Haar) measure in the coordinates v (B, P): (B,)."""
        return v.new_zeros(v.shape[:-1])

    # ----------------------------------------------------------------------------------------------- how it acts

    def pose_of(self, theta: Tensor) -> Tensor:
        """(B, S) of theta (B, k)."""
        return theta

    def act_data(self, g: Tensor, x: Fields) -> Fields:
        """T_g x, the same fields, shapes and dtypes."""
        raise NotImplementedError

    def orbits(self, x: Fields) -> Callable[[Tensor, Tensor], Fields]:
        """T_g x[owner] as a function of elements g (R, S) and of the rows of x, (R,), that they act on: where many act on few x, what
        does not depend on g may be computed once."""
        return lambda g, owner: self.act_data(g, {k: v[owner] for k, v in x.items()})

    def act_theta(self, g: Tensor, theta: Tensor) -> tuple[Tensor, Tensor]:
        """g theta (B, k), and log |det d(g theta) / d theta| (B,)."""
        return theta + g, theta.new_zeros(len(theta))

    def chart(self, theta: Tensor) -> tuple[Tensor, Tensor]:
        """u (B, k): the columns that it moves as numbers in R for a net to learn, of parameters near the standard pose, and the log of the
        determinant |du / d theta| over those columns, (B,). Columns that it does not move stay as they are."""
        return theta, theta.new_zeros(len(theta))

    def unchart(self, u: Tensor) -> Tensor:
        """The inverse of `chart`."""
        return u

    def scramble(self, x: Fields, generator: torch.Generator) -> Fields:
        """x moved at random by a symmetry that leaves theta and has no pose, where the action has one: the order of a set's elements."""
        return x

    # ------------------------------------------------------------------------------------------------- the kernel

    def blur(self, g: Tensor, widths: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Proxies of poses g (B, S): g h exp(v), v ~ N(0, diag(widths^2)), h any of the stabiliser."""
        noise = torch.randn(len(g), len(self.coordinates), generator=generator, dtype=g.dtype, device=g.device)
        alike = self._alike(g)
        if len(alike) > 1:
            which = torch.randint(len(alike), (1, len(g), 1), generator=generator, device=g.device)
            g = torch.stack(alike).gather(0, which.expand(1, -1, g.shape[-1]))[0]
        return self.compose(g, self.exp(noise * widths))

    def log_kernel(self, proxy: Tensor, pose: Tensor, widths: Tensor) -> Tensor:
        """log K(proxy | pose), (B,), over the group's left-invariant measure: positive everywhere."""
        alike = self._alike(pose)
        each = [(-0.5 * (w / widths).square() - widths.log() - 0.5 * math.log(2 * math.pi)).sum(-1) - self.log_volume(w)
                for p in alike for w in self.preimages(self.log(self.compose(self.inverse(p), proxy)))]
        return torch.logsumexp(torch.stack(each), 0) - math.log(len(alike))

    # ------------------------------------------------------------------------------------------------- to a file

    def to_json(self) -> dict[str, Any] | None:
        """What makes a ready-made action again without any code of a user's; None of a user's own."""
        return None


class ReadyMade(GroupAction):
    """An action that comes with sbiplat: a frozen dataclass, whose fields make it again."""

    def to_json(self) -> dict[str, Any] | None:
        if type(self).__module__.rpartition(".")[0] != __package__:
            return None  # a user's own, made out of a ready-made one
        return {"action": type(self).__name__, **{f.name: _plain(getattr(self, f.name)) for f in fields(self)}}


def _plain(value: Any) -> Any:
    return [_plain(v) for v in value] if isinstance(value, tuple) else value


def names_of(what: str, given: Any) -> tuple[str, ...]:
    """One name or several, all different, as a tuple; raises SymmetryError."""
    found = (given,) if isinstance(given, str) else tuple(given) if isinstance(given, tuple | list) else ()
    if not found or not all(isinstance(n, str) and n for n in found) or len(set(found)) < len(found):
        raise SymmetryError(f"{what} = {given!r}: expected a name, or different names")
    return found


def positive(what: str, value: Any) -> None:
    """Raises SymmetryError unless value is a number above 0."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
        raise SymmetryError(f"{what} = {value!r}: expected a number above 0")


def whole(what: str, value: Any) -> None:
    """Raises SymmetryError unless value is a whole number from 1."""
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise SymmetryError(f"{what} = {value!r}: expected a whole number from 1")
