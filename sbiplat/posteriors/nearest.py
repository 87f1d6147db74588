r"""The bank's own answer, before any training: approximate Bayesian computation by nearest neighbours (Beaumont et al., 2002).

The rows of the bank whose summaries lie closest to those of x are kept (rejection ABC), weighted by Epanechnikov's kernel of their
distance d over the farthest kept one h, :math:`K = 1 - (d / h)^2`, and moved by a weighted ridge regression of z on the summaries,

.. math:: z_i' = z_i - (s_i - s(x))^\top \hat B .

Summaries are the standardised x, or the context of a trained run (`summaries=run`), which is where such a query gets sharp. It is the
baseline that a trained posterior must beat; it has no density, and no gate has tested it. The bank is read once a query, in passes.
"""

from __future__ import annotations

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
RIDGE = 1e-3
Array = NDArray[np.float64]


class NearestSampler:
    """Draws of the nearest rows of a bank; no density."""

    def __init__(self, bank: Bank, keep: int, adjust: bool, contexts: Contexts | None) -> None:
        self._bank, self._keep, self._adjust, self._contexts = bank, keep, adjust, contexts
        self._rows_a_pass = max(1, PASS_BYTES // row_bytes(bank.header))
        self._standardise = Standardise(bank.header.x)
        first = self._pass(0, min(len(bank), SCALE_ROWS, self._rows_a_pass))
        self._standardise.fit({k: torch.as_tensor(v) for k, v in first[1].items()})
        self.diagnostics: dict[str, Any] = {}

    def sample(self, x: Fields, n: int, seed: int) -> NDArray[np.float32]:
        """(B, n, D), by resampling the kept rows with their weights."""
        rng = np.random.default_rng(np.random.SeedSequence(seed, spawn_key=(0xABC,)))
        out = []
        for kept_z, weights in self._kept(self._summaries(x)):
            out.append(kept_z[rng.choice(len(kept_z), n, p=weights)])
        return np.stack(out).astype(np.float32)

    def log_prob(self, z: NDArray[np.float32], x: Fields) -> Array:
        raise NotImplementedError("draws of the nearest rows have no density")

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

    def _kept(self, target: Array) -> list[tuple[Array, Array]]:
        """For each observation the adjusted z of its nearest rows, and their weights."""
        count = len(target)
        distance, theta, near = [np.zeros(0)] * count, [np.zeros((0, self._bank.header.prior.dim))] * count, [target[:0]] * count
        for first in range(0, len(self._bank), self._rows_a_pass):
            rows, x = self._pass(first, min(first + self._rows_a_pass, len(self._bank)))
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
        return [self._adjusted(unconstrain(t), s - o, d) for t, s, o, d in zip(theta, near, target, distance, strict=True)]

    def _adjusted(self, z: Array, gap: Array, distance: Array) -> tuple[Array, Array]:
        weights = np.maximum(1 - np.square(distance / max(distance[-1], 1e-300)), 1e-12)
        weights /= weights.sum()
        self.diagnostics = {"farthest": float(distance[-1]), "kept": len(z), "ess_min": float(1 / np.square(weights).sum())}
        if not self._adjust:
            return z, weights
        centred = gap - weights @ gap
        gram = (centred * weights[:, None]).T @ centred
        gram += RIDGE * np.eye(len(gram)) * max(np.trace(gram) / len(gram), 1e-300)
        slope = np.linalg.solve(gram, (centred * weights[:, None]).T @ (z - weights @ z))
        return z - gap @ slope, weights


def nearest(bank: Bank | str, *, keep: float = 0.01, adjust: bool = True, summaries: Run | None = None) -> Posterior:
    """The posterior of the rows of a bank that are nearest to x: regression-adjusted ABC, without any training.

    keep: the share of the rows that is kept, at least 100 rows. adjust: whether kept rows are moved by regression. summaries: a run
    whose contexts serve as summaries in place of x. The draws are not certified, and have no density. Raises BankError, SettingError.
    """
    bank = (bank if isinstance(bank, Bank) else Bank.open(bank)).require_complete()
    if isinstance(keep, bool) or not isinstance(keep, int | float) or not 0 < keep <= 1:
        raise SettingError(f"keep must be a share of the bank's rows between 0 and 1, got {keep!r}")
    if bank.header.signals:
        raise BankError(f"{bank.path} holds signals, not observations; a query needs a bank of x itself")
    good = int((bank.status == STATUS["ok"]).sum())
    rows = min(good, max(100, round(keep * good)))
    if rows < 2:
        raise BankError(f"{bank.path} has {good} rows that did not fail; a query needs at least 2")
    contexts = None
    if summaries is not None:
        estimator = summaries.require_finished().estimator()
        if not hasattr(estimator, "context"):
            raise SettingError(f"{summaries.path} is a run of {summaries.architecture.estimator}, which has no summaries of x; take npe")
        if summaries.x.shapes != bank.header.x.shapes:
            raise SettingError(f"{summaries.path} was trained on x of another shape than {bank.path} holds")
        contexts = Contexts(estimator)
    refusal = "draws of the bank's nearest rows: an approximation that no gate has tested"
    return Posterior(bank.header.prior, bank.header.x, NearestSampler(bank, rows, adjust, contexts),
                     {"bank_digest": bank.digest, "certified": "no", "refusal": refusal})
