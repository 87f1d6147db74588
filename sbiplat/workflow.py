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
    pairs = 1000

    [sample]
    observation = "pulse.csv"
    n = 10_000

A stage depends on its own table and on what the stages before it made, as digests. When one changes, what stood there
is set aside under another name, never deleted, and the stage runs again and says why. OUT/workflow.json remembers.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from sbiplat import __version__, files
from sbiplat.bank.bank import Bank
from sbiplat.bank.bank import simulate as simulate_bank
from sbiplat.bank.layout import Header
from sbiplat.errors import BankError, OtherTraining, RunError, SettingError, Uncertified
from sbiplat.gate.certificate import Certificate, load
from sbiplat.gate.certificate import gate as gate_run
from sbiplat.gate.criteria import Criteria
from sbiplat.observation import read_observation
from sbiplat.posteriors.export import check_target, write_draws
from sbiplat.report.page import report as write_report
from sbiplat.runs import Run
from sbiplat.settings import build, read_toml, setting, unknown
from sbiplat.simulator import Simulator, resolve
from sbiplat.training.trainer import train


@dataclass(frozen=True)
class SimulateTable:
    """[simulate]"""

    simulator: str = setting("", "a registered name, file.py:object or module:object")
    n: int = setting(0, "rows", low=1)
    seed: int = setting(0, "seed of the bank", low=0)
    block_size: int | None = setting(None, "rows of a block", low=1)
    workers: int | None = setting(None, "local processes; does not change the bank", low=1)


@dataclass(frozen=True)
class SampleTable:
    """[sample]"""

    observation: str = setting("", "file of the observation")
    n: int = setting(10_000, "draws", low=1)
    seed: int = setting(0, "seed of the draws", low=0)
    out: str = setting("posterior.nc", "file of draws in the workflow's folder: .nc, .h5 or .csv")


@dataclass(frozen=True)
class Result:
    """What a workflow did: each stage with "done" or "skipped" and a remark, and the gate's verdict."""

    out: Path
    stages: tuple[tuple[str, str, str], ...]
    passed: bool
    digests: Mapping[str, str]

    def to_json(self) -> dict[str, Any]:
        return {"out": str(self.out), "passed": self.passed, "digests": dict(self.digests),
                "stages": [dict(zip(("stage", "outcome", "remark"), s, strict=True)) for s in self.stages]}

    def text(self) -> str:
        verdict = "certified" if self.passed else "REFUSED by the gate; the report says why"
        return f"{self.out}: {verdict}; certificate {self.digests['certificate'][:16]}; open {self.out / 'report.html'}"


def run_workflow(path: str | Path, say: Callable[[str], None] = lambda line: None) -> Result:
    """Run a workflow file to its end; see the module's docstring. Raises UserError; what was finished stays finished."""
    return _Workflow(Path(path), say).run()


