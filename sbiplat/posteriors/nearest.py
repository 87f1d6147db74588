r"""The bank's own answer, before any training: approximate Bayesian computation by nearest neighbours (Beaumont et al., 2002).

The rows of the bank whose summaries lie closest to those of x are kept (rejection ABC), weighted by Epanechnikov's kernel of their
distance d over the farthest kept one h, :math:`K = 1 - (d / h)^2`, and moved by a weighted ridge regression of z on the summaries,

.. math:: z_i' = z_i - (s_i - s(x))^\top \hat B .

Summaries are the standardised x, or the context of a trained run (`summaries=run`), which is where such a query gets sharp. It is the
baseline that a trained posterior must beat; it has no density, and no gate has tested it. The bank is read once a query, in passes.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from sbiplat.bank.bank import Bank
from sbiplat.bank.layout import STATUS, row_bytes
from sbiplat.errors import BankError, SettingError
from sbiplat.nets.embeddings import flatten
from sbiplat.nets.standardise import Standardise
from sbiplat.observation import Fields
from sbiplat.posteriors.base import Posterior
from sbiplat.posteriors.passes import Contexts
from sbiplat.runs import Run

PASS_BYTES = 2**26
SCALE_ROWS = 20_000
LEAST_ROWS = 100
MANY_NUMBERS = 20  # of x, among which distances say little
RIDGE = 1e-3
Array = NDArray[np.float64]


class NearestSampler:
    """Draws of the nearest rows of a bank; no density."""

    def __init__(self, bank: Bank, keep: int, adjust: bool, contexts: Contexts | None) -> None:
        self._bank, self._keep, self._adjust, self._contexts = bank, keep, adjust, contexts
        self._rows_a_pass = max(1, PASS_BYTES // row_bytes(bank.header))
        self._standardise = Standardise(bank.header.x)
        self._standardise.fit({k: torch.as_tensor(v) for k, v in self._some(SCALE_ROWS).items()})
        self.diagnostics: dict[str, Any] = {}

    def sample(self, x: Fields, n: int, seed: int) -> NDArray[np.float32]:
        """(B, n, D), by resampling the kept rows with their weights."""
        rng = np.random.default_rng(np.random.SeedSequence(seed, spawn_key=(0xABC,)))
        out = []
        kept = self._kept(self._summaries(x))
        for z, weights, _ in kept:
            out.append(z[rng.choice(len(z), n, p=weights)])
        self.diagnostics = {"kept": len(kept[0][0]), "farthest": max(far for *_, far in kept),
                            "ess_min": min(float(1 / np.square(weights).sum()) for _, weights, _ in kept)}
        return np.stack(out).astype(np.float32)

    def log_prob(self, z: NDArray[np.float32], x: Fields) -> Array:
        raise SettingError("draws of the bank's nearest rows have no density")

    def describe(self) -> list[dict[str, Any]]:
        return [{"step": "factor", "name": "nearest rows of the bank", "needs": [], "gives": ["z"], "density": False}]

    def _some(self, wanted: int) -> Fields:
        """x of the first rows that did not fail, for the scales: as many as wanted, or as a pass holds."""
        parts, found = [], 0
        for first in range(0, len(self._bank), self._rows_a_pass):
            parts.append(self._pass(first, min(first + self._rows_a_pass, len(self._bank)))[1])
            found += len(next(iter(parts[-1].values())))
            if found >= min(wanted, max(LEAST_ROWS, self._rows_a_pass)):
                break
        return {k: np.concatenate([p[k] for p in parts])[:wanted] for k in parts[0]}

    def _pass(self, first: int, stop: int) -> tuple[Array, Fields]:
        """theta and x of the rows that did not fail."""
        data = self._bank.read(first, stop)
        good = data["status"] == STATUS["ok"]
        spec = self._bank.header.x
        return data["theta"][good], {k: data["x" if spec.plain else f"x/{k}"][good] for k in spec.shapes}

    @torch.no_grad()
    def _summaries(self, x: Fields) -> Array:
        if self._contexts is not None:
            return self._contexts.contexts(x).double().cpu().numpy()
        return flatten(self._standardise({k: torch.as_tensor(np.ascontiguousarray(v)) for k, v in x.items()})).double().numpy()

    def _kept(self, target: Array) -> list[tuple[Array, Array, float]]:
        """For each observation the adjusted z of its nearest rows, their weights, and the farthest one's distance."""
        count = len(target)
        distance, theta, near = [np.zeros(0)] * count, [np.zeros((0, self._bank.header.prior.dim))] * count, [target[:0]] * count
        for first in range(0, len(self._bank), self._rows_a_pass):
            rows, x = self._pass(first, min(first + self._rows_a_pass, len(self._bank)))
            if not len(rows):
                continue
            summaries = self._summaries(x)
            for b in range(count):
                gap = np.sqrt(np.square(summaries - target[b]).sum(1))
                both = np.concatenate([distance[b], gap])
                best = np.argpartition(both, self._keep - 1)[:self._keep] if len(both) > self._keep else np.arange(len(both))
                best = best[np.argsort(both[best], kind="stable")]
                distance[b] = both[best]
                theta[b] = np.concatenate([theta[b], rows])[best]
                near[b] = np.concatenate([near[b], summaries])[best]
        unconstrain = self._bank.header.prior.unconstrain
        return [(*adjusted(unconstrain(t), s - o, d, float(d[-1]), self._adjust), float(d[-1]))
                for t, s, o, d in zip(theta, near, target, distance, strict=True)]


