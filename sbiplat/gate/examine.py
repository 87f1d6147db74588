"""`sp.gate`: a run is examined on held-out pairs, and RUN/certificate.json says what was found.

Under `mpiexec -n R` all ranks run the same program: each prepares by itself, the work is spread (`diagnostics/spread.py`), and the first
rank writes.
"""

from __future__ import annotations

import io
import platform
import time
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch

from sbiplat import files
from sbiplat.bank.bank import Bank
from sbiplat.bank.farm import mpi_world, one_fate, together
from sbiplat.bank.layout import versions
from sbiplat.diagnostics.examined import Examined
from sbiplat.diagnostics.spread import Spread
from sbiplat.errors import SettingError, Uncertified
from sbiplat.gate import signature
from sbiplat.gate.certificate import Certificate, digests_of, hashed
from sbiplat.gate.criteria import DRAFT, PARTS, PUBLICATION, Criteria, at_level
from sbiplat.gate.criterion import Part
from sbiplat.gate.diagnosis import diagnose
from sbiplat.gate.rows import examined_of
from sbiplat.gate.schema import FORMAT_VERSION
from sbiplat.progress import Progress, silent
from sbiplat.runs import Run
from sbiplat.settings import whole_seed
from sbiplat.simulator import Simulator
from sbiplat.source import code_digest

T = TypeVar("T")


def gate(
    run: Run | str | Path, *, n: int | None = None, level: str = "standard", seed: int = 0, bank: str | Path | None = None,
    simulator: Simulator | str | None = None, functions: Mapping[str, Callable[[Any], Any]] | None = None,
    references: Callable[[Any], Any] | None = None, device: str = "cpu", key: str | Path | None = None, workers: int = 1,
    progress: Progress | None = None, **thresholds: Any,
) -> Certificate:
    """Test a finished run on held-out pairs, write its certificate and return it, passed or not.

    n: pairs, by default those of the level or as many as were held out. level: draft, standard or publication; a draft opens no door, and
    never replaces a certificate that holds. simulator: of a bank of signals, as for `train`. functions: of theta (..., D) to (...), by
    name, whose coverage is to be tested beside the parameters'. references: x, a batch of observations, to theta (B, D) or (B, R, D), as
    further reference points of TARP; they must not come from the posterior. key: file of an Ed25519 key that signs.
    workers: local processes, of one thread each; under mpiexec the ranks count. The figures are the same on any number of either.
    thresholds: fields of `Criteria` by name, which go before the level's.
    """
    comm = mpi_world()
    first, start = comm is None or comm.Get_rank() == 0, time.monotonic()
    progress = (progress or Progress.auto()) if first else silent

    def prepare() -> tuple[Any, Examination]:
        require_callables(functions, references)
        signer = signature.read_private(key) if key is not None and first else None
        criteria = at_level(level, {**thresholds, **({"pairs": n} if n is not None else {})})
        spread = Spread(comm, workers_on(device, workers))
        examination = Examination.of(run, criteria, level, seed, bank, simulator, device, spread, progress)
        own = replace(examination.examined, functions=dict(functions or {}), references=references)
        return signer, replace(examination, examined=own)

    with one_fate(comm) if comm else nullcontext():
        signer, examination = _alike(comm, prepare)
        parts = examination.parts()

        def finish() -> dict[str, Any] | None:
            return _written(examination, parts, signer, time.monotonic() - start) if first else None

        content = _alike(comm, finish)
        content = comm.bcast(content) if comm else content
    return Certificate(content, examination.run.path)


def require_callables(functions: Mapping[str, Any] | None, references: Any) -> None:
    """Raises SettingError where the user's own functions of the gate are none."""
    for name, function in dict(functions or {}).items():
        if not isinstance(name, str) or not name.strip() or not callable(function):
            raise SettingError(f"functions must be named functions of theta, as functions={{\"sum\": lambda theta: theta.sum(-1)}}; "
                               f"{name!r} is {function!r}")
    if references is not None and not callable(references):
        raise SettingError("references must be a function of x that gives theta, (B, D); the number of points is reference_points")


def workers_on(device: str, workers: int) -> int:
    """A number of local processes; raises SettingError for what is none, or where they cannot share the work alike."""
    if isinstance(workers, bool) or not isinstance(workers, int) or workers < 1:
        raise SettingError(f"workers must be a whole number of at least 1, got {workers!r}")
    if workers > 1 and torch.device(device).type != "cpu":
        raise SettingError(f"workers = {workers} are processes on the cpu; on {device} leave them out")
    if workers > 1 and torch.get_num_threads() > 1:  # forked, they would lack the threads of this process, and round otherwise
        raise SettingError(f"workers = {workers} are processes of one thread each, and this one has {torch.get_num_threads()}: set "
                           "OMP_NUM_THREADS=1 or torch.set_num_threads(1) before, or leave workers out")
    return workers


def _alike(comm: Any, function: Callable[[], T]) -> T:
    """Run on this process, or on every rank, where one's mistake is told once and ends all."""
    return together(comm, function) if comm else function()


