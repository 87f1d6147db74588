r"""Defended training: a posterior that small changes of the data do not mislead. `defend = ["slab:0.05", "fisher:0.001"]`.

How far the posterior moves when x does is its Fisher information in x,

.. math:: \mathrm{KL}\big( q(\theta | x) \,\|\, q(\theta | x + \delta) \big) \approx \tfrac12 \delta^\top F(x) \, \delta, \qquad
          F(x) = \mathbb{E}_{q(\theta | x)} \, \nabla_x \log q \; \nabla_x \log q^\top .

`fisher:W` adds :math:`W \, \mathrm{tr} F(x)` to the loss (Gloeckler, Deistler & Macke, 2023): twice W times the nats by which noise of one
unit a feature moves the posterior, to second order. An estimator gives a random number r a row with
:math:`\mathbb{E} \, |\partial_x r|^2 = \mathrm{tr} F` (`fisher_root`): npe the log-density of a draw of its own; nre log r of the row's
theta; npse and fmpe a root of the same trace by de Bruijn's identity (`estimators.denoising`), at the row's theta. Their loss is a squared
error, and W times what a nat is in it (`nat`). Of an ensemble it is the mean of its members', which that of the mixture does not exceed.
Where the draws are q's own, their law depends on the weights too, and the whole gradient of the trace is

.. math:: \nabla \, \mathrm{tr} F = \mathbb{E} \big[ \nabla |\partial_x r|^2 + (|\partial_x r|^2 - b) \, \nabla \log q \big]

for any b that does not depend on the draw, here the mean of the batch's other rows. Without the second term the penalty would gain twice as
much by widening a Gaussian as it says.

`noise:SCALE` trains on x + SCALE e with e ~ N(0, I) drawn anew in every step: the posterior given noisier data. `slab:SHARE` does so to a
share of the rows only, with a noise of each row's own size, from far below a unit to far beyond: the posterior under a model of errors
with a spike at none and a slab of any size (Ward et al., 2022). Where x has more features than theta has parameters, x itself tells
data that the simulator could have made from disturbed ones; so the former keep their posterior, and the latter get a wide one.
`adversarial:EPS` trains on
x + delta, delta a step of the loss's gradient from a random start, of root mean square at most EPS over the features (Madry et al., 2018;
in one step: Wong, Rice & Kolter, 2020).

x is what the net takes: observed, standardised, and where an embedding has fixed summaries, those. Its unit is a feature's robust standard
deviation over the bank. Masks are left alone. Slopes and attacks are those of the net as it is used, without dropout.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import ClassVar

import torch
from torch import Tensor, nn

from sbiplat.errors import SettingError
from sbiplat.estimators.base import Estimator
from sbiplat.estimators.ensemble import Ensemble

EVERY = 3  # the penalty is taken in one step of so many, so many times: a fraction of the price, and momentum spreads it
SHARE = 0.5  # of a batch, for the penalty; of a piece where batches go through the net in pieces
VALIDATION_ROWS = 1024
SLAB = (0.03, 10.0)  # units
STEP = 1.25  # of an attack, in units of its largest length (Wong et al.)
Fields = dict[str, Tensor]


class Noise:
    """noise:SCALE, in units."""

    figure: ClassVar[str] = "scale"

    def __init__(self, scale: float) -> None:
        self.scale = scale

    def disturbed(self, estimator: Estimator, theta: Tensor, x: Fields, units: Fields) -> Fields:
        """x with noise."""
        return {**x, **{k: x[k] + self.scale * unit * torch.randn_like(x[k]) for k, unit in units.items()}}


class Slab:
    """slab:SHARE, of the rows of a step, each disturbed by noise of a size of its own between the least and the most, log-uniform."""

    figure: ClassVar[str] = "share"
    below: ClassVar[float] = 1.0

    def __init__(self, share: float) -> None:
        self.share = share

    def disturbed(self, estimator: Estimator, theta: Tensor, x: Fields, units: Fields) -> Fields:
        """x with the noise of those rows."""
        some = torch.rand(len(theta), device=theta.device) < self.share
        size = torch.exp(math.log(SLAB[0]) + math.log(SLAB[1] / SLAB[0]) * torch.rand(len(theta), device=theta.device)) * some
        noise = _times({k: torch.randn_like(x[k]) for k in units}, size)
        return {**x, **{k: x[k] + units[k] * v for k, v in noise.items()}}


class Adversarial:
    """adversarial:EPS, the root mean square in units."""

    figure: ClassVar[str] = "root mean square"

    def __init__(self, eps: float) -> None:
        self.eps = eps

    def disturbed(self, estimator: Estimator, theta: Tensor, x: Fields, units: Fields) -> Fields:
        """x as changed to raise the loss."""
        numbers = sum(x[k][0].numel() for k in units)
        most = self.eps * math.sqrt(numbers)
        start = {k: torch.randn_like(x[k]) for k in units}
        far = torch.rand(len(theta), device=theta.device) ** (1 / numbers)  # even in the ball
        delta = _times(start, most * far / _length(start))
        with torch.enable_grad(), as_used(estimator):
            free = {k: v.requires_grad_() for k, v in delta.items()}
            loss = estimator.loss(theta, {**x, **{k: x[k].detach() + units[k] * v for k, v in free.items()}})
            slopes = dict(zip(free, torch.autograd.grad(loss.sum(), list(free.values())), strict=True))
        uphill = _times(slopes, STEP * most / _length(slopes))
        delta = {k: v.detach() + uphill[k] for k, v in delta.items()}
        delta = _times(delta, (most / _length(delta)).clamp_max(1))
        return {**x, **{k: x[k] + units[k] * v for k, v in delta.items()}}


class Fisher:
    """fisher:WEIGHT, of the trace of the Fisher information in nats per squared unit. weight: in units of the loss."""

    figure: ClassVar[str] = "weight"

    def __init__(self, weight: float) -> None:
        self.weight = weight

    def add_gradient(self, estimator: Estimator, theta: Tensor, x: Fields, units: Fields, times: float) -> Tensor:
        """Add the gradient of `times` the penalty, its mean over rows, to the parameters' `grad`; returns what was added to the loss."""
        mean, surrogate = theta.new_zeros(()), theta.new_zeros(())
        each, rows = members(estimator), len(theta)
        with as_used(estimator):
            for member in each:
                trace, root = fisher_trace(member, theta, x, units, graph=True)
                still = trace.detach()
                mean = mean + still.mean() / len(each)
                over = (still - still.mean()) * rows / (rows - 1) if rows > 1 else still  # over the mean of the others
                whole = trace + over * root if member.draws_itself else trace
                surrogate = surrogate + whole.mean() / len(each)
            (times * self.weight * surrogate).backward()
        return times * self.weight * mean


