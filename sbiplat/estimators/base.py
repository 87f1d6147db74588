"""What an estimator is, and the registry of those that there are.

An estimator is an nn.Module with one `loss(theta, x)`; theta is unconstrained, (B, D). What is fixed in the way from a
bank's x to the net (transforms, standardisation, an embedding's fixed summaries) is `prepare`, which training runs once a
row and not once a step; `loss` takes x as prepared. Both are part of the module and of its weights. A new estimator is one
file in this folder and one line in `ESTIMATORS`.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from sbiplat.errors import SettingError
from sbiplat.nets.standardise import robust_scale
from sbiplat.observation import ObservationSpec
from sbiplat.settings import Interval, Space, unknown
from sbiplat.settings import build as build_settings

ESTIMATORS = {
    "npe": "sbiplat.estimators.npe:NPE",
    "npse": "sbiplat.estimators.npse:NPSE",
    "nle": "sbiplat.estimators.nle:NLE",
    "nre": "sbiplat.estimators.nre:NRE",
    "fmpe": "sbiplat.estimators.fmpe:FMPE",
    "sbi": "sbiplat.estimators.sbi_npe:SbiNPE",
}

LEARNING_RATES = Interval(3e-4, 1e-2, log=True)


class Estimator(nn.Module):
    """Base of estimators.

    settings_class: the frozen dataclass of the settings that shape it. posterior: which sampler stands behind it, a name in
    `posteriors.of_run`. training_defaults: what training takes where the user says nothing, such as `ema` and the number of steps.
    most_failed: the largest share of failed rows of a bank that it may leave out. made_by: how its runs are made where `train` does not.
    search: what tuning tries where the user says nothing. of_the_loss: settings on which the meaning of the loss depends, so that no
    search may compare losses over them. defences: the kinds of `training.defence` that it can be trained with. draws_itself: whether
    the theta of `fisher_root` are draws of its own law, and the root the log-density of that, so that they change with its weights.
    draws_anew: whether the loss looks at another x of a row in every step.
    """

    settings_class: ClassVar[type]
    posterior: ClassVar[str] = "direct"
    most_failed: ClassVar[float] = 1.0
    made_by: ClassVar[str] = ""
    training_defaults: ClassVar[Mapping[str, Any]] = {"ema": 0.999, "steps": 4000}
    search: ClassVar[Space] = {"learning_rate": LEARNING_RATES}
    of_the_loss: ClassVar[tuple[str, ...]] = ()
    defences: ClassVar[tuple[str, ...]] = ("noise", "slab")
    draws_itself: ClassVar[bool] = False
    draws_anew: ClassVar[bool] = False

    def __init__(self, architecture: Architecture) -> None:
        super().__init__()
        self.settings = architecture.settings
        self.spec, self.dim, self.gaussianised = architecture.x, architecture.dim, architecture.gaussianised
        self.register_buffer("theta_loc", torch.zeros(self.dim))
        self.register_buffer("theta_scale", torch.ones(self.dim))

    rows_were_fitted = False  # whether `fit_scales` saw every row of training: told by who trains

    def fit_scales(self, theta: Tensor, x: dict[str, Tensor]) -> None:
        """Set standardisation from rows of the bank, before training: here that of theta."""
        if not self.gaussianised:  # elsewhere z is N(0, I) already
            loc, scale = robust_scale(theta.cpu().numpy())
            self.theta_loc.copy_(torch.as_tensor(loc))
            self.theta_scale.copy_(torch.as_tensor(scale))

    def scaled(self, theta: Tensor) -> Tensor:
        """Unconstrained theta at unit scale."""
        return (theta - self.theta_loc) / self.theta_scale

    def unscaled(self, z: Tensor) -> Tensor:
        """The inverse of `scaled`."""
        return z * self.theta_scale + self.theta_loc

    def prepare(self, x: dict[str, Tensor]) -> dict[str, Tensor]:
        """x as the bank stores it, a dict of (B, ...) tensors, to what `loss` takes: fixed, float32, without gradient."""
        raise NotImplementedError

    def prepare_differentiably(self, x: dict[str, Tensor]) -> dict[str, Tensor]:
        """The same with gradient in x, for attacks on x; what an embedding computes by other means than torch's has none."""
        raise NotImplementedError

    def loss(self, theta: Tensor, x: dict[str, Tensor]) -> Tensor:
        """The training loss of each row, (B,), for prepared x."""
        raise NotImplementedError

    def fisher_root(self, theta: Tensor, x: dict[str, Tensor]) -> Tensor:
        """A random number r a row, (B,), of pairs (theta, prepared x), with E |dr/dx|^2 = tr F(x): see `training.defence`."""
        raise NotImplementedError

    def nat(self) -> float:
        """What the loss rises by, about, where the posterior is a nat worse."""
        return 1.0

    def units(self, x: dict[str, Tensor]) -> dict[str, Tensor]:
        """The fields of prepared x that hold x and may be disturbed, each with its features' scales, from rows of the bank as prepared."""
        raise NotImplementedError


@dataclass(frozen=True)
class Architecture:
    """All that is needed to make an estimator with the right shapes, before its weights are loaded. symmetry: what it makes of a group
    that moves theta and x (see `equivariant`), None where there is none."""

    estimator: str
    settings: Any
    dim: int
    x: ObservationSpec
    gaussianised: bool
    symmetry: Mapping[str, Any] | None = None

    @property
    def kind(self) -> type[Estimator]:
        """The estimator's class."""
        return find(self.estimator)

    def to_json(self) -> dict[str, Any]:
        return {"estimator": self.estimator, "settings": asdict(self.settings), "dim": self.dim, "x": self.x.to_json(),
                "gaussianised": self.gaussianised, **({"symmetry": dict(self.symmetry)} if self.symmetry is not None else {})}

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Architecture:
        estimator = find(data["estimator"])
        return cls(data["estimator"], build_settings(estimator.settings_class, data["settings"]), int(data["dim"]),
                   ObservationSpec.from_json(data["x"]), bool(data["gaussianised"]), data.get("symmetry"))

    def build(self, seed: int = 0) -> Estimator:
        """The estimator with initial weights drawn from the seed, an ensemble where the settings say so; torch's global generator is
        left as it was."""
        made, members = find(self.estimator), getattr(self.settings, "members", 1)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            if self.symmetry is not None:
                from sbiplat.estimators.equivariant import made as made_equivariant

                return made_equivariant(self)
            if members == 1:
                return made(self)
            from sbiplat.estimators.ensemble import Ensemble

            return Ensemble(self, made, members)


def find(name: str) -> type[Estimator]:
    """The estimator's class by name; its module is imported only now."""
    if name not in ESTIMATORS:
        error = unknown(name, list(ESTIMATORS))
        raise SettingError(str(error).replace("no setting is called", "no estimator is called"))
    module, _, attribute = ESTIMATORS[name].partition(":")
    return getattr(importlib.import_module(module), attribute)


def find_trained_here(name: str) -> type[Estimator]:
    """The same; raises SettingError where sbiplat does not train it."""
    estimator = find(name)
    if estimator.made_by:
        raise SettingError(f"{name} is not trained here: {estimator.made_by}")
    return estimator
