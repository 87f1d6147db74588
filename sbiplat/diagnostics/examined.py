"""What the gate examines a posterior with: it, held-out pairs, other rows of the same bank, and a seed."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from sbiplat.bank.stream import Pairs, take
from sbiplat.diagnostics.spread import ALONE, Spread
from sbiplat.observation import Fields
from sbiplat.posteriors.base import Posterior
from sbiplat.progress import Progress, silent

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Examined:
    """pairs: held-out (theta in R^D, x), which training never saw. training: other rows of the bank, for scales and references.

    Of the user's own, in the user's space: functions of theta (..., D) -> (...) whose coverage is to be tested, by name; references of
    TARP, x (a batch as the simulator returns it) -> theta (B, D) or (B, R, D). spread: who shares the work.
    """

    posterior: Posterior
    pairs: Pairs
    training: Pairs
    seed: int
    progress: Progress = silent
    spread: Spread = ALONE
    functions: Mapping[str, Callable[[Array], Any]] = field(default_factory=dict)
    references: Callable[[Any], Any] | None = None

    @property
    def truth(self) -> Array:
        """Held-out theta in R^D, (P, D)."""
        return np.asarray(self.pairs["theta"], float)

    def first(self, pairs: int) -> Examined:
        """The same with the first so many pairs."""
        return replace(self, pairs=take(self.pairs, slice(pairs)))

    def stream(self, *key: int) -> np.random.SeedSequence:
        """A stream of random numbers of a diagnostic's own, named by numbers."""
        return np.random.SeedSequence(self.seed, spawn_key=key)


def tensors(x: Fields) -> dict[str, torch.Tensor]:
    """x as torch takes it."""
    return {k: torch.as_tensor(np.ascontiguousarray(v)) for k, v in x.items()}