KINDS: dict[str, type[Noise] | type[Slab] | type[Adversarial] | type[Fisher]] = {
    "noise": Noise, "slab": Slab, "adversarial": Adversarial, "fisher": Fisher}


def fisher_trace(estimator: Estimator, theta: Tensor, x: Fields, units: Fields, graph: bool = False) -> tuple[Tensor, Tensor]:
    """An unbiased estimate of tr F(x) a row, (B,), of one draw, and its root, (B,). graph: keep what differentiates it by the weights."""
    with torch.enable_grad():
        free = {k: x[k].detach().requires_grad_() for k in units}
        root = estimator.fisher_root(theta, {**x, **free})
        slopes = torch.autograd.grad(root.sum(), list(free.values()), create_graph=graph)
        scaled = zip(slopes, units.values(), strict=True)
        return torch.stack([(slope * unit).square().flatten(1).sum(1) for slope, unit in scaled]).sum(0), root


class Defence:
    """What a training does in its defence.

    words: as of `parsed`; x: rows of the bank as prepared, which set the units; pieces: in which a batch goes through the net.
    """

    def __init__(self, words: Sequence[str], estimator: Estimator, x: Fields, pieces: int = 1) -> None:
        made = {kind: KINDS[kind](figure) for kind, figure in parsed(words).items()}
        self.disturbances = [d for d in made.values() if isinstance(d, Noise | Slab | Adversarial)]
        self.fisher = next((Fisher(d.weight * members(estimator)[0].nat()) for d in made.values() if isinstance(d, Fisher)), None)
        self.estimator, self.units, self.share = estimator, estimator.units(x) if made else {}, SHARE / pieces

    def __bool__(self) -> bool:
        return bool(self.disturbances or self.fisher)

    def to(self, device: torch.device) -> Defence:
        """The same, on a device."""
        self.units = {k: v.to(device) for k, v in self.units.items()}
        return self

    def disturbed(self, theta: Tensor, x: Fields) -> Fields:
        """x as the loss takes it."""
        for defence in self.disturbances:
            x = defence.disturbed(self.estimator, theta, x, self.units)
        return x

    def add_gradient(self, theta: Tensor, x: Fields, step: int) -> Tensor:
        """Add the penalty's gradient to the parameters' `grad`; returns what it adds to the loss, over steps in the mean."""
        if self.fisher is None or step % EVERY:
            return theta.new_zeros(())
        rows = slice(math.ceil(self.share * len(theta)))
        return self.fisher.add_gradient(self.estimator, theta[rows], {k: v[rows] for k, v in x.items()}, self.units, EVERY)

    def trace(self, theta: Tensor, x: Fields) -> float:
        """The mean of tr F over the first rows, of the net as it is used."""
        rows, each = slice(VALIDATION_ROWS), members(self.estimator)
        theta, x = theta[rows], {k: v[rows] for k, v in x.items()}
        with as_used(self.estimator):
            return float(torch.stack([fisher_trace(m, theta, x, self.units)[0].double().mean() for m in each]).mean())


