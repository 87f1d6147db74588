"""The gate and its certificate: nobody uses a posterior that has not been tested.

`gate` tests a run on held-out pairs and writes RUN/certificate.json, which names the criteria, figures, seeds and the
digests of weights, configuration and bank, and carries the SHA-256 of its own canonical form. `load` is the door: it
opens only where the certificate says passed, is unaltered, and was given to these very weights.
"""

from __future__ import annotations

import io
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from sbiplat import files
from sbiplat.bank.bank import Bank
from sbiplat.bank.layout import STATUS, versions
from sbiplat.bank.stream import pairs_at, split, take
from sbiplat.diagnostics.coverage import LEVELS
from sbiplat.diagnostics.held_out import HeldOutFigures, held_out_figures
from sbiplat.errors import RunError, Uncertified
from sbiplat.gate.criteria import NOT_TESTED, Criteria, Criterion, decide
from sbiplat.nets import embeddings
from sbiplat.observe import Observe, check_observe
from sbiplat.posteriors.base import Posterior
from sbiplat.posteriors.of_run import from_run
from sbiplat.progress import Progress
from sbiplat.runs import Run
from sbiplat.settings import build as build_settings
from sbiplat.settings import whole_seed
from sbiplat.simulator import Simulator
from sbiplat.source import source_digest
from sbiplat.training.begin import TrainSettings, observe_of

FORMAT_VERSION = 1
REFERENCE_ROWS = 10_000
REFERENCE_BYTES = 2**28
COVERAGE_FIGURES = ("p_value", "deviation", "deviation_band", "under", "under_band", "over", "over_band")


@dataclass(frozen=True)
class Certificate:
    """The gate's verdict on one run. `content` is certificate.json."""

    content: Mapping[str, Any]
    run_path: Path

    @property
    def passed(self) -> bool:
        return self.content["passed"] is True

    @property
    def figures(self) -> Mapping[str, Any]:
        """All figures by name."""
        return self.content["figures"]

    @property
    def criteria(self) -> list[Criterion]:
        return [Criterion(**c) for c in self.content["criteria"]]

    @property
    def failed(self) -> list[Criterion]:
        return [c for c in self.criteria if not c.passed]

    @property
    def own_thresholds(self) -> str:
        """The thresholds that are not sbiplat's own, in words; "" where all are."""
        usual = asdict(Criteria())
        own = {k: v for k, v in self.content["thresholds"].items() if k not in ("pairs", "draws") and usual.get(k) != v}
        return ", ".join(f"{k} = {v} (usually {usual.get(k)})" for k, v in own.items())

    @property
    def sha256(self) -> str:
        return str(self.content["sha256"])

    @cached_property
    def _computed(self) -> str:
        return files.digest_of({k: v for k, v in self.content.items() if k != "sha256"})

    def save(self, path: str | Path | None = None) -> Path:
        """Write the certificate, by default into its run."""
        path = Path(path) if path else self.run_path / "certificate.json"
        files.write_json(path, dict(self.content))
        return path

    @classmethod
    def read(cls, run: Run) -> Certificate:
        """The certificate of a run; raises Uncertified where there is none or it is damaged."""
        path = run.path / "certificate.json"
        if not path.is_file():
            raise Uncertified(f"{run.path} has not been through the gate; run `sbiplat gate {run.path}`")
        content = files.read_json(path, "certificate", Uncertified)
        try:
            assert content["format_version"] == FORMAT_VERSION
            assert isinstance(content["digests"], dict)
            assert isinstance(content["figures"], dict)
            assert isinstance(content["thresholds"], dict)
            made = cls(content, run.path)
            _ = made.criteria, made.sha256, content["passed"]
            return made
        except (KeyError, TypeError, AssertionError):
            raise Uncertified(f"{path} is damaged or of another format; run `sbiplat gate {run.path}` again") from None

    def require_bound(self, run: Run) -> Certificate:
        """This certificate if it is unaltered and was given to the run as it is on disk now; raises Uncertified with the reason."""
        again = f"run `sbiplat gate {run.path}` again"
        if self._computed != self.sha256:
            raise Uncertified(f"the certificate of {run.path} was altered after it was written; {again}")
        digests = self.content["digests"]
        for what, now in (("weights", run.weights_digest), ("config", run.config_digest), ("bank", run.bank_digest),
                          ("split", run.record["split"]["digest"])):
            if digests.get(what) != now:
                said = str(digests.get(what))[:12]
                raise Uncertified(f"the certificate of {run.path} is for other {what}: it says {said}, the run has {now[:12]}; {again}")
        return self

    def require(self, run: Run) -> Certificate:
        """This certificate if it is bound to the run and says passed; raises Uncertified with the reason."""
        self.require_bound(run)
        if not self.passed:
            first = self.failed[0] if self.failed else None
            more = f" (and {len(self.failed) - 1} more)" if len(self.failed) > 1 else ""
            why = f"{first.name}: {first.statement}{more}; {first.mend}" if first else "no criterion is named"
            raise Uncertified(f"{run.path} was refused by the gate: {why}")
        return self


