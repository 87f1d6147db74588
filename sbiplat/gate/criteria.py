"""All criteria of the gate: one dataclass of thresholds, the kinds of examination, and the levels at which they are made.

A new kind is a file beside this one, with its thresholds and `examine(examined, criteria) -> Part`, and a line here.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from sbiplat.diagnostics.examined import Examined
from sbiplat.errors import SettingError
from sbiplat.gate import calibration, misspecification, robustness
from sbiplat.gate.criterion import Part
from sbiplat.settings import build


@dataclass(frozen=True)
class Criteria(misspecification.MisspecificationCriteria, robustness.RobustnessCriteria, calibration.CalibrationCriteria):
    """How much is tested, and the thresholds."""


PARTS: tuple[Callable[[Examined, Criteria], Part], ...] = (calibration.examine, robustness.examine, misspecification.examine)
DRAFT, PUBLICATION = "draft", "publication"  # for early sight, and opens no door; for a paper
LEVELS: Mapping[str, Mapping[str, Any]] = {
    DRAFT: {"pairs": 200, "attacked": 30, "attack_restarts": 1},
    "standard": {},
    PUBLICATION: {"pairs": 5000, "least_pairs": 5000, "attacked": 500, "attack_steps": 200, "attack_restarts": 5, "attack_queries": 1000},
}


def at_level(level: str, settings: Mapping[str, Any]) -> Criteria:
    """The criteria of a level, with settings of one's own over them; raises SettingError."""
    if level not in LEVELS:
        raise SettingError(f"level = {level!r}: expected one of {', '.join(LEVELS)}")
    return build(Criteria, {**LEVELS[level], **settings})
