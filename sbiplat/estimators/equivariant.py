r"""Group-equivariant neural posterior estimation (GNPE; Dax et al., 2022) around an estimator of theta given x.

Two nets: the initial one learns the pose, q(p(theta) | x); the main one learns theta from x in the standard pose of a proxy,

.. math:: \min_q \; \mathbb{E}_{p(\theta) \, p(x | \theta) \, K(\hat g | p(\theta))} \;
          L_q \big( u(\theta, \hat g), \; T_{\hat g}^{-1} x \big) ,

with L the base's loss (npe, fmpe, npse), and fresh proxies in every step; see `symmetry.frame` for u. The initial net is trained before,
and frozen; it says how wide the kernel K is to be, at each x where posteriors of the pose are of very different spread, and where chains
begin (`posteriors.gnpe`). Where x tells little the main net is told too where the initial one sees the pose, from its proxy: else a net
that hardly sees a faint signal gives back the kernel, and its chains wander over the prior. Of clear signals it is not told: what the
initial net gets wrong is the same in every step of a chain, and what the main net gets wrong differs with the proxy. All nets are one
module with one set of weights.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields, replace
from typing import Any

import torch
from torch import Tensor

from sbiplat.errors import SettingError
from sbiplat.estimators.base import Architecture, Estimator, find
from sbiplat.estimators.conditioned import ConditionedSettings
from sbiplat.estimators.npe import NPE, NPESettings
from sbiplat.nets import embeddings
from sbiplat.nets.noise import Common
from sbiplat.nets.standardise import robust_scale
from sbiplat.prior import Prior
from sbiplat.settings import build as build_settings
from sbiplat.symmetry import names
from sbiplat.symmetry.frame import PROXY, Frame, Sight, centred, clipped
from sbiplat.symmetry.settings import GNPE, SymmetrySettings

INITIAL = "initial"
BASES = ("npe", "fmpe", "npse")  # nets of theta given x
SPREAD_DRAWS = 32
_SCALES_SEED = 0x6E9E
_SPREAD_SEED = 0x5EAD


def made(architecture: Architecture) -> Estimator:
    """The estimator of an architecture with a symmetry."""
    role = (architecture.symmetry or {}).get("role")
    if role not in KINDS:
        raise SettingError(f"its symmetry has the role {role!r}: expected one of {', '.join(KINDS)}")
    try:
        return KINDS[role](architecture)
    except (KeyError, AttributeError, IndexError, TypeError, ValueError, OverflowError, RuntimeError) as error:
        raise SettingError(f"its symmetry cannot act on this x: {type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
                           ) from error


def frame_of(symmetry: Mapping[str, Any]) -> Frame:
    """The frame that an architecture describes; raises SettingError where the action is a user's that this process does not know."""
    action = names.from_json(dict(symmetry["action"]))
    count = len(action.coordinates)
    if symmetry["role"] == INITIAL:
        widths, told, adaptive = [1.0] * count, [False] * count, False
    else:
        widths, told, adaptive = symmetry["widths"], symmetry["told"], symmetry.get("stretch") is not None
    if len(widths) != count or len(told) != count or not all(type(w) is float and 1e-150 < w < 1e150 for w in widths):
        raise SettingError(f"its symmetry needs {count} kernel widths above 0, and has {widths!r}"[:200])
    if not all(type(t) is bool for t in told):
        raise SettingError(f"its symmetry has told = {told!r}: expected true or false, for each coordinate"[:200])
    return Frame(action, Prior.from_json(symmetry["prior"]), tuple(map(float, widths)), tuple(map(bool, told)), adaptive)


def _spread_of(symmetry: Mapping[str, Any]) -> tuple[list[float], list[list[float]] | None]:
    """The initial net's spread, (P,), and the least and the greatest log f of an adaptive kernel, (2, P)."""
    count, spread, ends = len(symmetry["widths"]), symmetry["spread"], symmetry.get("stretch")
    if not _numbers(spread, count) or not all(v > 0 for v in spread):
        raise SettingError(f"its symmetry needs {count} spreads above 0, and has {spread!r}"[:200])
    if ends is None:
        return spread, None
    good = type(ends) is list and len(ends) == 2 and all(_numbers(e, count) for e in ends)
    if not good or any(low > high for low, high in zip(*ends, strict=True)):
        raise SettingError(f"its symmetry needs two ends of stretch of {count} numbers each, the least first, and has {ends!r}"[:200])
    return spread, ends


def _numbers(values: Any, count: int) -> bool:
    return type(values) is list and len(values) == count and all(type(v) is float and abs(v) < 1e150 for v in values)


def initial_settings(settings: ConditionedSettings, own: Mapping[str, Any]) -> NPESettings:
    """Of the initial net: as the main one reads x, and what the user gave for it."""
    shared = {f.name: getattr(settings, f.name) for f in fields(ConditionedSettings)}
    return build_settings(NPESettings, {**shared, "members": 1, **own})


