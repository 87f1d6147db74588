r"""Ours beside sbi 0.27: training, draws, samplers and memory, in the same run, interleaved, each measurement in a process of its own.

All train on the same rows of the same bank (`sp.pairs(bank, "training")`), each at its defaults. Held-out log-densities are of normalised
posteriors on the same held-out rows, in nats over theta: sbi's density is corrected for leakage by the code that serves `sp.from_sbi`.

    training  npe: seconds to sbi's own final log-density. Of ours they are read off the epochs: what comes before the first epoch and after
              the last is added, and validation losses are shifted so that the best one is the held-out value. Of sbi they are the seconds
              to its best epoch, though it goes on for twenty more before it knows.
    draws     of these posteriors, for one x, and for a batch of observations.
    samplers  npse and fmpe by their default solvers, and nle: seconds for draws given one x, and C2ST to the exact posterior (sbibm's
              protocol, median over observations; once, at the first number of threads). Ours also with fewer steps of the solver.
    memory    of training a default npe for two epochs: peak RSS above what it was after the imports, and seconds an epoch.

    taskset -c 0,1 python benchmarks/speed.py                             # all; resumes cell by cell
    taskset -c 0 python benchmarks/speed.py --parts training --rows 100000 --threads 1 --seeds 1 --tools ours 'sbi maf (its default)'
    python benchmarks/speed.py --tiny --results tiny                      # whether it works, in minutes
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from contextlib import chdir
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
from common import Cells, c2st, peak, table

import sbiplat as sp
from sbiplat.errors import UserError
from sbiplat.progress import silent
from sbiplat.simulator import resolve

TASKS = ("two_moons", "slcp", "gaussian_linear")
EXACT = ("two_moons", "gaussian_linear")  # those with an exact sampler
TRAINED = {"ours": None, "sbi maf (its default)": "maf", "sbi nsf": "nsf"}
OURS = {"ours": {}, "ours, memory_mb = 32": {"memory_mb": 32}}  # the latter streams what does not fit
STEPS = (4, 6, 8)  # of our solvers, below their default
PARTS = ("training", "samplers", "memory")
FIGURES = "figures: "
FULL = {"draws": 100_000, "batch": 500, "each": 1000, "sampled": 10_000, "observations": 3, "repeats": 3, "ours": {}, "sbi": {},
        "sbi_most": 1_000_000, "limit": 60.0}  # limit: seconds of sbi's rejection
TINY = {"draws": 500, "batch": 3, "each": 20, "sampled": 200, "observations": 1, "repeats": 1, "ours": {"max_epochs": 2},
        "sbi": {"max_num_epochs": 1}, "sbi_most": 2000, "limit": 5.0}


def timed(function: Callable[[], Any], repeats: int) -> tuple[float, Any]:
    """Median seconds, and the last result."""
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        made = function()
        seconds.append(time.perf_counter() - start)
    return median(seconds), made


# ------------------------------------------------------------------------------------------------- in the child process


def training(job: dict[str, Any]) -> dict[str, Any]:
    """Train npe, its log-density on held-out rows, and draws."""
    bank, budget, seed = sp.Bank.open(job["bank"]), job["budget"], job["seed"]
    theta, x = sp.pairs(bank, "held_out", seed=seed)
    made = _our_npe(bank, job) if TRAINED[job["tool"]] is None else _their_npe(bank, job, TRAINED[job["tool"]])
    total, posterior, seconds, losses, one, many, repeats = made
    several = x[:budget["batch"]]
    try:
        final = float(posterior.log_prob(theta, x).mean())
    except UserError as error:  # nearly all of some density leaks: no level to reach
        return {"refused": str(error), "seconds": total}
    losses = [np.inf if v is None else v for v in losses]
    return {"seconds": total, "final": final, "at": seconds, "log_density": [final - (v - min(losses)) for v in losses],
            "one_x": _rate(lambda: one(x[0], budget["draws"]), budget["draws"], budget["repeats"]),
            "batched": _rate(lambda: many(several, budget["each"]), len(several) * budget["each"], repeats)}


def _our_npe(bank: sp.Bank, job: dict[str, Any]) -> tuple[Any, ...]:
    """Seconds in all, the posterior, seconds and losses of the epochs, draws for one x and for several, repeats of the latter."""
    settings = {"seed": job["seed"], "threads": job["threads"], **job["budget"]["ours"]}
    total, run = timed(lambda: sp.train(bank, "npe", out="run", progress=silent, **settings), 1)
    posterior, metrics = sp.load(run, allow_uncertified=True), run.metrics()
    before = total - metrics[-1]["seconds"]

    def draw(x: Any, n: int) -> Any:
        return posterior.sample(x, n, seed=0)

    return (total, posterior, [m["seconds"] + before for m in metrics], [m["validation_loss"] for m in metrics], draw, draw,
            job["budget"]["repeats"])


def _their_npe(bank: sp.Bank, job: dict[str, Any], model: str) -> tuple[Any, ...]:
    """The same of sbi's, whose batched draws are timed once: they take long."""
    import torch
    from sbi.inference import NPE

    rows, observed = sp.pairs(bank, "training", seed=job["seed"])
    torch.manual_seed(job["seed"])
    trainer = NPE(_box(bank), density_estimator=model, show_progress_bars=False)
    trainer.append_simulations(torch.as_tensor(rows, dtype=torch.float32), torch.as_tensor(observed))
    total, net = timed(lambda: trainer.train(**job["budget"]["sbi"]), 1)
    run = sp.from_sbi(net, bank, out="run", seed=job["seed"], model=model, trained_on=rows, progress=silent)
    own, limit = trainer.build_posterior(net), {"show_progress_bars": False, "max_sampling_time": job["budget"]["limit"]}
    epochs = np.cumsum(trainer._summary["epoch_durations_sec"])

    def one(x: Any, n: int) -> Any:
        return own.sample((n,), x=torch.as_tensor(x), **limit)

    def many(x: Any, n: int) -> Any:
        return own.sample_batched((n,), x=torch.as_tensor(x), **limit)

    losses = trainer._summary["validation_loss"]
    return total, sp.load(run, allow_uncertified=True), list(epochs + total - epochs[-1]), losses, one, many, 1


