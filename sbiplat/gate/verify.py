"""An outsider's check of a certificate: its form, hash and signature, and, of what is at hand, the bytes that it was given to.

What is not at hand is said to be unchecked. With `again` the gate is run again from the seeds: on the same machine, versions and code it
must find the same figures to the last bit; elsewhere sums are rounded otherwise, and figures must agree within a tolerance.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sbiplat import files
from sbiplat.bank.bank import Bank
from sbiplat.bank.farm import mpi_world
from sbiplat.diagnostics.spread import Spread
from sbiplat.errors import SettingError, Uncertified, UserError
from sbiplat.gate import signature
from sbiplat.gate.certificate import Certificate
from sbiplat.gate.criteria import at_level
from sbiplat.gate.examine import Examination, machine, measured, workers_on
from sbiplat.gate.schema import FORMAT_VERSION
from sbiplat.nets import embeddings
from sbiplat.progress import Progress
from sbiplat.runs import Run
from sbiplat.simulator import Simulator

HOLDS, FAILS, DIFFERS, UNCHECKED = "holds", "fails", "differs", "unchecked"
REFUSED, UNCERTIFIED = 3, 4
TOLERANCE = 0.01


@dataclass(frozen=True)
class Check:
    """One thing that was looked at. outcome: holds, fails, differs (which voids nothing), or unchecked, with the reason."""

    name: str
    outcome: str
    statement: str


@dataclass(frozen=True)
class Verification:
    """What was checked of a certificate, and what came of it."""

    path: Path
    checks: tuple[Check, ...]
    certificate: Certificate | None

    @property
    def failed(self) -> list[Check]:
        return [c for c in self.checks if c.outcome == FAILS]

    @property
    def holds(self) -> bool:
        """Whether nothing that could be checked fails: then it is what the gate said, passed or not."""
        return not self.failed

    @property
    def exit_code(self) -> int:
        """0: it holds and certifies; 3: it holds and says refused; 4: it does not hold, or is a draft."""
        if not self.holds or self.certificate is None:
            return UNCERTIFIED
        return 0 if self.certificate.certifies else UNCERTIFIED if self.certificate.passed else REFUSED

    def text(self) -> str:
        """A line a check, and the conclusion."""
        lines = [f"{c.outcome.upper() if c.outcome == FAILS else c.outcome:10} {c.name:12} {c.statement}" for c in self.checks]
        if not self.holds:
            return "\n".join([*lines, f"{self.path}: DOES NOT HOLD: {', '.join(c.name for c in self.failed)}"])
        unchecked = [c.name for c in self.checks if c.outcome == UNCHECKED]
        but = f" (unchecked: {', '.join(unchecked)})" if unchecked else ""
        return "\n".join([*lines, f"{self.path}: holds{but}, and says: {self.certificate.verdict if self.certificate else ''}"])

    def to_json(self) -> dict[str, Any]:
        told = self.certificate.content if self.certificate else {}
        return {"path": str(self.path), "holds": self.holds, "certifies": self.exit_code == 0, "exit_code": self.exit_code,
                **{k: told.get(k) for k in ("passed", "level", "sha256")}, "checks": [vars(c) for c in self.checks]}


def verify(
    path: str | Path, *, run: str | Path | None = None, bank: str | Path | None = None, public_key: str | Path | None = None,
    again: bool = False, tolerance: float | None = None, simulator: Simulator | str | None = None, embedding: Any = None, workers: int = 1,
    progress: Progress | None = None,
) -> Verification:
    """Check a certificate.json, or that of a run's directory, against all that is at hand.

    run, bank: where they are, if not beside it and where the run says. public_key: file of the key that must have signed it. again: run the
    gate again from the seeds. tolerance: of its figures, absolute or relative, whichever is more; by default 0 where machine, versions and
    code are those of the certificate, else 0.01. Raises UserError for files that are not there.
    """
    if embedding is not None:
        embeddings.register(embedding)
    if tolerance is not None and not (isinstance(tolerance, int | float) and 0 <= tolerance < math.inf):
        raise SettingError(f"tolerance must be a number of at least 0, got {tolerance!r}")
    file, opened = _find(Path(path), run)
    wanted = signature.read_public(public_key) if public_key is not None else None
    if bank is not None and not Path(bank).exists():
        raise UserError(f"no bank at {bank}")
    try:
        certificate = Certificate.of_file(file)
    except Uncertified as error:
        return Verification(file, (Check("form", FAILS, str(error)),), None)
    progress = progress or Progress.auto()
    checks = [Check("form", HOLDS, f"of certificate format {FORMAT_VERSION}"), _unaltered(certificate), _signed(certificate, wanted),
              *_run(certificate, opened), _bank(certificate, opened, bank, progress), _code(certificate)]
    if again:
        checks.append(_again(certificate, opened, bank, simulator, workers, tolerance, progress))
    return Verification(file, tuple(checks), certificate)


def sign(path: str | Path, key: str | Path) -> tuple[Certificate, str]:
    """Sign the certificate in a file or a run; it, and the key's fingerprint. Raises UserError, and Uncertified where it was altered."""
    file = file_of(Path(path))
    private, certificate = signature.read_private(key), Certificate.of_file(file)
    if not certificate.unaltered:
        raise Uncertified(f"{file} was altered after it was written, and is not signed")
    made = Certificate(signature.signed(certificate.content, private), certificate.run_path)
    made.save(file)
    return made, signature.check(made.content)


