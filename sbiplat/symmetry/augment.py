r"""Equivariant augmentation: rows (theta, x) moved at random by a group, so that their law p(theta) p(x | theta) stays as it is.

A row is moved by one Metropolis step over the group. h is drawn from a law that is the same for h and its inverse, and

.. math:: (\theta, x) \to (h \theta, T_h x) \quad \text{with probability} \quad
          \min\Big(1, \frac{p(h \theta)}{p(\theta)} \Big| \frac{\partial h \theta}{\partial \theta} \Big| \Big) ,

else it stays. Where the action is exact, p(T_h x | h theta) |det T_h| = p(x | theta), so the likelihood cancels in the ratio of
Metropolis, and x is moved once h is accepted. h is exp(v), v normal, or as often the inverse of that: symmetric for any chart exp.

The standard deviation of v is :math:`2.38 / \sqrt{P}` of the prior's spread of the pose, for P coordinates: for a normal law the step that
goes farthest in the mean square (Gelman, Roberts and Gilks, 1996). On a circle or a rotation group this is uniform, nearly.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from sbiplat.errors import SettingError
from sbiplat.nets.standardise import robust_scale
from sbiplat.prior import Prior
from sbiplat.symmetry.action import Fields, GroupAction
from sbiplat.symmetry.frame import Frame
from sbiplat.symmetry.product import Product

STEP = 2.38
ROWS = 4096  # draws of the prior, of which the spread and the acceptance are measured
_SEED = 0xA06


@dataclass(frozen=True)
class Augmentation:
    """frame: of the exact factors that move theta; its widths are the proposal's. acceptance: the share of proposals that are accepted over
    the prior. sets: the factors that leave theta, whose elements are put in random order. left: coordinates of approximate factors, by
    which nothing is moved."""

    frame: Frame
    acceptance: float
    sets: tuple[GroupAction, ...]
    left: tuple[str, ...]

    @classmethod
    def of(cls, action: GroupAction, prior: Prior) -> Augmentation:
        """By the exact factors of an action; raises SettingError where it has none."""
        exact = [f for f in action.factors if f.exact and f.moves]
        sets = tuple(f for f in action.factors if f.exact and f.canonical)
        left = tuple(c for f in action.factors if not f.exact for c in f.coordinates)
        if not exact and not sets:
            raise SettingError("symmetry = 'augment' moves rows by exact actions alone, and the simulator's is approximate in "
                               f"{', '.join(left)}: moved rows would be of another simulator; take symmetry = \"gnpe\" or \"none\"")
        if not exact:
            return cls(Frame(sets[0], prior, (), ()), 1.0, sets, left)
        part = exact[0] if len(exact) == 1 else Product(*exact)
        rng = np.random.default_rng(np.random.SeedSequence(_SEED))
        z = torch.as_tensor(prior.unconstrain(prior.sample(rng, ROWS)))
        told = (False,) * len(part.coordinates)
        spread = robust_scale(part.log(Frame(part, prior, (1.0,) * len(told), told).pose(z)).numpy())[1]
        made = cls(Frame(part, prior, tuple((STEP / math.sqrt(len(told)) * spread).tolist()), told), 0.0, sets, left)
        accepted = made.proposed(z, torch.Generator().manual_seed(_SEED))[2]
        return cls(made.frame, float(accepted.double().mean()), sets, left)

    def __call__(self, z: Tensor, x: Fields, generator: torch.Generator) -> tuple[Tensor, Fields]:
        """z (B, D) and x, as the simulator returns it, of rows after a step; those that stay are left untouched."""
        for action in self.sets:
            x = action.scramble(x, generator)
        if not self.frame.widths:
            return z, x
        h, moved, accepted = self.proposed(z, generator)
        rows = torch.nonzero(accepted)[:, 0]
        if not len(rows):
            return z, x
        seen = self.frame.action.act_data(h[rows], {k: v[rows] for k, v in x.items()})
        return torch.where(accepted[:, None], moved, z), {k: v.index_copy(0, rows, seen[k].to(v.dtype)) for k, v in x.items()}

    def proposed(self, z: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
        """Elements h (B, S) for rows z (B, D), h z (B, D), and whether each is accepted, (B,)."""
        action, count = self.frame.action, len(z)
        noise = torch.randn(count, len(self.frame.widths), generator=generator, dtype=torch.float64, device=z.device)
        coin, chance = torch.rand(2, count, generator=generator, dtype=torch.float64, device=z.device)
        h = action.exp(noise * self.frame.kernel_widths(z))
        h = torch.where(coin[:, None] < 0.5, h, action.inverse(h))
        moved, change = self.frame.moved_by(h, self.frame.parameters(z))
        return h, self.frame.put(z, moved)[0], chance.log() < change

    def words(self) -> str:
        """What is done, on one line."""
        widths = ", ".join(f"{c} by {w:.3g}" for c, w in zip(self.frame.action.coordinates, self.frame.widths, strict=True))
        moves = (f" are moved at random ({widths}, in the standard deviation of what is proposed), and {self.acceptance:.0%} of moves are "
                 "accepted") if widths else ""
        order = f"{' and' if widths else ''} have their elements in random order" if self.sets else ""
        return (f"augment: rows of every batch{moves}{order}" + (f"; not by {', '.join(self.left)}: approximate" if self.left else ""))
