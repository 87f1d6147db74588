r"""Attacks on trained posteriors over eps, beside the exact posterior where it is known: KL, the same of noise, coverage.

npe with flow = maf on 100,000 simulations; 100 held-out observations, the publication level's attack. eps is the root mean square over
features in robust sds of the bank (docs/gate.md); in the norm of Gloeckler et al. (2023), |delta| of all features together, it is
sqrt(F) times as much, with F = 10 for sir and 20 for lotka_volterra.

    python benchmarks/attack.py --tasks sir lotka_volterra
    python benchmarks/attack.py --tasks sir --set NAME=VALUE ...     # a training with other settings, in a cell of its own
    python benchmarks/attack.py --tasks sir --exact                  # the exact posterior, on a grid
    python benchmarks/attack.py --show
"""

from __future__ import annotations

import argparse
import math
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import Cells, table
from torch import Tensor

import sbiplat as sp
from sbiplat.diagnostics.adversarial import AttackSettings
from sbiplat.diagnostics.examined import Examined
from sbiplat.diagnostics.fragility import fragility
from sbiplat.gate.robustness import told
from sbiplat.posteriors.base import Posterior
from sbiplat.posteriors.of_run import from_run
from sbiplat.progress import Progress, silent
from sbiplat.settings import parse_assignments
from sbiplat.simulator import resolve
from simulators.sir import SURVEYED, log_infected_share, sir

SIZES = (0.1, 0.2, 0.3, 0.5, 1.0, 2.0)
ROWS, OBSERVATIONS, SEED = 100_000, 100, 20260801
HARD = AttackSettings(steps=200, restarts=5, queries=500)


class SirOnGrid:
    """The exact posterior of sir over z as a sampler with its own target, constant in the cells of a grid. log p(x | theta) is linear in x
    up to a term of x alone, so it goes on beyond whole numbers."""

    gradients, normalised, objectives, masks = True, True, ("forward",), {}
    half, cells = 3.5, 240

    def __init__(self) -> None:
        self.step = 2 * self.half / self.cells
        centres = self.step * (np.arange(self.cells) + 0.5) - self.half
        self.z = torch.tensor(np.stack(np.meshgrid(centres, centres, indexing="ij"), -1).reshape(-1, 2))
        log_share = log_infected_share(sir.prior.constrain(self.z.numpy()))
        self.positive, self.negative = torch.tensor(log_share), torch.tensor(np.log1p(-np.exp(np.minimum(log_share, -1e-12))))
        self.log_prior = -0.5 * self.z.square().sum(1)

    def target(self) -> SirOnGrid:
        return self

    def condition(self, x: dict[str, Tensor]) -> Tensor:
        seen = x["x"].double()
        return (seen @ self.positive.T + (SURVEYED - seen) @ self.negative.T + self.log_prior).log_softmax(-1)

    def sample(self, x: Any, n: int, seed: int) -> Any:
        generator = torch.Generator().manual_seed(seed)
        weights = self.condition({k: torch.as_tensor(v) for k, v in x.items()}).exp()
        drawn = self.z[torch.multinomial(weights, n, replacement=True, generator=generator)]
        return (drawn + self.step * (torch.rand(drawn.shape, generator=generator, dtype=drawn.dtype) - 0.5)).numpy()

    def log_prob(self, z: Any, condition: Any) -> Any:
        if isinstance(condition, dict):
            given = self.condition({k: torch.as_tensor(v) for k, v in condition.items()})
            return self.log_prob(torch.as_tensor(np.asarray(z)), given).numpy()
        place = ((z.double() + self.half) / self.step).floor().clamp(0, self.cells - 1).long()
        return condition.gather(1, place[..., 0] * self.cells + place[..., 1]) - 2 * math.log(self.step)


