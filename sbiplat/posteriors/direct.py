"""The direct posterior: an estimator with its own density and sampler (NPE), evaluated in bounded memory.

Work goes in passes of at most `ROWS_PER_PASS` rows; the context of an observation is computed once, whatever the number
of draws.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sbiplat.observation import Fields
from sbiplat.posteriors.base import Posterior
from sbiplat.runs import Run

ROWS_PER_PASS = 16_384


class DirectSampler:
    """Draws and densities of an estimator that has `prepare`, `context`, `sample` and `log_prob`."""

    def __init__(self, estimator: Any, device: str = "cpu") -> None:
        self.estimator = estimator.eval()
        self.device = torch.device(device)

    @torch.no_grad()
    def sample(self, x: Fields, n: int, seed: int) -> NDArray[np.float32]:
        """(B, n, D). The draws of a pass share one stream, given by (seed, pass): fixed by the seed, n and B."""
        contexts = self._contexts(x)
        generator = torch.Generator(self.device).manual_seed(_stream(seed))
        out: list[Tensor] = []
        per_pass = max(1, ROWS_PER_PASS // n)
        for rows in contexts.split(per_pass):
            parts = [self.estimator.sample(rows, m, generator).cpu() for m in _parts(n, ROWS_PER_PASS)]
            out.append(torch.cat(parts, dim=1))
        return torch.cat(out).numpy()

    @torch.no_grad()
    def log_prob(self, z: NDArray[np.float32], x: Fields) -> NDArray[np.float64]:
        contexts, values = self._contexts(x), torch.as_tensor(z, device=self.device)
        batch, n, dim = values.shape
        flat, owner = values.reshape(-1, dim), torch.arange(batch, device=self.device).repeat_interleave(n)
        parts = [self.estimator.log_prob(flat[a:a + ROWS_PER_PASS], contexts[owner[a:a + ROWS_PER_PASS]]).cpu()
                 for a in range(0, len(flat), ROWS_PER_PASS)]
        return torch.cat(parts).double().numpy().reshape(batch, n)

    def _contexts(self, x: Fields) -> Tensor:
        size = len(next(iter(x.values())))
        rows = max(1, ROWS_PER_PASS // 4)
        return torch.cat([
            self.estimator.context(self.estimator.prepare(
                {k: torch.as_tensor(np.ascontiguousarray(v[a:a + rows]), device=self.device) for k, v in x.items()}))
            for a in range(0, size, rows)
        ])


def _parts(n: int, most: int) -> list[int]:
    return [most] * (n // most) + ([n % most] if n % most else [])


def _stream(seed: int) -> int:
    return int(np.random.SeedSequence(seed, spawn_key=(0xD4A3,)).generate_state(1, np.uint64)[0] >> 1)


def from_run(run: Run, device: str = "cpu", **provenance: Any) -> Posterior:
    """The posterior of a finished run, whether or not it is certified: `sbiplat.load` is the door for users."""
    run.require_finished()
    sampler = DirectSampler(run.estimator(device), device)
    return Posterior(run.prior, run.x, sampler, {"run": str(run.path), "weights_digest": run.weights_digest,
                                                 "bank_digest": run.bank_digest, **provenance})
