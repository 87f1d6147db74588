r"""The posterior predictive: simulate again from draws of the posterior, and ask where the data lie among the simulations.

For a summary t, the two-sided predictive p-value (Rubin, 1984) of the observation x among L simulations :math:`x_l \sim p(x | \theta_l)`,
:math:`\theta_l \sim q(\theta | x)`, is

.. math:: p = 2 \min(u, 1 - u), \qquad u = \frac{\#\{t(x_l) < t(x)\} + \tfrac{1}{2} \#\{t(x_l) = t(x)\} + \tfrac{1}{2}}{L + 1}.

Ties count half (mid-ranks), so that a summary that never varies has p = 1. The data were used to find the posterior, so p keeps away from 0
more than a uniform number would: a small one says more, and a large one less, than the same p of an ordinary test.
"""

from __future__ import annotations

import importlib
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sbiplat.diagnostics.coverage import holm
from sbiplat.errors import ObservationError, SettingError, SimulatorError
from sbiplat.observation import Fields, ObservationSpec, feature_names, flat
from sbiplat.posteriors.base import Posterior
from sbiplat.progress import Progress, silent
from sbiplat.runs import DOOR, Run
from sbiplat.settings import whole_seed
from sbiplat.simulator import Simulator, load_module, resolve

Array = NDArray[np.float64]
Summaries = Mapping[str, Callable[[Any], Any]]
ROWS, LEAST_ROWS = 200, 20
MOST_BYTES = 2**28
MOST_SECONDS = 60.0
ROWS_A_CALL = 25
MOST_SINGLE, MOST_COLUMNS, LEAST_SERIES, MOST_NUMBERS = 20, 12, 8, 1000


@dataclass(frozen=True)
class Predictive:
    """Simulations from posterior draws. fields: name -> (R, ...), only rows that are finite.

    tried: rows simulated. failed: those that raised or were not finite. error: the first that was raised.
    """

    fields: Fields
    tried: int
    failed: int
    error: str = ""

    @property
    def rows(self) -> int:
        return self.tried - self.failed


