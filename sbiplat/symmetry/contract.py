r"""What every action must keep: the laws of a group, and that the simulator has the symmetry.

`check_algebra` needs no simulations. With g, h, k between poses of the prior it tests that the parameters exist; that act_data keeps
fields, shapes and dtypes; e g = g, g (h k) = (g h) k, g^-1 g = e, and the same of the actions on theta and x; p(g theta) = g p(theta); the
log-dets of act_theta and chart against autograd; chart and log against their inverses; `log_volume` by left invariance,

.. math:: J(v) / J(0) = |\det \partial_w \log(\exp(v) \exp(w))|^{-1}_{w = 0},

and that a kernel moves with its pose. `check_action` adds simulations: at points theta of the prior, with g that carries theta to the pose
of another draw, it compares T_g x, x ~ p(x | theta), with x' ~ p(x | g theta). Where x is a function of theta, by their relative RMS
difference. Where it is random, by a permutation test: within a point all x are exchangeable under the null, so the p-value of the
largest of several standardised statistics is exact, whatever the law of x; an exact action is refused at `LEVEL`. The statistics: means
and spreads of normal scores, a number of x at a time, by point and over all points; the energy distance; and the difference of means
along the median itself and its slope, which is where a slightly wrong scale or shift shows.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import special, stats
from torch import Tensor

from sbiplat.errors import SymmetryError, UserError
from sbiplat.observation import Fields, ObservationSpec
from sbiplat.prior import Prior
from sbiplat.simulator import Simulator
from sbiplat.symmetry.action import GroupAction
from sbiplat.symmetry.frame import check_names, name_of
from sbiplat.symmetry.names import resolve_action

LEVEL = 0.001  # of the two-sample test: so often an action that is exact is refused
TOLERANCE = 0.01  # relative RMS difference that an exact action may leave in what is a function of theta
ROUNDING = 1e-6  # of elements and theta, in units of their spread
DATA_ROUNDING = 1e-4  # of x in float32, relative RMS
FIXED = 1e-5  # spread of a number of x, relative to its field, below which it is no noise
PERMUTATIONS = 1999
POINTS = 16
TRIALS = 4  # theta that are simulated twice, to see whether x is a function of theta
FEWEST = 8  # simulations of a kind at a point
NUMBERS = 2048  # of x that the test looks at, at most


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


# ------------------------------------------------------------------------------------------------------ the algebra


def check_algebra(action: GroupAction, prior: Prior, spec: ObservationSpec, seed: int = 0, x: Fields | None = None) -> dict[str, float]:
    """The largest relative error of each law; raises SymmetryError at the first that does not hold.

    x: simulations (numpy, with a leading axis) to act on, by default random numbers of the form `spec`.
    """
    if not isinstance(action, GroupAction):
        raise SymmetryError(f"symmetry = {action!r}: expected a GroupAction")
    check_names(action, prior)
    generator = torch.Generator().manual_seed(seed)
    rows = _Rows(action, prior, seed)
    figures = {**_group_laws(action, rows), **_laws_on_theta(action, rows, generator), **_laws_of_coordinates(action, rows, generator)}
    return {**figures, **_laws_on_data(action, rows, _data(spec, x, rows.count, generator))}


class _Rows:
    """theta (count, k) of the prior, the poses, and elements g, h and k between poses; `scale`: RMS coordinates of g."""

    def __init__(self, action: GroupAction, prior: Prior, seed: int, count: int = 32) -> None:
        rng, self.count = np.random.default_rng(seed), count
        columns = [prior.names.index(p) for p in action.parameters]
        draws = [torch.as_tensor(prior.sample(rng, count)[:, columns]) for _ in range(4)]
        self.theta = draws[0]
        self.spread = torch.cat(draws).std(0, correction=0).clamp(min=1e-300) if columns else draws[0].new_zeros(0)
        with _told(action, "its group operations"):
            self.pose = _shaped(action, "pose_of", action.pose_of(self.theta), (count, action.size))
            others = [action.pose_of(d) for d in draws[1:]]
            self.g, self.h, self.k = (action.compose(p, action.inverse(self.pose)) for p in others)
            for what, value in (("compose", self.g), ("identity", action.identity(count))):
                _shaped(action, what, value, (count, action.size))
            self.e = action.identity(count)
            v = _shaped(action, "log", action.log(self.g), (count, len(action.coordinates)))
        self.scale = v.square().mean(0).sqrt().clamp(min=1e-300)


def _apart(action: GroupAction, g: Tensor, h: Tensor, scale: Tensor) -> float:
    """The largest coordinate of g^-1 h in units of `scale`, of the nearest over the stabiliser and its preimages."""
    if not len(scale):
        return 0.0
    if torch.allclose(g, h, rtol=1e-12, atol=0.0):
        return 0.0
    near = torch.stack(list(action.preimages(action.between(g, h))))
    return (near / scale).abs().amax(-1).amin(0).max().item()


def _group_laws(action: GroupAction, rows: _Rows) -> dict[str, float]:
    g, h, k, e = rows.g, rows.h, rows.k, rows.e
    with _told(action, "its group operations"):
        compose = action.compose
        figures = {
            "identity": _largest(_apart(action, compose(e, g), g, rows.scale), _apart(action, compose(g, e), g, rows.scale)),
            "inverse": _largest(_apart(action, compose(action.inverse(g), g), e, rows.scale),
                           _apart(action, action.inverse(action.inverse(g)), g, rows.scale)),
            "associativity": _apart(action, compose(compose(g, h), k), compose(g, compose(h, k)), rows.scale),
            "exp of log": _apart(action, action.exp(action.log(g)), g, rows.scale),
        }
    told = {"identity": "e g = g = g e", "associativity": "(g h) k = g (h k)", "inverse": "g^-1 g = e", "exp of log": "exp(log(g)) = g"}
    return _held(action, figures, ROUNDING, told)


def _laws_on_theta(action: GroupAction, rows: _Rows, generator: torch.Generator) -> dict[str, float]:
    if not action.moves:
        return {}
    theta, g, h, spread = rows.theta, rows.g, rows.h, rows.spread
    with _told(action, "act_theta"):
        moved, log_det = action.act_theta(g, theta)
        _shaped(action, "act_theta", moved, tuple(theta.shape))
        _shaped(action, "act_theta's log-det", log_det, (rows.count,))
        figures = {
            "theta, identity": _error(action.act_theta(rows.e, theta)[0], theta),
            "theta, inverse": _error(action.act_theta(action.inverse(g), moved)[0], theta),
            "theta, composition": _error(action.act_theta(h, moved)[0], action.act_theta(action.compose(h, g), theta)[0]),
            "theta, log of g": _error(action.act_theta(action.exp(action.log(g)), theta)[0], moved),
            "log-det": _worst_log_det(lambda t, at: action.act_theta(g[at], t), theta, spread),
        }
        independence = _independence(action, rows)
        sizes = [f.size for f in action.factors]
        parts = zip(action.factors, g.split(sizes, -1), rows.e.split(sizes, -1), strict=True)
        mover = torch.cat([a if f.moves else b for f, a, b in parts], -1)
        figures["pose"] = _apart(action, action.pose_of(action.act_theta(mover, theta)[0]), action.compose(mover, rows.pose), rows.scale)
    with _told(action, "chart"):
        near = action.blur(rows.pose, 0.3 * rows.scale, generator)
        relative = action.act_theta(action.inverse(near), theta)[0]
        u, u_log_det = action.chart(relative)
        _shaped(action, "chart", u, tuple(theta.shape))
        _shaped(action, "chart's log-det", u_log_det, (rows.count,))
        figures["chart"] = _error(action.unchart(u), relative)
        figures["chart, log-det"] = _worst_log_det(lambda t, at: action.chart(t), relative, spread)
    _held(action, figures, ROUNDING, {
        "theta, identity": "e theta = theta", "theta, inverse": "g^-1 (g theta) = theta", "theta, composition": "h (g theta) = (h g) theta",
        "theta, log of g": "exp(log(g)) theta = g theta", "pose": "pose_of(g theta) = g pose_of(theta)",
        "log-det": "act_theta's log-det = log |det d(g theta) / d theta| by autograd", "chart": "unchart(chart(theta)) = theta",
        "chart, log-det": "chart's log-det = log |det du / d theta| by autograd"})
    return {**figures, **independence}


def _independence(action: GroupAction, rows: _Rows) -> dict[str, float]:
    """That the pose of each factor stays where the others move."""
    worst, sizes, dims = 0.0, [f.size for f in action.factors], [len(f.coordinates) for f in action.factors]
    if len(sizes) < 2:
        return {}
    e, g, scales = rows.e.split(sizes, -1), rows.g.split(sizes, -1), rows.scale.split(dims)
    for i, mover in enumerate(action.factors):
        if not mover.moves:
            continue
        alone = torch.cat([g[j] if j == i else e[j] for j in range(len(sizes))], -1)
        there = action.pose_of(action.act_theta(alone, rows.theta)[0]).split(sizes, -1)
        here = rows.pose.split(sizes, -1)
        for j, other in enumerate(action.factors):
            if j != i:
                error = _apart(other, there[j], here[j], scales[j])
                if not error <= ROUNDING:
                    raise SymmetryError(f"{name_of(action)}: the pose of {name_of(other)} changes by {error:.2g} of its spread when "
                                        f"{name_of(mover)} acts; factors of a product must leave each other's poses")
                worst = _largest(worst, error)
    return {"poses of other factors": worst}


def _laws_of_coordinates(action: GroupAction, rows: _Rows, generator: torch.Generator) -> dict[str, float]:
    """Of log, exp, log_volume and the kernel."""
    dims = len(action.coordinates)
    if not dims:
        return {}
    with _told(action, "its coordinates"):
        random = torch.randn(rows.count, dims, generator=generator, dtype=torch.float64) * rows.scale
        small, v = 1e-3 * random, 0.3 * random
        figures = {"log of exp": _error(action.log(action.exp(small)), small),
                   "exp of 0": _apart(action, action.exp(torch.zeros_like(v)), rows.e, rows.scale)}

        def log_of(w: Tensor, at: slice) -> tuple[Tensor, Tensor]:
            return action.log(action.compose(action.exp(v[at]), action.exp(w))), action.log_volume(0 * v[at]) - action.log_volume(v[at])

        # at a small w, not at 0, where a norm has no derivative; J(w) corrects for it to the order of rounding
        figures["log_volume"] = _worst_log_det(log_of, 1e-9 * random, rows.scale)
        widths = (0.2 * rows.scale).expand(rows.count, -1)
        proxy = action.blur(rows.pose, widths, generator)
        density = action.log_kernel(proxy, rows.pose, widths)
        if not (torch.isfinite(density).all() and density.shape == (rows.count,)):
            raise SymmetryError(f"{name_of(action)}: log_kernel must give a finite number a row for the proxies that blur draws")
        moved = action.log_kernel(action.compose(rows.h, proxy), action.compose(rows.h, rows.pose), widths)
        figures["kernel"] = (moved - density).abs().max().item()
    return _held(action, figures, 1e-5, {"log of exp": "log(exp(v)) = v near 0", "exp of 0": "exp(0) = e",
                                         "log_volume": "log_volume(v) = the left-invariant density at v",
                                         "kernel": "K(h proxy | h pose) = K(proxy | pose)"})


def _laws_on_data(action: GroupAction, rows: _Rows, x: dict[str, Tensor]) -> dict[str, float]:
    g, h, e = rows.g, rows.h, rows.e
    with _told(action, "act_data"):
        given = {k: v.clone() for k, v in x.items()}
        moved = action.act_data(g, x)
        _check_form(action, moved, given)
        if any(not torch.equal(x[k], given[k]) for k in x):
            raise SymmetryError(f"{name_of(action)}: act_data writes to the x that it is given; return new tensors")
        there = action.act_data(e, x)
        start = there if action.canonical else x
        figures = {"x, identity": _apart_data(action.act_data(e, start), start)}
        laws = {"x, inverse": _apart_data(action.act_data(action.inverse(g), moved), start, moved),
                "x, composition": _apart_data(action.act_data(h, moved), action.act_data(action.compose(h, g), x), moved)}
        again = _apart_data(action.act_data(action.exp(action.log(g)), x), moved)
    _held(action, figures, DATA_ROUNDING, {"x, identity": "T_e x = x"})
    if action.exact:
        _held(action, {**laws, "x, log of g": again}, DATA_ROUNDING,
              {"x, inverse": "T_g^-1 T_g x = x", "x, composition": "T_h T_g x = T_hg x", "x, log of g": "T_exp(log(g)) x = T_g x"},
              "; mend act_data, or declare exact=False")
    return {**figures, **laws}


def _data(spec: ObservationSpec, x: Fields | None, count: int, generator: torch.Generator) -> dict[str, Tensor]:
    dtype = getattr(torch, spec.dtype)
    if x is None:
        return {k: torch.randn(count, *shape, generator=generator, dtype=dtype) for k, shape in spec.shapes.items()}
    good = np.flatnonzero(np.all([np.isfinite(v).reshape(len(v), -1).all(-1) for v in x.values()], axis=0))
    if not len(good):
        raise SymmetryError("no row of x is finite: an action cannot be checked on it")
    return {k: torch.as_tensor(v[np.resize(good, count)]).to(dtype) for k, v in x.items()}


def _check_form(action: GroupAction, moved: Any, x: dict[str, Tensor]) -> None:
    if not isinstance(moved, dict) or set(moved) != set(x):
        has = ", ".join(moved) if isinstance(moved, dict) else type(moved).__name__
        raise SymmetryError(f"{name_of(action)}: act_data must return the fields {', '.join(x)}, got {has}")
    for name, values in x.items():
        found = moved[name]
        if not isinstance(found, Tensor) or found.shape != values.shape or found.dtype != values.dtype:
            got = f"{tuple(found.shape)} {found.dtype}" if isinstance(found, Tensor) else type(found).__name__
            raise SymmetryError(f"{name_of(action)}: act_data must keep shapes and dtypes: it made {got} of {name!r}, which is "
                                f"{tuple(values.shape)} {values.dtype}")
        if not torch.isfinite(found).all():
            raise SymmetryError(f"{name_of(action)}: act_data made NaN or infinite values of a finite {name!r}")


def _held(action: GroupAction, figures: dict[str, float], limit: float, laws: dict[str, str], mend: str = "") -> dict[str, float]:
    for name, error in figures.items():
        if not error <= limit:
            raise SymmetryError(f"{name_of(action)}: {laws.get(name, name)} fails by {error:.2g}{mend}")
    return figures


def _shaped(action: GroupAction, what: str, value: Any, shape: tuple[int, ...]) -> Tensor:
    if not isinstance(value, Tensor) or tuple(value.shape) != shape or value.dtype != torch.float64 or not torch.isfinite(value).all():
        got = f"{tuple(value.shape)} {value.dtype}" if isinstance(value, Tensor) else type(value).__name__
        raise SymmetryError(f"{name_of(action)}: {what} must give finite torch.float64 of shape {shape}, got {got}")
    return value


def _largest(*values: float) -> float:
    """The largest, and NaN if one is."""
    return float(np.max(values))


def _error(a: Tensor, b: Tensor) -> float:
    """The largest difference, in units of the spread of b's column over rows, with leave for the rounding of b."""
    return ((a - b).abs() / (b.std(0, correction=0) + 1e-8 * b.abs().amax(0) + 1e-300)).max().item() if b.numel() else 0.0


