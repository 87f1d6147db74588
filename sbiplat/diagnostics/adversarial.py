r"""Attacks: the perturbation of an observation, at most of size eps, that moves the posterior most.

.. math:: \max_{\delta} \; d\big( q(\cdot | x), \; q(\cdot | x') \big), \qquad \|\delta\| \le \epsilon,

with x' = x moved by delta in whitened x (`whitened`) and d one of

- `forward`: KL(q_x || q_x'), from draws of q_x alone (`targets`);
- `reverse`: KL(q_x' || q_x), and `energy`: 2 E|Z - Z'| - E|Z - Z~| - E|Z' - Z~'| in units of the sd of q_x. Where a density is to be had,
  their gradient is the score-function estimate with a leave-one-out baseline; else that of draws as functions of x'.

`pgd`: projected gradient ascent with momentum and normalised steps from random starts (Madry et al., 2018; Gloeckler et al., 2023), a few
draws a step, the same ones for all starts. `search`: the same maximum without gradients, by a (1+1) evolution strategy whose steps are
Gaussian or of few features, with the step size of each observation by its successes (Rechenberg, 1973); nets can hide their gradients
(Athalye et al., 2018). Towards a given theta, or another posterior, is the same with `-log q(theta | x')`, or `-KL(q_aim || q_x')`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from sbiplat.diagnostics.targets import Target
from sbiplat.diagnostics.whitened import Ball
from sbiplat.errors import SettingError
from sbiplat.settings import setting

OBJECTIVES = ("forward", "reverse", "energy")
LEAST_LOG = -1e6  # of a density: a draw without any counts so


@dataclass(frozen=True)
class AttackSettings:
    """How hard an attack tries."""

    objective: str = setting("auto", "what is maximised; auto: forward, and energy for npse and fmpe", among=("auto", *OBJECTIVES))
    norm: str = setting("l2", "of a perturbation: its root mean square, or its largest feature", among=("l2", "linf"))
    steps: int = setting(40, "gradient steps", low=1, high=100_000)
    restarts: int = setting(3, "random starts", low=1, high=1000)
    draws: int = setting(8, "draws a step", low=2, high=100_000)
    step: float = setting(0.5, "size of the first step, as a share of eps; it falls to 0 along a cosine", low=1e-6, high=10.0)
    momentum: float = setting(0.75, "share of the last direction that is kept", low=0.0, high=0.9999)
    queries: int = setting(300, "evaluations of the gradient-free search for each observation and start", low=1, high=10**7)


@dataclass(frozen=True)
class Draws:
    """z (B, n, D) with their log q(z | x), (B, n), which an objective is computed from. towards: whether x' is to come close to them."""

    z: Tensor
    log_q: Tensor
    towards: bool = False

    def some(self, first: int, count: int) -> Draws:
        """`count` of them from `first` on, round and round."""
        if count >= self.z.shape[1]:
            return self
        index = (first + torch.arange(count, device=self.z.device)) % self.z.shape[1]
        return Draws(self.z[:, index], self.log_q[:, index], self.towards)

    def rows(self, part: slice) -> Draws:
        """Those of some observations."""
        return Draws(self.z[part], self.log_q[part], self.towards)


def divergence(log_q: Tensor, log_moved: Tensor, normalised: bool) -> Tensor:
    """KL of q_x to q_x', (...), from the log-densities (..., n) of draws of q_x under both."""
    ratio = log_moved.nan_to_num(LEAST_LOG, LEAST_LOG, LEAST_LOG).clamp_min(LEAST_LOG) - log_q
    if normalised:
        return -ratio.mean(-1)
    return torch.logsumexp(ratio, dim=-1) - math.log(ratio.shape[-1]) - ratio.mean(-1)


def energy_distance(a: Tensor, b: Tensor) -> Tensor:
    """Of draws a, b (..., n, D) that were made from the same noise: pairs of one noise are left out, so that a = b gives exactly 0."""
    n = a.shape[-2]
    other = 1 - torch.eye(n, device=a.device, dtype=a.dtype)

    def mean(u: Tensor, v: Tensor) -> Tensor:
        gap = (u[..., :, None, :] - v[..., None, :, :]).square().sum(-1)
        return ((gap + 1e-12).sqrt() * other).sum((-1, -2)) / (n * (n - 1))

    return 2 * mean(a, b) - mean(a, a) - mean(b, b)