def _rate(function: Callable[[], Any], draws: int, repeats: int) -> float | None:
    """Draws a second; None where sbi gave up."""
    try:
        return draws / timed(function, repeats)[0]
    except RuntimeError as error:
        print(f"gave up: {error}", file=sys.stderr)
        return None


def _box(bank: sp.Bank) -> Any:
    """The task's prior as sbi's users write it."""
    import torch
    from sbi.utils import BoxUniform

    prior = bank.header.prior
    low, high = (torch.as_tensor(v, dtype=torch.float32) for v in prior.support)
    if torch.isfinite(low).all():
        return BoxUniform(low, high)
    centre = torch.as_tensor(prior.constrain(np.zeros(prior.dim)), dtype=torch.float32)
    spread = torch.as_tensor(prior.constrain(np.ones(prior.dim)), dtype=torch.float32) - centre
    return torch.distributions.MultivariateNormal(centre, torch.diag(spread**2))


def samplers(job: dict[str, Any]) -> dict[str, Any]:
    """Train, then draw for some observations: by name of the solver, seconds a draw run and C2ST to the exact posterior of each."""
    bank, budget, seed, estimator = sp.Bank.open(job["bank"]), job["budget"], job["seed"], job["estimator"]
    simulator, n = resolve(bank.header.simulator["name"]), budget["sampled"]
    x = sp.pairs(bank, "held_out", seed=seed)[1][:1 if estimator == "nle" else budget["observations"]]  # sbi's chains take long
    exact = [simulator.posterior_sampler(row, n, np.random.default_rng([seed, k])) for k, row in enumerate(x)]
    total, ways = (_our_ways if job["tool"] == "ours" else _their_ways)(bank, estimator, seed, job["threads"], budget)
    out: dict[str, Any] = {"training_seconds": total, "ways": {}}
    for name, draw in ways.items():
        try:
            made = [timed(lambda row=row, k=k, draw=draw: draw(row, k), 1) for k, row in enumerate(x)]
        except UserError as error:  # draws that the sampler's own check refuses are a result
            out["ways"][name] = {"refused": str(error)}
            continue
        scores = c2st(np.stack(exact), np.stack([d for _, d in made])) if job["score"] else []
        out["ways"][name] = {"seconds": [s for s, _ in made], "c2st": scores}
    return out


