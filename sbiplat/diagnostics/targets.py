r"""What an attack sees of a posterior: a differentiable way from x to a condition c(x), and a density or draws given it.

A target's `log_prob` may leave out what does not depend on z (`normalised` is then false). Divergences between q at x and at x' come from
draws :math:`z_i \sim q(\cdot | x)`: with :math:`r_i = \log q(z_i | x') - \log q(z_i | x)` up to such a term,

.. math:: \mathrm{KL}(q_x \| q_{x'}) \approx \log \frac1n \sum_i e^{r_i} - \frac1n \sum_i r_i,

where the first term is 0 if q is normalised. So no chain has to run anew for each x' of a likelihood or a ratio.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from sbiplat.diagnostics.whitened import Data
from sbiplat.estimators.base import Estimator
from sbiplat.estimators.denoising import Denoising
from sbiplat.estimators.tractable import Tractable
from sbiplat.nets import embeddings
from sbiplat.posteriors.base import Posterior, Sampler
from sbiplat.posteriors.diffusion import DiffusionSampler, solve_heun
from sbiplat.posteriors.direct import DirectSampler
from sbiplat.posteriors.ensemble import EnsembleSampler
from sbiplat.posteriors.gnpe import Centres, GNPESampler
from sbiplat.posteriors.likelihood import LikelihoodSampler
from sbiplat.posteriors.theta_space import ThetaSpaceSampler

SOLVER_STEPS = 6


class Target(Protocol):
    """gradients: whether `condition` and what follows are differentiable in x. normalised: see the module's docstring. objectives: what an
    attack may maximise, the default first. masks: field of x -> its mask."""

    gradients: bool
    normalised: bool
    objectives: tuple[str, ...]
    masks: dict[str, str]

    def condition(self, x: Data) -> Any:
        """c(x) of B observations: a tensor or a list of them, (B, ...) each."""
        ...

    def log_prob(self, z: Tensor, condition: Any) -> Tensor:
        """log q(z | c) of z (B, n, D): (B, n)."""
        ...

    def sample(self, condition: Any, n: int, generator: torch.Generator) -> Tensor:
        """Draws (B, n, D), for the objectives "reverse" and "energy"; differentiable in c where `log_prob` is not to be had."""
        ...


def target_of(posterior: Posterior) -> Target:
    """The target of a posterior. A sampler may bring its own, by a method `target()`."""
    return _of(posterior.sampler, posterior)


def _of(sampler: Sampler, posterior: Posterior) -> Target:
    if hasattr(sampler, "target"):
        return sampler.target()
    if isinstance(sampler, EnsembleSampler):
        return Joined([_of(member, posterior) for member in sampler.members])
    if isinstance(sampler, ThetaSpaceSampler):
        return DensityOfTheta(sampler.estimator, posterior)
    if isinstance(sampler, DirectSampler):
        return Density(sampler.estimator)
    if isinstance(sampler, DiffusionSampler):
        return Denoised(sampler.estimator)
    if isinstance(sampler, GNPESampler):
        return Equivariant(sampler)
    if isinstance(sampler, LikelihoodSampler):
        return Likelihood(sampler.estimator, sampler.set_size)
    return BlackBox(sampler)


class _Net:
    """What targets of an estimator share."""

    normalised = True
    objectives: tuple[str, ...] = ("forward", "reverse", "energy")

    def __init__(self, estimator: Any) -> None:
        self.estimator: Any = estimator.eval()
        self.masks = dict(embeddings.masks_of(estimator.embedding)) if hasattr(estimator, "embedding") else {}
        self.gradients = _has_gradients(self.condition, estimator, getattr(self, "set_size", 0))

    def condition(self, x: Data) -> Any:
        return self.estimator.context(self.estimator.prepare_differentiably(x))


class Density(_Net):
    """q(z | context) of npe."""

    def log_prob(self, z: Tensor, condition: Tensor) -> Tensor:
        return self.estimator.log_prob(z, condition[:, None].expand(-1, z.shape[1], -1))

    def sample(self, condition: Tensor, n: int, generator: torch.Generator) -> Tensor:
        return self.estimator.sample(condition, n, generator)


class DensityOfTheta(_Net):
    """A density over theta itself; its mass beyond the prior's support is not taken off, and counts as moved where it moves."""

    def __init__(self, estimator: Estimator, posterior: Posterior) -> None:
        self.prior = posterior.prior
        super().__init__(estimator)

    def log_prob(self, z: Tensor, condition: Tensor) -> Tensor:
        theta, log_det = self._theta(z)
        batch, n, dim = z.shape
        rows = condition.repeat_interleave(n, dim=0)
        return self.estimator.log_prob(theta.reshape(-1, dim), rows).reshape(batch, n) + log_det

    def sample(self, condition: Tensor, n: int, generator: torch.Generator) -> Tensor:
        theta = self.estimator.sample(condition, n, generator).double().cpu().numpy()
        low, high = self.prior.support
        inside = np.clip(theta, low + 1e-9 * np.maximum(1, np.abs(low)), high - 1e-9 * np.maximum(1, np.abs(high)))
        return torch.as_tensor(self.prior.unconstrain(inside), dtype=torch.float32, device=condition.device)

    def _theta(self, z: Tensor) -> tuple[Tensor, Tensor]:
        numbers = z.detach().double().cpu().numpy()
        theta, log_det = self.prior.constrain(numbers), self.prior.log_abs_det_jacobian(numbers)
        return tuple(torch.as_tensor(v, dtype=torch.float32, device=z.device) for v in (theta, log_det))  # type: ignore[return-value]


