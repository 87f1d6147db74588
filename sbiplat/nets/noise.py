"""Noise of seeded generators, or common to all contexts."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Common:
    """In place of a generator: common random numbers, the same for every context, of mean 0 and variance 1 over the draws. What is drawn
    by them is a function of the context."""

    seed: int

    def generator(self, device: torch.device) -> torch.Generator:
        """Seeded anew."""
        return torch.Generator(device).manual_seed(self.seed)


Randomness = torch.Generator | Common


def normal(shape: tuple[int, int, int], generator: Randomness, device: torch.device, contexts: int = 0, draws: int = 1) -> Tensor:
    """Standard normal numbers; contexts, draws: the axes of these."""
    if isinstance(generator, torch.Generator):
        return torch.randn(shape, generator=generator, device=device)
    one = torch.randn([1 if k == contexts else size for k, size in enumerate(shape)], generator=generator.generator(device), device=device)
    return ((one - one.mean(draws, keepdim=True)) / one.std(draws, keepdim=True)).expand(shape)


def categories(weights: Tensor, n: int, generator: Randomness) -> Tensor:
    """n draws (B, n) of rows of weights (B, K) that sum to 1; of common numbers in proportion, as nearly as n draws can."""
    if isinstance(generator, torch.Generator):
        return torch.multinomial(weights, n, replacement=True, generator=generator)
    places = torch.randperm(n, generator=generator.generator(weights.device), device=weights.device)
    places = (places.to(weights.dtype) + 0.5) / n
    return torch.searchsorted(weights.cumsum(1).contiguous(), places.expand(len(weights), n).contiguous()).clamp(max=weights.shape[1] - 1)