class _Workflow:
    """One workflow under way."""

    def __init__(self, path: Path, say: Callable[[str], None]) -> None:
        tables = read_toml(path)
        for name in tables:
            if name not in ("out", "simulate", "train", "gate", "sample"):
                raise SettingError(f"{path}: {str(unknown(name, ['out', 'simulate', 'train', 'gate', 'sample'])).replace('setting', 'table')}")
        for name in ("simulate", "train"):
            if not isinstance(tables.get(name), dict):
                raise SettingError(f"{path}: it needs a table [{name}]")
        if not isinstance(tables.get("out"), str):
            raise SettingError(f'{path}: it needs out = "folder" before the first table')
        self.path, self.folder, self.say = path, path.resolve().parent, say
        self.out = self.folder / tables["out"]
        try:
            self.simulate: SimulateTable = build(SimulateTable, tables["simulate"])
            self.train: dict[str, Any] = dict(tables["train"])
            gate = dict(tables.get("gate", {}))
            self.gate_seed = int(gate.pop("seed", 0))
            self.gate: Criteria = build(Criteria, gate)
            self.sample: SampleTable | None = build(SampleTable, tables["sample"]) if "sample" in tables else None
        except SettingError as error:
            raise SettingError(f"{path}: {error}") from None
        if not self.simulate.simulator or not self.simulate.n:
            raise SettingError(f"{path}: [simulate] needs simulator and n")
        if self.sample is not None and not self.sample.observation:
            raise SettingError(f"{path}: [sample] needs an observation")
        if "embedding" in self.train:
            self.train["embedding"] = self._place(str(self.train["embedding"]))
        self.stages: list[tuple[str, str, str]] = []

    def run(self) -> Result:
        simulator = resolve(self._place(self.simulate.simulator))
        observation = self._observation(simulator)
        bank = self._simulate(simulator)
        run = self._train(bank)
        certificate = self._gate(run, bank)
        if certificate.passed and self.sample is not None:
            self._sample(run, observation)
        elif self.sample is not None:
            self._note("sample", "skipped", "the posterior was refused")
        self._report(run, certificate, observation, simulator)
        return Result(self.out, tuple(self.stages), certificate.passed,
                      {"bank": bank.digest, "weights": run.weights_digest, "certificate": certificate.sha256})

    # ------------------------------------------------------------------------------------------------------ stages

    def _observation(self, simulator: Simulator) -> Any:
        """Read first: a mistake in it should not cost a simulation."""
        if self.sample is None:
            return None
        check_target(self.folder / self.sample.out)
        return read_observation(self.folder / self.sample.observation, simulator.x)

    def _simulate(self, simulator: Simulator) -> Bank:
        table, path = self.simulate, self.out / "bank"
        if (path / "bank.json").exists():
            wanted = Header.of(simulator, table.seed, table.n, table.block_size)
            have = Bank.open(path)
            try:
                have.header.check_same(wanted if table.block_size else replace(wanted, block_size=have.header.block_size), path)
            except BankError as reason:
                self._set_aside(path, str(reason))
            else:
                if have.complete and have.rows >= table.n:
                    self._note("simulate", "skipped", f"{have.rows} rows are there")
                    return have.first(table.n)
        made = simulate_bank(simulator, table.n, table.seed, path, workers=table.workers, block_size=table.block_size)
        self._note("simulate", "done", f"{table.n} rows, digest {made.digest[:12]}")
        return made

    def _train(self, bank: Bank) -> Run:
        settings = dict(self.train)
        estimator, seed = settings.pop("estimator", "npe"), settings.pop("seed", 0)
        path = self.out / "run"
        finished = (path / "run.json").exists() and Run.open(path).finished
        try:
            run = train(bank, estimator, out=path, seed=seed, **settings)
        except OtherTraining as reason:
            self._set_aside(path, str(reason))
            finished, run = False, train(bank, estimator, out=path, seed=seed, **settings)
        loss = run.record["outcome"]["validation_loss"]
        self._note("train", "skipped" if finished else "done", f"held-out loss {loss:.4f}")
        return run

    def _gate(self, run: Run, bank: Bank) -> Certificate:
        try:
            old = Certificate.read(run)
            if old.passed:
                old.require(run)
            same = (old.content["thresholds"] == asdict(self.gate) and old.content["seeds"]["gate"] == self.gate_seed
                    and old.content["digests"]["weights"] == run.weights_digest and old.content["digests"]["bank"] == bank.digest)
            reason = "" if same else "the gate's settings or the weights have changed"
        except Uncertified as error:
            old, reason = None, str(error)
        if old is not None and not reason:
            self._note("gate", "skipped", f"the certificate {'holds' if old.passed else 'says refused'}")
            return old
        if old is not None:
            self.say(f"gate: again, since {reason}")
        certificate = gate_run(run, seed=self.gate_seed, bank=bank.path, **asdict(self.gate))
        self._note("gate", "done", "certified" if certificate.passed else "REFUSED by " + ", ".join(c.name for c in certificate.failed))
        return certificate

    def _sample(self, run: Run, observation: Any) -> None:
        table, target = self.sample, self.out / self.sample.out
        key = {**asdict(table), "observation": files.digest_file(self.folder / table.observation), "weights": run.weights_digest}
        if target.exists() and self._remembered("sample") == key:
            self._note("sample", "skipped", f"{target.name} is there")
            return
        posterior = load(run)
        theta = posterior.sample(observation, table.n, seed=table.seed)
        write_draws(target, posterior.prior, *posterior.x.batch(observation), theta, table.seed, posterior.provenance)
        self._remember("sample", key)
        self._note("sample", "done", f"{theta.shape} draws in {target.name}")

    def _report(self, run: Run, certificate: Certificate, observation: Any, simulator: Simulator) -> None:
        target = self.out / "report.html"
        key = {"certificate": certificate.sha256, "version": __version__,
               "observation": files.digest_file(self.folder / self.sample.observation) if self.sample else None}
        if target.exists() and self._remembered("report") == key:
            self._note("report", "skipped", "report.html is there")
            return
        made = write_report(run, observation, simulator=simulator)
        files.write_text(target, made.read_text(encoding="utf-8"))
        self._remember("report", key)
        self._note("report", "done", "report.html")

    # ----------------------------------------------------------------------------------------------------- helpers

    def _place(self, spec: str) -> str:
        """`file.py:object` relative to the workflow's folder; names as they are."""
        file, colon, attribute = spec.rpartition(":")
        return f"{self.folder / file}:{attribute}" if colon and file.endswith(".py") else spec

    def _note(self, stage: str, outcome: str, remark: str) -> None:
        self.stages.append((stage, outcome, remark))
        self.say(f"{stage}: {outcome}; {remark}")

    def _set_aside(self, path: Path, reason: str) -> None:
        """Move what another setting made out of the way, under a name that is free."""
        taken = [int(m[1]) for p in path.parent.glob(f"{path.name}.old-*") if (m := re.fullmatch(rf"{path.name}\.old-(\d+)", p.name))]
        target = path.with_name(f"{path.name}.old-{max(taken, default=0) + 1}")
        path.rename(target)
        self.say(f"{path.name}: again, since {reason}; the old one is kept as {target.name}")

    def _memory(self) -> dict[str, Any]:
        path = self.out / "workflow.json"
        return files.read_json(path, "workflow.json", RunError) if path.exists() else {}

    def _remembered(self, stage: str) -> Any:
        return self._memory().get(stage)

    def _remember(self, stage: str, key: Any) -> None:
        files.write_json(self.out / "workflow.json", {**self._memory(), stage: key})
