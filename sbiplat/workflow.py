"""Workflows: a TOML file in; simulate, train, gate, sample, report out. Every stage resumes, and is skipped when it is done.

    out = "../runs/pulse"            # all paths are relative to the TOML file

    [simulate]
    simulator = "pulse"              # or "pulse.py:pulse"
    n = 100_000
    seed = 1

    [train]
    estimator = "npe"
    flow = "nsf"

    [gate]
    level = "standard"

    [sample]
    observation = "pulse.csv"
    n = 10_000

A stage depends on its own table and on what the stages before it made, as digests. When one changes, the stage runs
again and says why; the bank, run or draws that stood there are set aside under another name, never deleted, while the
certificate and the report are written anew. OUT/workflow.json remembers. All tables and files are read before the
first stage: a mistake in the last one should not cost a simulation.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

from sbiplat import __version__, files
from sbiplat.bank.bank import Bank
from sbiplat.bank.farm import mpi_world
from sbiplat.bank.fill import simulate as simulate_bank
from sbiplat.bank.layout import Header
from sbiplat.diagnostics.predictive import summaries_from
from sbiplat.errors import BankError, OtherTraining, SettingError, Uncertified, UserError
from sbiplat.estimators.base import Architecture, find, find_trained_here
from sbiplat.gate.certificate import Certificate
from sbiplat.gate.criteria import DRAFT, LEVELS, at_level
from sbiplat.gate.door import load
from sbiplat.gate.examine import gate as gate_run
from sbiplat.gate.examine import plain
from sbiplat.nets import embeddings
from sbiplat.observation import read_observation
from sbiplat.posteriors.export import check_target, write_draws
from sbiplat.report.page import report as write_report
from sbiplat.runs import Run
from sbiplat.settings import build, read_toml, setting, split, unknown
from sbiplat.simulator import Simulator, resolve
from sbiplat.source import source_digest
from sbiplat.symmetry import names
from sbiplat.symmetry.settings import SymmetrySettings
from sbiplat.training.begin import TrainSettings
from sbiplat.training.defence import checked
from sbiplat.training.trainer import train

TABLES = ("simulate", "train", "gate", "sample")


@dataclass(frozen=True)
class SimulateTable:
    """[simulate]"""

    simulator: str = setting("", "a registered name, file.py:object or module:object")
    n: int = setting(0, "rows", low=1)
    seed: int = setting(0, "seed of the bank", low=0)
    block_size: int | None = setting(None, "rows of a block", low=1)
    workers: int | None = setting(None, "local processes; does not change the bank", low=1)


@dataclass(frozen=True)
class TrainTable:
    """[train], with the fields of `TrainSettings` and of the estimator's own settings."""

    estimator: str = setting("npe", "the estimator")
    seed: int = setting(0, "seed of the training", low=0)


@dataclass(frozen=True)
class GateTable:
    """[gate], with the fields of `Criteria`, which go before those of the level."""

    level: str = setting("standard", "how much is tested; a draft certifies nothing", among=tuple(LEVELS))
    seed: int = setting(0, "seed of the gate", low=0)


@dataclass(frozen=True)
class SampleTable:
    """[sample]"""

    observation: str = setting("", "file of the observation")
    n: int = setting(10_000, "draws", low=1)
    seed: int = setting(0, "seed of the draws", low=0)
    out: str = setting("posterior.nc", "name of the file of draws in OUT: .nc, .h5 or .csv")
    summaries: str = setting("", "of x, for the report's predictive p-values: file.py:object, a dict of functions")


@dataclass(frozen=True)
class Result:
    """What a workflow did: each stage with "done" or "skipped" and a remark, and the gate's verdict with what refused first."""

    out: Path
    stages: tuple[tuple[str, str, str], ...]
    passed: bool
    digests: Mapping[str, str]
    verdict: str
    refusal: str = ""

    def to_json(self) -> dict[str, Any]:
        return {"out": str(self.out), "passed": self.passed, "verdict": self.verdict, "refusal": self.refusal,
                "digests": dict(self.digests), "stages": [dict(zip(("stage", "outcome", "remark"), s, strict=True)) for s in self.stages]}

    def text(self) -> str:
        verdict = self.verdict if self.passed else f"REFUSED by the gate: {self.refusal}"
        return f"{self.out}: {verdict}; certificate {self.digests['certificate'][:16]}; open {self.out / 'report.html'}"


