"""`sp.gate`: a run is examined on held-out pairs, and RUN/certificate.json says what was found."""

from __future__ import annotations

import io
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np

from sbiplat import files
from sbiplat.bank.bank import Bank
from sbiplat.bank.layout import STATUS, versions
from sbiplat.bank.stream import pairs_at, split, take
from sbiplat.diagnostics.examined import Examined
from sbiplat.errors import RunError, SettingError
from sbiplat.gate.certificate import FORMAT_VERSION, Certificate
from sbiplat.gate.criteria import NOT_TESTED, PARTS, Criteria
from sbiplat.gate.criterion import Part
from sbiplat.observe import Observe, check_observe
from sbiplat.posteriors.of_run import from_run
from sbiplat.progress import Progress
from sbiplat.runs import Run
from sbiplat.settings import build as build_settings
from sbiplat.settings import whole_seed
from sbiplat.simulator import Simulator
from sbiplat.source import source_digest
from sbiplat.training.begin import TrainSettings, observe_of

REFERENCE_ROWS = 10_000
REFERENCE_BYTES = 2**28


def gate(
    run: Run | str | Path, *, n: int | None = None, seed: int = 0, bank: str | Path | None = None,
    simulator: Simulator | str | None = None, functions: Mapping[str, Callable[[Any], Any]] | None = None,
    references: Callable[[Any], Any] | None = None, device: str = "cpu", progress: Progress | None = None, **thresholds: Any,
) -> Certificate:
    """Test a finished run on held-out pairs, write its certificate and return it, passed or not.

    n: pairs, by default 1000 or as many as were held out. simulator: of a bank of signals, as for `train`. functions: of theta (..., D) to
    (...), by name, whose coverage is to be tested beside the parameters'. references: x, a batch of observations, to theta (B, D) or
    (B, R, D), as further reference points of TARP; they must not come from the posterior. thresholds: fields of `Criteria` by name.
    """
    run = (run if isinstance(run, Run) else Run.open(run)).require_finished()
    seed = whole_seed(seed)
    require_callables(functions, references)
    criteria = build_settings(Criteria, {**thresholds, **({"pairs": n} if n is not None else {})})
    progress = progress or Progress.auto()
    start = time.monotonic()
    source = run.bank(bank)
    examined = examined_of(run, source, criteria.pairs, seed, simulator, device, progress)
    examined = replace(examined, functions=dict(functions or {}), references=references)
    parts = [examine(examined, criteria) for examine in PARTS]
    certificate = _certify(run, source, criteria, parts, seed, time.monotonic() - start)
    certificate.save()
    return certificate


def examined_of(run: Run, source: Bank, pairs: int, seed: int, simulator: Simulator | str | None, device: str,
                progress: Progress) -> Examined:
    """A run's posterior with at most so many of its held-out pairs, and other rows of its bank."""
    observe = observe_of(source, simulator, f"sbiplat gate {run.path}")
    if observe and source_digest(observe.function) != run.record.get("observe_source"):
        raise RunError(f"the code of observe has changed since {run.path} was trained; train again")
    held_out, training = _pairs(run, source, pairs, seed)
    if observe:
        some = take(held_out, slice(8))
        check_observe(observe, some["x"], some["parameters"])
        held_out, training = (_observed(observe, p, seed, k) for k, p in enumerate((held_out, training)))
    return Examined(from_run(run, device), held_out, training, seed, progress)


def require_callables(functions: Mapping[str, Any] | None, references: Any) -> None:
    """Raises SettingError where the user's own functions of the gate are none."""
    for name, function in dict(functions or {}).items():
        if not isinstance(name, str) or not name.strip() or not callable(function):
            raise SettingError(f"functions must be named functions of theta, as functions={{\"sum\": lambda theta: theta.sum(-1)}}; "
                               f"{name!r} is {function!r}")
    if references is not None and not callable(references):
        raise SettingError("references must be a function of x that gives theta, (B, D); the number of points is reference_points")


def _pairs(run: Run, bank: Bank, most: int, seed: int) -> tuple[dict[str, Any], dict[str, Any]]:
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


def _observed(observe: Observe, pairs: dict[str, Any], seed: int, part: int) -> dict[str, Any]:
    """Pairs with one draw of x each, fixed by the gate's seed, in place of signals."""
    size = 1000
    drawn = []
    for k, first in enumerate(range(0, len(pairs["theta"]), size)):
        some = take(pairs, slice(first, first + size))
        noise = int(np.random.SeedSequence(seed, spawn_key=(0x0B5F, part, k)).generate_state(1, np.uint64)[0] >> 1)
        drawn.append(observe.on_arrays(some["x"], some["parameters"], noise))
    return {"theta": pairs["theta"], "x": {name: np.concatenate([d[name] for d in drawn]) for name in drawn[0]}}


def _certify(run: Run, bank: Bank, criteria: Criteria, parts: list[Part], seed: int, seconds: float) -> Certificate:
    verdicts = [v for part in parts for v in part.criteria]
    arrays, path = io.BytesIO(), run.path / "diagnostics.npz"
    np.savez_compressed(arrays, **{name: values for part in parts for name, values in part.arrays.items()})
    path.unlink(missing_ok=True)
    with files.disk_errors(path), files.atomic_path(path) as temporary:
        temporary.write_bytes(arrays.getvalue())
    content: dict[str, Any] = {
        "format_version": FORMAT_VERSION,
        "passed": all(v.passed for v in verdicts),
        "criteria": [asdict(v) for v in verdicts],
        "not_tested": [*NOT_TESTED, *(name for part in parts for name in part.not_tested)],
        "thresholds": asdict(criteria),
        "figures": {name: value for part in parts for name, value in part.figures.items()},
        "estimator": run.architecture.estimator,
        "simulator": bank.header.simulator,
        "seeds": {"gate": seed, "training": run.seed, "bank": bank.header.seed},
        "digests": {"weights": run.weights_digest, "config": run.config_digest, "bank": bank.digest,
                    "split": run.record["split"]["digest"], "diagnostics": files.digest_file(path)},
        "left_out_rows": run.record["split"]["left_out"],
        "versions": versions(),
        "created": files.now(),
        "seconds": round(seconds, 1),
    }
    content = _plain(content)
    return Certificate({**content, "sha256": files.digest_of(content)}, run.path)


def _plain(value: Any) -> Any:
    """Tuples as lists and numpy scalars as numbers: what JSON gives back, so that the hash can be computed again."""
    if isinstance(value, dict):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(v) for v in value]
    return value.item() if isinstance(value, np.generic) else value
