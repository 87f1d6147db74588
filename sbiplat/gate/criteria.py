"""All criteria of the gate: one dataclass of thresholds, the kinds of examination, and the levels at which they are made.

A new kind is a file beside this one, with its thresholds and `examine(examined, criteria) -> Part`, and a line here.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from sbiplat.diagnostics.examined import Examined
from sbiplat.errors import SettingError
from sbiplat.gate import calibration
from sbiplat.gate.criterion import Part
from sbiplat.settings import build

NOT_TESTED = ("robustness", "misspecification")


@dataclass(frozen=True)
class Criteria(calibration.CalibrationCriteria):
    """How much is tested, and the thresholds."""


PARTS: tuple[Callable[[Examined, Criteria], Part], ...] = (calibration.examine,)
DRAFT = "draft"  # for early sight: opens no door
LEVELS: Mapping[str, Mapping[str, Any]] = {DRAFT: {"pairs": 200}, "standard": {}, "publication": {"pairs": 5000, "least_pairs": 5000}}


def at_level(level: str, settings: Mapping[str, Any]) -> Criteria:
    """The criteria of a level, with settings of one's own over them; raises SettingError."""
    if level not in LEVELS:
        raise SettingError(f"level = {level!r}: expected one of {', '.join(LEVELS)}")
    return build(Criteria, {**LEVELS[level], **settings})
