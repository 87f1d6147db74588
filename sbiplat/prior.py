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

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from sbiplat.errors import PriorError
from sbiplat.laws import Independent, Law, MultivariateNormal, TorchLaw
from sbiplat.marginals import (
    Array,
    Beta,
    Gamma,
    HalfNormal,
    LogNormal,
    LogUniform,
    Marginal,
    Normal,
    TruncatedNormal,
    Uniform,
    standard_normal_log_prob,
)

__all__ = [
    "Beta", "Gamma", "HalfNormal", "LogNormal", "LogUniform", "Marginal", "MultivariateNormal", "Normal", "Prior", "TruncatedNormal",
    "Uniform",
]


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