def adjusted(z: Array, gap: Array, distance: Array, farthest: float, adjust: bool = True) -> tuple[Array, Array]:
    """Kept rows (K, D) moved by the regression on gap = s_i - s(x) (K, S), and their weights (K,), from distances (K,)."""
    weights = np.maximum(1 - np.square(distance / max(farthest, 1e-300)), 1e-12)
    weights /= weights.sum()
    if not adjust:
        return z, weights
    centred = gap - weights @ gap
    gram = (centred * weights[:, None]).T @ centred
    gram += RIDGE * np.eye(len(gram)) * max(np.trace(gram) / len(gram), 1e-300)
    slope = np.linalg.solve(gram, (centred * weights[:, None]).T @ (z - weights @ z))
    return z - gap @ slope, weights


def nearest(bank: Bank | str | Path, *, keep: float = 0.01, adjust: bool = True, summaries: Run | str | Path | None = None) -> Posterior:
    """The posterior of the rows of a bank that are nearest to x: regression-adjusted ABC, without any training.

    keep: the share of the rows that is kept, at least 100 rows. adjust: whether kept rows are moved by regression. summaries: a run
    whose contexts serve as summaries in place of x. The draws are not certified, and have no density. Raises BankError, SettingError.
    """
    bank = (bank if isinstance(bank, Bank) else Bank.open(bank)).require_complete()
    if isinstance(keep, bool) or not isinstance(keep, int | float | np.floating) or not 0 < keep <= 1:
        raise SettingError(f"keep must be a share of the bank's rows between 0 and 1, got {keep!r}")
    if bank.header.signals:
        raise BankError(f"{bank.path} holds signals, not observations; a query needs a bank of x itself")
    good = int((bank.status == STATUS["ok"]).sum())
    if good < LEAST_ROWS:
        raise BankError(f"{bank.path} has {good} rows that did not fail; a query needs at least {LEAST_ROWS}")
    rows = min(good, max(LEAST_ROWS, round(keep * good)))
    contexts = None
    if summaries is not None:
        summaries = summaries if isinstance(summaries, Run) else Run.open(summaries)
        estimator = summaries.require_finished().estimator()
        if not hasattr(estimator, "context"):
            raise SettingError(f"{summaries.path} is a run of {summaries.architecture.estimator}, which has no summaries of x; take npe")
        simulators = summaries.record["bank"]["simulator"]["name"], bank.header.simulator["name"]
        if summaries.x.shapes != bank.header.x.shapes or simulators[0] != simulators[1]:
            raise SettingError(f"{summaries.path} was trained on x of {simulators[0]!r}, {bank.path} holds x of {simulators[1]!r}; "
                               "give a run of this bank's simulator")
        contexts = Contexts(estimator)
    refusal = "draws of the bank's nearest rows: an approximation that no gate has tested"
    if contexts is None and bank.header.x.size > MANY_NUMBERS:
        refusal += (f"; nearest in all {bank.header.x.size} numbers of x, of which most may say little: the contexts of a trained run are "
                    "better summaries (summaries=RUN, or --summaries RUN)")
    return Posterior(bank.header.prior, bank.header.x, NearestSampler(bank, rows, adjust, contexts),
                     {"bank_digest": bank.digest, "certified": "no", "refusal": refusal,
                      "weights_digest": summaries.weights_digest if isinstance(summaries, Run) else None})
