r"""Priors: named parameters with a unit, a support, and a bijection between the support and R^D.

Every marginal is the push-forward of a standard normal through the inverse of its own distribution function,

.. math:: z = \Phi^{-1}\big(F(\theta)\big), \qquad \theta = F^{-1}\big(\Phi(z)\big), \qquad z \sim N(0, 1),

so one map samples the prior, sends the support to R^D and back, and gives the density

.. math:: \log p(\theta) = \log \varphi(z) - \log\left|\frac{d\theta}{dz}\right| .

In z the prior of independent parameters is N(0, I) whatever their laws: estimators see parameters that are already
standardised, a uniform prior's edges become Gaussian tails, and no draw can leave the support. Tails are computed from
the side on which they are small, so that neither tail loses digits; beyond |z| = 37, where a float has no smaller
probability, the map stands still. A dependent prior (`Prior.joint`) uses the bijection that torch registers for its
support, or the Cholesky factor where it is Gaussian.

Nothing here imports torch unless the prior itself is a torch distribution: ranks that only simulate stay light.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from typing import Any, ClassVar, Protocol

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import special

from sbiplat.errors import PriorError

Array = NDArray[np.float64]
_LOG_SQRT_2PI = 0.5 * math.log(2 * math.pi)
_FARTHEST = 37.0  # Phi(-37) = 6e-300


def standard_normal_log_prob(z: Array) -> Array:
    """log N(z; 0, 1), elementwise."""
    return -0.5 * np.square(z) - _LOG_SQRT_2PI


def _normal_quantile(lower: Array, upper: Array) -> Array:
    """z with Phi(z) = lower and 1 - Phi(z) = upper, read from the smaller of the two."""
    z = np.where(lower < upper, special.ndtri(lower), -special.ndtri(upper))
    return np.clip(z, -_FARTHEST, _FARTHEST)


def _inner(low: ArrayLike, high: ArrayLike) -> tuple[Array, Array]:
    """The least and greatest finite floats strictly between two bounds."""
    return np.nextafter(low, np.inf), np.nextafter(high, -np.inf)


# --------------------------------------------------------------------------------------------------- marginals


@dataclass(frozen=True)
class Marginal:
    """One parameter's law. A subclass gives its support, its log-density, and the two halves of the normal map.

    `closed` says whether the finite ends of the support belong to it. Draws lie strictly between the ends in any case.
    """

    registry: ClassVar[dict[str, type[Marginal]]] = {}
    closed: ClassVar[bool] = True

    def __init_subclass__(cls) -> None:
        Marginal.registry[cls.__name__] = cls

    def __post_init__(self) -> None:
        for item in fields(self):
            if item.name != "unit":
                value = getattr(self, item.name)
                if isinstance(value, bool) or not isinstance(value, int | float | np.number):
                    raise PriorError(f"{type(self).__name__}: {item.name} must be a number, got {value!r}")
                if math.isnan(value):
                    raise PriorError(f"{type(self).__name__}: {item.name} is NaN")
                object.__setattr__(self, item.name, float(value))
        if not isinstance(self.unit, str):
            raise PriorError(f"{type(self).__name__}: unit must be text, got {self.unit!r}")
        self._check()

    def _check(self) -> None: ...

    def _need(self, holds: bool, what: str) -> None:
        if not holds:
            values = ", ".join(f"{f.name}={getattr(self, f.name):g}" for f in fields(self) if f.name != "unit")
            raise PriorError(f"{type(self).__name__}({values}): {what}")

    @property
    def support(self) -> tuple[float, float]:
        return (-math.inf, math.inf)

    def contains(self, theta: Array) -> NDArray[np.bool_]:
        """Whether theta is finite and in the support, elementwise."""
        theta, (low, high) = np.asarray(theta, float), self.support
        within = (theta >= low) & (theta <= high) if self.closed else (theta > low) & (theta < high)
        return within & np.isfinite(theta)

    def log_prob(self, theta: Array) -> Array:
        """log p(theta), elementwise; -inf outside the support."""
        theta = np.asarray(theta, float)
        inside = self.contains(theta)
        with np.errstate(all="ignore"):
            return np.where(inside, self._log_density(np.where(inside, theta, self.from_normal(np.zeros(())))), -np.inf)

    def from_normal(self, z: Array) -> Array:
        """theta(z), elementwise: finite, and strictly between the ends of the support."""
        with np.errstate(all="ignore"):
            return np.clip(self._quantile(np.asarray(z, float)), *_inner(*self.support))

    def to_normal(self, theta: Array) -> Array:
        """z(theta), elementwise, for theta in the support."""
        raise NotImplementedError

    def _log_density(self, theta: Array) -> Array:
        raise NotImplementedError

    def _quantile(self, z: Array) -> Array:
        """F^-1(Phi(z)), up to rounding at the ends."""
        raise NotImplementedError


@dataclass(frozen=True)
class Uniform(Marginal):
    """Uniform on [low, high]."""

    low: float
    high: float
    unit: str = ""

    def _check(self) -> None:
        self._need(self.low < self.high and math.isfinite(self.high - self.low), "low must be below high, both finite")

    @property
    def support(self) -> tuple[float, float]:
        return (self.low, self.high)

    def _log_density(self, theta: Array) -> Array:
        return np.full_like(theta, -math.log(self.high - self.low))

    def to_normal(self, theta: Array) -> Array:
        width = self.high - self.low
        return _normal_quantile((theta - self.low) / width, (self.high - theta) / width)

    def _quantile(self, z: Array) -> Array:
        width = self.high - self.low
        return np.where(z < 0, self.low + width * special.ndtr(z), self.high - width * special.ndtr(-z))


@dataclass(frozen=True)
class LogUniform(Marginal):
    """log theta is uniform on [log low, log high]; 0 < low < high."""

    low: float
    high: float
    unit: str = ""

    def _check(self) -> None:
        self._need(0 < self.low < self.high < math.inf, "needs 0 < low < high, both finite")

    @property
    def support(self) -> tuple[float, float]:
        return (self.low, self.high)

    @property
    def _of_log(self) -> Uniform:
        return Uniform(math.log(self.low), math.log(self.high))

    def _log_density(self, theta: Array) -> Array:
        return -np.log(theta) - math.log(math.log(self.high) - math.log(self.low))

    def to_normal(self, theta: Array) -> Array:
        return self._of_log.to_normal(np.log(theta))

    def _quantile(self, z: Array) -> Array:
        return np.exp(self._of_log.from_normal(z))


@dataclass(frozen=True)
class Normal(Marginal):
    """N(loc, scale^2)."""

    loc: float
    scale: float
    unit: str = ""

    def _check(self) -> None:
        self._need(math.isfinite(self.loc) and 0 < self.scale < math.inf, "loc must be finite and scale positive")

    def _log_density(self, theta: Array) -> Array:
        return standard_normal_log_prob(self.to_normal(theta)) - math.log(self.scale)

    def to_normal(self, theta: Array) -> Array:
        return (theta - self.loc) / self.scale

    def _quantile(self, z: Array) -> Array:
        return self.loc + self.scale * z


@dataclass(frozen=True)
class TruncatedNormal(Marginal):
    """N(loc, scale^2) restricted to [low, high] (either may be infinite) and renormalised."""

    loc: float
    scale: float
    low: float = -math.inf
    high: float = math.inf
    unit: str = ""

    def _check(self) -> None:
        self._need(math.isfinite(self.loc) and 0 < self.scale < math.inf, "loc must be finite and scale positive")
        self._need(self.low < self.high, "low must be below high")
        self._need(math.isfinite(self._log_mass()), "no probability that a float can hold lies between low and high")

    @property
    def support(self) -> tuple[float, float]:
        return (self.low, self.high)

    def _standard(self) -> tuple[float, Array, Array]:
        """(sign, a, b): sign (theta - loc) / scale lies in [a, b], mirrored so that its mass lies in the lower tail."""
        a, b = np.array([self.low - self.loc, self.high - self.loc]) / self.scale
        return (-1.0, -b, -a) if a > -b else (1.0, a, b)

    def _log_mass(self) -> float:
        _, a, b = self._standard()
        with np.errstate(all="ignore"):
            return float(_log_between(a, b))

    def _log_density(self, theta: Array) -> Array:
        return standard_normal_log_prob((theta - self.loc) / self.scale) - math.log(self.scale) - self._log_mass()

    def to_normal(self, theta: Array) -> Array:
        sign, a, b = self._standard()
        t = np.clip(sign * (theta - self.loc) / self.scale, a, b)
        below, above = _log_between(a, t) - self._log_mass(), _log_between(t, b) - self._log_mass()
        z = np.where(below < above, special.ndtri_exp(np.minimum(below, 0)), -special.ndtri_exp(np.minimum(above, 0)))
        return sign * np.clip(z, -_FARTHEST, _FARTHEST)

    def _quantile(self, z: Array) -> Array:
        sign, a, b = self._standard()
        z = sign * np.clip(z, -_FARTHEST, _FARTHEST)
        below, above = special.log_ndtr(z) + self._log_mass(), special.log_ndtr(-z) + self._log_mass()
        log_cdf = np.where(z < 0, np.logaddexp(special.log_ndtr(a), below),
                           special.log_ndtr(b) + np.log1p(-np.exp(above - special.log_ndtr(b))))
        return self.loc + sign * self.scale * special.ndtri_exp(np.minimum(log_cdf, 0))


def _log_between(a: Array, b: Array) -> Array:
    """log(Phi(b) - Phi(a)) for a <= b, with its digits kept in the lower tail."""
    return special.log_ndtr(b) + np.log(-np.expm1(special.log_ndtr(a) - special.log_ndtr(b)))


@dataclass(frozen=True)
class LogNormal(Marginal):
    """log theta ~ N(loc, scale^2): loc and scale are of the logarithm."""

    loc: float
    scale: float
    unit: str = ""
    closed: ClassVar[bool] = False

    def _check(self) -> None:
        self._need(math.isfinite(self.loc) and 0 < self.scale < math.inf, "loc must be finite and scale positive")

    @property
    def support(self) -> tuple[float, float]:
        return (0.0, math.inf)

    def _log_density(self, theta: Array) -> Array:
        log_theta = np.log(theta)
        return standard_normal_log_prob((log_theta - self.loc) / self.scale) - log_theta - math.log(self.scale)

    def to_normal(self, theta: Array) -> Array:
        return (np.log(theta) - self.loc) / self.scale

    def _quantile(self, z: Array) -> Array:
        return np.exp(self.loc + self.scale * z)


@dataclass(frozen=True)
class HalfNormal(Marginal):
    """|N(0, scale^2)|."""

    scale: float
    unit: str = ""

    def _check(self) -> None:
        self._need(0 < self.scale < math.inf, "scale must be positive")

    @property
    def support(self) -> tuple[float, float]:
        return (0.0, math.inf)

    def _log_density(self, theta: Array) -> Array:
        return math.log(2 / self.scale) + standard_normal_log_prob(theta / self.scale)

    def to_normal(self, theta: Array) -> Array:
        t = theta / self.scale
        return _normal_quantile(special.erf(t / math.sqrt(2)), 2 * special.ndtr(-t))

    def _quantile(self, z: Array) -> Array:
        z = np.clip(z, -_FARTHEST, _FARTHEST)
        small = math.sqrt(2) * special.erfinv(special.ndtr(np.minimum(z, 0)))
        return self.scale * np.where(z < 0, small, -special.ndtri(special.ndtr(-z) / 2))


@dataclass(frozen=True)
class Beta(Marginal):
    """Beta(a, b) on (0, 1)."""

    a: float
    b: float
    unit: str = ""
    closed: ClassVar[bool] = False

    def _check(self) -> None:
        self._need(0 < self.a < math.inf and 0 < self.b < math.inf, "a and b must be positive")

    @property
    def support(self) -> tuple[float, float]:
        return (0.0, 1.0)

    def _log_density(self, theta: Array) -> Array:
        return (special.xlogy(self.a - 1, theta) + special.xlog1py(self.b - 1, -theta)
                - special.betaln(self.a, self.b))

    def to_normal(self, theta: Array) -> Array:
        return _normal_quantile(special.betainc(self.a, self.b, theta), special.betaincc(self.a, self.b, theta))

    def _quantile(self, z: Array) -> Array:
        return np.where(z < 0, special.betaincinv(self.a, self.b, special.ndtr(z)),
                        special.betainccinv(self.a, self.b, special.ndtr(-z)))


@dataclass(frozen=True)
class Gamma(Marginal):
    """Gamma of the given shape and rate: mean shape / rate."""

    shape: float
    rate: float
    unit: str = ""
    closed: ClassVar[bool] = False

    def _check(self) -> None:
        self._need(0 < self.shape < math.inf and 0 < self.rate < math.inf, "shape and rate must be positive")

    @property
    def support(self) -> tuple[float, float]:
        return (0.0, math.inf)

    def _log_density(self, theta: Array) -> Array:
        return (self.shape * math.log(self.rate) - special.gammaln(self.shape)
                + special.xlogy(self.shape - 1, theta) - self.rate * theta)

    def to_normal(self, theta: Array) -> Array:
        t = theta * self.rate
        return _normal_quantile(special.gammainc(self.shape, t), special.gammaincc(self.shape, t))

    def _quantile(self, z: Array) -> Array:
        z = np.clip(z, -_FARTHEST, _FARTHEST)
        return np.where(z < 0, special.gammaincinv(self.shape, special.ndtr(z)),
                        special.gammainccinv(self.shape, special.ndtr(-z))) / self.rate


# ------------------------------------------------------------------------------------- laws of the whole vector


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
        self._take(_describe_torch(distribution))

    @classmethod
    def from_json(cls, description: Mapping[str, Any]) -> TorchLaw:
        self = object.__new__(cls)
        self._take(dict(description))
        return self

    def _take(self, description: dict[str, Any]) -> None:
        import torch
        from torch.distributions import biject_to

        self._description, self.distribution = description, _rebuild_torch(description)
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
            return np.clip(self.distribution.sample((n,)).numpy(), *_inner(self._low, self._high))

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
        return np.clip(self._bijection(_tensor(z)).numpy(), *_inner(self._low, self._high))

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


def _describe_torch(distribution: Any) -> dict[str, Any]:
    """A torch distribution as JSON: its class's name and its parameters, of each set of alternatives the first."""
    from torch import distributions

    cls, name = type(distribution), type(distribution).__name__
    if getattr(distributions, name, None) is not cls:
        raise PriorError(f"Prior.joint: {name} is not one of torch.distributions' own classes, so a bank could not record it")
    if isinstance(distribution, distributions.Independent):
        return {"law": name, "base": _describe_torch(distribution.base_dist),
                "dims": distribution.reinterpreted_batch_ndims}
    if isinstance(distribution, distributions.MixtureSameFamily):
        return {"law": name, "mixture": _describe_torch(distribution.mixture_distribution),
                "component": _describe_torch(distribution.component_distribution)}
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


