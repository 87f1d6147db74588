"""Laws of the whole parameter vector: independent marginals, a Gaussian, or any torch distribution over vectors.

A law draws theta, scores it, and maps it to R^D and back. Independent and Gaussian laws are push-forwards of N(0, I), so that the
prior of z is N(0, I) itself; a torch law has the bijection that torch registers for its support, and alone imports torch.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any, Protocol

import numpy as np
from numpy.typing import ArrayLike, NDArray

from sbiplat.errors import PriorError
from sbiplat.marginals import Array, Marginal, inner, standard_normal_log_prob


class Law(Protocol):
    """The joint law of the parameter vector: what `Prior` asks of it. Shapes: theta and z are (..., D)."""

    dim: int
    gaussianised: bool  # the prior of z is exactly N(0, I)

    def support(self) -> tuple[Array, Array]: ...
    def sample_each(self, rngs: Sequence[np.random.Generator]) -> Array: ...
    def sample(self, rng: np.random.Generator, n: int) -> Array: ...
    def inside(self, theta: Array) -> NDArray[np.bool_]: ...  # (..., D): False at each parameter outside the support
    def log_prob(self, theta: Array) -> Array: ...
    def constrain(self, z: Array) -> Array: ...
    def unconstrain(self, theta: Array) -> Array: ...
    def log_abs_det_jacobian(self, z: Array) -> Array: ...
    def to_json(self) -> dict[str, Any]: ...


class _PushForward:
    """A law that is a map of the standard normal: sampling is the map."""

    dim: int
    gaussianised = True

    def sample_each(self, rngs: Sequence[np.random.Generator]) -> Array:
        return self.constrain(np.stack([rng.standard_normal(self.dim) for rng in rngs]))

    def sample(self, rng: np.random.Generator, n: int) -> Array:
        return self.constrain(rng.standard_normal((n, self.dim)))

    def constrain(self, z: Array) -> Array:
        raise NotImplementedError


class Independent(_PushForward):
    """The product of univariate marginals."""

    def __init__(self, marginals: Sequence[Marginal]) -> None:
        self.marginals = tuple(marginals)
        self.dim = len(self.marginals)

    def support(self) -> tuple[Array, Array]:
        low, high = zip(*(m.support for m in self.marginals), strict=True)
        return np.array(low), np.array(high)

    def _columns(self, method: str, values: Array) -> Array:
        return np.stack([getattr(m, method)(values[..., k]) for k, m in enumerate(self.marginals)], axis=-1)

    def inside(self, theta: Array) -> NDArray[np.bool_]:
        return self._columns("contains", theta)

    def log_prob(self, theta: Array) -> Array:
        return self._columns("log_prob", theta).sum(-1)

    def constrain(self, z: Array) -> Array:
        return self._columns("from_normal", z)

    def unconstrain(self, theta: Array) -> Array:
        with np.errstate(divide="ignore", invalid="ignore"):
            return self._columns("to_normal", theta)

    def log_abs_det_jacobian(self, z: Array) -> Array:
        return standard_normal_log_prob(z).sum(-1) - self.log_prob(self.constrain(z))

    def to_json(self) -> dict[str, Any]:
        return {"independent": [{"law": type(m).__name__, **asdict(m)} for m in self.marginals]}


class MultivariateNormal(_PushForward):
    """N(loc, covariance), for `Prior.joint`: theta = loc + L z with L the Cholesky factor."""

    def __init__(self, loc: ArrayLike, covariance: ArrayLike) -> None:
        try:
            self.loc, self.covariance = np.array(loc, float), np.array(covariance, float)
        except (TypeError, ValueError) as error:
            raise PriorError(f"MultivariateNormal: loc and covariance must be arrays of numbers: {error}") from None
        self.dim = self.loc.size
        if self.loc.ndim != 1 or self.covariance.shape != (self.dim, self.dim):
            raise PriorError(f"MultivariateNormal: loc of shape {self.loc.shape} does not go with covariance of shape "
                             f"{self.covariance.shape}; give (D,) and (D, D)")
        if not (np.isfinite(self.loc).all() and np.isfinite(self.covariance).all()):
            raise PriorError("MultivariateNormal: loc or covariance holds NaN or infinity")
        if np.abs(self.covariance - self.covariance.T).max() > 1e-6 * np.abs(self.covariance).max():
            raise PriorError("MultivariateNormal: the covariance is not symmetric")
        try:
            self._cholesky = np.linalg.cholesky(self.covariance)
        except np.linalg.LinAlgError:
            raise PriorError("MultivariateNormal: the covariance is not positive definite") from None
        self._inverse = np.linalg.inv(self._cholesky)
        self._log_det = float(np.log(np.diag(self._cholesky)).sum())

    def support(self) -> tuple[Array, Array]:
        return np.full(self.dim, -np.inf), np.full(self.dim, np.inf)

    # einsum, not BLAS: a row's bits must not depend on how many rows are mapped with it.
    def constrain(self, z: Array) -> Array:
        return self.loc + np.einsum("ij,...j->...i", self._cholesky, z)

    def unconstrain(self, theta: Array) -> Array:
        return np.einsum("ij,...j->...i", self._inverse, theta - self.loc)

    def inside(self, theta: Array) -> NDArray[np.bool_]:
        return np.isfinite(theta)

    def log_prob(self, theta: Array) -> Array:
        finite = np.isfinite(theta).all(-1)
        z = self.unconstrain(np.where(finite[..., None], theta, self.loc))
        return np.where(finite, standard_normal_log_prob(z).sum(-1) - self._log_det, -np.inf)

    def log_abs_det_jacobian(self, z: Array) -> Array:
        return np.full(np.shape(z)[:-1], self._log_det)

    def to_json(self) -> dict[str, Any]:
        return {"multivariate_normal": {"loc": self.loc.tolist(), "covariance": self.covariance.tolist()}}


class TorchLaw:
    """Any torch distribution over vectors of length D, with the bijection that torch registers for its support.

    The law is what a bank records of it: its class and parameters, in float64.
    """

    gaussianised = False

    def __init__(self, distribution: Any) -> None:
        from torch.distributions import Distribution, Independent

        if not isinstance(distribution, Distribution):
            raise PriorError(f"Prior.joint takes a torch distribution or sp.MultivariateNormal, got {distribution!r}")
        if len(distribution.event_shape) == 0 and len(distribution.batch_shape) == 1:
            distribution = Independent(distribution, 1)
        self._take(describe_torch(distribution))

    @classmethod
    def from_json(cls, description: Mapping[str, Any]) -> TorchLaw:
        self = object.__new__(cls)
        self._take(dict(description))
        return self

    def _take(self, description: dict[str, Any]) -> None:
        import torch
        from torch.distributions import biject_to

        self._description, self.distribution = description, rebuild_torch(description)
        name, event, batch = type(self.distribution).__name__, self.distribution.event_shape, self.distribution.batch_shape
        if len(event) != 1 or len(batch) != 0:
            raise PriorError(f"Prior.joint: {name} has event shape {tuple(event)} and batch shape {tuple(batch)}; "
                             "it must draw vectors: event (D,), batch ()")
        self.dim = int(event[0])
        self._constraint = _mixed(self.distribution.support)
        try:
            self._bijection = biject_to(self._constraint)
            shape = tuple(self._bijection.forward_shape(torch.Size([self.dim])))
            if not np.isfinite(self._bijection(torch.zeros(self.dim, dtype=torch.float64)).numpy()).all():
                raise NotImplementedError
        except NotImplementedError:
            raise PriorError(f"Prior.joint: torch knows no bijection from R^D to the support of {name}; "
                             "use a law of continuous parameters") from None
        if shape != (self.dim,):
            raise PriorError(f"Prior.joint: the support of {name} is not a box in R^{self.dim} (a simplex, or a mixture over "
                             "several supports); leave a parameter out and compute it in the simulator, or use one support")
        low, high = _bounds(self._constraint)
        self._low, self._high = (np.broadcast_to(np.asarray(v, float), (self.dim,)) for v in (low, high))

    def support(self) -> tuple[Array, Array]:
        return self._low, self._high

    def sample(self, rng: np.random.Generator, n: int) -> Array:
        import torch

        with torch.random.fork_rng(devices=[]):  # torch.distributions take no generator: lend them a seeded one
            torch.manual_seed(int(rng.integers(2**63)))
            return np.clip(self.distribution.sample((n,)).numpy(), *inner(self._low, self._high))

    def sample_each(self, rngs: Sequence[np.random.Generator]) -> Array:
        return np.concatenate([self.sample(rng, 1) for rng in rngs])

    def inside(self, theta: Array) -> NDArray[np.bool_]:
        each = np.isfinite(theta) & (theta >= self._low) & (theta <= self._high)
        whole = self._constraint.check(_tensor(theta)).numpy()
        whole = whole.all(-1) if whole.ndim == np.ndim(theta) else whole
        return each & (whole | ~each.all(-1))[..., None]  # what no single parameter explains is laid to all

    def log_prob(self, theta: Array) -> Array:
        inside = self.inside(theta).all(-1)
        safe = self.constrain(np.zeros(self.dim))
        return np.where(inside, self.distribution.log_prob(_tensor(np.where(inside[..., None], theta, safe))).numpy(), -np.inf)

    def constrain(self, z: Array) -> Array:
        return np.clip(self._bijection(_tensor(z)).numpy(), *inner(self._low, self._high))

    def unconstrain(self, theta: Array) -> Array:
        return self._bijection.inv(_tensor(theta)).numpy()

    def log_abs_det_jacobian(self, z: Array) -> Array:
        value = _tensor(z)
        log_det = self._bijection.log_abs_det_jacobian(value, self._bijection(value)).numpy()
        return log_det.sum(-1) if log_det.ndim == np.ndim(z) else log_det

    def to_json(self) -> dict[str, Any]:
        return {"torch": self._description}


def _tensor(values: ArrayLike) -> Any:
    import torch

    return torch.tensor(np.asarray(values, float), dtype=torch.float64)


def _mixed(constraint: Any) -> Any:
    """The constraint itself, or that of the components where it is a mixture's."""
    return constraint.base_constraint if type(constraint).__name__ == "MixtureSameFamilyConstraint" else constraint


