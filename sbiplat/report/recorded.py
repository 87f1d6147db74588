"""What a run records of itself: its simulator, bank, training, settings, seeds, versions and digests."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from sbiplat.errors import RunError, UserError
from sbiplat.estimators.equivariant import frame_of
from sbiplat.gate import learning
from sbiplat.observation import ObservationSpec
from sbiplat.prior import Prior
from sbiplat.report import figures
from sbiplat.report.verdict import Verdict
from sbiplat.report.words import bound, items, number, texts
from sbiplat.runs import Run
from sbiplat.simulator import Simulator

UNITS_OF_LOSS = {"npe": "nats", "nle": "nats"}


def recorded_simulator(run: Run) -> dict[str, str]:
    """The bank's simulator as the run records it: name, spec, source_digest."""
    recorded = dict(items(run.record["bank"].get("simulator")))
    return {key: str(recorded.get(key, "")) for key in ("name", "spec", "source_digest")}


def training(run: Run) -> dict[str, Any]:
    """The section on the training: its losses, learning curve and outcome, the split, and the symmetry."""
    metrics = [m for m in run.metrics() if isinstance(m, Mapping) and isinstance(m.get("epoch"), int)]
    outcome = items(run.record.get("outcome"))
    best = dict(outcome).get("best_epoch")
    unit = UNITS_OF_LOSS.get(run.architecture.estimator, "")
    curves = figures.loss_curves(metrics, best if isinstance(best, int) else None, unit) if metrics else None
    return {"figure": figures.image(curves) if curves else None, "curve": _learning_curve(run), "outcome": texts(outcome),
            "rows": texts([(k, v) for k, v in items(run.record["split"]) if k != "digest"]), "symmetry": texts(_symmetry(run))}


def _symmetry(run: Run) -> list[tuple[str, Any]]:
    """Of GNPE: each coordinate's kernel, and how far the prior is from flat; nothing of other runs."""
    about = run.architecture.symmetry
    if about is None or "widths" not in about:
        return []
    try:
        names_of = frame_of(about).action.coordinates
    except UserError:  # a user's own action, which is not at hand
        names_of = tuple(f"coordinate {k + 1}" for k in range(len(about["widths"])))
    each = zip(names_of, about["widths"], about["spread"], about["told"], strict=True)
    wider = ", times that spread at x beside its median" if about["stretch"] else ""
    return [*((f"kernel of {name}", f"width {number(w)}{wider}, for an initial net's spread of {number(s)}; the net is "
               f"{'' if told else 'not '}told the proxy") for name, w, s, told in each),
            ("change of the log prior over the spread", about["slope"]),
            ("share of such moves beyond the prior's edges", about["leaving"]), ("Gibbs steps at most", about["gibbs_steps"])]


def _learning_curve(run: Run) -> dict[str, Any] | None:
    """The learning curve where one was measured of these weights."""
    try:
        curve = learning.read(run)
    except RunError as problem:
        return {"figure": None, "why": f"The learning curve is left out: {problem}."}
    if curve is None:
        return None
    drawn = figures.learning_curve(curve.rows, curve.log_density, curve.gains, curve.next_gain)
    return {"figure": figures.image(drawn), "why": "", "statement": curve.statement, "held_out": curve.held_out}


def what(run: Run, simulator: Simulator | None, verdict: Verdict) -> dict[str, Any]:
    """Simulator card, bank, settings, seeds, versions and digests."""
    record, recorded = run.record, recorded_simulator(run)
    seeds = [("bank", record["bank"].get("seed")), ("training", record["seed"])]
    digests = [("bank", run.bank_digest), ("weights", run.weights_digest), ("architecture and prior", run.config_digest),
               ("split", dict(items(record["split"])).get("digest")), ("simulator's source", recorded["source_digest"])]
    if verdict.certificate is not None:
        seeds += [(k, v) for k, v in items(verdict.certificate.content.get("seeds")) if k not in dict(seeds)]
        digests.append(("certificate", verdict.certificate.sha256))
    estimator = [("estimator", run.architecture.estimator), *items(record["architecture"].get("settings"))]
    if verdict.certificate is not None and verdict.certificate.chain:
        estimator.insert(1, ("chain of steps", verdict.certificate.chain))
    parameters = zip(run.prior.names, run.prior.units, _laws(run.prior), *run.prior.support, strict=True)
    return {
        "summary": simulator.summary if simulator else "", "citation": simulator.citation if simulator else "",
        "spec": recorded["spec"], "created": str(record.get("created", "")),
        "parameters": [{"name": name, "unit": unit, "law": law, "low": bound(low, "−∞"), "high": bound(high, "∞")}
                       for name, unit, law, low, high in parameters],
        "x": texts(_about_x(run.x)), "bank": texts(_bank(run)),
        "settings": [("estimator", texts(estimator)), ("training", texts(items(record["training"])))],
        "seeds": texts(seeds), "versions": texts(items(record.get("versions"))), "digests": texts(digests),
    }


def _laws(prior: Prior) -> list[str]:
    marginals = getattr(prior.law, "marginals", None)
    if marginals is None:
        return [f"joint: {', '.join(prior.law.to_json())}"] * prior.dim
    settings = [", ".join(number(getattr(m, f.name)) for f in fields(m) if f.name != "unit") for m in marginals]
    return [f"{type(m).__name__}({text})" for m, text in zip(marginals, settings, strict=True)]


def _about_x(x: ObservationSpec) -> list[tuple[str, Any]]:
    most = 40
    labels = ", ".join(x.labels[:most]) + (f" and {len(x.labels) - most} more" if len(x.labels) > most else "")
    axis = f"{x.axis[0]}, {x.axis[1][0]:g} to {x.axis[1][-1]:g}" if x.axis[1] else ""
    known = [("shape", x.shape_text()), ("dtype", x.dtype), ("unit", x.unit), ("labels", labels), ("axis", axis),
             ("transform", ", ".join(sorted(set(x.transform.values()))))]
    return [(name, value) for name, value in known if value]


def _bank(run: Run) -> list[tuple[str, Any]]:
    known = [(key.replace("_", " "), run.record["bank"].get(key)) for key in ("digest", "path", "rows", "block_size")]
    try:
        bank = run.bank()
        counts, info = bank.status_counts(), bank.info()
    except (UserError, OSError, RuntimeError, ValueError, KeyError, TypeError) as problem:
        return [*known, ("status", f"the bank could not be opened: {problem}")]
    return [*known, ("status", ", ".join(f"{count} {name}" for name, count in counts.items() if count or name == "ok")),
            ("simulation time", f"{info['simulation_seconds']:.3g} s"), ("made", info["created"])]
