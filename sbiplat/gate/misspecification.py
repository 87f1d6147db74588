"""Misspecification: the gate calibrates the test that every observation meets when it is sampled, and sees that the test works.

What the test holds observations against lies in RUN/diagnostics.npz, which the certificate binds, so that sampling needs no bank.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sbiplat.diagnostics.examined import Examined
from sbiplat.diagnostics.misspecification import Reference, power
from sbiplat.gate.criterion import Criterion, Part
from sbiplat.settings import setting

NAME = "misspecification"
PREFIX = f"{NAME}_"
OF_SPACE = ("loc", "scale", "mean", "basis", "variances", "rest", "rows")


@dataclass(frozen=True)
class MisspecificationCriteria:
    """What an observation is told of, and what the test of it must hold."""

    unlike: float = setting(0.01, "an observation whose p-value is below this is told of as unlike the bank", low=1e-6, high=0.5)
    unlike_alarm: float = setting(0.001, "chance that a run is refused because this test has not its level", low=1e-9, high=0.5)
    departure: float = setting(6.0, "robust sd by which one feature is moved to measure the test's power", low=0.0)


def examine(examined: Examined, criteria: MisspecificationCriteria) -> Part:
    """The part of the gate that calibrates the test; its power is a figure and no criterion, since it depends on what x is."""
    held_out = len(examined.truth)
    if held_out // 2 + 1 <= 1 / criteria.unlike or len(examined.training["theta"]) < 10:
        return Part((), {}, not_tested=(NAME,))
    reference = Reference.fit(examined, criteria.unlike)
    found = power(reference, examined, criteria.departure)
    passed = found.level_p_value >= criteria.unlike_alarm
    statement = (f"{found.alarms:.1%} of held-out pairs are called unlike the others (level {criteria.unlike:.1%}), Kolmogorov-Smirnov p = "
                 f"{found.level_p_value:.2g}; {found.one_feature:.0%} are once one feature is moved by {criteria.departure:g} robust sd, "
                 f"{found.noise:.0%} with noise of one robust sd in every feature")
    mend = "" if passed else "the held-out pairs are not of one kind: gate again with another --seed; if it stays, look at the bank"
    figures = {"held_out": held_out, "rows": reference.tails.rows, "spaces": list(reference.spaces), "level": criteria.unlike,
               "departure": criteria.departure, "seed": reference.seed, **asdict(found)}
    return Part((Criterion("misspecification level", passed, found.level_p_value, criteria.unlike_alarm, statement, mend),),
                {NAME: figures}, arrays_of(reference))


def arrays_of(reference: Reference) -> dict[str, NDArray[Any]]:
    """All that a `Reference` is made of, for RUN/diagnostics.npz."""
    out: dict[str, Any] = {"units": reference.units, "held_out": reference.held_out, "ranks": reference.tails.ranks,
                           "table": reference.tails.table}
    for name, space in reference.spaces.items():
        out |= {f"{name}_{key}": np.asarray(getattr(space, key)) for key in OF_SPACE}
        out[f"{name}_kept"] = reference.kept[name]
    return {f"{PREFIX}{key}": value for key, value in out.items()}
