r"""Equivariance: npe, npe with augmented rows and GNPE at equal budgets, against exact posteriors.

All methods of a problem have one embedding, one flow and one pair of seeds, and differ in `symmetry` alone; `npe-cnn1d` is plain npe with
convolutions. Observations are drawn from the prior; against 10,000 reference draws of each stand C2ST (sbibm's protocol) and the
Jensen-Shannon divergence of every marginal. What either of them finds between two independent sets of reference draws is its floor.
Seconds are the processor's, of one thread.

    reference  the floors, and how long the exact sampler takes
    methods    training, draws, C2ST and divergences; of GNPE also the chains, and draws by importance weights, whose target is
               p(x | theta) p(z) K(proxy | pose) and which are resampled systematically from the pool of all proposals
    mcmc       emcee on the same likelihood, in z: seconds for as many effective draws, least over parameters. Its walkers begin at exact
               draws, so that there is no burn-in, and likelihoods are vectorised: a lower bound of what MCMC costs

What GNPE's draws cost is told in passes of plain npe: one context and one draw for each of 5,000 different x, by nets of the same size,

.. math:: \text{cost} = \frac{\text{seconds of 5,000 draws by GNPE}}{(\text{steps} + 1) \times \text{seconds of one pass}} ,

both measured in turn, medians.

    OMP_NUM_THREADS=1 taskset -c 0 python benchmarks/gnpe.py --problems location
    OMP_NUM_THREADS=1 taskset -c 1 python benchmarks/gnpe.py --parts methods --budgets 200000
    OMP_NUM_THREADS=1 taskset -c 2 python benchmarks/gnpe.py --problems damped_oscillator --parts reference methods --methods npe gnpe \
        --budgets 50000 --steps 24000 --results gnpe_long
    python benchmarks/gnpe.py --show                            # only print what is there
"""

from __future__ import annotations

import argparse
import math
import os
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import median
from typing import Any

import common
import numpy as np
import torch
from common import Cells, c2st, jensen_shannon
from gnpe_tables import plot, show
from numpy.typing import NDArray

import sbiplat as sp
import sbiplat.training.trainer
from sbiplat import files
from sbiplat.errors import UserError
from sbiplat.posteriors.base import Posterior
from sbiplat.progress import silent
from sbiplat.runs import Run
from sbiplat.simulator import resolve
from sbiplat.source import code_digest, source_digest

Array = NDArray[np.float64]
KEPT = Path(__file__).parent / ".references"  # not committed: drawn again by this program
BUDGETS, MORE = (1_000, 10_000, 50_000), (200_000,)
METHODS: dict[str, dict[str, Any]] = {
    "npe": {"symmetry": "none"}, "npe-cnn1d": {"symmetry": "none", "embedding": "cnn1d"}, "augment": {"symmetry": "augment"},
    "gnpe": {"symmetry": "gnpe"}}
PLAIN = ("npe", "npe-cnn1d")
BATCHES = {1_000: 64, 10_000: 256}  # rows a step; 512 of larger budgets
PARTS = ("reference", "methods", "mcmc")
SEED, BANK_SEED, TRAINING_SEED = 20261121, 1, 0
CHUNK = 1000  # likelihoods at once


@dataclass(frozen=True)
class Problem:
    """simulator: module:object. settings: of every method. periods: of parameters that lie on a circle. committed: whether its references
    are results/NAME_reference_K.npz, with x and draws. more: budgets beyond those of all methods that plain npe gets, to say how many
    GNPE saves. methods: those that apply."""

    simulator: str
    settings: Mapping[str, Any] = field(default_factory=dict)
    periods: Mapping[str, float] = field(default_factory=dict)
    observations: int = 5
    committed: bool = False
    more: tuple[int, ...] = ()
    methods: tuple[str, ...] = ("npe", "augment", "gnpe")


PROBLEMS = {
    # Five numbers need no other net. Plain npe begins at the linear-Gaussian posterior, here the exact one: this is of GNPE's chains.
    "location": Problem("simulators.location:location"),
    # Dense layers; plain npe with convolutions beside it, which know what a shift is.
    "damped_oscillator": Problem("simulators.damped_oscillator:damped_oscillator", {"optimizer": "muon"}, more=(200_000,),
                                 methods=tuple(METHODS)),
    # The symmetry is approximate, and so goes without augmentation.
    "rotated_galaxy": Problem("simulators.rotated_galaxy:rotated_galaxy",
                              {"embedding_hidden": (256, 256), "context": 64, "optimizer": "muon"}, {"angle": math.pi},
                              methods=("npe", "gnpe")),
    # A whitened spectrum, in which places are frequencies and not alike.
    "chirp": Problem("simulators.chirp:chirp", {"svd": 128, "embedding_hidden": (256, 256), "context": 64, "optimizer": "muon"},
                     {"phase": 2 * math.pi, "ra": 2 * math.pi}, observations=3, committed=True, more=(200_000,)),
}


