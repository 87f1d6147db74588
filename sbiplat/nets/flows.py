r"""Conditional densities on R^D, by name: normalising flows of zuko and nflows, and a mixture of Gaussians.

Every one is a `ConditionalDensity`: `log_prob(z, context)` and `sample(context, n, generator)`. It works in coordinates that a
Gaussian head has whitened,

.. math:: w = A(c)\,(z - \mu(c)), \qquad \log q(z | c) = \log q_w(w | c) + \sum_k \log A_{kk}(c),

with A lower triangular and both read off the context. Posteriors are often near-Gaussian and far narrower than their
prior; the head moves and scales, and the flow is left with the shape.

zuko: Rozet et al. (2022). nflows: Durkan et al. (2020). NSF: Durkan et al. (2019). MAF: Papamakarios et al. (2017).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from sbiplat.errors import SettingError
from sbiplat.nets.embeddings import ACTIVATIONS
from sbiplat.nets.made import MaskedInverse
from sbiplat.nets.noise import Randomness, categories, normal
from sbiplat.nets.spline import Spline, shapes

_LOG_SQRT_2PI = 0.5 * math.log(2 * math.pi)


class ConditionalDensity(nn.Module):
    """A density q(z | c) on R^D. z: (..., D); context: (..., C) of the same leading shape."""

    def log_prob(self, z: Tensor, context: Tensor) -> Tensor:
        """log q(z | c), (...)."""
        raise NotImplementedError

    def sample(self, context: Tensor, n: int, generator: Randomness) -> Tensor:
        """n draws for each of B contexts (B, C): (B, n, D)."""
        raise NotImplementedError


def standard_normal_log_prob(z: Tensor) -> Tensor:
    """log N(z; 0, I), (...)."""
    return (-0.5 * z.square() - _LOG_SQRT_2PI).sum(-1)


class GaussianHead(nn.Module):
    """w = A(c) (z - mu(c)) with A lower triangular of positive diagonal; the identity at first."""

    def __init__(self, dim: int, context: int) -> None:
        super().__init__()
        self.dim = dim
        self.net = nn.Linear(context, 2 * dim + dim * (dim - 1) // 2)
        nn.init.normal_(self.net.weight, std=1e-2)
        nn.init.zeros_(self.net.bias)
        below = torch.tril_indices(dim, dim, -1)
        self.register_buffer("below", below, persistent=False)
        self.register_buffer("row_of", torch.nn.functional.one_hot(below[0], dim).float(), persistent=False)

    def _parts(self, context: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """mu, log of A's diagonal, and the unit-diagonal factor's entries below it."""
        mu, log_diagonal, rest = self.net(context).split([self.dim, self.dim, self.below.shape[1]], dim=-1)
        return mu, 8 * torch.tanh(log_diagonal / 8), rest  # within e^-8 .. e^8 of the prior's scale

    def whiten(self, z: Tensor, context: Tensor) -> tuple[Tensor, Tensor]:
        """w (..., D) and log det A (...): one context a row, so the matrices are not formed."""
        mu, log_diagonal, rest = self._parts(context)
        gap = z - mu
        across = (rest * gap.index_select(-1, self.below[1])) @ self.row_of
        return log_diagonal.exp() * (gap + across), log_diagonal.sum(-1)

    def forward(self, context: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """mu (..., D), A (..., D, D) and log det A (...)."""
        mu, log_diagonal, rest = self._parts(context)
        diagonal = log_diagonal.exp()
        A = torch.diag_embed(diagonal)
        A[..., self.below[0], self.below[1]] = rest * diagonal[..., self.below[0]]
        return mu, A, log_diagonal.sum(-1)


class Whitened(ConditionalDensity):
    """A density in the coordinates of a Gaussian head."""

    def __init__(self, inner: ConditionalDensity, dim: int, context: int) -> None:
        super().__init__()
        self.head = GaussianHead(dim, context)
        self.inner = inner

    def log_prob(self, z: Tensor, context: Tensor) -> Tensor:
        w, log_det = self.head.whiten(z, context)
        return self.inner.log_prob(w, context) + log_det

    def sample(self, context: Tensor, n: int, generator: Randomness) -> Tensor:
        mu, A, _ = self.head(context)
        w = self.inner.sample(context, n, generator)
        z = torch.linalg.solve_triangular(A, w.mT, upper=False).mT
        return mu[:, None] + z


class StandardNormal(ConditionalDensity):
    """N(0, I) whatever the context: with the Gaussian head, a full-covariance Gaussian."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.dim = dim

    def log_prob(self, z: Tensor, context: Tensor) -> Tensor:
        return standard_normal_log_prob(z)

    def sample(self, context: Tensor, n: int, generator: Randomness) -> Tensor:
        return normal((len(context), n, self.dim), generator, context.device)


class ZukoFlow(ConditionalDensity):
    """A zuko flow of masked autoregressive transforms; forward(context) is a Distribution whose transform maps z to a standard normal."""

    def __init__(self, flow: nn.Module, dim: int) -> None:
        super().__init__()
        self.flow, self.dim = flow, dim

    def log_prob(self, z: Tensor, context: Tensor) -> Tensor:
        return self.flow(context).log_prob(z)

    def sample(self, context: Tensor, n: int, generator: Randomness) -> Tensor:
        z = normal((self.dim, len(context), n), generator, context.device, contexts=1, draws=2)
        if self.dim == 1:
            return self.flow(context[:, None].expand(-1, n, -1)).transform.inv(z.movedim(0, -1))
        for transform in reversed(self.flow.transform.transforms):
            z = MaskedInverse(transform)(z, context)
        return z.movedim(0, -1)