class Denoised(_Net):
    """npse and fmpe: draws by a short solve of the ODE, differentiable in the context."""

    objectives = ("energy",)
    estimator: Denoising

    def log_prob(self, z: Tensor, condition: Tensor) -> Tensor:
        raise NotImplementedError

    def sample(self, condition: Tensor, n: int, generator: torch.Generator) -> Tensor:
        noise = torch.randn(n, self.estimator.dim, generator=generator, device=condition.device).expand(len(condition), -1, -1)
        given = self.estimator.field.conditions(condition)
        w = solve_heun(lambda z, t: self.estimator.velocity_back(z, t, given), noise, SOLVER_STEPS)
        return self.estimator.unwhiten(w, condition[:, None])


class Likelihood(_Net):
    """nle and nre: log L(x | z) up to what depends on x alone. set_size: of independent observations of one theta, 0 for one."""

    normalised = False
    objectives = ("forward",)
    estimator: Tractable

    def __init__(self, estimator: Tractable, set_size: int = 0) -> None:
        self.set_size = set_size
        super().__init__(estimator)

    def condition(self, x: Data) -> Tensor:
        each = {name: v.flatten(0, 1) for name, v in x.items()} if self.set_size else x
        values, _ = self.estimator.observed(self.estimator.prepare_differentiably(each))
        return values.unflatten(0, (-1, max(1, self.set_size)))

    def log_prob(self, z: Tensor, condition: Tensor) -> Tensor:
        batch, n, dim = z.shape
        values = condition.repeat_interleave(n, dim=0)
        return self.estimator.log_likelihood(z.reshape(-1, 1, dim), values).sum(-1).view(batch, n)

    def sample(self, condition: Tensor, n: int, generator: torch.Generator) -> Tensor:
        raise NotImplementedError