def run_workflow(path: str | Path, say: Callable[[str], None] = lambda line: None) -> Result:
    """Run a workflow file to its end; see the module's docstring. Raises UserError; what was finished stays finished."""
    return _Workflow(Path(path), say).run()


class _Workflow:
    """One workflow under way."""

    def __init__(self, path: Path, say: Callable[[str], None]) -> None:
        tables = read_toml(path)
        self.path, self.folder, self.say = path, path.resolve().parent, say
        self._check_tables(tables)
        self.out = (self.folder / tables["out"]).resolve()
        with self._mistakes_in("simulate"):
            self.simulate: SimulateTable = build(SimulateTable, tables["simulate"])
            if not self.simulate.simulator or not self.simulate.n:
                raise SettingError("it needs simulator and n")
        with self._mistakes_in("train"):
            own, self.train = _apart(TrainTable, tables["train"])
            self.estimator, self.seed = own.estimator, own.seed
            if "embedding" in self.train:
                self.train["embedding"] = embeddings.by_name(self.train["embedding"], lambda name: self._place(str(name)))
            self._check_training()
        with self._mistakes_in("gate"):
            own, rest = _apart(GateTable, tables.get("gate", {}))
            self.gate_seed, self.level, self.gate = own.seed, own.level, at_level(own.level, rest)
        self.sample: SampleTable | None = None
        self.summaries: dict[str, Any] | None = None
        if "sample" in tables:
            with self._mistakes_in("sample"):
                self.sample = build(SampleTable, tables["sample"])
                self._check_draws(self.sample)
                self.summaries = summaries_from(self._place(self.sample.summaries)) if self.sample.summaries else None
        self.stages: list[tuple[str, str, str]] = []

    def _check_tables(self, tables: Mapping[str, Any]) -> None:
        for name in tables:
            if name not in ("out", *TABLES):
                raise SettingError(f"{self.path}: {str(unknown(name, ['out', *TABLES])).replace('setting', 'table')}")
        for name in TABLES:
            if (name in tables or name in ("simulate", "train")) and not isinstance(tables.get(name), dict):
                raise SettingError(f"{self.path}: it needs a table [{name}]")
        if not isinstance(tables.get("out"), str) or not tables["out"].strip():
            raise SettingError(f'{self.path}: it needs out = "folder" before the first table')

    def _check_training(self) -> None:
        kind = find_trained_here(self.estimator)
        theirs = kind.settings_class
        ours, rest, groups = split(self.train, TrainSettings, theirs, SymmetrySettings)
        checked(build(TrainSettings, ours).defend, self.estimator, kind)
        build(theirs, rest)
        build(SymmetrySettings, groups)

    def _check_draws(self, table: SampleTable) -> None:
        if not table.observation:
            raise SettingError("it needs an observation")
        if Path(table.out).name != table.out:
            raise SettingError(f"out = {table.out!r}: expected the name of a file, which goes into the workflow's out")
        check_target(self.folder / table.out)

    def run(self) -> Result:
        if mpi_world() is not None:
            raise SettingError(f"{self.path}: a workflow runs as one process; fill its bank under mpiexec with `sbiplat simulate "
                               f"{self.simulate.simulator} --n {self.simulate.n} --seed {self.simulate.seed} --out {self.out / 'bank'}`, "
                               "then run the workflow without mpiexec")
        with self._mistakes_in("simulate"):
            simulator = resolve(self._place(self.simulate.simulator))
            names.register_of(simulator)
        with self._mistakes_in("sample"):
            observation = self._observation(simulator)
        with self._mistakes_in("train"):
            self._check_net(simulator)
        bank = self._simulate(simulator)
        run = self._train(bank, simulator)
        certificate = self._gate(run, bank, simulator)
        self._sample(run, certificate, observation)
        self._report(run, certificate, observation, simulator)
        return Result(self.out, tuple(self.stages), certificate.passed,
                      {"bank": bank.digest, "weights": run.weights_digest, "certificate": certificate.sha256},
                      certificate.verdict, certificate.refusal)

    # ------------------------------------------------------------------------------------------------------ stages

    def _observation(self, simulator: Simulator) -> Any:
        if self.sample is None:
            return None
        return read_observation(self.folder / self.sample.observation, simulator.x)

    def _check_net(self, simulator: Simulator) -> None:
        """Make the net once: an embedding that cannot take this x is told of now."""
        theirs = find(self.estimator).settings_class
        _, rest, _ = split(self.train, TrainSettings, theirs, SymmetrySettings)
        if "embedding" in rest:
            rest["embedding"] = embeddings.register(rest["embedding"])
        prior = simulator.prior
        Architecture(self.estimator, build(theirs, rest), prior.dim, simulator.x, prior.gaussianised).build()

    def _simulate(self, simulator: Simulator) -> Bank:
        table, path = self.simulate, self.out / "bank"
        if (path / "bank.json").exists():
            wanted = Header.of(simulator, table.seed, table.n, table.block_size)
            have = Bank.open(path)
            try:
                have.header.check_same(wanted if table.block_size else replace(wanted, block_size=have.header.block_size), path)
            except BankError as reason:
                self._set_aside(path, _what_differs(reason))
            else:
                if have.complete and have.rows >= table.n:
                    self._note("simulate", "skipped", f"{have.rows} rows are there")
                    return have.first(table.n)
        made = simulate_bank(simulator, table.n, table.seed, path, workers=table.workers, block_size=table.block_size)
        made = made.first(table.n)  # a bank that was wanted larger before, and was not finished then
        self._note("simulate", "done", f"{table.n} rows, digest {made.digest[:12]}")
        return made

    def _train(self, bank: Bank, simulator: Simulator) -> Run:
        path = self.out / "run"
        finished = (path / "run.json").exists() and Run.open(path).finished
        try:
            run = train(bank, self.estimator, out=path, seed=self.seed, simulator=simulator, **self.train)
        except OtherTraining as reason:
            self._set_aside(path, _what_differs(reason))
            finished, run = False, train(bank, self.estimator, out=path, seed=self.seed, simulator=simulator, **self.train)
        loss = run.record["outcome"]["validation_loss"]
        self._note("train", "skipped" if finished else "done", f"validation loss {loss:.4f}")
        return run

    def _gate(self, run: Run, bank: Bank, simulator: Simulator) -> Certificate:
        old, reason = self._old_certificate(run, bank)
        if old is not None and not reason:
            self._note("gate", "skipped", f"the certificate stands: {old.verdict}")
            return old
        if reason:
            self.say(f"gate: again, since {reason}")
        certificate = gate_run(run, level=self.level, seed=self.gate_seed, bank=bank.path, simulator=simulator, **asdict(self.gate))
        self._note("gate", "done", certificate.verdict)
        return certificate

    def _old_certificate(self, run: Run, bank: Bank) -> tuple[Certificate | None, str]:
        """The certificate that stands there, and why the gate has to be gone through again; ("" where it has not)."""
        if not (run.path / "certificate.json").exists():
            return None, ""
        try:
            old = Certificate.read(run)
        except Uncertified:
            return None, "the certificate is damaged"
        if not old.unaltered:
            return None, "the certificate was altered"
        other = old.differences(run)
        if self.level == DRAFT and old.certifies and not other:
            return old, ""  # which is more than a draft
        wanted, had = plain(asdict(self.gate)), old.content["thresholds"]
        differs = [f"{k} = {wanted[k]!r}, not {had.get(k)!r}" for k in wanted if had.get(k) != wanted[k]]
        if old.level != self.level:
            differs.insert(0, f"level = {self.level!r}, not {old.level!r}")
        if old.content["seeds"]["gate"] != self.gate_seed:
            differs.append(f"seed = {self.gate_seed}, not {old.content['seeds']['gate']}")
        if differs:
            return old, f"[gate] now says {differs[0]}"
        return old, f"the certificate is for {other[0][0]}" if other else ""

    def _sample(self, run: Run, certificate: Certificate, observation: Any) -> None:
        """Draw, where the posterior is certified; draws of another posterior or observation do not stay under this name."""
        table = self.sample
        if table is None:
            return
        target = self.out / table.out
        own = {k: v for k, v in asdict(table).items() if k != "summaries"}  # those are the report's
        key = {**own, "observation": files.digest_file(self.folder / table.observation), "certificate": certificate.sha256}
        before = self._remembered("sample")
        if not certificate.certifies:
            why = "the posterior has passed a draft only" if certificate.passed else "the posterior was refused"
            if target.exists():
                self._set_aside(target, why, "sample")
            self._note("sample", "skipped", why)
            return
        if target.exists() and before == key:
            self._note("sample", "skipped", f"{target.name} is there")
            return
        if target.exists():
            before = before if isinstance(before, Mapping) else {}
            differs = [k for k in key if before.get(k) != key[k]]
            self._set_aside(target, f"the {differs[0]} has changed" if differs else "it is not known what made it", "sample")
        posterior = load(run)
        theta = posterior.sample(observation, table.n, seed=table.seed)
        write_draws(target, posterior.prior, *posterior.x.batch(observation), theta, table.seed, posterior.facts)
        self._remember("sample", key)
        self._note("sample", "done", f"{theta.shape} draws in {target.name}")

    def _report(self, run: Run, certificate: Certificate, observation: Any, simulator: Simulator) -> None:
        target = self.out / "report.html"
        observed = files.digest_file(self.folder / self.sample.observation) if self.sample else None
        key: dict[str, Any] = {"certificate": certificate.sha256, "version": __version__, "observation": observed}
        if self.summaries:
            key["summaries"] = {name: source_digest(function) for name, function in self.summaries.items()}
        if target.exists() and self._remembered("report") == key:
            self._note("report", "skipped", "report.html is there")
            return
        made = write_report(run, observation, simulator=simulator, summaries=self.summaries)
        files.write_text(target, made.read_text(encoding="utf-8"))
        self._remember("report", key)
        self._note("report", "done", "report.html")

    # ----------------------------------------------------------------------------------------------------- helpers

    @contextmanager
    def _mistakes_in(self, table: str) -> Iterator[None]:
        """A user's mistake in a table names the file and the table."""
        try:
            yield
        except UserError as error:
            raise type(error)(f"{self.path}: [{table}] {error}") from None

    def _place(self, spec: str) -> str:
        """`file.py:object` relative to the workflow's folder; names as they are."""
        file, colon, attribute = (f"{spec}:" if spec.endswith(".py") else spec).rpartition(":")
        if not file.endswith(".py"):
            return spec
        return f"{self.folder / file}{colon if attribute else ''}{attribute}"

    def _note(self, stage: str, outcome: str, remark: str) -> None:
        self.stages.append((stage, outcome, remark))
        self.say(f"{stage}: {outcome}; {remark}")

    def _set_aside(self, path: Path, reason: str, stage: str = "") -> None:
        """Move what another setting made out of the way, under a name that is free: bank.old-1, posterior.old-1.nc."""
        stem, suffix = (path.stem, path.suffix) if path.is_file() else (path.name, "")
        name = re.compile(rf"{re.escape(stem)}\.old-(\d+){re.escape(suffix)}")
        taken = [int(m[1]) for p in path.parent.iterdir() if (m := name.fullmatch(p.name))]
        target = path.with_name(f"{stem}.old-{max(taken, default=0) + 1}{suffix}")
        path.rename(target)
        self.say(f"{stage or path.name}: again, since {reason}; the old one is kept as {target.name}")

    def _memory(self) -> dict[str, Any]:
        try:
            return files.read_json(self.out / "workflow.json", "workflow.json", UserError)
        except UserError:  # absent or damaged: the stage is run again
            return {}

    def _remembered(self, stage: str) -> Any:
        return self._memory().get(stage)

    def _remember(self, stage: str, key: Any) -> None:
        files.write_json(self.out / "workflow.json", {**self._memory(), stage: key})


def _apart(cls: type[Any], table: Mapping[str, Any]) -> tuple[Any, dict[str, Any]]:
    """A table as the settings of `cls`, and what is left of it."""
    own = {f.name for f in fields(cls)}
    return build(cls, {k: v for k, v in table.items() if k in own}), {k: v for k, v in table.items() if k not in own}


def _what_differs(reason: UserError) -> str:
    """The first half of a message of the form "what differs; the mend": here it is mended by itself."""
    return str(reason).partition("; ")[0]
