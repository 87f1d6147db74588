"""The report of a run: one self-contained HTML page, RUN/report.html.

It shows what the certificate allows and no more: the posterior given an observation only where the certificate holds.
The page asks nothing of the network and runs no script; whatever a run, bank or certificate says reaches it as text.
No code that the run names is run: its simulator is found only among those that are installed or that this process has
decorated itself, and is used only where its source is that of the bank, or is given by the caller.
"""

from __future__ import annotations

import hashlib
import io
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.resources import files as package_files
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import Environment, StrictUndefined
from numpy.typing import NDArray

from sbiplat import files
from sbiplat.diagnostics.misspecification import Misspecification
from sbiplat.diagnostics.predictive import Summaries, check_summaries, simulate, summarise
from sbiplat.errors import ObservationError, SettingError, SimulatorError, UserError
from sbiplat.gate.certificate import Certificate
from sbiplat.gate.door import load
from sbiplat.nets import embeddings
from sbiplat.observation import Fields, read_observation
from sbiplat.prior import Prior
from sbiplat.progress import Progress
from sbiplat.report import figures, predictive, tested, worst
from sbiplat.report.recorded import recorded_simulator, training, what
from sbiplat.report.verdict import Verdict, verdict_of
from sbiplat.report.words import number, to_digits
from sbiplat.runs import Run
from sbiplat.simulator import Simulator, available, resolve
from sbiplat.symmetry import names

Array = NDArray[np.float64]
PRIOR_DRAWS = 50_000
LEAST_DRAWS = 100
MOST_CHECKS = 20


def report(
    run: Run | str | Path, observation: Any = None, *, simulator: Simulator | str | None = None, draws: int = 10_000,
    seed: int = 0, embedding: Any = None, summaries: Summaries | None = None, out: str | Path | None = None,
    progress: Progress | None = None,
) -> Path:
    """Write the report of a finished run, by default to RUN/report.html, and return its path.

    observation: one x in the user's form; kept in RUN/observation.npz, which is used when none is given.
    simulator: for the posterior predictive; by default the registered one of the bank's name, if its source is the bank's.
    draws: of the posterior. embedding: as for `sbiplat.load`. summaries: of x, as for `sbiplat.predictive_check`. Raises RunError for
    an unfinished run.
    """
    run = (run if isinstance(run, Run) else Run.open(run)).require_finished()
    for name, value, least in (("draws", draws, LEAST_DRAWS), ("seed", seed, 0)):
        if isinstance(value, bool) or not isinstance(value, int | np.integer) or not least <= value < 2**62:
            raise SettingError(f"{name} must be a whole number of at least {least}, got {value!r}")
    if embedding is not None:  # the verdict, too, is over its code
        embeddings.register(embedding)
    progress = progress or Progress.auto()
    path = Path(out) if out else run.path / "report.html"
    x = _observation(run, observation, progress)
    if simulator is not None:
        names.register_of(simulator)
    found = _find_simulator(run, simulator)
    verdict = verdict_of(run)
    posterior, change, why = _posterior(run, verdict, x, found, int(draws), int(seed), embedding, summaries, progress)
    page = {
        "run": str(run.path), "name": recorded_simulator(run)["name"], "made": files.now(), "verdict": verdict,
        "posterior": posterior, "gate": _gate(run, verdict, change, why, int(seed)), "training": training(run),
        "what": what(run, found.simulator, verdict),
    }
    with files.disk_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
    files.write_text(path, render(page))
    return path


def render(page: Mapping[str, Any]) -> str:
    """The page as HTML. Everything is escaped; the template holds all the markup that there is."""
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters["number"] = number
    template = environment.from_string((package_files("sbiplat.report") / "page.html").read_text(encoding="utf-8"))
    return template.render(page).encode("utf-8", "replace").decode("utf-8")


# --------------------------------------------------------------------------------------- observation and simulator


def _observation(run: Run, given: Any, progress: Progress) -> Fields | None:
    """The observation as a dict of arrays of the declared shapes: the one given, which is kept, or the one kept before."""
    kept = run.path / "observation.npz"
    if given is None and not kept.is_file():
        return None
    x, batched = run.x.batch(read_observation(kept, run.x) if given is None else given)
    if batched:
        count = len(next(iter(x.values())))
        raise ObservationError(f"the report takes one observation, of shape {run.x.shape_text()}; a batch of {count} was given")
    single = {name: values[0] for name, values in x.items()}
    if given is not None:
        try:
            with files.disk_errors(kept), files.atomic_path(kept) as temporary:
                temporary.write_bytes(_npz(single))
        except UserError as problem:  # a run that may only be read: its report goes elsewhere, and so would the observation
            progress.say(f"the observation is not kept for the next report: {problem}")
    return single


