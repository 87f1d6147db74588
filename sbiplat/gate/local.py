"""`sp.local_c2st`: is the posterior right at this very observation?"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from sbiplat.diagnostics import classifier
from sbiplat.diagnostics.classifier import LocalC2ST
from sbiplat.errors import ObservationError, SettingError
from sbiplat.gate.rows import examined_of
from sbiplat.progress import Progress
from sbiplat.runs import Run
from sbiplat.settings import whole_seed
from sbiplat.simulator import Simulator

MOST_PAIRS = 5000


def local_c2st(
    run: Run | str | Path, x: Any, *, n: int = MOST_PAIRS, draws: int = 1000, nulls: int = 500, seed: int = 0,
    bank: str | Path | None = None, simulator: Simulator | str | None = None, device: str = "cpu",
) -> LocalC2ST:
    """The local classifier two-sample test (Linhart et al., 2023) of a finished run at one observation x.

    n: held-out pairs at most, draws: of the posterior at x, nulls: refits under the hypothesis; the p-value is at least 1 / (nulls + 1). It
    needs no certificate, since it asks whether the posterior deserves one there. Raises ObservationError where x is not one observation.
    """
    run = (run if isinstance(run, Run) else Run.open(run)).require_finished()
    for name, value, least in (("n", n, 100), ("draws", draws, 100), ("nulls", nulls, 19)):
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise SettingError(f"{name} must be a whole number of at least {least}, got {value!r}")
    examined = examined_of(run, run.bank(bank), n, whole_seed(seed), simulator, device, Progress.auto())
    fields, batched = examined.posterior.x.batch(x)
    if batched and len(next(iter(fields.values()))) != 1:
        raise ObservationError("local_c2st takes one observation at a time")
    return classifier.local_c2st(examined, fields, draws, nulls)
