"""What a posterior is: `sample(x, n)`, `log_prob(theta, x)` and `to_arviz(x, n)`, in the user's own parameter space."""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import numpy as np
from numpy.typing import ArrayLike, NDArray

from sbiplat.errors import Misspecified, PriorError, SettingError
from sbiplat.observation import Fields, ObservationSpec
from sbiplat.posteriors.export import to_arviz
from sbiplat.posteriors.steps import describe
from sbiplat.prior import Prior
from sbiplat.settings import whole_seed

Array = NDArray[np.float64]


class Sampler(Protocol):
    """The core behind a posterior: draws and densities over unconstrained z, for B observations at once.

    It may also have `describe() -> list`, the steps that it is (see steps.py), and `sample_and_log_prob(x, n, seed)`, the density of z
    together with auxiliary variables (see `importance.JointSampler`).
    """

    def sample(self, x: Fields, n: int, seed: int) -> NDArray[np.float32]:
        """(B, n, D) draws; the same seed gives the same draws."""
        ...

    def log_prob(self, z: NDArray[np.float32], x: Fields) -> Array:
        """log q(z | x) for z (B, n, D): (B, n). Raises NotImplementedError where there is no density."""
        ...


class Watch(Protocol):
    """What holds every observation against the bank before it is sampled. facts: of the last one, for files of draws."""

    facts: dict[str, Any]

    def look(self, x: Fields, sampler: Any) -> Any:
        """How unlike the bank B single observations are."""
        ...

    def warning(self, x: Fields, sampler: Any) -> Misspecified | None:
        """The warning to give, if any; raises Uncertified where it is to refuse."""
        ...


