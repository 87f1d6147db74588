r"""The two trainings of GNPE: the initial net into OUT/initial, the kernel's width from its spread, then the main net.

The width of each tangent coordinate is :math:`\kappa = r s`, with s the median standard deviation of the initial net's posterior over
validation rows. Where that deviation differs much from row to row the kernel is adaptive: :math:`\kappa(x) = r s f(x)`, with f what the
initial net says at x; with one width for all, chains of faint signals would take thousands of steps.
For a Gaussian pose a Gibbs step contracts by :math:`\rho = s^2 / (s^2 + \kappa^2)`, and from five standard deviations off to a twentieth
it takes :math:`\ln 100 / \ln(1 / \rho)` steps: 7 at r = 1, 21 at 0.5, 119 at 0.2.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from sbiplat.bank.stream import pairs_at
from sbiplat.errors import RunError, SettingError
from sbiplat.estimators.base import Architecture, Estimator
from sbiplat.estimators.equivariant import INITIAL, Equivariant, PoseNet, initial_settings
from sbiplat.estimators.npe import NPESettings
from sbiplat.nets.standardise import robust_scale
from sbiplat.progress import Progress
from sbiplat.runs import Run
from sbiplat.settings import build as build_settings
from sbiplat.settings import split as split_settings
from sbiplat.symmetry import names
from sbiplat.symmetry.frame import UNEVEN, Frame, centred, clipped, widths_of
from sbiplat.symmetry.settings import GNPE
from sbiplat.training.begin import Plan, TrainSettings, check_symmetry

ROWS, DRAWS = 200, 200  # of which the spread is measured
MOST_UNEVEN = 0.01  # share of rows whose spread is over UNEVEN medians, above which the kernel is adaptive
WIDEST = 0.5  # of the prior's spread
MOST_PREDICTED = 200
FAR, NEAR = 5.0, 0.05  # standard deviations
MOST_SLOPE = 0.1  # nats; so many standard deviations the draws are off where the proxy is dropped all the same
MOST_LEAVING = 0.1  # about the share of rows whose conditional an edge cuts, which a net that is not told the proxy mixes with the others
_SEED = 0x5EAD
CarryOut = Callable[..., Run]


@dataclass(frozen=True)
class Kernel:
    """Of each tangent coordinate its width, the initial net's spread and whether the net is told the proxy; slope (rms of the change of
    the log prior over moves as large as the spread) and leaving (share of these that leave its support) say how far the prior is from flat.
    stretch: of a kernel that is f(x) times as wide, the least and the greatest log f of each coordinate; moves are then as large as each
    row's own spread.

    A net that is not told an exact action's proxy learns the conditional under a flat prior, whatever the kernel: relative coordinates do
    not know where they are. Chains then have the posterior under a flat prior as their law, off by about `slope` standard deviations,
    cut off where the support ends, since what lies beyond is drawn again: an edge alone costs no exactness but for what the rows
    near it mix into the net's training. slow: the share of validation rows that tell so little of the pose that their own spread predicts
    more steps than chains may take.
    """

    widths: tuple[float, ...]
    spread: tuple[float, ...]
    told: tuple[bool, ...]
    slope: float
    leaving: float
    slow: float
    stretch: tuple[tuple[float, ...], tuple[float, ...]] | None = None


def settled(wanted: Plan, out: Path, progress: Progress, carry_out: CarryOut) -> Plan:
    """The training of the main net, once that of the initial one is finished; raises SettingError for a kernel that cannot work."""
    assert wanted.action is not None
    if not (out / "initial" / "run.json").exists():
        check_symmetry(wanted)
    initial = carry_out(_of_pose(wanted), out / "initial", progress, watch=_goes_on)
    if (out / "run.json").exists():
        begun = (Run.open(out).architecture.symmetry or {}).get("initial_weights")
        if begun != initial.weights_digest:
            raise RunError(f"{out / 'initial'} is not the initial net that {out} was begun with: its weights differ; put it back, or "
                           "train into another --out")
    kernel = measured(wanted, initial)
    for name, width, spread in zip(wanted.action.coordinates, kernel.widths, kernel.spread, strict=True):
        progress.say(f"{name}: the initial net's spread is {spread:.3g}, the kernel's width {width:.3g}; from five spreads off a chain "
                     f"takes about {predicted_steps(width / spread):.0f} steps")
    if kernel.stretch is not None:
        progress.say("the kernel is adaptive: at each x as much wider or narrower as the initial net's spread there")
    if wanted.symmetry.proxy != "told":
        progress.say(f"over the initial net's spread the log prior changes by {kernel.slope:.3g} (rms), and {kernel.leaving:.2%} of moves "
                     f"as large leave its support: the net is {'told' if any(kernel.told) else 'not told'} the proxy"
                     + ("" if all(kernel.told) or not any(kernel.told) else " of approximate factors")
                     + (", since the action is approximate" if all(kernel.told) and not wanted.action.exact else ""))
    if kernel.slow > 0:
        progress.say(f"{kernel.slow:.1%} of validation rows tell so little of the pose that their chains would take over "
                     f"{wanted.symmetry.gibbs_steps} steps, and be refused; if that is too many, take a larger kernel_ratio"
                     + ("" if kernel.stretch else ", or kernel_kind = adaptive"))
    about = {**_action(wanted), "role": GNPE, "widths": list(kernel.widths), "told": list(kernel.told),
             "stretch": kernel.stretch and [list(end) for end in kernel.stretch], "spread": list(kernel.spread),
             "slope": kernel.slope, "leaving": kernel.leaving, "slow": kernel.slow, "gibbs_steps": wanted.symmetry.gibbs_steps,
             "initial": asdict(initial.architecture.settings), "initial_weights": initial.weights_digest}
    weights = initial.estimator().state_dict()

    def start(estimator: Estimator) -> None:
        assert isinstance(estimator, Equivariant)
        estimator.initial.load_state_dict(weights)

    return replace(wanted, architecture=replace(wanted.architecture, symmetry=about), start=start)


def _goes_on(epoch: int, best: float) -> bool:
    """Watches the initial net's training: more comes after it, so a signal at its end stops there."""
    return False


