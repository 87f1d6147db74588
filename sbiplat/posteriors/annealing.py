r"""Annealed populations: from a law that can be drawn from, r, to a posterior p known up to its evidence, by the laws between,

.. math:: \pi_b(z) \propto r(z)^{1-b} \, p(z)^b, \qquad 0 \le b \le 1 .

Sequential Monte Carlo (Del Moral et al., 2006). Each population raises its power b by itself, as far as half of its draws stay
effective under the weights :math:`(p / r)^{\Delta b}`, is resampled by them, and is moved by steps that leave :math:`\pi_b` as it is.
All states on the way count as draws, not the last of each chain alone (waste-free: Dau & Chopin, 2022). The product of the mean weights
estimates the evidence :math:`\int p`. Populations that were annealed apart tell by their disagreement what one alone cannot: that it lost
a mode.

A move is a jump, :math:`z' \sim r`, taken with probability :math:`\min(1, [p(z') r(z) / (p(z) r(z'))]^b)`, and then a Hamiltonian
trajectory (Duane et al., 1987; Neal, 2011) in the coordinates that whiten the population, of a few leapfrog steps; their length follows
the rate at which trajectories are taken. All populations of all observations move at once.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

ACCEPTANCE = 0.8
FIRST_STEP, LEAST_STEP, MOST_STEP = 0.5, 1e-4, 1.2  # of the leapfrog, in sds of the population
MOST_POWERS = 400


class Heights(NamedTuple):
    """log r, log p (up to the evidence), each (R, n), and the gradient of log pi_b, (R, n, D), at points of some populations."""

    base: Tensor
    target: Tensor
    slope: Tensor

    @property
    def log_weight(self) -> Tensor:
        return torch.where(self.target == -torch.inf, -torch.inf, self.target - self.base)

    def where(self, taken: Tensor, other: Heights) -> Heights:
        """These where taken (R, n), the other ones elsewhere."""
        return Heights(torch.where(taken, self.base, other.base), torch.where(taken, self.target, other.target),
                       torch.where(taken[..., None], self.slope, other.slope))


class Path(Protocol):
    """The laws r and p of each of R populations; `rows` says which of them are meant."""

    def draw(self, rows: Tensor, n: int, streams: Streams) -> Tensor:
        """(R, n, D) draws of r."""
        ...

    def heights(self, rows: Tensor, z: Tensor, power: Tensor | None) -> Heights:
        """At z (R, n, D) for the powers (R,); without powers there is no gradient, and the slope is empty."""
        ...


class Streams:
    """A random stream for each population: what it draws does not depend on those beside it."""

    def __init__(self, seeds: Sequence[int], device: torch.device) -> None:
        self.device = device
        self._generators = [torch.Generator(device).manual_seed(seed) for seed in seeds]

    def __len__(self) -> int:
        return len(self._generators)

    def _each(self, rows: Tensor, draw: Callable[[int, torch.Generator], Tensor]) -> Tensor:
        return torch.stack([draw(k, self._generators[row]) for k, row in enumerate(rows.tolist())])

    def __getitem__(self, row: int) -> torch.Generator:
        return self._generators[row]

    def uniform(self, rows: Tensor, *shape: int) -> Tensor:
        """U(0, 1), (R, *shape)."""
        return self._each(rows, lambda k, g: torch.rand(shape, generator=g, device=self.device))

    def normal(self, rows: Tensor, *shape: int) -> Tensor:
        """N(0, 1), (R, *shape)."""
        return self._each(rows, lambda k, g: torch.randn(shape, generator=g, device=self.device))

    def which(self, rows: Tensor, shares: Tensor, n: int) -> Tensor:
        """n indices for each row of shares (R, K), with replacement: (R, n)."""
        return self._each(rows, lambda k, g: torch.multinomial(shares[k], n, replacement=True, generator=g))


class Populations(NamedTuple):
    """Annealed populations: their states at power 1, (R, moves, C, D), the log-evidence (R,), and the leapfrog's steps (R,) and
    factors (R, D, D)."""

    states: Tensor
    log_evidence: Tensor
    step: Tensor
    factor: Tensor
    powers: Tensor  # how many each took, (R,)


class StuckError(Exception):
    """No draw of r has any density under p, or the powers do not reach 1."""


def anneal(path: Path, streams: Streams, chains: int, moves: int, leaps: int) -> Populations:
    """A population from r to p for each stream, of `chains` chains, moved `moves` times at each power. Raises StuckError."""
    count, device = len(streams), streams.device
    rows = torch.arange(count, device=device)
    states = path.draw(rows, moves * chains, streams)
    log_w = path.heights(rows, states, None).log_weight
    power, log_evidence = log_w.new_zeros(count), log_w.new_zeros(count)
    step, powers = log_w.new_full((count,), FIRST_STEP), torch.zeros_like(rows)
    factor = states.new_zeros(count, *2 * [states.shape[-1]])
    for _ in range(MOST_POWERS):
        now = rows[power < 1]
        if not len(now):
            return Populations(states.unflatten(1, (moves, chains)), log_evidence, step, factor, powers)
        if not bool((log_w[now] > -torch.inf).any(1).all()):
            raise StuckError
        rise = _rise(log_w[now], 1 - power[now])
        scaled = rise[:, None] * (log_w[now] - log_w[now].amax(1, keepdim=True))
        share = torch.where(log_w[now] == -torch.inf, 0.0, scaled.exp())
        log_evidence[now] += share.mean(1).log() + rise * log_w[now].amax(1)
        power[now] += rise
        power[now[1 - power[now] < 1e-9]] = 1.0
        picked = streams.which(now, share, chains)
        factor[now] = _factor(states[now], share)
        start = states[now].gather(1, picked[..., None].expand(-1, -1, states.shape[-1]))
        record, weights, step[now] = move(path, now, start, power[now], step[now], factor[now], moves, leaps, streams, adapt=True)
        states[now], log_w[now] = record.flatten(1, 2), weights.flatten(1, 2)
        powers[now] += 1
    raise StuckError


def move(
    path: Path, rows: Tensor, z: Tensor, power: Tensor, step: Tensor, factor: Tensor, moves: int, leaps: int, streams: Streams, *,
    adapt: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """States after each move of z (R, C, D), (R, moves, C, D), their log-weights (R, moves, C), and the steps, adapted where asked."""
    chains, here = z.shape[1], path.heights(rows, z, power)
    record, log_w = z.new_empty(len(z), moves, *z.shape[1:]), here.base.new_empty(len(z), moves, z.shape[1])
    for k in range(moves):
        there = path.draw(rows, chains, streams)
        heights = path.heights(rows, there, power)
        taken = streams.uniform(rows, chains).log() < power[:, None] * (heights.log_weight - here.log_weight)
        z, here = torch.where(taken[..., None], there, z), heights.where(taken, here)

        momentum = streams.normal(rows, *z.shape[1:])
        jitter = 0.7 + 0.6 * streams.uniform(rows, chains, 1)
        size = step.to(z.dtype)[:, None, None] * jitter
        there, heights, kick = z, here, momentum
        for _ in range(leaps):
            kick = kick + 0.5 * size * (heights.slope @ factor)
            there = there + size * (kick @ factor.mT)
            heights = path.heights(rows, there, power)
            kick = kick + 0.5 * size * (heights.slope @ factor)
        gain = _tempered(heights, power) - _tempered(here, power) + 0.5 * (momentum.square() - kick.square()).sum(-1)
        gain = torch.where(gain.isnan(), -torch.inf, gain)
        taken = streams.uniform(rows, chains).log() < gain
        z, here = torch.where(taken[..., None], there, z), heights.where(taken, here)
        record[:, k], log_w[:, k] = z, here.log_weight
        if adapt:
            step = (step * torch.exp(gain.clamp_max(0).exp().mean(1) - ACCEPTANCE)).clamp(LEAST_STEP, MOST_STEP)
    return record, log_w, step


def _tempered(heights: Heights, power: Tensor) -> Tensor:
    """log pi_b up to a constant."""
    return heights.base + power[:, None] * heights.log_weight


def _rise(log_w: Tensor, most: Tensor) -> Tensor:
    """How far each power may rise, at most so far: half of the draws that have any weight stay effective."""
    top = log_w - log_w.amax(1, keepdim=True)
    wanted = 0.5 * (log_w > -torch.inf).sum(1)

    def enough(rise: Tensor) -> Tensor:
        share = torch.where(top == -torch.inf, 0.0, (rise[:, None] * top).exp())
        return share.sum(1).square() >= wanted * share.square().sum(1)

    low, high = torch.zeros_like(most), most
    for _ in range(60):
        middle = (low + high) / 2
        good = enough(middle)
        low, high = torch.where(good, middle, low), torch.where(good, high, middle)
    return torch.where(enough(most), most, low)


def _factor(states: Tensor, share: Tensor) -> Tensor:
    """The Cholesky factor of each population's covariance, off its diagonal shrunk by the noise of so few draws."""
    share = share / share.sum(1, keepdim=True)
    dim, effective = states.shape[-1], 1 / share.square().sum(1)
    mean = torch.einsum("rn,rnd->rd", share, states.double())
    gap = states.double() - mean[:, None]
    covariance = torch.einsum("rn,rnd,rne->rde", share, gap, gap)
    diagonal = torch.diag_embed(covariance.diagonal(dim1=-2, dim2=-1) + 1e-12)
    shrink = (dim / (dim + effective))[:, None, None]
    return torch.linalg.cholesky((1 - shrink) * covariance + shrink * diagonal).to(states.dtype)
