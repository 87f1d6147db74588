r"""`sp.predictive_coverage`: are the posterior's predictions of new data the frequencies that they claim to be?

For held-out pairs (theta*, x), new data :math:`x'' \sim p(\cdot | \theta^*)` and predictions :math:`x_l \sim p(\cdot | \theta_l)`,
:math:`\theta_l \sim q(\theta | x)`, the randomised rank of a summary t(x'') among the t(x_l) is its probability integral transform
(PIT), and is uniform if q is the posterior. It is t(x'') that is ranked, and not t(x): x has made the posterior, and lies too often
in its middle.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from sbiplat.diagnostics.coverage import Coverage, coverage, holm, ranks
from sbiplat.diagnostics.predictive import Summaries, summarise
from sbiplat.errors import SettingError, SimulatorError
from sbiplat.gate.rows import examined_of
from sbiplat.progress import Progress
from sbiplat.runs import Run
from sbiplat.settings import whole_seed
from sbiplat.simulator import Simulator, resolve

Array = NDArray[np.float64]
LEAST_PAIRS, LEAST_DRAWS = 50, 20


@dataclass(frozen=True)
class PredictiveCoverage:
    """coverages: of each summary. adjusted: Holm's p-values of uniformity, by name. ranks: (P, S). failed: pairs left out, since a
    simulation of theirs failed or a summary of it was not finite."""

    coverages: tuple[Coverage, ...]
    adjusted: Mapping[str, float]
    ranks: Array
    failed: int

    def __str__(self) -> str:
        head = f"{'summary':32} {'max |ECP - alpha|':>18} {'under':>8} {'over':>8} {'Holm p':>8}"
        rows = [f"{c.name:32} {c.deviation:18.3f} {c.under:8.3f} {c.over:8.3f} {self.adjusted[c.name]:8.2g}" for c in self.coverages]
        return "\n".join([head, *rows, f"{len(self.ranks)} pairs; {self.failed} left out, a simulation having failed"])


def predictive_coverage(
    run: Run | str | Path, simulator: Simulator | str, summaries: Summaries | None = None, *, n: int = 200, draws: int = 100, seed: int = 0,
    bank: str | Path | None = None, device: str = "cpu", progress: Progress | None = None,
) -> PredictiveCoverage:
    """PIT of summaries of new data over n held-out pairs of a finished run, `draws` simulations and one a pair.

    summaries: as of `predictive_check`. It needs no certificate. Raises SettingError, SimulatorError.
    """
    run, simulator = (run if isinstance(run, Run) else Run.open(run)).require_finished(), resolve(simulator)
    for name, value, least in (("n", n, LEAST_PAIRS), ("draws", draws, LEAST_DRAWS)):
        if isinstance(value, bool) or not isinstance(value, int | np.integer) or value < least:
            raise SettingError(f"{name} must be a whole number of at least {least}, got {value!r}")
    if simulator.x.shapes != run.x.shapes or simulator.prior.names != run.prior.names:
        raise SimulatorError(f"simulator {simulator.name!r} has other parameters or another shape of x than {run.path}; "
                             "give the one that made its bank")
    progress = progress or Progress.auto()
    observed = simulator if run.record.get("observe_source") else None
    examined = examined_of(run, run.bank(bank), int(n), whole_seed(seed), observed, device, progress)
    posterior, truth = examined.posterior, examined.truth
    names: list[str] = []
    seen, made, failed = [], [], 0
    with progress.task("predictions", len(truth)) as advance:
        for k, z in enumerate(truth):
            x = {name: v[k:k + 1] for name, v in examined.pairs["x"].items()}
            own = examined.stream(0x9177, k).generate_state(2)
            drawn = posterior.unconstrained_sample(x, int(draws), int(own[0]))[0]
            theta = posterior.prior.constrain(np.concatenate([z[None], drawn]))
            names, values = _summaries_of(simulator, theta, int(own[1]), run, summaries)
            if values is None:
                failed += 1
            else:
                seen.append(values[0])
                made.append(values[1:])
            advance(1)
    if len(seen) < LEAST_PAIRS:
        raise SimulatorError(f"simulations of {failed} of {len(truth)} pairs failed, or their summaries are not finite; at least "
                             f"{LEAST_PAIRS} pairs are needed")
    rng = np.random.default_rng(examined.stream(0x9178))
    found = ranks(np.stack(made), np.stack(seen), rng)
    each = tuple(coverage(name, found[:, j:j + 1], rng, "function") for j, name in enumerate(names))
    return PredictiveCoverage(each, dict(zip(names, holm([c.p_value for c in each]), strict=True)), found, failed)


def _summaries_of(
    simulator: Simulator, theta: Array, seed: int, run: Run, summaries: Summaries | None,
) -> tuple[list[str], Array | None]:
    """Names, and the summaries (L + 1, S) of one simulation of each theta; None where one failed or is not finite."""
    streams = [np.random.default_rng(s) for s in np.random.SeedSequence(seed).spawn(len(theta))]
    try:
        rows = list(simulator.rows(theta, streams[:1])) if simulator.batched else [
            row for t, stream in zip(theta, streams, strict=True) for row in simulator.rows(t[None], [stream])]
    except Exception:  # the user's own code: anything may come
        return [], None
    names, values = summarise(run.x, {name: np.stack([row[name] for row in rows]) for name in simulator.x.shapes}, summaries)
    return names, values if np.isfinite(values).all() else None
