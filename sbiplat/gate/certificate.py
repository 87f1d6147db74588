"""The certificate: the gate's verdict on one run, bound to its weights, configuration, prior and bank.

RUN/certificate.json names the criteria, figures, seeds and digests, and carries the SHA-256 of its own canonical form (`files.canonical`)
without `sha256` and `signature`. Its form is `schema.json`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from sbiplat import files
from sbiplat.bank.layout import versions
from sbiplat.errors import Uncertified
from sbiplat.gate import schema
from sbiplat.gate.criteria import DRAFT, at_level
from sbiplat.gate.criterion import Criterion
from sbiplat.posteriors.steps import in_words
from sbiplat.runs import Run
from sbiplat.source import code_digest

MOST_BYTES = 2**26
UNHASHED = ("sha256", "signature")


@dataclass(frozen=True)
class Certificate:
    """The gate's verdict on one run. `content` is certificate.json."""

    content: Mapping[str, Any]
    run_path: Path

    @property
    def passed(self) -> bool:
        """Whether all criteria were met, at its level: of a draft, that certifies nothing."""
        return self.content["passed"] is True

    @property
    def level(self) -> str:
        """draft, standard or publication."""
        return str(self.content["level"])

    @property
    def certifies(self) -> bool:
        """Whether it opens the door."""
        return self.passed and self.level != DRAFT

    @property
    def verdict(self) -> str:
        """In a few words."""
        if not self.passed:
            return f"REFUSED by {', '.join(c.name for c in self.failed)}"
        own = f", by thresholds that were changed: {self.own_thresholds}" if self.own_thresholds else ""
        return "passed as a draft, which certifies nothing" if self.level == DRAFT else f"certified ({self.level}{own})"

    @property
    def refusal(self) -> str:
        """The first criterion that failed, by how much, and what usually mends it; "" where none did."""
        if not self.failed:
            return ""
        first, more = self.failed[0], f" (and {len(self.failed) - 1} more)" if len(self.failed) > 1 else ""
        return f"{first.name}: {first.statement}{more}; {first.mend}"

    @property
    def chain(self) -> str:
        """The steps that the posterior is, in a line; "" of a certificate that does not say."""
        return in_words(self.content.get("chain") or [])

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
        """The thresholds that are not those of its level, in words; "" where all are."""
        usual = asdict(at_level(self.level, {}))
        had = self.content["thresholds"]
        least = min(usual["pairs"], self.content["counts"]["held_out_rows"])
        own = {k: had.get(k) for k in (*usual, *(k for k in had if k not in usual)) if had.get(k) != usual.get(k)
               and not (k == "pairs" and isinstance(had.get(k), int) and had[k] >= least)}
        return ", ".join(f"{k} = {v} (usually {usual.get(k)})" for k, v in own.items())

    @property
    def sha256(self) -> str:
        return str(self.content["sha256"])

    @property
    def unaltered(self) -> bool:
        """Whether it is as it was written, by its own hash."""
        return hashed(self.content) == self.sha256

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
            raise Uncertified(f"{run.path} has not been through the gate; run `{run.gate_command}`")
        return cls.of_file(path, f"run `{run.gate_command}` again")

    @classmethod
    def of_file(cls, path: Path, mend: str = "ask for it again") -> Certificate:
        """The certificate in a file; raises Uncertified where it is damaged or not of the published form."""
        if path.is_file() and path.stat().st_size > MOST_BYTES:
            raise Uncertified(f"{path} is too large for a certificate; {mend}")
        content = files.read_json(path, "certificate", Uncertified)
        fault = schema.fault(content)
        if fault:
            raise Uncertified(f"{path} is damaged or of another format ({fault}); {mend}")
        return cls(content, path.parent)

    def require_bound(self, run: Run) -> Certificate:
        """This certificate if it is unaltered and was given to the run as it is on disk now; raises Uncertified with the reason."""
        again = f"run `{run.gate_command}` again"
        if not self.unaltered:
            raise Uncertified(f"the certificate of {run.path} was altered after it was written; {again}")
        for what, said, now in self.differences(run):
            raise Uncertified(f"the certificate of {run.path} is for {what}: it says {said[:12]}, the run has {now[:12]}; {again}")
        return self

    def differences(self, run: Run) -> list[tuple[str, str, str]]:
        """What of a run, as it is on disk now, is not what this was given to: what, its digest here, and the run's."""
        digests, now = self.content["digests"], digests_of(run)
        words = {"weights": "other weights", "prior": "another prior", "config": "other settings", "bank": "another bank",
                 "split": "another split of the bank"}
        return [(words[what], digests[what], now[what]) for what in words if digests[what] != now[what]]

    @property
    def other_code(self) -> str:
        """How the code here is another than the gate's, in words; "" where sbiplat and the packages are the same."""
        had, now = self.content["versions"], versions()
        changed = [f"{name} {had.get(name, 'absent')} became {now.get(name, 'absent')}"
                   for name in sorted({*had, *now}) if had.get(name) != now.get(name)]
        return "; ".join([*(["the code of sbiplat has changed"] if self.content["digests"]["code"] != code_digest() else []), *changed])

    def require(self, run: Run) -> Certificate:
        """This certificate if it is bound to the run and opens the door; raises Uncertified with the reason."""
        self.require_bound(run)
        if not self.passed:
            raise Uncertified(f"{run.path} was refused by the gate: {self.refusal}")
        if self.level == DRAFT:
            raise Uncertified(f"{run.path} has passed a draft only ({self.figures.get('pairs')} pairs), which certifies nothing; run "
                              f"`{run.gate_command}` for the standard level")
        return self


def digests_of(run: Run) -> dict[str, str]:
    """The SHA-256 of all that a certificate binds of a run, as it is on disk now."""
    return {"weights": run.weights_digest, "prior": files.digest_of(run.record["prior"]), "config": run.config_digest,
            "bank": run.bank_digest, "split": str(run.record["split"]["digest"])}


def hashed(content: Mapping[str, Any]) -> str:
    """The SHA-256 of a certificate's content, without those of its fields that say it or sign it."""
    return files.digest_of({k: v for k, v in content.items() if k not in UNHASHED})
