"""What defended training costs, and what it does: held-out log-density, and the trace of the posterior's Fisher information in x.

taskset -c 0 python benchmarks/defence.py            # one thread; MAFs on 10,000 rows
taskset -c 0 python benchmarks/defence.py --cost     # a step of each estimator, defended and not, in turns
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from common import Cells, table

import sbiplat as sp
from sbiplat.progress import silent
from sbiplat.simulator import Simulator, resolve
from sbiplat.training.begin import plan
from sbiplat.training.defence import EVERY, Defence, fisher_trace
from sbiplat.training.gradient import Gradient

ROWS, PAIRS, DRAWS = 10_000, 2000, 50
WEIGHTS = ("none", "slab:0.05", "fisher:0.001", "fisher:0.01")
TASKS = {"sir": ("none", "slab:0.05", "fisher:0.001", "fisher:0.003", "fisher:0.01", "noise:0.1", "adversarial:0.1"), "two_moons": WEIGHTS,
         "gaussian_linear": WEIGHTS}
BATCH, TURNS = 256, 30
NETS: dict[str, tuple[str, dict[str, Any]]] = {
    "npe, nsf": ("npe", {}), "npe, maf": ("npe", {"flow": "maf"}), "npe, coupling_nsf": ("npe", {"flow": "coupling_nsf"}),
    "npe, mog": ("npe", {"flow": "mog"}), "npe, gaussian": ("npe", {"flow": "gaussian"}), "npe, cnf": ("npe", {"flow": "cnf"}),
    "npse": ("npse", {}), "fmpe": ("fmpe", {}), "nre": ("nre", {}),
}
COSTED = ("none", "fisher:0.01", "noise:0.1", "adversarial:0.1")


def bank_of(task: str, folder: str) -> sp.Bank:
    return sp.simulate(resolve(task), ROWS, 1, Path(folder) / "bank", workers=1, progress=silent)


def trained(task: str, defence: str) -> dict[str, Any]:
    """Of a MAF: nats of fresh pairs, and over their x the mean, the median, the 99th percentile and the most of tr F."""
    simulator: Simulator = resolve(task)
    rng = np.random.default_rng(20260801)
    theta = simulator.prior.sample(rng, PAIRS)
    x = np.asarray(simulator(theta, rng))
    with tempfile.TemporaryDirectory() as folder:
        bank = bank_of(task, folder)
        settings = {} if defence == "none" else {"defend": defence}
        start = time.process_time()
        run = sp.train(bank, "npe", out=Path(folder) / "run", progress=silent, flow="maf", **settings)
        seconds = time.process_time() - start
        log_q = sp.load(run, allow_uncertified=True).log_prob(theta, x)
        net = run.estimator()
        ready = net.prepare({"x": torch.as_tensor(x)})
        units = net.units(ready)
        with torch.random.fork_rng():
            torch.manual_seed(1)
            traces = torch.stack([fisher_trace(net, torch.zeros(PAIRS, bank.header.prior.dim), ready, units)[0].detach()
                                  for _ in range(DRAWS)]).mean(0).numpy()
    return {"log_prob": float(np.mean(log_q)), "log_prob_error": float(np.std(log_q) / np.sqrt(PAIRS)), "trace_mean": float(traces.mean()),
            "trace_median": float(np.median(traces)), "trace_99": float(np.quantile(traces, 0.99)), "trace_most": float(traces.max()),
            "seconds": seconds, "steps": run.record["outcome"]["steps"]}


def cost(bank: sp.Bank, estimator: str, settings: dict[str, Any]) -> dict[str, float]:
    """Seconds of a processor a step by defence: medians of turns of `EVERY` steps, taken one defence after the other."""
    ways = {}
    generator = torch.Generator().manual_seed(0)
    theta, x = torch.randn(BATCH, 2, generator=generator), torch.randn(BATCH, 2, generator=generator)
    for word in COSTED:
        wanted = plan(bank, estimator, 0, None, {**settings, **({} if word == "none" else {"defend": word})})
        net = wanted.architecture.build(0).train()
        ready = net.prepare({"x": x})
        guard = Defence(wanted.training.defend, net, ready)
        optimizer = torch.optim.AdamW(net.parameters(), lr=1e-4, fused=True)
        ways[word] = (Gradient(net, wanted.training, guard), guard, optimizer, {"theta": theta, "x": ready})
    times: dict[str, list[float]] = {word: [] for word in ways}
    for _ in range(TURNS):
        for word, (gradient, guard, optimizer, batch) in ways.items():
            start = time.process_time()
            for step in range(EVERY):
                optimizer.zero_grad(set_to_none=True)
                gradient(batch)
                guard.add_gradient(batch["theta"], batch["x"], step)
                optimizer.step()
            times[word].append((time.process_time() - start) / EVERY)
    return {word: median(values) for word, values in times.items()}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--cost", action="store_true", help="what a step costs, in place of what is reached")
    torch.set_num_threads(1)
    cells, rows = Cells("defence"), []
    if parser.parse_args().cost:
        with tempfile.TemporaryDirectory() as folder:
            bank = bank_of("two_moons", folder)
            for name, (estimator, settings) in NETS.items():
                cell = cells.measure(name, lambda e=estimator, s=settings: cost(bank, e, s))
                rows.append([name, 1e3 * cell["none"], *(cell[word] / cell["none"] for word in COSTED[1:])])
        print(table(rows, ["net", "undefended, ms", *(f"{word}, of it" for word in COSTED[1:])]))
        return
    for task, words in TASKS.items():
        plain = 0.0
        for word in words:
            cell = cells.measure(f"{task} {word}", lambda t=task, w=word: trained(t, w))
            each = cell["seconds"] / cell["steps"]
            plain = each if word == "none" else plain
            rows.append([task, word, f"{cell['log_prob']:.3f}", *(cell[k] for k in ("trace_mean", "trace_99", "trace_most")), each / plain])
    print(table(rows, ["task", "defence", "held-out log-density", "tr F, mean", "99 %", "most", "time a step"]))


if __name__ == "__main__":
    main()
