"""Numbers and records as a reader would write them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any


def to_digits(value: float, error: float) -> str:
    """A value to the third significant digit of its error."""
    if not math.isfinite(value) or not math.isfinite(error) or error <= 0:
        return f"{value:.6g}"
    decimals = 2 - math.floor(math.log10(error))
    if abs(value) < 1e7 and decimals <= 6:
        return f"{round(value, decimals) + 0.0:.{max(decimals, 0)}f}".replace("-", "−")
    digits = decimals + math.floor(math.log10(max(abs(value), error)))
    return f"{value:.{min(max(digits, 0), 15)}e}".replace("-", "−")


def number(value: Any) -> str:
    """A figure of a certificate or setting as text; what is no number is shown as it is."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return str(value)
    return f"{value:.4g}".replace("-", "−").replace("inf", "∞") if isinstance(value, float) else str(value)


def bound(value: float, infinite: str) -> str:
    """An edge of a support, or what infinity is called."""
    return number(float(value)) if math.isfinite(value) else infinite


def items(value: Any) -> list[tuple[str, Any]]:
    """Names and values of a record; none of what is no record."""
    return [(str(k), v) for k, v in value.items()] if isinstance(value, Mapping) else []


def texts(pairs: list[tuple[str, Any]]) -> list[tuple[str, str]]:
    """Names and values as a reader would write them."""
    def text(value: Any) -> str:
        if isinstance(value, list | tuple):
            return ", ".join(text(v) for v in value)
        return "none" if value is None else {True: "yes", False: "no"}[value] if isinstance(value, bool) else number(value)

    return [(name.replace("_", " "), text(value)) for name, value in pairs]
