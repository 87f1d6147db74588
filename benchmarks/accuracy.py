r"""Accuracy on the benchmark tasks of Lueckmann et al. (2021): C2ST against reference posteriors, beside the published values.

The ten observations of each task and 10,000 draws of each of their posteriors are the benchmark's own, read from its wheel, which pip
downloads once (no code of it runs). 10,000 draws a side, sbibm's classifier. One default setting for each estimator, whatever the task.

    python benchmarks/accuracy.py --estimators npe --budgets 10000
    python benchmarks/accuracy.py --show                            # only print what is there

"""

from __future__ import annotations

import argparse
import bz2
import csv
import io
import subprocess
import sys
import tempfile
import time
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import Cells, c2st, table
from numpy.typing import NDArray

import sbiplat as sp
from sbiplat.errors import UserError
from sbiplat.estimators.base import ESTIMATORS
from sbiplat.progress import silent
from sbiplat.simulator import resolve

Array = NDArray[np.float64]
HERE = Path(__file__).parent
KEPT = HERE / ".references"  # not committed: downloaded again by this program
WHEEL = "sbibm==1.1.0"
TASKS = ("two_moons", "gaussian_linear", "gaussian_linear_uniform", "gaussian_mixture", "slcp", "bernoulli_glm", "sir", "lotka_volterra")
PUBLISHED = ("NPE", "NLE", "NRE")
BUDGETS = (1_000, 10_000, 100_000)
DRAWS, OBSERVATIONS, SEED = 10_000, 10, 20260701


def wheel() -> zipfile.ZipFile:
    """The benchmark's wheel, downloaded by pip where it is not kept."""
    KEPT.mkdir(exist_ok=True)
    if not list(KEPT.glob("sbibm-*.whl")):
        subprocess.run([sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(KEPT), WHEEL], check=True)
    return zipfile.ZipFile(next(KEPT.glob("sbibm-*.whl")))


def reference(task: str, k: int) -> tuple[Array, Array]:
    """The k-th observation (F,), k from 1, and 10,000 draws of its posterior (10,000, D)."""
    with wheel() as file:
        folder = f"sbibm/tasks/{task}/files/num_observation_{k}/"

        def numbers(raw: bytes) -> Array:
            return np.loadtxt(io.BytesIO(raw), delimiter=",", skiprows=1, ndmin=2)

        x = numbers(file.read(folder + "observation.csv"))[0]
        draws = numbers(bz2.decompress(file.read(folder + "reference_posterior_samples.csv.bz2")))
    return x, draws


def one(task: str, estimator: str, budget: int, count: int) -> dict[str, Any]:
    """A cell: C2ST of the first `count` observations, and what the estimator cost."""
    simulator = resolve(task)
    known = [reference(task, k + 1) for k in range(count)]
    with tempfile.TemporaryDirectory() as folder:
        bank = sp.simulate(simulator, budget, 1, Path(folder) / "bank", progress=silent)
        start = time.monotonic()
        run = sp.train(bank, estimator, out=Path(folder) / "run", progress=silent)
        training = time.monotonic() - start
        posterior = sp.load(run, allow_uncertified=True)
        start = time.monotonic()
        draws, refused = [], []
        for k, (x, _) in enumerate(known):
            try:
                draws.append(posterior.sample(x.reshape(simulator.x.shapes["x"]), DRAWS, seed=1))
            except UserError as error:
                draws.append(None)
                refused.append(f"observation {k + 1}: {error}")
        sampling = time.monotonic() - start
    kept = [k for k, mine in enumerate(draws) if mine is not None]
    values = c2st(np.stack([known[k][1] for k in kept]), np.stack([draws[k] for k in kept])) if kept else []
    whole = values + [1.0] * len(refused)  # what was refused counts as if it were told apart for certain
    return {"c2st": values, "median": float(np.median(whole)), "training_seconds": training, "sampling_seconds": sampling / count,
            **({"refused": refused} if refused else {})}


def published() -> dict[tuple[str, str, int], float]:
    """C2ST by task, method and budget, from published.csv."""
    with (HERE / "published.csv").open() as file:
        return {(r["task"], r["method"], int(r["simulations"])): float(r["c2st_median"]) for r in csv.DictReader(file)}


def show(cells: Cells, estimators: tuple[str, ...]) -> None:
    """A table for each budget: medians, with the median over our estimators' training time in the last row."""
    known = published()
    for budget in BUDGETS:
        found = {(t, e): c for t in TASKS for e in estimators if (c := cells.content["cells"].get(f"{t} {e} {budget}"))}
        if not found:
            continue
        shown = [e for e in estimators if any(k[1] == e for k in found)]
        rows = []
        for task in TASKS:
            ours = [f"{found[task, e]['median']:.3f}" if (task, e) in found else "" for e in shown]
            theirs = [known.get((task, m, budget)) for m in PUBLISHED]
            rows.append([task, *ours, *("" if v is None else f"{v:.3f}" for v in theirs)])
        seconds = [np.median([c["training_seconds"] for (_, e), c in found.items() if e == estimator]) for estimator in shown]
        rows.append(["training, s (median over tasks)", *(f"{v:.0f}" for v in seconds), "", "", ""])
        print(f"\n{budget:,} simulations\n")
        print(table(rows, ["task", *shown, *(f"published {m}" for m in PUBLISHED)]))


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--tasks", nargs="+", default=TASKS, choices=TASKS)
    parser.add_argument("--estimators", nargs="+", default=["npe"])
    parser.add_argument("--budgets", nargs="+", type=int, default=[10_000], choices=BUDGETS)
    parser.add_argument("--observations", type=int, default=OBSERVATIONS)
    parser.add_argument("--show", action="store_true", help="only print what is there")
    args = parser.parse_args()
    torch.set_num_threads(1)
    cells = Cells("accuracy")
    for budget in args.budgets if not args.show else []:
        for estimator in args.estimators:
            for task in args.tasks:
                cells.measure(f"{task} {estimator} {budget}",
                              lambda t=task, e=estimator, b=budget: one(t, e, b, args.observations))
    show(cells, tuple(ESTIMATORS))


if __name__ == "__main__":
    main()
