r"""Rotations of space, SO(3), of vectors.

theta holds Euler angles zyz, :math:`R = R_z(\alpha) R_y(\beta) R_z(\gamma)`, with :math:`\cos \beta` for :math:`\beta`: uniform priors on
all three are Haar. Elements are unit quaternions (w, x, y, z), of which q and -q are one rotation. Coordinates are rotation
vectors v, in which Haar's measure, of total volume 8 pi^2 as that of the angles, has the density

.. math:: J(v) = \Big(\frac{\sin(|v| / 2)}{|v| / 2}\Big)^2 .

The rotations by v and by v + 2 pi k v / |v| are the same; the kernel sums over them. (So a Gaussian of v, wrapped, has at the identity an
integrable spike of relative size exp(-2 pi^2 / kappa^2): nothing for widths kappa below one.)
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from sbiplat.errors import SymmetryError
from sbiplat.lazy import Lazy
from sbiplat.symmetry.action import Fields, ReadyMade, names_of
from sbiplat.symmetry.circle import wrap

if TYPE_CHECKING:
    import torch
    from torch import Tensor
else:
    torch = Lazy("torch")

TINY = 1e-12


@dataclass(frozen=True)
class Rotation3D(ReadyMade):
    """parameters: alpha, cos beta and gamma, of the rotation that carries the standard pose to theirs; vectors (..., 3) of the field.

    low: the smallest alpha and the smallest gamma, each of a full turn.
    """

    parameters: tuple[str, ...]
    field: str = "x"
    low: tuple[float, ...] = (0.0, 0.0)
    exact: bool = True

    def __post_init__(self) -> None:
        object.__setattr__(self, "parameters", names_of("parameters", self.parameters))
        object.__setattr__(self, "low", tuple(self.low))
        if len(self.parameters) != 3:
            raise SymmetryError(f"parameters = {self.parameters!r}: expected three, alpha, cos beta and gamma")
        if len(self.low) != 2 or not all(isinstance(m, int | float) and math.isfinite(m) for m in self.low):
            raise SymmetryError(f"low = {self.low!r}: expected the smallest alpha and the smallest gamma")

    @property
    def coordinates(self) -> tuple[str, ...]:
        return tuple(f"{self.parameters[0]}:{axis}" for axis in "xyz")

    @property
    def size(self) -> int:
        return 4

    def identity(self, count: int) -> Tensor:
        return torch.tensor([[1.0, 0.0, 0.0, 0.0]], dtype=torch.float64).repeat(count, 1)

    def compose(self, g: Tensor, h: Tensor) -> Tensor:
        (a, u), (b, v) = (g[:, :1], g[:, 1:]), (h[:, :1], h[:, 1:])
        product = torch.cat([a * b - (u * v).sum(-1, keepdim=True), a * v + b * u + torch.linalg.cross(u, v)], -1)
        return product / product.norm(dim=-1, keepdim=True)

    def inverse(self, g: Tensor) -> Tensor:
        return torch.cat([g[:, :1], -g[:, 1:]], -1)

    def exp(self, v: Tensor) -> Tensor:
        half = v / 2
        size = half.square().sum(-1, keepdim=True).clamp(min=TINY**2).sqrt()
        return torch.cat([size.cos(), half * torch.sinc(size / math.pi)], -1)

    def log(self, g: Tensor) -> Tensor:
        g = torch.where(g[:, :1] < 0, -g, g)
        sine = g[:, 1:].square().sum(-1, keepdim=True).clamp(min=TINY**2).sqrt()
        return g[:, 1:] * (2 * torch.atan2(sine, g[:, :1]) / sine)

    def preimages(self, v: Tensor) -> Sequence[Tensor]:
        size = v.norm(dim=-1, keepdim=True)
        along = torch.where(size > TINY, v / size.clamp(min=TINY), v.new_tensor([0.0, 0.0, 1.0]))
        return [v if k == 0 else v + 2 * math.pi * k * along for k in range(-2, 3)]

    def log_volume(self, v: Tensor) -> Tensor:
        half = v.square().sum(-1).clamp(min=TINY**2).sqrt() / 2
        return 2 * torch.sinc(half / math.pi).abs().clamp(min=TINY).log()

    def pose_of(self, theta: Tensor) -> Tensor:
        alpha, gamma = theta[:, 0], theta[:, 2]
        cosine, sine = ((1 + theta[:, 1]) / 2).clamp(min=0).sqrt(), ((1 - theta[:, 1]) / 2).clamp(min=0).sqrt()
        plus, minus = (alpha + gamma) / 2, (alpha - gamma) / 2
        return torch.stack([cosine * plus.cos(), -sine * minus.sin(), sine * minus.cos(), cosine * plus.sin()], -1)

    def _angles(self, q: Tensor) -> Tensor:
        """theta (B, 3) of the rotation q."""
        w, x, y, z = q.unbind(-1)
        plus, minus = torch.atan2(z, w), torch.atan2(-x, y)
        cos_beta = (w.square() + z.square() - x.square() - y.square()).clamp(-1, 1)
        return torch.stack([wrap(plus + minus, self.low[0]), cos_beta, wrap(plus - minus, self.low[1])], -1)

    def act_data(self, g: Tensor, x: Fields) -> Fields:
        values = x[self.field]
        w, a, b, c = (g / g.norm(dim=-1, keepdim=True)).unbind(-1)
        matrix = torch.stack([
            1 - 2 * (b * b + c * c), 2 * (a * b - w * c), 2 * (a * c + w * b),
            2 * (a * b + w * c), 1 - 2 * (a * a + c * c), 2 * (b * c - w * a),
            2 * (a * c - w * b), 2 * (b * c + w * a), 1 - 2 * (a * a + b * b),
        ], -1).reshape(-1, 3, 3).to(values)
        turned = torch.einsum("bij,bnj->bni", matrix, values.reshape(len(g), -1, 3))
        return {**x, self.field: turned.reshape(values.shape)}

    def act_theta(self, g: Tensor, theta: Tensor) -> tuple[Tensor, Tensor]:
        return self._angles(self.compose(g, self.pose_of(theta))), theta.new_zeros(len(theta))

    def chart(self, theta: Tensor) -> tuple[Tensor, Tensor]:
        u = self.log(self.pose_of(theta))
        return u, -self.log_volume(u)

    def unchart(self, u: Tensor) -> Tensor:
        return self._angles(self.exp(u))
