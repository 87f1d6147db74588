r"""That a simulator has the symmetry which it declares: the algebra of its action (`algebra`), and simulations.

At points theta of the prior, with g that carries theta to the pose of another draw, T_g x with x ~ p(x | theta) is compared with
x' ~ p(x | g theta). Where x is a function of theta, by their relative RMS difference. Where it is random, by a permutation test
(`two_sample`); an exact action is refused at `LEVEL`.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sbiplat.errors import SymmetryError, UserError
from sbiplat.observation import Fields
from sbiplat.prior import Prior
from sbiplat.simulator import Simulator
from sbiplat.symmetry.action import GroupAction
from sbiplat.symmetry.algebra import check_algebra, users
from sbiplat.symmetry.frame import name_of
from sbiplat.symmetry.names import resolve_action
from sbiplat.symmetry.two_sample import FEWEST, two_sample

LEVEL = 0.001  # of the two-sample test: so often an action that is exact is refused
TOLERANCE = 0.01  # relative RMS difference that an exact action may leave in what is a function of theta
FIXED = 1e-5  # spread of a number of x, relative to its field, below which it is no noise
POINTS = 16
TRIALS = 4  # theta that are simulated twice, to see whether x is a function of theta


@dataclass(frozen=True)
class ActionCheck:
    """What the contract check of an action found; None where there was nothing to measure.

    algebra: the largest error of each law. rows: simulations made. kept: the share of moved theta inside the prior's support. p_value: of
    the two-sample test of the factors declared exact. shift: RMS difference of the means of T_g x and of simulate(g theta), in sd of the
    noise; noise_ratio: the factor between their sds; difference: relative RMS difference of what is a function of theta, in units of its
    spread over the prior. inexact: these three where the approximate factors move too.
    """

    action: str
    parameters: tuple[str, ...]
    coordinates: tuple[str, ...]
    exact: bool
    algebra: dict[str, float]
    rows: int
    kept: float | None
    p_value: float | None
    shift: float | None
    noise_ratio: float | None
    difference: float | None
    inexact: dict[str, float | None] | None
    seconds: float
    statement: str


def check_action(simulator: Simulator, action: Any = None, rows: int = 2048, seconds: float = 30.0, seed: int = 0) -> ActionCheck:
    """Hold a simulator's symmetry (or another action) against the algebra and against simulations; raises SymmetryError.

    rows: simulations at most; seconds: for them, after which the test takes those that are made. g carries theta to the pose of another
    draw of the prior; where theta then leaves the prior's support, both are drawn again. Factors that move no parameter have no such
    g: of those only `scramble` is tested.
    """
    began = time.monotonic()
    action = resolve_action(simulator if action is None else action)
    if rows < 8 * FEWEST:
        raise SymmetryError(f"the check of a symmetry needs at least {8 * FEWEST} rows, got {rows}")
    algebra = check_algebra(action, simulator.prior, simulator.x, seed)
    exact = [f.exact and (f.moves or f.canonical) for f in action.factors]
    moving = [f.moves or f.canonical for f in action.factors]
    runs = _Runs(simulator, seed, rows, seconds, shares=2 if any(exact) and exact != moving else 1)
    found = _compared(simulator, action, exact, runs) if any(exact) else None
    if found is not None:
        _refuse(action, exact, found)
    inexact = _compared(simulator, action, moving, runs) if exact != moving else None
    shown = found or inexact
    said = "no factor moves a parameter: nothing to simulate" if shown is None else shown.statement
    return ActionCheck(
        name_of(action), tuple(action.parameters), tuple(action.coordinates), bool(action.exact), algebra, runs.made,
        shown.kept if shown else None, found.p_value if found else None, *(getattr(found, k) if found else None for k in _FIGURES),
        {k: getattr(inexact, k) for k in _FIGURES} if inexact else None, time.monotonic() - began, said)


_FIGURES = ("shift", "noise_ratio", "difference")


@dataclass(frozen=True)
class _Compared:
    """What one comparison of T_g x and simulate(g theta) found; see ActionCheck."""

    kept: float
    p_value: float | None
    shift: float | None
    noise_ratio: float | None
    difference: float | None
    statement: str


def _refuse(action: GroupAction, exact: Sequence[bool], found: _Compared) -> None:
    """Raises SymmetryError where simulations contradict that the factors of `exact` are."""
    name = " x ".join(type(f).__name__ for f, e in zip(action.factors, exact, strict=True) if e)
    if found.difference is not None and not found.difference <= TOLERANCE:
        raise SymmetryError(f"{name} is declared exact, but what simulate(g theta) and T_g simulate(theta) give without noise differs by "
                            f"{found.difference:.2g} of its spread (RMS; {TOLERANCE:g} allowed); mend act_data, or declare exact=False")
    if found.p_value is not None and found.p_value <= LEVEL:
        raise SymmetryError(f"{name} is declared exact, but simulate(g theta) and T_g simulate(theta) differ (p = {found.p_value:.2g}): "
                            f"means by {found.shift:.2g} sd of the noise, sds by a factor of {found.noise_ratio:.3g}; mend act_data, or "
                            "declare exact=False")


class _Runs:
    """Simulations within a budget of rows and of time, shared by `shares` comparisons; a stream for every row."""

    def __init__(self, simulator: Simulator, seed: int, rows: int, seconds: float, shares: int) -> None:
        self.simulator, self.seed, self.made = simulator, seed, 0
        self.rows, self.seconds = rows // shares, seconds / shares
        self.row_seconds = 0.0

    def streams(self, count: int) -> list[np.random.Generator]:
        """Fresh ones, that no bank has."""
        first, self.made = self.made, self.made + count
        keys = [(2**32 - 2, row) for row in range(first, first + count)]
        return [np.random.default_rng(np.random.SeedSequence(self.seed, spawn_key=key)) for key in keys]

    def __call__(self, theta: NDArray[np.float64]) -> Fields:
        """x (n, ...) of theta (n, D) in float64; rows that raise are NaN."""
        began, rngs, simulator = time.monotonic(), self.streams(len(theta)), self.simulator
        if simulator.batched:
            rows = simulator.rows(theta, rngs)
        else:
            rows = [self._row(t, rng) for t, rng in zip(theta, rngs, strict=True)]
        self.row_seconds = (time.monotonic() - began) / len(theta)
        return {k: np.stack([r[k] for r in rows]).astype(float) for k in simulator.x.shapes}

    def _row(self, theta: NDArray[np.float64], rng: np.random.Generator) -> Fields:
        try:
            return self.simulator.rows(theta[None], [rng])[0]
        except UserError:
            raise
        except Exception:  # the user's own code: such a row is left out, as a bank marks it
            return {k: np.full(shape, np.nan) for k, shape in self.simulator.x.shapes.items()}


def _compared(simulator: Simulator, action: GroupAction, which: Sequence[bool], runs: _Runs) -> _Compared:
    """T_g x and simulate(g theta), where the factors of `which` move."""
    theta, moved, g, kept = _points(simulator.prior, action, which, runs.seed)
    signal = _signal_difference(simulator, action, theta, moved, g)
    deadline = time.monotonic() + runs.seconds
    first, repeat = runs(theta[:TRIALS]), runs(theta[:TRIALS])
    still = all(np.array_equal(v, repeat[k], equal_nan=True) for k, v in first.items())
    left = min(runs.rows - 2 * TRIALS, int((deadline - time.monotonic()) / max(runs.row_seconds, 1e-9)))
    points = min(POINTS if not still else len(theta), max(2, left // (2 * (1 if still else FEWEST))))
    theta, moved, g = theta[:points], moved[:points], g[:points]
    before: list[Fields] = []
    after: list[Fields] = []
    while len(before) < (1 if still else max(FEWEST, left // (2 * points))):
        if before and time.monotonic() > deadline:
            break
        before.append(_acted(simulator, action, g, runs(theta), runs.seed + len(before)))
        after.append(runs(moved))
    if not still and len(before) < FEWEST:
        too_slow = f"simulations took longer than their budget: {len(before)} of the {FEWEST} that the two-sample test needs at each point"
        return _Compared(kept, None, None, None, signal, too_slow)
    a, b = ({k: np.stack([r[k] for r in part], 1) for k in simulator.x.shapes} for part in (before, after))  # (points, n, ...)
    difference, a, b = _fixed(a, b, len(before))
    measured = [d for d in (signal, difference) if d is not None]
    p_value = shift = ratio = None
    said = f"{len(before)} simulations of each kind at {points} points"
    if a.shape[-1]:
        p_value, shift, ratio = two_sample(a, b, runs.seed)
    return _Compared(kept, p_value, shift, ratio, max(measured) if measured else None, said)


def _points(prior: Prior, action: GroupAction, which: Sequence[bool], seed: int, count: int = 64) -> tuple[Any, Any, Tensor, float]:
    """theta and g theta (count, D), both of the prior's support, g (count, S), and the share of draws in which g theta stays inside."""
    rng = np.random.default_rng([seed, 1])
    columns = [prior.names.index(p) for p in action.parameters]
    sizes, drawn, theta, there, g = [f.size for f in action.factors], 0, [], [], []
    while sum(map(len, theta)) < count and drawn < 100 * count:
        old, new = prior.sample(rng, count), prior.sample(rng, count)
        p, q = (action.pose_of(torch.as_tensor(t[:, columns])) for t in (old, new))
        between, e = action.compose(q, action.inverse(p)).split(sizes, -1), action.identity(count).split(sizes, -1)
        element = torch.cat([x if w else y for x, y, w in zip(between, e, which, strict=True)], -1)
        moved = old.copy()
        if action.moves:
            moved[:, columns] = action.act_theta(element, torch.as_tensor(old[:, columns]))[0].numpy()
        inside, drawn = prior.contains(moved), drawn + count
        theta.append(old[inside])
        there.append(moved[inside])
        g.append(element[torch.as_tensor(inside)])
    found = sum(map(len, theta))
    if found < count:
        raise SymmetryError(f"{name_of(action)}: g theta leaves the prior's support in {1 - found / drawn:.1%} of draws, though g carries "
                            "theta to the pose of another draw; widen the prior of what the action moves, or mend act_theta")
    return np.concatenate(theta)[:count], np.concatenate(there)[:count], torch.cat(g)[:count], found / drawn


