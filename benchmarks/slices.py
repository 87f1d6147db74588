r"""Ensemble slice sampling, vectorised over observations and chains (Karamanis & Beutler, 2021; Neal, 2003).

The chains of an observation are in two halves. Each chain of one half moves along the difference of two chains of the other,
:math:`\eta = X_k - X_l`: directions and scales of the target without tuning, whatever its shape, and from mode to mode. Along it,
a level :math:`\log u` below the log-density and an interval of fixed length about the chain, shrunk towards it until a point of it
lies above the level. All chains of all observations advance together; only those that still search are evaluated. It needs no gradient.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

Potential = Callable[[Tensor, Tensor], Tensor]  # z (N, D), owner (N,): the observation of each row -> log-density (N,)

SHRINKS = 60
INTERVAL = 8.0  # in sds of a Gaussian target along a line


def ensemble_slice(potential: Potential, start: Tensor, steps: int, generator: torch.Generator) -> Tensor:
    """Run chains from start (B, C, D), C even: (B, steps, C, D). A step is a slice move for every two parameters."""
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
        out[:, step] = state
    return out
