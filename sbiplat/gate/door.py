"""The door: the posterior of a run, opened only where its certificate says passed, is unaltered, and was given to these very weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from sbiplat.errors import Uncertified
from sbiplat.gate import signature
from sbiplat.gate.certificate import Certificate
from sbiplat.nets import embeddings
from sbiplat.posteriors.base import Posterior
from sbiplat.posteriors.of_run import from_run
from sbiplat.runs import Run


def load(
    run: str | Path | Run, *, allow_uncertified: bool = False, embedding: Any = None, device: str = "cpu",
    public_key: str | Path | None = None,
) -> Posterior:
    """The posterior of a certified run; raises Uncertified with the reason and the mend where its certificate does not hold.

    embedding: the user's own class (or 'file.py:Class') where the run was trained with one, since loading a run never
    runs code that the run names. allow_uncertified: for looking into a refused posterior; its draws say so. public_key: file of the
    key that must have signed the certificate.
    """
    if embedding is not None:
        embeddings.register(embedding)
    run = (run if isinstance(run, Run) else Run.open(run)).require_finished()
    wanted = signature.read_public(public_key) if public_key is not None else None
    try:
        certificate = Certificate.read(run).require(run)
        signer = signature.require(certificate.content, wanted) if wanted else None
    except Uncertified as reason:
        if not allow_uncertified:
            raise
        return from_run(run, device, certified="no", refusal=str(reason))
    return from_run(run, device, certified="yes", certificate=certificate.sha256, level=certificate.level, signed_by=signer,
                    own_thresholds=certificate.own_thresholds or None, since_gate=since_gate(certificate, device) or None)


def since_gate(certificate: Certificate, device: str) -> str:
    """What a certificate does not bind and is another than at the gate: device, code of sbiplat, versions; "" where nothing is."""
    had = certificate.content["valid_for"]["device"]
    elsewhere = f"the gate was on {had}, this is on {device}" if had != device else ""
    return "; ".join(part for part in (elsewhere, certificate.other_code) if part)
