"""Tables of the benchmark of equivariance (gnpe.py), from its cells."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
from common import table

Found = Mapping[tuple[str, str, int], Any]  # (problem, method, simulations) -> cell


def score(cell: Mapping[str, Any]) -> float:
    """The median C2ST; what was refused counts as if it were told apart for certain."""
    return float(np.median(cell["c2st"] + [1.0] * len(cell["refused"])))


def needed(scores: Mapping[int, float], target: float) -> float | None:
    """Simulations at which a method reaches this C2ST, log-linear between budgets; None where the largest does not."""
    before = None
    for budget in sorted(scores):
        if scores[budget] <= target:
            if before is None:
                return float(budget)
            share = (scores[before] - target) / (scores[before] - scores[budget])
            return float(before * (budget / before) ** share)
        before = budget
    return None


def _divergence(cell: Mapping[str, Any]) -> list[str]:
    """Mean and worst over parameters of the mean over observations."""
    each = np.array(cell["jsd"]).reshape(len(cell["jsd"]), -1)
    return [f"{each.mean():.2f}", f"{each.mean(0).max():.2f}"] if each.size else ["", ""]


def _middle(values: Sequence[float | None]) -> float | str:
    """The median, empty where there are none."""
    have = [v for v in values if v is not None]
    return float(median(have)) if have else ""


def show(cells: Mapping[str, Any], methods: Sequence[str]) -> None:
    """Tables of what is there: accuracy, simulations needed, chains and their cost, importance weights, speed."""
    keys = [(p, m, int(b)) for p, m, b in (key.split() for key in cells if len(key.split()) == 3)]
    found: Found = {k: cells[f"{k[0]} {k[1]} {k[2]}"] for k in sorted(keys, key=lambda k: (k[0], k[2], methods.index(k[1])))}
    ours = {k: v for k, v in found.items() if k[1] == "gnpe"}
    rows = []
    for problem in sorted({key.split()[0] for key in cells}):
        if f"{problem} reference" in cells:
            floor = cells[f"{problem} reference"]
            rows.append([problem, "", f"exact ({floor['draws']:,} draws a side)", f"{np.median(floor['c2st']):.3f}",
                         f"{max(floor['c2st']):.3f}", *_divergence(floor), "", ""])
        for (p, method, budget), cell in found.items():
            if p == problem:
                worst = max(cell["c2st"] + [1.0] * len(cell["refused"]))
                rows.append([problem, f"{budget:,}", method, f"{score(cell):.3f}", f"{worst:.3f}", *_divergence(cell),
                             cell["training_seconds"], _middle(cell["sampling_seconds_5000"])])
    print("\n" + table(rows, ["problem", "simulations", "method", "C2ST", "worst C2ST", "JSD, mnat", "worst parameter", "training, s",
                              "5,000 draws, s"]))
    _show_needed(found)
    _show_chains(ours)
    _show_weights(ours)
    _show_speed(ours, cells)


def plot(cells: Mapping[str, Any], methods: Sequence[str], path: Path) -> None:
    """C2ST against the budget, a panel a problem; the band is from the best to the worst observation."""
    import matplotlib

    matplotlib.use("agg")
    matplotlib.rcParams["svg.hashsalt"] = "gnpe"  # else the ids in the file differ each time
    import matplotlib.pyplot as plt

    keys = [key.split() for key in cells if len(key.split()) == 3]
    problems = list(dict.fromkeys(p for p, *_ in keys))
    figure, axes = plt.subplots(1, len(problems), figsize=(3.4 * len(problems), 3.2), sharey=True, layout="constrained", squeeze=False)
    for axis, problem in zip(axes[0], problems, strict=True):
        for k, method in enumerate(methods):
            budgets = sorted(int(b) for p, m, b in keys if (p, m) == (problem, method))
            found = [cells[f"{problem} {method} {b}"] for b in budgets]
            each = [c["c2st"] + [1.0] * len(c["refused"]) for c in found]
            if budgets:
                axis.plot(budgets, [median(e) for e in each], "o-", color=f"C{k}", label=method, ms=4)
                axis.fill_between(budgets, [min(e) for e in each], [max(e) for e in each], color=f"C{k}", alpha=0.15, lw=0)
        axis.set(xscale="log", xlabel="simulations", title=problem, ylim=(0.49, 1.01))
        axis.axhline(0.5, color="grey", lw=0.8, ls=":")
    axes[0, 0].set_ylabel("C2ST to the exact posterior")
    axes[0, 0].legend(frameon=False, fontsize=8)
    figure.savefig(path, metadata={"Date": None})
    plt.close(figure)


def _show_needed(found: Found) -> None:
    rows = []
    for (problem, method, budget), cell in found.items():
        plain: dict[int, float] = {}  # the better of its nets
        for (p, m, b), c in found.items():
            if p == problem and m.startswith("npe"):
                plain[b] = min(score(c), plain.get(b, 1.0))
        if not method.startswith("npe") and plain and budget < max(plain):
            count = needed(plain, score(cell))
            at_most = "at most " if count == min(plain) else ""
            needs = f"more than {max(plain):,}" if count is None else f"{at_most}{count:,.0f}"
            rows.append([problem, method, f"{budget:,}", f"{score(cell):.3f}", needs,
                         f"> {max(plain) / budget:.0f}" if count is None else f"{at_most}{count / budget:.1f}"])
    if rows:
        print("\n" + table(rows, ["problem", "method", "simulations", "C2ST", "npe needs", "times as many"]))


def _show_chains(ours: Found) -> None:
    rows = []
    for (problem, _, budget), cell in ours.items():
        chains, ratios = cell["chains"], [c["ratio"] for c in cell["cost"]]
        rows.append([problem, f"{budget:,}", f"{median(chains['gibbs_steps']):g}", max(chains["gibbs_steps"]),
                     float(median(chains["gibbs_rho"])), float(median(chains["gibbs_rho_theory"])), f"{median(ratios):.2f}"])
    if rows:
        print("\n" + table(rows, ["problem", "simulations", "steps", "most steps", "rho", "rho, theory", "cost"]))


def _show_weights(ours: Found) -> None:
    rows = []
    for (problem, _, budget), cell in ours.items():
        w = cell["weighted"]
        rows.append([problem, f"{budget:,}", f"{score(w):.3f}", _divergence(w)[0], _middle(w["efficiency"]),
                     min(w["efficiency"], default=""), _middle(w["k_hat"]), max(w["k_hat"], default=""), _middle(w["distinct"])])
    if rows:
        print("\n" + table(rows, ["problem", "simulations", "C2ST, weighted", "JSD, mnat", "efficiency", "least", "k-hat", "greatest",
                                  "distinct"]))


def _show_speed(ours: Found, cells: Mapping[str, Any]) -> None:
    """Seconds for 5,000 effective draws."""
    rows = []
    for (problem, _, budget), cell in ours.items():
        floor, chain = cells.get(f"{problem} reference", {}), cells.get(f"{problem} mcmc", {})
        exact = _middle([None if s is None else s * 5000 / (2 * floor["draws"]) for s in floor.get("sampler_seconds", [])])
        emcee = _middle([c["seconds_5000_effective"] for c in chain.get("each", [])])
        both = [_middle(cell["sampling_seconds_5000"]), _middle(cell["weighted"]["seconds_5000_effective"])]
        rows.append([problem, f"{budget:,}", *both, exact, emcee, *(emcee / s if emcee and s else "" for s in both)])
    if rows:
        print("\n" + table(rows, ["problem", "simulations", "GNPE, s", "weighted, s", "exact sampler, s", "emcee, s", "GNPE faster by",
                                  "weighted faster by"]))
