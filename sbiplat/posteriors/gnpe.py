r"""The posterior behind GNPE: parallel Gibbs chains over (theta, proxy), and the density that a step of them has.

.. math:: \hat g_0 \sim K(\cdot | p_0), \; p_0 \sim q_{\text{initial}}(p | x); \qquad
          \theta_t \sim q(\theta | x, \hat g_{t-1}), \quad \hat g_t \sim K(\cdot | p(\theta_t)) .

Every draw is the end of a chain of its own. Of the pose, measured over an observation's chains in coordinates from their centre: the
lag-1 correlation :math:`\rho`, how far the start was off in standard deviations, d, and how far the mean and log sd have moved within the
last half-life :math:`h = \ln 2 / \ln(1 / \rho)`. The chains have converged when :math:`d \rho^t \le 0.05` and that last motion is no more
than 0.05 beside its sampling error. For a Gaussian pose of sd s the theory says :math:`\rho = s^2 / (s^2 + \kappa^2)`; both are told.

The density is recovered from converged proxies: since a proxy is a blurred pose, theirs is a mixture of kernels,

.. math:: \hat q(\hat g | x) = \frac1N \sum_i K(\hat g | p(\theta_i)), \qquad
          \log q(\theta, \hat g | x) = \log \hat q(\hat g | x) + \log q(\theta | x, \hat g)

exactly, for draws that take one step from it. The marginal is the mean of :math:`q(\theta, \hat g | x) / K(\hat g | p(\theta))` over
proxies from :math:`K(\cdot | p(\theta))`, whose variance vanishes as the net becomes exact; it is an unbiased estimate with fixed random
numbers.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sbiplat.estimators.equivariant import Equivariant
from sbiplat.observation import Fields
from sbiplat.posteriors.chains import MOST_UNCONVERGED, ChainError
from sbiplat.posteriors.passes import ROWS_PER_PASS, Contexts, stream
from sbiplat.symmetry.frame import centred

LEAST_CHAINS = 128  # an observation: convergence is measured over them
NEAR = 0.05  # standard deviations
ERRORS = 3.0  # standard errors
CENTRES = 512  # of the mixture of kernels
PROXIES = 8  # for the marginal density of a theta
TRIES = 100  # for a draw within the prior's support
BYTES_PER_PASS = 2**26
ROWS_AT_ONCE = 2**17
RECOVERY_SEED = 0x6E9E
Array = NDArray[np.float64]


@dataclass(frozen=True)
class Chains:
    """What is known of the chains of B observations: steps taken; of each tangent coordinate the lag-1 correlation, that which theory gives
    for the pose's spread, and that spread, (B, P); whether they have converged, (B,)."""

    steps: int
    rho: Tensor
    theory: Tensor
    spread: Tensor
    converged: Tensor


