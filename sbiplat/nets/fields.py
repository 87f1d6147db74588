"""Fields over noised parameters: the net behind score and flow-matching estimators.

A residual multi-layer perceptron whose blocks are gated and shifted by the context and the noise level,

    h <- h + W2 [ silu(W1 h + b(c, s)) * sigmoid(g(c, s)) ],    (b, g)(c, s) = B c + T(log s).

Context and level enter as a sum: a draw then costs only W1 and W2, whatever the embedding; the context's share is computed once an
observation and the level's once a step of the solver.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

FREQUENCIES = 16


class Level(nn.Module):
    """The noise level as features: sines and cosines of log s over octaves, and log s itself."""

    def __init__(self, width: int, out: int) -> None:
        super().__init__()
        self.register_buffer("frequencies", 2.0 ** torch.linspace(-4, 2, FREQUENCIES), persistent=False)
        self.net = nn.Sequential(nn.Linear(2 * FREQUENCIES + 1, width), nn.SiLU(), nn.Linear(width, out))

    def forward(self, log_s: Tensor) -> Tensor:
        """log s (..., 1) -> (..., out)."""
        angle = log_s * self.frequencies
        return self.net(torch.cat([log_s / 4, angle.sin(), angle.cos()], dim=-1))


class Field(nn.Module):
    """u (B, n, D) at levels log_s (B, n, 1), or (1, 1, 1) for all, and contexts (B, C) -> (B, n, D); 0 at first."""

    def __init__(self, dim: int, context: int, hidden: int, blocks: int) -> None:
        super().__init__()
        self.hidden, self.blocks = hidden, blocks
        self.first = nn.Linear(dim, hidden)
        self.from_context = nn.Linear(context, (2 * blocks + 1) * hidden)
        self.level = Level(hidden, (2 * blocks + 1) * hidden)
        self.inner = nn.ModuleList(nn.Linear(hidden, hidden, bias=False) for _ in range(blocks))
        self.outer = nn.ModuleList(nn.Linear(hidden, hidden) for _ in range(blocks))
        self.last = nn.Linear(hidden, dim)
        for layer in (*self.outer, self.last):
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)
        for layer in self.outer:
            nn.init.normal_(layer.weight, std=0.5 / math.sqrt(hidden * blocks))

    def conditions(self, context: Tensor) -> Tensor:
        """The context's share, (B, 1, ...): once an observation."""
        return self.from_context(context)[:, None]

    def forward(self, u: Tensor, log_s: Tensor, conditions: Tensor) -> Tensor:
        parts = (conditions + self.level(log_s)).split(self.hidden, dim=-1)
        h = torch.nn.functional.silu(self.first(u) + parts[0])
        for k, (inner, outer) in enumerate(zip(self.inner, self.outer, strict=True)):
            h = h + outer(torch.nn.functional.silu(inner(h) + parts[2 * k + 1]) * torch.sigmoid(parts[2 * k + 2]))
        return self.last(h)
