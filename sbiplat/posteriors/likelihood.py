r"""The posterior behind a likelihood (NLE) or a ratio (NRE): :math:`\log L(x | z) + \log p(z)`, sampled by annealed populations.

They begin at a mixture of Gaussians, the learnt r(z | x) with a share of wider components and a share of the law that the bank's prior has
in z (Hesterberg, 1995), so that every place where the prior has mass is reached. Four populations an observation are annealed apart;
split R-hat over them, and the spread of their evidences, say whether they found the same posterior. What they disagree on is refused.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sbiplat.estimators.tractable import Tractable
from sbiplat.observation import Fields
from sbiplat.posteriors import annealing, passes
from sbiplat.posteriors.annealing import Heights, Populations, Streams
from sbiplat.posteriors.convergence import MOST_UNCONVERGED, ChainError, effective_size, r_hat
from sbiplat.posteriors.passes import Contexts

POPULATIONS = 4
MOST_R_HAT = 1.05
MOST_EVIDENCE_ERROR = 0.5  # nats, one standard error
DRAWS_A_CHAIN, LEAST_KEPT = 20, 8  # at the last power
MEND = "give more chains or moves, or train longer"
STATES = 2**21  # kept at a time
CACHED_NUMBERS = 2**21
WIDER, BY = 0.3, 1.8  # share and scale of the proposal's wider components
FROM_PRIOR = 0.1
_DIFFERENCE = 1e-4  # for the slope of the prior
_LOG_SQRT_2PI = 0.5 * math.log(2 * math.pi)
Array = NDArray[np.float64]
LogPrior = Callable[[Array], Array]


class LikelihoodSampler(Contexts):
    """Draws and densities of a `Tractable` estimator, under the prior log_prior(z).

    set_size: how many independent observations of one theta make an x, (B, set_size, ...); 0 where x is one, (B, ...).
    """

    estimator: Tractable

    def __init__(self, estimator: Tractable, log_prior: LogPrior, device: str = "cpu", set_size: int = 0) -> None:
        super().__init__(estimator, device)
        self.log_prior, self.set_size = log_prior, set_size
        self.diagnostics: dict[str, Any] = {}  # of the last draws
        self.judged: list[NDArray[np.bool_]] | None = None  # which observations would be refused: see `judging`

    @torch.no_grad()
    def sample(self, x: Fields, n: int, seed: int) -> NDArray[np.float32]:
        """(B, n, D); fixed by the seed, n and the place in the batch. Raises ChainError."""
        settings = self.estimator.settings
        values, _ = self._observed(x)
        chains = max(settings.chains, n // DRAWS_A_CHAIN) // POPULATIONS
        draws, r_hats, sizes, first = [], [], [], 0
        for part in values.split(max(1, STATES // max(n, POPULATIONS * chains * settings.moves))):
            streams = Streams([_seed(seed, first + b, k) for b in range(len(part)) for k in range(POPULATIONS)], self.device)
            path, found = self._annealed(part, streams, chains)
            rows = torch.arange(len(streams), device=self.device)
            kept = max(LEAST_KEPT, -(-n // (POPULATIONS * chains)))
            record, _, _ = annealing.move(path, rows, found.states[:, -1], torch.ones_like(found.step), found.step, found.factor,
                                          kept * settings.thin, settings.leaps, streams)
            apart = _apart(record[:, settings.thin - 1::settings.thin])
            r_hats.append(_r_hat(apart))
            sizes.append(effective_size(apart.flatten(2, 3).double().cpu().numpy()).min(1))
            order = torch.stack([torch.randperm(kept * chains * POPULATIONS, generator=streams[b * POPULATIONS], device=self.device)[:n]
                                 for b in range(len(part))])
            pooled = apart.flatten(1, 3)
            draws.append(pooled.gather(1, order[..., None].expand(-1, -1, pooled.shape[-1])).cpu().numpy())
            first += len(part)
        worst = np.concatenate(r_hats)
        self.diagnostics = {"ess_min": float(np.concatenate(sizes).min()), "r_hat_max": float(worst.max())}
        self._refuse(worst, MOST_R_HAT, "the draws are not to be used: the populations disagree, r_hat", MEND)
        return np.concatenate(draws)

    @torch.no_grad()
    def log_prob(self, z: NDArray[np.float32], x: Fields) -> Array:
        """log L(x | z) + log p(z) - log Z; raises ChainError where Z cannot be trusted."""
        values, _ = self._observed(x)
        log_z, errors, r_hats = self._evidence(values)
        what = "the density is not to be used: "
        self._refuse(r_hats, MOST_R_HAT, what + "the populations that give the evidence disagree, r_hat", MEND)
        self._refuse(errors, MOST_EVIDENCE_ERROR, what + "the standard error of the log-evidence, in nats,", MEND)
        points = torch.as_tensor(z, device=self.device)
        path = _Path(self.estimator, values, self.log_prior, 1)
        return path.heights(torch.arange(len(points), device=self.device), points, None).target.cpu().numpy() - log_z[:, None]

    def log_evidence(self, x: Fields) -> tuple[Array, Array]:
        """log p(x) under the model for each observation, and its standard error: (B,), (B,). For a ratio, log of p(x) over the bank's."""
        values, left_out = self._observed(x)
        log_z, errors, _ = self._evidence(values)
        return log_z + left_out, errors

    def under(self, log_prior: LogPrior) -> LikelihoodSampler:
        """The same likelihood under another prior."""
        return LikelihoodSampler(self.estimator, log_prior, str(self.device), self.set_size)

    def of_sets(self, k: int) -> LikelihoodSampler:
        """The same of k independent observations of one theta, whose log-likelihoods add."""
        return LikelihoodSampler(self.estimator, self.log_prior, str(self.device), k)

    def _refuse(self, figures: Array, limit: float, what: str, mend: str) -> None:
        over = ~(figures <= limit)
        if self.judged is not None:
            self.judged.append(over)
        elif over.sum() > MOST_UNCONVERGED * len(figures):
            where = "" if len(figures) == 1 else f" in {over.sum()} of {len(figures)} observations"
            raise ChainError(f"{what} {figures[over].max():.2f} is over {limit:g}{where}; {mend}")

    # ------------------------------------------------------------------------------------------------------- parts

    @torch.no_grad()
    def _observed(self, x: Fields) -> tuple[Tensor, Array]:
        """What the likelihood takes, (B, k, F), and what it leaves out of log p(x), (B,)."""
        each = {name: v.reshape(-1, *v.shape[2:]) for name, v in x.items()} if self.set_size else x
        parts = [self.estimator.observed(p) for p in self.prepared(each)]
        values, left_out = torch.cat([p[0] for p in parts]), torch.cat([p[1] for p in parts]).double().cpu().numpy()
        k = max(1, self.set_size)
        return values.unflatten(0, (-1, k)), left_out.reshape(-1, k).sum(1)

    def _annealed(self, values: Tensor, streams: Streams, chains: int) -> tuple[_Path, Populations]:
        settings, path = self.estimator.settings, _Path(self.estimator, values, self.log_prior, POPULATIONS)
        try:
            return path, annealing.anneal(path, streams, chains, settings.moves, settings.leaps)
        except annealing.StuckError:
            raise ChainError("no draw of the proposal has any posterior density: x is far from the bank, or the prior was changed to one "
                             "that hardly overlaps with the posterior under the bank's") from None

    @torch.no_grad()
    def _evidence(self, values: Tensor) -> tuple[Array, Array, Array]:
        """log Z of each observation, its standard error over the populations and their R-hat; the same streams for every observation."""
        settings, found, r_hats = self.estimator.settings, [], []
        for part in values.split(max(1, STATES // (settings.chains * settings.moves))):
            streams = Streams([_seed(0, 0, k) for _ in part for k in range(POPULATIONS)], self.device)
            _, made = self._annealed(part, streams, settings.chains // POPULATIONS)
            found.append(made.log_evidence.view(-1, POPULATIONS))
            r_hats.append(_r_hat(_apart(made.states)))
        each = torch.cat(found).cpu().numpy()
        top = each.max(1)
        log_z = top + np.log(np.exp(each - top[:, None]).mean(1))
        return log_z, each.std(1, ddof=1) / math.sqrt(POPULATIONS), np.concatenate(r_hats)


def _apart(states: Tensor) -> Tensor:
    """(B populations, moves, chains, D) as (B, moves, chains, populations, D)."""
    return states.unflatten(0, (-1, POPULATIONS)).permute(0, 2, 3, 1, 4)


def _r_hat(apart: Tensor) -> Array:
    """Split R-hat over the populations, the worst parameter's, (B,)."""
    return r_hat(apart.flatten(1, 2).double().cpu().numpy()).max(1)


def _seed(seed: int, observation: int, population: int) -> int:
    return int(np.random.SeedSequence(seed, spawn_key=(0xA22E, observation, population)).generate_state(1, np.uint64)[0] >> 1)


class _Path:
    """From the mixture to the posterior for B sets of k observations, values (B, k, F); `each` populations of every one, side by side."""

    def __init__(self, estimator: Tractable, values: Tensor, log_prior: LogPrior, each: int) -> None:
        self.estimator, self.values, self.log_prior, self.each = estimator, values, log_prior, each
        self.logits, self.factor, self.shift = _mixture(estimator, values)
        self.log_det = torch.diagonal(self.factor, dim1=-2, dim2=-1).log().sum(-1) - estimator.theta_scale.log().sum()

    def draw(self, rows: Tensor, n: int, streams: Streams) -> Tensor:
        owner = rows // self.each
        which = streams.which(rows, self.logits[owner].exp(), n)
        noise = streams.normal(rows, n, self.factor.shape[-1])
        factor, shift = self.factor[owner[:, None], which], self.shift[owner[:, None], which]
        return self.estimator.unscaled(torch.linalg.solve_triangular(factor, (noise + shift)[..., None], upper=False)[..., 0])

    def _base(self, owner: Tensor, z: Tensor) -> Tensor:
        """log r of z (R, n, D), (R, n)."""
        factor = self.factor[owner]  # (R, K, D, D)
        gap = (self.estimator.scaled(z) @ factor.flatten(1, 2).mT).unflatten(2, factor.shape[1:3]) - self.shift[owner][:, None]
        each = (-0.5 * gap.square() - _LOG_SQRT_2PI).sum(-1)
        return torch.logsumexp(each + (self.logits + self.log_det)[owner][:, None], dim=-1)

    def heights(self, rows: Tensor, z: Tensor, power: Tensor | None) -> Heights:
        count, n = z.shape[:2]
        base, target = (torch.empty(count, n, dtype=torch.float64, device=z.device) for _ in range(2))
        slope = torch.empty_like(z) if power is not None else z.new_empty(0)
        width = self.values.shape[2]
        per_pass = max(256, min(passes.ROWS_PER_PASS, CACHED_NUMBERS // width**2))  # a Gaussian head has width^2 / 2 numbers a row
        most = max(1, per_pass // self.values.shape[1])
        high = max(1, most // n)
        for a in range(0, count, high):
            for b in range(0, n, most):
                place = slice(a, a + high), slice(b, b + most)
                at_power = None if power is None else power[place[0]]
                base[place], target[place], part = self._heights(rows[place[0]] // self.each, z[place], at_power)
                if part is not None:
                    slope[place] = part
        return Heights(base, target, slope)

    def _heights(self, owner: Tensor, z: Tensor, power: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
        prior, prior_slope = self._prior(z, power is not None)
        with torch.set_grad_enabled(power is not None):
            z = z.detach().requires_grad_(power is not None)
            base = self._base(owner, z)
            flat = z.reshape(-1, 1, z.shape[-1])
            values = self.values[owner.repeat_interleave(z.shape[1])]
            likelihood = self.estimator.log_likelihood(flat, values).sum(-1).view(base.shape)
            if power is None:
                slope = None
            else:
                b = power.to(z.dtype)[:, None]
                slope = torch.autograd.grad(((1 - b) * base + b * likelihood).sum(), z)[0] + b[..., None] * prior_slope
                slope = slope.nan_to_num(0.0, 0.0, 0.0)
        target = likelihood.detach().double() + prior
        return base.detach().double(), torch.where(target.isnan(), -torch.inf, target), slope

    def _prior(self, z: Tensor, with_slope: bool) -> tuple[Tensor, Tensor]:
        """log p(z), (R, n), and its slope by central differences, (R, n, D), 0 across an edge."""
        points = z.detach().double().cpu().numpy()
        dim = points.shape[-1]
        steps = _DIFFERENCE * np.concatenate([np.zeros((1, dim)), np.eye(dim), -np.eye(dim)]) if with_slope else np.zeros((1, dim))
        heights = np.asarray(self.log_prior(points[..., None, :] + steps), float)
        with np.errstate(invalid="ignore"):
            slope = (heights[..., 1:dim + 1] - heights[..., dim + 1:]) / (2 * _DIFFERENCE)
        slope = np.where(np.isfinite(slope), slope, 0.0)
        return torch.as_tensor(heights[..., 0], device=z.device), torch.as_tensor(slope, device=z.device, dtype=z.dtype)


def _mixture(estimator: Tractable, values: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Where populations begin: log-weights (B, K), and the lower triangular factor M (B, K, D, D) and shift v (B, K, D) by which each
    component is the law of the z, at unit scale, for which M z - v is N(0, I)."""
    whitened = estimator.proposal
    context = estimator.proposal_context(values.flatten(0, 1))
    law = whitened.inner.mixture(context)  # type: ignore[operator, union-attr]
    scale, loc = law.base.scale_tril, law.base.loc  # in the head's coordinates, A (z - mu)
    mu, A, _ = whitened.head(context)
    factor = torch.linalg.solve_triangular(scale, A[:, None].expand_as(scale), upper=False)
    shift = torch.linalg.solve_triangular(scale, loc[..., None], upper=False)[..., 0] + (factor @ mu[:, None, :, None])[..., 0]
    logits = law.logits.log_softmax(-1)
    if values.shape[1] > 1:
        logits, factor, shift = _product(logits, factor, shift, values.shape[1])
    share = [math.log((1 - FROM_PRIOR) * (1 - WIDER)), math.log((1 - FROM_PRIOR) * WIDER), math.log(FROM_PRIOR)]
    prior = torch.eye(estimator.dim, device=values.device).expand(len(values), 1, -1, -1)
    return (torch.cat([logits + share[0], logits + share[1], logits.new_full((len(values), 1), share[2])], 1),
            torch.cat([factor, factor / BY, prior], 1), torch.cat([shift, shift / BY, shift.new_zeros(len(values), 1, estimator.dim)], 1))


def _product(logits: Tensor, factor: Tensor, shift: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor]:
    r"""Of the mixtures r(z | x_i) of sets of k observations, one Gaussian a set, :math:`p(z) \prod_i r(z | x_i) / p(z)` with each
    mixture by its moments and p = N(0, I); a mixture wider than p in some direction counts as p there."""
    share = logits.exp().double()[..., None]
    inverse = torch.linalg.inv(factor.double())
    means = (inverse @ shift.double()[..., None])[..., 0]
    mean = (share * means).sum(1)
    gap = means - mean[:, None]
    covariance = (share[..., None] * (inverse @ inverse.mT + gap[..., None] * gap[..., None, :])).sum(1)
    values, vectors = torch.linalg.eigh(covariance)
    more = (vectors * (1 / values - 1).clamp_min(0)[:, None]) @ vectors.mT  # precision beyond the prior's
    linear = ((more + torch.eye(more.shape[-1], device=more.device)) @ mean[..., None])[..., 0]
    precision = more.unflatten(0, (-1, k)).sum(1) + torch.eye(more.shape[-1], device=more.device)
    centre = torch.linalg.solve(precision, linear.unflatten(0, (-1, k)).sum(1))
    whole = torch.linalg.inv(torch.linalg.cholesky(torch.linalg.inv(precision)))
    return (logits.new_zeros(len(whole), 1), whole[:, None].to(factor.dtype), (whole @ centre[..., None]).mT.to(shift.dtype))