def _our_ways(bank: sp.Bank, estimator: str, seed: int, threads: int, budget: dict[str, Any]) -> tuple[float, dict[str, Any]]:
    total, run = timed(lambda: sp.train(bank, estimator, out="run", seed=seed, threads=threads, progress=silent, **budget["ours"]), 1)
    posterior = sp.load(run, allow_uncertified=True)
    net = posterior.sampler.estimator
    chosen = net.settings

    def draw(row: Any, k: int, steps: int | None = None) -> Any:
        net.settings = chosen if steps is None else replace(chosen, steps=steps)
        return posterior.sample(row, budget["sampled"], seed=k)

    if estimator == "nle":
        return total, {"default": draw}
    return total, {"default": draw, **{f"{s} steps": lambda row, k, s=s: draw(row, k, s) for s in STEPS}}


def _their_ways(bank: sp.Bank, estimator: str, seed: int, threads: int, budget: dict[str, Any]) -> tuple[float, dict[str, Any]]:
    import torch
    from sbi.inference import FMPE, NLE, NPSE

    rows, observed = sp.pairs(bank, "training", seed=seed)
    torch.manual_seed(seed)
    trainer = {"npse": NPSE, "fmpe": FMPE, "nle": NLE}[estimator](_box(bank), show_progress_bars=False)
    trainer.append_simulations(torch.as_tensor(rows, dtype=torch.float32), torch.as_tensor(observed))
    total, net = timed(lambda: trainer.train(**budget["sbi"]), 1)
    posterior = trainer.build_posterior(net)

    def draw(row: Any, k: int) -> Any:
        torch.manual_seed(k)
        return posterior.sample((budget["sampled"],), x=torch.as_tensor(row), show_progress_bars=False).double().numpy()

    return total, {"default": draw}


def memory(job: dict[str, Any]) -> dict[str, Any]:
    """Two epochs of a default npe: peak RSS above that before the bank was opened, and seconds of the second epoch."""
    import torch

    if job["tool"] in OURS:
        import sbiplat.training.trainer  # noqa: F401 - before the first reading

        before = peak()
        run = sp.train(job["bank"], "npe", out="run", seed=0, threads=job["threads"], max_epochs=2, progress=silent, **OURS[job["tool"]])
        first, second = (m["seconds"] for m in run.metrics())
        return {"rss_mb": peak() - before, "epoch_seconds": second - first}
    from sbi.inference import NPE

    before = peak()
    bank = sp.Bank.open(job["bank"])
    rows, observed = sp.pairs(bank, "training")
    trainer = NPE(_box(bank), show_progress_bars=False)
    trainer.append_simulations(torch.as_tensor(rows, dtype=torch.float32), torch.as_tensor(observed))
    trainer.train(max_num_epochs=1)  # it trains one more
    return {"rss_mb": peak() - before, "epoch_seconds": trainer._summary["epoch_durations_sec"][-1]}


KINDS = {"training": training, "samplers": samplers, "memory": memory}


def child(job: dict[str, Any]) -> None:
    """Run one measurement and print its figures on a line."""
    import torch

    warnings.simplefilter("ignore")
    torch.set_num_threads(job["threads"])
    with tempfile.TemporaryDirectory() as folder, chdir(folder):  # sbi writes its logs where it stands
        print("\n" + FIGURES + json.dumps(KINDS[job["kind"]](job), default=float), flush=True)


# ------------------------------------------------------------------------------------------------- in the parent process


class Banks:
    """Banks of the tasks, made when a cell first needs them."""

    def __init__(self, folder: str) -> None:
        self._folder = Path(folder)

    def __call__(self, task: str, rows: int) -> str:
        return str(sp.simulate(task, rows, 1, self._folder / f"{task}-{rows}", workers=1, progress=silent).path)


