r"""The posterior behind a density over theta itself (sbi's NPE), which may leak beyond the prior's support S:

.. math:: q_S(\theta | x) = \frac{q(\theta | x)\, 1[\theta \in S]}{m(x)}, \quad m(x) = \int_S q(\theta | x)\, d\theta, \qquad
          \log q_S(z | x) = \log q(\theta(z) | x) - \log m(x) + \log |d\theta / dz|.

Draws beyond S are rejected, so they have the density :math:`q_S`, which `log_prob` gives. m(x) is the share of 1000 draws that lie in S, of
more where under 2 % do, until 20 lie inside. The standard error of log m is 0.01 where a tenth leaks, 0.1 where nine tenths do, and at most
0.22. Where less than 0.1 % lies inside, x is refused. Where S has no edge, m = 1 and nothing is drawn for it.
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

MASS_DRAWS, MASS_SEED, LEAST_INSIDE = 1000, 0x1EA5, 20
LEAST_MASS, MOST_DRAWS = 1e-3, 20_000  # how many tell that a mass is less
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
        log_q = self._leaky(z, contexts)
        return log_q - np.log(self._mass(contexts))[:, None] if self.bounded else log_q

    @torch.no_grad()
    def leaky_log_prob(self, z: NDArray[np.float32], x: Fields) -> Array:
        """log q(theta(z) | x) + log |d theta / d z|, (B, n): what the net was trained on."""
        return self._leaky(z, self.contexts(x))

    def _leaky(self, z: NDArray[np.float32], contexts: Tensor) -> Array:
        batch, n, dim = z.shape
        theta = torch.as_tensor(self.prior.constrain(z).reshape(-1, dim), dtype=torch.float32, device=self.device)
        owner = torch.arange(batch, device=self.device).repeat_interleave(n)
        rows = passes.ROWS_PER_PASS
        parts = [self.estimator.log_prob(theta[a:a + rows], contexts[owner[a:a + rows]]).cpu() for a in range(0, len(theta), rows)]
        return torch.cat(parts).double().numpy().reshape(batch, n) + self.prior.log_abs_det_jacobian(z)

    def _mass(self, contexts: Tensor) -> Array:
        """m(x) of each context, (B,), from draws with a stream of their own."""
        generator = torch.Generator(self.device).manual_seed(stream(MASS_SEED))
        kept, tried = np.zeros(len(contexts), int), np.full(len(contexts), MASS_DRAWS)
        for rows, draws in self.passes(len(contexts), MASS_DRAWS):
            kept[rows] += self.prior.contains(self._drawn(contexts[rows], draws.stop - draws.start, generator)).sum(1)
        while (few := np.flatnonzero((kept < LEAST_INSIDE) & (tried < MOST_DRAWS))[:max(1, passes.ROWS_PER_PASS // MASS_DRAWS)]).size:
            count = max(1, passes.ROWS_PER_PASS // len(few))
            kept[few] += self.prior.contains(self._drawn(contexts[few], count, generator)).sum(1)
            tried[few] += count
            _require_mass(kept, tried, 0)
        return kept / tried

    def _drawn(self, contexts: Tensor, n: int, generator: torch.Generator) -> Array:
        return self.estimator.sample(contexts, n, generator).cpu().double().numpy()

    def _inside(self, contexts: Tensor, n: int, generator: torch.Generator, first: int) -> tuple[Array, Array]:
        """n draws in the support for each context, (b, n, D), and the share of draws that were, (b,)."""
        out = np.empty((len(contexts), n, self.prior.dim))
        have, kept, tried = (np.zeros(len(contexts), int) for _ in range(3))
        while (lacking := np.flatnonzero(have < n)).size:
            share = (np.maximum(kept, 1) / np.maximum(tried, 1))[lacking].clip(LEAST_MASS, 1.0)
            most = max(1, passes.ROWS_PER_PASS // len(lacking))
            count = min(most, int(np.ceil(((n - have[lacking]) / share).max())))
            theta = self._drawn(contexts[lacking], count, generator)
            inside = self.prior.contains(theta)
            for row, good, draws in zip(lacking, inside, theta, strict=True):
                new = draws[good][:n - have[row]]
                out[row, have[row]:have[row] + len(new)] = new
                have[row] += len(new)
            kept[lacking] += inside.sum(1)
            tried[lacking] += count
            _require_mass(kept, tried, first)
        return out, kept / tried


def _require_mass(kept: Any, tried: Any, first: int) -> None:
    bad = np.flatnonzero((tried >= MOST_DRAWS) & (kept < LEAST_MASS * tried))
    if bad.size:
        where = f" for observation {first + bad[0]}" if first + len(kept) > 1 else ""
        raise LeakageError(f"less than {LEAST_MASS:.1%} of the density's mass lies in the prior's support{where}: x is unlike what it was "
                           "trained on, or it was trained too little or on other parameters")
