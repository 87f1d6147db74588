r"""Neural likelihood estimation: a conditional density of the data given the parameters (Papamakarios et al., 2019),

.. math:: \min \; - \mathbb{E}_{p(\theta)\, p(x | \theta)} \log q(x | z(\theta)),

and the posterior by sampling :math:`\log q(x | z) + \log p(z)`. Independent observations of one theta add their log-likelihoods, and the
prior may be changed after training.

x is standardised as for every estimator; log q(x | z) is the density of x itself, with the Jacobians of its transforms. Features that
are constant in the bank say nothing. Whole-numbered features are smoothed by uniform noise of one unit in training.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor, nn

from sbiplat.errors import SettingError
from sbiplat.estimators.base import LEARNING_RATES, Architecture
from sbiplat.estimators.tractable import Tractable, TractableSettings
from sbiplat.nets import embeddings, flows
from sbiplat.nets.standardise import Standardise
from sbiplat.settings import Interval, setting

MOST_FEATURES = 512


@dataclass(frozen=True)
class NLESettings(TractableSettings):
    """What shapes neural likelihood estimation."""

    flow: str = setting("maf", "the conditional density of x", among=tuple(f for f in flows.FLOWS if f != "cnf"))  # chains ask too often
    transforms: int = setting(3, "transforms of the flow", low=1, high=64)
    hidden: tuple[int, ...] = setting((64, 64), "widths of each transform's hidden layers", low=1, high=65536, fewest=1)
    bins: int = setting(8, "bins of a spline flow", low=2, high=256)
    activation: str = setting("silu", "activation of every net", among=tuple(embeddings.ACTIVATIONS))
    context_hidden: tuple[int, ...] = setting(
        (64, 64), "widths of the hidden layers from theta to the likelihood's context, and from x to the proposal's", low=1, high=65536)
    context: int = setting(32, "size of both contexts", low=1, high=65536)


class NLE(Tractable):
    """The densities q(x | z) and r(z | x); see the module's docstring."""

    settings: NLESettings
    settings_class = NLESettings
    search = {"flow": ("nsf", "maf", "coupling_nsf"), "transforms": Interval(2, 6), "hidden": ((32, 32), (64, 64), (128, 128)),
              "learning_rate": LEARNING_RATES}

    def __init__(self, architecture: Architecture) -> None:
        super().__init__(architecture)
        size = self.spec.size
        if size > MOST_FEATURES:
            raise SettingError(f"nle models the density of all of x, which is {size} numbers; at most {MOST_FEATURES} make sense: "
                               "let the simulator return summaries, or use npe, npse, fmpe or nre")
        self.standardise = Standardise(self.spec)
        self.register_buffer("varies", torch.ones(size, dtype=torch.bool))
        self.register_buffer("whole", torch.zeros(size, dtype=torch.bool))  # whole-numbered features
        settings = self.settings
        self.of_theta = _mlp(self.dim, settings.context_hidden, settings.context, settings.activation)
        self.of_x = _mlp(size, settings.context_hidden, settings.context, settings.activation)
        shape = flows.Shape(settings.transforms, settings.hidden, settings.bins, settings.components, settings.activation)
        self.likelihood = flows.build(settings.flow, size, settings.context, shape)
        self.proposal = self.proposal_of(settings.context)

    def fit_scales(self, theta: Tensor, x: dict[str, Tensor]) -> None:
        super().fit_scales(theta, x)
        self.standardise.fit(x)
        raw = torch.cat([v.reshape(len(v), -1).double() for v in x.values()], dim=1)
        self.varies.copy_((raw != raw[:1]).any(0))
        plain = torch.cat([torch.full((v[0].numel(),), self.spec.transform[k] == "none") for k, v in x.items()])
        self.whole.copy_(plain & (raw == raw.round()).all(0) & self.varies)

    @torch.no_grad()
    def prepare(self, x: dict[str, Tensor]) -> dict[str, Tensor]:
        """{"x": standardised (B, F), constants at 0; "log_det": of the standardisation, (B,); "unit": one of a whole-numbered feature,
        after standardisation, where it stands, (B, F), 0 of others}."""
        return self.prepare_differentiably(x)

    def prepare_differentiably(self, x: dict[str, Tensor]) -> dict[str, Tensor]:
        slopes = embeddings.flatten(self.standardise.log_slopes(x))
        values = embeddings.flatten(self.standardise(x))
        return {"x": torch.where(self.varies, values, 0.0), "log_det": torch.where(self.varies, slopes, 0.0).sum(1).float(),
                "unit": torch.where(self.whole, slopes.exp(), 0.0).float()}

    def units(self, x: dict[str, Tensor]) -> dict[str, Tensor]:
        return {"x": torch.ones(())}

    def observed(self, x: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        return x["x"], x["log_det"]

    def proposal_context(self, values: Tensor) -> Tensor:
        return self.of_x(values)

    def log_likelihood(self, theta: Tensor, values: Tensor) -> Tensor:
        return self.likelihood.log_prob(values, self.of_theta(self.scaled(theta)))

    def loss(self, theta: Tensor, x: dict[str, Tensor]) -> Tensor:
        values = x["x"]
        proposal = self.proposal.log_prob(self.scaled(theta), self.of_x(values))
        smooth = values + x["unit"] * (torch.rand_like(values) - 0.5)
        smooth = torch.where(self.varies, smooth, torch.randn_like(values))  # a density of a constant has no bound
        return -self.log_likelihood(theta, smooth) - x["log_det"] - proposal


def _mlp(size: int, hidden: tuple[int, ...], out: int, activation: str) -> nn.Module:
    sizes = [size, *hidden]
    layers = [m for a, b in pairwise(sizes) for m in (nn.Linear(a, b), embeddings.ACTIVATIONS[activation]())]
    return nn.Sequential(*layers, nn.Linear(sizes[-1], out))