def _npz(arrays: Fields) -> bytes:
    """An .npz whose arrays may have any name (numpy.savez has arguments of its own) and that is the same every time."""
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as archive:
        for name, values in arrays.items():
            item = io.BytesIO()
            np.lib.format.write_array(item, np.ascontiguousarray(values), allow_pickle=False)
            archive.writestr(zipfile.ZipInfo(f"{name}.npy"), item.getvalue())
    return out.getvalue()


@dataclass(frozen=True)
class Found:
    """The simulator, or a sentence why there is none; `warning` where it is not known to be the bank's."""

    simulator: Simulator | None
    why: str = ""
    warning: str = ""


def _find_simulator(run: Run, given: Simulator | str | None) -> Found:
    name, digest = recorded_simulator(run)["name"], recorded_simulator(run)["source_digest"]
    if given is not None:
        made = resolve(given)
        if made.x.shapes != run.x.shapes or made.prior.names != run.prior.names:
            raise SimulatorError(f"simulator {made.name!r} has other parameters or another shape of x than the bank of "
                                 f"{run.path}, which {name!r} made; give that one")
        same = made.source_digest() == digest
        return Found(made, warning="" if same else "The simulator given for this report is not, to the letter, the one that "
                                                   "made the bank: its source differs.")
    how = f"`sbiplat report {run.path} --simulator file.py:object`"
    if ":" in name or name not in available():  # with a colon it would be a path, and the run must not name code to run
        return Found(None, f"no simulator is registered here as “{name}”; to have it simulated again, run {how}.")
    try:
        made = resolve(name)
    except UserError as problem:
        return Found(None, f"the simulator registered here as “{name}” cannot be loaded ({problem}); run {how}.")
    if made.source_digest() != digest:
        return Found(None, f"the simulator registered here as “{name}” is not the one that made the bank, since its source "
                           f"differs; run {how} with the one that did.")
    return Found(made)


# ----------------------------------------------------------------------------------------------------- posterior


def _posterior(
    run: Run, verdict: Verdict, x: Fields | None, found: Found, draws: int, seed: int, embedding: Any,
    summaries: Summaries | None, progress: Progress,
) -> tuple[dict[str, Any], worst.Change | None, str]:
    """The section on the posterior: a sentence where there is none to show, else table, corner plot and predictive. And the worst change
    of the observation, or why there is none."""
    why_not = {
        "refused": "No posterior is shown, since the gate refused it.",
        "void": "No posterior is shown, since its certificate does not hold.",
        "draft": "No posterior is shown, since it has passed a draft only.",
        "untested": "No posterior is shown, since it has not been through the gate.",
        "certified": f"No observation was given; run `sbiplat report {run.path} --observation FILE` to see its posterior.",
    }[verdict.state]
    if verdict.state != "certified" or x is None:
        return {"shown": False, "why": why_not, "failed": verdict.failed if not verdict.diagnosis else []}, None, ""
    try:
        posterior = load(run, embedding=embedding)
    except UserError as problem:  # a user's own embedding that is not at hand: the rest of the page needs none
        return {"shown": False, "why": f"The posterior cannot be loaded: {problem}", "failed": []}, None, ""
    theta = posterior.sample(run.x.unwrap(x), draws, seed=seed)
    chains = dict(getattr(posterior.sampler, "diagnostics", {}))
    sight = posterior.misspecification(run.x.unwrap(x)) if posterior.watch else None
    before = run.prior.sample(np.random.default_rng(np.random.SeedSequence(seed, spawn_key=(0x9210,))), PRIOR_DRAWS)
    corner = figures.corner(theta, before, run.prior.names, run.prior.units, run.prior.support)
    assert verdict.certificate is not None
    change, why = None, ""
    try:
        change = worst.of_observation(run, verdict.certificate, posterior, x, theta, seed)
    except (UserError, NotImplementedError) as problem:
        why = f"Your observation was not attacked: {str(problem) or 'there is no density to tell by'}."
    return {
        "shown": True, "draws": draws, "seed": seed, "observation": hashlib.sha256(_npz(x)).hexdigest(),
        "rows": table(run.prior, theta, before), "dim": run.prior.dim, "corner_most": figures.MOST_CORNER,
        "corner": figures.image(corner, raster=True), "predictive": _predictive(run, found, theta, x, seed, summaries, progress),
        "sight": None if sight is None else _sight(sight), "chains": chains if "gibbs_steps" in chains else None,
    }, change, why