def simulate(
    simulator: Simulator, theta: Array, seed: int, progress: Progress = silent, *, most_seconds: float = MOST_SECONDS,
    clock: Callable[[], float] = time.monotonic,
) -> Predictive:
    """Simulate from the first of the draws theta (n, D): 200 of them, or fewer where x is huge or the simulator slow."""
    count = min(len(theta), ROWS, max(LEAST_ROWS, MOST_BYTES // simulator.x.row_bytes))
    step = ROWS_A_CALL if simulator.batched else 1
    kept: list[Fields] = []
    tried, error, start = 0, "", clock()
    with progress.task("predictive", count) as advance:
        for first in range(0, count, step):
            if clock() - start > most_seconds:
                break
            part = theta[first:min(first + step, count)].copy()
            stream = np.random.default_rng(np.random.SeedSequence(seed, spawn_key=(0x93ED, first)))
            tried += len(part)
            try:
                kept += [row for row in simulator.rows(part, [stream]) if all(np.isfinite(v).all() for v in row.values())]
            except Exception as problem:  # the user's own code: anything may come
                error = error or f"{type(problem).__name__}: {problem}"
            advance(len(part))
    fields = {name: np.stack([row[name] for row in kept]) for name in simulator.x.shapes} if kept else {}
    return Predictive(fields, tried, tried - len(kept), error)


@dataclass(frozen=True)
class Check:
    """One summary. observed: of x. low, middle, high: 5, 50 and 95 % of the simulations. p_value: two-sided. adjusted: Holm's, over all."""

    name: str
    observed: float
    low: float
    middle: float
    high: float
    p_value: float
    adjusted: float


@dataclass(frozen=True)
class PredictiveCheck:
    """The summaries of an observation among simulations from its posterior. rows: simulations that count. failed: those that do not."""

    checks: tuple[Check, ...]
    rows: int
    failed: int

    def __getitem__(self, name: str) -> Check:
        return next(c for c in self.checks if c.name == name)

    @property
    def p_values(self) -> dict[str, float]:
        """By name of the summary."""
        return {c.name: c.p_value for c in self.checks}

    def __str__(self) -> str:
        head = f"{'summary':32} {'observed':>11} {'5 %':>11} {'50 %':>11} {'95 %':>11} {'p':>8} {'Holm p':>8}"
        rows = [f"{c.name:32} {c.observed:11.4g} {c.low:11.4g} {c.middle:11.4g} {c.high:11.4g} {c.p_value:8.2g} {c.adjusted:8.2g}"
                for c in self.checks]
        return "\n".join([head, *rows, f"{self.rows} simulations from draws of the posterior; {self.failed} failed"])


def predictive_check(
    posterior: Posterior | Run | str | Path, simulator: Simulator | str, x: Any, summaries: Summaries | None = None, *, draws: int = 1000,
    seed: int = 0, progress: Progress | None = None,
) -> PredictiveCheck:
    """Posterior-predictive p-values of summaries of one observation x.

    posterior: a posterior, or a certified run. summaries: name -> a function of one x in the simulator's own form, which gives a number
    or an array of numbers; without it, `builtin_summaries`. draws: of the posterior, each simulated once. Raises SettingError,
    ObservationError, SimulatorError.
    """
    if not isinstance(posterior, Posterior):
        module, _, attribute = DOOR.partition(":")
        posterior = getattr(importlib.import_module(module), attribute)(posterior)
    simulator = resolve(simulator)
    if simulator.x.shapes != posterior.x.shapes or simulator.prior.names != posterior.prior.names:
        raise SimulatorError(f"simulator {simulator.name!r} has other parameters or another shape of x than the posterior; "
                             "give the one that made its bank")
    if isinstance(draws, bool) or not isinstance(draws, int | np.integer) or draws < LEAST_ROWS:
        raise SettingError(f"draws must be a whole number of at least {LEAST_ROWS}, got {draws!r}")
    fields, batched = posterior.x.batch(x)
    if batched:
        raise ObservationError(f"a predictive check is of one observation, of shape {posterior.x.shape_text()}; a batch was given")
    theta = posterior.sample(x, int(draws), seed=whole_seed(seed))
    progress = progress or Progress.auto()
    step = min(ROWS, max(LEAST_ROWS, MOST_BYTES // simulator.x.row_bytes))
    found, tried, error = [], 0, ""
    for k, first in enumerate(range(0, len(theta), step)):
        own = int(np.random.SeedSequence(seed, spawn_key=(0xC4EC, k)).generate_state(1)[0])
        made = simulate(simulator, theta[first:first + step], own, progress, most_seconds=np.inf)
        tried, error = tried + made.tried, error or made.error
        if made.rows:
            found.append(summarise(posterior.x, made.fields, summaries)[1])
    if sum(map(len, found)) < LEAST_ROWS:
        raise SimulatorError(f"simulator {simulator.name!r} failed on {tried - sum(map(len, found))} of {tried} draws of the posterior: "
                             f"too few are left for p-values{': ' + error if error else ''}")
    return check_summaries(posterior.x, fields, np.concatenate(found), summaries, tried)


def summaries_from(spec: str) -> dict[str, Callable[[Any], Any]]:
    """The dict of functions, or the one function, that `file.py:object` or `module:object` names; raises SettingError, SimulatorError."""
    place, colon, attribute = spec.rpartition(":")
    if not colon or not place or not attribute:
        raise SettingError(f"summaries = {spec!r}: expected file.py:object, a dict of functions of x by name")
    found = getattr(load_module(place, spec), attribute, None)
    if isinstance(found, Mapping) and found and all(callable(f) for f in found.values()):
        return dict(found)
    if callable(found):
        return {attribute: found}
    raise SettingError(f"{attribute!r} in {place} is no function and no dict of functions of x")


def check_summaries(spec: ObservationSpec, x: Fields, simulated: Array, summaries: Summaries | None, tried: int) -> PredictiveCheck:
    """p-values of the summaries of x, (1, ...) by name, among those of simulations (L, S); rows that are not finite do not count."""
    names, of_x = summarise(spec, x, summaries)
    for name, value in zip(names, of_x[0], strict=True):
        if not np.isfinite(value):
            raise SettingError(f"the summary {name} of the observation is {value}; give one that is finite")
    good = simulated[np.isfinite(simulated).all(1)]
    if len(good) < 2:
        raise SettingError(f"of {len(simulated)} simulations only {len(good)} have summaries that are all finite; give others")
    p_values = [two_sided(good[:, k], float(of_x[0, k])) for k in range(len(names))]
    quantiles = np.quantile(good, [0.05, 0.5, 0.95], axis=0)
    checks = [Check(name, float(of_x[0, k]), *(float(q[k]) for q in quantiles), p, adjusted)
              for k, (name, p, adjusted) in enumerate(zip(names, p_values, holm(p_values), strict=True))]
    return PredictiveCheck(tuple(checks), len(good), tried - len(good))


def two_sided(simulated: Array, observed: float) -> float:
    """The two-sided p-value of one number among L others, ties counted half."""
    below, ties = int((simulated < observed).sum()), int((simulated == observed).sum())
    return (2 * min(below, len(simulated) - below - ties) + ties + 1) / (len(simulated) + 1)


def summarise(spec: ObservationSpec, x: Fields, summaries: Summaries | None) -> tuple[list[str], Array]:
    """Names of the summaries and their values, (B, S), of x (B, ...) by name; built-in ones where none are given."""
    if summaries is None:
        return builtin_summaries(spec, x)
    if not isinstance(summaries, Mapping) or not summaries or not all(callable(f) for f in summaries.values()):
        raise SettingError("summaries must be a dict of functions of x by name, such as {\"peak\": np.max}")
    rows: list[list[float]] = []
    names: list[str] = []
    for b in range(len(next(iter(x.values())))):
        one = spec.unwrap({k: v[b] for k, v in x.items()})
        rows.append([])
        names = []
        for name, function in summaries.items():
            values = _of_user(str(name), function, one)
            names += [str(name)] if values.ndim == 0 else [f"{name}[{', '.join(map(str, i))}]" for i in np.ndindex(values.shape)]
            rows[-1] += values.reshape(-1).tolist()
        if len(rows[-1]) != len(rows[0]) or len(rows[0]) > MOST_NUMBERS:
            raise SettingError(f"the summaries give {len(rows[-1])} numbers; expected are {len(rows[0])} for every x, and at most "
                               f"{MOST_NUMBERS}")
    return names, np.array(rows, float)


def _of_user(name: str, function: Callable[[Any], Any], x: Any) -> Array:
    own = {k: v.copy() for k, v in x.items()} if isinstance(x, Mapping) else np.array(x)  # a function that writes into x changes no other's
    try:
        return np.asarray(function(own), float)
    except Exception as error:  # the user's own code: anything may come
        line = (str(error) or repr(error)).splitlines()[0]
        raise SettingError(f"the summary {name!r} fails on x: {type(error).__name__}: {line}") from error


def builtin_summaries(spec: ObservationSpec, x: Fields) -> tuple[list[str], Array]:
    """Every feature where x has at most 20; of each array with 8 places or more, min, max, mean, sd and, of a series, its autocorrelation.

    That is at lag 1. A few columns, (T, C) or (C, T), stand each by itself. Numbers with labels of their own are not taken together.
    """
    names: list[str] = []
    columns: list[Array] = []
    if spec.size <= MOST_SINGLE:
        names += feature_names(spec, np.arange(spec.size))
        columns += list(flat(spec, x).astype(float).T)
    for field in spec.shapes:
        for name, values, series in _pieces(spec, field, np.asarray(x[field], float)):
            centred = values - values.mean(1, keepdims=True)
            made = {"min": values.min(1), "max": values.max(1), "mean": values.mean(1), "sd": values.std(1)}
            if series:
                power = np.square(centred).sum(1)
                made["lag-1 autocorrelation"] = (centred[:, 1:] * centred[:, :-1]).sum(1) / np.where(power > 0, power, 1.0)
            names += [f"{kind} of {name}" for kind in made]
            columns += list(made.values())
    if not columns:  # many labelled numbers
        names, columns = feature_names(spec, np.arange(min(spec.size, MOST_NUMBERS))), list(flat(spec, x).astype(float).T[:MOST_NUMBERS])
    return names, np.stack(columns, axis=1)


def _pieces(spec: ObservationSpec, field: str, values: Array) -> list[tuple[str, Array, bool]]:
    """(name, (B, T), whether it is a series) of what may be taken together in one array (B, ...)."""
    shape = values.shape[1:]
    labelled = spec.plain and len(spec.labels) > 0
    if len(shape) == 1:
        return [] if labelled or shape[0] < LEAST_SERIES else [(field, values, True)]
    if len(shape) == 2:
        if not labelled and shape[0] < shape[1]:
            values = values.swapaxes(1, 2)
        length, count = values.shape[1:]
        if length >= LEAST_SERIES and (count <= MOST_COLUMNS or labelled):
            names = spec.labels if labelled else [f"{field}[{k}]" if count > 1 else field for k in range(count)]
            return [(name, values[:, :, k], True) for k, name in enumerate(names[:MOST_COLUMNS])]
    whole = values.reshape(len(values), -1)
    return [(field, whole, False)] if whole.shape[1] >= LEAST_SERIES else []
