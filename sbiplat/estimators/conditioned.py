"""What the estimators of theta given x share: the way from x to a context."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from sbiplat.estimators.base import Architecture, Estimator
from sbiplat.nets import embeddings
from sbiplat.nets.standardise import Standardise
from sbiplat.settings import setting


@dataclass(frozen=True)
class ConditionedSettings:
    """How x becomes a context."""

    activation: str = setting("silu", "activation of every net", among=tuple(embeddings.ACTIVATIONS))
    embedding: str = setting("mlp", "mlp, none, an installed embedding, or file.py:Class of your own")
    embedding_hidden: tuple[int, ...] = setting((128, 128), "widths of the mlp embedding's hidden layers", low=1, high=65536)
    context: int = setting(32, "size of the mlp embedding's output", low=1, high=65536)
    members: int = setting(1, "members of an ensemble, an equal mixture that is one posterior", low=1, high=100)


class Conditioned(Estimator):
    """Base of estimators of theta given the context s(x); they work on z, theta in R^D at unit scale."""

    settings_class = ConditionedSettings

    def __init__(self, architecture: Architecture) -> None:
        super().__init__(architecture)
        settings: ConditionedSettings = architecture.settings
        self.embedding = embeddings.build(settings.embedding, self.spec, settings.embedding_hidden, settings.context, settings.activation)
        self.standardise = Standardise(self.spec, scale=getattr(self.embedding, "standardise", True))
        self.width = embeddings.width_of(self.embedding, self.spec, settings.embedding)

    def fit_scales(self, theta: Tensor, x: dict[str, Tensor]) -> None:
        super().fit_scales(theta, x)
        self.standardise.fit(x)

    @torch.no_grad()
    def prepare(self, x: dict[str, Tensor]) -> dict[str, Tensor]:
        return embeddings.prepare(self.embedding, self.spec, self.standardise(x))

    def context(self, x: dict[str, Tensor]) -> Tensor:
        """s(x) of prepared x, (B, C)."""
        return self.embedding(x.get("x", x)).float()