def _apart_data(a: dict[str, Tensor], b: dict[str, Tensor], between: dict[str, Tensor] | None = None) -> float:
    """The largest RMS difference of a row's field, relative to its RMS in b, or `between` where that is larger: there it was rounded."""
    def rms(values: Tensor) -> Tensor:
        return values.double().reshape(len(values), -1).square().mean(-1).sqrt()

    worst = 0.0
    for k in a:
        size = rms(b[k]) if between is None else torch.maximum(rms(b[k]), rms(between[k]))
        worst = _largest(worst, (rms(a[k] - b[k]) / size.clamp(min=1e-300)).max().item())
    return worst


def _worst_log_det(function: Callable[[Tensor, slice], tuple[Tensor, Tensor]], at: Tensor, scale: Tensor, count: int = 8) -> float:
    """The largest error of the log-dets that `function` gives beside its values, in `count` rows, against autograd.

    Where a function cannot be differentiated so, against central differences in steps of 1e-5 `scale`, beyond their accuracy.
    """
    worst = 0.0
    for k in range(min(count, len(at))):
        row = slice(k, k + 1)
        claimed, slack = function(at[row], row)[1].item(), 0.0
        try:
            jacobian = torch.autograd.functional.jacobian(lambda t, row=row: function(t[None], row)[0][0], at[k], strict=True)
        except RuntimeError:
            jacobian, slack = torch.stack([
                (function((at[k] + step)[None], row)[0] - function((at[k] - step)[None], row)[0])[0] / (2 * step.sum())
                for step in 1e-5 * torch.diag(scale)], -1), 1e-5
        worst = _largest(worst, abs(torch.linalg.slogdet(jacobian).logabsdet.item() - claimed) - slack)
    return worst


