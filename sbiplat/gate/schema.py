"""The form of certificate.json. `schema.json`, beside this file, is the same as JSON Schema (draft 2020-12), for other programs."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, JsonValue, ValidationError

FORMAT_VERSION = 2

Digest = Annotated[str, Field(pattern="^[0-9a-f]{64}$")]
Count = Annotated[int, Field(ge=0)]


class _Strict(BaseModel):
    """No other fields, and no value of another type."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class CriterionForm(_Strict):
    """One criterion with its verdict."""

    name: str
    passed: bool
    figure: float
    threshold: float
    statement: str
    mend: str = ""


class FindingForm(_Strict):
    """One defect of a refused posterior: what shows it, what usually mends it, and that as a command where there is one."""

    defect: str
    evidence: str
    mend: str
    command: str


class StepForm(BaseModel):
    """One step of the chain that the posterior is, with whatever more it says of itself. Older certificates have no chain."""

    model_config = ConfigDict(extra="allow", frozen=True, strict=True)

    step: str
    name: str
    needs: list[str] = []
    gives: list[str] = []
    steps: list[StepForm] = []


class ValidFor(_Strict):
    """What the verdict holds for, besides the digests. observations: how many independent ones make one x."""

    observations: Literal[1]
    parameters: Annotated[list[str], Field(min_length=1)]
    device: str


class Seeds(_Strict):
    """Of all that was drawn."""

    gate: Count
    training: Count
    bank: Count


class Counts(_Strict):
    """Rows of the bank, how many of them were held out from training, and how many were left out since they failed."""

    bank_rows: Count
    held_out_rows: Count
    left_out_rows: Count


class Digests(_Strict):
    """SHA-256 of what the verdict is bound to (weights, config, prior, bank, split), of diagnostics.npz, and of sbiplat's own code."""

    weights: Digest
    config: Digest
    prior: Digest
    bank: Digest
    split: Digest
    diagnostics: Digest
    code: Digest


class Machine(_Strict):
    """Where the gate ran: figures are repeated exactly where this and the versions are the same."""

    system: str
    processor: str
    accelerator: str
    threads: Annotated[int, Field(ge=1)]


class Cost(_Strict):
    """Wall time, and the processes that shared the work."""

    seconds: Annotated[float, Field(ge=0)]
    processes: Annotated[int, Field(ge=1)]


class SignatureForm(_Strict):
    """A site's Ed25519 signature: the key in OpenSSH's form, and the 64 bytes in base64. Not part of what `sha256` is of."""

    algorithm: Literal["ed25519"]
    public_key: Annotated[str, Field(pattern="^ssh-ed25519 [A-Za-z0-9+/]+=*$")]
    signature: Annotated[str, Field(pattern="^[A-Za-z0-9+/]{86}==$")]


class CertificateForm(_Strict):
    """The verdict of sbiplat's gate on one posterior."""

    format_version: Literal[2]
    passed: bool
    level: Literal["draft", "standard", "publication"]
    criteria: Annotated[list[CriterionForm], Field(min_length=1)]
    diagnosis: list[FindingForm]
    not_tested: list[str]
    thresholds: dict[str, JsonValue]
    figures: dict[str, JsonValue]
    valid_for: ValidFor
    estimator: str
    chain: list[StepForm] | None = None
    simulator: dict[str, JsonValue]
    seeds: Seeds
    counts: Counts
    digests: Digests
    versions: dict[str, str]
    machine: Machine
    created: Annotated[str, Field(pattern=r"^\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\+00:00$")]
    cost: Cost
    sha256: Digest
    signature: SignatureForm | None = None


def fault(content: Mapping[str, Any]) -> str:
    """What is wrong with the form of a certificate, in one line; "" where nothing is."""
    if content.get("format_version") != FORMAT_VERSION:
        return f"it is of certificate format {content.get('format_version')!r:.40}, this sbiplat reads {FORMAT_VERSION}"
    try:
        CertificateForm.model_validate(dict(content))
    except ValidationError as error:
        first, more = error.errors(include_url=False, include_input=False)[0], error.error_count() - 1
        place = ".".join(str(part) for part in first["loc"])
        return f"{place[:120]}: {first['msg']}" + (f" (and {more} more)" if more else "")
    except RecursionError:
        return "it is nested too deeply"
    if content["passed"] != all(c["passed"] for c in content["criteria"]):
        return "its verdict does not agree with its criteria"
    return ""


def published() -> str:
    """schema.json as it must be."""
    named = {"$schema": "https://json-schema.org/draft/2020-12/schema", "$id": f"urn:sbiplat:certificate:{FORMAT_VERSION}"}
    return json.dumps({**named, **CertificateForm.model_json_schema()}, indent=2) + "\n"
