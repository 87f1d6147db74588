r"""Ensemble slice sampling, vectorised over observations and chains (Karamanis & Beutler, 2021; Neal, 2003).

The chains of an observation are in two halves. Each chain of one half moves along the difference of two chains of the other,
:math:`\eta = X_k - X_l`: directions and scales of the target without tuning, whatever its shape, and from mode to mode. Along it,
a level :math:`\log u` below the log-density and an interval of fixed length about the chain, shrunk towards it until a point of it
lies above the level. All chains of all observations advance together; only those that still search are evaluated.

Where there is a proposal r, every step ends with an independence move, :math:`z' \sim r`, taken with probability
:math:`\min(1, p(z') r(z) / (p(z) r(z')))`: chains then change between modes that lie far apart.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Potential = Callable[[Tensor, Tensor], Tensor]  # z (N, D), owner (N,): the observation of each row -> log-density (N,)

SHRINKS = 60
INTERVAL = 8.0  # in sds of a Gaussian target along a line


class Proposal(Protocol):
    """A law of z for each observation, from which chains may jump."""

    def draw(self, n: int) -> Tensor:
        """(B, n, D)."""
        ...

    def log_prob(self, z: Tensor) -> Tensor:
        """log r of z (B, n, D), (B, n)."""
        ...


def ensemble_slice(
    potential: Potential, start: Tensor, steps: int, generator: torch.Generator, proposal: Proposal | None = None
) -> Tensor:
    """Run chains from start (B, C, D), C even: (B, steps, C, D). A step is a slice move for every two parameters, and a jump."""
    batch, chains, dim = start.shape
    device, half = start.device, chains // 2
    owner = torch.arange(batch, device=device)[:, None].expand(batch, half)
    state = start.clone()
    halves = [(slice(0, half), slice(half, chains)), (slice(half, chains), slice(0, half))] * max(1, dim // 2)
    everyone = torch.arange(batch, device=device).repeat_interleave(chains)
    value = potential(state.reshape(-1, dim), everyone).view(batch, chains)
    length = INTERVAL / math.sqrt(2 * dim)
    out = torch.empty(batch, steps, chains, dim, device=device, dtype=start.dtype)

    def uniform(*shape: int) -> Tensor:
        return torch.rand(shape, generator=generator, device=device)

    for step in range(steps):
        for move, stay in halves:
            first = (uniform(batch, half) * half).long().clamp_max(half - 1)
            other = (first + 1 + (uniform(batch, half) * (half - 1)).long().clamp_max(half - 2)) % half
            still = state[:, stay]
            index = torch.arange(batch, device=device)[:, None]
            direction = still[index, first] - still[index, other]
            level = value[:, move] + torch.log(uniform(batch, half).clamp_min(1e-38))
            low = -length * uniform(batch, half)
            high = low + length
            moved, moved_value = state[:, move].clone(), value[:, move].clone()
            active = torch.ones(batch, half, dtype=torch.bool, device=device)
            for _ in range(SHRINKS):
                t = low[active] + uniform(int(active.sum())) * (high[active] - low[active])
                point = state[:, move][active] + t[:, None] * direction[active]
                height = potential(point, owner[active])
                found = height > level[active]
                rows = active.nonzero()
                hit = rows[found]
                moved[hit[:, 0], hit[:, 1]], moved_value[hit[:, 0], hit[:, 1]] = point[found], height[found]
                miss, t = rows[~found], t[~found]
                above = t > 0
                high[miss[above, 0], miss[above, 1]] = t[above]
                low[miss[~above, 0], miss[~above, 1]] = t[~above]
                active[hit[:, 0], hit[:, 1]] = False
                if not bool(active.any()):
                    break
            state[:, move], value[:, move] = moved, moved_value
        if proposal is not None:
            there = proposal.draw(chains)
            height = potential(there.reshape(-1, dim), everyone).view(batch, chains)
            gain = height - value + proposal.log_prob(state) - proposal.log_prob(there)
            taken = torch.log(uniform(batch, chains).clamp_min(1e-38)) < gain
            state, value = torch.where(taken[..., None], there, state), torch.where(taken, height, value)
        out[:, step] = state
    return out


def r_hat(draws: NDArray[np.float64]) -> NDArray[np.float64]:
    """Split R-hat of (B, T, C, D) for each parameter, (B, D) (Gelman et al., 2013); 1 where nothing moves or T < 4."""
    steps = draws.shape[1] // 2
    if steps < 2:
        return np.ones((len(draws), draws.shape[-1]))
    halves = np.concatenate([draws[:, :steps], draws[:, steps:2 * steps]], axis=2)
    within = halves.var(1, ddof=1).mean(1)
    between = halves.mean(1).var(1, ddof=1)
    return np.sqrt((steps - 1) / steps + between / np.where(within > 0, within, np.inf))


def effective_size(draws: NDArray[np.float64]) -> NDArray[np.float64]:
    """Effective sample size of (B, T, C, D) for each parameter, (B, D): Geyer's initial positive sequence over all chains."""
    _, steps, chains, _ = draws.shape
    centred = draws - draws.mean(1, keepdims=True)
    padded = np.fft.rfft(centred, 2 * steps, axis=1)
    covariance = np.fft.irfft(padded * padded.conj(), axis=1)[:, :steps].mean(2) / steps  # (B, T, D)
    means = draws.mean(1)
    total = covariance[:, 0] + means.var(1, ddof=1)
    rho = 1 - (covariance[:, :1] - covariance) / np.where(total > 0, total, np.inf)[:, None]
    pairs = rho[:, 0:steps // 2 * 2:2] + rho[:, 1:steps // 2 * 2:2]
    positive = np.cumprod(pairs > 0, axis=1)
    time = np.maximum(2 * (pairs * positive).sum(1) - 1, 1 / math.log10(max(10, steps * chains)))
    return steps * chains / time


def pareto_k(log_weights: NDArray[np.float64]) -> float:
    """k-hat of importance weights (Vehtari et al., 2024): above 0.7 they are not to be trusted."""
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import arviz

        return float(arviz.psislw(np.asarray(log_weights, float))[1])
