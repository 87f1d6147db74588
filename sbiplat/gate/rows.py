"""Rows of a run's bank for the gate: held-out pairs, which training never saw, and rows beside them."""

from __future__ import annotations

from typing import Any

import numpy as np

from sbiplat.bank.bank import Bank
from sbiplat.bank.layout import STATUS
from sbiplat.bank.stream import pairs_at, split, take
from sbiplat.diagnostics.examined import Examined
from sbiplat.errors import RunError
from sbiplat.observe import Observe, check_observe
from sbiplat.posteriors.of_run import from_run
from sbiplat.progress import Progress
from sbiplat.runs import Run
from sbiplat.settings import build as build_settings
from sbiplat.simulator import Simulator
from sbiplat.source import source_digest
from sbiplat.symmetry import names
from sbiplat.training.begin import TrainSettings, observe_of

REFERENCE_ROWS = 10_000
REFERENCE_BYTES = 2**28


def examined_of(
    run: Run, source: Bank, pairs: int, seed: int, simulator: Simulator | str | None, device: str, progress: Progress,
) -> Examined:
    """A run's posterior with at most so many of its held-out pairs, and other rows of its bank; raises UserError for what has changed."""
    if simulator is not None:
        names.register_of(simulator)
    observe = observe_of(source, simulator, f"sbiplat gate {run.path}")
    if observe and source_digest(observe.function) != run.record.get("observe_source"):
        raise RunError(f"the code of observe has changed since {run.path} was trained; train again")
    held_out, training = held_out_pairs(run, source, pairs, seed)
    if observe:
        some = take(held_out, slice(8))
        check_observe(observe, some["x"], some["parameters"])
        held_out, training = (observed(observe, p, seed, k) for k, p in enumerate((held_out, training)))
    return Examined(from_run(run, device), held_out, training, seed, progress)


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
