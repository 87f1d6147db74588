r"""The posterior behind GNPE: parallel Gibbs chains over (theta, proxy), and the density that a step of them has.

.. math:: \hat g_0 \sim K(\cdot | p_0), \; p_0 \sim q_{\text{initial}}(p | x); \qquad
          \theta_t \sim q(\theta | x, \hat g_{t-1}), \quad \hat g_t \sim K(\cdot | p(\theta_t)) .

Every draw is the end of a chain of its own; chains stop when they have converged (`posteriors.convergence`).

The density is recovered from converged proxies: since a proxy is a blurred pose, theirs is a mixture of kernels,

.. math:: \hat q(\hat g | x) = \frac1N \sum_i K(\hat g | p(\theta_i)), \qquad
          \log q(\theta, \hat g | x) = \log \hat q(\hat g | x) + \log q(\theta | x, \hat g)

exactly, for draws that take one step from it. The marginal is the mean of :math:`q(\theta, \hat g | x) / K(\hat g | p(\theta))` over
proxies from :math:`K(\cdot | p(\theta))`, whose variance vanishes as the net becomes exact; it is an unbiased estimate with fixed random
numbers. Draws of chains beyond the prior's support are drawn again, so there :math:`q(\theta | x, \hat g)` is over the mass A inside; the
number of tries until one is inside has the mean 1 / A, and stands for it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sbiplat.estimators.equivariant import Equivariant
from sbiplat.observation import Fields
from sbiplat.posteriors.chain import Chain, Gibbs, Recovery
from sbiplat.posteriors.convergence import MOST_UNCONVERGED, ChainError, Convergence
from sbiplat.posteriors.passes import ROWS_PER_PASS, Contexts, stream
from sbiplat.posteriors.steps import Columns, Derived, Factor, State

LEAST_CHAINS = 128  # an observation: convergence is measured over them
CENTRES = 512  # of the mixture of kernels
PROXIES = 8  # for the marginal density of a theta
TRIES = 64  # for a draw within the prior's support, in the last of rounds of 1, 2, 4, ...
MOST_BEYOND = 0.01  # share of an observation's chains that may end without one
ROUNDS = 4  # of tries, over which their number is averaged
BYTES_PER_PASS = 2**26
ROWS_AT_ONCE = 2**17
PAIRS_AT_ONCE = 2**20
RECOVERY_SEED = 0x6E9E
Array = NDArray[np.float64]


class GNPESampler(Contexts):
    """Draws and densities of an `Equivariant` estimator. inner: the sampler behind its main net."""

    estimator: Equivariant

    def __init__(self, estimator: Equivariant, inner: Any, device: str = "cpu") -> None:
        super().__init__(estimator, device)
        self.frame, self.inner = estimator.frame, inner
        self.chain = Chain([self._initial(), self._gibbs(estimator.most_steps)])
        self.diagnostics: dict[str, Any] = {}  # of the last draws
        self.judged: list[NDArray[np.bool_]] | None = None  # which observations would be refused: see `convergence.judging`

    def _initial(self) -> Factor:
        return Factor("initial net", ("pose",), lambda x, _, n, generator: ({"pose": self.first(x, n, generator)}, None), density=False)

    def _gibbs(self, most_steps: int) -> Gibbs:
        frame = self.frame

        def blur(x: Any, columns: Columns, n: int, generator: torch.Generator) -> tuple[Columns, Tensor]:
            pose = columns["pose"].flatten(0, 1)
            widths = self.widths(x, n)
            proxy = frame.action.blur(pose, widths, generator)
            return {"proxy": proxy.unflatten(0, (-1, n))}, frame.action.log_kernel(proxy, pose, widths).unflatten(0, (-1, n))

        def conditional(x: Any, columns: Columns, n: int, generator: torch.Generator) -> tuple[Columns, None]:
            z, tries, beyond = self.conditional(x, columns["proxy"], generator)
            return {"z": z, "tries": tries, "beyond": beyond}, None

        def pose(x: Any, columns: Columns) -> Columns:
            z = columns["z"]
            return {"pose": frame.pose(z.flatten(0, 1)).unflatten(0, z.shape[:2])}

        action = frame.action
        about = {"kernel": "normal in tangent coordinates", "widths": dict(zip(action.coordinates, frame.widths, strict=True)),
                 "adaptive": frame.adaptive}
        steps = (Factor("kernel", ("proxy",), blur, needs=("pose",), about=about),
                 Factor("main net", ("z", "tries", "beyond"), conditional, needs=("proxy",), density=False,
                        about={"relative": list(action.moved),
                               "told": [c for c, told in zip(action.coordinates, frame.told, strict=True) if told]}),
                 Derived("pose", ("z",), ("pose",), pose))
        return Gibbs("gibbs", ("pose",), steps, Convergence(action, self.widths, most_steps))

    @torch.no_grad()
    def widths(self, x: dict[str, Tensor], n: int = 1) -> Tensor:
        """The kernel's widths (b n, P), of n rows for each x (b, ...)."""
        like = next(iter(x.values()))
        sight = self.estimator.sight(x)
        each = self.frame.kernel_widths(like, None if sight is None else sight.log_f)
        return each.expand(len(like), -1).repeat_interleave(n, 0)

    # ------------------------------------------------------------------------------------------------------ draws

    @torch.no_grad()
    def sample(self, x: Fields, n: int, seed: int) -> NDArray[np.float32]:
        """(B, n, D); fixed by the seed, n and B. Raises ChainError."""
        states = [self.chain.sample(part, max(n, LEAST_CHAINS), _own(seed, k), device=str(self.device))
                  for k, part in enumerate(self._parts(x, n))]
        self._keep(states)
        return np.concatenate([s.columns["z"][:, :n].cpu().numpy() for s in states])

    def _parts(self, x: Fields, n: int) -> Iterator[dict[str, Tensor]]:
        size, per = len(next(iter(x.values()))), max(1, ROWS_AT_ONCE // max(n, LEAST_CHAINS))
        for a in range(0, size, per):
            yield {k: torch.as_tensor(np.ascontiguousarray(v[a:a + per]), device=self.device) for k, v in x.items()}

    def _keep(self, states: Sequence[State]) -> None:
        """Keep what the chains of draws were like; raises ChainError where they have not converged."""
        figures = [_figures(s) for s in states]
        bad = np.concatenate([f["unconverged"] for f in figures])
        self.diagnostics = {"gibbs_steps": max(f["iterations"] for f in figures), "gibbs_rho": float(max(max(f["rho"]) for f in figures)),
                            "gibbs_rho_theory": float(max(max(f["theory"]) for f in figures)), "unconverged": int(bad.sum())}
        self._judge(figures)

    def _judge(self, figures: Sequence[Mapping[str, Any]]) -> None:
        """Raises ChainError where chains have not converged, unless they are only judged."""
        bad, rho = np.concatenate([f["unconverged"] for f in figures]), max(max(f["rho"]) for f in figures)
        if self.judged is not None:
            self.judged.append(bad)
        elif bad.sum() > MOST_UNCONVERGED * len(bad):
            where = "" if len(bad) == 1 else f" of {bad.sum()} of {len(bad)} observations ({_some(np.flatnonzero(bad))})"
            found = (f"have not converged after {max(f['iterations'] for f in figures)} steps (the largest lag-1 correlation is {rho:.3f})",
                     "found no draw within the prior")
            beyond = np.concatenate([f["beyond"] for f in figures])[bad]
            what = found[1] if beyond.all() else " or ".join(found) if beyond.any() else found[0]
            raise ChainError(f"the draws are not to be used: Gibbs chains{where} {what}; see whether x is of the kind that the simulator "
                             "makes; if so, train with a wider kernel (kernel_ratio), or with more gibbs_steps")

    def first(self, x: dict[str, Tensor], count: int, generator: torch.Generator) -> Tensor:
        """Poses (b, count, S) of the initial net."""
        net, initial = self.estimator.initial.net, self.estimator.initial
        contexts, most = net.context(initial.prepare(x)), max(1, ROWS_PER_PASS // count)
        v = torch.cat([net.sample(c, count, generator) for c in contexts.split(most)]).double()
        return self.frame.action.exp(v.flatten(0, 1)).unflatten(0, v.shape[:2])

    def conditional(self, x: dict[str, Tensor], proxy: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
        """z (b, C, D) ~ q(z | x, proxy) within the prior's support, for proxies (b, C, S); how many tries each took, and whether none of
        them lay inside and z was clipped into the support, (b, C, 1)."""
        flat = proxy.flatten(0, 1)
        parts = [self._within(contexts, flat[rows], log_f, generator)
                 for rows, contexts, log_f in self._contexts_of(x, self._owner(proxy), flat)]
        z, tries, beyond = (torch.cat(part).unflatten(0, proxy.shape[:2]) for part in zip(*parts, strict=True))
        return z, tries[..., None], beyond[..., None]

    def _within(self, contexts: Tensor, proxy: Tensor, log_f: Tensor | None, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
        """The same of rows: (R, D), (R,), (R,)."""
        z, inside = self.frame.from_relative(self.inner.draws(contexts, 1, generator)[:, 0], proxy, log_f)
        tries, many = torch.ones(len(z), dtype=torch.float64, device=z.device), 1
        while many < TRIES and len(lacking := torch.nonzero(~inside)[:, 0]):
            many *= 2
            u = self.inner.draws(contexts[lacking], many, generator)
            own = None if log_f is None else log_f[lacking].repeat_interleave(many, 0)
            each, good = self.frame.from_relative(u.flatten(0, 1), proxy[lacking].repeat_interleave(many, 0), own)
            good = good.view(-1, many)
            first = (good.cumsum(1) == 0).sum(1).clamp(max=many - 1)
            z[lacking] = each.view(len(lacking), many, -1)[torch.arange(len(lacking), device=z.device), first]
            inside[lacking], tries[lacking] = good.any(1), tries[lacking] + first + 1
        return z, tries, ~inside

    def _owner(self, proxy: Tensor) -> Tensor:
        """The observation of each row of proxies (b, C, S)."""
        return torch.arange(len(proxy), device=self.device).repeat_interleave(proxy.shape[1])

    def _contexts_of(self, x: dict[str, Tensor], owner: Tensor, proxy: Tensor) -> Iterator[tuple[slice, Tensor, Tensor | None]]:
        """The main net's contexts of rows in passes, of x[owner] seen from proxies (R, S); with log f of an adaptive kernel."""
        main = self.estimator.main
        row = sum(v[0].numel() * v.element_size() for v in x.values())
        size, sight = max(1, min(ROWS_PER_PASS, BYTES_PER_PASS // max(1, row))), self.estimator.sight(x)
        look = self.frame.standardiser(x, sight)
        for a in range(0, len(proxy), size):
            rows = slice(a, a + size)
            seen = look(proxy[rows], owner[rows])
            context = main.context(main.prepare_differentiably(seen) if torch.is_grad_enabled() else main.prepare(seen))
            yield rows, context, None if sight is None else sight.log_f[owner[rows]]

    # -------------------------------------------------------------------------------------------------- densities

    @torch.no_grad()
    def log_prob(self, z: NDArray[np.float32], x: Fields) -> Array:
        """The marginal log q(z | x) of z (B, n, D): (B, n); see the module's docstring."""
        out, done, figures = [], 0, []
        for part in self._parts(x, CENTRES):
            batch = len(next(iter(part.values())))
            points, centres = torch.as_tensor(z[done:done + batch], device=self.device), self.centres(part, CENTRES)
            out.append(self.marginal(points, part, centres, PROXIES).cpu().numpy())
            figures.append(centres.figures)
            done += batch
        self._judge(figures)
        return np.concatenate(out)

    @torch.no_grad()
    def centres(self, x: dict[str, Tensor], count: int, most_steps: int | None = None) -> Centres:
        """Always the same for one x in its place; most_steps: to break the chains off sooner."""
        chain = self.chain if most_steps is None else Chain([self._initial(), self._gibbs(most_steps)])
        state = chain.sample(x, count, RECOVERY_SEED, device=str(self.device))
        return Centres(state.columns["pose"], self.widths(x), (state.columns["tries"] > 1).flatten(1).any(1), _figures(state))

    def marginal(self, z: Tensor, x: dict[str, Tensor], centres: Centres, proxies: int) -> Tensor:
        """log q(z | x) of z (b, n, D): float64 (b, n), by so many proxies a theta; differentiable in x, with the centres and the mass
        inside the support held fast."""
        batch, n, _ = z.shape
        generator = torch.Generator(self.device).manual_seed(stream(RECOVERY_SEED))
        each = z.flatten(0, 1).repeat_interleave(proxies, 0)
        pose = self.frame.pose(each)
        widths = centres.widths.repeat_interleave(n * proxies, 0)
        proxy = self.frame.action.blur(pose, widths, generator)
        apart = proxy.unflatten(0, (batch, -1))
        conditional = self._log_conditional(each, x, apart)
        ratios = conditional + self.log_proxy(apart, centres.poses, centres.widths).flatten()
        ratios = ratios - self.frame.action.log_kernel(proxy, pose, widths)
        ratios = ratios.view(batch, n * proxies) + self._log_tries(x, apart, centres.edged, generator)
        return torch.logsumexp(ratios.view(batch, n, proxies), -1) - math.log(proxies)

    @torch.no_grad()
    def _log_tries(self, x: dict[str, Tensor], proxy: Tensor, edged: Tensor, generator: torch.Generator) -> Tensor:
        """The log of the mean number of tries, (b, m), for proxies (b, m, S): 0 of observations far from any edge."""
        out = torch.zeros(proxy.shape[:2], dtype=torch.float64, device=proxy.device)
        if edged.any():
            own = {k: v.detach()[edged] for k, v in x.items()}
            _, tries, _ = self.conditional(own, proxy[edged].repeat_interleave(ROUNDS, 1), generator)
            out[edged] = tries.view(len(tries), -1, ROUNDS).mean(-1).log()
        return out

    def _log_conditional(self, z: Tensor, x: dict[str, Tensor], proxy: Tensor) -> Tensor:
        """log q(z | x, proxy) of rows z (b m, D) for proxies (b, m, S): float64 (b m,)."""
        flat, found = proxy.flatten(0, 1), []
        for rows, contexts, log_f in self._contexts_of(x, self._owner(proxy), flat):
            u, log_det = self.frame.to_relative(z[rows], flat[rows], log_f)
            found.append(self.inner.densities(u, contexts).double() + log_det)
        return torch.cat(found)

    def log_proxy(self, proxy: Tensor, centres: Tensor, widths: Tensor) -> Tensor:
        """The mixture's log-density (b, m) of proxies (b, m, S), for centres (b, N, S) and the kernels' widths (b, P)."""
        n, size, out = centres.shape[1], max(1, PAIRS_AT_ONCE // centres.shape[1]), []
        for some, own, width in zip(proxy, centres, widths, strict=True):
            for part in some.split(size):
                pairs = part[:, None].expand(-1, n, -1).flatten(0, 1), own[None].expand(len(part), -1, -1).flatten(0, 1)
                out.append(torch.logsumexp(self.frame.action.log_kernel(*pairs, width).view(len(part), n), 1) - math.log(n))
        return torch.cat(out).view(proxy.shape[:2])

    @cached_property
    def recovered(self) -> Chain:
        """The chain with its density recovered, over z and the proxy."""
        def log_prob(x: Any, columns: Columns) -> Tensor:
            return self._log_conditional(columns["z"].flatten(0, 1), x, columns["proxy"]).view(columns["z"].shape[:2])

        about = {"fit": f"mixture of {CENTRES} kernels about the chains' poses"}
        mixture = Recovery("proxies", ("proxy",), lambda x, columns, _: _Mixture(self, columns["pose"]), about, ("pose",), CENTRES)
        return Chain([*self.chain.steps, mixture, Factor("main net again", ("z",), self._step, log_prob, ("proxy",))])

    def _step(self, x: Any, columns: Columns, n: int, generator: torch.Generator) -> tuple[Columns, Tensor]:
        """One draw a proxy, not held to the prior's support, and its log q; NaN z where it lies outside."""
        proxy, zs, logs = columns["proxy"].flatten(0, 1), [], []
        for rows, contexts, log_f in self._contexts_of(x, self._owner(columns["proxy"]), proxy):
            u = self.inner.draws(contexts, 1, generator)[:, 0]
            z, inside = self.frame.from_relative(u, proxy[rows], log_f)
            log_det = self.frame.to_relative(z, proxy[rows], log_f)[1]
            zs.append(torch.where(inside[:, None], z, torch.nan))
            logs.append(self.inner.densities(u, contexts).double() + log_det)
        return {"z": torch.cat(zs).unflatten(0, (-1, n))}, torch.cat(logs).unflatten(0, (-1, n))

    @torch.no_grad()
    def sample_and_log_prob(self, x: Fields, n: int, seed: int) -> tuple[NDArray[np.float32], Array, Array]:
        """Draws by one step from the proxies' density: z (B, n, D), log q(z, proxy | x) (B, n), and log K(proxy | p(z)) (B, n), which
        belongs into the target of importance weights; it is -inf of draws outside the prior's support. Raises ChainError."""
        parts = list(self._parts(x, max(n, CENTRES)))
        states = [self.recovered.sample(part, n, _own(seed, k), device=str(self.device)) for k, part in enumerate(parts)]
        self._keep(states)
        out = []
        for part, state in zip(parts, states, strict=True):
            z, proxy = (state.columns[name].flatten(0, 1) for name in ("z", "proxy"))
            outside = z.isnan().any(-1)
            z = torch.where(outside[:, None], 0.0, z)
            shape = state.log_weight.shape
            log_kernel = self.frame.action.log_kernel(proxy, self.frame.pose(z), self.widths(part, shape[1]))
            log_kernel = torch.where(outside, -torch.inf, log_kernel)
            out.append([v.unflatten(0, shape).cpu().numpy() for v in (z, log_kernel)] + [state.log_q.cpu().numpy()])
        z, log_kernel, log_q = (np.concatenate(each) for each in zip(*out, strict=True))
        return z, log_q, log_kernel

    def describe(self) -> list[dict[str, Any]]:
        """The steps of the chain, density recovery included, for the certificate."""
        return self.recovered.description()


@dataclass(frozen=True)
class Centres:
    """poses: (b, N, S), whose kernels of widths (b, P) are the density of proxies. edged: (b,), whether any chain met an edge of the
    support. figures: of the chains."""

    poses: Tensor
    widths: Tensor
    edged: Tensor
    figures: Mapping[str, Any]


class _Mixture:
    """The density of proxies: kernels about poses (b, N, S)."""

    def __init__(self, sampler: GNPESampler, poses: Tensor) -> None:
        self.sampler, self.poses = sampler, poses

    def draw(self, x: Any, columns: Columns, n: int, generator: torch.Generator) -> tuple[Columns, Tensor]:
        """Proxies, with their log-density."""
        poses, widths, own = self.poses, self.sampler.widths(x), self.sampler.frame.action
        which = torch.randint(poses.shape[1], (len(poses), n, 1), generator=generator, device=poses.device)
        chosen = poses.gather(1, which.expand(-1, -1, poses.shape[-1])).flatten(0, 1)
        proxy = own.blur(chosen, widths.repeat_interleave(n, 0), generator).unflatten(0, (-1, n))
        return {"proxy": proxy}, self.sampler.log_proxy(proxy, poses, widths)


def _figures(state: State) -> dict[str, Any]:
    """Of a Gibbs block that has just ended; chains that found no draw within the prior's support (beyond) count as not converged."""
    figures, beyond = state.figures["gibbs"], np.zeros(len(state.figures["gibbs"]["unconverged"]), bool)
    if "beyond" in state.columns:
        beyond = (state.columns["beyond"].double().flatten(1).mean(1) > MOST_BEYOND).cpu().numpy()
    return {**figures, "beyond": beyond, "unconverged": figures["unconverged"] | beyond}


def _own(seed: int, part: int) -> int:
    return seed if part == 0 else int(np.random.SeedSequence(seed, spawn_key=(0x6E9F, part)).generate_state(1, np.uint64)[0] >> 2)


def _some(rows: NDArray[np.intp], most: int = 5) -> str:
    return ", ".join(map(str, rows[:most])) + (", ..." if len(rows) > most else "")
