"""What the gradient of a batch costs, plain, compiled, in bfloat16 and in pieces: medians of turns that are taken one after the other.

taskset -c 0 python benchmarks/steps.py            # Two Moons, batches of 256, one thread
"""

from __future__ import annotations

import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

import torch
from common import Cells, table

import sbiplat as sp
from sbiplat.progress import silent
from sbiplat.training.begin import plan
from sbiplat.training.gradient import Gradient
from simulators.two_moons import two_moons

ROWS, BATCH, TURNS = 2000, 256, 100
NETS: dict[str, tuple[str, dict[str, Any]]] = {
    "npe, nsf": ("npe", {}), "npe, maf": ("npe", {"flow": "maf"}), "npse": ("npse", {}),
}
WAYS: dict[str, dict[str, Any]] = {
    "plain": {}, "compile": {"compile": True}, "bf16": {"precision": "bf16"}, "accumulate = 4": {"accumulate": 4},
}


def measure(bank: sp.Bank, estimator: str, settings: dict[str, Any]) -> dict[str, Any]:
    """Seconds of a processor for one gradient by way, and those that pass with the first, which compiles."""
    steps, first = {}, {}
    generator = torch.Generator().manual_seed(0)
    for way, more in WAYS.items():
        wanted = plan(bank, estimator, 0, None, {**settings, **more})
        net = wanted.architecture.build(0).train()
        x = net.prepare({"x": torch.randn(BATCH, 2, generator=generator)})
        steps[way] = (Gradient(net, wanted.training), net, {"theta": torch.randn(BATCH, 2, generator=generator), "x": x})
        start = time.perf_counter()
        steps[way][0](steps[way][2])
        first[way] = time.perf_counter() - start
    times: dict[str, list[float]] = {way: [] for way in WAYS}
    for _ in range(TURNS):
        for way, (gradient, net, batch) in steps.items():
            net.zero_grad(set_to_none=True)
            start = time.process_time()
            gradient(batch)
            times[way].append(time.process_time() - start)
    return {"first": first, "median": {way: median(values) for way, values in times.items()}}


def main() -> None:
    torch.set_num_threads(1)
    cells, rows = Cells("steps"), []
    with tempfile.TemporaryDirectory() as folder:
        bank = sp.simulate(two_moons, ROWS, 1, Path(folder) / "bank", workers=1, progress=silent)
        for name, (estimator, settings) in NETS.items():
            cell = cells.measure(name, lambda e=estimator, s=settings: measure(bank, e, s))
            plain = cell["median"]["plain"]
            rows.append([name, 1e3 * plain, *(cell["median"][way] / plain for way in list(WAYS)[1:]), cell["first"]["compile"]])
    print(table(rows, ["net", "plain, ms", *(f"{way}, of it" for way in list(WAYS)[1:]), "compiling, s"]))


if __name__ == "__main__":
    main()