def file_of(path: Path) -> Path:
    """The certificate's file, given it or its run; raises UserError where there is none."""
    file = path / "certificate.json" if path.is_dir() else path
    if not file.is_file():
        mend = f"{path} has no certificate.json; `sbiplat gate {path}` makes one"
        raise UserError(mend if path.is_dir() else f"no certificate at {path}")
    return file


def _find(path: Path, run: str | Path | None) -> tuple[Path, Callable[[], Run] | None]:
    """The certificate's file, and how to open its run where that is at hand; raises UserError for what is not there."""
    file = file_of(path)
    home = Path(run) if run is not None else file.parent
    if run is not None and not home.is_dir():
        raise UserError(f"no run at {run}")
    return file, (lambda: Run.open(home).require_finished()) if run is not None or (home / "run.json").is_file() else None


def _unaltered(certificate: Certificate) -> Check:
    if certificate.unaltered:
        return Check("sha256", HOLDS, certificate.sha256)
    return Check("sha256", FAILS, "the content is not what it was when it was written: its SHA-256 is another")


def _signed(certificate: Certificate, wanted: str | None) -> Check:
    content = certificate.content
    if not content.get("signature") and wanted is None:
        return Check("signature", UNCHECKED, "it is not signed: anybody could have written it")
    try:
        if wanted is not None:
            return Check("signature", HOLDS, f"by the key that was asked for, {signature.require(content, wanted)}")
        return Check("signature", HOLDS, f"by the key {signature.check(content)}; whose that is, only its owner can say: give --public-key")
    except Uncertified as error:
        return Check("signature", FAILS, str(error))
    except SettingError as error:
        return Check("signature", UNCHECKED, str(error))


def _run(certificate: Certificate, opened: Callable[[], Run] | None) -> Iterator[Check]:
    """Weights, settings, prior and split as they are on disk, and the arrays behind the figures."""
    if opened is None:
        yield Check("run", UNCHECKED, "weights, settings and prior are not at hand: give --run")
        return
    try:
        run = opened()
        other = certificate.differences(run)
    except UserError as error:
        yield Check("run", FAILS, str(error))
        return
    for what, said, now in other:
        yield Check("run", FAILS, f"the certificate is for {what}: it says {said[:12]}, {run.path} has {now[:12]}")
    if not other:
        yield Check("run", HOLDS, f"weights, settings, prior and split of {run.path} are those of the certificate")
    arrays = run.path / "diagnostics.npz"
    if not arrays.is_file():
        yield Check("diagnostics", UNCHECKED, f"{arrays} is not there")
    elif files.digest_file(arrays) == certificate.content["digests"]["diagnostics"]:
        yield Check("diagnostics", HOLDS, f"{arrays.name}, of which curves are drawn, is the one of the certificate")
    else:
        yield Check("diagnostics", FAILS, f"{arrays.name}, of which curves are drawn, is not the one of the certificate")


