"""What a look at a bank shows: how long its rows took, how many failed, and where in theta."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sbiplat.bank import segment
from sbiplat.bank.bank import Bank
from sbiplat.bank.layout import STATUS

MOST_ROWS = 1_000_000
LEAST_FAILURES = 5


@dataclass(frozen=True)
class Look:
    """theta (N, D), status (N,) and seconds (N,) of rows that are there, at most a million; and what failed rows said."""

    theta: NDArray[np.float64]
    status: NDArray[np.uint8]
    seconds: NDArray[np.float32]
    messages: dict[int, str]


def look(bank: Bank) -> Look:
    """Rows of the bank spread over all its segments, for figures; all of them where there are few."""
    parts = bank.segments
    share = min(1.0, MOST_ROWS / max(1, sum(len(p.segment) for p in parts)))
    theta, status, seconds, messages = [], [], [], {}
    for part in parts:
        first = part.segment.first
        stop = min(bank.rows, first + max(1, round(share * len(part.segment))))
        if stop <= first:
            continue
        spent, texts = segment.facts(part.segment)
        data = bank.slab(part, first, stop, ["theta", "status"])
        theta.append(data["theta"])
        status.append(data["status"])
        seconds.append(spent[:stop - first] if len(spent) else segment.no_seconds(stop - first))
        messages.update(texts)
    if not theta:
        return Look(np.zeros((0, bank.header.prior.dim)), np.zeros(0, np.uint8), np.zeros(0, np.float32), {})
    return Look(np.concatenate(theta), np.concatenate(status), np.concatenate(seconds), messages)


def where_failed(seen: Look, names: tuple[str, ...]) -> list[dict[str, Any]]:
    """For each kind of failure: the parameter whose values tell failed rows best from good ones, and where it then lies.

    Told apart by the Kolmogorov-Smirnov distance, named `apart`: 0 where failure does not depend on the parameter, 1 where it
    decides. `range` and `range_ok` are the middle 90 % of its values.
    """
    found = []
    good = seen.theta[seen.status == STATUS["ok"]]
    for name, code in STATUS.items():
        bad = seen.theta[seen.status == code]
        if not code or len(bad) < LEAST_FAILURES or len(good) < LEAST_FAILURES:
            continue
        distances = [_distance(bad[:, k], good[:, k]) for k in range(len(names))]
        k = int(np.argmax(distances))
        found.append({"status": name, "rows": len(bad), "parameter": names[k], "apart": round(distances[k], 3),
                      "range": np.quantile(bad[:, k], [0.05, 0.95]).tolist(), "range_ok": np.quantile(good[:, k], [0.05, 0.95]).tolist()})
    return found


def _distance(a: NDArray[np.float64], b: NDArray[np.float64]) -> float:
    """Two-sample Kolmogorov-Smirnov distance."""
    at = np.concatenate([a, b])
    return float(np.abs(np.searchsorted(np.sort(a), at, "right") / len(a) - np.searchsorted(np.sort(b), at, "right") / len(b)).max())
