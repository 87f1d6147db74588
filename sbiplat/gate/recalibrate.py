"""`sp.recalibrate`: a run's posterior stretched until pairs that training did not fit get uniform ranks, as a run of its own.

The pairs are the run's validation rows: they chose the epoch, and no gradient saw them. The gate tests the new run on the held-out rows,
which neither saw.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import numpy as np

from sbiplat import files
from sbiplat.bank.stream import pairs_at, split
from sbiplat.errors import RunError
from sbiplat.gate.rows import observed
from sbiplat.posteriors import recalibrated
from sbiplat.posteriors.of_run import from_run
from sbiplat.progress import Progress
from sbiplat.runs import Run
from sbiplat.settings import build as build_settings
from sbiplat.simulator import Simulator
from sbiplat.training.begin import TrainSettings, check_place, observe_of

LEAST_PAIRS, MOST_PAIRS = 200, 2000


def recalibrate(
    run: Run | str | Path, *, out: str | Path, bank: str | Path | None = None, simulator: Simulator | str | None = None,
    device: str = "cpu", progress: Progress | None = None,
) -> Run:
    """A new run at `out`: the same net, its draws recalibrated (see `posteriors.recalibrated`); it has no certificate yet.

    Arguments as for `gate`. Raises RunError where the run is recalibrated already, has fewer than 200 validation rows, or `out` is taken.
    """
    run, out = (run if isinstance(run, Run) else Run.open(run)).require_finished(), Path(out)
    progress = progress or Progress.auto()
    if run.recalibration is not None:
        raise RunError(f"{run.path} is recalibrated already; recalibrate the run that it was made of")
    check_place(out)
    source = run.bank(bank)
    settings = build_settings(TrainSettings, run.record["training"])
    apart = split(source, run.seed, settings.validation, settings.held_out or 0.0, settings.held_out_most or 0)
    rows = apart.validation[:MOST_PAIRS]
    if len(rows) < LEAST_PAIRS:
        raise RunError(f"recalibration needs {LEAST_PAIRS} validation rows, and {run.path} has {len(rows)}; make a larger bank, or train "
                       "with a larger validation")
    pairs = pairs_at(source, rows)
    observe = observe_of(source, simulator, f"sbiplat recalibrate {run.path}")
    if observe:
        pairs = observed(observe, pairs, run.seed, 3)
    progress.say(f"recalibrating on {len(rows)} pairs")
    maps = recalibrated.fit(from_run(run, device).sampler, np.asarray(pairs["theta"], float), pairs["x"])
    record = {**run.record, "recalibration": {**maps.to_json(), "pairs": len(rows), "of": run.config_digest},
              "bank": {**run.record["bank"], "relative_path": os.path.relpath(source.path, out)}}
    with files.disk_errors(out):
        out.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(run.weights_path, out / "weights.safetensors")
        if (run.path / "metrics.jsonl").is_file():
            shutil.copyfile(run.path / "metrics.jsonl", out / "metrics.jsonl")
    files.write_json(out / "run.json", record)
    return Run.open(out)