def apart(job: dict[str, Any]) -> Any:
    """A measurement in a process of its own, with its number of threads."""
    environment = {**os.environ, "OMP_NUM_THREADS": str(job["threads"])}
    done = subprocess.run([sys.executable, __file__, "--child", json.dumps(job)], capture_output=True, text=True, env=environment)
    if done.returncode:
        raise RuntimeError(f"{job}: {done.stderr[-2000:]}")
    told = [line.removeprefix(FIGURES) for line in done.stdout.splitlines() if line.startswith(FIGURES)]
    if not told:
        raise RuntimeError(f"{job} printed no figures: {done.stdout[-1000:]}")
    return json.loads(told[-1])  # sbi prints lines of its own, before and after


def measure(cells: Cells, banks: Banks, args: argparse.Namespace, budget: dict[str, Any]) -> None:
    """All cells of the parts asked for; the seed changes slowest, so that a busy spell of the machine falls on all tools."""

    def cell(key: str, task: str, rows: int, **job: Any) -> None:
        cells.measure(key, lambda: apart({**job, "bank": banks(task, rows), "budget": budget}))

    for seed in range(args.seeds):
        for threads in args.threads:
            if "training" in args.parts:
                for task in args.tasks:
                    for tool in args.tools:
                        cell(f"training; {task}; {args.rows}; {threads}; {tool}; {seed}", task, args.rows, kind="training", tool=tool,
                             threads=threads, seed=seed)
            if "samplers" in args.parts:
                for task in (t for t in args.tasks if t in EXACT):
                    for estimator in ("npse", "fmpe", "nle"):
                        for tool in ("ours", "sbi"):
                            cell(f"{estimator}; {task}; {args.rows}; {threads}; {tool}; {seed}", task, args.rows, kind="samplers",
                                 estimator=estimator, tool=tool, threads=threads, seed=seed, score=threads == args.threads[0])
        if "memory" in args.parts:
            for rows in args.sizes:
                for tool in (*OURS, "sbi"):
                    if tool in OURS or rows <= budget["sbi_most"]:
                        cell(f"memory; {rows}; {tool}; {seed}", "two_moons", rows, kind="memory", tool=tool, threads=1)


def reached(cell: dict[str, Any], level: float) -> float | None:
    """Seconds at which the log-density first was at least the level."""
    return next((s for s, v in zip(cell["at"], cell["log_density"], strict=True) if v >= level), None)


def middle(values: list[float | None]) -> float | None:
    """The median; None where one is missing."""
    return None if any(v is None for v in values) else float(median(values))


def shown(value: float | None, missing: str = "never") -> Any:
    return missing if value is None else value


def ratio(slow: float | None, fast: float | None) -> str:
    return "" if slow is None or fast is None else f"{slow / fast:.1f}"


def there(cells: Cells, args: argparse.Namespace, key: str) -> list[dict[str, Any]]:
    """The cells of all seeds that were measured."""
    return [cells[f"{key}; {s}"] for s in range(args.seeds) if f"{key}; {s}" in cells.content["cells"]]


def training_tables(cells: Cells, args: argparse.Namespace) -> None:
    for threads in args.threads:
        speed, draws = [], []
        for task in args.tasks:
            found = {tool: there(cells, args, f"training; {task}; {args.rows}; {threads}; {tool}") for tool in TRAINED}
            found = {tool: cs for tool, cs in found.items() if cs}
            if "ours" not in found:
                continue
            refused = {tool: next((c["refused"] for c in cs if "refused" in c), None) for tool, cs in found.items()}
            for tool, theirs in list(found.items())[1:]:
                if refused[tool] or refused["ours"]:
                    speed.append([task, tool, f"refused: {refused[tool] or refused['ours']}", *[""] * 6])
                    continue
                own = middle([reached(c, c["final"]) for c in theirs])
                ours = middle([reached(o, c["final"]) for o, c in zip(found["ours"], theirs, strict=True)])
                ends = [middle([c[k] for c in cs]) for cs in (theirs, found["ours"]) for k in ("final", "seconds")]
                speed.append([task, tool, ends[0], shown(own), ends[1], shown(ours), ratio(own, ours), *ends[2:]])
            for tool, cs in found.items():
                draws.append([task, tool, *(shown(middle([c.get(k) for c in cs]), "gave up") for k in ("one_x", "batched"))])
        print(f"\n{args.rows} rows, {threads} thread(s)\n")
        print(table(speed, ["task", "beside", "its final nats", "its s to that", "its s in all", "ours: s to that", "times faster",
                            "ours: final nats", "ours: s in all"]), "\n")
        print(table(draws, ["task", "tool", "draws/s, one x", "draws/s, a batch"]))


