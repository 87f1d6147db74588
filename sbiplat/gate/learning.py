r"""How many simulations would do: the same training on a quarter and a half of the bank, beside that on all of it.

The held-out log-density of each, on rows that none of the three saw, is taken to follow

.. math:: L(n) = L_\infty - a \, n^{-b}, \qquad \frac{L(n) - L(n/2)}{L(n/2) - L(n/4)} = 2^{-b} ,

the law that learning curves of nets follow over wide ranges (Hestness et al., 2017). From the ratio follow what the next doubling gains,
and how many rows come within a tolerance of the limit. Three points say no more than that: it is a guide for a budget, not a promise.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sbiplat import files
from sbiplat.bank.bank import Bank
from sbiplat.bank.stream import pairs_at, split
from sbiplat.errors import RunError, SettingError
from sbiplat.estimators.base import find_trained_here
from sbiplat.gate.rows import observed
from sbiplat.nets import embeddings
from sbiplat.posteriors.of_run import from_run
from sbiplat.progress import Progress
from sbiplat.runs import Run
from sbiplat.settings import build as build_settings
from sbiplat.simulator import Simulator
from sbiplat.training.begin import TrainSettings, filled, observe_of, plan
from sbiplat.training.trainer import carry_out

SHARES = {"quarter": 4, "half": 2}
LEAST_ROWS = 100  # held out, that none of the three trainings saw
CHUNK = 256
MOST_DOUBLINGS = 12
TOLERANCE = 0.05  # nats
FILE = "learning_curve.json"
FORMAT_VERSION = 1


@dataclass(frozen=True)
class LearningCurve:
    """rows and log_density: of the three trainings, smallest first. gains: of the two doublings, with standard errors (paired).

    next_gain: nats that the next doubling gives, if the curve goes on as it does. enough: rows from which a doubling gives less than
    0.05 nats; None where three points show no end.
    """

    rows: tuple[int, ...]
    log_density: tuple[float, ...]
    gains: tuple[tuple[float, float], ...]
    next_gain: float
    enough: int | None
    held_out: int

    @property
    def statement(self) -> str:
        """All of it in a sentence."""
        (gain, error), rows = self.gains[-1], self.rows[-1]
        told = f"the last doubling, to {rows:,} rows, gained {gain:.3f} +- {error:.3f} nats"
        if gain <= max(TOLERANCE, 2 * error):
            return f"{told}: more simulations would hardly help"
        if self.enough is None:
            return f"{told}, no less than the one before: no end is in sight, simulate several times as many"
        return (f"{told}, the next one would gain about {self.next_gain:.2f}; from about {self.enough:,} rows on a doubling gains under "
                f"{TOLERANCE:g}")

    @property
    def next_rows(self) -> int:
        """How many rows to have next: enough, where that is known and within reach, else four times as many."""
        return min(self.enough or 4 * self.rows[-1], 16 * self.rows[-1])


def learning_curve(
    run: Run | str | Path, *, bank: str | Path | None = None, simulator: Simulator | str | None = None, device: str = "cpu",
    progress: Progress | None = None,
) -> LearningCurve:
    """Train on a quarter and on a half of the run's bank, and write RUN/learning_curve.json; resumes, and costs 3/4 of the training.

    Arguments as for `gate`. Raises RunError where too few held-out rows are left that none of the trainings saw.
    """
    run = (run if isinstance(run, Run) else Run.open(run)).require_finished()
    kind, progress = find_trained_here(run.architecture.estimator), progress or Progress.auto()
    embeddings.source_digest(getattr(run.architecture.settings, "embedding", "mlp"))  # a run must not make its code run by itself
    source = run.bank(bank)
    if run.recalibration is not None:
        raise RunError(f"{run.path} is recalibrated, and its parts would not be; take the run that it was made of")
    unseen, x = _unseen(run, source, simulator)
    settings, sizes, found = _as_the_user_gave(run, source, kind.training_defaults), [], []
    for name, share in SHARES.items():
        part = source.first(source.rows // share)
        progress.say(f"learning curve: training on {part.rows} rows")
        wanted = plan(part, run.architecture.estimator, run.seed, simulator,
                      {**asdict(run.architecture.settings), **settings, **run.symmetry_settings})
        made = carry_out(wanted, run.path / "learning_curve" / name, progress)
        sizes.append(part.rows)
        found.append(_log_density(made, unseen, x, device))
    found.append(_log_density(run, unseen, x, device))
    curve = of_three((*sizes, source.rows), np.stack(found))
    files.write_json(run.path / FILE, {"format_version": FORMAT_VERSION, "weights": run.weights_digest, **asdict(curve)})
    return curve


def read(run: Run) -> LearningCurve | None:
    """The curve that stands in a run, where it is of these weights; raises RunError where the file is damaged."""
    path = run.path / FILE
    if not path.is_file():
        return None
    content = files.read_json(path, "learning curve", RunError)
    try:
        assert content["format_version"] == FORMAT_VERSION
        if content["weights"] != run.weights_digest:
            return None
        rows = tuple(int(v) for v in content["rows"])
        gains = tuple((float(g), float(e)) for g, e in content["gains"])
        enough = content["enough"]
        assert (len(rows), len(gains)) == (3, 2)
        return LearningCurve(rows, tuple(float(v) for v in content["log_density"]), gains, float(content["next_gain"]),
                             None if enough is None else int(enough), int(content["held_out"]))
    except (KeyError, TypeError, ValueError, AssertionError):
        raise RunError(f"{path} is damaged; delete it, and run `sbiplat learning-curve {run.path}` again") from None


def of_three(rows: tuple[int, ...], log_density: NDArray[np.float64]) -> LearningCurve:
    """The curve through log-densities (3, P) of the same P pairs under trainings on so many rows, each twice those before."""
    steps = np.diff(log_density, axis=0)
    gains = tuple((float(s.mean()), float(s.std(ddof=1) / math.sqrt(len(s)))) for s in steps)
    (first, _), (second, _) = gains
    ratio = second / first if first > 0 else math.inf
    next_gain = second * min(ratio, 1.0) if second > 0 else 0.0
    enough: int | None = rows[-1]
    if second > TOLERANCE:
        count = math.ceil(math.log(TOLERANCE / second) / math.log(ratio)) if ratio < 1 else MOST_DOUBLINGS + 1
        enough = None if count > MOST_DOUBLINGS else rows[-1] * 2 ** (count - 1)
    return LearningCurve(rows, tuple(float(v) for v in log_density.mean(1)), gains, next_gain, enough, log_density.shape[1])


def _unseen(run: Run, bank: Bank, simulator: Simulator | str | None) -> tuple[NDArray[np.float64], dict[str, Any]]:
    """Held-out pairs of the run that lie in the second half of the bank: (P, 1, D) in R^D, and x."""
    settings = build_settings(TrainSettings, run.record["training"])
    apart = split(bank, run.seed, settings.validation, settings.held_out or 0.0, settings.held_out_most or 0)
    rows = apart.held_out[apart.held_out >= bank.rows // 2]
    if len(rows) < LEAST_ROWS:
        raise RunError(f"a learning curve needs {LEAST_ROWS} held-out rows in the second half of the bank, and {run.path} has {len(rows)}; "
                       "make a larger bank")
    pairs = pairs_at(bank, np.sort(rows))
    observe = observe_of(bank, simulator, f"sbiplat learning-curve {run.path}")
    if observe:
        pairs = observed(observe, pairs, run.seed, 2)
    return np.asarray(pairs["theta"], float)[:, None], pairs["x"]


def _as_the_user_gave(run: Run, bank: Bank, defaults: Mapping[str, Any]) -> dict[str, Any]:
    """The run's training settings without those that are what the bank's size makes them."""
    usual = asdict(filled(TrainSettings(), bank, defaults))
    return {k: v for k, v in run.record["training"].items() if v != usual.get(k)}


def _log_density(run: Run, z: NDArray[np.float64], x: dict[str, Any], device: str) -> NDArray[np.float64]:
    """log q(z | x) of each pair, (P,); raises SettingError where the estimator has no density."""
    posterior = from_run(run, device)
    try:
        return np.concatenate([
            posterior.unconstrained_log_prob(z[a:a + CHUNK], {k: v[a:a + CHUNK] for k, v in x.items()})[:, 0]
            for a in range(0, len(z), CHUNK)])
    except NotImplementedError:
        raise SettingError(f"a learning curve is of the held-out log-density, which {run.architecture.estimator} does not have") from None