def gate(
    run: Run | str | Path, *, n: int | None = None, seed: int = 0, bank: str | Path | None = None,
    simulator: Simulator | str | None = None, device: str = "cpu", progress: Progress | None = None, **thresholds: Any,
) -> Certificate:
    """Test a finished run on held-out pairs, write its certificate and return it, passed or not.

    n: pairs, by default 1000 or as many as were held out. simulator: of a bank of signals, as for `train`.
    thresholds: fields of `Criteria` by name.
    """
    run = (run if isinstance(run, Run) else Run.open(run)).require_finished()
    seed = whole_seed(seed)
    criteria = build_settings(Criteria, {**thresholds, **({"pairs": n} if n is not None else {})})
    progress = progress or Progress.auto()
    start = time.monotonic()
    source = run.bank(bank)
    observe = observe_of(source, simulator, f"sbiplat gate {run.path}")
    if observe and source_digest(observe.function) != run.record.get("observe_source"):
        raise RunError(f"the code of observe has changed since {run.path} was trained; train again")
    pairs, training = _pairs(run, source, criteria.pairs, seed)
    if observe:
        some = take(pairs, slice(8))
        check_observe(observe, some["x"], some["parameters"])
        pairs, training = (_observed(observe, p, seed, k) for k, p in enumerate((pairs, training)))
    figures = held_out_figures(from_run(run, device), pairs, training, criteria.draws, seed, progress)
    certificate = _certify(run, source, criteria, figures, seed, time.monotonic() - start)
    certificate.save()
    return certificate


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


def _certify(run: Run, bank: Bank, criteria: Criteria, figures: HeldOutFigures, seed: int, seconds: float) -> Certificate:
    verdicts = decide(figures, criteria)
    archive = _diagnostics(figures)
    (run.path / "diagnostics.npz").unlink(missing_ok=True)
    with files.disk_errors(run.path / "diagnostics.npz"), files.atomic_path(run.path / "diagnostics.npz") as temporary:
        temporary.write_bytes(archive)
    content: dict[str, Any] = {
        "format_version": FORMAT_VERSION,
        "passed": all(v.passed for v in verdicts),
        "criteria": [asdict(v) for v in verdicts],
        "not_tested": list(NOT_TESTED),
        "thresholds": asdict(criteria),
        "figures": {
            "pairs": figures.pairs, "draws": figures.draws,
            "information": asdict(figures.information),
            "coverage": {c.name: {k: getattr(c, k) for k in COVERAGE_FIGURES} for c in figures.coverages},
        },
        "estimator": run.architecture.estimator,
        "simulator": bank.header.simulator,
        "seeds": {"gate": seed, "training": run.seed, "bank": bank.header.seed},
        "digests": {"weights": run.weights_digest, "config": run.config_digest, "bank": bank.digest,
                    "split": run.record["split"]["digest"], "diagnostics": files.digest_file(run.path / "diagnostics.npz")},
        "left_out_rows": run.record["split"]["left_out"],
        "versions": versions(),
        "created": files.now(),
        "seconds": round(seconds, 1),
    }
    content = _plain(content)
    return Certificate({**content, "sha256": files.digest_of(content)}, run.path)


def _diagnostics(figures: HeldOutFigures) -> bytes:
    """Ranks and curves, for the report, as an .npz."""
    out = io.BytesIO()
    np.savez_compressed(
        out, names=np.array([c.name for c in figures.coverages]), ranks=figures.ranks, levels=LEVELS,
        **{key: np.stack([getattr(c, key) for c in figures.coverages]) for key in ("ecp", "central")},
        **{f"{key}_{end}": np.stack([getattr(c, f"{key}_band")[k] for c in figures.coverages])
           for key in ("ecp", "central") for k, end in ((0, "low"), (1, "high"))},
    )
    return out.getvalue()


def _plain(value: Any) -> Any:
    """Tuples as lists and numpy scalars as numbers: what JSON gives back, so that the hash can be computed again."""
    if isinstance(value, dict):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(v) for v in value]
    return value.item() if isinstance(value, np.generic) else value


def load(
    run: str | Path | Run, *, allow_uncertified: bool = False, embedding: Any = None, device: str = "cpu",
) -> Posterior:
    """The posterior of a certified run; raises Uncertified with the reason and the mend where its certificate does not hold.

    embedding: the user's own class (or 'file.py:Class') where the run was trained with one, since loading a run never
    runs code that the run names. allow_uncertified: for looking into a refused posterior; its draws say so.
    """
    if embedding is not None:
        embeddings.register(embedding)
    run = (run if isinstance(run, Run) else Run.open(run)).require_finished()
    try:
        certificate = Certificate.read(run).require(run)
    except Uncertified as reason:
        if not allow_uncertified:
            raise
        return from_run(run, device, certified="no", refusal=str(reason))
    return from_run(run, device, certified="yes", certificate=certificate.sha256, own_thresholds=certificate.own_thresholds or None)
