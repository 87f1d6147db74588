"""The door: the posterior of a run, opened only where its certificate says passed, is unaltered, and was given to these very weights."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from sbiplat.errors import Uncertified
from sbiplat.gate import signature
from sbiplat.gate.certificate import Certificate
from sbiplat.gate.watch import Watch, watch_of
from sbiplat.nets import embeddings
from sbiplat.posteriors.base import Posterior
from sbiplat.posteriors.of_run import from_run
from sbiplat.runs import Run
from sbiplat.simulator import Simulator
from sbiplat.symmetry import names


def load(
    run: str | Path | Run, *, allow_uncertified: bool = False, refuse_misspecified: bool = False, embedding: Any = None,
    simulator: Simulator | str | None = None, device: str = "cpu", public_key: str | Path | None = None,
) -> Posterior:
    """The posterior of a certified run; raises Uncertified with the reason and the mend where its certificate does not hold.

    embedding, simulator: the user's own class (or 'file.py:Class'), and the simulator with an action of the user's own, where the run was
    trained with such, since loading a run never runs code that the run names. allow_uncertified: for looking into a refused posterior;
    its draws say so. refuse_misspecified: raise Uncertified, instead of warning, for an observation that is unlike the bank. public_key:
    file of the key that must have signed the certificate.
    """
    if embedding is not None:
        embeddings.register(embedding)
    if simulator is not None:
        names.register_of(simulator)
    run = (run if isinstance(run, Run) else Run.open(run)).require_finished()
    wanted = signature.read_public(public_key) if public_key is not None else None
    try:
        certificate = Certificate.read(run).require(run)
        signer = signature.require(certificate.content, wanted) if wanted else None
        watch = _required(watch_of(run, certificate, refuse_misspecified), run, refuse_misspecified)
    except Uncertified as reason:
        if not allow_uncertified:
            raise
        watch = _required(_watch_of_refused(run, refuse_misspecified), run, refuse_misspecified)
        return replace(from_run(run, device, certified="no", refusal=str(reason)), watch=watch)
    made = from_run(run, device, certified="yes", certificate=certificate.sha256, level=certificate.level, signed_by=signer,
                    own_thresholds=certificate.own_thresholds or None, since_gate=since_gate(certificate, device) or None)
    return replace(made, watch=watch)


def since_gate(certificate: Certificate, device: str) -> str:
    """What a certificate does not bind and is another than at the gate: device, code of sbiplat, versions; "" where nothing is."""
    had = certificate.content["valid_for"]["device"]
    elsewhere = f"the gate was on {had}, this is on {device}" if had != device else ""
    return "; ".join(part for part in (elsewhere, certificate.other_code) if part)


def _required(watch: Watch | None, run: Run, refuse: bool) -> Watch | None:
    """A watch that is to refuse must be there."""
    if refuse and watch is None:
        raise Uncertified(f"no test of misspecification is calibrated for {run.path}, so none can refuse an observation; run `sbiplat gate "
                          f"{run.path}` with at least 200 held-out pairs")
    return watch


def _watch_of_refused(run: Run, refuse: bool) -> Watch | None:
    """The test of misspecification of a run that the gate has refused; None where its certificate does not hold."""
    try:
        return watch_of(run, Certificate.read(run).require_bound(run), refuse)
    except Uncertified:
        return None
