"""The gate's power: defect by criterion by how often it refuses, on posteriors whose truth is known, beside sbi's and tarp's own tests.

Each case is a posterior of `known.py` at the standard level, 1000 pairs x 1000 draws, with all criteria of calibration. A seed is one cell
of results/gate_power.json. sbi's `run_sbc` and `run_tarp` rank the same truths among as many draws; its verdicts are those of the p-values
that its `check_sbc` (its `check_uniformity_frequentist`) and `check_tarp` give, at the same level (Bonferroni over parameters). The package
`tarp` (0.1.1, not an extra of ours: `pip install tarp`) gives a curve and no verdict; it is held by the two-sample test that sbi's
`check_tarp` applies to its own. Without it its column stays empty.

    python benchmarks/gate_power.py --seeds 100         # measure, resuming
    python benchmarks/gate_power.py --table             # write the tables into docs/gate.md
"""

from __future__ import annotations

import argparse
import re
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from common import Cells, table
from known import CASES, DEFECTS, DRAWS_ONLY, PROBLEMS, examined

from sbiplat.gate.calibration import examine
from sbiplat.gate.criteria import Criteria

DOCS = Path(__file__).parents[1] / "docs" / "gate.md"
KINDS = {"TARP": "coverage TARP", "HPD": "coverage HPD", "SBC": "coverage SBC", "under": "under-coverage",
         "over": "over-coverage", "tails": "tails", "local": "local coverage", "by theta": "coverage by theta", "C2ST": "C2ST",
         "information": "information", "nearest": "nearest rows"}


def measure(problem: str, defect: str, seed: int) -> list[str]:
    """The criteria that refuse, by kind."""
    part = examine(examined(PROBLEMS[problem], DEFECTS[defect], seed, density=problem not in DRAWS_ONLY), Criteria())
    failed = [v.name for v in part.criteria if not v.passed]
    other = [name for name in failed if not any(name.startswith(prefix) for prefix in KINDS.values())]
    return [kind for kind, prefix in KINDS.items() if any(name.startswith(prefix) for name in failed)] + other


def peers(problem: str, defect: str, seed: int, level: float) -> dict[str, bool]:
    """Whether sbi's and tarp's tests refuse, on the same truths and as many draws."""
    import torch
    from sbi.diagnostics.sbc import _run_sbc, check_uniformity_frequentist
    from sbi.diagnostics.tarp import _run_tarp, check_tarp, get_tarp_references

    case = examined(PROBLEMS[problem], DEFECTS[defect], seed)
    draws = torch.as_tensor(case.posterior.unconstrained_sample(case.pairs["x"], 1000, seed), dtype=torch.float32).transpose(0, 1)
    theta, x = torch.as_tensor(case.pairs["theta"]), torch.as_tensor(case.pairs["x"]["x"])
    found = {"sbi SBC": bool(check_uniformity_frequentist(_run_sbc(theta, x, draws, "marginals", False), 1000).min()
                             < level / theta.shape[1])}
    with torch.random.fork_rng(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.manual_seed(seed)
        ecp, alpha = _run_tarp(draws, theta, get_tarp_references(theta), z_score_theta=True)
        found["sbi TARP"] = bool(check_tarp(ecp, alpha)[1] < level)
        try:
            from tarp import get_tarp_coverage
        except ImportError:
            return found
        ecp, alpha = get_tarp_coverage(draws.numpy(), theta.numpy(), seed=seed)  # which seeds numpy's global state
        found["tarp"] = bool(check_tarp(torch.as_tensor(ecp), torch.as_tensor(alpha))[1] < level)
    return found


def tables(cells: Cells) -> str:
    """Share of seeds refused, in %, by case and criterion, and beside the peers."""
    rows, beside = [], []
    for problem, defect in CASES:
        keys = [k for k in cells.content["cells"] if k.startswith(f"{problem} | {defect} | ")]
        if not keys:
            continue
        found = [cells[k] for k in keys]
        rows.append([defect, problem, len(found), _share([bool(f) for f in found]),
                     *(_share([kind in f for f in found]) for kind in KINDS)])
        keys = [k for k in cells.content["cells"] if k.startswith(f"peers | {problem} | {defect} | ")
                and k.removeprefix("peers | ") in cells.content["cells"]]
        if keys:
            theirs = [cells[k] for k in keys]
            ours = [bool(cells[k.removeprefix("peers | ")]) for k in keys]
            beside.append([defect, problem, len(theirs), _share(ours), *(_share([t[n] for t in theirs if n in t]) for n in
                                                                         ("sbi SBC", "sbi TARP", "tarp"))])
    return (table(rows, ["defect", "problem", "seeds", "refused", *KINDS]) + "\n\n"
            + table(beside, ["defect", "problem", "seeds", "sbiplat", "sbi SBC", "sbi TARP", "`tarp`"]))


def _share(found: Sequence[bool]) -> str:
    return f"{100 * np.mean(found):.0f}" if len(found) else "-"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=100)
    parser.add_argument("--peer-seeds", type=int, default=100)
    parser.add_argument("--only", default="", help="cases whose 'problem | defect' this regular expression finds")
    parser.add_argument("--table", action="store_true", help="measure nothing, write the tables into docs/gate.md")
    arguments: Any = parser.parse_args()
    cells = Cells("gate_power")
    cases = [case for case in CASES if re.search(arguments.only, " | ".join(case))]
    for seed in range(0 if arguments.table else max(arguments.seeds, arguments.peer_seeds)):
        for problem, defect in cases:
            key = f"{problem} | {defect} | {seed}"
            if seed < arguments.seeds:
                cells.measure(key, lambda p=problem, d=defect, s=seed: measure(p, d, s))
            if seed < min(arguments.peer_seeds, arguments.seeds):
                cells.measure(f"peers | {key}", lambda p=problem, d=defect, s=seed: peers(p, d, s, Criteria().false_alarm))
    print(tables(cells))
    if arguments.table:
        before, rest = DOCS.read_text().split("<!-- table: gate_power -->\n")
        _, end, after = rest.partition("<!-- end -->")
        DOCS.write_text(f"{before}<!-- table: gate_power -->\n\n{tables(cells)}\n\n{end}{after}")


if __name__ == "__main__":
    main()
