"""The posterior of an ensemble: the equal mixture of its members' posteriors."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sbiplat.observation import Fields
from sbiplat.posteriors.base import Sampler
from sbiplat.posteriors.steps import describe

_KEY = 0xE45E


class EnsembleSampler:
    """log q = logsumexp_k log q_k - log K; each draw is one of a member chosen at random, independently."""

    def __init__(self, members: Sequence[Sampler]) -> None:
        self.members = members

    def sample(self, x: Fields, n: int, seed: int) -> NDArray[np.float32]:
        """(B, n, D); fixed by the seed, n and B."""
        size = len(next(iter(x.values())))
        chosen = np.random.default_rng(np.random.SeedSequence(seed, spawn_key=(_KEY,))).integers(len(self.members), size=(size, n))
        out: NDArray[np.float32] | None = None
        for k, member in enumerate(self.members):
            mine = chosen == k
            count = mine.sum(1)
            asked = count > 0
            if not asked.any():
                continue
            own = int(np.random.SeedSequence(seed, spawn_key=(_KEY, k)).generate_state(1, np.uint64)[0] >> 2)
            draws = member.sample({name: v[asked] for name, v in x.items()}, int(count.max()), own)
            if out is None:
                out = np.empty((size, n, draws.shape[-1]), draws.dtype)
            out[mine] = draws[np.arange(draws.shape[1]) < count[asked, None]]
        assert out is not None
        return out

    def log_prob(self, z: NDArray[np.float32], x: Fields) -> NDArray[np.float64]:
        return np.logaddexp.reduce([member.log_prob(z, x) for member in self.members]) - np.log(len(self.members))

    def describe(self) -> list[dict[str, Any]]:
        return [{"step": "factor", "name": f"mixture of {len(self.members)}", "needs": [], "gives": ["z"], "density": True,
                 "members": [describe(member) for member in self.members]}]
