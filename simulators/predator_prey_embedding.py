r"""Embedding of a predator-prey record: a least-squares fit of the integrated equations, beside the record itself, into a residual network.

Integrated over time, the Lotka-Volterra equations are linear in their rates,

.. math:: \log u(t) = \log u_0 + \alpha t - \beta \int_0^t v, \qquad \log v(t) = \log v_0 - \gamma t + \delta \int_0^t u,

so that a least-squares fit per species gives rough estimates of all eight parameters, and residuals that are nearly the observation
errors (integral matching: Dattner & Klaassen, *Optimal rate of direct estimators in systems of ordinary differential equations linear in
functions of the parameters*, Electronic Journal of Statistics 9, 2015). A second fit takes its integrals from the first fit's smooth curves.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

YEARS = 20
FITS = 2
TYPICAL_LOG = 2.3  # log 10: the prior's median population
KNEE = 4.0


class PredatorPreyEmbedding(nn.Module):
    """Log populations (B, 21, 2), hare then lynx, in natural logs and not standardised, to a context (B, context)."""

    standardise = False  # the fit needs log populations as they are

    def __init__(self, context: int = 128, width: int = 256, blocks: int = 3) -> None:
        super().__init__()
        self.net = nn.Sequential(
            nn.Linear(FEATURES, width),
            *[ResidualBlock(width) for _ in range(blocks)],
            nn.SiLU(),
            nn.Linear(width, context),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.net(summaries(x))


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
    """Features (B, FEATURES) of log populations x (B, 21, 2): each of order one, and none grows faster than a logarithm."""
    x = x.transpose(1, 2).contiguous()  # (B, 2, 21): reductions run along the fast axis
    curve, series, scalars = x, [], []
    for _ in range(FITS):
        running, log_mean = integral(curve)
        start, rate, effect, curve = fit(x, running.flip(1))  # hares are driven by lynx, lynx by hares
        residual = x - curve
        deviation = residual.square().mean(2).sqrt()
        log_driver = log_mean.flip(1)
        series += [residual / (deviation[..., None] + 0.02), 0.5 * residual]
        scalars += [
            log_mean - TYPICAL_LOG,
            start - TYPICAL_LOG,
            rate,  # alpha, -gamma
            effect,  # -beta and delta, times the driver's mean population
            torch.asinh(20.0 * effect) - log_driver,  # about log beta and log delta, where the sign is right
            20.0 * effect * torch.exp(-log_driver.clamp(min=-2.0)),  # -beta, delta in units of their prior mean
            rate * torch.exp(-log_mean.clamp(min=-2.0)),
            torch.log(deviation + 0.02) + 1.0,
        ]
        curve = curve.clamp(x.amin(2, keepdim=True) - 1.0, x.amax(2, keepdim=True) + 1.0)
    spread = x.std(2, correction=0)
    rough = x.diff(n=2, dim=2).square().mean(2).sqrt()
    series += [(x - 2.0) / 1.5, torch.exp(x - log_mean[..., None]) - 1.0, x.diff(dim=2)]
    scalars += [torch.log(spread + 0.05), torch.log(rough + 0.05), x[..., 0] - TYPICAL_LOG]
    return soft_clip(torch.cat([s.flatten(1) for s in series] + scalars, dim=1))


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


def fit(x: Tensor, driver: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Least squares of x (B, 2, 21) on a constant, time and the driver: the start, the yearly rate, the driver's effect, the fitted curve."""
    time = torch.linspace(-0.5, 0.5, YEARS + 1, dtype=x.dtype, device=x.device)
    time_square = time.square().mean()
    along = (driver * time).mean(2, keepdim=True) / time_square
    bend = driver - driver.mean(2, keepdim=True) - along * time  # what the driver says beyond a straight line
    effect = (x * bend).mean(2, keepdim=True) / (bend.square().mean(2, keepdim=True) + 1e-6)
    trend = (x * time).mean(2, keepdim=True) / time_square
    curve = x.mean(2, keepdim=True) + trend * time + effect * bend
    rate = trend - effect * along
    return curve[..., 0], rate[..., 0] / YEARS, effect[..., 0] / YEARS, curve


def soft_clip(x: Tensor) -> Tensor:
    """The identity up to the knee, then logarithmic, with a continuous slope."""
    return x.clamp(-KNEE, KNEE) + KNEE * x.sign() * torch.log1p((x.abs() - KNEE).clamp(min=0.0) / KNEE)


FEATURES = summaries(torch.zeros(1, YEARS + 1, 2)).shape[1]