def _acted(simulator: Simulator, action: GroupAction, g: Tensor, x: Fields, seed: int) -> Fields:
    """T_g x in the simulator's dtype, in a random order where it has none; rows that are not finite stay so."""
    tensors = {k: torch.as_tensor(v).to(getattr(torch, simulator.x.dtype)) for k, v in x.items()}
    with users(action, "act_data"):
        moved = action.act_data(g, tensors)
        if action.canonical:
            standard = action.act_data(action.identity(len(g)), tensors)
            if any(not torch.equal(standard[k], tensors[k]) for k in tensors):  # else the simulator gives the standard form itself
                moved = action.scramble(moved, torch.Generator().manual_seed(seed))
    return {k: v.double().numpy() for k, v in moved.items()}


def _signal_difference(simulator: Simulator, action: GroupAction, theta: Any, moved: Any, g: Tensor) -> float | None:
    """Relative RMS difference of signals, where banks hold signals that look like x and are functions of theta."""
    if simulator.observe is None or simulator.signal.shapes != simulator.x.shapes or action.canonical:
        return None

    def signals(of: NDArray[np.float64], seed: int) -> Fields:
        rngs = [np.random.default_rng([seed, row]) for row in range(len(of))]
        if simulator.batched:
            return simulator.conform(simulator(of, rngs[0]), (len(of),))
        rows = [{k: v.copy() for k, v in simulator.conform(simulator(t, rng)).items()} for t, rng in zip(of, rngs, strict=True)]
        return {k: np.stack([r[k] for r in rows]) for k in simulator.signal.shapes}

    count = min(len(theta), 8)
    here, again = signals(theta[:count], 1), signals(theta[:count], 2)
    if any(not np.array_equal(here[k], again[k]) for k in here):
        return None
    there = signals(moved[:count], 3)
    acted = _acted(simulator, action, g[:count], here, 0)
    flat = {k: (acted[k].reshape(count, -1), there[k].astype(float).reshape(count, -1)) for k in there}
    return max(_relative(ours, theirs, theirs) for ours, theirs in flat.values())


