r"""Embedding of a predator-prey record: the least-squares fit of the model, beside the record itself, into a residual network.

The summaries are what a field ecologist would compute, and are fixed: they are computed once a record. First a rough fit. Integrated over
time, the Lotka-Volterra equations are linear in their rates,

.. math:: \log u(t) = \log u_0 + \alpha t - \beta \int_0^t v, \qquad \log v(t) = \log v_0 - \gamma t + \delta \int_0^t u,

so that linear least squares per species gives rough rates (integral matching: Dattner & Klaassen, EJS 9, 2015).
From there, Levenberg-Marquardt steps on the solution itself, with each species weighted by its own residual variance and the prior's
scale as a weak pull: the estimates, their curvature, the residuals and their size are nearly all that the record says of the parameters.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

YEARS = 20
SUBSTEPS = 4  # of a year, in the fit's Runge-Kutta integration
ITERATIONS = 8
FLOOR = 1e-4  # of a residual variance
TYPICAL = torch.tensor([0.0, math.log(0.05), 0.0, math.log(0.05), math.log(10.0), math.log(10.0)])  # of the logs of the parameters
SPREAD = torch.tensor([0.6, 1.0, 0.6, 1.0, 1.0, 1.0])
KNEE = 4.0


class PredatorPreyEmbedding(nn.Module):
    """Log populations (B, 21, 2), hare then lynx, to a context (B, context)."""

    standardise = False  # the fit needs log populations as they are

    def __init__(self, context: int = 128, width: int = 256, blocks: int = 3) -> None:
        super().__init__()
        self.net = nn.Sequential(
            nn.Linear(FEATURES, width), *[ResidualBlock(width) for _ in range(blocks)], nn.SiLU(), nn.Linear(width, context),
        )

    def summaries(self, x: Tensor) -> Tensor:
        """The fixed features of a record, (B, F); once a record, and on the CPU, where thousands of small steps are cheapest."""
        return summaries(x.cpu()).to(x.device)

    def forward(self, features: Tensor) -> Tensor:
        return self.net(features)


class ResidualBlock(nn.Module):
    """h + W2 silu(W1 norm(h)): the identity at the start."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, width), nn.SiLU(), nn.Linear(width, width))
        nn.init.zeros_(self.net[-1].weight)
        nn.init.zeros_(self.net[-1].bias)

    def forward(self, h: Tensor) -> Tensor:
        return h + self.net(h)


@torch.no_grad()
def summaries(x: Tensor) -> Tensor:
    """Features (B, F) of log populations x (B, 21, 2): each of order one, and none grows faster than a logarithm."""
    x = x.transpose(1, 2).contiguous()  # (B, 2, 21): reductions run along the fast axis
    running, log_mean = integral(x)
    start, rate, effect, curve = integral_match(x, running.flip(1))
    rough = torch.log((x - curve).square().mean(2) + FLOOR)
    begin = first_guess(start, rate, effect, log_mean)
    phi, log_variance, curvature, residual = fit(x, begin)
    error = torch.linalg.inv(curvature)
    sd = torch.diagonal(error, dim1=1, dim2=2).clamp_min(1e-12).sqrt()
    correlation = error / (sd[:, :, None] * sd[:, None, :])
    below = torch.tril_indices(6, 6, -1)
    series = [residual / torch.exp(0.5 * log_variance)[..., None], (x - 2.0) / 1.5, torch.exp(x - log_mean[..., None]) - 1.0]
    scalars = [
        (phi - TYPICAL) / SPREAD, torch.log(sd) + 2.0, correlation[:, below[0], below[1]], 0.5 * log_variance + 1.0, 0.5 * rough + 1.0,
        log_mean - 2.3, rate, torch.asinh(20.0 * effect), torch.log(x.std(2, correction=0) + 0.05),
        0.5 * torch.log(x.diff(n=2, dim=2).square().mean(2) + FLOOR), x[..., 0] - 2.3,
        torch.exp(phi[:, :4] - TYPICAL[:4]) - 1.0,
    ]
    return soft_clip(torch.nan_to_num(torch.cat([s.flatten(1) for s in series] + scalars, dim=1), 0.0, 1e6, -1e6))


def integral(log_population: Tensor) -> tuple[Tensor, Tensor]:
    """The running integral (B, 2, 21) as a share of the whole, and the log of the mean population (B, 2).

    Between two years a population is taken to grow exponentially: a year's integral is the logarithmic mean of its ends.
    """
    peak = log_population.amax(2, keepdim=True)
    scaled = (log_population - peak).clamp(min=-30.0)
    half = 0.5 * scaled.diff(dim=2) + 1e-3  # off zero, where sinh(h) / h needs its limit
    year = torch.exp(0.5 * (scaled[..., 1:] + scaled[..., :-1])) * torch.sinh(half) / half
    running = nn.functional.pad(year.cumsum(2), (1, 0))
    total = running[..., -1:]
    return running / total, (peak + torch.log(total / YEARS))[..., 0]


