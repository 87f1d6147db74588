"""What each estimator costs and reaches at its defaults, on Two Moons: training, held-out log-density (optimum 3.80), draws for one x.
Seconds are of one thread's processor time.

python benchmarks/estimators.py
python benchmarks/estimators.py --flows      # npe by flow
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from common import Cells, table

import sbiplat as sp
from sbiplat.errors import UserError
from sbiplat.progress import silent
from simulators.two_moons import two_moons

ROWS, DRAWS, PAIRS = 10_000, 100_000, 1000


def measure(estimator: str, **settings: Any) -> dict[str, Any]:
    rng = np.random.default_rng(20260801)
    theta = two_moons.prior.sample(rng, PAIRS)
    x = two_moons(theta, rng)
    with tempfile.TemporaryDirectory() as folder:
        bank = sp.simulate(two_moons, ROWS, 1, Path(folder) / "bank", workers=1, progress=silent)
        start = time.process_time()
        run = sp.train(bank, estimator, out=Path(folder) / "run", progress=silent, **settings)
        training = time.process_time() - start
        posterior = sp.load(run, allow_uncertified=True)
        start = time.process_time()
        posterior.sample(x[0], DRAWS, seed=1)
        sampling = time.process_time() - start
        log_q, refused = None, ""
        try:
            log_q = float(posterior.log_prob(theta, x).mean())
        except UserError as error:  # a density that its own check refuses is a result, and the table says so
            refused = str(error)
    return {"training_seconds": training, "held_out_log_prob": log_q, "refused": refused, "sampling_seconds": sampling}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--flows", action="store_true", help="npe by flow, in place of the estimators")
    wanted: dict[str, dict[str, Any]] = {name: {} for name in ("npe", "npse", "fmpe", "nle", "nre")}
    if parser.parse_args().flows:
        wanted = {f"npe {flow}": {"flow": flow} for flow in ("nsf", "bpf", "cnf")}
    cells = Cells("estimators")
    rows = []
    for name, settings in wanted.items():
        cell = cells.measure(name, lambda name=name, settings=settings: measure(name.split()[0], **settings))
        rows.append([name, cell["training_seconds"], cell["held_out_log_prob"] or f"refused: {cell['refused']}", cell["sampling_seconds"]])
    print(table(rows, ["estimator", "training, s", "held-out log-density", f"{DRAWS} draws for one x, s"]))


if __name__ == "__main__":
    main()