@dataclass(frozen=True)
class Examination:
    """All that the figures are a function of, ready to be measured."""

    run: Run
    bank: Bank
    criteria: Criteria
    level: str
    examined: Examined
    device: str

    @classmethod
    def of(
        cls, run: Run | str | Path, criteria: Criteria, level: str, seed: int, bank: str | Path | None, simulator: Simulator | str | None,
        device: str, spread: Spread, progress: Progress,
    ) -> Examination:
        """Open all of it; raises UserError for what is missing or has changed."""
        run = (run if isinstance(run, Run) else Run.open(run)).require_finished()
        source = run.bank(bank)
        examined = examined_of(run, source, criteria.pairs, whole_seed(seed), simulator, device, progress)
        if level == PUBLICATION and len(examined.truth) < criteria.least_pairs:
            raise SettingError(f"level publication needs {criteria.least_pairs} held-out pairs, and {run.path} has {len(examined.truth)}: "
                               f"nothing was done; a bank of {10 * criteria.least_pairs} rows holds out so many, or gate at level standard")
        return cls(run, source, criteria, level, replace(examined, spread=spread), device)

    def parts(self) -> list[Part]:
        """What each kind of examination finds."""
        return [examine(self.examined, self.criteria) for examine in PARTS]


def measured(parts: list[Part]) -> dict[str, Any]:
    """What of the certificate a second examination must find again: verdicts and figures, as JSON gives them back."""
    verdicts = [v for part in parts for v in part.criteria]
    return plain({
        "passed": all(v.passed for v in verdicts),
        "criteria": [asdict(v) for v in verdicts],
        "not_tested": [name for part in parts for name in part.not_tested],
        "figures": {name: value for part in parts for name, value in part.figures.items()},
    })


def _written(examination: Examination, parts: list[Part], signer: Any, seconds: float) -> dict[str, Any]:
    """The certificate's content; it and the diagnostics are written into the run, unless a draft meets a certificate that holds."""
    run, bank, rows = examination.run, examination.bank, examination.run.record["split"]
    arrays = io.BytesIO()
    np.savez_compressed(arrays, **{name: values for part in parts for name, values in part.arrays.items()})
    content = plain({
        "format_version": FORMAT_VERSION,
        "level": examination.level,
        **measured(parts),
        "diagnosis": [f.to_json() for f in diagnose(run, [v for part in parts for v in part.criteria if not v.passed],
                                                    {name: values for part in parts for name, values in part.arrays.items()})],
        "thresholds": asdict(examination.criteria),
        "valid_for": {"observations": 1, "parameters": run.prior.names, "device": examination.device},
        "estimator": run.architecture.estimator,
        "chain": examination.examined.posterior.describe(),
        "simulator": bank.header.simulator,
        "seeds": {"gate": examination.examined.seed, "training": run.seed, "bank": bank.header.seed},
        "counts": {"bank_rows": bank.rows, "held_out_rows": rows["held_out"], "left_out_rows": rows["left_out"]},
        "digests": {**digests_of(run), "diagnostics": files.digest_bytes(arrays.getvalue()), "code": code_digest()},
        "versions": versions(),
        "machine": machine(examination.device),
        "created": files.now(),
        "cost": {"seconds": round(seconds, 1), "processes": examination.examined.spread.processes},
    })
    content["sha256"] = hashed(content)
    if signer is not None:
        content = signature.signed(content, signer)
    standing = _standing(run) if examination.level == DRAFT else None
    if standing is not None:
        examination.examined.progress.say(f"{run.path / 'certificate.json'} stays: it is of level {standing.level}, and a draft replaces "
                                          "none that holds")
        return content
    path = run.path / "diagnostics.npz"
    with files.disk_errors(path):
        path.unlink(missing_ok=True)
        with files.atomic_path(path) as temporary:
            temporary.write_bytes(arrays.getvalue())
    Certificate(content, run.path).save()
    return content


def _standing(run: Run) -> Certificate | None:
    """The certificate of a run where it holds and is no draft."""
    try:
        found = Certificate.read(run).require_bound(run)
    except Uncertified:
        return None
    return found if found.level != DRAFT else None


def machine(device: str) -> dict[str, Any]:
    """What floating-point results may depend on, besides versions."""
    processor = platform.processor() or platform.machine()
    about = Path("/proc/cpuinfo")
    if about.is_file():
        named = (line.partition(":")[2].strip() for line in about.read_text(errors="replace").splitlines() if line.startswith("model name"))
        processor = next(named, processor)
    kind = torch.device(device).type
    accelerator = torch.cuda.get_device_name(device) if kind == "cuda" else "" if kind == "cpu" else kind
    return {"system": f"{platform.system()} {platform.machine()}", "processor": processor, "accelerator": accelerator,
            "threads": torch.get_num_threads()}


def plain(value: Any) -> Any:
    """Tuples as lists and numpy scalars as numbers: what JSON gives back, so that the hash can be computed again."""
    if isinstance(value, dict):
        return {str(k): plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [plain(v) for v in value]
    return value.item() if isinstance(value, np.generic) else value
