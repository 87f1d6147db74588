"""sbiplat: from a registered simulator to a posterior that has been tested.

    import sbiplat as sp

    bank = sp.simulate(simulator, n=100_000, seed=1, out="pulse.bank")
    run  = sp.train(bank, "npe", out="pulse.run")
    cert = sp.gate(run)
    post = sp.load("pulse.run")

Names are imported when they are first used, so that ranks that only simulate never import torch.
"""

import sys
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sbiplat import symmetry
    from sbiplat.bank.bank import Bank
    from sbiplat.bank.fill import simulate
    from sbiplat.command import command_simulator
    from sbiplat.diagnostics.attack import attack
    from sbiplat.diagnostics.predictive import predictive_check
    from sbiplat.errors import Misspecified, Uncertified, Unreliable, UserError
    from sbiplat.gate.certificate import Certificate
    from sbiplat.gate.door import load
    from sbiplat.gate.examine import gate
    from sbiplat.gate.learning import learning_curve
    from sbiplat.gate.local import local_c2st
    from sbiplat.gate.predictive import predictive_coverage
    from sbiplat.gate.recalibrate import recalibrate
    from sbiplat.gate.verify import verify
    from sbiplat.observation import read_observation
    from sbiplat.posteriors.base import Posterior
    from sbiplat.posteriors.from_sbi import from_sbi
    from sbiplat.posteriors.nearest import nearest
    from sbiplat.posteriors.weighted import Weighted
    from sbiplat.prior import Beta, Gamma, HalfNormal, LogNormal, LogUniform, MultivariateNormal, Normal, Prior, TruncatedNormal, Uniform
    from sbiplat.report.page import report
    from sbiplat.runs import Run
    from sbiplat.simulator import Simulator, simulator
    from sbiplat.training.rows import pairs
    from sbiplat.training.trainer import train
    from sbiplat.training.tune import tune

__version__ = "0.1.0"

_HOMES = {
    "sbiplat.bank.bank": ("Bank",),
    "sbiplat.bank.fill": ("simulate",),
    "sbiplat.command": ("command_simulator",),
    "sbiplat.diagnostics.predictive": ("predictive_check",),
    "sbiplat.errors": ("Misspecified", "Uncertified", "Unreliable", "UserError"),
    "sbiplat.diagnostics.attack": ("attack",),
    "sbiplat.gate.certificate": ("Certificate",),
    "sbiplat.gate.door": ("load",),
    "sbiplat.gate.examine": ("gate",),
    "sbiplat.gate.learning": ("learning_curve",),
    "sbiplat.gate.predictive": ("predictive_coverage",),
    "sbiplat.gate.recalibrate": ("recalibrate",),
    "sbiplat.gate.verify": ("verify",),
    "sbiplat.gate.local": ("local_c2st",),
    "sbiplat.observation": ("read_observation",),
    "sbiplat.posteriors.base": ("Posterior",),
    "sbiplat.posteriors.from_sbi": ("from_sbi",),
    "sbiplat.posteriors.weighted": ("Weighted",),
    "sbiplat.posteriors.nearest": ("nearest",),
    "sbiplat.prior": ("Beta", "Gamma", "HalfNormal", "LogNormal", "LogUniform", "MultivariateNormal", "Normal", "Prior",
                      "TruncatedNormal", "Uniform"),
    "sbiplat.report.page": ("report",),
    "sbiplat.runs": ("Run",),
    "sbiplat.simulator": ("Simulator", "simulator"),
    "sbiplat.training.rows": ("pairs",),
    "sbiplat.training.trainer": ("train",),
    "sbiplat.training.tune": ("tune",),
}
_HOME = {name: module for module, names in _HOMES.items() for name in names}

__all__ = [
    "Bank", "Beta", "Certificate", "Gamma", "HalfNormal", "LogNormal", "LogUniform", "Misspecified", "MultivariateNormal",
    "Normal", "Posterior", "Prior", "Run", "Simulator", "TruncatedNormal", "Uncertified", "Uniform", "Unreliable", "UserError",
    "Weighted", "attack", "command_simulator", "from_sbi", "gate", "learning_curve", "load", "local_c2st", "nearest", "pairs",
    "predictive_check", "predictive_coverage", "read_observation", "recalibrate", "report", "simulate", "simulator", "symmetry",
    "train", "tune", "verify",
]


def __getattr__(name: str) -> Any:
    if name == "symmetry":
        return import_module("sbiplat.symmetry")
    if name not in _HOME:
        raise AttributeError(f"module 'sbiplat' has no attribute {name!r}")
    return getattr(import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOME, "symmetry"})


class _Package(ModuleType):
    """`sp.simulator`, `sp.gate` and `sp.report` are the functions, though rooms of the house have the same names.

    Importing the room `sbiplat.gate` would set the attribute to the room; a property takes precedence and lets it pass.
    """

    simulator = property(lambda self: __getattr__("simulator"), lambda self, room: None)
    gate = property(lambda self: __getattr__("gate"), lambda self, room: None)
    report = property(lambda self: __getattr__("report"), lambda self, room: None)


sys.modules[__name__].__class__ = _Package
