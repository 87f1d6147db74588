"""How a trained chirp's posteriors compare with exact ones from loud signals down to faint ones.

Ten observations from the prior in each range of signal-to-noise ratios, 500 exact draws of each (simulators/chirp_posterior.py; kept, not
committed) and 500 of the run's. Of the time of coalescence, which GNPE's chains find: the interquartile range of the run's draws over that
of the exact ones. Of all parameters: the mean Jensen-Shannon divergence, in mnat. A run's cell is found by its weights.

    sbiplat run workflows/chirp.toml
    OMP_NUM_THREADS=1 python benchmarks/chirp_faint.py runs/chirp/run
    python benchmarks/chirp_faint.py                                  # only print what is there
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import numpy as np
from chirp_reference import truth_and_x
from common import Cells, jensen_shannon, table
from numpy.typing import NDArray

import sbiplat as sp
from sbiplat import files
from sbiplat.errors import UserError
from sbiplat.runs import Run
from sbiplat.source import code_digest, source_digest
from simulators.chirp import chirp, posterior_sampler

KEPT = Path(__file__).parent / ".references"  # drawn again by this program
SEED = 20261122
LOUDNESS = ((6.5, 8.0), (8.0, 12.0), (12.0, 40.0))
EACH, DRAWS = 10, 500
TIME = chirp.prior.names.index("t_c")
Array = NDArray[np.float64]


def known(low: float, high: float, k: int) -> tuple[Array, Array, float]:
    """x, exact draws (500, 7) and the signal-to-noise ratio of the k-th observation of a range."""
    rng = np.random.default_rng([SEED, int(10 * low), k])
    while True:
        _, x, loudness = truth_and_x(chirp, rng)
        if low <= loudness < high:
            break
    made_by = files.digest_of({"simulator": chirp.source_digest(), "sampler": source_digest(posterior_sampler), "of": [SEED, low, high, k]})
    path = KEPT / f"chirp_faint_{made_by[:16]}.npy"
    if not path.exists():
        KEPT.mkdir(exist_ok=True)
        np.save(path, posterior_sampler(x, DRAWS, np.random.default_rng([SEED, int(10 * low), k, 1])))
    return x, np.load(path, allow_pickle=False), loudness


def compared(run: Run) -> dict[str, Any]:
    """Of each observation the signal-to-noise ratio, the spread of times beside the exact one, the mean divergence, steps; or a refusal."""
    posterior, found = sp.load(run, allow_uncertified=True), []
    for low, high in LOUDNESS:
        for k in range(EACH):
            x, exact, loudness = known(low, high, k)
            row: dict[str, Any] = {"range": [low, high], "loudness": loudness}
            try:
                draws = posterior.sample(x, DRAWS, seed=k)
                row |= {"spread": _half(draws[:, TIME]) / _half(exact[:, TIME]), "jsd": float(jensen_shannon(draws, exact).mean()),
                        "steps": getattr(posterior.sampler, "diagnostics", {}).get("gibbs_steps")}
            except UserError as error:
                row["refused"] = str(error)
            found.append(row)
    return {"code": code_digest()[:12], "bank": run.bank_digest[:12], "observations": found}


def _half(draws: Array) -> float:
    """The interquartile range."""
    return float(np.ptp(np.quantile(draws, [0.25, 0.75])))


def show(cells: dict[str, Any]) -> None:
    rows = []
    for key, cell in cells.items():
        for low, high in LOUDNESS:
            of = [r for r in cell["observations"] if r["range"] == [low, high]]
            have = [r for r in of if "spread" in r]
            spread, jsd, steps = ([r[name] for r in have] for name in ("spread", "jsd", "steps"))
            rows.append([key, cell["code"], f"{low:g}-{high:g}", float(np.median(spread)), max(spread), float(np.median(jsd)), max(jsd),
                         max(s or 0 for s in steps), len(of) - len(have)])
    print(table(rows, ["weights", "code", "loudness", "spread of t_c", "worst", "JSD, mnat", "worst", "most steps", "refused"]))


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("run", nargs="?", type=Path)
    args = parser.parse_args()
    cells = Cells("chirp_faint")
    if args.run:
        run = Run.open(args.run)
        cells.measure(run.weights_digest[:12], lambda: compared(run))
    show(cells.content["cells"])


if __name__ == "__main__":
    main()