def sampler_tables(cells: Cells, args: argparse.Namespace, budget: dict[str, Any]) -> None:
    for threads in args.threads:
        rows = []
        for task in (t for t in args.tasks if t in EXACT):
            for estimator in ("npse", "fmpe", "nle"):
                found = {tool: [c["ways"] for c in there(cells, args, f"{estimator}; {task}; {args.rows}; {threads}; {tool}")]
                         for tool in ("ours", "sbi")}
                if not found["ours"]:
                    continue
                seconds, score = _way(found["sbi"], "default") if found["sbi"] else (None, None)
                rows.append([task, estimator, "sbi", shown(seconds, "refused" if found["sbi"] else "not measured"), shown(score, ""), ""])
                for way in found["ours"][0]:
                    ours, own = _way(found["ours"], way)
                    rows.append([task, estimator, f"ours, {way}", shown(ours, "refused"), shown(own, ""), ratio(seconds, ours)])
        print(f"\n{args.rows} rows, {threads} thread(s)\n")
        print(table(rows, ["task", "estimator", "tool", f"s for {budget['sampled']} draws", "C2ST", "times faster"]))


def _way(found: list[dict[str, Any]], way: str) -> tuple[float | None, float | None]:
    """Median seconds and C2ST over seeds and observations; None where a seed's were refused, or C2ST was not taken."""
    cells = [f[way] for f in found]
    if any("refused" in c for c in cells):
        return None, None
    scores = [v for c in cells for v in c["c2st"]]
    return float(median(s for c in cells for s in c["seconds"])), float(median(scores)) if scores else None


def memory_table(cells: Cells, args: argparse.Namespace, budget: dict[str, Any]) -> None:
    rows = []
    for size in args.sizes:
        for tool in (*OURS, "sbi"):
            if tool in OURS or size <= budget["sbi_most"]:
                found = there(cells, args, f"memory; {size}; {tool}")
                if not found:
                    continue
                rows.append([f"{size:,}", tool, middle([c["rss_mb"] for c in found]), middle([c["epoch_seconds"] for c in found])])
    print("\n" + table(rows, ["rows", "tool", "peak RSS above start, MB", "s an epoch"]))


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--parts", nargs="+", default=PARTS, choices=PARTS)
    parser.add_argument("--tasks", nargs="+", default=TASKS, choices=TASKS)
    parser.add_argument("--tools", nargs="+", default=tuple(TRAINED), choices=tuple(TRAINED), help="of the part training")
    parser.add_argument("--rows", type=int, default=10_000)
    parser.add_argument("--threads", nargs="+", type=int, default=[1, 2])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--sizes", nargs="+", type=int, default=[10**4, 10**5, 10**6, 10**7])
    parser.add_argument("--show", action="store_true", help="only print what is there")
    parser.add_argument("--tiny", action="store_true", help="a few epochs and draws: whether it works")
    parser.add_argument("--results", default="speed", help="name of the file in results/, or a path without .json")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        child(json.loads(args.child))
        return
    if args.tiny and args.results == "speed":
        parser.error("--tiny needs --results: its figures mean nothing")
    cells, budget = Cells(args.results), TINY if args.tiny else FULL
    if not args.show:
        with tempfile.TemporaryDirectory() as folder:
            measure(cells, Banks(folder), args, budget)
    if "training" in args.parts:
        training_tables(cells, args)
    if "samplers" in args.parts:
        sampler_tables(cells, args, budget)
    if "memory" in args.parts:
        memory_table(cells, args, budget)


if __name__ == "__main__":
    main()