def _relative(a: NDArray[np.float64], b: NDArray[np.float64], field: NDArray[np.float64]) -> float:
    """RMS of a - b (points, some), over that of their whole field (points, all) about its mean over points, or of itself if that is 0."""
    whole = np.isfinite(a).all(-1) & np.isfinite(field).all(-1)
    values, error = field[whole], _rms((a - b)[whole])
    size = max(_rms(values - values.mean(0)) if len(values) else 0.0, FIXED * _rms(values))
    return error / size if size > 0 else 0.0 if error == 0 else math.inf


def _range(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """The range of the finite values along axis 1; -inf of none."""
    good = np.isfinite(values)
    return np.where(good, values, -np.inf).max(1) - np.where(good, values, np.inf).min(1)


def _rms(values: NDArray[np.float64]) -> float:
    return float(np.sqrt(np.mean(np.square(values)))) if values.size else 0.0


def _fixed(a: Fields, b: Fields, count: int) -> tuple[float | None, NDArray[np.float64], NDArray[np.float64]]:
    """Relative RMS difference of the numbers of x that are functions of theta, and the others, both (points, n, numbers)."""
    worst: float | None = None
    noisy: tuple[list[Any], list[Any]] = ([], [])
    for k in a:
        points = len(a[k])
        flat = [v[k].reshape(points, count, -1) for v in (a, b)]
        size = max(_rms(v[np.isfinite(v)]) for v in flat)
        still = np.all([_range(v) <= FIXED * size for v in flat], axis=(0, 1))
        if still.any():
            ours, theirs = (v[:, 0, still] for v in flat)
            worst = max(worst or 0.0, _relative(ours, theirs, flat[1][:, 0]))
        for part, v in zip(noisy, flat, strict=True):
            part.append(v[:, :, ~still])
    return worst, *(np.concatenate(part, -1) for part in noisy)


