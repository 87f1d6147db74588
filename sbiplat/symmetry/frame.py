r"""The frame of a proxy: theta and x as they are seen from :math:`\hat g`,

.. math:: x' = T_{\hat g}^{-1} x, \qquad u = \big( \mathrm{chart}(\hat g^{-1} \theta)_{\text{moved}}, \; z_{\text{others}} \big),
          \qquad q(z | x, \hat g) = q(u | x', \hat g) \, |\det du / dz| ,

with z the prior's normal coordinates. Where the action is exact and the prior is flat over the posterior, q(u | x', g) does not depend on
the proxy, and it is dropped; elsewhere the net is told it, as the field `proxy` of x'. A kernel may be f(x) times as wide at x. Then
q(u | x', g) depends on the proxy through f alone, since :math:`K_f` does, and the net is told log f: that is exact for any function f. What
u has of the moved parameters is in units of f, where a factor moves as many as it has coordinates. Where f is above :math:`\sqrt 2`
the net is told too about where the pose lies, as seen from the proxy: by how many widths of the kernel, with a weight that is 1 from
f = 2 on. As a function of x and the proxy that changes no exact conditional.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sbiplat.errors import SettingError, SymmetryError
from sbiplat.laws import Independent
from sbiplat.marginals import Marginal, standard_normal_log_prob
from sbiplat.observation import ObservationSpec
from sbiplat.prior import Prior
from sbiplat.settings import unknown
from sbiplat.symmetry.action import Fields, GroupAction

PROXY = "proxy"
Array = NDArray[np.float64]


class Sight(NamedTuple):
    """What all of x says of the pose, of an adaptive kernel: log f (B, P), by which the kernel is wider there, and about where the pose
    lies, (B, S)."""

    log_f: Tensor
    centre: Tensor

    def of(self, owner: Tensor) -> Sight:
        """Of the rows of x, (R,)."""
        return Sight(self.log_f[owner], self.centre[owner])


@dataclass(frozen=True)
class Frame:
    """widths: kappa of each tangent coordinate, in its own unit. told: of each coordinate, whether the net is told the proxy's. adaptive:
    whether kernels are wider or narrower at each x; the net is told its `Sight` then."""

    action: GroupAction
    prior: Prior
    widths: tuple[float, ...]
    told: tuple[bool, ...]
    adaptive: bool = False

    def __post_init__(self) -> None:
        check_names(self.action, self.prior)

    # --------------------------------------------------------------------------------------------------- columns

    @cached_property
    def _columns(self) -> list[int]:
        return [self.prior.names.index(p) for p in self.action.parameters]

    @cached_property
    def _moved(self) -> list[tuple[int, int, Marginal]]:
        """Of each moved parameter: its place among the action's, its place in theta, its law."""
        names = self.prior.names
        return [(self.action.parameters.index(p), names.index(p), self.prior.law.marginals[names.index(p)]) for p in self.action.moved]

    @cached_property
    def _own_coordinates(self) -> list[int | None]:
        """Of each moved parameter, as in `_moved`: the coordinate whose f it is seen in units of; None of a factor that has not as many."""
        own, offset = dict[str, int | None](), 0
        for f in self.action.factors:
            alike = len(f.moved) == len(f.coordinates)
            own.update((p, offset + k if alike else None) for k, p in enumerate(f.moved))
            offset += len(f.coordinates)
        return [own[self.action.parameters[place]] for place, _, _ in self._moved]

    def _units(self, stretch: Tensor | None) -> list[Tensor | float]:
        """log f (B,) of each moved parameter, as in `_moved`; 0 where it is seen as it is."""
        return [0.0 if stretch is None or own is None else stretch[:, own].double() for own in self._own_coordinates]

    @property
    def moved(self) -> list[int]:
        """The columns of theta that the action moves."""
        return [k for _, k, _ in self._moved]

    # ----------------------------------------------------------------------------------------------------- theta

    def parameters(self, z: Tensor) -> Tensor:
        """The action's own columns of theta, float64 (B, k), of z (B, D)."""
        theta = self.prior.constrain(z.detach().double().cpu().numpy())[:, self._columns]
        return torch.as_tensor(theta, device=z.device)

    def pose(self, z: Tensor) -> Tensor:
        """p(theta) of z (B, D): (B, S)."""
        return self.action.pose_of(self.parameters(z))

    def kernel_widths(self, like: Tensor, stretch: Tensor | None = None) -> Tensor:
        """kappa, (P,), as a tensor; of an adaptive kernel, for the log f (B, P) by which it is wider, (B, P)."""
        widths = torch.tensor(self.widths, dtype=torch.float64, device=like.device)
        return widths if stretch is None else widths * stretch.double().exp()

    def to_relative(self, z: Tensor, proxy: Tensor, stretch: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """u float32 (B, D) of z (B, D) seen from proxies (B, S), and log |det du / dz|, float64 (B,); stretch: log f (B, P) of an adaptive
        kernel."""
        if not self._moved:
            return z, torch.zeros(len(z), dtype=torch.float64, device=z.device)
        theta = self.parameters(z)
        seen, log_det = self.action.act_theta(self.action.inverse(proxy), theta)
        chart, log_chart = self.action.chart(seen)
        u, log_det = z.clone(), log_det + log_chart
        for (place, k, law), log_f in zip(self._moved, self._units(stretch), strict=True):
            u[:, k] = (chart[:, place] * _exp(-log_f)).to(u.dtype)
            log_det = log_det - log_f
            own = standard_normal_log_prob(z[:, k].detach().double().cpu().numpy()) - law.log_prob(theta[:, place].cpu().numpy())
            log_det = log_det + torch.as_tensor(own, device=z.device)
        return u, log_det

    def from_relative(self, u: Tensor, proxy: Tensor, stretch: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """z (B, D) of u (B, D), and whether each is the u of that z, (B,): not beyond the prior's support, into which z is clipped, nor
        beyond the chart's range, such as once around a circle."""
        if not self._moved:
            return u, torch.ones(len(u), dtype=torch.bool, device=u.device)
        seen = self._placed(u, stretch)
        standard = self.action.unchart(seen)
        z, inside = self.put(u, self.action.act_theta(proxy, standard)[0])
        return z, inside & ((self.action.chart(standard)[0] - seen).abs() <= 1e-6 * (1 + seen.abs())).all(-1)

    def put(self, z: Tensor, theta: Tensor) -> tuple[Tensor, Tensor]:
        """z (B, D) with its moved columns those of the action's parameters theta (B, k), clipped into the prior's support, and whether
        they lie there (B,)."""
        z, inside = z.clone(), np.ones(len(z), bool)
        for place, k, law in self._moved:
            values = theta[:, place].cpu().numpy()
            good = law.contains(values)
            inside &= good
            low, high = law.support
            values = np.where(good, values, np.clip(np.nan_to_num(values), low, high))
            with np.errstate(divide="ignore", invalid="ignore"):
                own = np.clip(law.to_normal(values), -EDGE, EDGE)
            z[:, k] = torch.as_tensor(own, device=z.device).to(z.dtype)
        return z, torch.as_tensor(inside, device=z.device)

    def _placed(self, u: Tensor, stretch: Tensor | None) -> Tensor:
        """The action's columns of u: the chart's numbers where it moves, theta elsewhere."""
        z = u.clone()
        z[:, self.moved] = 0.0
        seen = self.parameters(z)
        for (place, k, _), log_f in zip(self._moved, self._units(stretch), strict=True):
            seen[:, place] = u[:, k].double() * _exp(log_f)
        return seen

    # --------------------------------------------------------------------------------------------------------- x

    def standardise(self, x: Fields, proxy: Tensor, sight: Sight | None = None) -> Fields:
        """x' of fields (B, ...), with the proxy's coordinates beside where the net is told them; of an adaptive kernel also log f, and
        where sight's centre lies from the proxy, as the module's docstring says."""
        return self._with_told(self.action.act_data(self.action.inverse(proxy), x), proxy, sight)

    def standardiser(self, x: Fields, sight: Sight | None = None) -> Callable[[Tensor, Tensor], Fields]:
        """x' as a function of proxies (R, S) and of the rows of x, (R,), that they are of."""
        orbits = self.action.orbits(x)
        return lambda proxy, owner: self._with_told(orbits(self.action.inverse(proxy), owner), proxy,
                                                    None if sight is None else sight.of(owner))

    @property
    def numbers_told(self) -> int:
        """How many numbers the net is told beside x'."""
        return sum(self.told) + (2 * len(self.told) if self.adaptive else 0)

    def _with_told(self, x: Fields, proxy: Tensor, sight: Sight | None) -> Fields:
        if not self.numbers_told:
            return x
        parts = [self.action.log(proxy)[:, [k for k, told in enumerate(self.told) if told]]]
        if sight is not None:
            faint = (2 * sight.log_f / math.log(UNEVEN) - 1).clamp(0, 1)  # of fewer than half of all x: the field's scale is its sd
            seen = self.action.between(proxy, sight.centre) / self.kernel_widths(proxy, sight.log_f)
            parts += [sight.log_f, seen * faint]
        dtype = next(iter(x.values())).dtype
        return {**x, PROXY: torch.cat([part.to(dtype) for part in parts], 1)}

    def spec(self, x: ObservationSpec) -> ObservationSpec:
        """The form of x'."""
        if not self.numbers_told:
            return x
        if PROXY in x.shapes:
            raise SettingError(f"x has a field {PROXY!r} of its own, and GNPE adds one of that name; call it something else")
        return ObservationSpec.declare({**x.shapes, PROXY: (self.numbers_told,)}, x.dtype, {**x.transform, PROXY: "none"})

    # ------------------------------------------------------------------------------------------- how far it is exact

    def slope_of_prior(self, z: Tensor, widths: Tensor, generator: torch.Generator) -> tuple[float, float]:
        """How far the prior is from flat over moves as wide as widths, (P,) or (N, P), of rows z (N, D): the root mean square of
        log p(h theta) |det| / p(theta)
        over such moves h that stay in the support, and the share of moves that leave it."""
        if not self._moved:
            return 0.0, 0.0
        theta = self.parameters(z)
        pose = self.action.pose_of(theta)
        proxy = self.action.blur(pose, widths, generator)
        change = self.moved_by(self.action.compose(proxy, self.action.inverse(pose)), theta)[1]
        inside = torch.isfinite(change)
        return float(change[inside].square().mean().sqrt()) if inside.any() else float("inf"), float((~inside).double().mean())

    def moved_by(self, h: Tensor, theta: Tensor) -> tuple[Tensor, Tensor]:
        """h theta (B, k) of the action's parameters theta (B, k), and log p(h theta) |det| / p(theta), (B,): -inf outside the support."""
        moved, log_det = self.action.act_theta(h, theta)
        change = log_det.cpu().numpy().copy()
        for place, _, law in self._moved:
            before, after = theta[:, place].cpu().numpy(), moved[:, place].cpu().numpy()
            good = law.contains(after)
            change += np.where(good, law.log_prob(np.where(good, after, before)) - law.log_prob(before), -np.inf)
        return moved, torch.as_tensor(change, device=theta.device)


REACH = 4.0  # standard deviations
UNEVEN = 2.0  # f of an x that tells little of the pose
EDGE = 8.0  # of z: within a part in 10^15 of an edge of the support


def _exp(log_f: Tensor | float) -> Tensor | float:
    return log_f.exp() if isinstance(log_f, Tensor) else math.exp(log_f)


def check_names(action: GroupAction, prior: Prior) -> None:
    """Raises SymmetryError where the action's parameters are not the prior's, the prior's are dependent, or names come twice."""
    own = name_of(action)
    for factor in action.factors:
        if not isinstance(factor.parameters, tuple) or not (factor.parameters or factor.canonical):
            raise SymmetryError(f"{name_of(factor)}: parameters = {factor.parameters!r}: expected the names of those that its pose is "
                                'made of, such as ("t0",)')
    for name in action.parameters:
        if name not in prior.names:
            near = difflib.get_close_matches(name, prior.names, 3, 0.5)
            hint = f"did you mean {' or '.join(near)}?" if near else f"it has {', '.join(prior.names)}"
            raise SymmetryError(f"{own}: the prior has no parameter {name!r}; {hint}")
    if action.parameters and not isinstance(prior.law, Independent):
        raise SymmetryError(f"{own}: an action needs a prior of independent parameters, and this one is a joint law")
    for factor in action.factors:
        if factor.exact is not True and factor.exact is not False:
            raise SymmetryError(f"{name_of(factor)}: exact = {factor.exact!r}: expected True or False")
        if factor.exact and factor.coordinates and not factor.moved:
            raise SymmetryError(f"{name_of(factor)}: it has a pose and moves no parameter, so it is not exact: declare exact=False, or "
                                "let act_theta move what the pose is made of")
    moved = [p for f in action.factors for p in f.moved]
    if twice := next((p for p in moved if moved.count(p) > 1), None):
        raise SymmetryError(f"{own}: two factors move the parameter {twice!r}; at most one may")
    if len(set(action.coordinates)) < len(action.coordinates):
        raise SymmetryError(f"{own}: coordinates {', '.join(action.coordinates)} are not all different")


def name_of(action: GroupAction) -> str:
    """What messages call an action."""
    return " x ".join(type(f).__name__ for f in action.factors)


def widths_of(action: GroupAction, given: Mapping[str, Any]) -> dict[str, float]:
    """Widths that a user gave, by coordinate; raises SettingError."""
    for name, width in given.items():
        if name not in action.coordinates:
            raise SettingError(f"kernel width of {name!r}: " + str(unknown(str(name), list(action.coordinates))).partition("; ")[2])
        if isinstance(width, bool) or not isinstance(width, int | float | np.floating) or not 1e-150 < width < 1e150:
            raise SettingError(f"kernel width of {name} = {width!r}: expected a number above 0, in the coordinate's own unit")
    return {k: float(v) for k, v in given.items()}


def centred(action: GroupAction, poses: Tensor) -> tuple[Tensor, Tensor]:
    """The centre (B, S) of poses (B, n, S), and their tangent coordinates from it, (B, n, P)."""
    batch, n = poses.shape[:2]

    def seen(centre: Tensor) -> Tensor:
        return action.between(centre[:, None].expand(batch, n, -1).flatten(0, 1), poses.flatten(0, 1)).unflatten(0, (batch, n))

    centre = poses[:, 0]
    for _ in range(2):
        centre = action.compose(centre, action.exp(seen(centre).median(1).values))
    return centre, seen(centre)


def clipped(v: Tensor) -> Tensor:
    """Coordinates (b, C, P) held within `REACH` robust standard deviations of the median."""
    low, middle, high = torch.quantile(v, v.new_tensor([0.25, 0.5, 0.75]), dim=1, keepdim=True)
    reach = REACH * (high - low) / 1.349
    return torch.minimum(torch.maximum(v, middle - reach), middle + reach)
