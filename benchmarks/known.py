r"""Problems whose posterior is known, and posteriors of them that are wrong in a known way: what the gate is held against.

Gaussian: z ~ N(0, I), x = A z + s e, so that the posterior is N(G x, S) with S = (I + A' A / s^2)^-1 and G = S A' / s^2, its parameters
correlated. Mixture: z ~ N(0, I_2), x = (|z_1|, z_2) + s e: two modes, of which x cannot tell. Uniform: theta ~ U(-1, 1)^2,
x = theta + s e: a truncated Gaussian. Tests and `gate_power.py` share them.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import special

import sbiplat as sp
from sbiplat.diagnostics.examined import Examined
from sbiplat.observation import ObservationSpec
from sbiplat.posteriors.base import Posterior

Array = NDArray[np.float64]
LOG_SQRT_2PI = 0.5 * np.log(2 * np.pi)


@dataclass(frozen=True)
class Defect:
    """sd: factor on the standard deviations. shift: of all parameters, in their sds. independent: correlations dropped, marginals kept.
    cut: draws beyond so many sds are cut off (0: none). prior: the prior in place of the posterior. tenth: where x_1 is among its largest
    tenth, "narrow": half the sd; "moved": shifted by 1 sd, up or down by the sign of x_2. lost: the mode z_1 < 0 is missing."""

    sd: float = 1.0
    shift: float = 0.0
    independent: bool = False
    cut: float = 0.0
    prior: bool = False
    tenth: str = ""
    lost: bool = False


@dataclass(frozen=True)
class Gaussian:
    """The linear-Gaussian problem with matrix A (D, D) and noise s, or a defect of its posterior; a Sampler over z."""

    matrix: Any
    noise: float = 0.5
    defect: Defect = Defect()

    @property
    def dim(self) -> int:
        return len(self.matrix)

    @property
    def prior(self) -> sp.Prior:
        return sp.Prior({f"p{k}": sp.Normal(0.0, 1.0) for k in range(self.dim)})

    def simulate(self, rng: np.random.Generator, n: int) -> tuple[Array, Array]:
        """z and x, (n, D) each."""
        z = rng.standard_normal((n, self.dim))
        return z, z @ np.asarray(self.matrix).T + self.noise * rng.standard_normal(z.shape)

    def broken(self, defect: Defect) -> Gaussian:
        return replace(self, defect=defect)

    def law(self, x: Array) -> tuple[Array, Array, Array]:
        """Means (B, D), Cholesky factor (D, D), and factors on the sd (B,)."""
        a, d = np.asarray(self.matrix), self.defect
        if d.prior:
            return np.zeros_like(x), np.eye(self.dim), np.ones(len(x))
        covariance = np.linalg.inv(np.eye(self.dim) + a.T @ a / self.noise**2)
        mean = x @ (covariance @ a.T / self.noise**2).T
        sd = np.sqrt(np.diag(covariance))
        mean = mean + d.shift * sd
        factor = np.full(len(x), d.sd)
        there = x[:, 0] > special.ndtri(0.9) * np.sqrt(np.square(a[0]).sum() + self.noise**2)
        if d.tenth == "narrow":
            factor = np.where(there, 0.5, factor)
        elif d.tenth == "moved":
            mean = mean + (there * np.where(x[:, 1] > 0, 1.0, -1.0))[:, None] * sd
        return mean, np.diag(sd) if d.independent else np.linalg.cholesky(covariance), factor

    def sample(self, x: dict[str, Array], n: int, seed: int) -> Array:
        mean, root, factor = self.law(np.asarray(x["x"], float))
        rng = np.random.default_rng(seed)
        e = rng.standard_normal((len(mean), n, self.dim))
        if self.defect.cut:
            while (far := np.abs(e) > self.defect.cut).any():
                e[far] = rng.standard_normal(int(far.sum()))
        return mean[:, None] + factor[:, None, None] * (e @ root.T)

    def log_prob(self, z: Array, x: dict[str, Array]) -> Array:
        mean, root, factor = self.law(np.asarray(x["x"], float))
        e = (np.asarray(z, float) - mean[:, None]) @ np.linalg.inv(root).T / factor[:, None, None]
        log_q = -0.5 * np.square(e).sum(-1) - self.dim * (LOG_SQRT_2PI + np.log(factor)[:, None]) - np.log(np.diag(root)).sum()
        if self.defect.cut:
            inside = (np.abs(e) <= self.defect.cut).all(-1)
            log_q = np.where(inside, log_q - self.dim * np.log(special.erf(self.defect.cut / np.sqrt(2))), -np.inf)
        return log_q


@dataclass(frozen=True)
class Mixture:
    """x = (|z_1|, z_2) + s e: the posterior has two modes of equal weight."""

    noise: float = 0.3
    defect: Defect = Defect()
    dim = 2
    prior = sp.Prior({"p0": sp.Normal(0.0, 1.0), "p1": sp.Normal(0.0, 1.0)})

    def simulate(self, rng: np.random.Generator, n: int) -> tuple[Array, Array]:
        z = rng.standard_normal((n, 2))
        return z, np.stack([np.abs(z[:, 0]), z[:, 1]], axis=1) + self.noise * rng.standard_normal(z.shape)

    def broken(self, defect: Defect) -> Mixture:
        return replace(self, defect=defect)

    def _law(self, x: dict[str, Array]) -> tuple[Array, float]:
        shrink = 1 / (1 + self.noise**2)
        return shrink * np.asarray(x["x"], float), self.noise * np.sqrt(shrink)

    def sample(self, x: dict[str, Array], n: int, seed: int) -> Array:
        mean, sd = self._law(x)
        rng = np.random.default_rng(seed)
        u, e = rng.uniform(size=(2, len(mean), n))
        magnitude = mean[:, :1] - sd * special.ndtri(u * special.ndtr(mean[:, :1] / sd))  # the normal, cut at 0
        sign = 1.0 if self.defect.lost else np.where(rng.uniform(size=u.shape) < 0.5, -1.0, 1.0)
        return np.stack([sign * magnitude, mean[:, 1:] + sd * special.ndtri(e)], axis=-1)

    def log_prob(self, z: Array, x: dict[str, Array]) -> Array:
        mean, sd = self._law(x)
        z = np.stack([np.abs(z[..., 0]), z[..., 1]], axis=-1).astype(float) if not self.defect.lost else np.asarray(z, float)
        log_q = (-0.5 * np.square((z - mean[:, None]) / sd) - np.log(sd) - LOG_SQRT_2PI).sum(-1) - special.log_ndtr(mean[:, :1] / sd)
        return np.where(z[..., 0] > 0, log_q, -np.inf) if self.defect.lost else log_q - np.log(2)


@dataclass(frozen=True)
class Bounded:
    """theta ~ U(-1, 1)^2, x = theta + s e; over z = Phi^-1((theta + 1) / 2)."""

    noise: float = 0.3
    defect: Defect = Defect()
    dim = 2
    prior = sp.Prior({"p0": sp.Uniform(-1.0, 1.0), "p1": sp.Uniform(-1.0, 1.0)})

    def simulate(self, rng: np.random.Generator, n: int) -> tuple[Array, Array]:
        theta = rng.uniform(-1, 1, (n, 2))
        return self.prior.unconstrain(theta), theta + self.noise * rng.standard_normal(theta.shape)

    def broken(self, defect: Defect) -> Bounded:
        return replace(self, defect=defect)

    def _ends(self, x: dict[str, Array]) -> tuple[Array, Array, Array]:
        x = np.asarray(x["x"], float)
        return x[:, None], special.ndtr((-1 - x) / self.noise)[:, None], special.ndtr((1 - x) / self.noise)[:, None]

    def sample(self, x: dict[str, Array], n: int, seed: int) -> Array:
        centre, low, high = self._ends(x)
        u = np.random.default_rng(seed).uniform(size=(len(centre), n, 2))
        if self.defect.prior:
            return special.ndtri(u)
        theta = centre + self.noise * special.ndtri(low + u * (high - low))
        return self.prior.unconstrain(np.clip(theta, -1, 1))

    def log_prob(self, z: Array, x: dict[str, Array]) -> Array:
        z = np.asarray(z, float)
        if self.defect.prior:
            return self.prior.unconstrained_log_prob(z)
        centre, low, high = self._ends(x)
        theta = self.prior.constrain(z)
        log_q = -0.5 * np.square((theta - centre) / self.noise) - np.log(self.noise) - LOG_SQRT_2PI - np.log(high - low)
        return log_q.sum(-1) + self.prior.log_abs_det_jacobian(z)


def _wide(dim: int) -> Array:
    """A, in which each parameter also shows in the next one's measurement: neighbours are correlated in the posterior."""
    return np.eye(dim) + 0.8 * np.roll(np.eye(dim), 1, axis=1)


