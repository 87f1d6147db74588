r"""The posterior behind a density over theta itself (sbi's NPE), which may leak beyond the prior's support S:

.. math:: q_S(\theta | x) = \frac{q(\theta | x)\, 1[\theta \in S]}{m(x)}, \quad m(x) = \int_S q(\theta | x)\, d\theta, \qquad
          \log q_S(z | x) = \log q(\theta(z) | x) - \log m(x) + \log |d\theta / dz|.

Draws beyond S are rejected, so they have the density :math:`q_S`, which `log_prob` gives. m(x) is the share of 1000 draws that lie in S.
The standard error of its logarithm is :math:`\sqrt{(1 - m) / 1000\, m}`, 0.01 where a tenth leaks. Where S has no edge, m = 1, undrawn.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sbiplat.errors import LeakageError
from sbiplat.observation import Fields
from sbiplat.posteriors import passes
from sbiplat.posteriors.passes import Contexts, stream
from sbiplat.prior import Prior

MASS_DRAWS, MASS_SEED = 1000, 0x1EA5
LEAST_MASS = 0.01
Array = NDArray[np.float64]


class ThetaSpaceSampler(Contexts):
    """Draws and densities of an estimator whose `sample` and `log_prob` are of theta in the user's own space.

    diagnostics: `leaked_max`, the largest share of an observation's draws that lay beyond the support.
    """

    def __init__(self, estimator: Any, prior: Prior, device: str = "cpu") -> None:
        super().__init__(estimator, device)
        self.prior = prior
        self.bounded = bool(np.isfinite(np.concatenate(prior.support)).any())
        self.diagnostics: dict[str, Any] = {}

    @torch.no_grad()
    def sample(self, x: Fields, n: int, seed: int) -> NDArray[np.float32]:
        """(B, n, D); fixed by the seed, n and x. Raises LeakageError."""
        contexts = self.contexts(x)
        generator = torch.Generator(self.device).manual_seed(stream(seed))
        leaked: list[float] = []

        def drawn(rows: slice, count: int) -> Tensor:
            theta, mass = self._inside(contexts[rows], count, generator, rows.start)
            leaked.append(1 - float(mass.min()))
            return torch.as_tensor(self.prior.unconstrain(theta).astype(np.float32))

        z = self.joined(len(contexts), n, ((rows, draws, drawn(rows, draws.stop - draws.start))
                                           for rows, draws in self.passes(len(contexts), n)))
        self.diagnostics = {"leaked_max": max(leaked)} if self.bounded else {}
        return z

    @torch.no_grad()
    def log_prob(self, z: NDArray[np.float32], x: Fields) -> Array:
        """log q_S(z | x), (B, n), for z (B, n, D). Raises LeakageError."""
        contexts = self.contexts(x)
        batch, n, dim = z.shape
        theta = torch.as_tensor(self.prior.constrain(z).reshape(-1, dim), dtype=torch.float32, device=self.device)
        owner = torch.arange(batch, device=self.device).repeat_interleave(n)
        rows = passes.ROWS_PER_PASS
        parts = [self.estimator.log_prob(theta[a:a + rows], contexts[owner[a:a + rows]]).cpu() for a in range(0, len(theta), rows)]
        log_q = torch.cat(parts).double().numpy().reshape(batch, n) + self.prior.log_abs_det_jacobian(z)
        return log_q - np.log(self._mass(contexts))[:, None] if self.bounded else log_q

    def _mass(self, contexts: Tensor) -> Array:
        """m(x) of each context, (B,), from draws with a stream of their own."""
        generator, out = torch.Generator(self.device).manual_seed(stream(MASS_SEED)), np.zeros(len(contexts))
        for rows, draws in self.passes(len(contexts), MASS_DRAWS):
            theta = self.estimator.sample(contexts[rows], draws.stop - draws.start, generator).cpu().double().numpy()
            out[rows] += self.prior.contains(theta).sum(1) / MASS_DRAWS
        _require_mass(out, 0)
        return out

    def _inside(self, contexts: Tensor, n: int, generator: torch.Generator, first: int) -> tuple[Array, Array]:
        """n draws in the support for each context, (b, n, D), and the share of draws that were, (b,)."""
        out = np.empty((len(contexts), n, self.prior.dim))
        have, kept, tried = (np.zeros(len(contexts), int) for _ in range(3))
        while (lacking := np.flatnonzero(have < n)).size:
            share = np.where(tried > 0, np.maximum(kept / np.maximum(tried, 1), LEAST_MASS), 1.0)[lacking]
            most = max(1, passes.ROWS_PER_PASS // len(lacking))
            count = min(most, int(np.ceil(((n - have[lacking]) / share).max())))
            theta = self.estimator.sample(contexts[torch.as_tensor(lacking, device=self.device)], count, generator).cpu().double().numpy()
            inside = self.prior.contains(theta)
            for row, good, draws in zip(lacking, inside, theta, strict=True):
                new = draws[good][:n - have[row]]
                out[row, have[row]:have[row] + len(new)] = new
                have[row] += len(new)
            kept[lacking] += inside.sum(1)
            tried[lacking] += count
            _require_mass(np.where(tried >= MASS_DRAWS, kept / np.maximum(tried, 1), 1.0), first)
        return out, kept / tried


def _require_mass(mass: Array, first: int) -> None:
    if (mass < LEAST_MASS).any():
        k = int(mass.argmin())
        where = f" for observation {first + k}" if first + len(mass) > 1 else ""
        raise LeakageError(f"only {mass[k]:.2%} of the density's mass lies in the prior's support{where}, {LEAST_MASS:.0%} is needed: x is "
                           "unlike what it was trained on, or it was trained on other parameters")
