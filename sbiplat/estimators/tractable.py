r"""What the estimators share whose net gives the likelihood, or the likelihood up to a factor of x alone: nle and nre.

Their posterior is :math:`p(z | x) \propto L(x | z) \, p(z)`, drawn by annealed populations (`posteriors.annealing`). A small mixture of
Gaussians r(z | x), learnt beside the net, is where those begin.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor, nn

from sbiplat.estimators.base import Estimator
from sbiplat.nets import flows
from sbiplat.settings import setting


@dataclass(frozen=True)
class TractableSettings:
    """How the posterior behind a likelihood is sampled."""

    components: int = setting(8, "components of mixtures of Gaussians, the proposal's too", low=1, high=1024)
    chains: int = setting(128, "chains an observation while annealing, in four populations; many draws take more", low=16, high=10**6)
    moves: int = setting(5, "moves of every chain at each power", low=2, high=100_000)
    leaps: int = setting(3, "leapfrog steps of a move", low=1, high=1000)
    thin: int = setting(2, "moves from one kept draw of a chain to the next", low=1, high=100_000)


class Tractable(Estimator):
    """Base of NLE and NRE."""

    posterior: ClassVar[str] = "likelihood"
    most_failed: ClassVar[float] = 0.01
    proposal: flows.Whitened

    def proposal_of(self, width: int) -> nn.Module:
        """r(z | x) given its context of that width, over z at unit scale."""
        shape = flows.Shape(1, (64,), 8, self.settings.components, self.settings.activation)
        return flows.build("mog", self.dim, width, shape)

    def observed(self, x: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Of prepared x: what `log_likelihood` takes, (B, F), and the log of what it leaves out of the density of x, (B,)."""
        raise NotImplementedError

    def log_likelihood(self, theta: Tensor, values: Tensor) -> Tensor:
        """log L of values (..., F) given unconstrained theta (..., D), (...); leading axes are broadcast."""
        raise NotImplementedError

    def proposal_context(self, values: Tensor) -> Tensor:
        """The context of r(z | x), (B, C), from values (B, F)."""
        raise NotImplementedError
