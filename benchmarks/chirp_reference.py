r"""Reference posteriors of the chirp, and how far they are to be trusted.

For each of three observations whose truths are drawn from the prior (the first is that of workflows/chirp.toml): 2,000 exact draws by
rejection from the prior (simulators/chirp_posterior.py), kept in results/chirp_reference_K.npz with x and the truth. Then the checks:
nested sampling of the full likelihood, without any marginalisation, by another code (nautilus: Lange, MNRAS 525, 3181, 2023), compared by
C2ST and moments; and calibration, the ranks of truths in posteriors of observations drawn from the prior. Every cell is kept, and
what is there is not made again.

    python benchmarks/chirp_reference.py                 # the draws
    python benchmarks/chirp_reference.py nested          # and the first one again by nested sampling
    python benchmarks/chirp_reference.py calibration 30  # and the ranks of 30 observations
    python benchmarks/chirp_reference.py observations    # simulators/data/chirp.npz and chirp_full.npz
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
from common import RESULTS, Cells, c2st, table
from scipy.stats import kstest

import sbiplat as sp
from simulators.chirp import chirp, chirp_full

DATA = Path(__file__).parent.parent / "simulators" / "data"
SEED = 20260607
OBSERVATIONS, DRAWS = 3, 2000
CALIBRATION_DRAWS = 99
LOUDNESS = (8.0, 30.0)  # of the observations kept: signal-to-noise ratios as of detections


def truth_and_x(simulator: sp.Simulator, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray, float]:
    """theta from the prior (D,), its x, and the signal-to-noise ratio; all from the given generator."""
    theta = simulator.prior.sample_each([rng])
    signal = simulator.function(theta, rng)[0]
    x = (signal + rng.standard_normal(signal.shape)).astype(np.float32)
    return theta[0], x, float(np.sqrt(np.square(signal.astype(float)).sum()))


def observation(simulator: sp.Simulator, k: int) -> tuple[np.ndarray, np.ndarray, float]:
    """The k-th observation: the first draw of its own stream that is as loud as a detection."""
    rng = np.random.default_rng([SEED, k])
    while True:
        theta, x, loudness = truth_and_x(simulator, rng)
        if LOUDNESS[0] <= loudness <= LOUDNESS[1]:
            return theta, x, loudness


def reference(k: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """x (2, 2, F), exact draws (2000, 7) and the truth (7,) of observation k; made once."""
    path = RESULTS / f"chirp_reference_{k}.npz"
    if not path.exists():
        theta, x, _ = observation(chirp, k)
        draws = chirp.posterior_sampler(x, DRAWS, np.random.default_rng([SEED, k, 1]))
        np.savez_compressed(path, x=x, draws=draws.astype(np.float32), theta=theta)
    with np.load(path, allow_pickle=False) as kept:
        return kept["x"], kept["draws"].astype(float), kept["theta"]


def nested(k: int) -> dict[str, Any]:
    """The reference against nested sampling: C2ST, shifts of means in sd, ratios of sd, effective draws."""
    from nautilus import Sampler

    x, exact, _ = reference(k)
    low, high = np.array([m.support for m in chirp.prior.law.marginals]).T
    columns = [chirp.prior.names.index(name) for name in ("phase", "ra")]
    sampler = Sampler(lambda u: low + (high - low) * u, lambda theta: chirp.log_likelihood(theta, x), n_dim=len(low), n_live=2000,
                      vectorized=True, pass_dict=False, n_networks=1, n_batch=500, periodic=np.array(columns), seed=SEED)
    sampler.run(discard_exploration=True, n_eff=2 * DRAWS)
    draws, log_weights, _ = sampler.posterior()
    weights = np.exp(log_weights - log_weights.max())
    picked = draws[np.random.default_rng(SEED).choice(len(draws), DRAWS, p=weights / weights.sum())]
    return {"c2st": c2st(exact[None], picked[None])[0], "shift": ((picked.mean(0) - exact.mean(0)) / exact.std(0)).tolist(),
            "sd_ratio": (picked.std(0) / exact.std(0)).tolist(), "effective": float(sampler.n_eff), "log_evidence": float(sampler.log_z)}


def ranks(k: int) -> list[float]:
    """Where the truth of a pair drawn from the prior lies among its posterior's draws, of each parameter; randomised, uniform on (0, 1)."""
    rng = np.random.default_rng([SEED, 1000 + k])
    theta, x, _ = truth_and_x(chirp, rng)
    below = (chirp.posterior_sampler(x, CALIBRATION_DRAWS, rng) < theta).sum(0)
    return ((below + rng.random(len(theta))) / (CALIBRATION_DRAWS + 1)).tolist()


def main(what: str = "", count: str = "30") -> None:
    if what == "observations":
        for simulator in (chirp, chirp_full):
            theta, x, _ = observation(simulator, 0)
            np.savez_compressed(DATA / f"{simulator.name}.npz", x=x, theta=theta)
        return
    cells, names = Cells("chirp_reference"), chirp.prior.names
    for k in range(OBSERVATIONS):
        loudness = cells.measure(f"signal-to-noise ratio {k}", lambda k=k: observation(chirp, k)[2])
        _, draws, theta = reference(k)
        print(f"observation {k}, signal-to-noise ratio {loudness:.1f}")
        print(table([[n, f"{t:.4g}", f"{m:.4g}", f"{s:.3g}"] for n, t, m, s in zip(names, theta, draws.mean(0), draws.std(0), strict=True)],
                    ["parameter", "truth", "mean", "sd"]), flush=True)
    if what == "nested":
        print(cells.measure("nested 0", lambda: nested(0)))
    if what == "calibration":
        each = np.array([cells.measure(f"ranks {k}", lambda k=k: ranks(k)) for k in range(int(count))])
        print(table([[n, float(kstest(u, "uniform").pvalue)] for n, u in zip(names, each.T, strict=True)], ["parameter", "KS p-value"]))


if __name__ == "__main__":
    main(*sys.argv[1:])