def measure(task: str, settings: dict[str, Any], exact: bool, progress: Progress) -> dict[str, Any]:
    """A cell: figures at each eps, and the mean log-density of held-out z."""
    simulator = resolve(task)
    rng = np.random.default_rng(SEED)
    theta = simulator.prior.sample(rng, 20 * OBSERVATIONS)
    x = {k: np.stack([row[k] for row in simulator.rows(theta, [rng])]) for k in simulator.x.shapes}
    pairs = {"theta": simulator.prior.unconstrain(theta).astype(np.float32), "x": x}
    with tempfile.TemporaryDirectory() as folder:
        bank = sp.simulate(simulator, ROWS, 1, Path(folder) / "bank", progress=silent)
        trained: dict[str, Any] = {}
        if exact:
            posterior = Posterior(simulator.prior, simulator.x, SirOnGrid())
        else:
            start = time.process_time()
            run = sp.train(bank, "npe", out=Path(folder) / "run", progress=progress, **{"flow": "maf", **settings})
            seconds = time.process_time() - start
            certificate = sp.gate(run, progress=silent)
            trained = {"training_seconds": seconds, "steps": run.record["outcome"]["steps"],
                       "refused_by": [c.name for c in certificate.failed], "certified": certificate.passed}
            posterior = from_run(run)
        rows = {k: np.asarray(bank.x[:10_000]) for k in simulator.x.shapes} if simulator.x.plain else {}
    log_q = posterior.unconstrained_log_prob(pairs["theta"][:, None].astype(float), x)[:, 0]
    examined = Examined(posterior, pairs, {"theta": pairs["theta"], "x": rows}, SEED, progress).first(OBSERVATIONS)
    found, _ = fragility(examined, SIZES, HARD if not exact else replace(HARD, steps=50, restarts=2))
    return {**trained, "log_density": float(log_q.mean()), "error": float(log_q.std() / math.sqrt(len(log_q))),
            "eps": [{**told(f), "worst_mean": float(f.worst.mean()), "noise_mean": float(f.noise.mean())} for f in found]}


def show(cells: Cells) -> None:
    """All cells beside one another; then a table for each: medians over observations, coverage at nominal 0.5 of the worst parameter."""
    rows = []
    for key, cell in cells.content["cells"].items():
        plain = cells.content["cells"].get(f"{key.split()[0]} npe", {})
        cost = cell["training_seconds"] / cell["steps"] / (plain["training_seconds"] / plain["steps"]) if plain and "steps" in cell else ""
        verdict = "" if "certified" not in cell else "certified" if cell["certified"] else f"refused: {', '.join(cell['refused_by'])}"
        rows.append([key, f"{cell['log_density']:.3f}", *(f["worst_kl"][1] for f in cell["eps"]), cost, verdict])
    worst = [f"worst KL, eps {eps:g}" for eps in SIZES]
    print(table(rows, ["posterior", "held-out log-density", *worst, "seconds a step, of undefended", "gate"]))
    for key, cell in cells.content["cells"].items():
        print(f"\n{key}: held-out log-density {cell['log_density']:.3f} +- {cell['error']:.3f} nats\n")
        rows = [[f["eps"], f["worst_kl"][1], f["noise_kl"][1], f["ratio"], f["excess"], min(f["coverage"][0]["attacked"], default=math.nan),
                 min(f["coverage"][0]["noise"], default=math.nan)] for f in cell["eps"]]
        print(table(rows, ["eps", "worst KL", "noise KL", "ratio", "excess", "coverage of 0.5 attacked", "under noise"]))


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--tasks", nargs="+", default=["sir", "lotka_volterra"])
    parser.add_argument("--set", dest="settings", nargs="*", default=[], help="settings of the training, key=value")
    parser.add_argument("--exact", action="store_true", help="the exact posterior, of sir")
    parser.add_argument("--show", action="store_true", help="only print what is there")
    args = parser.parse_args()
    torch.set_num_threads(1)
    cells = Cells("attack")
    settings = parse_assignments(args.settings)
    for task in args.tasks if not args.show else []:
        if args.exact and task != "sir":
            raise SystemExit(f"--exact is of sir; the posterior of {task} is not on a grid")
        words = "exact" if args.exact else " ".join(["npe", *(f"{k}={v}" for k, v in settings.items())])
        cells.measure(f"{task} {words}", lambda t=task: measure(t, settings, args.exact, Progress.auto()))
    show(cells)


if __name__ == "__main__":
    main()
