"""Contexts of observations, and work in passes of bounded size: what samplers on a `Conditioned` estimator share."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sbiplat.observation import Fields

ROWS_PER_PASS = 16_384


class Contexts:
    """An estimator ready for use. The context of an observation is computed once, whatever the number of draws."""

    def __init__(self, estimator: Any, device: str = "cpu") -> None:
        self.estimator = estimator.eval()
        self.device = torch.device(device)

    def prepared(self, x: Fields) -> Iterator[dict[str, Tensor]]:
        """x as the estimator takes it, in passes."""
        size, rows = len(next(iter(x.values()))), max(1, ROWS_PER_PASS // 4)
        for a in range(0, size, rows):
            part = {k: torch.as_tensor(np.ascontiguousarray(v[a:a + rows]), device=self.device) for k, v in x.items()}
            yield self.estimator.prepare(part)

    def contexts(self, x: Fields) -> Tensor:
        """(B, C)."""
        return torch.cat([self.estimator.context(part) for part in self.prepared(x)])

    @torch.no_grad()
    def sample(self, x: Fields, n: int, seed: int) -> NDArray[np.float32]:
        """(B, n, D). All draws share one stream, given by the seed: fixed by it, n and B."""
        contexts = self.contexts(x)
        generator = torch.Generator(self.device).manual_seed(stream(seed))
        return self.joined(len(contexts), n, (
            (rows, draws, self.draws(contexts[rows], draws.stop - draws.start, generator).cpu())
            for rows, draws in self.passes(len(contexts), n)))

    def draws(self, contexts: Tensor, n: int, generator: torch.Generator) -> Tensor:
        """n draws for each of B contexts, (B, n, D)."""
        raise NotImplementedError

    def passes(self, batch: int, n: int) -> Iterator[tuple[slice, slice]]:
        """Observations and draws of each pass: several observations with all their draws, or one with some of them."""
        per_pass = max(1, ROWS_PER_PASS // max(1, n))
        for a in range(0, batch, per_pass):
            for first in range(0, max(1, n), ROWS_PER_PASS):
                yield slice(a, min(a + per_pass, batch)), slice(first, min(first + ROWS_PER_PASS, n))

    @staticmethod
    def joined(batch: int, n: int, parts: Iterable[tuple[slice, slice, Tensor]]) -> NDArray[Any]:
        """The passes' results, (rows, draws, ...) each, as one array (B, n, ...)."""
        out: Tensor | None = None
        for rows, draws, part in parts:
            if out is None:
                out = torch.empty(batch, n, *part.shape[2:], dtype=part.dtype)
            out[rows, draws] = part
        assert out is not None
        return out.numpy()


def stream(seed: int) -> int:
    """The seed of torch's generator for draws."""
    return int(np.random.SeedSequence(seed, spawn_key=(0xD4A3,)).generate_state(1, np.uint64)[0] >> 1)