class Objective:
    """What an attack on B observations maximises: of delta (R, B, F), its value (R, B). seed: of the draws that a step makes itself."""

    def __init__(self, target: Target, ball: Ball, draws: Draws, kind: str, seed: int, universal: bool = False) -> None:
        kind = target.objectives[0] if kind == "auto" else kind
        if kind not in target.objectives:
            raise SettingError(f"objective = {kind!r}: this estimator has {', '.join(target.objectives)}")
        self.target, self.ball, self.draws, self.kind, self.seed, self.universal = target, ball, draws, kind, seed, universal
        self.scale = draws.z.std(1, keepdim=True, correction=0).clamp_min(1e-12)
        with torch.no_grad():
            self.clean = target.condition(ball.x) if kind != "forward" else None

    def __call__(self, delta: Tensor, step: int, count: int) -> tuple[Tensor, Tensor]:
        """The value, and what to differentiate for its gradient, both (R, B), from `count` draws of this step's own."""
        if self.universal:
            delta = self.ball.project(delta.expand(-1, len(self.ball.free), -1))
        values, surrogates = [], []
        for part in delta:  # a start at a time bounds the memory
            moved = self.target.condition(self.ball.moved(part))
            value, surrogate = getattr(self, "_" + self.kind)(moved, step, count)
            values.append(value.detach())
            surrogates.append(surrogate)
        return torch.stack(values), torch.stack(surrogates)

    def _forward(self, moved: Tensor, step: int, count: int) -> tuple[Tensor, Tensor]:
        some = self.draws.some(step * count, count)
        value = divergence(some.log_q, self.target.log_prob(some.z, moved), self.target.normalised)
        value = -value if some.towards else value
        return value, value

    def _reverse(self, moved: Tensor, step: int, count: int) -> tuple[Tensor, Tensor]:
        z = self._drawn(moved, step, count)
        log_q = self.target.log_prob(z, moved)
        with torch.no_grad():
            cost = log_q - self.target.log_prob(z, self.clean)
        return cost.mean(1), _score_function(cost, log_q)

    def _energy(self, moved: Tensor, step: int, count: int) -> tuple[Tensor, Tensor]:
        if "forward" not in self.target.objectives:
            first, second = (self.target.sample(c, count, self._generator(step)) / self.scale for c in (self.clean, moved))
            value = energy_distance(first, second)
            return value, value
        z = self._drawn(moved, step, count)
        log_q = self.target.log_prob(z, moved)
        with torch.no_grad():
            first = self.draws.some(step * count, count).z / self.scale
            second = z / self.scale
            across, within, base = torch.cdist(first, second), torch.cdist(second, second), torch.cdist(first, first)
            pairs = count * (count - 1)
            value = 2 * across.mean((1, 2)) - (within.sum((1, 2)) + base.sum((1, 2))) / pairs
            cost = 2 * across.mean(1) - 2 * within.sum(1) / (count - 1)
        return value, _score_function(cost, log_q)

    def _drawn(self, moved: Tensor, step: int, count: int) -> Tensor:
        with torch.no_grad():
            return self.target.sample(moved, count, self._generator(step)).to(self.draws.z.dtype)

    def _generator(self, step: int) -> torch.Generator:
        return torch.Generator(self.draws.z.device).manual_seed(self.seed + step)


def _score_function(cost: Tensor, log_q: Tensor) -> Tensor:
    """What has the gradient of E_q[cost], (B,), of costs and log-densities (B, n) of draws of q."""
    count = cost.shape[1]
    baseline = (cost.sum(1, keepdim=True) - cost) / (count - 1)
    return ((cost - baseline) * log_q).mean(1)


def pgd(objective: Objective, settings: AttackSettings, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Perturbations (R, B, F) by projected gradient ascent, and the share of steps whose gradient was 0, (R, B)."""
    ball = objective.ball
    delta = ball.random(settings.restarts, generator)
    delta = _within(objective, delta[:, :1]) if objective.universal else delta
    velocity, vanished = torch.zeros_like(delta), torch.zeros(delta.shape[:-1], dtype=torch.float64, device=delta.device)
    for k in range(settings.steps):
        here = delta.clone().requires_grad_()
        _, surrogate = objective(here, k, settings.draws)
        slope = torch.autograd.grad(surrogate.sum(), here)[0].nan_to_num(0.0, 0.0, 0.0)
        length = torch.linalg.vector_norm(slope, dim=-1, keepdim=True)
        vanished += (length[..., 0] == 0) / settings.steps
        velocity = settings.momentum * velocity + slope / length.clamp_min(1e-300)
        rate = settings.step * 0.5 * (1 + math.cos(math.pi * k / settings.steps))
        if ball.norm == "linf":
            delta = _within(objective, delta + rate * ball.eps * velocity.sign())
        else:
            pace = torch.linalg.vector_norm(velocity, dim=-1, keepdim=True).clamp_min(1e-300)
            delta = _within(objective, delta + rate * ball.radius[:delta.shape[1]] * velocity / pace)
    return delta, vanished


@torch.no_grad()
def search(objective: Objective, settings: AttackSettings, generator: torch.Generator) -> Tensor:
    """Perturbations (R, B, F) without gradients: the best of `queries` steps of an evolution strategy, from random starts."""
    ball = objective.ball
    best = ball.random(settings.restarts, generator)
    best = _within(objective, best[:, :1]) if objective.universal else best
    count = 2 * settings.draws

    def height(delta: Tensor) -> Tensor:
        value = objective(delta, 0, count)[0]
        return value.mean(1, keepdim=True) if objective.universal else value

    value = height(best)
    width = torch.full_like(value, 0.5)
    features = best.shape[-1]
    for k in range(settings.queries - 1):
        noise = torch.randn(best.shape, generator=generator, dtype=best.dtype, device=best.device)
        if k % 2 and features > 2:  # of few features
            share = torch.rand(best.shape, generator=generator, dtype=best.dtype, device=best.device)
            noise = noise * (share < max(1.5, features ** 0.5) / features)
        noise = noise / torch.linalg.vector_norm(noise, dim=-1, keepdim=True).clamp_min(1e-30)
        scale = ball.radius[:best.shape[1]] if ball.norm == "l2" else ball.eps * features ** 0.5
        trial = _within(objective, best + width[..., None] * scale * noise)
        found = height(trial)
        better = found > value
        best, value = torch.where(better[..., None], trial, best), torch.where(better, found, value)
        width = (width * torch.where(better, 1.5, 0.9)).clamp(1e-3, 2.0)
    return best


def _within(objective: Objective, delta: Tensor) -> Tensor:
    """delta (R, B, F) in the set; one for all, (R, 1, F), in the ball, and in each observation's set where it is applied."""
    ball = objective.ball
    if not objective.universal:
        return ball.project(delta)
    if ball.norm == "linf":
        return delta.clamp(-ball.eps, ball.eps)
    size = delta.square().mean(-1, keepdim=True).sqrt()
    return delta * (ball.eps / size.clamp_min(1e-30)).clamp_max(1.0)
