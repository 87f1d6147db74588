"""The figures of a posterior on held-out pairs: ranks, coverage and information, in bounded memory, for as many pairs as are asked for.

A diagnostic measures and never decides. It works on any `Posterior`, an exact one included, so that tests can hold it
against known answers. A posterior is drawn from once a pair; all tests see the same draws.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sbiplat.diagnostics.classifier import JointC2ST, Map, joint_c2st
from sbiplat.diagnostics.coverage import (
    Coverage,
    bootstrap_weights,
    coverage,
    outside,
    outside_figures,
    ranks,
    tarp_ranks,
)
from sbiplat.diagnostics.examined import Examined
from sbiplat.diagnostics.information import MOST_QUERIES, Information, energy_scores, information, nearest_figures, prior_energy_scores
from sbiplat.diagnostics.local import MOST_NULLS, TENTHS, LocalByTheta, LocalByX, axes_of, by_theta, by_x
from sbiplat.diagnostics.references import Features, References
from sbiplat.errors import SettingError
from sbiplat.observation import Fields
from sbiplat.posteriors.convergence import judging

Array = NDArray[np.float64]
CHUNK_NUMBERS = 2**22
KEPT_NUMBERS = 2**24
LEAST_CHUNKS = 20  # so that a slow gate shows that it goes on
KEPT = 100
GIBBS = ("gibbs_steps", "gibbs_rho", "gibbs_rho_theory")  # of a sampler's diagnostics


@dataclass(frozen=True)
class HeldOutFigures:
    """What the gate decides on. ranks: (P, K), the first of each set in `coverages`. density_draws: draws a pair at which the density was
    evaluated, 0 where there is none. unusable: the share of pairs with draws or a log-density that are not finite. refused: the share of
    pairs whose chains disagree or have not converged, None without chains. gibbs: the most steps and the largest correlations of GNPE's.
    """

    pairs: int
    draws: int
    ranks: Array
    coverages: tuple[Coverage, ...]
    by_x: LocalByX
    by_theta: LocalByTheta
    joint: JointC2ST
    information: Information
    density_draws: int
    unusable: float
    refused: float | None = None
    gibbs: Mapping[str, float] | None = None


class HeldOut:
    """Draws and ranks of held-out pairs, more and more of them: `until(n)`, then `figures()` of the first n.

    draws: L a pair. references: TARP's reference points a pair. density_draws: at how many draws a pair the density is evaluated for HPD.
    """

    def __init__(self, examined: Examined, draws: int, *, references: int = 4, density_draws: int = KEPT) -> None:
        self.examined, self.draws, self.density_draws = examined, draws, density_draws
        self.functions = examined.functions
        posterior, training = examined.posterior, examined.training
        fitting, drawing, *_ = (np.random.default_rng(s) for s in examined.stream(0x6A7E).spawn(2))
        self._features = Features(posterior.x, training["x"], fitting)
        rows = self._features(training["x"])
        self._z = np.asarray(training["theta"], float)
        self.references = References.fit(rows, self._z, fitting)
        self._summaries = self.references.estimate(rows)
        self._prior_edges = np.quantile(self._z, np.linspace(0, 1, TENTHS + 1)[1:-1], axis=0)
        self._x = self._features(examined.pairs["x"])
        self.truth = examined.truth
        count, dim = self.truth.shape
        self._drawn_references = self.references.draw(self._x, references, drawing)
        self._chunk = max(1, min(CHUNK_NUMBERS // (draws * max(dim, references)), -(-count // LEAST_CHUNKS)))
        self._kept = int(min(draws, KEPT, max(TENTHS, KEPT_NUMBERS // (count * dim))))
        self._done: list[dict[str, Array]] = []
        self._names = posterior.prior.names

    @property
    def pairs(self) -> int:
        """How many have been measured."""
        return sum(len(part["sbc"]) for part in self._done)

    def until(self, pairs: int, advance: Callable[[int], None] = lambda n: None) -> HeldOut:
        """Measure at least so many pairs: whole chunks, so that the draws do not depend on where one stops."""
        first, last, begun = self.pairs, min(pairs, len(self.truth)), len(self._done)
        parts = [slice(k, min(k + self._chunk, len(self.truth))) for k in range(first, last, self._chunk)]
        self._done += self.examined.spread.map(lambda k: self._measure(parts[k], begun + k), len(parts),
                                               lambda k: advance(parts[k].stop - parts[k].start))
        return self

    def _measure(self, part: slice, k: int) -> dict[str, Array]:
        """Everything of one chunk of pairs that needs its draws."""
        with judging(self.examined.posterior.sampler) as judged:
            out = self._drawn(part, k)
        told = getattr(self.examined.posterior.sampler, "diagnostics", {})
        chains = np.array([told[name] for name in GIBBS], float) if GIBBS[0] in told else None
        return {**out, **({} if judged is None else {"refused": np.any(judged, axis=0)}),
                **({} if chains is None else {"gibbs": np.tile(chains, (part.stop - part.start, 1))})}

    def _drawn(self, part: slice, k: int) -> dict[str, Array]:
        examined, posterior, truth = self.examined, self.examined.posterior, self.truth[part]
        x = {name: v[part] for name, v in examined.pairs["x"].items()}
        rng = np.random.default_rng(examined.stream(0x4A9, k))
        z = posterior.unconstrained_sample(x, self.draws, int(examined.stream(0xD3, k).generate_state(1)[0]))
        finite = np.isfinite(z).all((1, 2))
        z = np.nan_to_num(z, nan=0.0, posinf=1e6, neginf=-1e6) if not finite.all() else z
        kept = z[:, :self._kept]
        out = {"sbc": ranks(z, truth, rng), "sbc_outside": outside(z, truth), "mean": z.mean(1), "variance": z.var(1),
               "energy": energy_scores(z / self.references.residual, truth / self.references.residual), "kept": kept.astype(np.float32)}
        for name, (scaled, own, reference) in self._scaled(z, truth, x, part).items():
            out[name] = tarp_ranks(scaled, own, reference, rng)
        if self.functions:
            theta, theta_true = posterior.prior.constrain(z), posterior.prior.constrain(truth)
            values = [(self._value(name, theta), self._value(name, theta_true[:, None])[:, 0]) for name in self.functions]
            out["functions"] = np.stack([ranks(v, t, rng) for v, t in values], axis=1)
            out["functions_outside"] = np.stack([outside(v, t) for v, t in values], axis=1)
        shares = [np.stack([np.bincount(row, minlength=TENTHS) for row in column]) for column in np.moveaxis(self._tenths(z), 2, 0)]
        out["tenths"] = np.stack(shares, axis=1)
        log_q = self._log_q(truth, kept, x)
        if log_q is not None:
            finite &= ~np.isnan(log_q).any(1)
            log_q = np.nan_to_num(log_q, nan=-1e6, neginf=-1e6, posinf=1e6)
            out["log_q"] = log_q[:, 0]
            if log_q.shape[1] > 1:
                out["hpd"] = ranks(-log_q[:, 1:], -log_q[:, 0], rng)
                out["hpd_outside"] = log_q[:, 0] < log_q[:, 1:].min(1)
        return {**out, "unusable": ~finite}

    def _scaled(self, z: Array, truth: Array, x: Fields, part: slice) -> dict[str, tuple[Array, Array, Array]]:
        """Of each kind of TARP: draws, truths and references in its units, centred at the regression so that no digits are lost."""
        centre = self.references.estimate(self._x[part])
        off, own, reference = z - centre[:, None], truth - centre, self._drawn_references[part] - centre[:, None]
        euclidean, whiten = 1 / self.references.residual, self.references.whiten
        out = {"TARP": (off * euclidean, own * euclidean, reference * euclidean),
               "TARP Mahalanobis": (off @ whiten, own @ whiten, reference @ whiten)}
        if self.examined.references is not None:
            given = self._own_references(x) - centre[:, None]
            out["TARP own references"] = (off * euclidean, own * euclidean, given * euclidean)
        return out

    def _own_references(self, x: Fields) -> Array:
        prior, count = self.examined.posterior.prior, len(next(iter(x.values())))
        assert self.examined.references is not None
        own = {k: v.copy() for k, v in x.items()}  # a function that writes into x must not change what is tested
        given = _of_user("references", self.examined.references, own["x"] if self.examined.posterior.x.plain else own)
        given = given[:, None] if given.ndim == 2 else given
        if given.ndim != 3 or len(given) != count or given.shape[2] != prior.dim or not given.size:
            raise SettingError(f"references: for {count} observations expected an array ({count}, {prior.dim}) or (.., references, "
                               f"{prior.dim}) of theta, got {given.shape}")
        if not np.isfinite(given).all():
            raise SettingError("references: some are not finite")
        return prior.unconstrain(given)

    def _value(self, name: str, theta: Array) -> Array:
        """A user's function of theta (P, L, D): (P, L)."""
        values = _of_user(f"function {name!r}", self.functions[name], theta.copy())
        if values.shape != theta.shape[:-1]:
            raise SettingError(f"function {name!r} must give one number a theta: of an array {theta.shape} expected {theta.shape[:-1]}, "
                               f"got {values.shape}; write it over the last axis, as lambda theta: theta[..., 0]")
        if not np.isfinite(values).all():
            raise SettingError(f"function {name!r} is not finite at some theta")
        return values

    def _tenths(self, z: Array) -> NDArray[np.intp]:
        """The tenth of the prior that each coordinate lies in: (..., D)."""
        return np.stack([np.searchsorted(self._prior_edges[:, k], z[..., k], side="right") for k in range(z.shape[-1])], axis=-1)

    def _log_q(self, truth: Array, kept: Array, x: Fields) -> Array | None:
        """log q of the truth and of some draws, (P, 1 + density draws), in the same precision; None where there is no density."""
        both = np.concatenate([truth[:, None], kept[:, :self.density_draws]], axis=1)
        try:
            return np.asarray(self.examined.posterior.unconstrained_log_prob(both, x), float)
        except NotImplementedError:
            return None

    def figures(self, resolution: int = MOST_NULLS) -> HeldOutFigures:
        """Of all pairs that have been measured. resolution: Monte Carlo p-values are as small as one in so many."""
        found = {key: np.concatenate([part[key] for part in self._done]) for key in self._done[0]}
        count, prior = self.pairs, self.examined.posterior.prior
        bootstrap, looking, testing, mapping = (np.random.default_rng(s) for s in self.examined.stream(0xF1).spawn(4))
        weights = bootstrap_weights(count, bootstrap)
        chance = 2 / (self.draws + 1)

        def of(name: str, kind: str, u: Array, beyond: NDArray[np.bool_] | None = None, chance: float = chance) -> Coverage:
            told = None if beyond is None else outside_figures(int(beyond.sum()), count, chance)
            return coverage(name, u, bootstrap, kind, told, weights)

        sets = [of(name, "TARP", found[name]) for name in found if name.startswith("TARP")]
        if "hpd" in found:
            sets.append(of("HPD", "HPD", found["hpd"], found["hpd_outside"], 1 / (min(self.density_draws, self._kept) + 1)))
        sets += [of(f"SBC {n}", "SBC", found["sbc"][:, k], found["sbc_outside"][:, k]) for k, n in enumerate(prior.names)]
        sets += [of(f"function {n}", "function", found["functions"][:, k], found["functions_outside"][:, k])
                 for k, n in enumerate(self.functions)]
        columns = {**{n: found[n][:, 0] for n in found if n.startswith("TARP")}, "HPD": found.get("hpd"),
                   **{f"SBC {n}": found["sbc"][:, k] for k, n in enumerate(prior.names)},
                   **{f"function {n}": found["functions"][:, k] for k, n in enumerate(self.functions)}}
        all_ranks = np.stack([columns[c.name] for c in sets], axis=1)
        x, truth, kept = self._x[:count], self.truth[:count], found["kept"].astype(float)
        estimates = self.references.estimate(x)
        looked = [k for k, c in enumerate(sets) if c.kind != "TARP"]
        tenths = self._tenths(truth)
        among = np.concatenate([tenths[:, None], self._tenths(kept)], axis=1)
        stated = (found["tenths"] + (tenths[..., None] == np.arange(TENTHS))) / (self.draws + 1)
        return HeldOutFigures(
            count, self.draws, all_ranks, tuple(sets),
            by_x(all_ranks[:, looked], tuple(sets[k].name for k in looked), *axes_of(estimates, x, prior.names), looking, resolution),
            by_theta(tenths, stated, among, prior.names, looking, resolution),
            joint_c2st(truth, kept, x, Map(self.references, prior.dim, x.shape[1], mapping), testing),
            self._information(found, truth, estimates), min(self.density_draws, self._kept) if "hpd" in found else 0,
            float(found["unusable"].mean()), float(found["refused"].mean()) if "refused" in found else None,
            dict(zip(GIBBS, found["gibbs"].max(0).tolist(), strict=True)) if "gibbs" in found else None,
        )

    def _information(self, found: dict[str, Array], truth: Array, estimates: Array) -> Information:
        prior = self.examined.posterior.prior
        scale = self.references.residual
        nearest_energy, nearest_variances = nearest_figures(
            self._summaries, self._z, estimates[:MOST_QUERIES], truth[:MOST_QUERIES], scale)
        prior_sd = np.ones(prior.dim) if prior.gaussianised else self._z.std(0)
        return information(
            found.get("log_q"), prior.unconstrained_log_prob(truth), found["energy"], prior_energy_scores(self._z / scale, truth / scale),
            nearest_energy, found["variance"], found["mean"], nearest_variances, prior_sd, self._context_moves(len(truth)))

    def _context_moves(self, count: int) -> bool | None:
        """Whether the embedding's context differs between observations; None where the posterior has none."""
        sampler = self.examined.posterior.sampler
        contexts, estimator = getattr(sampler, "contexts", None), getattr(sampler, "estimator", None)
        if contexts is None or count < 2 or (estimator is not None and not hasattr(estimator, "context")):
            return None
        values = contexts({k: v[:min(count, 1000)] for k, v in self.examined.pairs["x"].items()})
        values = values.detach().double().cpu().numpy()
        return bool((values.std(0) > 1e-5 * np.maximum(np.abs(values).mean(0), 1e-9)).any())


def _of_user(what: str, function: Callable[[Any], Any], given: Any) -> Array:
    """What a user's function gives, as real numbers; raises SettingError."""
    try:
        found = np.asarray(function(given))
    except Exception as problem:  # the user's own code: anything may come
        raise SettingError(f"{what} failed: {type(problem).__name__}: {problem}") from None
    if found.dtype.kind not in "biuf":
        raise SettingError(f"{what} must give real numbers, got {found.dtype}")
    return found.astype(float)


def held_out_figures(examined: Examined, draws: int, **settings: Any) -> HeldOutFigures:
    """Measure all pairs by so many draws a pair, L."""
    measured = HeldOut(examined, draws, **settings)
    with examined.progress.task("gate", len(measured.truth)) as advance:
        measured.until(len(measured.truth), advance)
    return measured.figures()
