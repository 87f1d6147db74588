r"""Misspecification: is an observation of the kind that the simulator makes?

Nothing that a posterior says of an x that its simulator cannot make is to be relied on, and no held-out pair shows it. Here an observation
is held against rows of the bank, in two spaces: standardised x, and the context that the estimator makes of it (which may be blind to what
no simulation varied). Five distances: in either space Mahalanobis' and that to the nearest rows (distance.py), and of x the farthest single
feature, in units of its own tail. Each is brought to a common unit, :math:`s_k = (d_k - q_{50}) / (q_{99} - q_{50})` with quantiles over
rows of the bank, and the farthest counts, :math:`s = \max_k s_k`. Everything so far is fixed by rows of training. The p-value,

.. math:: p = \frac{1 + \#\{i : s_i \ge s\}}{n + 1},

is the rank of s among those of n held-out rows, which training never saw. So for an x that the simulator made with theta from the prior,
:math:`\Pr(p \le \alpha) \le \alpha` exactly, whatever the net, the distances or the bank (Vovk et al., 2005); no correction for five
distances is needed, since their maximum is itself what is ranked.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import stats

from sbiplat.diagnostics.distance import PASS_NUMBERS, Space, mmd_p_value
from sbiplat.diagnostics.examined import Examined
from sbiplat.nets.standardise import transform
from sbiplat.observation import Fields, ObservationSpec, feature_names, fields_of, flat

Array = NDArray[np.float64]
KINDS = ("mahalanobis", "nearest")
FARTHEST = "farthest feature"
CALIBRATED = 1000  # held-out rows kept for MMD
SCALE_SHARE = 0.2  # of the rows of training, for the units of the distances
MOST_LEVELS, LEAST_LEVELS, MOST_TABLE = 512, 9, 2**21
TAIL = 1e-3
BEYOND_CONSTANT = 10.0  # what a departure from a feature that no row varies counts, in widths of a tail
FAR = 1e12
GROSS = 2.0  # of a batch, one observation is told of where it lies so many times as far as the farthest held-out row
MOST_NAMED, MOST_BATCH = 3, 500


def contexts_of(sampler: Any, x: Fields) -> Array | None:
    """What an estimator makes of observations, (B, C), those of an ensemble's members side by side; None where it makes nothing of them."""
    if hasattr(sampler, "members"):
        parts = [contexts_of(member, x) for member in sampler.members]
        return np.concatenate([p for p in parts if p is not None], axis=1) if any(p is not None for p in parts) else None
    if not hasattr(getattr(sampler, "estimator", None), "context"):
        return None
    with torch.no_grad():
        return sampler.contexts(x).double().cpu().numpy()


def transformed(spec: ObservationSpec, values: NDArray[np.floating]) -> Array:
    """Rows of numbers (..., F) after the transforms that the simulator declares."""
    out, at = np.asarray(values, float).copy(), 0
    for name, shape in spec.shapes.items():
        size = int(np.prod(shape, dtype=int))
        if spec.transform[name] != "none":
            part = torch.as_tensor(np.ascontiguousarray(values[..., at:at + size]))
            out[..., at:at + size] = transform(part, spec.transform[name]).double().numpy()
        at += size
    return out


