"""What may be said of a run's posterior: what its certificate says, where it holds."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from sbiplat.errors import SettingError, Uncertified
from sbiplat.gate import signature
from sbiplat.gate.certificate import Certificate
from sbiplat.gate.criteria import at_level
from sbiplat.report.words import items
from sbiplat.runs import Run

LEVELS = {"draft": "an early sight that certifies nothing", "standard": "for use", "publication": "for a paper"}
NOT_TESTED = {
    "robustness": "whether small, deliberate or unlucky changes of the data mislead the posterior: it has no density to tell by",
    "attacks by gradient": "changes of the data that follow the net's gradient; a search without gradients was made in their place",
    "misspecification": "whether your observation is of the kind that the simulator makes: too few pairs were held out to calibrate the "
                        "test; the certificate speaks only of data that it could have made",
    "coverage of regions of highest density": "whether the most probable regions hold the truth as often as they claim: there is no "
                                              "density to tell by",
}


@dataclass(frozen=True)
class Verdict:
    """What may be said of the posterior: `state` is certified, draft, refused, void (a certificate that does not hold) or untested."""

    state: str
    word: str
    meaning: str
    reason: str = ""
    certificate: Certificate | None = None

    @property
    def failed(self) -> list[Any]:
        return self.certificate.failed if self.certificate else []

    @property
    def diagnosis(self) -> list[Mapping[str, str]]:
        """Findings on a refused posterior: defect, evidence, mend, command."""
        return self.certificate.content.get("diagnosis", []) if self.certificate and self.state == "refused" else []

    @property
    def level(self) -> str:
        """How much was tested, in words."""
        level = self.certificate.level if self.certificate else ""
        return f"{level}, {LEVELS[level]}" if level in LEVELS else level

    @property
    def signature(self) -> str:
        """Who vouches for the certificate, in words."""
        content = self.certificate.content if self.certificate else {}
        if not content.get("signature"):
            return "none; the certificate's hash guards against mistakes, not against forgery"
        try:
            return f"of the key {signature.check(content)}, and it fits"
        except Uncertified as problem:
            return f"does not hold: {problem}"
        except SettingError as problem:
            return f"not checked here: {problem}"

    @property
    def not_tested(self) -> list[tuple[str, str]]:
        named = self.certificate.content.get("not_tested") if self.certificate else None
        return [(str(v), NOT_TESTED.get(str(v), "")) for v in named] if isinstance(named, list) else []

    @property
    def changed(self) -> list[tuple[str, Any, Any]]:
        """Thresholds that are not the default ones: name, here, by default."""
        usual = asdict(at_level(self.certificate.level, {})) if self.certificate else {}
        held = items(self.certificate.content.get("thresholds")) if self.certificate else []
        return [(name.replace("_", " "), value, usual.get(name)) for name, value in held if value != usual.get(name)]


def verdict_of(run: Run) -> Verdict:
    """The verdict that the run's certificate allows."""
    if not (run.path / "certificate.json").is_file():
        return Verdict("untested", "NOT YET GATED",
                       f"Nobody has tested this posterior. Run `{run.gate_command}`; until then none is shown here.")
    try:
        certificate = Certificate.read(run).require_bound(run)
    except (Uncertified, SettingError) as reason:
        return Verdict("void", "CERTIFICATE VOID", "The certificate does not hold for these weights, this code and this bank, so "
                       "nothing vouches for this posterior and none is shown here.", str(reason))
    if not certificate.passed:
        failed, total = len(certificate.failed), len(certificate.criteria)
        return Verdict("refused", "REFUSED", f"The posterior failed {failed} of the gate's {total} criteria: its probabilities "
                       "are not to be relied on, and none are shown here.", certificate=certificate)
    pairs = certificate.figures.get("pairs", "the")
    if not certificate.certifies:
        return Verdict("draft", "DRAFT", f"The posterior met every criterion on a first {pairs} held-out simulations. That is an early "
                       f"sight and certifies nothing: run `{run.gate_command}`; until then no posterior is shown here.",
                       certificate=certificate)
    return Verdict("certified", "CERTIFIED", f"The posterior met every criterion of the gate on {pairs} held-out simulations: "
                   "over data that the simulator makes under the prior, its probabilities are on average, within the limits "
                   "below, the frequencies that they claim to be. That says calibrated, not sharp: a better embedding or a "
                   "larger bank may still give a narrower posterior. Compare the information of two runs.", certificate=certificate)
