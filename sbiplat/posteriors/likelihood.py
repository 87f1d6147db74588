r"""The posterior behind a likelihood (NLE): :math:`\log q(x | z) + \log p(z)`, sampled by chains or by importance resampling.

Chains start at draws of the proposal r(z | x), weighted by the posterior over r and resampled. They are held against split
R-hat; what has not converged is refused. The evidence, :math:`\hat Z = \frac{1}{M} \sum q(x | z_m) p(z_m) / r(z_m | x)`, makes the density
a normalised one; its weights' Pareto k-hat says whether it can be trusted.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sbiplat.errors import UserError
from sbiplat.estimators.nle import NLE
from sbiplat.nets.flows import Defensive
from sbiplat.observation import Fields
from sbiplat.posteriors import passes
from sbiplat.posteriors.chains import effective_size, ensemble_slice, pareto_k, r_hat
from sbiplat.posteriors.passes import Contexts, stream

MOST_R_HAT, MOST_K_HAT = 1.1, 0.7
TOLERATED = 0.02  # share of a batch's observations that may be worse
CHAIN_ROWS = 65_536
DRAWS_A_CHAIN, MOST_CHAINS = 20, 2000
CACHED_NUMBERS = 2**21
LEAST_STEPS = 120  # that R-hat is taken over
Array = NDArray[np.float64]
LogPrior = Callable[[Array], Array]


class ChainError(UserError):
    """The chains of an observation have not converged, or its importance weights cannot be trusted."""


class LikelihoodSampler(Contexts):
    """Draws and densities of a `NLE` estimator, under the prior log_prior(z)."""

    estimator: NLE

    def __init__(self, estimator: NLE, log_prior: LogPrior, device: str = "cpu") -> None:
        super().__init__(estimator, device)
        self.log_prior = log_prior
        self.diagnostics: dict[str, Any] = {}  # of the last draws

    @torch.no_grad()
    def sample(self, x: Fields, n: int, seed: int) -> NDArray[np.float32]:
        """(B, n, D); fixed by the seed, n and B. Raises ChainError."""
        generator = torch.Generator(self.device).manual_seed(stream(seed))
        values, _ = self._observed(x)
        parts = [self._drawn(part, n, generator) for part in values.split(max(1, CHAIN_ROWS // max(self.estimator.settings.chains, n)))]
        draws, r_hats, k_hats, sizes = (np.concatenate(column) for column in zip(*parts, strict=True))
        by_chains = ~np.isnan(r_hats)
        self.diagnostics = {"ess_min": float(sizes.min()), "by_chains": int(by_chains.sum())}
        for figure, judged, limit, mend in (("r_hat", r_hats[by_chains], MOST_R_HAT, "give more warmup or chains, or train longer"),
                                            ("k_hat", k_hats[~by_chains], MOST_K_HAT, "use sampler = 'slice', or train longer")):
            if len(judged):
                self.diagnostics[f"{figure}_max"] = float(judged.max())
            bad = judged[~(judged <= limit)]
            if len(bad) > TOLERATED * len(draws):
                where = "" if len(draws) == 1 else f" in {len(bad)} of {len(draws)} observations"
                raise ChainError(f"the draws are not to be used: {figure} {bad.max():.2f} is over {limit:g}{where}; {mend}")
        return draws

    def _drawn(self, values: Tensor, n: int, generator: torch.Generator) -> tuple[NDArray[np.float32], Array, Array, Array]:
        """Draws, R-hat (NaN without chains), k-hat and effective size of each observation; `auto` chooses for each."""
        how = self.estimator.settings.sampler
        count = len(values)
        if how == "slice":
            draws, r_hats, sizes = self._chains(values, n, generator)
            return draws, r_hats, np.full(count, np.nan), sizes
        draws, k_hats, sizes = self._resampled(values, n, generator)
        r_hats = np.full(count, np.nan)
        poor = np.flatnonzero(~((k_hats <= MOST_K_HAT) & (sizes >= n / 2))) if how == "auto" else np.zeros(0, int)
        if len(poor):
            draws[poor], r_hats[poor], sizes[poor] = self._chains(values[torch.as_tensor(poor, device=self.device)], n, generator)
        return draws, r_hats, k_hats, sizes

    @torch.no_grad()
    def log_prob(self, z: NDArray[np.float32], x: Fields) -> Array:
        """log q(x | z) + log p(z) - log Z, with Z by importance sampling; raises ChainError where that cannot be trusted."""
        values, _ = self._observed(x)
        points = torch.as_tensor(z, device=self.device)
        batch, n, dim = points.shape
        log_z, k_hats = self._evidence(values)
        bad = k_hats[~(k_hats <= MOST_K_HAT)]
        if len(bad) > TOLERATED * batch:
            raise ChainError(f"the density is not to be used: the evidence has k_hat {bad.max():.2f}, over {MOST_K_HAT:g}, in "
                             f"{len(bad)} of {batch} observations; train longer, or use draws alone")
        owner = torch.arange(batch, device=self.device).repeat_interleave(n)
        return self._potential(values)(points.reshape(-1, dim), owner).double().cpu().numpy().reshape(batch, n) - log_z[:, None]

    @torch.no_grad()
    def log_evidence(self, x: Fields) -> tuple[Array, Array]:
        """log p(x) under the model for each observation, (B,), and the Pareto k-hat of its weights, (B,)."""
        values, log_det = self._observed(x)
        log_z, k_hats = self._evidence(values)
        return log_z + log_det, k_hats

    def _evidence(self, values: Tensor) -> tuple[Array, Array]:
        """log Z of standardised x and its k-hat, each observation from the same stream, whatever stands beside it in a batch."""
        log_z, k_hats = [], []
        for row in values.split(1):
            log_w, _, value = self._weights(row, torch.Generator(self.device).manual_seed(stream(0)))
            log_z.append(value[0])
            k_hats.append(pareto_k(log_w[0]))
        return np.array(log_z), np.array(k_hats)

    def under(self, log_prior: LogPrior) -> LikelihoodSampler:
        """The same likelihood under another prior."""
        return LikelihoodSampler(self.estimator, log_prior, str(self.device))

    # ------------------------------------------------------------------------------------------------------- parts

    def _observed(self, x: Fields) -> tuple[Tensor, Array]:
        parts = list(self.prepared(x))
        return torch.cat([p["x"] for p in parts]), torch.cat([p["log_det"] for p in parts]).double().cpu().numpy()

    def _potential(self, values: Tensor) -> Callable[[Tensor, Tensor], Tensor]:
        rows = max(256, min(passes.ROWS_PER_PASS, CACHED_NUMBERS // values.shape[1] ** 2))  # the head has F^2 / 2 numbers a row

        def potential(z: Tensor, owner: Tensor) -> Tensor:
            prior = torch.as_tensor(self.log_prior(z.double().cpu().numpy()), device=self.device).float()
            parts = [self.estimator.log_likelihood(z[a:a + rows], values[owner[a:a + rows]]) for a in range(0, len(z), rows)]
            value = torch.cat(parts) + prior if parts else prior
            return torch.where(value.isnan(), -torch.inf, value)

        return potential

    def _proposal(self, values: Tensor, generator: torch.Generator) -> _Proposal:
        return _Proposal(self.estimator, self.estimator.of_x(values), generator)

    def _weights(self, values: Tensor, generator: torch.Generator) -> tuple[Array, Tensor, Array]:
        """log-weights (B, M) of proposal draws z (B, M, D), and the log-evidence (B,) of standardised x."""
        count = self.estimator.settings.proposals
        log_w, draws = [], []
        for part in values.split(max(1, passes.ROWS_PER_PASS // count)):
            proposal = self._proposal(part, generator)
            z = proposal.draw(count)
            log_r = proposal.log_prob(z)
            owner = torch.arange(len(part), device=self.device).repeat_interleave(count)
            log_w.append(self._potential(part)(z.reshape(-1, z.shape[-1]), owner).view(len(part), count) - log_r)
            draws.append(z)
        weights = torch.cat(log_w).double().cpu().numpy()
        top = weights.max(1, keepdims=True)
        if not np.isfinite(top).all():
            raise ChainError("no draw of the proposal has any posterior density: x is far from the bank, or the prior was changed to one "
                             "that hardly overlaps with the posterior under the bank's")
        return weights, torch.cat(draws), (top + np.log(np.exp(weights - top).mean(1, keepdims=True)))[:, 0]

    def _resample(self, log_w: Array, z: Tensor, n: int, generator: torch.Generator) -> Tensor:
        share = torch.as_tensor(np.exp(log_w - log_w.max(1, keepdims=True)), device=self.device)
        which = torch.multinomial(share, n, replacement=True, generator=generator)
        return z[torch.arange(len(z), device=self.device)[:, None], which]

    def _resampled(self, values: Tensor, n: int, generator: torch.Generator) -> tuple[NDArray[np.float32], Array, Array]:
        """Sampling and importance resampling, from at least four proposal draws for each that is kept."""
        log_w, z = self._weights_for(values, n, generator)
        share = np.exp(log_w - log_w.max(1, keepdims=True))
        size = np.square(share.sum(1)) / np.square(share).sum(1)
        return self._resample(log_w, z, n, generator).cpu().numpy(), np.array([pareto_k(row) for row in log_w]), size

    def _weights_for(self, values: Tensor, n: int, generator: torch.Generator) -> tuple[Array, Tensor]:
        rounds = max(1, -(-4 * n // self.estimator.settings.proposals))
        parts = [self._weights(values, generator) for _ in range(rounds)]
        return np.concatenate([p[0] for p in parts], axis=1), torch.cat([p[1] for p in parts], dim=1)

    def _chains(self, values: Tensor, n: int, generator: torch.Generator) -> tuple[NDArray[np.float32], Array, Array]:
        settings = self.estimator.settings
        chains = max(settings.chains, min(n // DRAWS_A_CHAIN, MOST_CHAINS)) // 2 * 2  # many draws take more chains, not longer ones
        log_w, z, _ = self._weights(values, generator)
        start = self._resample(_tempered(log_w, chains), z, chains, generator)
        start = start + 1e-3 * z.std(1, keepdim=True) * torch.randn(start.shape, generator=generator, device=self.device)  # no two alike
        steps = max(-(-n // chains) * settings.thin, LEAST_STEPS)
        whole = ensemble_slice(self._potential(values), start, settings.warmup + steps, generator,
                               self._proposal(values, generator))[:, settings.warmup:]
        record = whole.double().cpu().numpy()
        draws = whole[:, settings.thin - 1::settings.thin].reshape(len(values), -1, whole.shape[-1])
        order = torch.randperm(draws.shape[1], generator=generator, device=self.device)[:n]
        return draws[:, order].cpu().numpy(), r_hat(record).max(1), effective_size(record).min(1)


def _tempered(log_w: Array, wanted: int) -> Array:
    """Weights raised to the largest power of 1, 1/2, 1/4 ... that leaves each observation so many effective draws: chains that start as
    copies of a few draws have no differences to move along."""
    out = log_w - log_w.max(1, keepdims=True)
    for _ in range(12):
        share = np.exp(out)
        few = np.square(share.sum(1)) < wanted * np.square(share).sum(1)
        if not few.any():
            break
        out[few] *= 0.5
    return out


class _Proposal:
    """r(z | x) of some observations over unconstrained theta, with wider tails than were learnt."""

    def __init__(self, estimator: NLE, context: Tensor, generator: torch.Generator) -> None:
        self._estimator, self._context, self._generator = estimator, context, generator
        self._law = Defensive(estimator.proposal)

    def draw(self, n: int) -> Tensor:
        return self._estimator.unscaled(self._law.sample(self._context, n, self._generator))

    def log_prob(self, z: Tensor) -> Tensor:
        return self._law.log_prob(self._estimator.scaled(z), self._context) - self._estimator.theta_scale.log().sum()