def _rebuild_torch(description: Mapping[str, Any]) -> Any:
    import torch
    from torch import distributions

    name = description.get("law")
    cls = getattr(distributions, str(name), None)
    if not (isinstance(cls, type) and issubclass(cls, distributions.Distribution)):
        raise PriorError(f"{name!r} is not a torch distribution")
    if cls is distributions.Independent:
        return cls(_rebuild_torch(description["base"]), int(description["dims"]))
    if cls is distributions.MixtureSameFamily:
        return cls(_rebuild_torch(description["mixture"]), _rebuild_torch(description["component"]))
    return cls(**{k: torch.tensor(v, dtype=torch.float64) for k, v in description.items() if k != "law"})


# ------------------------------------------------------------------------------------------------------- prior


@dataclass(frozen=True, repr=False)
class Prior:
    """Named parameters and their joint law.

    `Prior({"rate": Uniform(0.1, 1, unit="1/yr"), ...})`, or the same as a list of pairs; for dependent parameters
    `Prior.joint(names, distribution)`. Arrays are float64 numpy with the parameters last, in the order of the names:
    theta (..., D) in the user's space, z (..., D) in R^D.
    """

    names: tuple[str, ...] = field(init=False)
    units: tuple[str, ...] = field(init=False)
    law: Law = field(init=False)

    def __init__(self, marginals: Mapping[str, Marginal] | Iterable[tuple[str, Marginal]]) -> None:
        try:
            pairs = [(n, m) for n, m in (marginals.items() if isinstance(marginals, Mapping) else marginals)]
        except (TypeError, ValueError):
            raise PriorError(f"Prior takes a dict of name -> law, or a list of such pairs, got {marginals!r}; "
                             'write Prior({"rate": Uniform(0, 1)})') from None
        for name, marginal in pairs:
            if not isinstance(marginal, Marginal):
                raise PriorError(f"prior of {name!r}: expected one of {', '.join(Marginal.registry)}, got {marginal!r}")
        self._build([n for n, _ in pairs], [m.unit for _, m in pairs], Independent([m for _, m in pairs]))

    @classmethod
    def joint(cls, names: Sequence[str], distribution: Any, units: Sequence[str] | None = None) -> Prior:
        """Dependent parameters: any torch distribution over vectors, or `sp.MultivariateNormal`."""
        for what, value in (("names", names), ("units", () if units is None else units)):
            if isinstance(value, str) or not isinstance(value, Iterable):
                raise PriorError(f"Prior.joint: {what} must be a list of texts, one a parameter, got {value!r}")
        names = list(names)
        law = distribution if isinstance(distribution, MultivariateNormal) else TorchLaw(distribution)
        if isinstance(law, TorchLaw) and type(law.distribution).__name__ == "MultivariateNormal":
            dist = law.distribution  # Gaussian: no torch needed at simulation time
            law = MultivariateNormal(*(v.detach().cpu().double().numpy() for v in (dist.loc, dist.covariance_matrix)))
        self = object.__new__(cls)
        self._build(names, list(units) if units is not None else [""] * len(names), law)
        return self

    def _build(self, names: list[str], units: list[str], law: Law) -> None:
        if not names:
            raise PriorError("a prior needs at least one parameter")
        for name in names:
            if not isinstance(name, str) or not name or any(c in name for c in ",\n\"'/") or name != name.strip():
                raise PriorError(f"parameter name {name!r}: use plain text without commas, quotes, slashes or line breaks")
            if names.count(name) > 1:
                raise PriorError(f"parameter {name!r} is given twice in the prior: rename one")
        if len(names) != law.dim:
            raise PriorError(f"{len(names)} names ({', '.join(names)}) for a distribution of dimension {law.dim}")
        if len(units) != len(names):
            raise PriorError(f"{len(units)} units for {len(names)} parameters")
        for name, unit in zip(names, units, strict=True):
            if not isinstance(unit, str):
                raise PriorError(f"the unit of {name!r} must be text, got {unit!r}")
        for key, value in (("names", tuple(names)), ("units", tuple(units)), ("law", law)):
            object.__setattr__(self, key, value)

    @property
    def dim(self) -> int:
        """D, the number of parameters."""
        return len(self.names)

    @property
    def gaussianised(self) -> bool:
        """Whether the prior of z is exactly N(0, I)."""
        return self.law.gaussianised

    @property
    def support(self) -> tuple[Array, Array]:
        """The lower and upper bounds of theta, each (D,)."""
        return self.law.support()

    def sample(self, rng: np.random.Generator, n: int | None = None) -> Array:
        """Draws of theta: (D,) where n is None, else (n, D)."""
        return self.law.sample(rng, 1)[0] if n is None else self.law.sample(rng, n)

    def sample_each(self, rngs: Sequence[np.random.Generator]) -> Array:
        """One draw from each generator: (len(rngs), D)."""
        return self.law.sample_each(rngs)

    def log_prob(self, theta: ArrayLike) -> Array:
        """log p(theta), (...,); -inf outside the support."""
        return self.law.log_prob(self._vectors(theta))

    def unconstrain(self, theta: ArrayLike) -> Array:
        """theta (..., D) -> z (..., D) in R^D, large but finite at the edge of the support; raises PriorError outside it."""
        theta = self._vectors(theta)
        inside = self.law.inside(theta)
        if not inside.all():
            *_, k = where = tuple(np.argwhere(~inside)[0])
            low, high = self.support
            raise PriorError(f"{self.names[k]} = {theta[where]:g} lies outside the prior's support, {low[k]:g} to {high[k]:g}"
                             + (f" (row {', '.join(map(str, where[:-1]))})" if len(where) > 1 else ""))
        return np.clip(self.law.unconstrain(theta), -1e6, 1e6)

    def constrain(self, z: ArrayLike) -> Array:
        """z (..., D) in R^D -> theta (..., D) in the support."""
        return self.law.constrain(self._vectors(z))

    def log_abs_det_jacobian(self, z: ArrayLike) -> Array:
        """log |d theta / d z| at z, (...,)."""
        return self.law.log_abs_det_jacobian(self._vectors(z))

    def unconstrained_log_prob(self, z: ArrayLike) -> Array:
        """The prior's log-density over z: log p(theta(z)) + log |d theta / d z|, (...,)."""
        z = self._vectors(z)
        if self.gaussianised:
            return standard_normal_log_prob(z).sum(-1)
        return self.law.log_prob(self.law.constrain(z)) + self.law.log_abs_det_jacobian(z)

    def contains(self, theta: ArrayLike) -> NDArray[np.bool_]:
        """Whether each theta lies in the support, (...,)."""
        return self.law.inside(self._vectors(theta)).all(-1)

    def _vectors(self, values: ArrayLike) -> Array:
        values = np.asarray(values, float)
        if values.ndim == 0 or values.shape[-1] != self.dim:
            raise PriorError(f"expected {self.dim} parameters ({', '.join(self.names)}) on the last axis, "
                             f"got an array of shape {values.shape}")
        return values

    def to_json(self) -> dict[str, Any]:
        """A description from which `from_json` makes the same prior; plain JSON, no code."""
        return {"names": list(self.names), "units": list(self.units), **_finite(self.law.to_json())}

    @classmethod
    def from_json(cls, description: Mapping[str, Any]) -> Prior:
        try:
            names, units = list(description["names"]), list(description["units"])
            if "independent" in description:
                law: Law = Independent([_marginal(m) for m in description["independent"]])
            elif "multivariate_normal" in description:
                law = MultivariateNormal(**description["multivariate_normal"])
            elif "torch" in description:
                law = TorchLaw.from_json(description["torch"])
            else:
                raise PriorError("a prior's description has none of 'independent', 'multivariate_normal', 'torch'")
            self = object.__new__(cls)
            self._build(names, units, law)
        except (KeyError, TypeError, ValueError, AttributeError, OverflowError, RuntimeError, NotImplementedError) as error:
            raise PriorError(f"not a prior's description: {str(error).splitlines()[0] if str(error) else error!r}") from None
        return self

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Prior) and self.to_json() == other.to_json()

    def __hash__(self) -> int:
        return hash((self.names, self.units))

    def __repr__(self) -> str:
        return f"Prior({', '.join(self.names)})"


def _marginal(description: Mapping[str, Any]) -> Marginal:
    settings = dict(description)
    law = settings.pop("law", None)
    if law not in Marginal.registry:
        raise PriorError(f"unknown law {law!r}; known: {', '.join(Marginal.registry)}")
    for key in ("low", "high"):  # JSON has no infinity: an absent bound is written as null
        if key in settings and settings[key] is None:
            settings[key] = -math.inf if key == "low" else math.inf
    return Marginal.registry[law](**settings)


def _finite(value: Any) -> Any:
    """The same structure with infinities as null, since JSON has none."""
    if isinstance(value, dict):
        return {k: _finite(v) for k, v in value.items()}
    if isinstance(value, list):
        return [_finite(v) for v in value]
    return None if isinstance(value, float) and math.isinf(value) else value
