r"""Whitened observations: the space in which data are perturbed, and the sets that perturbations stay in.

A feature f that varies over the bank, and is no mask, is moved by :math:`\delta_f` of its robust standard deviations, after the transform t
that its simulator declares,

.. math:: t(x'_f) = t(x_f) + s_f \, \delta_f, \qquad \epsilon = \Big( \frac1F \sum_f \delta_f^2 \Big)^{1/2}

for F such features: eps is their root mean square (`l2`), or the largest of them (`linf`). What does not vary, masks, and elements that a
mask leaves out stay as they are.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sbiplat.errors import SettingError
from sbiplat.nets.standardise import robust_scale, transform
from sbiplat.observation import Fields, ObservationSpec

NORMS = ("l2", "linf")
Data = dict[str, Tensor]
_INVERSE: Mapping[str, Callable[[Tensor], Tensor]] = {"none": lambda t: t, "log": torch.exp, "asinh": torch.sinh}


@dataclass(frozen=True)
class Limits:
    """The user's set, which perturbed data stay in: convex in whitened x, and holding the data themselves.

    low, high: of x in its own units, a number or an array like x (by name where x is a dict). features: true where x may be changed, an
    array like x. project: (x', x) -> the point of the set next to x', for batches of x as `posterior.sample` takes them.
    """

    low: Any = None
    high: Any = None
    features: Any = None
    project: Callable[[Any, Any], Any] | None = None


@dataclass(frozen=True)
class Whitening:
    """Scales of the F features that may be moved. places: by field, their indices in the flattened field. masks: field -> its mask."""

    spec: ObservationSpec
    scale: dict[str, Tensor]
    places: dict[str, Tensor]
    masks: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def fit(cls, spec: ObservationSpec, rows: Fields, masks: Mapping[str, str] | None = None, features: Any = None) -> Whitening:
        """From rows of the bank (N, ...); raises SettingError where nothing may be moved."""
        masks = dict(masks or {})
        chosen = None if features is None else _like(features, spec, "features")
        scale, places = {}, {}
        for name, how in spec.transform.items():
            if name in masks.values():
                continue
            raw = np.asarray(rows[name]).reshape(len(rows[name]), -1)
            values = transform(torch.as_tensor(raw.astype(float)), how).numpy()
            free = (raw != raw[:1]).any(0)
            if chosen is not None:
                free &= chosen[name].astype(bool)
            found = robust_scale(values)[1]
            if name in masks:
                present = np.repeat(np.asarray(rows[masks[name]]).astype(bool), raw.shape[1] // spec.shapes[name][0], axis=1)
                found = np.array([robust_scale(v[p])[1] if p.any() else 1.0 for v, p in zip(values.T, present.T, strict=True)])
            places[name] = torch.as_tensor(np.flatnonzero(free))
            scale[name] = torch.as_tensor(found[free])
        if not sum(map(len, places.values())):
            raise SettingError("no feature of x may be perturbed: each is constant over the bank, a mask, or left out by `features`")
        return cls(spec, scale, places, masks)

    @property
    def size(self) -> int:
        """F."""
        return sum(map(len, self.places.values()))

    @property
    def names(self) -> list[str]:
        """Of each feature, by its label where x has labels along its only axis."""
        out = []
        for name, places in self.places.items():
            shape = self.spec.shapes[name]
            for k in places.tolist():
                where = ", ".join(str(int(i)) for i in np.unravel_index(k, shape)) if shape else ""
                labelled = self.spec.plain and len(shape) == 1 and self.spec.labels
                out.append(self.spec.labels[k] if labelled else f"{name}[{where}]" if where else name)
        return out

    def free(self, x: Data) -> Tensor:
        """Which features of each observation may be moved, (B, F)."""
        parts = []
        for name, places in self.places.items():
            here = torch.ones(len(x[name]), len(places), dtype=torch.bool, device=x[name].device)
            if name in self.masks:
                width = x[name][0].numel() // self.spec.shapes[name][0]
                here = (x[self.masks[name]] > 0.5).repeat_interleave(width, dim=1)[:, places]
            parts.append(here)
        return torch.cat(parts, dim=1)

    def whiten(self, x: Data) -> Tensor:
        """t(x) / s of the features, (B, F), float64: only differences mean something."""
        parts = []
        for name, places in self.places.items():
            numbers = x[name].reshape(len(x[name]), -1).double()[:, places]
            parts.append(transform(numbers, self.spec.transform[name]) / self.scale[name].to(numbers.device))
        return torch.cat(parts, dim=1)

    def move(self, x: Data, delta: Tensor) -> Data:
        """x moved by delta (B, F), differentiable in delta, in x's own dtype; what delta does not change stays as it is."""
        out, first = dict(x), 0
        for name, places in self.places.items():
            how, flat = self.spec.transform[name], x[name].reshape(len(x[name]), -1)
            part = delta[:, first:first + len(places)].double()
            first += len(places)
            here = flat[:, places].double()
            moved = _INVERSE[how](transform(here, how) + part * self.scale[name].to(flat.device))
            moved = torch.where(part == 0, here + 0 * part, moved)
            out[name] = flat.index_copy(1, places.to(flat.device), moved.to(flat.dtype)).reshape(x[name].shape)
        return out


@dataclass(frozen=True)
class Ball:
    """Perturbations of size at most eps within the user's limits, around B observations."""

    whitening: Whitening
    x: Data
    eps: float
    norm: str = "l2"
    limits: Limits = Limits()

    def __post_init__(self) -> None:
        if self.norm not in NORMS:
            raise SettingError(f"norm = {self.norm!r}: expected one of {', '.join(NORMS)}")
        if not self.eps > 0:
            raise SettingError(f"eps = {self.eps!r}: a perturbation's size must be above 0")
        object.__setattr__(self, "_free", self.whitening.free(self.x))
        object.__setattr__(self, "_box", self._bounds())

    @property
    def free(self) -> Tensor:
        """(B, F)."""
        return self._free  # type: ignore[attr-defined]

    @property
    def radius(self) -> Tensor:
        """Of the L2 ball, (B, 1): eps sqrt(F) for F features that may be moved."""
        return self.eps * self.free.sum(1, keepdim=True).clamp_min(1).sqrt()

    def size(self, delta: Tensor) -> Tensor:
        """eps of delta (..., B, F) in the norm: (..., B)."""
        if self.norm == "linf":
            return delta.abs().amax(-1)
        return (delta.square().sum(-1) / self.free.sum(1).clamp_min(1)).sqrt()

    def project(self, delta: Tensor) -> Tensor:
        """delta (R, B, F) into the set: clamped to the limits, then drawn towards 0 until it is small enough."""
        delta = delta * self.free
        low, high = self._box  # type: ignore[attr-defined]
        if low is not None:
            delta = torch.minimum(torch.maximum(delta, low), high)
        if self.limits.project is not None:
            delta = torch.stack([self._projected(part) for part in delta])
        if self.norm == "linf" and self.limits.project is None:
            return delta.clamp(-self.eps, self.eps)
        return delta * (self.eps / self.size(delta).clamp_min(1e-30)).clamp_max(1.0)[..., None]

    def random(self, restarts: int, generator: torch.Generator) -> Tensor:
        """Noise of size eps, (R, B, F): Gaussian directions (l2), random signs (linf)."""
        noise = torch.randn((restarts, *self.free.shape), generator=generator, dtype=torch.float64, device=self.free.device) * self.free
        if self.norm == "linf":
            return self.project(self.eps * noise.sign())
        return self.project(noise * (self.eps / self.size(noise).clamp_min(1e-30))[..., None])

    def moved(self, delta: Tensor) -> Data:
        """x moved by (B, F)."""
        return self.whitening.move(self.x, delta)

    def _bounds(self) -> tuple[Tensor | None, Tensor | None]:
        """Of delta, (B, F), by the limits of x; x itself always lies within."""
        if self.limits.low is None and self.limits.high is None:
            return None, None
        ends = []
        for end, value in (("low", self.limits.low), ("high", self.limits.high)):
            sign = -1.0 if end == "low" else 1.0
            if value is None:
                ends.append(torch.full(self.free.shape, sign * torch.inf, dtype=torch.float64, device=self.free.device))
                continue
            given = {k: torch.as_tensor(v[None], device=self.free.device) for k, v in _like(value, self.whitening.spec, end).items()}
            gap = self.whitening.whiten(given) - self.whitening.whiten(self.x)
            ends.append(gap.nan_to_num(sign * torch.inf, torch.inf, -torch.inf))
        return ends[0].clamp_max(0.0), ends[1].clamp_min(0.0)

    def _projected(self, delta: Tensor) -> Tensor:
        spec = self.whitening.spec
        moved, clean = ({k: v.detach().cpu().numpy() for k, v in x.items()} for x in (self.moved(delta), self.x))
        found = spec.conform(self.limits.project(spec.unwrap(moved), spec.unwrap(clean)), (len(delta),))  # type: ignore[misc]
        tensors = {k: torch.as_tensor(v, device=delta.device) for k, v in found.items()}
        return (self.whitening.whiten(tensors) - self.whitening.whiten(self.x)) * self.free


def _like(value: Any, spec: ObservationSpec, what: str) -> dict[str, NDArray[Any]]:
    """A number, or arrays like x, as an array of each field's shape; raises SettingError."""
    named = value if isinstance(value, Mapping) else dict.fromkeys(spec.shapes, value)
    out = {}
    for name, shape in spec.shapes.items():
        try:
            out[name] = np.broadcast_to(np.asarray(named[name], float), shape).copy()
        except (KeyError, TypeError, ValueError):
            raise SettingError(f"{what} of perturbed x must be a number or of x's shape, {spec.shape_text()}; {name} is not") from None
    return out