class NflowsFlow(ConditionalDensity):
    """An nflows flow: its transform maps z to a standard normal, one context a row."""

    def __init__(self, transform: nn.Module, dim: int) -> None:
        super().__init__()
        self.transform, self.dim = transform, dim

    def log_prob(self, z: Tensor, context: Tensor) -> Tensor:
        lead = z.shape[:-1]
        rows = context.expand(*lead, -1).reshape(-1, context.shape[-1])
        noise, log_det = self.transform(z.reshape(-1, self.dim), context=rows)
        return (standard_normal_log_prob(noise) + log_det).reshape(lead)

    def sample(self, context: Tensor, n: int, generator: Randomness) -> Tensor:
        noise = normal((len(context), n, self.dim), generator, context.device).reshape(-1, self.dim)
        rows = context.repeat_interleave(n, dim=0)
        return self.transform.inverse(noise, context=rows)[0].reshape(len(context), n, self.dim)


class GaussianMixture(ConditionalDensity):
    """zuko's mixture of full-covariance Gaussians, with draws from an explicit generator."""

    def __init__(self, mixture: nn.Module) -> None:
        super().__init__()
        self.mixture = mixture

    def log_prob(self, z: Tensor, context: Tensor) -> Tensor:
        return self.mixture(context).log_prob(z)

    def sample(self, context: Tensor, n: int, generator: Randomness) -> Tensor:
        law = self.mixture(context)
        which = categories(law.logits.softmax(-1), n, generator)
        rows = torch.arange(len(context), device=context.device)[:, None]
        loc, scale = law.base.loc[rows, which], law.base.scale_tril[rows, which]
        noise = normal((len(context), n, loc.shape[-1]), generator, context.device)
        return loc + (scale @ noise.unsqueeze(-1)).squeeze(-1)


# ------------------------------------------------------------------------------------------------------- by name


class Shape(NamedTuple):
    """How large a density is; each takes what it needs. See `NPESettings` for what each means."""

    transforms: int
    hidden: tuple[int, ...]
    bins: int
    components: int
    activation: str
    ode_steps: int = 4
    trace: str = "exact"


def _zuko(family: str, passes: int | None = None) -> Callable[..., ConditionalDensity]:
    def make(dim: int, context: int, shape: Shape) -> ConditionalDensity:
        import zuko

        settings = {"transforms": shape.transforms, "hidden_features": shape.hidden, "activation": ACTIVATIONS[shape.activation]}
        if passes is not None and dim > 1:
            settings |= {"passes": passes, "randperm": dim > 2}
        if family == "NSF":  # zuko's own, but for the way in which splines are computed
            return ZukoFlow(zuko.flows.MAF(dim, context, univariate=Spline, shapes=shapes(shape.bins), **settings), dim)
        if family == "BPF":
            settings["degree"] = 4 * shape.bins
        return ZukoFlow(getattr(zuko.flows, family)(dim, context, **settings), dim)

    return make


def _mixture(dim: int, context: int, shape: Shape) -> ConditionalDensity:
    import zuko

    settings = {"components": shape.components, "hidden_features": shape.hidden, "activation": ACTIVATIONS[shape.activation]}
    return GaussianMixture(zuko.mixtures.GMM(dim, context, **settings))


def _nflows(family: str) -> Callable[..., ConditionalDensity]:
    def make(dim: int, context: int, shape: Shape) -> ConditionalDensity:
        from nflows.transforms import CompositeTransform, ReversePermutation
        from nflows.transforms.autoregressive import (
            MaskedAffineAutoregressiveTransform,
            MaskedPiecewiseRationalQuadraticAutoregressiveTransform,
        )

        if len(set(shape.hidden)) > 1:
            raise SettingError(f"hidden = {list(shape.hidden)}: the flows of nflows have hidden layers of one width; give one, such as "
                               f"{[shape.hidden[0]] * len(shape.hidden)}")
        common = {"features": dim, "hidden_features": shape.hidden[0], "context_features": context, "num_blocks": len(shape.hidden),
                  "activation": ACTIVATIONS[shape.activation]()}
        spline = {"num_bins": shape.bins, "tails": "linear", "tail_bound": 5.0}
        layers = []
        for _ in range(shape.transforms):
            layers += [ReversePermutation(dim), MaskedAffineAutoregressiveTransform(**common) if family == "MAF"
                       else MaskedPiecewiseRationalQuadraticAutoregressiveTransform(**common, **spline)]
        return NflowsFlow(CompositeTransform(layers), dim)

    return make


def _continuous(dim: int, context: int, shape: Shape) -> ConditionalDensity:
    from sbiplat.nets.continuous import ContinuousFlow

    return ContinuousFlow(dim, context, shape.hidden, shape.ode_steps, shape.trace)


def _gaussian(dim: int, context: int, shape: Shape) -> ConditionalDensity:
    return StandardNormal(dim)


FLOWS: dict[str, Callable[..., ConditionalDensity]] = {
    "nsf": _zuko("NSF"),
    "maf": _zuko("MAF"),
    "bpf": _zuko("BPF"),
    "coupling_nsf": _zuko("NSF", passes=2),
    "cnf": _continuous,
    "mog": _mixture,
    "gaussian": _gaussian,
    "nflows_nsf": _nflows("NSF"),
    "nflows_maf": _nflows("MAF"),
}


def build(name: str, dim: int, context: int, shape: Shape) -> ConditionalDensity:
    """The conditional density of that name over z (D,) given a context (C,), in whitened coordinates."""
    return Whitened(FLOWS[name](dim, context, shape), dim, context)