def _bounds(constraint: Any) -> tuple[Any, Any]:
    """Lower and upper bounds of a constraint, from the ones that it declares; infinite where it declares none."""
    from torch.distributions import constraints

    while isinstance(constraint, constraints.independent):
        constraint = constraint.base_constraint
    return getattr(constraint, "lower_bound", -math.inf), getattr(constraint, "upper_bound", math.inf)


_ALTERNATIVES = (("scale_tril", "covariance_matrix", "precision_matrix"), ("probs", "logits"))


def describe_torch(distribution: Any) -> dict[str, Any]:
    """A torch distribution as JSON: its class's name and its parameters, of each set of alternatives the first."""
    from torch import distributions

    cls, name = type(distribution), type(distribution).__name__
    if getattr(distributions, name, None) is not cls:
        raise PriorError(f"Prior.joint: {name} is not one of torch.distributions' own classes, so a bank could not record it")
    if isinstance(distribution, distributions.Independent):
        return {"law": name, "base": describe_torch(distribution.base_dist),
                "dims": distribution.reinterpreted_batch_ndims}
    if isinstance(distribution, distributions.MixtureSameFamily):
        return {"law": name, "mixture": describe_torch(distribution.mixture_distribution),
                "component": describe_torch(distribution.component_distribution)}
    taken = inspect.signature(cls.__init__).parameters
    required = [k for k, p in taken.items() if p.default is inspect.Parameter.empty and k != "self"]
    spare = {k for group in _ALTERNATIVES for k in group[1:] if group[0] in taken}
    given = [k for k in distribution.arg_constraints if k in taken and k not in spare]
    if not given or not set(required) <= set(given):
        raise PriorError(f"Prior.joint: the parameters of {name} cannot be written to a bank; use Independent, "
                         "MixtureSameFamily, or a law that is all in its parameters (Normal, LogNormal, Beta, ...)")
    values = {k: getattr(distribution, k).detach().cpu().double().numpy() for k in given}
    for k, v in values.items():
        if not np.isfinite(v).all():
            raise PriorError(f"Prior.joint: {k} of {name} holds NaN or infinity")
    return {"law": name, **{k: v.tolist() for k, v in values.items()}}


def rebuild_torch(description: Mapping[str, Any]) -> Any:
    """The torch distribution that a JSON description names: one of torch.distributions' own classes, and no other code."""
    import torch
    from torch import distributions

    name = description.get("law")
    cls = getattr(distributions, str(name), None)
    if not (isinstance(cls, type) and issubclass(cls, distributions.Distribution)):
        raise PriorError(f"{name!r} is not a torch distribution")
    if cls is distributions.Independent:
        return cls(rebuild_torch(description["base"]), int(description["dims"]))
    if cls is distributions.MixtureSameFamily:
        return cls(rebuild_torch(description["mixture"]), rebuild_torch(description["component"]))
    return cls(**{k: torch.tensor(v, dtype=torch.float64) for k, v in description.items() if k != "law"})
