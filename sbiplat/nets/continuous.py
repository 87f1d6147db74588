r"""Continuous normalising flows: noise carried to the posterior by an ordinary differential equation (FFJORD: Grathwohl et al., 2019),

.. math:: \frac{dz}{dt} = v(z, t, c), \quad z_0 \sim N(0, I), \quad w = z_1, \qquad
          \log q(w | c) = \log N(z_0; 0, I) - \int_0^1 \mathrm{tr}\, \partial_z v(z_t, t, c) \; dt,

the instantaneous change of variables (Chen et al., 2018), trained by maximum likelihood through the steps of the solver, Dormand and
Prince's method of order 5 over equal steps. A field can learn to be solved wrongly: the log-density that comes out may then be as high as
it likes. So training takes off `CHARGE` times the error that the solver's embedded method of order 4 reports (Pal et al., 2021), and
densities and draws take `FINER` times as many steps as training.

v is a multi-layer perceptron whose layers are gated and shifted by time and context,

.. math:: h_k = \tanh(g_k(t, c) \, W_k h_{k-1} + b_k(t, c)), \qquad v = W_{n+1} h_n + b_{n+1}(t, c),

so that its Jacobian is :math:`W_{n+1} S_n W_n \cdots S_1 W_1` with diagonal slopes S. With two hidden layers the trace is a bilinear
form in the slopes, :math:`\mathrm{tr} = s_2^\top [W_2 \circ (W_1 W_3)^\top] s_1`: exact, at the cost of one more layer, in any
dimension. Deeper nets carry all D columns of the Jacobian, or take Hutchinson's estimate :math:`\mathbb{E}[e^\top \partial_z v \, e]` with
random signs e.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn.functional import linear
from zuko.utils import dopri45

from sbiplat.nets.flows import ConditionalDensity, standard_normal_log_prob
from sbiplat.nets.noise import Randomness, normal

FREQUENCIES = 3
PROBES = 16  # of Hutchinson's estimate, where nothing is trained
PROBE_SEED = 0
Rates = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
CHARGE = 100.0
FINER = 2  # steps of densities and draws for one of training


def solve(rates: Rates, z: Tensor, steps: int, *, back: bool, errors: bool = False) -> tuple[Tensor, Tensor, Tensor | None]:
    """z (..., D) at the other end of [0, 1], the integral over [0, 1] of the rates' second part along the way, (...), and the sum over
    steps and coordinates of the errors that the solver reports, (...), or None.

    rates(z, t): velocity (..., D) and trace (...). back: from t = 1 to 0.
    """
    state, reported = torch.cat([z, torch.zeros_like(z[..., :1])], dim=-1), None
    ends = torch.linspace(0, 1, steps + 1, device=z.device)
    ends = ends.flip(0) if back else ends

    def slope(t: Tensor, state: Tensor) -> Tensor:
        velocity, trace = rates(state[..., :-1], t)
        return torch.cat([velocity, trace.unsqueeze(-1)], dim=-1)

    for start, end in pairwise(ends):
        if errors:
            state, error = dopri45(slope, state, start, end - start, error=True)
            reported = error.sum(-1) if reported is None else reported + error.sum(-1)
        else:
            state = dopri45(slope, state, start, end - start)
    total = state[..., -1]
    return state[..., :-1], -total if back else total, reported


class Velocity(nn.Module):
    """v(z, t, c) of z (..., D) with conditions (..., C'), and the trace of its Jacobian; 0 at first."""

    def __init__(self, dim: int, context: int, hidden: tuple[int, ...]) -> None:
        super().__init__()
        self.sizes = [*(2 * h for h in hidden), dim]
        self.layers = nn.ModuleList(nn.Linear(a, b, bias=False) for a, b in pairwise([dim, *hidden, dim]))
        self.from_context = nn.Linear(context, sum(self.sizes))
        self.from_time = nn.Linear(1 + 2 * FREQUENCIES, sum(self.sizes), bias=False)
        self.register_buffer("frequencies", torch.pi * torch.arange(1, FREQUENCIES + 1), persistent=False)
        nn.init.zeros_(self.layers[-1].weight)
        nn.init.normal_(self.from_context.weight, std=1e-2)
        nn.init.zeros_(self.from_context.bias)

    def at(self, t: Tensor) -> Tensor:
        """The share of a time t () in the conditions, (C',)."""
        angle = t * self.frequencies
        return self.from_time(torch.cat([t[None], angle.cos(), angle.sin()]))

    @staticmethod
    def bend(h: Tensor) -> tuple[Tensor, Tensor]:
        """The activation and its slope."""
        h = h.tanh()
        return h, 1 - h.square()

    def forward(self, z: Tensor, conditions: Tensor) -> tuple[Tensor, list[Tensor]]:
        """v (..., D), and the slopes of each hidden layer's units in its inputs, (..., H)."""
        *shifts, last = conditions.split(self.sizes, dim=-1)
        slopes, h = [], z
        for layer, shift in zip(self.layers, shifts, strict=False):
            gate, shift = shift.chunk(2, dim=-1)
            gate = 2 * gate.sigmoid()
            h, slope = self.bend(gate * layer(h) + shift)
            slopes.append(gate * slope)
        return self.layers[-1](h) + last, slopes

    def trace(self, slopes: list[Tensor]) -> Tensor:
        """The trace of the Jacobian, (...)."""
        weights = [layer.weight for layer in self.layers]
        if len(slopes) == 2:
            first, second = slopes
            return (linear(first, weights[1] * (weights[0] @ weights[2]).mT) * second).sum(-1)
        columns = weights[0]
        for slope, weight in zip(slopes, weights[1:], strict=True):
            columns = weight @ (slope.unsqueeze(-1) * columns)
        return torch.diagonal(columns, dim1=-2, dim2=-1).sum(-1)

    def estimate(self, slopes: list[Tensor], probes: Tensor) -> Tensor:
        """Hutchinson's estimate of the trace by probes (K, ..., D) of signs, (...)."""
        along = probes
        for layer, slope in zip(self.layers, slopes, strict=False):
            along = slope * layer(along)
        return (self.layers[-1](along) * probes).sum(-1).mean(0)


class ContinuousFlow(ConditionalDensity):
    """The flow of the module's docstring. trace: `exact`, or `hutchinson`.

    Hutchinson's probes are drawn afresh for every row and step of a training. Otherwise they are the same 16 for all rows, from a
    fixed seed: log_prob is then one smooth function, whatever else is evaluated beside.
    """

    def __init__(self, dim: int, context: int, hidden: tuple[int, ...], steps: int, trace: str = "exact") -> None:
        super().__init__()
        self.dim, self.steps, self.exact = dim, steps, trace == "exact"
        self.velocity = Velocity(dim, context, hidden)
        self.register_buffer("probes", signs((PROBES, 1, dim), torch.Generator().manual_seed(PROBE_SEED)), persistent=False)

    def log_prob(self, z: Tensor, context: Tensor) -> Tensor:
        lead = z.shape[:-1]
        rows = context.expand(*lead, -1).reshape(-1, context.shape[-1])
        probes = None if self.exact else signs((1, len(rows), self.dim), None, z.device) if self.training else self.probes
        given = self.velocity.from_context(rows)

        def rates(w: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
            v, slopes = self.velocity(w, given + self.velocity.at(t))
            return v, self.velocity.trace(slopes) if probes is None else self.velocity.estimate(slopes, probes)

        steps = self.steps if self.training else FINER * self.steps
        noise, total, errors = solve(rates, z.reshape(-1, self.dim), steps, back=True, errors=self.training)
        log_q = standard_normal_log_prob(noise) - total
        return (log_q if errors is None else log_q - CHARGE * errors).reshape(lead)

    def sample(self, context: Tensor, n: int, generator: Randomness) -> Tensor:
        noise = normal((len(context), n, self.dim), generator, context.device)
        given = self.velocity.from_context(context)[:, None]

        def rates(z: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
            return self.velocity(z, given + self.velocity.at(t))[0], torch.zeros_like(z[..., 0])

        return solve(rates, noise, FINER * self.steps, back=False)[0]


def signs(shape: tuple[int, ...], generator: torch.Generator | None, device: torch.device | str = "cpu") -> Tensor:
    """-1 or 1 with equal chance; without a generator from torch's own, as dropout is."""
    return 2.0 * torch.randint(0, 2, shape, generator=generator, device=device) - 1
