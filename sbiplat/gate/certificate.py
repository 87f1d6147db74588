"""The certificate: the gate's verdict on one run, bound to its weights, configuration and bank.

RUN/certificate.json names the criteria, figures, seeds and the digests of weights, configuration and bank, and carries the SHA-256 of
its own canonical form.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from sbiplat import files
from sbiplat.errors import Uncertified
from sbiplat.gate.criteria import Criteria
from sbiplat.gate.criterion import Criterion
from sbiplat.runs import Run

FORMAT_VERSION = 1


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
