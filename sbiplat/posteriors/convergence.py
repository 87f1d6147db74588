r"""What draws of several chains are judged by: whether they agree, how many independent draws they are worth, and when to stop them.

`Convergence` stops Gibbs chains of poses. Of the pose, measured over an observation's chains in coordinates from their centre (clipped
at four robust standard deviations, so that a few chains in a far mode do not hide the others): the lag-1 correlation :math:`\rho`, how far
the start was off in standard deviations, d, and how far the mean and log sd have moved within the last half-life
:math:`h = \ln 2 / \ln(1 / \rho)`. The chains have converged when :math:`d \rho^t \le 0.05` and that last motion is no more than 0.05 beside
its sampling error. For a Gaussian pose of sd s the theory says :math:`\rho = s^2 / (s^2 + \kappa^2)`; both are told. An observation is
given up where most of its chains found no draw within the prior (the column `beyond`) in several steps in a row, each of which costs a
hundred times as much.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sbiplat.errors import UserError
from sbiplat.posteriors.steps import Columns
from sbiplat.symmetry.action import GroupAction
from sbiplat.symmetry.frame import centred, clipped

MOST_UNCONVERGED = 0.02  # share of a batch's observations
NEAR = 0.05  # standard deviations
ERRORS = 3.0  # standard errors
LOST, LOST_STEPS = 0.5, 5  # share of chains, steps in a row


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


@dataclass(frozen=True)
class Convergence:
    """The rule of the module's docstring, for the column `pose`."""

    action: GroupAction
    widths: Callable[[Any], Tensor]  # (b, P) of x
    most_steps: int

    def watch(self, x: Any, columns: Columns) -> _Watch:
        return _Watch(self, columns["pose"], self.widths(x))

    def describe(self) -> dict[str, Any]:
        return {"stops": "converged in mean and spread of the pose", "within": NEAR, "most_steps": self.most_steps}


class _Watch:
    """The pose over the steps: (T, b, P) means and standard deviations of coordinates from a fixed centre, and lag-1 correlations, of the
    observations whose chains still run. figures: of each observation the largest lag-1 correlation over coordinates, that which theory
    gives for the spread there, the steps taken, and whether the chains have not converged."""

    def __init__(self, rule: Convergence, pose: Tensor, widths: Tensor) -> None:
        self.rule, self.widths, (self.centre, v) = rule, widths, centred(rule.action, pose)
        v = clipped(v)
        self.means, self.sds, self.rhos = [v.mean(1)], [self._sd(v)], []
        self.last, self.alive, self.lost = v, np.arange(len(pose)), torch.zeros(len(pose), dtype=torch.long, device=pose.device)
        nothing = np.zeros(len(pose))
        self.figures: dict[str, Any] = {"rho": nothing, "theory": nothing.copy(), "steps": nothing.astype(int),
                                        "unconverged": nothing.astype(bool)}

    @staticmethod
    def _sd(v: Tensor) -> Tensor:
        return v.std(1).clamp_min(1e-300)

    @property
    def steps(self) -> int:
        return len(self.rhos)

    def done(self, columns: Columns) -> Tensor:
        """Take in poses (b, C, S), and beyond (b, C, 1) where there is such: which observations have converged, are given up or have used
        up the steps, (b,)."""
        pose = columns["pose"]
        centre = self.centre[:, None].expand(*pose.shape[:2], -1)
        v = clipped(self.rule.action.between(centre.flatten(0, 1), pose.flatten(0, 1)).unflatten(0, pose.shape[:2]))
        mean, sd = v.mean(1), self._sd(v)
        self.rhos.append(((v - mean[:, None]) * (self.last - self.means[-1][:, None])).mean(1) / (sd * self.sds[-1]))
        self.means.append(mean)
        self.sds.append(sd)
        self.last = v
        converged = self._converged()
        if "beyond" in columns:
            beyond = columns["beyond"].double().flatten(1).mean(1) > LOST
            self.lost = torch.where(beyond, self.lost + 1, torch.zeros_like(self.lost))
        ended = converged | (self.lost >= LOST_STEPS) | (self.steps >= self.rule.most_steps)
        if ended.any():
            self._note(ended, converged)
            self.centre, self.last, self.widths, self.lost = (v[~ended] for v in (self.centre, self.last, self.widths, self.lost))
            self.means, self.sds, self.rhos = ([each[~ended] for each in rows] for rows in (self.means, self.sds, self.rhos))
        return ended

    def _note(self, ended: Tensor, converged: Tensor) -> None:
        """Keep the figures of observations that have ended."""
        variance = self.sds[-1].square()
        theory = variance / (variance + self.widths.square())
        which = ended.cpu().numpy()
        rows, self.alive = self.alive[which], self.alive[~which]
        for name, values in (("rho", self._rho().amax(-1)), ("theory", theory.amax(-1)), ("unconverged", ~converged)):
            self.figures[name][rows] = values[ended].cpu().numpy()
        self.figures["steps"][rows] = self.steps

    def _rho(self) -> Tensor:
        """(b, P): the mean over the later half of the steps; as good as 1 where nothing moves."""
        return torch.stack(self.rhos[len(self.rhos) // 2:]).mean(0).nan_to_num(1.0, 1.0, 1.0).clamp(0.01, 0.999)

    def _converged(self) -> Tensor:
        """(b,)."""
        rho, steps, means, sds = self._rho(), self.steps, torch.stack(self.means), torch.stack(self.sds)
        half = torch.ceil(math.log(2) / -rho.log()).long().clamp(min=1)
        error = ERRORS / math.sqrt(self.last.shape[1])
        ago = (steps - half).clamp(min=0)[None]
        start = (means[0] - means[-1]).abs() / sds[-1] + (sds[0] / sds[-1]).log().abs() + error
        near = start * rho**steps <= NEAR
        drift = (means[-1] - means.gather(0, ago)[0]).abs() / sds[-1] <= NEAR + error
        width = (sds[-1] / sds.gather(0, ago)[0]).log().abs() <= NEAR + error
        return (near & drift & width & (steps >= 2 * half)).all(-1)