@dataclass(frozen=True)
class Size:
    """draws: a side. timed: draws whose seconds are told. pool: proposals of the importance weights, in sets of `timed`. watched:
    observations on which costs are measured, so many times each. steps: of a training, whatever the budget, unless the validation loss
    stops falling. settings: of every training, beside the problem's."""

    draws: int = 10_000
    timed: int = 5_000
    pool: int = 20_000
    observations: int | None = None
    watched: int = 3
    repeats: int = 3
    walkers: int = 100
    longest: float = 600.0  # seconds of one chain
    steps: int = 8_000
    settings: Mapping[str, Any] = field(default_factory=dict)


FULL = Size()


# ------------------------------------------------------------------------------------------------------------ references


@dataclass(frozen=True)
class Known:
    """One observation in the simulator's own form, reference draws (n, D), two independent sets of such, the sampler's seconds for both."""

    x: Any
    draws: Array
    halves: tuple[Array, Array]
    seconds: float | None


def known(name: str, size: Size = FULL) -> list[Known]:
    """The observations of a problem with their references, made once and kept."""
    problem = PROBLEMS[name]
    count = problem.observations if size.observations is None else min(size.observations, problem.observations)
    return [_committed(name, k, size) if problem.committed else _drawn(name, k, size) for k in range(count)]


def _committed(name: str, k: int, size: Size) -> Known:
    path = common.RESULTS / f"{name}_reference_{k}.npz"
    if not path.exists():
        raise SystemExit(f"{path.name} is not there: make it first, by benchmarks/{name}_reference.py")
    with np.load(path, allow_pickle=False) as file:
        draws = _on_one_branch(name, file["draws"][:size.draws].astype(float))
        return Known(file["x"], draws, (draws[::2], draws[1::2]), None)


def _drawn(name: str, k: int, size: Size) -> Known:
    simulator = resolve(PROBLEMS[name].simulator)
    rng = np.random.default_rng([SEED, k])
    x = simulator.x.unwrap(simulator.rows(simulator.prior.sample(rng, 1), [rng])[0])
    assert simulator.posterior_sampler is not None
    made_by = files.digest_of({"simulator": simulator.source_digest(), "sampler": source_digest(simulator.posterior_sampler),
                               "prior": simulator.prior.to_json(), "seed": [SEED, k], "draws": 2 * size.draws})
    path = KEPT / f"{name}_{k}_{made_by[:16]}.npz"
    if not path.exists():
        seconds, draws = timed(lambda: simulator.posterior_sampler(x, 2 * size.draws, np.random.default_rng([SEED, k, 1])))
        KEPT.mkdir(exist_ok=True)
        with tempfile.TemporaryDirectory(dir=KEPT) as folder:  # another process may be drawing the same
            np.savez(Path(folder) / "made.npz", draws=draws, seconds=seconds)
            (Path(folder) / "made.npz").replace(path)
    with np.load(path, allow_pickle=False) as file:
        draws = _on_one_branch(name, file["draws"])
        return Known(x, draws[:size.draws], (draws[:size.draws], draws[size.draws:]), float(file["seconds"]))


def _on_one_branch(name: str, draws: Array, around: Array | None = None) -> Array:
    """Draws (n, D) with each periodic parameter within half a period of its circular mean over `around`, by default over themselves."""
    problem, out = PROBLEMS[name], draws.copy()
    names = resolve(problem.simulator).prior.names
    for parameter, period in problem.periods.items():
        k = names.index(parameter)
        turns = 2 * np.pi * (draws if around is None else around)[:, k] / period
        centre = period / (2 * np.pi) * np.angle(np.exp(1j * turns).mean())
        out[:, k] = centre + (draws[:, k] - centre + period / 2) % period - period / 2
    return out


def floors(name: str, size: Size = FULL) -> dict[str, Any]:
    """What C2ST and the divergence find between independent sets of reference draws."""
    references = known(name, size)
    first, second = (np.stack([r.halves[k] for r in references]) for k in range(2))
    return {**made(), "c2st": c2st(first, second), "jsd": [jensen_shannon(a, b).tolist() for a, b in zip(first, second, strict=True)],
            "draws": first.shape[1], "sampler_seconds": [r.seconds for r in references]}