def parsed(words: Sequence[str]) -> dict[str, float]:
    """Kind -> figure of words such as `fisher:0.01`, in the order of `KINDS`; raises SettingError."""
    found: dict[str, float] = {}
    for word in words:
        kind, colon, text = (part.strip() for part in word.partition(":"))
        if kind not in KINDS:
            near = difflib.get_close_matches(kind, KINDS, 1, 0.5)
            raise SettingError(f"defend = {word!r}: no defence is called {kind!r}; " +
                               (f"did you mean {near[0]}?" if near else f"known: {', '.join(KINDS)}"))
        try:
            figure = float(text) if colon else math.nan
        except ValueError:
            figure = math.nan
        below = getattr(KINDS[kind], "below", math.inf)
        if not 0 < figure < below:
            raise SettingError(f"defend = {word!r}: expected {kind}:{KINDS[kind].figure.upper().replace(' ', '_')}, a number above 0"
                               f"{f' and below {below:g}' if below < math.inf else ''}, such as {kind}:0.1")
        if kind in found:
            raise SettingError(f"defend has {kind} twice, {found[kind]!r} and {figure!r}; give it once")
        found[kind] = figure
    return {kind: found[kind] for kind in KINDS if kind in found}


def checked(words: Sequence[str], name: str, estimator: type[Estimator]) -> tuple[str, ...]:
    """The words in one form, that of a training's record; raises SettingError where the estimator has not such a defence."""
    found = parsed(words)
    for kind in found:
        if kind not in estimator.defences:
            raise SettingError(f"defend = '{kind}:{found[kind]:g}': {name} learns the density of x and not of theta, and can be defended "
                               f"by {', '.join(estimator.defences)} alone; take that, or npe, npse, fmpe or nre")
    return tuple(f"{kind}:{figure!r}" for kind, figure in found.items())


def members(estimator: Estimator) -> Sequence[Estimator]:
    """Of an ensemble its members, each with its own Fisher information; else the estimator itself."""
    return list(estimator.members) if isinstance(estimator, Ensemble) else [estimator]  # type: ignore[arg-type]


@contextmanager
def as_used(module: nn.Module) -> Iterator[None]:
    """The module in its mode of evaluation meanwhile."""
    was_training = module.training
    module.eval()
    try:
        yield
    finally:
        module.train(was_training)


def _length(fields: Fields) -> Tensor:
    """The norm of each row over all fields, (B,)."""
    return torch.stack([v.flatten(1).square().sum(1) for v in fields.values()]).sum(0).sqrt().clamp_min(1e-30)


def _times(fields: Fields, factor: Tensor) -> Fields:
    return {k: v * factor.view(-1, *(1,) * (v.ndim - 1)) for k, v in fields.items()}
