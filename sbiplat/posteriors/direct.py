"""The direct posterior: an estimator with its own density and sampler (NPE), evaluated in bounded memory."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sbiplat.observation import Fields
from sbiplat.posteriors import passes
from sbiplat.posteriors.passes import Contexts


class DirectSampler(Contexts):
    """Draws and densities of an estimator that has `prepare`, `context`, `sample` and `log_prob`."""

    def draws(self, contexts: Tensor, n: int, generator: torch.Generator) -> Tensor:
        """n draws for each of B contexts, (B, n, D)."""
        return self.estimator.sample(contexts, n, generator)

    def densities(self, z: Tensor, contexts: Tensor) -> Tensor:
        """log q(z | context) of rows, (R, D) and (R, C): (R,)."""
        return self.estimator.log_prob(z, contexts)

    @torch.no_grad()
    def log_prob(self, z: NDArray[np.float32], x: Fields) -> NDArray[np.float64]:
        contexts, values = self.contexts(x), torch.as_tensor(z, device=self.device)
        batch, n, dim = values.shape
        flat, owner = values.reshape(-1, dim), torch.arange(batch, device=self.device).repeat_interleave(n)
        rows = passes.ROWS_PER_PASS
        parts = [self.densities(flat[a:a + rows], contexts[owner[a:a + rows]]).cpu() for a in range(0, len(flat), rows)]
        return torch.cat(parts).double().numpy().reshape(batch, n)