# --------------------------------------------------------------------------------------------------------------- methods


def one(name: str, method: str, budget: int, size: Size = FULL) -> dict[str, Any]:
    """A cell: how far the draws of every observation are from the reference, and what they cost."""
    simulator, references = resolve(PROBLEMS[name].simulator), known(name, size)
    with tempfile.TemporaryDirectory() as folder:
        bank = sp.simulate(simulator, budget, BANK_SEED, Path(folder) / "bank", progress=silent)
        seconds, run = timed(lambda: trained(name, method, bank, Path(folder) / "run", size))
        posterior = sp.load(run, allow_uncertified=True)
        cell = {**made(), "training_seconds": seconds, "draws": size.draws,
                **against(name, references, [_attempt(posterior, r.x, len(r.draws), k) for k, r in enumerate(references)])}
        if method == "gnpe":
            about = run.record["architecture"]["symmetry"]
            cell |= {"kernel": {k: about[k] for k in ("widths", "spread", "told", "stretch", "slope", "leaving")},
                     "cost": costs(name, posterior, references[:size.watched], Path(folder), size),
                     "weighted": weighted(name, posterior, references, size)}
    return cell


def trained(name: str, method: str, bank: sp.Bank, out: Path, size: Size) -> Run:
    """A method's run on a bank."""
    problem, batch = PROBLEMS[name], BATCHES.get(bank.rows, 512)
    epochs = math.ceil(size.steps * batch / (0.85 * bank.rows))  # the rest is set apart
    length = {"batch_size": batch, "max_epochs": epochs, "patience": max(20, epochs // 10)}
    return sp.train(bank, "npe", out=out, seed=TRAINING_SEED, simulator=resolve(problem.simulator), progress=silent,
                    **{**length, **problem.settings, **METHODS[method], **size.settings})


@dataclass(frozen=True)
class Attempt:
    """Draws of one observation, None where the sampler refused them, and what it said of its chains."""

    draws: Array | None
    seconds: float
    said: Mapping[str, Any] = field(default_factory=dict)
    refusal: str | None = None


def _attempt(posterior: Posterior, x: Any, n: int, k: int) -> Attempt:
    start, refusal, draws = time.process_time(), None, None
    try:
        draws = posterior.sample(x, n, seed=k)
    except UserError as error:
        refusal = f"observation {k}: {error}"
    return Attempt(draws, time.process_time() - start, dict(getattr(posterior.sampler, "diagnostics", {})), refusal)


def against(name: str, references: Sequence[Known], attempts: Sequence[Attempt]) -> dict[str, Any]:
    """C2ST (K,) and divergences (K, D) of the K observations whose draws were not refused; seconds for 5,000 draws; chains."""
    pairs = [(r.draws, _on_one_branch(name, a.draws, r.draws)) for r, a in zip(references, attempts, strict=True) if a.draws is not None]
    said = [a.said for a in attempts if "gibbs_steps" in a.said]
    return {
        "c2st": c2st(*(np.stack(side) for side in zip(*pairs, strict=True))) if pairs else [],
        "jsd": [jensen_shannon(a, b).tolist() for a, b in pairs],
        "refused": [a.refusal for a in attempts if a.refusal],
        "sampling_seconds_5000": [5000 * a.seconds / len(r.draws) for r, a in zip(references, attempts, strict=True)],
        **({"chains": {k: [s[k] for s in said] for k in ("gibbs_steps", "gibbs_rho", "gibbs_rho_theory")}} if said else {}),
    }


def costs(name: str, posterior: Posterior, references: Sequence[Known], folder: Path, size: Size) -> list[dict[str, Any]]:
    """Of each observation: GNPE's draws, and in turn one pass of plain npe over as many different x."""
    simulator = resolve(PROBLEMS[name].simulator)
    bank = sp.simulate(simulator, 1000, BANK_SEED, folder / "small", progress=silent)  # what a pass costs does not depend on the weights
    short = replace(size, settings={**size.settings, "max_epochs": 1})
    plain = sp.load(trained(name, "npe", bank, folder / "plain", short), allow_uncertified=True)
    rng = np.random.default_rng([SEED, 1000])
    rows = simulator.rows(simulator.prior.sample(rng, size.timed), [rng] * size.timed)
    many = simulator.x.unwrap({k: np.stack([row[k] for row in rows]) for k in simulator.x.shapes})
    out = []
    for r in references:
        draws, steps, passes = [], [], []
        for k in range(size.repeats):
            draws.append(_attempt(posterior, r.x, size.timed, k).seconds)
            steps.append(posterior.sampler.diagnostics["gibbs_steps"])
            passes.append(timed(lambda k=k: plain.sample(many, 1, seed=k))[0])
        out.append({"seconds": draws, "steps": steps, "pass_seconds": passes, "ratio": cost_ratio(draws, steps, passes)})
    return out


def cost_ratio(seconds: Sequence[float], steps: Sequence[int], passes: Sequence[float]) -> float:
    """Seconds of draws, per step and the start, in passes of plain npe: medians."""
    return median(s / (n + 1) for s, n in zip(seconds, steps, strict=True)) / median(passes)


# --------------------------------------------------------------------------------------------------- importance weights


def weighted(name: str, posterior: Posterior, references: Sequence[Known], size: Size) -> dict[str, Any]:
    """Importance-weighted GNPE: efficiency, Pareto k-hat, log evidence and seconds of every observation; draws against the reference."""
    from arviz import psislw

    attempts, figures = [], []
    for k, r in enumerate(references):
        start = time.process_time()
        try:
            z, log_w = proposals(name, posterior, r.x, size, k)
        except UserError as error:
            attempts.append(Attempt(None, time.process_time() - start, refusal=f"observation {k}: {error}"))
            continue
        seconds, w = time.process_time() - start, np.exp(log_w - log_w.max())
        theta = posterior.prior.constrain(z[systematic(w, len(r.draws), np.random.default_rng([SEED, k, 2]))])
        attempts.append(Attempt(theta, seconds))
        figures.append({"efficiency": float(w.sum() ** 2 / (len(w) * (w**2).sum())), "k_hat": float(psislw(log_w[w > 0])[1]),
                        "log_evidence": float(np.log(w.mean()) + log_w.max()), "distinct": len(np.unique(theta, axis=0)) / len(theta)})
    found = against(name, references, attempts)
    each = {key: [f[key] for f in figures] for key in ("efficiency", "k_hat", "log_evidence", "distinct")}
    effective = [a.seconds * 5000 / (e * size.pool) for a, e in zip((a for a in attempts if a.draws is not None), each["efficiency"],
                                                                    strict=True)]
    return {"c2st": found["c2st"], "jsd": found["jsd"], "refused": found["refused"], "pool": size.pool, **each,
            "seconds_5000_effective": effective}


def proposals(name: str, posterior: Posterior, x: Any, size: Size, k: int) -> tuple[Array, Array]:
    """A pool of z (pool, D) and log p(x | theta) p(z) K(proxy | pose) / q(z, proxy | x), (pool,); q is normalised in every set of it."""
    simulator, (fields, _) = resolve(PROBLEMS[name].simulator), posterior.x.batch(x)
    assert simulator.log_likelihood is not None
    zs, logs = [], []
    for part in range(math.ceil(size.pool / size.timed)):
        z, log_q, log_kernel = (v[0] for v in posterior.sampler.sample_and_log_prob(fields, size.timed, SEED + 1000 * k + part))
        zs.append(z.astype(float))
        logs.append(log_target(simulator, x, zs[-1]) + log_kernel - log_q)
    return np.concatenate(zs)[:size.pool], np.concatenate(logs)[:size.pool]


def log_target(simulator: sp.Simulator, x: Any, z: Array) -> Array:
    """log p(x | theta) + log p(z), (n,), -inf where the likelihood is no number."""
    parts = [simulator.log_likelihood(simulator.prior.constrain(z[a:a + CHUNK]), x) for a in range(0, len(z), CHUNK)]
    value = np.concatenate(parts) + simulator.prior.unconstrained_log_prob(z)
    return np.where(np.isfinite(value), value, -np.inf)


def systematic(weights: Array, n: int, rng: np.random.Generator) -> NDArray[np.intp]:
    """n places, each floor or ceil of n w_i / sum w times."""
    edges = np.cumsum(weights)
    return np.searchsorted(edges / edges[-1], (np.arange(n) + rng.random()) / n, side="right").clip(max=len(weights) - 1)


# ------------------------------------------------------------------------------------------------------------------ MCMC


def mcmc(name: str, size: Size = FULL) -> dict[str, Any]:
    """Of each watched observation: steps, the longest autocorrelation time, seconds, and those for 5,000 effective draws."""
    return {**made(), "walkers": size.walkers, "each": [_chain(name, r, k, size) for k, r in enumerate(known(name, size)[:size.watched])]}


def _chain(name: str, reference: Known, k: int, size: Size) -> dict[str, Any]:
    import emcee

    simulator = resolve(PROBLEMS[name].simulator)
    prior, rng = simulator.prior, np.random.default_rng([SEED, k, 3])
    with np.errstate(all="ignore"):
        start_at = prior.unconstrain(_in_support(prior, PROBLEMS[name].periods, rng.choice(reference.draws, size.walkers, replace=False)))
    moves = [(emcee.moves.DEMove(), 0.7), (emcee.moves.DESnookerMove(), 0.1), (emcee.moves.StretchMove(), 0.2)]
    sampler = emcee.EnsembleSampler(size.walkers, prior.dim, lambda z: log_target(simulator, reference.x, z), vectorize=True, moves=moves)
    sampler.random_state = np.random.RandomState(SEED + k).get_state()
    start, block, state, tau = time.process_time(), 500, start_at, np.inf
    while sampler.iteration < 50 * tau and time.process_time() - start < size.longest:  # emcee's own rule for a trusted tau
        state = sampler.run_mcmc(state, block, skip_initial_state_check=True)
        with np.errstate(all="ignore"):  # of walkers none of which has moved yet
            tau = float(np.nan_to_num(np.max(sampler.get_autocorr_time(tol=0)), nan=np.inf))
    seconds = time.process_time() - start
    return {"steps": sampler.iteration, "tau": tau, "long_enough": sampler.iteration >= 50 * tau, "seconds": seconds,
            "acceptance": float(sampler.acceptance_fraction.mean()),
            "seconds_5000_effective": seconds * 5000 * tau / (sampler.iteration * size.walkers)}


def _in_support(prior: sp.Prior, periods: Mapping[str, float], theta: Array) -> Array:
    """theta with periodic parameters back in the prior's range."""
    out, (low, _) = theta.copy(), prior.support
    for name, period in periods.items():
        k = prior.names.index(name)
        out[:, k] = low[k] + (theta[:, k] - low[k]) % period
    return out


# ------------------------------------------------------------------------------------------------------------ every cell


def timed(function: Callable[[], Any]) -> tuple[float, Any]:
    """Seconds of the processor, and the result."""
    start = time.process_time()
    result = function()
    return time.process_time() - start, result


def made() -> dict[str, Any]:
    """Of which code and with which seeds a cell was made."""
    return {"code": code_digest()[:12], "seeds": {"observations": SEED, "bank": BANK_SEED, "training": TRAINING_SEED}}


def main(arguments: Sequence[str] | None = None, size: Size = FULL) -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--parts", nargs="+", default=PARTS, choices=PARTS)
    parser.add_argument("--problems", nargs="+", default=list(PROBLEMS), choices=PROBLEMS)
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=METHODS)
    parser.add_argument("--budgets", nargs="+", type=int, default=BUDGETS, choices=BUDGETS + MORE,
                        help="simulations; above 50,000 npe alone, of problems that ask for it")
    parser.add_argument("--steps", type=int, default=size.steps, help="of a training; of another number, name another --results")
    parser.add_argument("--results", default="gnpe", help="the name of the file of results")
    parser.add_argument("--show", action="store_true", help="only print what is there")
    parser.add_argument("--plot", type=Path, help="and draw C2ST against the budget into this .svg")
    args = parser.parse_args(arguments)
    if args.steps != size.steps and args.results == "gnpe":
        parser.error("cells of another number of steps want a file of their own: --results NAME")
    cells, size = Cells(args.results), replace(size, steps=args.steps)
    if not args.show:
        if os.environ.get("OMP_NUM_THREADS") != "1":
            parser.error("seconds are those of one thread: set OMP_NUM_THREADS=1 before python starts")
        torch.set_num_threads(1)
        measure(cells, args, size)
    show(cells.content["cells"], tuple(METHODS))
    if args.plot:
        plot(cells.content["cells"], tuple(METHODS), args.plot)


def measure(cells: Cells, args: argparse.Namespace, size: Size) -> None:
    """Every cell asked for that is not there yet."""
    for name in args.problems:
        if "reference" in args.parts:
            cells.measure(f"{name} reference", lambda n=name: floors(n, size))
        for budget in args.budgets if "methods" in args.parts else []:
            for method in args.methods:
                problem = PROBLEMS[name]
                if method in problem.methods and (budget in BUDGETS or (method in PLAIN and budget in problem.more)):
                    cells.measure(f"{name} {method} {budget}", lambda n=name, m=method, b=budget: one(n, m, b, size))
        if "mcmc" in args.parts:
            cells.measure(f"{name} mcmc", lambda n=name: mcmc(n, size))


if __name__ == "__main__":
    main()
