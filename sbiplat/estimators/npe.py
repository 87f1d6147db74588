r"""Neural posterior estimation: a conditional density q(theta | x) fitted by maximum likelihood to the bank,

.. math:: \min_q \; - \mathbb{E}_{p(\theta)\, p(x | \theta)} \log q(z(\theta) \,|\, s(x)),

whose minimum over all q is the posterior (Papamakarios & Murray, 2016; Greenberg et al., 2019). z is theta in R^D by the
prior's bijection, and s(x) the embedding of the standardised x.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from sbiplat.estimators.base import LEARNING_RATES, Architecture
from sbiplat.estimators.conditioned import Conditioned, ConditionedSettings
from sbiplat.nets import flows
from sbiplat.nets.noise import Randomness
from sbiplat.settings import Interval, setting


@dataclass(frozen=True)
class NPESettings(ConditionedSettings):
    """What shapes the net of neural posterior estimation."""

    flow: str = setting("nsf", "the conditional density", among=tuple(flows.FLOWS))
    transforms: int = setting(3, "transforms of the flow", low=1, high=64)
    hidden: tuple[int, ...] = setting((64, 64), "widths of each transform's hidden layers", low=1, high=65536, fewest=1)
    bins: int = setting(8, "bins of a spline flow; a quarter of the degree of Bernstein polynomials", low=2, high=256)
    components: int = setting(8, "components of the mixture of Gaussians", low=1, high=1024)
    ode_steps: int = setting(
        4, "Dormand-Prince steps of a continuous flow in training; densities and draws take twice as many", low=2, high=1000)
    trace: str = setting("exact", "trace of a continuous flow's Jacobian: exact, or hutchinson's estimate", among=("exact", "hutchinson"))


class NPE(Conditioned):
    """The density q(z | x); see the module's docstring."""

    settings: NPESettings
    settings_class = NPESettings
    draws_itself = True
    search = {"flow": ("nsf", "maf", "coupling_nsf"), "transforms": Interval(2, 6), "hidden": ((32, 32), (64, 64), (128, 128)),
              "learning_rate": LEARNING_RATES}

    def __init__(self, architecture: Architecture) -> None:
        super().__init__(architecture)
        settings = self.settings
        shape = flows.Shape(settings.transforms, settings.hidden, settings.bins, settings.components, settings.activation,
                            settings.ode_steps, settings.trace)
        self.density = flows.build(settings.flow, self.dim, self.width, shape)

    def log_prob(self, theta: Tensor, context: Tensor) -> Tensor:
        """log q(theta | context) over unconstrained theta (..., D), context (..., C): (...)."""
        return self.density.log_prob(self.whiten(theta, context), context) + self.log_det

    def sample(self, context: Tensor, n: int, generator: Randomness) -> Tensor:
        """n unconstrained draws for each of B contexts (B, C): (B, n, D)."""
        return self.unwhiten(self.density.sample(context, n, generator), context[:, None])

    def fisher_root(self, theta: Tensor, x: dict[str, Tensor]) -> Tensor:
        """log q(theta' | x) of one draw theta' of q a row, whatever theta."""
        context = self.context(x)
        with torch.no_grad():
            generator = torch.Generator(context.device).manual_seed(int(torch.randint(2**62, ())))
            draws = self.sample(context.detach(), 1, generator)[:, 0]
        return self.log_prob(draws, context)

    def loss(self, theta: Tensor, x: dict[str, Tensor]) -> Tensor:
        return -self.log_prob(theta, self.context_of(theta, x))
