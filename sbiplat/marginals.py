r"""Marginals: the laws of one parameter, each the push-forward of a standard normal through its inverse distribution function.

.. math:: z = \Phi^{-1}\big(F(\theta)\big), \qquad \theta = F^{-1}\big(\Phi(z)\big), \qquad z \sim N(0, 1).

Tails are computed from the side on which they are small, so that neither tail loses digits; beyond |z| = 37, where a float
has no smaller probability, the map stands still.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from typing import ClassVar

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


def inner(low: ArrayLike, high: ArrayLike) -> tuple[Array, Array]:
    """The least and greatest finite floats strictly between two bounds."""
    return np.nextafter(low, np.inf), np.nextafter(high, -np.inf)


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
            return np.clip(self._quantile(np.asarray(z, float)), *inner(*self.support))

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
        tail = (self.high - self.low) * special.ndtr(-np.abs(z))
        return np.where(z < 0, self.low + tail, self.high - tail)


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
