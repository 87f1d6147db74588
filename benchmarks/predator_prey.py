r"""How close is the trained posterior of the lynx and hare record to the exact one?

The likelihood is tractable, so the reference is MCMC (emcee, differential evolution moves, in z): 10,000 thinned draws, kept in
results/predator_prey_reference.npz. For each run named on the command line: every marginal's shift in reference standard
deviations, the ratio of standard deviations, and C2ST by sbibm's protocol (10,000 draws a side).

    python benchmarks/predator_prey.py runs/predator_prey/run runs/predator_prey_long/run
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
from common import RESULTS, Cells, c2st, table

import sbiplat as sp
from simulators.predator_prey import predator_prey

RECORD = Path(__file__).parent.parent / "simulators" / "data" / "hudson_bay.csv"
PUBLISHED = [0.55, 0.028, 0.80, 0.024, 33.9, 5.9, 0.25, 0.25]  # means of Carpenter's Stan fit
WALKERS, BURN, STEPS, SEED = 1000, 500, 6000, 20260101
DRAWS = 10_000


def reference() -> np.ndarray:
    """MCMC draws of theta given the record, (10000, 8); made once."""
    path = RESULTS / "predator_prey_reference.npz"
    if not path.exists():
        np.savez_compressed(path, theta=_mcmc().astype(np.float32))
    return np.load(path)["theta"].astype(float)


def _mcmc() -> np.ndarray:
    import emcee

    prior, x = predator_prey.prior, sp.read_observation(RECORD, predator_prey.x)

    def log_posterior(z: np.ndarray) -> np.ndarray:
        with np.errstate(all="ignore"):
            value = predator_prey.log_likelihood(prior.constrain(z), x) + prior.unconstrained_log_prob(z)
        return np.where(np.isfinite(value), value, -np.inf)

    rng = np.random.default_rng(SEED)
    start = prior.unconstrain(np.array(PUBLISHED)) + 0.1 * rng.standard_normal((WALKERS, prior.dim))
    moves = [(emcee.moves.DEMove(), 0.7), (emcee.moves.DESnookerMove(), 0.1), (emcee.moves.StretchMove(), 0.2)]
    np.random.seed(SEED)  # noqa: NPY002 - emcee draws from the global generator
    sampler = emcee.EnsembleSampler(WALKERS, prior.dim, log_posterior, vectorize=True, moves=moves)
    sampler.run_mcmc(start, BURN + STEPS)
    z = sampler.get_chain(discard=BURN)
    tau = emcee.autocorr.integrated_time(z, tol=0)
    halves = z.reshape(2, STEPS // 2, WALKERS, prior.dim)
    drift = (halves[0].mean((0, 1)) - halves[1].mean((0, 1))) / z.std((0, 1))
    print(f"reference: acceptance {sampler.acceptance_fraction.mean():.2f}, {STEPS / tau.max():.0f} autocorrelation times, "
          f"largest drift between halves {np.abs(drift).max():.3f} sd")
    every = STEPS * WALKERS // DRAWS
    return prior.constrain(rng.permutation(z[every - 1::every].reshape(-1, prior.dim)))


def compare(path: str) -> dict[str, object]:
    """One run against the reference."""
    run = sp.Run.open(path)
    x = sp.read_observation(RECORD, run.x)
    draws, exact = sp.load(run, allow_uncertified=True).sample(x, DRAWS, seed=0), reference()
    spread = exact.std(0)
    return {
        "simulations": run.record["bank"]["rows"], "training_seconds": run.record["outcome"]["seconds"],
        "held_out_log_q": -run.record["outcome"]["validation_loss"],
        "shift": ((draws.mean(0) - exact.mean(0)) / spread).tolist(), "sd_ratio": (draws.std(0) / spread).tolist(),
        "c2st": c2st(exact[None], draws[None])[0],
    }


def main() -> None:
    exact, names = reference(), predator_prey.prior.names
    print(table([[n, f"{m:.4g}", f"{s:.3g}", p] for n, m, s, p in zip(names, exact.mean(0), exact.std(0), PUBLISHED, strict=True)],
                ["parameter", "reference mean", "reference sd", "published mean"]))
    cells = Cells("predator_prey")
    for path in sys.argv[1:]:
        key = f"{Path(path).parent.name} {sp.Run.open(path).weights_digest[:12]}"
        result = cells.measure(key, lambda path=path: compare(path))
        print(f"\n{key}: {result['simulations']} simulations, {result['training_seconds']:.0f} s of training, C2ST {result['c2st']:.3f}")
        print(table([[n, f"{a:+.2f}", f"{b:.2f}"] for n, a, b in zip(names, result["shift"], result["sd_ratio"], strict=True)],
                    ["parameter", "shift of the mean (reference sd)", "sd ratio"]))


if __name__ == "__main__":
    main()
