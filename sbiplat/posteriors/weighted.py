r"""Draws with importance weights, and what these are worth.

All figures are of all draws: of a few they flatter, since the largest weights come late. The Pareto shape k-hat of the largest weights
(Vehtari et al., 2024; ArviZ's `psislw`) says whether to believe them: above 0.7 not.
"""

from __future__ import annotations

import json
import math
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sbiplat.errors import SettingError, Unreliable
from sbiplat.observation import Fields
from sbiplat.posteriors import export
from sbiplat.posteriors.base import Posterior
from sbiplat.prior import Prior
from sbiplat.settings import whole_seed

Array = NDArray[np.float64]
MOST_K_HAT = 0.7
HARMLESS = 2.0  # k-hat has no scale: where no weight is above so many times the mean, its tail carries nothing
FIGURES = ("efficiency", "ess", "k_hat", "log_evidence", "log_evidence_error")
_RESAMPLE = 0x2E5A
Figure = Any  # float, or (B,) for a batch


@dataclass(frozen=True)
class Weighted:
    """Draws with log weights: theta (n, D), log_weight (n,); of a batch of B observations (B, n, D) and (B, n).

    Figures are floats, of a batch arrays (B,). prior: the one in force. chain: the steps by which the draws came about, as JSON.
    evidence_of: what `log_evidence` is the logarithm of, in words.
    """

    posterior: Posterior
    fields: Fields
    batched: bool
    draws: Array
    log_weights: Array
    seed: int
    prior: Prior
    chain: list[dict[str, Any]]
    evidence_of: str
    provenance: Mapping[str, Any] = field(default_factory=dict)

    @property
    def theta(self) -> Array:
        return self._own(self.draws)

    @property
    def log_weight(self) -> Array:
        """log target - log q, not normalised."""
        return self._own(self.log_weights)

    @property
    def weights(self) -> Array:
        """Normalised: they sum to 1 over the draws of an observation."""
        return self._own(self._weights)

    @property
    def ess(self) -> Figure:
        """The effective number of draws."""
        return self._own(self._ess)

    @property
    def efficiency(self) -> Figure:
        """ESS / n."""
        return self._own(self._ess / self.draws.shape[1])

    @property
    def k_hat(self) -> Figure:
        """The Pareto shape of the largest weights, 0 where these are all alike; above 0.7 neither draws nor evidence are to be relied on,
        unless no weight is above twice the mean: the shape has no scale."""
        return self._own(self._k_hat)

    @property
    def log_evidence(self) -> Figure:
        """log of the mean weight: see `evidence_of`."""
        top = self.log_weights.max(1)
        return self._own(top + np.log(np.exp(self.log_weights - top[:, None]).mean(1)))

    @property
    def log_evidence_error(self) -> Figure:
        """Its standard error."""
        n = self.draws.shape[1]
        return self._own(np.sqrt(np.maximum(n / self._ess - 1, 0.0) / (n - 1)))

    @cached_property
    def _weights(self) -> Array:
        w = np.exp(self.log_weights - self.log_weights.max(1, keepdims=True))
        return w / w.sum(1, keepdims=True)

    @property
    def _ess(self) -> Array:
        return 1 / np.square(self._weights).sum(1)

    @cached_property
    def _k_hat(self) -> Array:
        return np.array([k_hat(row) for row in self.log_weights])

    def _own(self, values: Array) -> Any:
        return values if self.batched else values[0] if values.ndim > 1 else float(values[0])

    def resample(self, n: int | None = None, *, seed: int = 0) -> Array:
        """n draws of equal weight, by default as many as the (least) ESS, with replacement: (n, D), or (B, n, D)."""
        count = max(1, int(self._ess.min())) if n is None else n
        if isinstance(count, bool) or not isinstance(count, int | np.integer) or count < 1:
            raise SettingError(f"n must be a whole number of at least 1, got {n!r}")
        rng = np.random.default_rng(np.random.SeedSequence(whole_seed(seed), spawn_key=(_RESAMPLE,)))
        return self._own(np.stack([draws[rng.choice(len(w), int(count), p=w)] for draws, w in zip(self.draws, self._weights, strict=True)]))

    def to_arviz(self, *, resampled: int | bool = False, seed: int = 0) -> Any:
        """ArviZ InferenceData: the draws, with `log_weight` in the group sample_stats; or so many draws of equal weight without it."""
        if resampled is False:
            return export.to_arviz(self.prior, self.fields, self.batched, self.theta, self.seed, self.facts, self.log_weight)
        theta = self.resample(None if resampled is True else resampled, seed=seed)
        return export.to_arviz(self.prior, self.fields, self.batched, theta, self.seed, {**self.facts, "resampled_with_seed": seed})

    def write(self, path: str | Path) -> None:
        """Write the draws with their log weights to .nc, .h5 or .csv."""
        export.write_draws(Path(path), self.prior, self.fields, self.batched, self.theta, self.seed, self.facts, self.log_weight)

    @property
    def facts(self) -> dict[str, Any]:
        """What is written into files of draws."""
        figures = {f"importance_{name}": getattr(self, name) for name in FIGURES}
        return {**self.posterior.facts, **self.provenance, **figures, "importance_evidence_of": self.evidence_of,
                "chain": json.dumps(self.chain)}

    def text(self) -> str:
        """The figures in a line; of a batch the worst."""
        worst = f" (the worst of {len(self.draws)})" if self.batched else ""
        line = f"importance: efficiency {np.min(self.efficiency):.3g}, ESS {np.min(self.ess):.4g}, k-hat {np.max(self.k_hat):.2f}{worst}"
        return line if self.batched else f"{line}; log of {self.evidence_of} {self.log_evidence:.4f} +- {self.log_evidence_error:.2g}"


def doubt(weighted: Weighted) -> Unreliable | None:
    """The warning where k-hat is above 0.7, unless no weight is above twice the mean."""
    k = np.atleast_1d(weighted.k_hat)
    tops = np.atleast_2d(weighted.weights).max(1) * weighted.draws.shape[1]
    bad = ~(k <= MOST_K_HAT) & (tops > HARMLESS)
    if not bad.any():
        return None
    where = f" for {bad.sum()} of {len(k)} observations (at worst " if weighted.batched else " ("
    return Unreliable(f"the importance weights are not to be relied on{where}k-hat = {k[bad].max():.2f}, above {MOST_K_HAT:g}; efficiency "
                      f"{np.min(weighted.efficiency):.2g}): the posterior is too narrow somewhere, or far from the target; train longer or "
                      "on more rows, or recalibrate")


def k_hat(log_weights: Array) -> float:
    """The Pareto shape of the largest of log weights (n,), by `arviz.psislw`; 0 where these are all alike, inf where too few are not 0."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # ArviZ announces its own next version at every import; its warnings of k are ours to give
        from arviz import psislw

        found = float(psislw(np.array(log_weights))[1])
    n, top = len(log_weights), log_weights.max()
    flat = (log_weights >= top - 1e-9).sum() >= math.ceil(min(0.2 * n, 3 * math.sqrt(n)))  # the tail, of which psislw finds no shape
    return 0.0 if flat else math.inf if math.isnan(found) else found
