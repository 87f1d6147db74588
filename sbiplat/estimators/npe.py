r"""Neural posterior estimation: a conditional density q(theta | x) fitted by maximum likelihood to the bank,

.. math:: \min_q \; - \mathbb{E}_{p(\theta)\, p(x | \theta)} \log q(z(\theta) \,|\, s(x)),

whose minimum over all q is the posterior (Papamakarios & Murray, 2016; Greenberg et al., 2019). z is theta in R^D by the
prior's bijection, and s(x) the embedding of the standardised x.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from sbiplat.estimators.base import Architecture, Estimator
from sbiplat.nets import embeddings, flows
from sbiplat.nets.standardise import Standardise, robust_scale
from sbiplat.settings import setting


@dataclass(frozen=True)
class NPESettings:
    """What shapes the net of neural posterior estimation."""

    flow: str = setting("nsf", "the conditional density", among=tuple(flows.FLOWS))
    transforms: int = setting(3, "transforms of the flow", low=1, high=64)
    hidden: tuple[int, ...] = setting((64, 64), "widths of each transform's hidden layers", low=1, high=65536)
    bins: int = setting(8, "bins of a spline flow", low=2, high=256)
    components: int = setting(8, "components of the mixture of Gaussians", low=1, high=1024)
    activation: str = setting("silu", "activation of flow and embedding", among=tuple(embeddings.ACTIVATIONS))
    embedding: str = setting("mlp", "mlp, none, an installed embedding, or file.py:Class of your own")
    embedding_hidden: tuple[int, ...] = setting((128, 128), "widths of the mlp embedding's hidden layers", low=1, high=65536)
    context: int = setting(32, "size of the mlp embedding's output", low=1, high=65536)


class NPE(Estimator):
    """The density q(z | x); see the module's docstring."""

    settings_class = NPESettings

    def __init__(self, architecture: Architecture) -> None:
        super().__init__()
        settings: NPESettings = architecture.settings
        self.spec = architecture.x
        self.embedding = embeddings.build(settings.embedding, self.spec, settings.embedding_hidden, settings.context, settings.activation)
        self.standardise = Standardise(self.spec, scale=getattr(self.embedding, "standardise", True))
        width = embeddings.width_of(self.embedding, self.spec, settings.embedding)
        shape = flows.Shape(settings.transforms, settings.hidden or (64,), settings.bins, settings.components, settings.activation)
        self.density = flows.build(settings.flow, architecture.dim, width, shape)
        self.gaussianised = architecture.gaussianised
        self.register_buffer("theta_loc", torch.zeros(architecture.dim))
        self.register_buffer("theta_scale", torch.ones(architecture.dim))

    def fit_scales(self, theta: Tensor, x: dict[str, Tensor]) -> None:
        self.standardise.fit(x)
        if not self.gaussianised:  # elsewhere z is N(0, I) already
            loc, scale = robust_scale(theta.cpu().numpy())
            self.theta_loc.copy_(torch.as_tensor(loc))
            self.theta_scale.copy_(torch.as_tensor(scale))

    @torch.no_grad()
    def prepare(self, x: dict[str, Tensor]) -> dict[str, Tensor]:
        return embeddings.prepare(self.embedding, self.spec, self.standardise(x))

    def context(self, x: dict[str, Tensor]) -> Tensor:
        """s(x) of prepared x, (B, C): what the density is conditioned on."""
        return self.embedding(x.get("x", x)).float()

    def log_prob(self, theta: Tensor, context: Tensor) -> Tensor:
        """log q(theta | context) over unconstrained theta (..., D), context (..., C): (...)."""
        z = (theta - self.theta_loc) / self.theta_scale
        return self.density.log_prob(z, context) - self.theta_scale.log().sum()

    def sample(self, context: Tensor, n: int, generator: torch.Generator) -> Tensor:
        """n unconstrained draws for each of B contexts (B, C): (B, n, D)."""
        return self.density.sample(context, n, generator) * self.theta_scale + self.theta_loc

    def loss(self, theta: Tensor, x: dict[str, Tensor]) -> Tensor:
        return -self.log_prob(theta, self.context(x))