@contextmanager
def _told(action: GroupAction, what: str) -> Iterator[None]:
    """What a user's action raises, in one line."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # the user's own code: anything may come
        text = str(error).split("\n")[0][:300]
        raise SymmetryError(f"{name_of(action)}: {what} failed: {type(error).__name__}: {text}") from error


# -------------------------------------------------------------------------------------------------- the simulations


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
        p_value, shift, ratio = _two_sample(a, b, runs.seed)
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
    with _told(action, "act_data"):
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


# ---------------------------------------------------------------------------------------------- the two-sample test


def _two_sample(a: NDArray[np.float64], b: NDArray[np.float64], seed: int) -> tuple[float, float, float]:
    """The p-value of the permutation test, the shift of the means and the factor between the sds; a and b (points, n, numbers)."""
    rng = np.random.default_rng([seed, 2])
    if a.shape[-1] > NUMBERS:
        some = np.sort(rng.choice(a.shape[-1], NUMBERS, replace=False))
        a, b = a[..., some], b[..., some]
    whole = np.isfinite(a).all(-1) & np.isfinite(b).all(-1)
    totals, shifts, ratios = [], [], []
    pooled = 0.0
    for ours, theirs, good in zip(a, b, whole, strict=True):
        ours, theirs = ours[good], theirs[good]
        n = len(ours)
        if n < FEWEST:
            continue
        together = np.concatenate([ours, theirs])
        signs = np.repeat([1.0, -1.0], n)
        labels = np.stack([signs, *(rng.permutation(signs) for _ in range(PERMUTATIONS))]).astype(np.float32)
        kept, sums = _statistics(together, labels)
        totals.append(kept)
        pooled = pooled + sums
        variances = ours.var(0, ddof=1), theirs.var(0, ddof=1)
        noise = (variances[0] + variances[1]) / 2
        alive = noise > 0
        shifts.append(np.mean(np.square(ours.mean(0) - theirs.mean(0))[alive] / noise[alive]) - 2 / n)
        both = (variances[0] > 0) & (variances[1] > 0)
        if both.any():  # less what chance gives of Gaussian noise
            ratios.append((np.mean(np.log(variances[0][both] / variances[1][both])) / 2) ** 2 - 1 / ((n - 1) * both.sum()))
    if not totals:
        raise SymmetryError(f"too few finite simulations to compare: at no point {FEWEST} pairs; mend the simulator, or narrow its prior")
    statistics = np.concatenate([np.sum(totals, axis=0), np.square(pooled).sum(-1).T], axis=0)
    spread = statistics.std(1, keepdims=True)
    standard = (statistics - statistics.mean(1, keepdims=True)) / np.where(spread > 0, spread, 1)
    largest = standard.max(0)
    p_value = float(np.mean(largest >= largest[0] - 1e-9))
    return p_value, float(np.sqrt(max(np.mean(shifts), 0.0))), float(np.exp(np.sqrt(max(np.mean(ratios), 0.0)))) if ratios else 1.0


def _statistics(x: NDArray[np.float64], labels: NDArray[np.float32]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Of one point, x (2n, numbers), for each of the labels (P, 2n): statistics (S, P), and sums (P, 2, numbers) to pool over points."""
    count = len(x)
    ranks = stats.rankdata(x, axis=0)
    scores = special.ndtri((ranks - 0.5) / count)
    scores -= scores.mean(0)
    squares = np.square(scores)
    squares -= squares.mean(0)
    size = np.sqrt(np.mean(np.square(squares), axis=0))
    features = np.stack([scores, squares / np.where(size > 0, size, 1)]).astype(np.float32)  # (2, 2n, numbers)
    sums = np.stack([labels @ f for f in features], 1) / math.sqrt(count)
    low, middle, high = np.quantile(x, (0.25, 0.5, 0.75), axis=0)
    width = np.where(high > low, (high - low) / 1.35, x.std(0))  # an sd that heavy tails leave alone
    width = np.where(width > 0, width, 1.0)
    z = np.clip((x - middle) / width, -4, 4)
    distance = np.sqrt(np.maximum(np.square(z).sum(-1)[:, None] + np.square(z).sum(-1)[None] - 2 * z @ z.T, 0)).astype(np.float32)
    energy = -np.einsum("pi,pi->p", labels @ distance, labels) / count
    along = [middle / width, np.gradient(middle) / width] if x.shape[1] > 1 else [middle / width]
    directions = np.stack([d / (np.linalg.norm(d) or 1.0) for d in along])
    projected = np.square(labels @ (z @ directions.T).astype(np.float32)) / count
    return np.stack([*np.square(sums).sum(-1).T, np.square(sums).max((1, 2)), energy, *projected.T]), sums
