"""What the estimators of theta given x share: the way from x to a context, and the regression that theta is whitened by."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from sbiplat.estimators.base import Architecture, Estimator
from sbiplat.nets import embeddings
from sbiplat.nets.regression import Regression
from sbiplat.nets.standardise import Standardise, robust_scale
from sbiplat.settings import setting


@dataclass(frozen=True)
class ConditionedSettings:
    """How x becomes a context."""

    activation: str = setting("silu", "activation of every net", among=tuple(embeddings.ACTIVATIONS))
    embedding: str = setting("mlp", "the net that makes a context of x: a name (see Embeddings), names by field of a dict x such as "
                             "signal=cnn1d,image=cnn2d, or file.py:Class of your own")
    embedding_hidden: tuple[int, ...] = setting((128, 128), "widths of the embedding's hidden dense layers", low=1, high=65536)
    context: int = setting(32, "size of the embedding's output", low=1, high=65536)
    embedding_width: int = setting(64, "width of an element or token of deepset, settransformer and transformer", low=1, high=65536)
    embedding_blocks: int = setting(2, "attention blocks; residual blocks a stage of resnet1d and resnet2d; hidden layers of an element of "
                                    "deepset", low=1, high=256)
    heads: int = setting(4, "heads of attention", low=1, high=1024)
    channels: tuple[int, ...] = setting((16, 32, 64), "channels of each stage of a convolutional net, which halves the resolution", low=1,
                                        high=65536)
    kernel: int = setting(5, "places an axis that a convolution sees, odd", low=1, high=1023)
    padding: str = setting("zeros", "what a convolution sees past the ends of x: zeros, or x again (circular)", among=("zeros", "circular"))
    pooling: str = setting("flatten", "of a convolutional net's last places: flatten keeps where they are, mean forgets it",
                           among=("flatten", "mean"))
    patch: int = setting(16, "times in a token of transformer", low=1, high=65536)
    svd: int = setting(0, "components of the bank's singular value decomposition that start mlp and resmlp; 0: none", low=0, high=65536)
    regression: bool = setting(True, "begin at the linear-Gaussian posterior, where x has at most 2048 numbers and the embedding is dense")
    members: int = setting(1, "members of an ensemble, an equal mixture that is one posterior", low=1, high=100)


class Conditioned(Estimator):
    """Base of estimators of theta given the context s(x); they work on z, theta in R^D at unit scale."""

    settings_class = ConditionedSettings
    defences = ("fisher", "noise", "slab", "adversarial")

    def __init__(self, architecture: Architecture) -> None:
        super().__init__(architecture)
        settings: ConditionedSettings = architecture.settings
        shape = embeddings.Shape(
            settings.embedding_hidden, settings.context, settings.activation, settings.embedding_width, settings.embedding_blocks,
            settings.heads, settings.channels, settings.kernel, settings.padding, settings.pooling, settings.patch, settings.svd)
        self.embedding = embeddings.build(settings.embedding, self.spec, shape)
        self.standardise = Standardise(self.spec, embeddings.shared_axes(self.embedding, self.spec), embeddings.masks_of(self.embedding))
        self.width = embeddings.width_of(self.embedding, self.spec, settings.embedding) + self.dim
        self.regression = Regression(self._numbers(self.prepare(self._zeros())).shape[1], self.dim)

    def fit_scales(self, theta: Tensor, x: dict[str, Tensor]) -> None:
        super().fit_scales(theta, x)
        self.standardise.fit(x)
        if self.settings.svd:
            embeddings.seed_bases(self.embedding, self.spec, self.prepare(x))
        self.regression.fit(self._numbers(self.prepare(x)), self.scaled(theta))

    @torch.no_grad()
    def prepare(self, x: dict[str, Tensor]) -> dict[str, Tensor]:
        return self.prepare_differentiably(x)

    def prepare_differentiably(self, x: dict[str, Tensor]) -> dict[str, Tensor]:
        return embeddings.prepare(self.embedding, self.spec, self.standardise(x))

    def units(self, x: dict[str, Tensor]) -> dict[str, Tensor]:
        """1 where prepared x is standardised; of summaries, and of what an embedding takes as it is, the robust scale. No masks."""
        masks, plain = embeddings.masks_of(self.embedding).values(), embeddings.unscaled(self.embedding, self.spec)
        return {k: torch.as_tensor(robust_scale(v.cpu().numpy())[1], dtype=torch.float32) if k in plain else torch.ones(())
                for k, v in x.items() if k not in masks}

    def context(self, x: dict[str, Tensor]) -> Tensor:
        """Of prepared x, (B, C): what the embedding makes of it, and the regression's mean in the last D columns."""
        return torch.cat([embeddings.apply(self.embedding, self.spec, x).float(), self.regression(self._numbers(x))], dim=1)

    def context_of(self, theta: Tensor, x: dict[str, Tensor]) -> Tensor:
        """The context for the loss: in training on rows that the regression was fitted to, its mean is that without the row itself."""
        context = self.context(x)
        if not (self.training and self.rows_were_fitted):
            return context
        mean = self.regression.left_out(context[:, -self.dim:], self._numbers(x), self.scaled(theta))
        return torch.cat([context[:, :-self.dim], mean], dim=1)

    def whiten(self, theta: Tensor, context: Tensor) -> Tensor:
        """w (..., D) of unconstrained theta, by the regression's mean and covariance."""
        return self.regression.whiten(self.scaled(theta), context[..., -self.dim:])

    def unwhiten(self, w: Tensor, context: Tensor) -> Tensor:
        """The inverse of `whiten`."""
        return self.unscaled(self.regression.unwhiten(w, context[..., -self.dim:]))

    @property
    def log_det(self) -> Tensor:
        """log |dw / dtheta|, whatever x."""
        return self.regression.log_det - self.theta_scale.log().sum()

    def _numbers(self, x: dict[str, Tensor]) -> Tensor:
        found = embeddings.numbers(self.embedding, self.spec, x).float()
        return found if self.settings.regression else found[:, :0]

    def _zeros(self) -> dict[str, Tensor]:
        return {k: torch.zeros(1, *shape) for k, shape in self.spec.shapes.items()}