PROBLEMS: dict[str, Any] = {
    "Gaussian, 2": Gaussian(((1.0, 0.8), (0.8, 1.0))), "Gaussian, 20": Gaussian(tuple(map(tuple, _wide(20)))),
    "mixture": Mixture(), "uniform": Bounded(), "Gaussian, 2, draws only": Gaussian(((1.0, 0.8), (0.8, 1.0))),
}
DRAWS_ONLY = ("Gaussian, 2, draws only",)
DEFECTS = {
    "exact": Defect(), "sd x 0.8": Defect(sd=0.8), "sd x 1.25": Defect(sd=1.25), "shift 0.3 sd": Defect(shift=0.3),
    "correlations dropped": Defect(independent=True), "one mode lost": Defect(lost=True), "tails cut at 2 sd": Defect(cut=2.0),
    "prior returned": Defect(prior=True), "sd halved for a tenth of x": Defect(tenth="narrow"),
    "moved by 1 sd for a tenth of x": Defect(tenth="moved"), "variance halved": Defect(sd=0.5**0.5),
}
_BOTH = ("Gaussian, 2", "Gaussian, 20")
CASES = [  # (problem, defect)
    *((problem, "exact") for problem in PROBLEMS),
    *(("Gaussian, 2, draws only", defect) for defect in ("sd x 0.8", "sd x 1.25", "correlations dropped", "tails cut at 2 sd",
                                                         "prior returned", "sd halved for a tenth of x")),
    *((problem, defect) for defect in ("sd x 0.8", "sd x 1.25", "shift 0.3 sd", "correlations dropped") for problem in _BOTH),
    ("mixture", "one mode lost"), *((problem, "tails cut at 2 sd") for problem in _BOTH),
    ("Gaussian, 2", "prior returned"), ("uniform", "prior returned"),
    *((problem, "sd halved for a tenth of x") for problem in _BOTH), ("Gaussian, 2", "moved by 1 sd for a tenth of x"),
    *((problem, "variance halved") for problem in _BOTH),
]


class WithoutDensity:
    """A sampler that has draws only."""

    def __init__(self, sampler: Any) -> None:
        self.sample = sampler.sample

    def log_prob(self, z: Array, x: dict[str, Array]) -> Array:
        raise NotImplementedError


def pairs(problem: Any, rng: np.random.Generator, n: int) -> dict[str, Any]:
    """So many rows of its bank."""
    z, x = problem.simulate(rng, n)
    return {"theta": z.astype(np.float32), "x": {"x": x.astype(np.float32)}}


def examined(problem: Any, defect: Defect, seed: int, n: int = 1000, density: bool = True, rows: int = 10_000) -> Examined:
    """A posterior with the defect, with n held-out pairs and other rows, all by the seed."""
    rng = np.random.default_rng([seed, 1])
    sampler = problem.broken(defect)
    posterior = Posterior(problem.prior, ObservationSpec.declare((problem.dim,)), sampler if density else WithoutDensity(sampler))
    return Examined(posterior, pairs(problem, rng, n), pairs(problem, rng, rows), seed)
