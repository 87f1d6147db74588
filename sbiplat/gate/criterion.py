"""What an examination of one kind hands to the gate: verdicts, figures for the certificate, arrays for the report."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from numpy.typing import NDArray


@dataclass(frozen=True)
class Criterion:
    """One criterion's verdict: the figure, what it was held against, and what usually mends it."""

    name: str
    passed: bool
    figure: float
    threshold: float
    statement: str
    mend: str = ""


@dataclass(frozen=True)
class Part:
    """One kind of examination. figures: of the certificate, as JSON takes them. arrays: for RUN/diagnostics.npz. not_tested: what could not
    be examined here, in a word each."""

    criteria: tuple[Criterion, ...]
    figures: Mapping[str, Any]
    arrays: Mapping[str, NDArray[Any]] = field(default_factory=dict)
    not_tested: tuple[str, ...] = ()


def enough(name: str, have: int, least: int, what: str, mend: str) -> Criterion:
    """That there are at least so many."""
    return Criterion(name, have >= least, have, least, f"{what}, at least {least} are needed", "" if have >= least else mend)