def _bank(certificate: Certificate, opened: Callable[[], Run] | None, bank: str | Path | None, progress: Progress) -> Check:
    """All of the bank's content, from its bytes."""
    content, place = certificate.content, Path(bank) if bank is not None else None
    if place is None and opened is not None:
        with suppress(UserError):  # of a damaged run, which another check tells of
            place = opened().bank_place()
    if place is None:
        return Check("bank", UNCHECKED, "the bank is not at hand: give --bank")
    try:
        found = Bank.open(place).first(content["counts"]["bank_rows"])
        now, header = found.digest_of_bytes(progress), found.header
    except (UserError, OSError) as error:
        return Check("bank", FAILS, " ".join(str(error).split()))
    if now != content["digests"]["bank"]:
        return Check("bank", FAILS, f"the content of {place} is another: its SHA-256 is {now[:12]}, not {content['digests']['bank'][:12]}")
    if header.simulator != content["simulator"] or header.seed != content["seeds"]["bank"]:
        return Check("bank", FAILS, f"{place} holds the same rows, but names another simulator or seed")
    return Check("bank", HOLDS, f"every byte of the content of {place}, {found.rows} rows, was read and has the certificate's SHA-256")


def _code(certificate: Certificate) -> Check:
    """Whether the same code would run again."""
    if not certificate.other_code:
        return Check("code", HOLDS, "the sbiplat here, and the versions of packages, are those of the gate")
    return Check("code", DIFFERS, f"{certificate.other_code}: run again, the gate may find somewhat other figures")


def _again(
    certificate: Certificate, opened: Callable[[], Run] | None, bank: str | Path | None, simulator: Simulator | str | None, workers: int,
    tolerance: float | None, progress: Progress,
) -> Check:
    """The gate, from the seeds and settings of the certificate."""
    content = certificate.content
    if opened is None:
        return Check("again", UNCHECKED, "the gate cannot be run again without the run: give --run, and --bank")
    device = content["valid_for"]["device"]
    try:
        run, criteria = opened(), at_level(certificate.level, content["thresholds"])
        spread = Spread(mpi_world(), workers_on(device, workers))
        examination = Examination.of(run, criteria, certificate.level, content["seeds"]["gate"], bank, simulator, device, spread, progress)
        found = measured(examination.parts())
    except UserError as error:
        return Check("again", FAILS, f"the gate cannot be run again: {error}")
    same = not certificate.other_code and content["machine"] == machine(device)
    allowed = tolerance if tolerance is not None else 0.0 if same else TOLERANCE
    verdicts = [{c["name"]: c["passed"] for c in told["criteria"]} for told in (content, found)]
    if verdicts[0] != verdicts[1]:
        other = next(k for k in {**verdicts[0], **verdicts[1]} if verdicts[0].get(k) != verdicts[1].get(k))
        return Check("again", FAILS, f"the gate, run again from the seeds, decides otherwise on {other}")
    where, gap = worst({"": content["figures"]}, {"": found["figures"]})
    if gap > allowed:
        return Check("again", FAILS, f"the gate, run again from the seeds, finds another {where}, by {gap:.2g} (tolerance {allowed:g})")
    ours = "on the same machine and code" if same else "the machine, its threads, the code or a version is another"
    how = "the same figures to the last bit" if gap == 0 else f"the same figures within {allowed:g} (most in {where}, by {gap:.2g}; {ours})"
    return Check("again", HOLDS, f"the gate, run again from the seeds, reached the same verdicts and {how}")


def worst(told: Any, found: Any, where: str = "") -> tuple[str, float]:
    """Where two trees of figures differ most, and by how much: |a - b| / max(1, |a|); infinite where they differ in kind."""
    if isinstance(told, Mapping) and isinstance(found, Mapping) and told.keys() == found.keys():
        pairs = [(told[k], found[k], f"{where}.{k}".strip(".")) for k in told]
    elif isinstance(told, list) and isinstance(found, list) and len(told) == len(found):
        pairs = [(a, b, where) for a, b in zip(told, found, strict=True)]
    else:
        numbers = all(isinstance(v, int | float) and not isinstance(v, bool) for v in (told, found))
        gap = abs(told - found) / max(1.0, abs(told)) if numbers else 0.0 if told == found else math.inf
        return where, gap
    return max((worst(*pair) for pair in pairs), key=lambda found: found[1], default=(where, 0.0))