@dataclass(frozen=True)
class Posterior:
    r"""A posterior over named parameters.

    A density over theta follows from that over z by the prior's bijection,
    :math:`\log q(\theta | x) = \log q(z | x) - \log |d\theta / dz|`.

    provenance: what is written into every file of draws (weights and bank digest, certificate). changed_prior: the prior in force,
    where it is not that of the bank (`with_prior`). set_size: how many independent observations make one x (`iid`); 0 where x is
    what the simulator returns. watch: the gate's test of misspecification; None where it has made none.
    """

    prior: Prior
    x: ObservationSpec
    sampler: Sampler
    provenance: Mapping[str, Any] = field(default_factory=dict)
    changed_prior: Prior | None = None
    set_size: int = 0
    watch: Watch | None = None

    def sample(self, x: Any, n: int, *, seed: int | None = None) -> Array:
        """n draws of theta given x: (n, D); given a batch of B observations: (B, n, D).

        seed: fixes the draws; without one, fresh ones every time. Raises ObservationError where x has the wrong shape or NaN. Warns with
        `Misspecified` where x is unlike all that the simulator made.
        """
        fields, batched = self.x.batch(x)
        self.warn_if_misspecified(fields)
        z = self.unconstrained_sample(fields, n, fresh_seed() if seed is None else whole_seed(seed))
        theta = self.prior.constrain(z)
        return theta if batched else theta[0]

    def misspecification(self, x: Any) -> Any:
        """How unlike the bank an observation, or each of a batch, is: a `Misspecification` with p-values, distances and features.

        Each of a set of independent observations (`iid`) stands by itself. Raises SettingError where the gate has calibrated no such test.
        """
        if self.watch is None:
            raise SettingError("the gate has calibrated no test of misspecification for this posterior; run `sbiplat gate` on its run")
        return self.watch.look(self._single(self.x.batch(x)[0]), self.sampler)

    def warn_if_misspecified(self, fields: Fields, stacklevel: int = 3) -> None:
        """Hold observations against the bank; warns with `Misspecified`, or raises Uncertified where it is to refuse."""
        found = self.watch.warning(self._single(fields), self.sampler) if self.watch else None
        if found is not None:
            warnings.warn(found, stacklevel=stacklevel)

    @property
    def single_x(self) -> ObservationSpec:
        """The form of one x, of those of which a set is made where there are sets."""
        shapes = {name: shape[1:] if self.set_size else shape for name, shape in self.x.shapes.items()}
        return replace(self.x, shapes=shapes)

    def _single(self, fields: Fields) -> Fields:
        """The same as single observations: those of sets one after the other."""
        return {name: v.reshape(-1, *v.shape[2:]) for name, v in fields.items()} if self.set_size else fields

    def log_prob(self, theta: ArrayLike, x: Any) -> Array:
        """log q(theta | x), -inf outside the support.

        One x: theta (..., D) gives (...). A batch of B: theta (B, D) gives (B,), and (B, n, D) gives (B, n). Raises PriorError and
        ObservationError for wrong shapes, ChainError where the evidence that the density needs cannot be trusted (nle, nre).
        """
        fields, batched = self.x.batch(x)
        try:
            theta = np.asarray(theta, float)
        except (TypeError, ValueError):
            raise PriorError(f"theta must be numbers, its last axis {', '.join(self.prior.names)}") from None
        if theta.ndim == 0 or theta.shape[-1] != self.prior.dim:
            raise PriorError(f"theta has shape {theta.shape}; its last axis must hold {', '.join(self.prior.names)}")
        size = len(next(iter(fields.values())))
        if batched and (theta.ndim not in (2, 3) or len(theta) != size):
            dim = self.prior.dim
            raise PriorError(f"theta has shape {theta.shape}; for {size} observations give ({size}, {dim}) or ({size}, n, {dim})")
        flat = theta.reshape(size if batched else 1, -1, self.prior.dim)
        return self.density(flat, fields).reshape(theta.shape[:-1])

    def density(self, theta: Array, fields: Fields) -> Array:
        """log q(theta | x) of theta (B, n, D), (B, n); -inf outside the support."""
        inside = self.prior.contains(theta)
        z = self.prior.unconstrain(np.where(inside[..., None], theta, self.prior.constrain(np.zeros(self.prior.dim))))
        log_q = self.sampler.log_prob(z.astype(np.float32), fields) - self.prior.log_abs_det_jacobian(z)
        return np.where(inside, log_q, -np.inf)

    def with_prior(self, prior: Prior) -> Posterior:
        r"""The posterior under another prior of the same parameters, for estimators that learn the likelihood or the ratio (nle, nre).

        .. math:: p'(\theta | x) \propto q(x | \theta) \, p'(\theta)

        Its support must lie within the bank's prior's: the likelihood is not known elsewhere. A certificate does not cover it. Raises
        PriorError, and SettingError where the estimator has no likelihood.
        """
        if not hasattr(self.sampler, "under"):
            raise SettingError("this estimator learns the posterior under the bank's prior, which cannot be changed; train nle or nre "
                               "for that")
        self.require_within(prior)

        def log_prior(z: Array) -> Array:
            return prior.log_prob(self.prior.constrain(z)) + self.prior.log_abs_det_jacobian(z)

        return replace(self, sampler=self.sampler.under(log_prior), provenance=self.uncovered("the prior was changed after the gate"),
                       changed_prior=prior)

    def require_within(self, prior: Prior) -> None:
        """Raises PriorError where another prior is of other parameters, or reaches beyond the bank's, where nothing was simulated."""
        if not isinstance(prior, Prior):
            raise PriorError(f"prior must be a Prior, got {prior!r}")
        if prior.names != self.prior.names:
            raise PriorError(f"the other prior must be of the same parameters, {', '.join(self.prior.names)}")
        (low, high), (new_low, new_high) = self.prior.support, prior.support
        for k, name in enumerate(prior.names):
            if new_low[k] < low[k] or new_high[k] > high[k]:
                raise PriorError(f"the other prior reaches from {new_low[k]:g} to {new_high[k]:g} in {name}, beyond the bank's, "
                                 f"{low[k]:g} to {high[k]:g}: the likelihood is not known there; truncate it")

    def importance(
        self, x: Any, n: int, *, simulator: Any = None, log_likelihood: Any = None, prior: Prior | None = None,
        pinned: Mapping[str, float] | None = None, seed: int | None = None,
    ) -> Any:
        """n draws with importance weights, a `Weighted`: towards the exact posterior, by the simulator's log_likelihood (or one given),
        under another prior, or given some parameters, `pinned` by name. See `posteriors.importance`."""
        from sbiplat.posteriors.importance import importance

        return importance(self, x, n, simulator=simulator, log_likelihood=log_likelihood, prior=prior, pinned=pinned, seed=seed)

    def describe(self) -> list[dict[str, Any]]:
        """The chain of steps that it is, as JSON: the sampler's own, and the prior's bijection."""
        steps = describe(self.sampler)
        return [*steps, {"step": "reparametrisation", "name": "prior", "needs": [*steps[-1]["gives"]], "gives": ["theta"],
                         "takes": [*steps[-1]["gives"]]}]

    def iid(self, k: int) -> Posterior:
        r"""The posterior given k independent observations of one theta, for estimators that learn the likelihood or the ratio (nle, nre).

        .. math:: p(\theta | x_1, \dots, x_k) \propto p(\theta) \prod_{i \le k} q(x_i | \theta)

        Its observation is the k of them, x with one more leading axis of length k; a batch of such sets has an axis before that. The
        errors of the net add up over the k. A certificate does not cover it. Raises SettingError where the estimator has no likelihood.
        """
        if not hasattr(self.sampler, "of_sets"):
            raise SettingError("this estimator learns the posterior of one observation, and cannot join independent ones; train nle or nre "
                               "for that")
        if isinstance(k, bool) or not isinstance(k, int | np.integer) or k < 1:
            raise SettingError(f"the number of independent observations must be a whole number of at least 1, got {k!r}")
        if self.set_size:
            raise SettingError(f"this posterior is already that of {self.set_size} independent observations; "
                               f"take iid({k}) of the first one")
        x = replace(self.x, shapes={name: (int(k), *shape) for name, shape in self.x.shapes.items()}, axis=("", ()))
        return replace(self, x=x, sampler=self.sampler.of_sets(int(k)), set_size=int(k),
                       provenance=self.uncovered("the gate tested single observations"))

    def uncovered(self, why: str) -> dict[str, Any]:
        """The provenance of a posterior that the certificate does not cover."""
        return {**self.provenance, "certified": "no", "refusal": why, "certificate": None}

    def unconstrained_sample(self, fields: Fields, n: int, seed: int) -> Array:
        """(B, n, D) draws of z, for diagnostics."""
        if isinstance(n, bool) or not isinstance(n, int | np.integer) or n < 1:
            raise SettingError(f"n must be a whole number of at least 1, got {n!r}")
        need = 3 * 8 * len(next(iter(fields.values()))) * int(n) * self.prior.dim
        have = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        if need > have:
            raise SettingError(f"n = {n} draws take about {need / 1e9:.3g} GB, more than there are here; ask for fewer at a time")
        return np.asarray(self.sampler.sample(fields, int(n), int(seed)), float)

    def unconstrained_log_prob(self, z: Array, fields: Fields) -> Array:
        """log q(z | x) over z (B, n, D): (B, n), for diagnostics."""
        return self.sampler.log_prob(np.asarray(z, np.float32), fields)

    def to_arviz(self, x: Any, n: int, *, seed: int | None = None) -> Any:
        """Draws as ArviZ InferenceData: groups posterior, prior and observed_data, one chain.

        Given a batch, every parameter has a third dimension `observation`. Units, seed and digests are attributes.
        """
        seed = fresh_seed() if seed is None else whole_seed(seed)
        fields, batched = self.x.batch(x)
        draws = self.sample(x, n, seed=seed)
        return to_arviz(self.changed_prior or self.prior, fields, batched, draws, seed, self.facts)

    def to_sbi(self) -> Any:
        """This posterior behind sbi's `NeuralPosterior`, for sbi's analysis and diagnostics; see `Run.to_sbi`."""
        from sbiplat.estimators.sbi_npe import require_sbi

        require_sbi()
        from sbiplat.posteriors.to_sbi import to_sbi

        return to_sbi(self)

    @property
    def facts(self) -> dict[str, Any]:
        """What is written into files of draws: the provenance, the chain of steps as JSON, and of the last draws the figures of the sampler
        and of the test of misspecification, where there are any."""
        return {**self.provenance, "chain": json.dumps(self.describe()),
                **getattr(self.sampler, "diagnostics", {}), **(self.watch.facts if self.watch else {})}


def fresh_seed() -> int:
    """A seed from the operating system's entropy, short enough to be written down."""
    return int(np.random.SeedSequence().generate_state(1)[0])