@dataclass(frozen=True)
class Tails:
    """Where features stand among R rows of a bank. table: (Q, F) order statistics of each, ranks: their places among the rows, from 0."""

    ranks: NDArray[np.int64]
    table: NDArray[np.floating]
    rows: int

    @classmethod
    def fit(cls, values: NDArray[np.floating]) -> Tails:
        """From rows of a bank (R, F): up to 512 order statistics of a feature, closer together in the tails."""
        count, size = values.shape
        levels = int(np.clip(MOST_TABLE // size, LEAST_LEVELS, MOST_LEVELS))
        half = np.unique(np.concatenate([[0.0, TAIL, 0.5], np.geomspace(1 / count, 0.5, levels // 2)]) * (count - 1) // 1).astype(int)
        ranks = np.unique(np.concatenate([half, count - 1 - half]))
        table, step = np.empty((len(ranks), size), values.dtype), max(1, PASS_NUMBERS // count)
        for a in range(0, size, step):
            table[:, a:a + step] = np.sort(values[:, a:a + step], axis=0)[ranks]
        return cls(ranks, table, count)

    def at(self, share: float) -> NDArray[np.floating]:
        """The order statistic of each feature at this share of the rows, (F,)."""
        return self.table[int(np.abs(self.ranks - round(share * (self.rows - 1))).argmin())]

    def p_values(self, values: NDArray[np.floating]) -> Array:
        """Two-sided tail probability of each feature of (B, F), at least 2 / (R + 1); rounded up between order statistics."""
        below, above = np.empty(values.shape, int), np.empty(values.shape, int)  # order statistics on each side
        if len(values) < values.shape[1]:
            for b, row in enumerate(values):
                below[b], above[b] = (self.table < row).sum(0), (self.table > row).sum(0)
        else:
            for j, column in enumerate(self.table.T):
                below[:, j] = np.searchsorted(column, values[:, j], side="left")
                above[:, j] = len(column) - np.searchsorted(column, values[:, j], side="right")
        over = np.concatenate([[0], self.ranks + 1])  # rows that are certainly below, given how many order statistics are
        under = np.concatenate([[0], self.rows - self.ranks[::-1]])
        least = self.rows - np.maximum(over[below], under[above])
        return np.minimum(1.0, 2 * (1 + least) / (self.rows + 1))

    def excess(self, spec: ObservationSpec, values: NDArray[np.floating]) -> Array:
        """How far each feature of (B, F) lies from its median, in widths of its tail on that side (median to 0.1 %): (B, F)."""
        t, low, middle, high = (transformed(spec, v) for v in (values, self.at(TAIL), self.at(0.5), self.at(1 - TAIL)))
        ends = transformed(spec, self.table[[0, -1]])
        width = np.where(t > middle, high - middle, middle - low)
        width = np.where(width > 0, width, np.where(t > middle, ends[1] - middle, middle - ends[0]))
        width = np.where(width > 0, width, ends[1] - ends[0])
        gap = np.abs(t - middle)
        with np.errstate(over="ignore"):
            units = np.minimum(gap / np.where(width > 0, width, 1.0), FAR)
        return np.where(width > 0, units, np.where(gap > 0, BEYOND_CONSTANT, 0.0))


@dataclass(frozen=True)
class Feature:
    """One feature of an observation. p_value: its two-sided tail probability among rows of the bank, whose range is low to high.
    conditional: how many sd it lies from what the others let expect; None where there are too many of them to say."""

    name: str
    value: float
    p_value: float
    excess: float
    low: float
    high: float
    conditional: float | None = None

    def text(self, rows: int) -> str:
        """What is odd about it."""
        said = f"{self.name} = {self.value:.4g}"
        if not self.low <= self.value <= self.high:
            return f"{said} is outside the range of all {rows} rows ({self.low:.4g} to {self.high:.4g})"
        return f"{said} is among the most extreme {self.p_value:.2g} of the rows ({self.low:.4g} to {self.high:.4g})"


@dataclass(frozen=True)
class Misspecification:
    """What the test says of B observations.

    p_value: (B,). score: (B,), the farthest of the distances in its common unit, where 1 is the 99 % quantile over the bank. distances and
    p_values: of each kind, (B,). tails: (B, F), each feature's two-sided tail probability among rows of the bank. features: of each
    observation (the 20 farthest in a batch; by index) those that are oddest. mmd, mmd_p_value: of the batch, None for one observation.
    level: p-values below it are told of. chance: of so many below it in the batch, were all made by the simulator. held_out: n.
    """

    p_value: Array
    score: Array
    distances: Mapping[str, Array]
    p_values: Mapping[str, Array]
    tails: Array
    features: Mapping[int, tuple[Feature, ...]]
    mmd: float | None
    mmd_p_value: float | None
    level: float
    chance: float
    farthest_held_out: float
    held_out: int
    rows: int

    @property
    def count(self) -> int:
        """Observations with a p-value below the level."""
        return int((self.p_value < self.level).sum())

    @property
    def unusual(self) -> bool:
        """Whether it is to be told of: one observation with p below the level; of a batch, more than chance makes, or a gross one."""
        return self.count > 0 and (self.chance < self.level or float(self.score.max()) > GROSS * self.farthest_held_out)

    def text(self) -> str:
        """One line that says how unlike the bank the observations are, and names features."""
        worst = int(self.score.argmax())
        one = len(self.p_value) == 1
        said = f"this observation is unlike the simulations of the bank (p = {self.p_value[0]:.2g})" if one else (
            f"{self.count} of {len(self.p_value)} observations are unlike the simulations of the bank (p < {self.level:g}; "
            f"{self.level * len(self.p_value):.2g} would be so by chance), the farthest is number {worst}")
        return f"{said}: {self._why(worst)}; do not rely on its posterior"

    def _why(self, which: int) -> str:
        named = self.features[which]
        alone = [f for f in named if f.p_value * self.tails.shape[1] < 0.05 or f.excess > GROSS]
        if alone:
            return "; ".join(f.text(self.rows) for f in alone)
        together = [f for f in named if f.conditional is not None and abs(f.conditional) > 3]
        if together:
            return "no feature is out of range by itself, but given the others " + ", ".join(
                f"{f.name} is off by {abs(f.conditional or 0.0):.1f} sd" for f in together)
        kind = max(self.p_values, key=lambda k: (-self.p_values[k][which], self.distances[k][which]))
        return f"no feature is out of range by itself, but all together are ({kind} = {self.distances[kind][which]:.3g})"

    def facts(self) -> dict[str, Any]:
        """What is written into files of draws: numbers and text; of a batch the worst."""
        worst = int(self.score.argmax())
        out: dict[str, Any] = {"misspecification_p_value": float(self.p_value[worst]), "misspecification_score": float(self.score[worst])}
        for kind, values in self.distances.items():
            out[f"misspecification_{kind.replace(' ', '_')}"] = float(values[worst])
        if len(self.p_value) > 1:
            out |= {"misspecification_unusual": self.count, "misspecification_worst": worst, "misspecification_chance": self.chance,
                    "misspecification_mmd_p_value": self.mmd_p_value}
        return {**out, "misspecification": self.text() if self.unusual else "none seen"}


@dataclass(frozen=True)
class Reference:
    """What observations are held against. spaces: by name. units: (K, 2), median and tail of each distance over rows of the bank. held_out:
    (n, K), the distances of held-out rows. kept: by space, components of some of them."""

    spec: ObservationSpec
    spaces: Mapping[str, Space]
    tails: Tails
    units: Array
    held_out: Array
    kept: Mapping[str, NDArray[np.float32]]
    level: float
    seed: int = 0
    scores: Array = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "scores", np.sort(self._scores(self.held_out)))

    @classmethod
    def fit(cls, examined: Examined, level: float) -> Reference:
        """From rows of training and held-out ones."""
        spec, sampler = examined.posterior.x, examined.posterior.sampler
        streams = [np.random.default_rng(s) for s in examined.stream(0x3155).spawn(3)]
        x, held_out = examined.training["x"], examined.pairs["x"]
        rows = flat(spec, x)
        order = streams[0].permutation(len(rows))
        apart = max(1, min(round(SCALE_SHARE * len(rows)), 2000))
        fitted, scaling = order[apart:], order[:apart]
        tails = Tails.fit(rows)
        values = _spaces(spec, rows, contexts_of(sampler, x))
        spaces = {name: Space.fit(v[fitted], streams[1 + k]) for k, (name, v) in enumerate(values.items())}
        bare = cls(spec, spaces, tails, np.zeros((0, 2)), np.zeros((0, 0)), {}, level)
        distances, _ = bare.measure(rows[scaling], {name: v[scaling] for name, v in values.items()})
        units = np.quantile(distances, [0.5, 0.99], axis=0).T
        units[:, 1] = np.maximum(units[:, 1] - units[:, 0], 1e-9 * np.maximum(np.abs(units[:, 0]), 1e-9))
        rows = flat(spec, held_out)
        found, kept = bare.measure(rows, _spaces(spec, rows, contexts_of(sampler, held_out)))
        return cls(spec, spaces, tails, units, found, {name: v[:CALIBRATED] for name, v in kept.items()}, level,
                   int(examined.stream(0x3156).generate_state(1)[0]))

    @property
    def kinds(self) -> list[str]:
        """The names of the distances."""
        return [f"{kind} {name}" for name in self.spaces for kind in KINDS] + [FARTHEST]

    def measure(
        self, rows: NDArray[np.floating], values: Mapping[str, NDArray[np.floating]],
    ) -> tuple[Array, dict[str, NDArray[np.float32]]]:
        """(B, K) distances of x (B, F), which is `values` in each space; and its components in each."""
        columns, kept = [], {}
        for name, space in self.spaces.items():
            found, kept[name] = space.measure(values[name])
            columns.append(found)
        step = max(1, PASS_NUMBERS // rows.shape[1])
        farthest = [self.tails.excess(self.spec, rows[a:a + step]).max(1) for a in range(0, len(rows), step)]
        return np.concatenate([*columns, np.concatenate(farthest)[:, None]], axis=1), kept

    def _scores(self, distances: Array) -> Array:
        if not len(self.units) or not distances.size:
            return np.zeros(0)
        return ((distances - self.units[:, 0]) / self.units[:, 1]).max(1)

    def p_values(self, distances: Array) -> Array:
        """Exactly valid p-values of distances (B, K): (B,)."""
        return upper_p_values(self._scores(distances), self.scores)

    def look(self, x: Fields, sampler: Any) -> Misspecification:
        """Hold observations x, (B, ...) by name, against the bank."""
        rows = flat(self.spec, x)
        values = _spaces(self.spec, rows, contexts_of(sampler, x) if "context" in self.spaces else None)
        distances, kept = self.measure(rows, values)
        scores, p_value = self._scores(distances), self.p_values(distances)
        held = np.sort(self.held_out, axis=0)
        tails = self.tails.p_values(rows)
        count, n = len(rows), len(self.held_out)
        worst = np.argsort(-scores, kind="stable")[:20]
        batch = (None, None)
        if count > 1:
            rng = np.random.default_rng(np.random.SeedSequence(self.seed, spawn_key=(0x33D,)))
            some = np.sort(rng.permutation(count)[:MOST_BATCH])
            batch = mmd_p_value([kept[k][some] for k in self.spaces], [self.kept[k] for k in self.spaces], rng)
        below = int((p_value < self.level).sum())
        return Misspecification(
            p_value, scores, {k: distances[:, i] for i, k in enumerate(self.kinds)},
            {k: upper_p_values(distances[:, i], held[:, i]) for i, k in enumerate(self.kinds)}, tails,
            {int(b): self._oddest(rows[b], values["x"][b], tails[b]) for b in worst}, *batch, self.level,
            chance_of(below, count, n, self.level), float(self.scores[-1]), n, self.tails.rows)

    def _oddest(self, row: NDArray[np.floating], values: Array, tails: Array) -> tuple[Feature, ...]:
        """The features that lie farthest out by themselves, then those that do given the others."""
        excess = self.tails.excess(self.spec, row[None])[0]
        conditional = self.spaces["x"].conditional(values[None])
        given = np.zeros(len(row)) if conditional is None else conditional[0]
        alone = np.lexsort((-excess, tails))[:MOST_NAMED]
        chosen = np.array(list(dict.fromkeys([*alone.tolist(), *np.argsort(-np.abs(given), kind="stable")[:MOST_NAMED].tolist()])))
        low, high = self.tails.table[0], self.tails.table[-1]
        return tuple(
            Feature(name, float(row[j]), float(tails[j]), float(excess[j]), float(low[j]), float(high[j]),
                    None if conditional is None else float(given[j]))
            for name, j in zip(feature_names(self.spec, chosen), chosen, strict=True))


def _spaces(spec: ObservationSpec, rows: NDArray[np.floating], contexts: Array | None) -> dict[str, NDArray[np.floating]]:
    plain = all(how == "none" for how in spec.transform.values())
    values: dict[str, NDArray[np.floating]] = {"x": rows if plain else transformed(spec, rows)}
    return values if contexts is None else {**values, "context": contexts}


def upper_p_values(values: Array, ordered: Array) -> Array:
    """(1 + #{ordered >= value}) / (n + 1) for each value (B,) among n ordered ones."""
    return (1 + len(ordered) - np.searchsorted(ordered, values, side="left")) / (len(ordered) + 1)


def chance_of(count: int, batch: int, held_out: int, level: float) -> float:
    """The probability that at least `count` of a batch from the simulator have a p-value below the level.

    They share their held-out rows, so the number is beta-binomial, exactly where there are no ties.
    """
    within = int(np.ceil(level * (held_out + 1))) - 1  # the largest rank whose p-value is below the level
    if count == 0 or within < 1:
        return 1.0
    return float(stats.betabinom.sf(count - 1, batch, within, held_out + 1 - within))


# ------------------------------------------------------------------------------------------------- does the test work?


@dataclass(frozen=True)
class Power:
    """level_p_value: that the scores of two halves of the held-out rows are of one law. alarms: the share of one half with a p-value below
    the level by the other half. one_feature, noise: the share of it that is found after a departure."""

    level_p_value: float
    alarms: float
    one_feature: float
    noise: float


def power(reference: Reference, examined: Examined, departure: float) -> Power:
    """Of the held-out rows one half calibrates and the other is tested: as it is, with one feature (at random, a row) moved by so many
    robust sd, and with white noise of one robust sd added to every feature."""
    spec = reference.spec
    rng = np.random.default_rng(examined.stream(0x3157))
    x = examined.pairs["x"]
    middle = len(reference.held_out) // 2
    scores = reference._scores(reference.held_out)
    tested, ordered = scores[:middle], np.sort(scores[middle:])
    rows = flat(spec, x)[:middle]
    scale = reference.spaces["x"].scale
    varies = np.flatnonzero(reference.tails.table[0] < reference.tails.table[-1])
    if not len(varies):
        varies = np.arange(rows.shape[1])
    moved = np.zeros(rows.shape)
    moved[np.arange(middle), rng.choice(varies, middle)] = departure * rng.choice([-1.0, 1.0], middle)
    noise = np.zeros(rows.shape)
    noise[:, varies] = rng.standard_normal((middle, len(varies)))
    found = []
    for shift in (moved, noise):
        altered = fields_of(spec, inverse(spec, transformed(spec, rows) + shift * scale))
        changed = flat(spec, altered)
        distances, _ = reference.measure(changed, _spaces(spec, changed, contexts_of(examined.posterior.sampler, altered)))
        found.append(float((upper_p_values(reference._scores(distances), ordered) < reference.level).mean()))
    alarms = float((upper_p_values(tested, ordered) < reference.level).mean())
    return Power(float(stats.ks_2samp(tested, ordered).pvalue), alarms, *found)


def inverse(spec: ObservationSpec, values: Array) -> Array:
    """The inverse of `transformed`; what the type of x cannot hold becomes its largest number."""
    out, at, most = values.copy(), 0, float(np.finfo(spec.dtype).max)
    for name, shape in spec.shapes.items():
        part = slice(at, at + int(np.prod(shape, dtype=int)))
        how = spec.transform[name]
        if how != "none":
            with np.errstate(over="ignore"):
                out[..., part] = np.exp(out[..., part]) if how == "log" else np.sinh(out[..., part])
        at = part.stop
    return np.clip(out, -most, most)
