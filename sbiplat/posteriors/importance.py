r"""Importance correction: draws of q(theta | x) with weights that carry them to a target.

.. math:: \log w = \log p(x \,|\, \theta) + \log p(\theta) - \log q(\theta \,|\, x), \qquad
          \hat Z = \frac1n \sum_i w_i, \qquad \mathrm{ESS} = \frac{(\sum_i w_i)^2}{\sum_i w_i^2},

with the simulator's exact likelihood, so that :math:`\hat Z` is an unbiased estimate of the evidence p(x), with the relative standard
error :math:`\sqrt{(n / \mathrm{ESS} - 1) / (n - 1)}`; see `posteriors.weighted` for what they are worth.

Without a likelihood, another prior p' is a ratio, :math:`\log w = \log p'(\theta) - \log p(\theta)`; :math:`\hat Z` estimates p'(x) / p(x).

Pinned parameters, theta_P = c, leave a density q(theta_F, c | x) of the others that no sampler draws from. So the draws are moved in z, by
the regression on z_P, to :math:`z_F' = z_F + A (c_z - z_P)`, a shift of constant volume, and z_P is kept as an auxiliary variable with the
target r(z_P), a Gaussian of 0.8 times its own variance, so that a Gaussian q has bounded weights, of efficiency 0.98 a pinned parameter.
Weights are exact for any A and r, which are taken from a pilot; how good they are is seen by efficiency and k-hat.

Where a sampler draws auxiliary variables v itself (the proxies of GNPE), :math:`\log w` has :math:`\log q(\theta, v | x)` and, in the
target, their law :math:`\log K(v | \theta)`: see `JointSampler`.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Generator, Tensor

from sbiplat.errors import PriorError, SettingError, SimulatorError
from sbiplat.laws import Independent
from sbiplat.marginals import standard_normal_log_prob
from sbiplat.observation import Fields
from sbiplat.posteriors.base import Posterior, fresh_seed
from sbiplat.posteriors.chain import Chain
from sbiplat.posteriors.steps import Columns, Derived, Factor, Pinned, Reparametrisation, Step, Target, Tilt
from sbiplat.posteriors.weighted import Weighted, doubt
from sbiplat.prior import Prior
from sbiplat.runs import Run
from sbiplat.settings import whole_seed
from sbiplat.simulator import Simulator, available, resolve

Array = NDArray[np.float64]
LogLikelihood = Callable[[Array, Any], ArrayLike]
FAR = 4.5  # of z: one row in 10^5 lies beyond
LEAST_DRAWS = 100
PILOT_DRAWS = 2000
ROWS_A_CALL = 16_384  # of a user's log_likelihood
RIDGE = 1e-6
NARROWER = 0.8  # the variance of r by that of z_P
_PILOT = 0x9117


class JointSampler(Protocol):
    """A sampler whose density is that of z together with auxiliary variables v."""

    def sample_and_log_prob(self, x: Fields, n: int, seed: int) -> tuple[NDArray[np.float32], Array, Array]:
        """z (B, n, D); log q(z, v | x), (B, n); and log K(v | z), the law of v given z, which the target must include, (B, n)."""
        ...


def importance(
    posterior: Posterior, x: Any, n: int, *, simulator: Simulator | str | None = None, log_likelihood: LogLikelihood | None = None,
    prior: Prior | None = None, pinned: Mapping[str, float] | None = None, seed: int | None = None,
) -> Weighted:
    """n draws of a posterior given x, one observation or a batch, with weights that carry them to a target.

    simulator: whose `log_likelihood` the target has; or log_likelihood: `(theta (N, D), x) -> (N,)`, of one x in the user's form. prior:
    another one of the same parameters. pinned: parameters by name that are held fixed; the target is then that of the others given them.
    Without a likelihood the target is the posterior's own density, under the other prior, given what is pinned. Warns with `Unreliable`
    (see `doubt`). Raises SettingError, SimulatorError, PriorError and ObservationError.
    """
    if isinstance(n, bool) or not isinstance(n, int | np.integer) or n < LEAST_DRAWS:
        raise SettingError(f"n must be a whole number of at least {LEAST_DRAWS}, of fewer weights nothing can be said; got {n!r}")
    if simulator is not None and log_likelihood is not None:
        raise SettingError("give a simulator or a log_likelihood, not both")
    if simulator is not None:
        log_likelihood = likelihood_of(resolve(simulator), posterior)
    if log_likelihood is None and prior is None and not pinned:
        raise SettingError("there is nothing to correct to: give the simulator, whose log_likelihood makes the weights, another prior, or "
                           "pinned parameters")
    before = posterior.changed_prior or posterior.prior
    if prior is not None:
        posterior.require_within(prior)
        if log_likelihood is None and not pinned and prior == before:
            raise SettingError("the other prior is the posterior's own, and there is nothing to correct to; give another")
    now = prior or before
    seed = fresh_seed() if seed is None else whole_seed(seed)
    fields, batched = posterior.x.batch(x)
    posterior.warn_if_misspecified(fields, stacklevel=4)
    problem = _Problem(posterior, fields, log_likelihood, before, now, _checked_pins(posterior, now, pinned or {}), int(n), seed)
    chain = Chain(problem.steps())
    state = chain.sample(fields, int(n), seed)
    theta, log_weights = state.columns["theta"].numpy(), state.log_weight.numpy()
    _require_some(log_weights, batched)
    own = [*posterior.describe()[:-1], *chain.description()[1:]]
    changed = [*(["another prior"] if prior is not None else []), *(["pinned parameters"] if pinned else [])]
    provenance = posterior.uncovered(f"drawn for {' and '.join(changed)} after the gate") if changed else {}
    made = Weighted(posterior, fields, batched, theta, log_weights, seed, now, own, problem.evidence_of, provenance)
    if (line := doubt(made)) is not None:
        warnings.warn(line, stacklevel=3)
    return made


def likelihood_of(simulator: Simulator, posterior: Posterior) -> LogLikelihood:
    """The log_likelihood of a posterior's simulator; raises SimulatorError where it has none, or is another's."""
    single = posterior.single_x
    if simulator.x.shapes != single.shapes or simulator.prior.names != posterior.prior.names:
        raise SimulatorError(f"simulator {simulator.name!r} has other parameters or another shape of x than this posterior, which is over "
                             f"{', '.join(posterior.prior.names)} given x of shape {single.shape_text()}")
    if simulator.log_likelihood is None:
        raise SimulatorError(f"simulator {simulator.name!r} has no log_likelihood, by which draws could be corrected; give it one: "
                             "@sp.simulator(..., log_likelihood=f), with f(theta (N, D), x) -> (N,)")
    return simulator.log_likelihood


def simulator_of_run(run: Run, given: Simulator | str | None, command: str) -> Simulator:
    """The simulator given, or the one registered here under the name in the run, if its source is still that of the bank: what a run
    names is never run otherwise. command: what to type, for the message. Raises SimulatorError."""
    if given is not None:
        return resolve(given)
    recorded = run.record["bank"]["simulator"]
    name, how = str(recorded["name"]), f"{command} --simulator file.py:object"
    if ":" in name or name not in available():
        raise SimulatorError(f"no simulator is registered here as {name!r}; name it: {how}")
    made = resolve(name)
    if made.source_digest() != recorded["source_digest"]:
        raise SimulatorError(f"the simulator registered here as {name!r} is not the one that made the bank, since its source differs; "
                             f"name the one that did: {how}")
    return made


# ----------------------------------------------------------------------------------------------------------- the target


@dataclass(frozen=True)
class _Pins:
    """Pinned parameters: their places, their values in theta and in z. free: the places of the others."""

    places: list[int]
    free: list[int]
    theta: Array
    z: Array


def _checked_pins(posterior: Posterior, prior: Prior, pinned: Mapping[str, float]) -> _Pins | None:
    if not pinned:
        return None
    names = list(posterior.prior.names)
    for name, value in pinned.items():
        if name not in names:
            raise SettingError(f"pinned: there is no parameter {name!r}; there are {', '.join(names)}")
        if isinstance(value, bool) or not isinstance(value, int | float | np.number) or not math.isfinite(value):
            raise SettingError(f"pinned: {name} must be a number, got {value!r}")
    if len(pinned) == len(names):
        raise SettingError("pinned: every parameter is, and none is left to draw; leave one out")
    if not all(isinstance(p.law, Independent) for p in (posterior.prior, prior)):
        raise SettingError("pinned parameters need a prior of independent parameters, and this one is joint; train on a bank whose prior "
                           "is a dict of laws")
    places = [names.index(name) for name in pinned]
    values = np.array([float(v) for v in pinned.values()])
    centre = posterior.prior.constrain(np.zeros(len(names)))
    centre[places] = values
    for p in (posterior.prior, prior):
        if not p.contains(centre):
            (low, high), k = p.support, next(k for k in places if not _inside(p, k, centre[k]))
            raise PriorError(f"pinned: {names[k]} = {centre[k]:g} lies outside the prior's support, {low[k]:g} to {high[k]:g}")
    z = posterior.prior.unconstrain(centre)[places]
    far = int(np.abs(z).argmax())
    if abs(z[far]) > FAR:
        raise PriorError(f"pinned: {names[places[far]]} = {values[far]:g} lies where the prior has hardly any mass (as {abs(z[far]):.1f} "
                         f"standard deviations out of a normal), and no net was trained there; pin it within {FAR:g} of them")
    return _Pins(places, [k for k in range(len(names)) if k not in places], values, z)


def _inside(prior: Prior, k: int, value: float) -> bool:
    return bool(prior.law.marginals[k].contains(value))  # type: ignore[attr-defined]


@dataclass(frozen=True)
class _Problem:
    """What is drawn and what it is corrected to."""

    posterior: Posterior
    fields: Fields
    log_likelihood: LogLikelihood | None
    before: Prior
    now: Prior
    pins: _Pins | None
    n: int
    seed: int

    @property
    def tilted(self) -> bool:
        """Whether only the prior is changed, for which no density of the draws is needed."""
        return self.log_likelihood is None and self.pins is None

    @property
    def joint(self) -> bool:
        return not self.tilted and hasattr(self.posterior.sampler, "sample_and_log_prob")

    @property
    def evidence_of(self) -> str:
        given = "" if self.pins is None else ", ".join(f"{self.posterior.prior.names[k]} = {v:g}"
                                                       for k, v in zip(self.pins.places, self.pins.theta, strict=True))
        if self.log_likelihood is not None:
            return f"p(x | {given})" if given else "p(x)"
        ratio = "p'(x) / p(x), p' the other prior" if self.now != self.before else ""
        return f"q({given} | x)" + (f" {ratio}" if ratio else "") if given else ratio

    def steps(self) -> list[Step]:
        first = Factor("draws", ("z", "log_auxiliary") if self.joint else ("z",), self._draw, density=not self.tilted)
        if self.pins is None:
            prior = self.posterior.prior
            bijection = Reparametrisation("prior", ("z",), ("theta",), lambda x, c: (
                {"theta": _t(prior.constrain(c["z"].numpy()))}, _t(prior.log_abs_det_jacobian(c["z"].numpy()))))
            return [first, bijection, self._last(("theta",))]
        if self.joint:
            raise SettingError("this posterior draws parameters together with proxies of their pose, which cannot be moved to pinned "
                               "values; pin parameters of a run without symmetry")
        return [first, *self._pinned(self.pins), self._last(("theta", "z_auxiliary"))]

    def _draw(self, x: Any, columns: Columns, n: int, generator: Generator) -> tuple[Columns, Tensor | None]:
        """By the posterior's own seed: the draws are those that `sample` gives."""
        if self.joint:
            z, log_q, extra = self.posterior.sampler.sample_and_log_prob(self.fields, n, self.seed)  # type: ignore[attr-defined]
            return {"z": _t(z), "log_auxiliary": _t(extra)[..., None]}, _t(log_q)
        z = self.posterior.unconstrained_sample(self.fields, n, self.seed)
        if self.tilted:
            return {"z": _t(z)}, None
        try:
            return {"z": _t(z)}, _t(self.posterior.unconstrained_log_prob(z, self.fields))
        except NotImplementedError:
            raise SettingError("this posterior has no density, by which its draws could be corrected; only a change of the prior needs "
                               "none") from None

    def _pinned(self, pins: _Pins) -> list[Step]:
        """The shift by regression, the constants, and theta of both."""
        slope, _, _ = self._pilot
        target, marginals = _t(pins.z), self.posterior.prior.law.marginals  # type: ignore[attr-defined]

        def shift(x: Any, c: Columns) -> tuple[Columns, Tensor]:
            apart, others = c["z"][..., pins.places], c["z"][..., pins.free]
            return {"z_free": others + (target - apart) @ slope, "z_auxiliary": apart}, others.new_zeros(others.shape[:2])

        def constrain(x: Any, c: Columns) -> tuple[Columns, Tensor]:
            z = c["z_free"].numpy()
            theta = np.stack([marginals[k].from_normal(z[..., j]) for j, k in enumerate(pins.free)], -1)
            log_p = sum(marginals[k].log_prob(theta[..., j]) for j, k in enumerate(pins.free))
            return {"free": _t(theta)}, _t(standard_normal_log_prob(z).sum(-1) - log_p)

        def joined(x: Any, c: Columns) -> Columns:
            both = torch.cat([c["free"], c["pinned"]], -1)
            return {"theta": both[..., np.argsort([*pins.free, *pins.places]).tolist()]}

        labels = {self.posterior.prior.names[k]: v for k, v in zip(pins.places, pins.theta, strict=True)}
        return [Reparametrisation("regression", ("z",), ("z_free", "z_auxiliary"), shift),
                Pinned("pinned", {"pinned": _t(pins.theta)}, labels),
                Reparametrisation("prior", ("z_free",), ("free",), constrain),
                Derived("all parameters", ("free", "pinned"), ("theta",), joined)]

    @cached_property
    def _pilot(self) -> tuple[Tensor, Array, Array]:
        """Of other draws: the slopes of z_F in z_P, (B, P, F), and mean (B, P) and covariance (B, P, P) of r."""
        assert self.pins is not None
        own = int(np.random.SeedSequence(self.seed, spawn_key=(_PILOT,)).generate_state(1)[0])
        z = self.posterior.unconstrained_sample(self.fields, PILOT_DRAWS, own)
        apart, others = z[..., self.pins.places], z[..., self.pins.free]
        mean = apart.mean(1)
        centred = apart - mean[:, None]
        covariance = np.swapaxes(centred, 1, 2) @ centred / (PILOT_DRAWS - 1)
        covariance += RIDGE * np.eye(len(self.pins.places)) * np.trace(covariance, axis1=1, axis2=2)[:, None, None]
        cross = np.swapaxes(centred, 1, 2) @ (others - others.mean(1, keepdims=True)) / (PILOT_DRAWS - 1)
        return _t(np.linalg.solve(covariance, cross)), mean, NARROWER * covariance

    def _last(self, needs: tuple[str, ...]) -> Step:
        if self.tilted:
            return Tilt("another prior", ("theta",), lambda x, c: _t(self._log_ratio(c["theta"].numpy())))
        what = ("log_likelihood and prior" if self.log_likelihood is not None else "the posterior's density"
                + (" under another prior" if self.now != self.before else ""))
        return Target(what, (*needs, *(("log_auxiliary",) if self.joint else ())), self._log_target)

    def _log_ratio(self, theta: Array) -> Array:
        return self.now.log_prob(theta) - self.before.log_prob(theta)

    def _log_target(self, x: Any, columns: Columns) -> Tensor:
        theta, pins = columns["theta"].numpy(), self.pins
        if self.log_likelihood is not None:
            log_p = self._log_likelihoods(theta) + self.now.log_prob(theta)
        else:
            log_p = self.posterior.density(theta, self.fields) + self._log_ratio(theta)
        if self.joint:
            log_p = log_p + columns["log_auxiliary"][..., 0].numpy()
        if pins is not None:
            _, mean, covariance = self._pilot
            gap = columns["z_auxiliary"].numpy() - mean[:, None]
            square = (np.swapaxes(np.linalg.solve(covariance, np.swapaxes(gap, 1, 2)), 1, 2) * gap).sum(-1)
            log_p = log_p - 0.5 * (square + np.linalg.slogdet(2 * np.pi * covariance)[1][:, None])
            if self.log_likelihood is not None:
                marginals = self.now.law.marginals  # type: ignore[attr-defined]
                log_p = log_p - sum(float(marginals[k].log_prob(v)) for k, v in zip(pins.places, pins.theta, strict=True))
        return _t(log_p)

    def _log_likelihoods(self, theta: Array) -> Array:
        """log p(x_b | theta) of theta (B, n, D): (B, n); of sets, the sum over their observations."""
        out = np.zeros(theta.shape[:2])
        for b in range(len(theta)):
            one = {k: v[b] for k, v in self.fields.items()}
            every = [{k: v[j] for k, v in one.items()} for j in range(self.posterior.set_size)] or [one]
            for fields in every:
                x = self.posterior.single_x.unwrap(fields)
                out[b] += np.concatenate([self._called(theta[b, a:a + ROWS_A_CALL], x) for a in range(0, theta.shape[1], ROWS_A_CALL)])
        return out

    def _called(self, theta: Array, x: Any) -> Array:
        assert self.log_likelihood is not None
        try:
            given = {k: v.copy() for k, v in x.items()} if isinstance(x, dict) else x.copy()
            found = np.asarray(self.log_likelihood(theta.copy(), given), float)
        except (Exception, SystemExit) as error:  # the user's own code: anything may come
            text = (str(error).splitlines() or [""])[0]
            raise SimulatorError(f"log_likelihood raised {type(error).__name__}: {text[:200]}; it takes theta of shape {theta.shape} and "
                                 "one x") from error
        if found.shape != (len(theta),):
            raise SimulatorError(f"log_likelihood gave an array of shape {found.shape} for theta of shape {theta.shape}; expected "
                                 f"({len(theta)},)")
        bad = np.flatnonzero(np.isnan(found) | (found == np.inf))
        if bad.size:
            at = ", ".join(f"{name} = {v:.6g}" for name, v in zip(self.posterior.prior.names, theta[bad[0]], strict=True))
            raise SimulatorError(f"log_likelihood is {found[bad[0]]} for {bad.size} of {len(theta)} draws, first at {at}; it must be a "
                                 "number, or -inf where x is impossible")
        return found


def _require_some(log_weights: Array, batched: bool) -> None:
    bad = np.flatnonzero(np.isnan(log_weights).any(1) | ~(log_weights > -np.inf).any(1) | (log_weights == np.inf).any(1))
    if bad.size:
        where = f" for observation {bad[0]}" if batched else ""
        nan = np.isnan(log_weights[bad[0]]).any() or (log_weights[bad[0]] == np.inf).any()
        raise SettingError(f"the weights are not finite{where}: the density of its draws is not" if nan else
                           f"no draw has any density under the target{where}: posterior and target do not overlap")


def _t(values: Any) -> Tensor:
    return torch.as_tensor(np.ascontiguousarray(values), dtype=torch.float64)