def integral_match(x: Tensor, driver: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Least squares of x (B, 2, 21) on a constant, time and the driver: start, yearly rate, the driver's effect, fitted curve."""
    time = torch.linspace(-0.5, 0.5, YEARS + 1, dtype=x.dtype, device=x.device)
    time_square = time.square().mean()
    along = (driver * time).mean(2, keepdim=True) / time_square
    bend = driver - driver.mean(2, keepdim=True) - along * time  # what the driver says beyond a straight line
    effect = (x * bend).mean(2, keepdim=True) / (bend.square().mean(2, keepdim=True) + 1e-6)
    trend = (x * time).mean(2, keepdim=True) / time_square
    curve = x.mean(2, keepdim=True) + trend * time + effect * bend
    rate = trend - effect * along
    return curve[..., 0], rate[..., 0] / YEARS, effect[..., 0] / YEARS, curve


def first_guess(start: Tensor, rate: Tensor, effect: Tensor, log_mean: Tensor) -> Tensor:
    """Logs of (alpha, beta, gamma, delta, hare0, lynx0), (B, 6), from the rough fit; within three spreads of the typical."""
    growth = torch.stack([rate[:, 0], -rate[:, 1]], 1).clamp(min=0.05)
    coupling = torch.stack([-effect[:, 0], effect[:, 1]], 1).clamp(min=0.05)
    log_coupling = torch.log(coupling) - log_mean.flip(1)
    guess = torch.stack([growth[:, 0].log(), log_coupling[:, 0], growth[:, 1].log(), log_coupling[:, 1], start[:, 0], start[:, 1]], 1)
    return torch.maximum(torch.minimum(guess, TYPICAL + 3 * SPREAD), TYPICAL - 3 * SPREAD)


def fit(x: Tensor, phi: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Levenberg-Marquardt from phi (B, 6): estimates, log residual variances (B, 2), curvature (B, 6, 6), residuals (B, 2, 21)."""
    damping = torch.full((len(x),), 1e-2)
    state = evaluate(x, phi)
    for _ in range(ITERATIONS):
        cost, gradient, curvature = state[:3]
        damped = curvature + torch.diag_embed(damping[:, None] * torch.diagonal(curvature, dim1=1, dim2=2))
        step = torch.linalg.solve(damped, gradient).clamp(-1.5, 1.5)
        trial = torch.maximum(torch.minimum(phi - step, TYPICAL + 5 * SPREAD), TYPICAL - 5 * SPREAD)
        new = evaluate(x, trial)
        better = new[0] < cost
        phi = torch.where(better[:, None], trial, phi)
        state = tuple(torch.where(better.reshape(-1, *[1] * (a.ndim - 1)), a, b) for a, b in zip(new, state, strict=True))
        damping = torch.where(better, damping / 5, damping * 8).clamp(1e-6, 1e4)
    return phi, state[3], state[2], state[4]


def evaluate(x: Tensor, phi: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """At phi: cost (B,), its gradient (B, 6) and Gauss-Newton curvature (B, 6, 6), log residual variances, residuals."""
    curve, slope = solve(phi)  # (B, 2, 21), (B, 6, 2, 21)
    residual = curve - x
    log_variance = torch.log(residual.square().mean(2) + FLOOR)
    weighted = slope * torch.exp(-log_variance)[:, None, :, None]
    pull = (phi - TYPICAL) / SPREAD
    gradient = torch.einsum("bikt,bkt->bi", weighted, residual) + pull / SPREAD
    curvature = torch.einsum("bit,bjt->bij", weighted.flatten(2), slope.flatten(2)) + torch.diag_embed(SPREAD**-2)
    cost = 0.5 * (YEARS + 1) * log_variance.sum(1) + 0.5 * pull.square().sum(1)
    return torch.nan_to_num(cost, 1e9, 1e9), gradient, curvature, log_variance, -residual


def solve(phi: Tensor) -> tuple[Tensor, Tensor]:
    """Log populations (B, 2, 21) and their derivatives by phi (B, 6, 2, 21), by fixed Runge-Kutta steps of order 4."""
    rates = torch.exp(phi[:, :4]).T.contiguous()
    size = len(phi)
    state = torch.zeros(7, 2, size)  # the solution, then its derivative by each of the six
    state[0, 0], state[0, 1] = phi[:, 4], phi[:, 5]
    state[5, 0] = state[6, 1] = 1.0
    out = torch.empty(YEARS + 1, 7, 2, size)
    out[0] = state
    h = 1.0 / SUBSTEPS
    for year in range(1, YEARS + 1):
        for _ in range(SUBSTEPS):
            k1 = slope_of(state, rates)
            k2 = slope_of(torch.add(state, k1, alpha=h / 2), rates)
            k3 = slope_of(torch.add(state, k2, alpha=h / 2), rates)
            k4 = slope_of(torch.add(state, k3, alpha=h), rates)
            state = state + (h / 6) * (k1 + 2 * (k2 + k3) + k4)
            state[0].clamp_(-60.0, 12.0)
            state[1:].clamp_(-1e3, 1e3)
        out[year] = state
    out = out.permute(3, 1, 2, 0)
    return out[:, 0], out[:, 1:]


def slope_of(state: Tensor, rates: Tensor) -> Tensor:
    """The time derivative of log populations and of their derivatives by the parameters."""
    alpha, _, gamma, _ = rates
    drive = rates[1::2] * torch.exp(state[0].flip(0).clamp(max=12.0))  # beta v and delta u
    drive.clamp_(max=200.0)
    out = torch.empty_like(state)
    torch.mul(state[:, 1], -drive[0], out=out[:, 0])  # d p' / d q = -beta v
    torch.mul(state[:, 0], drive[1], out=out[:, 1])  # d q' / d p = delta u
    out[0, 0], out[0, 1] = alpha - drive[0], drive[1] - gamma
    out[1, 0] += alpha
    out[2, 0] -= drive[0]
    out[3, 1] -= gamma
    out[4, 1] += drive[1]
    return out


def soft_clip(x: Tensor) -> Tensor:
    """The identity up to the knee, then logarithmic, with a continuous slope."""
    return x.clamp(-KNEE, KNEE) + KNEE * x.sign() * torch.log1p((x.abs() - KNEE).clamp(min=0.0) / KNEE)


FEATURES = summaries(torch.zeros(1, YEARS + 1, 2)).shape[1]
