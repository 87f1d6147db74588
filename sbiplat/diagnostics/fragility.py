r"""Fragility: how far the posterior moves under the worst perturbation of a size, beside noise of that size.

For each observation and eps, with delta the best of all attacks and xi noise of size eps (its direction at random),

.. math:: K(x) = \mathrm{KL}(q_x \| q_{x + \delta}), \qquad \kappa(x) = \mathbb{E}_\xi \, \mathrm{KL}(q_x \| q_{x + \xi}) .

To second order both are quadratic forms of one matrix A(x), the Fisher information of q in x: with F features
:math:`K = \tfrac12 F \epsilon^2 \lambda_{\max}(A)` and :math:`\kappa = \tfrac12 \epsilon^2 \mathrm{tr} A`. So :math:`K \le F \kappa`,
whatever the posterior, as long as it answers to x in proportion; for a linear-Gaussian one, N(Gx, S), at every eps, with
A = G' S^-1 G. What a net does beyond that, where its data never were, is the excess

.. math:: E(x) = \frac{K(x) + \tau}{F \kappa(x) + \tau}, \qquad \tau = 0.1 \text{ nat},

of which the geometric mean over observations is taken. Likewise a posterior that noise moves by kappa may be moved by at most
:math:`s = \sqrt{2 F \kappa}` of its standard deviations in proportion, and its central intervals then still hold the truth in a share of

.. math:: C_s(\alpha) = \Phi(c - s) - \Phi(-c - s), \qquad c = \Phi^{-1}\big(\tfrac{1 + \alpha}{2}\big) .
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import stats
from torch import Tensor

from sbiplat.diagnostics import adversarial
from sbiplat.diagnostics.adversarial import AttackSettings, Draws, Objective, divergence
from sbiplat.diagnostics.examined import Examined, tensors
from sbiplat.diagnostics.targets import Target, target_of
from sbiplat.diagnostics.whitened import Ball, Data, Whitening
from sbiplat.errors import UserError
from sbiplat.observation import Fields
from sbiplat.posteriors.base import Posterior
from sbiplat.posteriors.convergence import judging

Array = NDArray[np.float64]
HARMLESS = 0.1  # nats: tau
NOMINAL = (0.5, 0.9)
NOISES, FEW_NOISES = 8, 3
TO_STEP, TO_CHOOSE, TO_SCORE, TO_COVER = 128, 64, 128, 200  # draws an observation
SLOW = 6  # where densities come from the solver of an ODE, so many times fewer
CHUNK, CHUNK_NUMBERS = 100, 2**22  # observations at a time, and their numbers
SEARCHED = 4  # one observation in so many is also searched where there are gradients
CHAINED = 4  # and has its intervals drawn where that takes chains


@dataclass(frozen=True)
class Fragility:
    """Figures at one eps of P observations. worst, noise: K and kappa, (P,). gradient, search: what each attack reached, (P,), NaN where
    it was not made. vanished: the share of steps without any gradient. attacked, noisy: whether intervals of the nominal levels hold the
    truth, (P, levels, D), NaN where the sampler refused x' or was not asked; asked: of how many it was. features: F of each observation.
    delta: (P, F)."""

    eps: float
    worst: Array
    noise: Array
    gradient: Array
    search: Array
    vanished: float
    attacked: Array
    noisy: Array
    asked: int
    features: NDArray[np.int64]
    delta: Array

    @property
    def log_excess(self) -> Array:
        """log E of each observation, (P,)."""
        return np.log((self.worst.clip(0) + HARMLESS) / (self.features * self.noise.clip(0) + HARMLESS))

    @property
    def ratio(self) -> float:
        """The geometric mean of K / kappa, each with tau."""
        return float(np.exp(np.mean(np.log((self.worst.clip(0) + HARMLESS) / (self.noise.clip(0) + HARMLESS)))))

    @property
    def masking(self) -> Array:
        """log of what the search reached over what the gradient did, both with tau, of the observations that both attacked."""
        both = np.isfinite(self.search) & np.isfinite(self.gradient)
        return np.log((self.search[both].clip(0) + HARMLESS) / (self.gradient[both].clip(0) + HARMLESS))

    def proportionate(self, alpha: float) -> float:
        """The mean of C_s(alpha)."""
        shift, c = np.sqrt(2 * self.features * self.noise.clip(0)), stats.norm.isf((1 - alpha) / 2)
        return float(np.mean(stats.norm.cdf(c - shift) - stats.norm.cdf(-c - shift)))


def fragility(examined: Examined, sizes: Sequence[float], settings: AttackSettings) -> tuple[list[Fragility], bool]:
    """The figures at each eps, and whether there were gradients. Raises NotImplementedError or a UserError where there is no density."""
    target = target_of(examined.posterior)
    whitening = Whitening.fit(examined.posterior.x, examined.training["x"], target.masks)
    count, parts = len(examined.truth), []
    chunk = max(1, min(CHUNK, CHUNK_NUMBERS // examined.posterior.x.size))
    with examined.progress.task("attack", count * len(sizes)) as advance:
        for k, first in enumerate(range(0, count, chunk)):
            some = slice(first, min(first + chunk, count))
            x = {name: v[some] for name, v in examined.pairs["x"].items()}
            seed = int(examined.stream(0xA77A, k).generate_state(1)[0] >> 1)
            attacked = Attacked.of(examined.posterior, target, whitening, x, settings, seed)
            parts.append([])
            for eps in sizes:
                parts[-1].append(attacked.figures(eps, examined.truth[some]))
                advance(some.stop - some.start)
    return [_joined(column) for column in zip(*parts, strict=True)], target.gradients


@dataclass(frozen=True)
class Attacked:
    """B observations under attack: draws of their posteriors, made once, and what an attack at one eps does to them."""

    posterior: Posterior
    target: Target
    whitening: Whitening
    fields: Fields
    x: Data
    draws: Draws
    settings: AttackSettings
    seed: int

    @classmethod
    def of(cls, posterior: Posterior, target: Target, whitening: Whitening, x: Fields, settings: AttackSettings, seed: int) -> Attacked:
        """Draw from the posteriors of x."""
        device = device_of(posterior)
        data = {k: v.to(device) for k, v in tensors(x).items()}
        with judging(posterior.sampler):  # chains of a clean x are judged where coverage is
            z = posterior.unconstrained_sample(x, TO_STEP + TO_CHOOSE + TO_SCORE, seed)
        draws = torch.as_tensor(z, dtype=torch.float32, device=device)
        made = cls(posterior, target, whitening, x, data, Draws(draws, draws[..., 0]), settings, seed)
        used = torch.cat([torch.arange(part.start, part.stop) for part in made.shares[0 if made.has_density else 1:]])
        log_q = torch.zeros_like(draws[..., 0])
        log_q[:, used] = made.log_prob(draws[:, used], data).to(log_q.dtype)
        return replace(made, draws=Draws(draws, log_q))

    @property
    def has_density(self) -> bool:
        """Whether the target itself has one, by which attacks step."""
        return "forward" in self.target.objectives

    @property
    def shares(self) -> tuple[slice, slice, slice]:
        """Of the draws: to step by, to choose by, to score by. None serves twice, so that no score is chosen for its luck."""
        few = 1 if self.has_density else SLOW
        return (slice(0, TO_STEP), slice(TO_STEP, TO_STEP + TO_CHOOSE // few),
                slice(TO_STEP + TO_CHOOSE, TO_STEP + TO_CHOOSE + TO_SCORE // few))

    @torch.no_grad()
    def log_prob(self, z: Tensor, x: Data) -> Tensor:
        """log q(z | x) up to what depends on x alone, by the target or else by the sampler."""
        if self.has_density:
            return self.target.log_prob(z, self.target.condition(x))
        found = self.posterior.unconstrained_log_prob(z.double().cpu().numpy(), arrays(x))
        return torch.as_tensor(found, dtype=z.dtype, device=z.device)

    @torch.no_grad()
    def kl(self, ball: Ball, delta: Tensor, share: slice) -> Tensor:
        """KL(q_x || q_x') of perturbations (R, B, F), (R, B)."""
        z, log_q = self.draws.z[:, share], self.draws.log_q[:, share]
        return torch.stack([divergence(log_q, self.log_prob(z, ball.moved(part)), self.target.normalised) for part in delta])

    def objective(self, ball: Ball, kind: str = "auto", *, aim: Draws | None = None, universal: bool = False) -> Objective:
        """What an attack maximises, by the draws to step by, or by those of its aim."""
        step = self.shares[0]
        draws = Draws(self.draws.z[:, step], self.draws.log_q[:, step]) if aim is None else aim
        return Objective(self.target, ball, draws, kind, self.seed, universal)

    def figures(self, eps: float, truth: Array) -> Fragility:
        """All figures at one eps; truth: (B, D) in R^D."""
        ball = Ball(self.whitening, self.x, eps, self.settings.norm)
        start = torch.Generator(ball.free.device).manual_seed(self.seed ^ 0x5A5A)
        noise = ball.random(NOISES if self.has_density else FEW_NOISES, start)
        _, choose, score = self.shares
        nan = np.full(len(truth), np.nan)
        gradient, search, vanished, found = nan, nan.copy(), 0.0, []
        if self.target.gradients:
            delta, zero = adversarial.pgd(self.objective(ball, self.settings.objective), self.settings, start)
            found.append(self.best(ball, delta, choose))
            gradient, vanished = self.kl(ball, found[0][None], score)[0].double().cpu().numpy(), float(zero.mean())
        few = self.few(SEARCHED) if self.target.gradients else self
        own = Ball(self.whitening, few.x, eps, self.settings.norm)
        delta = adversarial.search(few.objective(own, self.settings.objective), replace(self.settings, restarts=1), start)
        search[:len(few.draws.z)] = few.kl(own, delta, score)[0].double().cpu().numpy()
        found.append(torch.cat([delta[0], noise[0, len(few.draws.z):]]))
        worst = self.best(ball, torch.stack(found), choose)
        return Fragility(
            eps, self.kl(ball, worst[None], score)[0].double().cpu().numpy(), self.kl(ball, noise, score).mean(0).double().cpu().numpy(),
            gradient, search, vanished, self.covered(ball.moved(worst), truth), self.covered(ball.moved(noise[0]), truth), self.asked,
            ball.free.sum(1).cpu().numpy(), worst.double().cpu().numpy())

    def best(self, ball: Ball, delta: Tensor, share: slice) -> Tensor:
        """Of perturbations (R, B, F) the one with the largest KL for each observation, (B, F)."""
        best = self.kl(ball, delta, share).nan_to_num(-math.inf).argmax(0)
        return delta[best, torch.arange(delta.shape[1], device=delta.device)]

    def few(self, one_in: int) -> Attacked:
        """The same of the first observations alone."""
        part = slice(-(-len(self.draws.z) // one_in))
        return replace(self, fields={k: v[part] for k, v in self.fields.items()}, x={k: v[part] for k, v in self.x.items()},
                       draws=self.draws.rows(part))

    def covered(self, x: Data, truth: Array) -> Array:
        """Whether central intervals of q(. | x) hold the truth (B, D) for each nominal level, (B, levels, D); NaN where x is refused or
        not asked for."""
        out = np.full((len(truth), len(NOMINAL), truth.shape[1]), np.nan)
        out[:self.asked] = self._held({k: v[:self.asked] for k, v in x.items()}, truth[:self.asked])
        return out

    @property
    def asked(self) -> int:
        """Of how many observations intervals are drawn."""
        return len(self.draws.z) if self.target.normalised else -(-len(self.draws.z) // CHAINED)

    def _held(self, x: Data, truth: Array) -> Array:
        try:
            z = self.posterior.unconstrained_sample(arrays(x), TO_COVER, self.seed)
        except UserError:
            if len(truth) == 1:
                return np.full((1, len(NOMINAL), truth.shape[1]), np.nan)
            return np.concatenate([self._held({k: v[b:b + 1] for k, v in x.items()}, truth[b:b + 1]) for b in range(len(truth))])
        apart = np.abs(2 * (z < truth[:, None]).mean(1) - 1)
        return np.stack([(apart <= level).astype(float) for level in NOMINAL], axis=1)


def beside(whitening: Whitening, x: Fields, delta: Array, eps: float) -> Fields:
    """To look at: x (1, ...), x moved by delta (F,), and x with every feature that may be moved raised by eps; (3, ...) by name."""
    data = tensors(x)
    steps = torch.stack([torch.zeros(len(delta)), torch.as_tensor(delta), eps * whitening.free(data)[0]]).double()
    return arrays(whitening.move({k: v.expand(len(steps), *v.shape[1:]) for k, v in data.items()}, steps))


def arrays(x: Data) -> Fields:
    """x as numpy has it."""
    return {k: v.detach().cpu().numpy() for k, v in x.items()}


def device_of(posterior: Posterior) -> torch.device:
    """Where the posterior's nets are."""
    sampler = posterior.sampler
    return getattr(getattr(sampler, "members", [sampler])[0], "device", torch.device("cpu"))


def _joined(parts: list[Fragility]) -> Fragility:
    """One set of figures from those of chunks."""
    weights = np.array([len(p.worst) for p in parts])

    def stack(name: str) -> Array:
        return np.concatenate([getattr(p, name) for p in parts])

    return Fragility(parts[0].eps, stack("worst"), stack("noise"), stack("gradient"), stack("search"),
                     float(np.average([p.vanished for p in parts], weights=weights)), stack("attacked"), stack("noisy"),
                     sum(p.asked for p in parts), stack("features"), stack("delta"))
