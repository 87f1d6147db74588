"""What draws of several chains are judged by: whether they agree, and how many independent draws they are worth."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sbiplat.errors import UserError

MOST_UNCONVERGED = 0.02  # share of a batch's observations


class ChainError(UserError):
    """The chains of an observation disagree or have not converged, or its evidence cannot be trusted."""


@contextmanager
def judging(sampler: Any) -> Iterator[list[NDArray[np.bool_]] | None]:
    """Meanwhile no observation is refused: for each call, which of its observations would be, (B,). None of samplers without chains."""
    inner = [sampler, *getattr(sampler, "members", ()), *([sampler.inner] if hasattr(sampler, "inner") else [])]
    chained = [s for s in inner if hasattr(s, "judged")]
    found: list[NDArray[np.bool_]] = []
    before = [each.judged for each in chained]
    for each in chained:
        each.judged = found
    try:
        yield found if chained else None
    finally:
        for each, was in zip(chained, before, strict=True):
            each.judged = was


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