class GNPESampler(Contexts):
    """Draws and densities of an `Equivariant` estimator. inner: the sampler behind its main net."""

    estimator: Equivariant

    def __init__(self, estimator: Equivariant, inner: Any, device: str = "cpu") -> None:
        super().__init__(estimator, device)
        self.frame, self.inner = estimator.frame, inner
        self.diagnostics: dict[str, Any] = {}  # of the last draws
        self.judged: list[NDArray[np.bool_]] | None = None  # which observations would be refused: see `chains.judging`

    # ------------------------------------------------------------------------------------------------------ draws

    @torch.no_grad()
    def sample(self, x: Fields, n: int, seed: int) -> NDArray[np.float32]:
        """(B, n, D); fixed by the seed, n and B. Raises ChainError."""
        generator = torch.Generator(self.device).manual_seed(stream(seed))
        draws, met = [], []
        for part in self._parts(x, n):
            z, _, chains = self._chains(part, n, generator)
            draws.append(z[:, :n].cpu().numpy())
            met.append(chains)
        self._judge(met)
        return np.concatenate(draws)

    def _parts(self, x: Fields, n: int) -> Iterator[dict[str, Tensor]]:
        size, per = len(next(iter(x.values()))), max(1, ROWS_AT_ONCE // max(n, LEAST_CHAINS))
        for a in range(0, size, per):
            yield {k: torch.as_tensor(np.ascontiguousarray(v[a:a + per]), device=self.device) for k, v in x.items()}

    def _judge(self, met: list[Chains]) -> None:
        """Keep what the chains were like; raises ChainError where they have not converged."""
        bad = ~torch.cat([c.converged for c in met]).cpu().numpy()
        self.diagnostics = {
            "gibbs_steps": max(c.steps for c in met),
            "gibbs_rho": float(torch.cat([c.rho for c in met]).max()),
            "gibbs_rho_theory": float(torch.cat([c.theory for c in met]).max()),
            "unconverged": int(bad.sum()),
        }
        if self.judged is not None:
            self.judged.append(bad)
        elif bad.sum() > MOST_UNCONVERGED * len(bad):
            where = "" if len(bad) == 1 else f" of {bad.sum()} of {len(bad)} observations ({_some(np.flatnonzero(bad))})"
            raise ChainError(f"the draws are not to be used: Gibbs chains{where} have not converged after {self.estimator.most_steps} "
                             f"steps (the largest lag-1 correlation is {self.diagnostics['gibbs_rho']:.3f}); train with a wider kernel "
                             "(kernel_ratio), or with more gibbs_steps")

    def _chains(self, x: dict[str, Tensor], n: int, generator: torch.Generator) -> tuple[Tensor, Tensor, Chains]:
        """z (b, C, D) after the last step, the poses before it (b, C, S), and how the chains were, for C = max(n, the least) chains."""
        initial, action = self.estimator.initial, self.frame.action
        count, batch = max(n, LEAST_CHAINS), len(next(iter(x.values())))
        first = self.inner_initial(initial.prepare(x), count, generator)
        pose = action.exp(first.double().flatten(0, 1))
        centre, v = centred(action, pose.unflatten(0, (batch, count)))
        watch = _Watch(action, centre, self.frame.kernel_widths(pose), v)
        while True:
            before = pose
            z, _ = self.conditional(x, self.frame.blur(pose, generator).unflatten(0, (batch, count)), generator)
            pose = self.frame.pose(z.flatten(0, 1))
            if watch.see(pose.unflatten(0, (batch, count))) or watch.steps >= self.estimator.most_steps:
                return z, before.unflatten(0, (batch, count)), watch.chains()

    def inner_initial(self, ready: dict[str, Tensor], count: int, generator: torch.Generator) -> Tensor:
        """Draws of the initial net, tangent coordinates (b, count, P)."""
        net = self.estimator.initial.net
        contexts, most = net.context(ready), max(1, ROWS_PER_PASS // count)
        return torch.cat([net.sample(c, count, generator) for c in contexts.split(most)])

    def conditional(self, x: dict[str, Tensor], proxy: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """z (b, C, D) ~ q(z | x, proxy) within the prior's support, for proxies (b, C, S); and whether it lies there at the first try."""
        batch, count = proxy.shape[:2]
        owner = torch.arange(batch, device=self.device).repeat_interleave(count)
        flat, out, first = proxy.flatten(0, 1), [], []
        for rows, contexts in self._contexts_of(x, owner, flat):
            z, inside = self.frame.from_relative(self.inner.draws(contexts, 1, generator)[:, 0], flat[rows])
            first.append(inside)
            for _ in range(TRIES):
                lacking = torch.nonzero(~inside)[:, 0]
                if not len(lacking):
                    break
                again, good = self.frame.from_relative(self.inner.draws(contexts[lacking], 1, generator)[:, 0], flat[rows][lacking])
                z[lacking], inside[lacking] = again, good
            out.append(z)
        return torch.cat(out).unflatten(0, (batch, count)), torch.cat(first).unflatten(0, (batch, count))

    def _contexts_of(self, x: dict[str, Tensor], owner: Tensor, proxy: Tensor) -> Iterator[tuple[slice, Tensor]]:
        """The main net's contexts of rows in passes: of x[owner] seen from proxies (R, S)."""
        main = self.estimator.main
        row = sum(v[0].numel() * v.element_size() for v in x.values())
        size = max(1, min(ROWS_PER_PASS, BYTES_PER_PASS // max(1, row)))
        for a in range(0, len(proxy), size):
            rows = slice(a, a + size)
            seen = self.frame.standardise({k: v[owner[rows]] for k, v in x.items()}, proxy[rows])
            yield rows, main.context(main.prepare_differentiably(seen) if torch.is_grad_enabled() else main.prepare(seen))

    # -------------------------------------------------------------------------------------------------- densities

    @torch.no_grad()
    def log_prob(self, z: NDArray[np.float32], x: Fields) -> Array:
        """The marginal log q(z | x) of z (B, n, D): (B, n); see the module's docstring."""
        out, done = [], 0
        for part in self._parts(x, CENTRES):
            batch = len(next(iter(part.values())))
            points = torch.as_tensor(z[done:done + batch], device=self.device)
            out.append(self.marginal(points, part, self.centres(part, CENTRES), PROXIES).cpu().numpy())
            done += batch
        return np.concatenate(out)

    @torch.no_grad()
    def centres(self, x: dict[str, Tensor], count: int) -> Tensor:
        """The poses (b, count, S) whose kernels are the density of proxies, always the same for one x in its place."""
        generator = torch.Generator(self.device).manual_seed(stream(RECOVERY_SEED))
        return self._chains(x, count, generator)[1]

    def marginal(self, z: Tensor, x: dict[str, Tensor], centres: Tensor, proxies: int) -> Tensor:
        """log q(z | x) of z (b, n, D): float64 (b, n), by so many proxies a theta; differentiable in x, with the centres held fast."""
        batch, n, _ = z.shape
        generator = torch.Generator(self.device).manual_seed(stream(RECOVERY_SEED + 1))
        each = z.flatten(0, 1).repeat_interleave(proxies, 0)
        pose = self.frame.pose(each)
        proxy = self.frame.blur(pose, generator)
        owner = torch.arange(batch, device=self.device).repeat_interleave(n * proxies)
        u, log_det = self.frame.to_relative(each, proxy)
        conditional = [self.inner.densities(u[rows], contexts).double() for rows, contexts in self._contexts_of(x, owner, proxy)]
        of_proxy = self.log_proxy(proxy.unflatten(0, (batch, -1)), centres).flatten()
        ratios = (torch.cat(conditional) + log_det + of_proxy - self.frame.log_kernel(proxy, pose)).view(batch, n, proxies)
        return torch.logsumexp(ratios, -1) - math.log(proxies)

    def log_proxy(self, proxy: Tensor, centres: Tensor) -> Tensor:
        """The mixture's log-density (b, m) of proxies (b, m, S), for centres (b, N, S)."""
        batch, m = proxy.shape[:2]
        n, size = centres.shape[1], max(1, 2**20 // centres.shape[1])
        out = []
        for b in range(batch):
            for part in proxy[b].split(size):
                pairs = (part[:, None].expand(-1, n, -1).flatten(0, 1), centres[b][None].expand(len(part), -1, -1).flatten(0, 1))
                out.append(torch.logsumexp(self.frame.log_kernel(*pairs).view(len(part), n), 1) - math.log(n))
        return torch.cat(out).view(batch, m)

    @torch.no_grad()
    def sample_and_log_prob(self, x: Fields, n: int, seed: int) -> tuple[NDArray[np.float32], Array, Array]:
        """Draws by one step from the proxies' density: z (B, n, D), log q(z, proxy | x) (B, n), and log K(proxy | p(z)) (B, n), which
        belongs into the target of importance weights; it is -inf of draws outside the prior's support. Raises ChainError."""
        generator, out, met = torch.Generator(self.device).manual_seed(stream(seed)), [], []
        for part in self._parts(x, max(n, CENTRES)):
            batch = len(next(iter(part.values())))
            _, centres, chains = self._chains(part, max(n, CENTRES), generator)
            met.append(chains)
            which = torch.randint(centres.shape[1], (batch, n), generator=generator, device=self.device)
            proxy = self.frame.blur(centres.gather(1, which[..., None].expand(-1, -1, centres.shape[-1])).flatten(0, 1), generator)
            out.append(self._step(part, proxy, centres, n, generator))
        self._judge(met)
        z, log_q, log_kernel = (np.concatenate([o[k].cpu().numpy() for o in out]) for k in range(3))
        return z, log_q, log_kernel

    def _step(self, x: dict[str, Tensor], proxy: Tensor, centres: Tensor, n: int, generator: torch.Generator) -> tuple[Tensor, ...]:
        batch = len(centres)
        owner = torch.arange(batch, device=self.device).repeat_interleave(n)
        zs, logs, inside = [], [], []
        for rows, contexts in self._contexts_of(x, owner, proxy):
            u = self.inner.draws(contexts, 1, generator)[:, 0]
            z, good = self.frame.from_relative(u, proxy[rows])
            back, log_det = self.frame.to_relative(z, proxy[rows])
            zs.append(z)
            inside.append(good & ((back - u).abs() <= 1e-3 * (1 + u.abs())).all(-1))  # of a circle: once around is another u of one z
            logs.append(self.inner.densities(u, contexts).double() + log_det)
        z, log_q = torch.cat(zs), torch.cat(logs) + self.log_proxy(proxy.unflatten(0, (batch, n)), centres).flatten()
        log_kernel = torch.where(torch.cat(inside), self.frame.log_kernel(proxy, self.frame.pose(z)), -torch.inf)
        return z.view(batch, n, -1), log_q.view(batch, n), log_kernel.view(batch, n)

    def describe(self) -> list[dict[str, Any]]:
        """The steps of the chain, for the certificate."""
        action, names = self.frame.action, list(self.frame.prior.names)
        kernel = {"kernel": "normal in tangent coordinates",
                  "widths": dict(zip(action.coordinates, self.frame.widths, strict=True)), "told": list(self.frame.told)}
        return [
            {"step": "factor", "net": "initial", "columns": [f"pose:{c}" for c in action.coordinates]},
            {"step": "gibbs", "most_steps": self.estimator.most_steps, "block": [
                {"step": "factor", **kernel, "columns": [f"proxy:{c}" for c in action.coordinates]},
                {"step": "factor", "net": "main", "columns": [f"relative:{n}" if n in action.moved else n for n in names]},
                {"step": "reparametrisation", "columns": [n for n in names if n in action.moved]}]},
            {"step": "density", "proxies": f"mixture of {CENTRES} kernels", "marginal": f"mean over {PROXIES} proxies"},
        ]


class _Watch:
    """The pose over the steps: (T, b, P) means and standard deviations of coordinates from a fixed centre, and lag-1 correlations."""

    def __init__(self, action: Any, centre: Tensor, widths: Tensor, v: Tensor) -> None:
        self.action, self.back, self.widths = action, action.inverse(centre)[:, None], widths
        self.means, self.sds, self.rhos = [v.mean(1)], [v.std(1)], []
        self.chains_each, self.last = v.shape[1], v

    @property
    def steps(self) -> int:
        return len(self.means) - 1

    def see(self, pose: Tensor) -> bool:
        """Take in poses (b, C, S); whether all observations have converged."""
        batch, count = pose.shape[:2]
        back = self.back.expand(batch, count, -1)
        v = self.action.log(self.action.compose(back.flatten(0, 1), pose.flatten(0, 1))).unflatten(0, (batch, count))
        mean, sd = v.mean(1), v.std(1).clamp_min(1e-300)
        self.rhos.append(((v - mean[:, None]) * (self.last - self.means[-1][:, None])).mean(1) / (sd * self.sds[-1].clamp_min(1e-300)))
        self.means.append(mean)
        self.sds.append(sd)
        self.last = v
        return bool(self._converged().all())

    def _rho(self) -> Tensor:
        """(b, P): the mean over the later half of the steps."""
        return torch.stack(self.rhos[len(self.rhos) // 2:]).mean(0).clamp(0.01, 0.999)

    def _converged(self) -> Tensor:
        rho, steps = self._rho(), self.steps
        half = torch.ceil(math.log(2) / -rho.log()).long().clamp(min=1)
        error = ERRORS / math.sqrt(self.chains_each)
        means, sds = torch.stack(self.means), torch.stack(self.sds).clamp_min(1e-300)
        ago = (steps - half).clamp(min=0)[None]
        start = (means[0] - means[-1]).abs() / sds[-1] + (sds[0] / sds[-1]).log().abs() + error
        near = start * rho**steps <= NEAR
        drift = (means[-1] - means.gather(0, ago)[0]).abs() / sds[-1] <= NEAR + error
        width = (sds[-1] / sds.gather(0, ago)[0]).log().abs() <= NEAR + error
        return (near & drift & width & (steps >= 2 * half)).all(-1)

    def chains(self) -> Chains:
        spread = self.sds[-1]
        return Chains(self.steps, self._rho(), spread.square() / (spread.square() + self.widths.square()), spread, self._converged())


def _some(rows: NDArray[np.intp], most: int = 5) -> str:
    return ", ".join(map(str, rows[:most])) + (", ..." if len(rows) > most else "")
