"""The gate's speed: coverage beside sbi's on the same trained flow, its arithmetic, the whole standard gate, and the attack.

    coverage    TARP and SBC, 500 pairs x 1000 draws, of a flow that sbi trained (its default MAF): by sbi's `run_sbc` and `run_tarp`, by
                our `HeldOut` of the same net (`sp.from_sbi`), and of our own default npe. sbi's two draw twice; ours is all that the gate
                measures of calibration.
    arithmetic  ranks, p-values and 100 bootstraps of TARP and SBC at 500 x 1000, without the draws.
    gate        `sp.gate` at its defaults on two_moons, by one process and by two.
    attack      PGD, 200 steps x 100 observations x 5 restarts.

    taskset -c 0 python benchmarks/gate_speed.py --parts coverage arithmetic    # one thread; resumes part by part
    taskset -c 0,1 python benchmarks/gate_speed.py --parts gate attack          # two
    python benchmarks/gate_speed.py --show
"""

from __future__ import annotations

import argparse
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from common import Cells, table

import sbiplat as sp
from sbiplat.diagnostics.coverage import bootstrap_weights, coverage, distances, ranks
from sbiplat.diagnostics.held_out import HeldOut
from sbiplat.gate.rows import examined_of
from sbiplat.progress import silent

TASK, ROWS, PAIRS, DRAWS, REPEATS = "two_moons", 10_000, 500, 1000, 3
PARTS = ("coverage", "arithmetic", "gate", "attack")


def interleaved(ways: dict[str, Callable[[], Any]], repeats: int = REPEATS) -> dict[str, float]:
    """Median seconds of each, taken in turns."""
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(repeats):
        for name, way in ways.items():
            start = time.perf_counter()
            way()
            seconds[name].append(time.perf_counter() - start)
    return {name: median(values) for name, values in seconds.items()}


def trained(folder: Path) -> tuple[sp.Bank, sp.Run]:
    """A bank of the task, and our default npe on it."""
    bank = sp.simulate(TASK, ROWS, 1, folder / "bank", workers=1, progress=silent)
    return bank, sp.train(bank, "npe", out=folder / "run", progress=silent)


def measure_coverage(folder: Path) -> dict[str, float]:
    """Seconds of TARP and SBC by sbi and by ours."""
    from sbi.diagnostics import run_sbc, run_tarp
    from sbi.inference import NPE
    from sbi.utils import BoxUniform

    torch.set_num_threads(1)
    bank, run = trained(folder)
    theta, x = (torch.as_tensor(v, dtype=torch.float32) for v in sp.pairs(bank, "training"))
    low, high = (torch.as_tensor(v, dtype=torch.float32) for v in bank.header.prior.support)
    torch.manual_seed(0)
    trainer = NPE(BoxUniform(low, high), show_progress_bars=False)
    net = trainer.append_simulations(theta, x).train(max_num_epochs=20)
    theirs = trainer.build_posterior(net)
    same = sp.from_sbi(net, bank, out=folder / "sbi", model="maf", trained_on=theta.numpy(), progress=silent)
    held_theta, held_x = (torch.as_tensor(v[:PAIRS], dtype=torch.float32) for v in sp.pairs(bank, "held_out"))

    def by_sbi() -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            run_sbc(held_theta, held_x, theirs, num_posterior_samples=DRAWS, show_progress_bar=False)
            run_tarp(held_theta, held_x, theirs, num_posterior_samples=DRAWS, show_progress_bar=False)

    def by_ours(of: sp.Run) -> None:
        examined = examined_of(of, bank, PAIRS, 0, None, "cpu", silent)
        HeldOut(examined, DRAWS).until(PAIRS).figures()

    return interleaved({"sbi": by_sbi, "ours, the same net": lambda: by_ours(same), "ours, our npe": lambda: by_ours(run)})


def measure_arithmetic(folder: Path) -> dict[str, float]:
    """Seconds of what is done with draws that are there."""
    rng = np.random.default_rng(0)
    z, reference = rng.standard_normal((PAIRS, DRAWS + 1, 2)), rng.standard_normal((PAIRS, 1, 2))

    def arithmetic() -> None:
        tarp = ranks(distances(z[:, 1:], reference), distances(z[:, :1], reference)[:, 0], rng)
        sbc, weights = ranks(z[:, 1:], z[:, 0], rng), bootstrap_weights(PAIRS, rng, 100)
        for values, kind in ((tarp, "TARP"), (sbc[:, :1], "SBC"), (sbc[:, 1:], "SBC")):
            coverage("", values, rng, kind, weights=weights)

    return interleaved({"ranks, p-values, 100 bootstraps": arithmetic}, 9)


def measure_gate(folder: Path) -> dict[str, float]:
    """Seconds of the standard gate, by one and by two processes."""
    torch.set_num_threads(1)
    _, run = trained(folder)
    return interleaved({f"{n} process(es)": lambda n=n: sp.gate(run, workers=n, progress=silent) for n in (1, 2)})


def measure_attack(folder: Path) -> dict[str, float]:
    """Seconds of PGD alone."""
    torch.set_num_threads(2)
    bank, run = trained(folder)
    _, x = sp.pairs(bank, "held_out")
    settings = {"steps": 200, "restarts": 5, "queries": 1}
    return interleaved({"PGD 200 x 100 x 5": lambda: sp.attack(run, x[:100], eps=0.1, **settings)}, 1)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--parts", nargs="+", default=PARTS, choices=PARTS)
    parser.add_argument("--show", action="store_true", help="only print what is there")
    args = parser.parse_args()
    cells = Cells("gate_speed")
    for part in args.parts if not args.show else []:
        with tempfile.TemporaryDirectory() as folder:
            cells.measure(part, lambda part=part, folder=folder: globals()[f"measure_{part}"](Path(folder)))
    rows = [[part, name, float(seconds)] for part in PARTS for name, seconds in cells.content["cells"].get(part, {}).items()]
    print(table(rows, ["part", "what", "seconds"]))


if __name__ == "__main__":
    main()
