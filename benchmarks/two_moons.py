r"""sbi's NPE and ours on the same Two Moons bank: training to a held-out log-density, and draws a second.

10,000 rows, the same training rows, one thread, interleaved; medians over seeds. The held-out log-density is that of theta in its own
space, in nats; its optimum is 3.800 +- 0.013 (two_moons' exact posterior). Seconds to a level are read off the epoch at which the
held-out log-density first reaches it: ours on our validation rows, sbi's on its own. A cell that never reaches it says null.

    taskset -c 0 python benchmarks/two_moons.py [--seeds 3]
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from contextlib import chdir
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import torch
from common import Cells, table

import sbiplat as sp
from sbiplat.bank.stream import split
from sbiplat.progress import silent

ROWS, LEVEL, OPTIMUM = 10_000, 3.4, 3.800
OURS = {"ours nsf": {"flow": "nsf"}, "ours maf": {"flow": "maf"}, "ours mog": {"flow": "mog", "components": 20}}
SBI = {"sbi maf (its default)": "maf", "sbi nsf": "nsf"}


def bank(folder: Path) -> sp.Bank:
    return sp.simulate("two_moons", ROWS, 1, folder / "two_moons.bank", workers=1, progress=silent)


def held_out(bank: sp.Bank, seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Training rows, and the held-out theta and x."""
    apart = split(bank, seed, 0.05, 0.1, 5000)
    training = np.setdiff1d(np.arange(bank.rows), np.concatenate([apart.validation, apart.held_out]))
    return training, bank.theta[apart.held_out], bank.x[apart.held_out]


def timed(function: Any, repeats: int = 3) -> float:
    """Median seconds."""
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        function()
        seconds.append(time.perf_counter() - start)
    return float(np.median(seconds))


def ours(bank: sp.Bank, settings: dict[str, Any], seed: int) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        start = time.perf_counter()
        run = sp.train(bank, "npe", out=Path(folder) / "run", seed=seed, progress=silent, **settings)
        total = time.perf_counter() - start
        offset = _to_theta_space(bank, run, seed)
        reached = [m["seconds"] for m in run.metrics() if m["validation_loss"] is not None and -m["validation_loss"] + offset >= LEVEL]
        posterior = sp.load(run, allow_uncertified=True)
    _, theta, x = held_out(bank, seed)
    final = float(np.mean(posterior.log_prob(theta, x)))
    return {"seconds": total, "to_level": reached[0] if reached else None, "final": final,
            "one_x": 10_000 / timed(lambda: posterior.sample(x[0], 10_000, seed=0)),
            "batched": 500_000 / timed(lambda: posterior.sample(x[:500], 1000, seed=0))}


def _to_theta_space(bank: sp.Bank, run: sp.Run, seed: int) -> float:
    """What turns a mean log-density over z into one over theta, on the validation rows."""
    prior = bank.header.prior
    theta = bank.theta[split(bank, seed, 0.05, 0.1, 5000).validation]
    return float(-np.mean(prior.log_abs_det_jacobian(prior.unconstrain(theta))))


def sbi(bank: sp.Bank, net: str, seed: int) -> dict[str, Any]:
    from sbi.inference import NPE
    from sbi.utils import BoxUniform

    training, theta, x = held_out(bank, seed)
    torch.manual_seed(seed)
    trainer = NPE(BoxUniform(-torch.ones(2), torch.ones(2)), density_estimator=net, show_progress_bars=False)
    trainer.append_simulations(torch.as_tensor(bank.theta[training], dtype=torch.float32), torch.as_tensor(bank.x[training]))
    start = time.perf_counter()
    estimator = trainer.train(show_train_summary=False)
    total = time.perf_counter() - start
    curve = -np.array(trainer._summary["validation_loss"])
    epochs = np.flatnonzero(curve >= LEVEL)
    posterior = trainer.build_posterior(estimator)
    with torch.no_grad():
        final = float(estimator.log_prob(torch.as_tensor(theta, dtype=torch.float32)[None], condition=torch.as_tensor(x)).mean())
    first, batch = torch.as_tensor(x[0]), torch.as_tensor(x[:500])
    return {"seconds": total, "to_level": total * (epochs[0] + 1) / len(curve) if len(epochs) else None, "final": final,
            "one_x": 10_000 / timed(lambda: posterior.sample((10_000,), x=first, show_progress_bars=False)),
            "batched": 500_000 / timed(lambda: posterior.sample_batched((1000,), x=batch, show_progress_bars=False), 1)}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--seeds", type=int, default=3)
    seeds = range(parser.parse_args().seeds)
    torch.set_num_threads(1)
    cells = Cells("two_moons")
    with tempfile.TemporaryDirectory() as folder, chdir(folder):  # sbi writes its logs where it stands
        rows = bank(Path(folder))
        for seed in seeds:  # interleaved: a busy spell of the machine falls on all
            for name, settings in OURS.items():
                cells.measure(f"{name}, seed {seed}", lambda s=settings, seed=seed: ours(rows, s, seed))
            for name, net in SBI.items():
                cells.measure(f"{name}, seed {seed}", lambda n=net, seed=seed: sbi(rows, n, seed))
    figures = ("seconds", "to_level", "final", "one_x", "batched")
    medians = {name: {k: _median([cells[f"{name}, seed {s}"][k] for s in seeds]) for k in figures} for name in (*OURS, *SBI)}
    print(table([[n, m["to_level"] or "never", f"{m['final']:.2f}", f"{OPTIMUM - m['final']:.2f}", m["seconds"], m["one_x"], m["batched"]]
                 for n, m in medians.items()],
                ["", f"seconds to {LEVEL} nats", "final nats", "gap to the optimum", "seconds in all", "draws/s, one x", "draws/s, 500 x"]))


def _median(values: list[float | None]) -> float | None:
    return None if any(v is None for v in values) else float(np.median(values))


if __name__ == "__main__":
    main()
