"""Rows of a run's bank for the gate: held-out pairs, which training never saw, and rows beside them."""

from __future__ import annotations

from typing import Any

import numpy as np

from sbiplat.bank.bank import Bank
from sbiplat.bank.layout import STATUS
from sbiplat.bank.stream import pairs_at, split, take
from sbiplat.errors import RunError
from sbiplat.observe import Observe
from sbiplat.runs import Run
from sbiplat.settings import build as build_settings
from sbiplat.training.begin import TrainSettings

REFERENCE_ROWS = 10_000
REFERENCE_BYTES = 2**28


def held_out_pairs(run: Run, bank: Bank, most: int, seed: int) -> tuple[dict[str, Any], dict[str, Any]]:
    """Held-out pairs, which training never saw, and other rows for the references."""
    settings = build_settings(TrainSettings, run.record["training"])
    apart = split(bank, run.seed, settings.validation, settings.held_out, settings.held_out_most)
    if apart.digest() != run.record["split"]["digest"]:
        raise RunError(f"the held-out rows of {run.path} cannot be found again: its split differs; train again")
    rng = np.random.default_rng(np.random.SeedSequence(seed, spawn_key=(0x9A13,)))
    most_rows = max(1000, min(REFERENCE_ROWS, REFERENCE_BYTES // bank.header.x.row_bytes))
    rows = rng.choice(bank.rows, min(bank.rows, most_rows), replace=False)
    rows = rows[(bank.status[rows] == STATUS["ok"]) & ~np.isin(rows, apart.held_out)]
    return take(pairs_at(bank, apart.held_out), slice(most)), pairs_at(bank, rows)


def observed(observe: Observe, pairs: dict[str, Any], seed: int, part: int) -> dict[str, Any]:
    """Pairs with one draw of x each, fixed by the gate's seed, in place of signals."""
    size = 1000
    drawn = []
    for k, first in enumerate(range(0, len(pairs["theta"]), size)):
        some = take(pairs, slice(first, first + size))
        noise = int(np.random.SeedSequence(seed, spawn_key=(0x0B5F, part, k)).generate_state(1, np.uint64)[0] >> 1)
        drawn.append(observe.on_arrays(some["x"], some["parameters"], noise))
    return {"theta": pairs["theta"], "x": {name: np.concatenate([d[name] for d in drawn]) for name in drawn[0]}}