def predicted_steps(ratio: float) -> float:
    """Steps from five spreads off to a twentieth, for a kernel of so many spreads."""
    rate = math.log1p(ratio**2)
    return math.log(FAR / NEAR) / rate if rate > 0 else math.inf


def _action(wanted: Plan) -> dict[str, Any]:
    assert wanted.action is not None
    return {"action": names.describe(wanted.action, wanted.simulator), "prior": wanted.bank.header.prior.to_json()}


def _of_pose(wanted: Plan) -> Plan:
    """The training of the initial net: as the main one's, but for what `initial` says."""
    given, shape = dict(wanted.symmetry.initial or {}), wanted.architecture
    ours, theirs = split_settings(given, TrainSettings, NPESettings)
    settings = initial_settings(shape.settings, theirs)
    training = build_settings(TrainSettings, {**asdict(wanted.training), **ours})
    architecture = Architecture("npe", settings, shape.dim, shape.x, shape.gaussianised, {**_action(wanted), "role": INITIAL})
    return replace(wanted, architecture=architecture, training=training, action=None)


def measured(wanted: Plan, initial: Run) -> Kernel:
    """The kernel for a finished initial net."""
    action, settings, net = wanted.action, wanted.symmetry, initial.estimator()
    assert action is not None
    assert isinstance(net, PoseNet)
    generator = torch.Generator().manual_seed(_SEED)
    pairs = pairs_at(wanted.bank, wanted.apart.validation[:ROWS])
    x = {k: torch.as_tensor(np.ascontiguousarray(v)) for k, v in pairs["x"].items()}
    if wanted.observe is not None:
        x = wanted.observe(x, torch.as_tensor(pairs["parameters"]), _SEED)
    with torch.no_grad():
        contexts = net.context(net.prepare(x))
        drawn = net.net.sample(contexts, DRAWS, generator).double()
    poses = action.exp(drawn.flatten(0, 1)).unflatten(0, drawn.shape[:2])
    each = clipped(centred(action, poses)[1]).std(1)
    spread = each.median(0).values
    given = widths_of(action, settings.kernel_widths or {})
    widths = tuple(given.get(name, settings.kernel_ratio * float(s)) for name, s in zip(action.coordinates, spread, strict=True))
    z = torch.as_tensor(pairs["theta"])
    frame = Frame(action, wanted.bank.header.prior, widths, (False,) * len(widths))
    of_prior = robust_scale(action.log(frame.pose(z)).numpy())[1]
    for name, width, s, most in zip(action.coordinates, widths, spread.tolist(), of_prior, strict=True):
        if predicted_steps(width / s) > MOST_PREDICTED:
            raise SettingError(f"the kernel of {name}, {width:.3g}, is far too narrow for a pose known to {s:.3g}: chains would take about "
                               f"{predicted_steps(width / s):.0f} steps; take a width of {0.5 * s:.3g} to {s:.3g}")
        if width >= most:
            raise SettingError(f"the kernel of {name}, {width:.3g}, is as wide as the prior of the pose ({most:.3g}): nothing is "
                               f"standardised by it; take a width below {s:.3g}, more simulations, or symmetry = \"none\"")
    uneven = float((each > UNEVEN * spread).any(1).double().mean()) > MOST_UNEVEN
    adaptive = settings.kernel_kind == "adaptive" or (settings.kernel_kind == "auto" and uneven and not given)
    slope, leaving = frame.slope_of_prior(z, each.clamp_min(1e-150) if adaptive else spread, generator)
    flat = slope <= MOST_SLOPE and leaving <= MOST_LEAVING
    told: list[bool] = []
    for factor in action.factors:
        dropped = factor.exact and (settings.proxy == "dropped" or (settings.proxy == "auto" and flat))
        told += [not dropped] * len(factor.coordinates)
    own, stretch = torch.tensor(widths, dtype=torch.float64), None
    if adaptive:
        with torch.no_grad():
            f = (net.summary(contexts)[1] / spread).log()
        most = (WIDEST * torch.as_tensor(of_prior) / own).log().clamp_min(0.0)
        low, high = f.amin(0), torch.minimum(f.amax(0), most)
        own, stretch = own * torch.minimum(torch.maximum(f, low), high).exp(), (tuple(low.tolist()), tuple(high.tolist()))
    rate = torch.log1p((own / each.clamp_min(1e-300)).square()).amin(1)
    slow = float((math.log(FAR / NEAR) > settings.gibbs_steps * rate).double().mean())
    return Kernel(widths, tuple(spread.tolist()), tuple(told), slope, leaving, slow, stretch)
