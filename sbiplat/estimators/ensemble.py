r"""Ensembles: K estimators of one architecture, trained in one run and used as one posterior (Lakshminarayanan et al., 2017),

.. math:: q(\theta | x) = \frac{1}{K} \sum_k q_k(\theta | x), \qquad \min \frac{1}{K} \sum_k L_k .

Members differ in their initial weights, which are drawn one after the other from the run's seed, and in what their losses draw at
random. They see the same batches: the bank is read once for all. No member's loss depends on another; the clipping of a step's
gradient, and the leaving out of a step that is not finite, are of all together, and the mean of their validation losses says when to
stop. By Jensen's inequality the log-density of the mixture is at least the mean of theirs.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from sbiplat.estimators.base import Architecture, Estimator


class Ensemble(Estimator):
    """K members of a class; see the module's docstring. All take x as the first prepares it."""

    posterior = "ensemble"

    def __init__(self, architecture: Architecture, member: type[Estimator], count: int) -> None:
        super().__init__(architecture)
        self.members = nn.ModuleList(member(architecture) for _ in range(count))
        first = self.members[0]
        for other in self.members[1:]:
            other.prepare = first.prepare  # an embedding's fixed summaries may hold random numbers

    def fit_scales(self, theta: Tensor, x: dict[str, Tensor]) -> None:
        for member in self.members:
            member.fit_scales(theta, x)

    def prepare(self, x: dict[str, Tensor]) -> dict[str, Tensor]:
        return self.members[0].prepare(x)

    def context(self, x: dict[str, Tensor]) -> Tensor:
        """The contexts of all members side by side, (B, K C): summaries of x."""
        return torch.cat([member.context(x) for member in self.members], dim=1)

    def units(self, x: dict[str, Tensor]) -> dict[str, Tensor]:
        return self.members[0].units(x)

    def loss(self, theta: Tensor, x: dict[str, Tensor]) -> Tensor:
        """The mean of the members' losses, (B,)."""
        return torch.stack([member.loss(theta, x) for member in self.members]).mean(0)