class PoseNet(Estimator):
    """npe of the pose's tangent coordinates, log p(theta)."""

    settings_class = NPESettings
    posterior = "pose"

    def __init__(self, architecture: Architecture) -> None:
        super().__init__(architecture)
        assert architecture.symmetry is not None
        self.frame = frame_of(architecture.symmetry)
        self.net = NPE(replace(architecture, dim=len(self.frame.action.coordinates), gaussianised=False, symmetry=None))

    def coordinates(self, theta: Tensor) -> Tensor:
        """float32 (B, P) of unconstrained theta (B, D)."""
        return self.frame.action.log(self.frame.pose(theta)).float()

    def fit_scales(self, theta: Tensor, x: dict[str, Tensor]) -> None:
        self.net.fit_scales(self.coordinates(theta), x)

    def prepare(self, x: dict[str, Tensor]) -> dict[str, Tensor]:
        return self.net.prepare(x)

    def units(self, x: dict[str, Tensor]) -> dict[str, Tensor]:
        return self.net.units(x)

    def context(self, x: dict[str, Tensor]) -> Tensor:
        """Of prepared x."""
        return self.net.context(x)

    def loss(self, theta: Tensor, x: dict[str, Tensor]) -> Tensor:
        return self.net.loss(self.coordinates(theta), x)

    def summary(self, context: Tensor) -> tuple[Tensor, Tensor]:
        """The centre (B, S) of the pose and the standard deviation of each coordinate (B, P), by draws that are a function of the
        context, clipped."""
        drawn = self.net.sample(context, SPREAD_DRAWS, Common(_SPREAD_SEED)).double()
        centre, v = centred(self.frame.action, self.frame.action.exp(drawn.flatten(0, 1)).unflatten(0, drawn.shape[:2]))
        return centre, clipped(v).std(1).clamp_min(1e-150)


class Equivariant(Estimator):
    """The initial net, frozen, and the main net; see the module's docstring."""

    posterior = "gnpe"
    defences = ("noise", "slab")
    draws_anew = True

    def __init__(self, architecture: Architecture) -> None:
        super().__init__(architecture)
        symmetry = architecture.symmetry
        assert symmetry is not None
        self.frame = frame_of(symmetry)
        self.most_steps: int = build_settings(SymmetrySettings, {"gibbs_steps": symmetry["gibbs_steps"]}).gibbs_steps
        self.spread, self.ends = _spread_of(symmetry)
        zeros = {k: torch.zeros(2, *shape) for k, shape in architecture.x.shapes.items()}
        here = self.frame.action.identity(2)
        self.frame.standardise(zeros, here, Sight(torch.zeros(2, len(self.frame.widths)), here))
        if architecture.estimator not in BASES:
            raise SettingError(f"symmetry = 'gnpe' goes with {', '.join(BASES)}, and the estimator is {architecture.estimator}")
        base = find(architecture.estimator)
        settings = symmetry["initial"]
        self.initial = PoseNet(replace(architecture, estimator="npe", settings=build_settings(NPESettings, settings)))
        self.initial.requires_grad_(False).eval()
        spec = self.frame.spec(architecture.x)
        self.main: Any = base(replace(architecture, x=spec, gaussianised=False, symmetry=None,
                                      settings=replace(architecture.settings, embedding=self._embedding(architecture))))

    def train(self, mode: bool = True) -> Equivariant:
        """The main net's mode: the initial net is frozen."""
        super().train(mode)
        self.initial.eval()
        return self

    def _embedding(self, architecture: Architecture) -> str:
        """The embedding's name where x has the proxy beside it: of a net for one array, by field."""
        name = architecture.settings.embedding
        if not self.frame.numbers_told or embeddings.reads_all(name):
            return name
        parts = embeddings.parts_of(name) or {next(iter(architecture.x.shapes)): name}
        return ",".join(f"{k}={v}" for k, v in {**parts, PROXY: "none"}.items())

    @torch.no_grad()
    def sight(self, x: dict[str, Tensor]) -> Sight | None:
        """How much wider than `frame.widths` the kernel is at x, and where the initial net sees the pose; None where the kernel is the
        same for all x."""
        if self.ends is None:
            return None
        centre, wide = self.initial.summary(self.context(x))
        low, high = wide.new_tensor(self.ends)
        return Sight(torch.minimum(torch.maximum((wide / wide.new_tensor(self.spread)).log(), low), high).float(), centre)

    def nat(self) -> float:
        return self.main.nat()

    def fit_scales(self, theta: Tensor, x: dict[str, Tensor]) -> None:
        seen = self.seen_from(theta, x, torch.Generator(theta.device).manual_seed(_SCALES_SEED))
        self.main.fit_scales(*seen)

    def seen_from(self, theta: Tensor, x: dict[str, Tensor], generator: torch.Generator | None = None) -> tuple[Tensor, dict[str, Tensor]]:
        """u and x' of rows, each from a proxy of its own."""
        pose, sight = self.frame.pose(theta), self.sight(x)
        log_f = None if sight is None else sight.log_f
        proxy = self.frame.action.blur(pose, self.frame.kernel_widths(pose, log_f), generator)
        return self.frame.to_relative(theta, proxy, log_f)[0], self.frame.standardise(x, proxy, sight)

    def prepare(self, x: dict[str, Tensor]) -> dict[str, Tensor]:
        """x as it is: it is standardised anew in every step."""
        return {k: v.float() for k, v in x.items()}

    def units(self, x: dict[str, Tensor]) -> dict[str, Tensor]:
        """Of x itself, but for masks: the robust scale of each feature."""
        masks = embeddings.masks_of(self.main.embedding).values()
        return {k: torch.as_tensor(robust_scale(v.cpu().numpy())[1], dtype=torch.float32) for k, v in x.items() if k not in masks}

    def context(self, x: dict[str, Tensor]) -> Tensor:
        """Summaries of x: the initial net's."""
        return self.initial.context(self.initial.prepare(x))

    def loss(self, theta: Tensor, x: dict[str, Tensor]) -> Tensor:
        with torch.no_grad():
            u, seen = self.seen_from(theta, x)
            ready = self.main.prepare(seen)
        return self.main.loss(u, ready)


KINDS: dict[str, type[PoseNet] | type[Equivariant]] = {INITIAL: PoseNet, GNPE: Equivariant}
