r"""The laws that any action must keep, which need no simulations.

With g, h, k between poses of the prior: the parameters exist; act_data keeps fields, shapes and dtypes; e g = g, g (h k) = (g h) k,
g^-1 g = e, and the same of the actions on theta and x; p(g theta) = g p(theta); the log-dets of act_theta and chart against autograd;
chart and log against their inverses; `log_volume` by left invariance,

.. math:: J(v) / J(0) = |\det \partial_w \log(\exp(v) \exp(w))|^{-1}_{w = 0},

and a kernel moves with its pose.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sbiplat.errors import SymmetryError, UserError
from sbiplat.observation import Fields, ObservationSpec
from sbiplat.prior import Prior
from sbiplat.symmetry.action import GroupAction
from sbiplat.symmetry.frame import check_names, name_of

ROUNDING = 1e-6  # of elements and theta, in units of their spread
DATA_ROUNDING = 1e-4  # of x in float32, relative RMS
METHODS = {  # that a law is of
    "identity": "identity and compose", "associativity": "compose", "inverse": "inverse and compose", "exp of log": "exp and log",
    "theta, identity": "identity and act_theta", "theta, inverse": "inverse and act_theta", "theta, composition": "compose and act_theta",
    "theta, log of g": "exp and log", "pose": "pose_of, compose and act_theta", "chart": "chart and unchart"}
KERNEL_DRAWS, KERNEL_ERRORS = 4096, 6.0  # and standard errors


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
        with users(action, "its group operations"):
            self.pose = _shaped(action, "pose_of", action.pose_of(self.theta), (count, action.size))
            others = [action.pose_of(d) for d in draws[1:]]
            self.g, self.h, self.k = (action.compose(p, action.inverse(self.pose)) for p in others)
            for what, value in (("compose", self.g), ("identity", action.identity(count))):
                _shaped(action, what, value, (count, action.size))
            self.e = action.identity(count)
            v = _shaped(action, "log", action.log(self.g), (count, len(action.coordinates)))
        self.scale = v.square().mean(0).sqrt().clamp(min=1e-300)
        if len(self.scale) and float(self.scale.min()) < 1e-12:
            name = action.coordinates[int(self.scale.argmin())]
            raise SymmetryError(f"{name_of(action)}: the pose's coordinate {name} is the same for all theta of the prior; nothing is "
                                "standardised by it")


def _apart(action: GroupAction, g: Tensor, h: Tensor, scale: Tensor) -> float:
    """The largest coordinate of g^-1 h in units of `scale`, of the nearest over the stabiliser and its preimages."""
    if not len(scale):
        return 0.0
    if torch.allclose(g, h, rtol=1e-12, atol=0.0):
        return 0.0
    worst, sizes = 0.0, [f.size for f in action.factors]
    dims = [len(f.coordinates) for f in action.factors]
    for f, a, b, s in zip(action.factors, g.split(sizes, -1), h.split(sizes, -1), scale.split(dims), strict=True):
        if len(s):
            near = torch.stack(list(f.preimages(f.between(a, b))))
            worst = max(worst, (near / s).abs().amax(-1).amin(0).max().item())
    return worst


def _group_laws(action: GroupAction, rows: _Rows) -> dict[str, float]:
    g, h, k, e = rows.g, rows.h, rows.k, rows.e
    with users(action, "its group operations"):
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
    with users(action, "act_theta"):
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
    with users(action, "chart"):
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
    with users(action, "its coordinates"):
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
        _check_kernel(action, rows)
    return _held(action, figures, 1e-5, {"log of exp": "log(exp(v)) = v near 0", "exp of 0": "exp(0) = e",
                                         "log_volume": "log_volume(v) = the left-invariant density at v",
                                         "kernel": "K(h proxy | h pose) = K(proxy | pose)"})


def _check_kernel(action: GroupAction, rows: _Rows) -> None:
    """That blur draws from the density log_kernel, by E_K[K' / K] = 1 for a narrower K'; and from the generator that it is given."""
    at, widths = rows.pose[:1].expand(KERNEL_DRAWS, -1), 0.2 * rows.scale

    def draws() -> Tensor:
        return action.blur(at, widths, torch.Generator().manual_seed(1))

    proxy = draws()
    if not torch.equal(proxy, draws()):
        raise SymmetryError(f"{name_of(action)}: blur gives other proxies for the same generator; draw all its noise from that")
    for share in (0.8, 0.9):
        ratio = (action.log_kernel(proxy, at, share * widths) - action.log_kernel(proxy, at, widths)).exp()
        off, error = float(ratio.mean()) - 1, float(ratio.std()) / math.sqrt(len(ratio))
        if error == 0.0 or abs(off) > KERNEL_ERRORS * error + 1e-3:
            raise SymmetryError(f"{name_of(action)}: log_kernel is not the density of what blur draws: the mean of K({share} widths) / "
                                f"K(widths) over its proxies is {1 + off:.3g}, not 1; override neither, or both alike")


def _laws_on_data(action: GroupAction, rows: _Rows, x: dict[str, Tensor]) -> dict[str, float]:
    g, h, e = rows.g, rows.h, rows.e
    with users(action, "act_data"):
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
            see = f"; see its {METHODS[name]}" if name in METHODS and not mend else mend
            raise SymmetryError(f"{name_of(action)}: {laws.get(name, name)} fails by {error:.2g}{see}")
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
def users(action: GroupAction, what: str) -> Iterator[None]:
    """What a user's action raises, in one line."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # the user's own code: anything may come
        text = str(error).split("\n")[0][:300]
        raise SymmetryError(f"{name_of(action)}: {what} failed: {type(error).__name__}: {text}") from error
