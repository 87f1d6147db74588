r"""Solvers of the diffusion posterior, on mixtures whose denoiser is known: error against evaluations of the net.

Ours, in the angle t over t_k = t_0 (1 - k / K)^2, beside Heun's method and DPM-Solver++ 2M over the noise levels of Karras et al. (2022),
rho = 7, 80 to 0.001. The error is the Kolmogorov-Smirnov distance of the first coordinate to 400 steps of Heun in angles; all
start from the same 20,000 draws of noise.

    python benchmarks/solvers.py
"""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import pairwise

import torch
from common import Cells, table
from scipy import stats
from torch import Tensor

from sbiplat.estimators.denoising import LEAST, MOST
from sbiplat.posteriors.diffusion import solve_dpm, solve_heun

LOGITS, MEANS = torch.log(torch.tensor([0.3, 0.7])), torch.tensor([[-1.0, 0.5], [0.8, -0.4]])
TARGETS = {"modes of sd 0.2 and 0.4": (0.2, 0.4), "modes of sd 0.05 and 0.3": (0.05, 0.3)}
Denoise = Callable[[Tensor, float], Tensor]


def denoiser(sds: tuple[float, float]) -> Denoise:
    """E[w | y] at noise level s."""
    variances = torch.tensor(sds) ** 2

    def denoise(y: Tensor, s: float) -> Tensor:
        total = variances + s**2
        gap = y[..., None, :] - MEANS
        log_p = LOGITS - 0.5 * gap.square().sum(-1) / total - total.log()
        return (log_p.softmax(-1)[..., None] * (MEANS + (variances / total)[:, None] * gap)).sum(-2)

    return denoise


def in_angles(denoise: Denoise) -> Callable[[Tensor, Tensor], Tensor]:
    def field(z: Tensor, t: Tensor) -> Tensor:
        angle = float(t)
        w = denoise(z / math.cos(angle), math.tan(angle))
        return math.sin(angle) * w - (z - math.cos(angle) * w) / math.tan(angle)

    return field


def karras_levels(steps: int, rho: float = 7.0) -> list[float]:
    high, low = MOST ** (1 / rho), LEAST ** (1 / rho)
    return [*((high + k / (steps - 1) * (low - high)) ** rho for k in range(steps)), 0.0]


def karras_heun(denoise: Denoise, z: Tensor, steps: int) -> Tensor:
    y = z * math.sqrt(1 + MOST**2)
    for s, lower in pairwise(karras_levels(steps)):
        slope = (y - denoise(y, s)) / s
        moved = y + (lower - s) * slope
        y = moved if lower == 0 else y + (lower - s) * 0.5 * (slope + (moved - denoise(moved, lower)) / lower)
    return y


def karras_dpm(denoise: Denoise, z: Tensor, steps: int) -> Tensor:
    y, before, width = z * math.sqrt(1 + MOST**2), None, 0.0
    for s, lower in pairwise(karras_levels(steps)):
        estimate = denoise(y, s)
        if lower == 0:
            return estimate
        h = math.log(s / lower)
        towards = estimate if before is None else estimate + (estimate - before) * (h / (2 * width))
        y, before, width = math.exp(-h) * y + (1 - math.exp(-h)) * towards, estimate, h
    return y


def errors(name: str) -> list[list[float]]:
    """Rows: evaluations, then the error of each solver."""
    denoise = denoiser(TARGETS[name])
    field = in_angles(denoise)
    z = torch.randn(1, 20_000, 2, generator=torch.Generator().manual_seed(0))
    exact = solve_heun(field, z, 400)[0, :, 0].numpy()
    rows: list[list[float]] = []
    for evaluations in (11, 15, 19, 23, 31, 39):
        steps = (evaluations + 1) // 2  # the last step of Heun costs one
        made = (solve_heun(field, z, steps), solve_dpm(field, z, evaluations),
                karras_heun(denoise, z, steps), karras_dpm(denoise, z, evaluations))
        rows.append([evaluations, *(float(stats.ks_2samp(m[0, :, 0].numpy(), exact).statistic) for m in made)])
    return rows


def main() -> None:
    cells = Cells("solvers")
    for name in TARGETS:
        print(f"\n{name}\n")
        print(table(cells.measure(name, lambda name=name: errors(name)),
                    ["evaluations", "Heun in angles", "DPM++ in angles", "Heun, Karras", "DPM++, Karras"]))


if __name__ == "__main__":
    main()