class Equivariant:
    """GNPE: its recovered density, from fewer chains than the posterior's own. The gradient is that of q(z | x', proxy); the density of
    proxies, for which chains are run anew at every x', and the kernel's widths are held fast. What a step of an attack by gradient sees
    is only where to go: its chains are broken off after a few steps. What attacks are judged by, and the search, run them to the end, or
    for so many steps: chains of an x far from all simulations may never converge."""

    normalised, objectives = True, ("forward",)
    CENTRES, PROXIES, STEPS, MOST_STEPS = 128, 4, 3, 30

    def __init__(self, sampler: GNPESampler) -> None:
        self.sampler = sampler
        main, frame = sampler.estimator.main, sampler.frame
        self.masks = dict(embeddings.masks_of(main.embedding))

        def context(x: Data) -> Tensor:
            proxy = frame.action.identity(1).to(next(main.parameters()).device)
            return main.context(main.prepare_differentiably(frame.standardise(x, proxy, sampler.estimator.sight(x))))

        self.gradients = _has_gradients(context, sampler.estimator)

    def condition(self, x: Data) -> tuple[Data, Centres]:
        steps = self.STEPS if any(v.requires_grad for v in x.values()) else min(self.MOST_STEPS, self.sampler.estimator.most_steps)
        return x, self.sampler.centres({k: v.detach() for k, v in x.items()}, self.CENTRES, steps)

    def log_prob(self, z: Tensor, condition: tuple[Data, Centres]) -> Tensor:
        return self.sampler.marginal(z, *condition, self.PROXIES)

    def sample(self, condition: tuple[Data, Centres], n: int, generator: torch.Generator) -> Tensor:
        raise NotImplementedError


class Joined:
    """An ensemble: the equal mixture of members' densities or draws. Of likelihoods, whose evidences no mixture can do without, the mean of
    the logarithms stands for it: its posterior is their geometric mean."""

    def __init__(self, members: Sequence[Target]) -> None:
        self.members, first = members, members[0]
        self.gradients = all(m.gradients for m in members)
        self.normalised, self.objectives, self.masks = first.normalised, first.objectives, first.masks

    def condition(self, x: Data) -> list[Any]:
        return [m.condition(x) for m in self.members]

    def log_prob(self, z: Tensor, condition: list[Any]) -> Tensor:
        each = torch.stack([m.log_prob(z, c) for m, c in zip(self.members, condition, strict=True)])
        return torch.logsumexp(each, dim=0) - math.log(len(each)) if self.normalised else each.mean(0)

    def sample(self, condition: list[Any], n: int, generator: torch.Generator) -> Tensor:
        share = -(-n // len(self.members))
        return torch.cat([m.sample(c, share, generator) for m, c in zip(self.members, condition, strict=True)], dim=1)[:, :n]


class BlackBox:
    """Any sampler, by its densities alone: a gradient-free search has to do."""

    gradients, normalised, objectives = False, True, ("forward",)

    def __init__(self, sampler: Sampler) -> None:
        self.sampler = sampler
        self.masks: dict[str, str] = {}

    def condition(self, x: Data) -> Data:
        return x

    def log_prob(self, z: Tensor, condition: Data) -> Tensor:
        x = {k: v.detach().cpu().numpy() for k, v in condition.items()}
        return torch.as_tensor(np.asarray(self.sampler.log_prob(z.float().cpu().numpy(), x), float))

    def sample(self, condition: Data, n: int, generator: torch.Generator) -> Tensor:
        raise NotImplementedError


def _has_gradients(condition: Callable[[Data], Tensor], estimator: Any, set_size: int = 0) -> bool:
    """Whether any gradient comes through from x to the condition; fixed summaries of an embedding may let none."""
    spec = estimator.spec
    lead = (1, set_size) if set_size else (1,)
    x = {k: torch.full((*lead, *shape), 0.5, dtype=getattr(torch, spec.dtype)).requires_grad_() for k, shape in spec.shapes.items()}
    given = {k: v.to(next(estimator.parameters()).device) for k, v in x.items()}
    try:
        found = condition(given)
    except RuntimeError:  # summaries that take their input out of torch, such as by .numpy(), do so only without gradient
        condition({k: v.detach() for k, v in given.items()})
        return False
    slopes = torch.autograd.grad(found.sum(), list(x.values()), allow_unused=True)
    return any(slope is not None for slope in slopes)
