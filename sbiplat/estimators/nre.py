r"""Neural ratio estimation: log r(z, x) = log p(x | z) / p(x), by telling the theta of an x among others (NRE-C: Miller et al., 2022).

Of K parameter vectors either one belongs to x, or none does; with odds gamma to 1, and k any of the K,

.. math:: q(y = k) = \frac{\gamma\, r(z_k, x)}{K + \gamma \sum_i r(z_i, x)}, \qquad q(y = 0) = \frac{K}{K + \gamma \sum_i r(z_i, x)},

.. math:: \min \; - \frac{\gamma}{1 + \gamma} \, \mathbb{E}_1 \log q(y = k) - \frac{1}{1 + \gamma} \, \mathbb{E}_0 \log q(y = 0),

the expectations over sets of which one belongs, and of which none does.

The minimum is r itself, without a factor of x alone that would be left free if one always belonged. K = gamma = 1 is the classifier of
Hermans et al. (2020). The others are the thetas of other rows of the batch. With :math:`d = r / (1 + r)` the balance of Delaunoy et al.
(2022),

.. math:: \lambda \, \big( \mathbb{E}_{p(z, x)} d + \mathbb{E}_{p(z) p(x)} d - 1 \big)^2,

which is 0 for the exact ratio, makes few simulations give wide posteriors rather than wrong ones.

The classifier is a residual perceptron on z, the context of x, and z whitened by the Gaussian head of the proposal r(z | x); the proposal
learns from the same context by its own likelihood, and hands no gradient to it. The posterior, :math:`r(z, x) \, p(z)`, is sampled as
nle's.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import softplus

from sbiplat.errors import SettingError
from sbiplat.estimators.base import LEARNING_RATES, Architecture
from sbiplat.estimators.conditioned import Conditioned, ConditionedSettings
from sbiplat.estimators.tractable import Tractable, TractableSettings
from sbiplat.nets.embeddings import ResidualBlock
from sbiplat.nets.standardise import soft_clip
from sbiplat.settings import Interval, setting


@dataclass(frozen=True)
class NRESettings(TractableSettings, ConditionedSettings):
    """What shapes the classifier of neural ratio estimation, and how its posterior is sampled."""

    hidden: int = setting(128, "width of the classifier", low=1, high=65536)
    blocks: int = setting(2, "residual blocks of the classifier", low=0, high=256)
    classes: int = setting(8, "K, parameter vectors among which one may belong to x", low=1, high=65536)
    gamma: float = setting(1.0, "odds that one of them does", low=1e-6, high=1e6)
    balance: float = setting(0.0, "weight of the balancing penalty; Delaunoy et al. take 100", low=0.0, high=1e9)


class NRE(Conditioned, Tractable):
    """The ratio r(z, x) and the proposal r(z | x); see the module's docstring."""

    settings: NRESettings
    settings_class = NRESettings
    search = {"hidden": (64, 128, 256), "blocks": Interval(1, 4), "learning_rate": LEARNING_RATES}
    of_the_loss = ("classes", "gamma", "balance")

    def __init__(self, architecture: Architecture) -> None:
        super().__init__(architecture)
        settings = self.settings
        self.of_theta = nn.Linear(2 * self.dim, settings.hidden)
        self.of_context = nn.Linear(self.width, settings.hidden)
        self.blocks = nn.Sequential(*(ResidualBlock(settings.hidden, settings.activation) for _ in range(settings.blocks)))
        self.last = nn.Sequential(ResidualBlock(settings.hidden, settings.activation), nn.Linear(settings.hidden, 1))
        self.proposal = self.proposal_of(self.width)

    def observed(self, x: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        context = self.context(x)
        return context, context.new_zeros(len(context))

    def proposal_context(self, values: Tensor) -> Tensor:
        return values

    def log_likelihood(self, theta: Tensor, values: Tensor) -> Tensor:
        """log r for contexts (..., C)."""
        z = self.scaled(theta)
        w, _ = self.proposal.head.whiten(z, values)
        return self._ratio(z, w, values)

    def _ratio(self, z: Tensor, w: Tensor, context: Tensor) -> Tensor:
        z, w = torch.broadcast_tensors(z, soft_clip(w))
        return self.last(self.blocks(self.of_theta(torch.cat([z, w], -1)) + self.of_context(context)))[..., 0]

    def fisher_root(self, theta: Tensor, x: dict[str, Tensor]) -> Tensor:
        """log r(theta, x), whose slope in x is that of the posterior's log-density; theta is a draw of the posterior."""
        return self.log_likelihood(theta, self.context(x))

    def loss(self, theta: Tensor, x: dict[str, Tensor]) -> Tensor:
        """The contrastive loss of each row, the batch's balance, and the proposal's negative log-likelihood, (B,)."""
        if self.training and len(theta) < 2:
            raise SettingError("nre contrasts the rows of a batch with each other: batch_size must be at least 2")
        settings, context, z = self.settings, self.context_of(theta, x), self.scaled(theta)
        rows = torch.arange(len(z), device=z.device)
        shifts = 1 + torch.randint(max(1, len(z) - 1), (len(z), settings.classes), device=z.device)
        sets = z[torch.cat([rows[:, None], (rows[:, None] + shifts) % len(z)], dim=1)]  # one's own, and K of others
        still = context.detach()
        with torch.no_grad():
            w, _ = self.proposal.head.whiten(sets, still[:, None])
        ratios = self._ratio(sets, w, context[:, None])
        own, others = ratios[:, 0], ratios[:, 1:]
        total = contrastive(own, others, settings.gamma) - self.proposal.log_prob(z, still)
        return total + settings.balance * imbalance(own, others).square() if settings.balance else total


def contrastive(own: Tensor, others: Tensor, gamma: float) -> Tensor:
    """NRE-C's loss of each row, (B,), from log r of its own theta (B,) and of K others (B, K); K - 1 of these stand beside its own."""
    count, tilt = others.shape[1], math.log(gamma / others.shape[1])
    one, none = (softplus(torch.logsumexp(s, dim=1) + tilt) for s in (torch.cat([own[:, None], others[:, :count - 1]], 1), others))
    return (gamma * (one - own - tilt) + none) / (1 + gamma)


def imbalance(own: Tensor, others: Tensor) -> Tensor:
    """The mean of d = r / (1 + r) over joint pairs and over others, together, less 1: 0 for the exact ratio."""
    return own.sigmoid().mean() + others.sigmoid().mean() - 1