def table(prior: Prior, theta: Array, before: Array) -> list[dict[str, Any]]:
    """A row a parameter: mean, sd, 5, 50 and 95 % of the draws, and the prior's 5 and 95 %, to the digits that sd supports."""
    rows = []
    for k, (name, unit) in enumerate(zip(prior.names, prior.units, strict=True)):
        mean, sd = float(theta[:, k].mean()), float(theta[:, k].std(ddof=1))
        low, high = np.quantile(before[:, k], [0.05, 0.95])
        width = float(high - low) / 3.3
        rows.append({"name": name, "unit": unit, "mean": to_digits(mean, sd), "sd": to_digits(sd, sd),
                     "quantiles": [to_digits(float(q), sd) for q in np.quantile(theta[:, k], [0.05, 0.5, 0.95])],
                     "prior": [to_digits(float(low), width), to_digits(float(high), width)]})
    return rows


def _sight(found: Misspecification) -> dict[str, Any]:
    """Whether the observation is of the kind that the simulator makes."""
    return {"p_value": float(found.p_value[0]), "unusual": found.unusual, "text": found.text() if found.unusual else "",
            "held_out": found.held_out, "rows": found.rows, "level": found.level,
            "distances": [(kind, float(found.distances[kind][0]), float(found.p_values[kind][0])) for kind in found.distances],
            "features": [f for f in found.features[0]]}


def _predictive(
    run: Run, found: Found, theta: Array, x: Fields, seed: int, summaries: Summaries | None, progress: Progress,
) -> dict[str, Any]:
    if found.simulator is None:
        return {"figure": None, "why": f"The posterior predictive is left out: {found.why}"}
    simulated = simulate(found.simulator, theta, seed, progress)
    failed = f"{simulated.failed} of {simulated.tried} simulations from the posterior failed or were not finite"
    if simulated.rows < 2:
        return {"figure": None, "why": f"The posterior predictive is left out: {failed}. {simulated.error}".strip()}
    shown, notes = predictive.panels(run.x, x, simulated.fields)
    if simulated.failed:
        notes.append(f"{failed} and are left out")
    data = {name: values[None] for name, values in x.items()}
    checks = check_summaries(run.x, data, summarise(run.x, simulated.fields, summaries)[1], summaries, simulated.tried)
    worst = sorted(checks.checks, key=lambda c: c.p_value)[:MOST_CHECKS]
    return {"figure": figures.image(figures.observed(shown)), "rows": simulated.rows, "notes": notes,
            "checks": [c for c in checks.checks if c in worst], "all_checks": len(checks.checks),
            "warning": found.warning, "inside": predictive.share_inside(shown)}


# ---------------------------------------------------------------------------------------------------------- gate


def _gate(run: Run, verdict: Verdict, change: worst.Change | None, why: str, seed: int) -> dict[str, Any]:
    """Criteria, coverage and robustness of a certificate that holds or refuses. change: of the observation, or `why` there is none."""
    certificate = verdict.certificate
    if certificate is None:
        none = f"There is no certificate that holds; run `{run.gate_command}`."
        return {"criteria": [], "why": none, **dict.fromkeys(("coverage", "places", "robustness", "change"))}
    content, measured = certificate.content, certificate.figures
    return {"criteria": certificate.criteria, "why": "", "sha256": certificate.sha256,
            "created": str(content.get("created", "")), "pairs": measured.get("pairs"), "draws": measured.get("draws"),
            **_tested(run, certificate, change, why, seed)}


def _tested(run: Run, certificate: Certificate, change: worst.Change | None, why: str, seed: int) -> dict[str, Any]:
    """Sections of figures: None where the gate measured no such thing, a sentence (`why`) where what it measured cannot be read."""
    def left_out(what: str, problem: Exception) -> dict[str, Any]:
        return {"why": f"{what} left out: {problem}; run `{run.gate_command}` again."}

    def section(what: str, make: Callable[[], dict[str, Any] | None]) -> dict[str, Any] | None:
        try:
            return make()
        except ValueError as problem:
            return left_out(what, problem)

    measured, arrays, unread = certificate.figures.get("robustness"), {}, None
    try:
        arrays = tested.diagnostics(run, certificate)
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as problem:
        unread = left_out("The figures of coverage and robustness are", problem)

    def changed() -> dict[str, Any] | None:
        shown = change or (worst.of_pair(run, arrays, measured) if measured else None)
        return ({"why": why, "note": ""} if why else None) if shown is None else {**worst.section(run, shown, seed), "why": "", "note": why}

    return {
        "coverage": unread or section("The figures of coverage are", lambda: tested.coverage(arrays)),
        "places": None if unread else section("The maps of local coverage are", lambda: tested.places(arrays, run.prior.names)),
        "robustness": None if measured is None else unread or section("The figure of robustness is",
                                                                      lambda: tested.robustness(arrays, measured)),
        "change": section("The worst change is", changed),
    }
