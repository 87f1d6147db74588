"""What the benchmarks share: results as JSON cells kept as they are made, C2ST by sbibm's protocol, divergences, what machine it was."""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Callable
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sbiplat import files

RESULTS = Path(__file__).parent / "results"
RESULTS.mkdir(exist_ok=True)


class Cells:
    """Results by key in one JSON file; a cell that is there is not measured again, so a benchmark resumes cell by cell."""

    def __init__(self, name: str) -> None:
        self.path = RESULTS / f"{name}.json"
        self.content = self._read()

    def _read(self) -> dict[str, Any]:
        return json.loads(self.path.read_text()) if self.path.exists() else {"machine": machine(), "cells": {}}

    def __getitem__(self, key: str) -> Any:
        return self.content["cells"][key]

    def measure(self, key: str, function: Callable[[], Any]) -> Any:
        """The cell's value: from the file, or measured now and written at once, beside what other processes have written meanwhile."""
        self.content = self._read()
        if key not in self.content["cells"]:
            value = function()
            with files.locked(RESULTS, RuntimeError(f"another process holds {RESULTS}")):
                self.content = self._read()
                self.content["cells"][key] = value
                files.write_text(self.path, json.dumps(self.content, indent=1, default=float) + "\n")
        return self.content["cells"][key]


def machine() -> dict[str, Any]:
    """What the figures were made on, without names of machines."""
    from sbiplat.bank.layout import versions

    found = versions()
    with suppress(PackageNotFoundError):
        found["sbi"] = version("sbi")
    return {"cores": len(os.sched_getaffinity(0)), "processor": platform.machine(), "versions": found}


def peak() -> float:
    """MB of resident memory at most so far (getrusage would count the process that started this one)."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) / 1024


def c2st(a: NDArray[np.float64], b: NDArray[np.float64], seed: int = 1) -> list[float]:
    """Classifier two-sample tests of K pairs of samples (K, n, D) by sbibm's protocol: 0.5 is indistinguishable.

    Each pair z-scored by a; an MLP of 2 x 10 D units as scikit-learn's MLPClassifier trains it for sbibm (Adam, batches of 200, L2 1e-4,
    until ten epochs in a row gain less than 1e-4), in five folds. All nets are trained side by side in one batch, which is several times
    faster; tests/test_benchmarks.py holds it against scikit-learn's own.
    """
    import torch
    from torch.nn.functional import binary_cross_entropy_with_logits, relu

    folds, batch, decay, tolerance, patience, most_epochs = 5, 200, 1e-4, 1e-4, 10, 2000
    generator = torch.Generator().manual_seed(seed)
    mean, sd = a.mean(1, keepdims=True), a.std(1, ddof=1, keepdims=True)
    data = torch.as_tensor(np.concatenate([(a - mean) / sd, (b - mean) / sd], axis=1), dtype=torch.float32)
    pairs, rows, dim = data.shape
    target = (torch.arange(rows) >= a.shape[1]).float()
    parts = torch.randperm(rows, generator=generator)[: rows // folds * folds].view(folds, -1)
    fitted = torch.stack([torch.cat([parts[j] for j in range(folds) if j != k]) for k in range(folds)])
    net = torch.arange(pairs * folds)  # those that are still trained: pair and fold
    weights = []
    for into, out in pairwise([dim, 10 * dim, 10 * dim, 1]):
        bound = (6 / (into + out)) ** 0.5
        weights += [((2 * torch.rand(len(net), n, out, generator=generator) - 1) * bound).requires_grad_() for n in (into, 1)]
    first, second = [torch.zeros_like(w) for w in weights], [torch.zeros_like(w) for w in weights]

    def logits(x: torch.Tensor) -> torch.Tensor:
        h = relu(torch.baddbmm(weights[1], x, weights[0]))
        h = relu(torch.baddbmm(weights[3], h, weights[2]))
        return torch.baddbmm(weights[5], h, weights[4])[..., 0]

    best, waited, right = torch.full((len(net),), torch.inf), torch.zeros(len(net)), torch.zeros(len(net))
    step = 0
    for _ in range(most_epochs):
        order = torch.stack([row[torch.randperm(fitted.shape[1], generator=generator)] for row in fitted])
        total = torch.zeros(len(net))
        pair, fold = (net // folds)[:, None], net % folds
        for columns in order.split(batch, dim=1):
            some = columns[fold]
            loss = binary_cross_entropy_with_logits(logits(data[pair, some]), target[some], reduction="none").mean(1)
            gradients = torch.autograd.grad(loss.sum(), weights)
            total += loss.detach() * columns.shape[1]
            step += 1
            with torch.no_grad():
                torch._foreach_add_(list(gradients[0::2]), weights[0::2], alpha=decay / columns.shape[1])
                torch._foreach_lerp_(first, gradients, 0.1)
                torch._foreach_mul_(second, 0.999)
                torch._foreach_addcmul_(second, gradients, gradients, 0.001)
                below = torch._foreach_sqrt(second)
                torch._foreach_add_(below, 1e-8 * (1 - 0.999**step) ** 0.5)
                torch._foreach_addcdiv_(weights, first, below, -1e-3 * (1 - 0.999**step) ** 0.5 / (1 - 0.9**step))
        with torch.no_grad():
            mean_loss = total / fitted.shape[1] + 0.5 * decay / batch * sum(w.square().sum((1, 2)) for w in weights[0::2])
            waited = torch.where(mean_loss > best - tolerance, waited + 1, 0)
            best = torch.minimum(best, mean_loss)
            ended = waited > patience
            if bool(ended.any()):
                found = ((logits(data[pair, parts[fold]]) > 0) == (target[parts[fold]] > 0)).float().mean(1)
                right[net[ended]] = found[ended]
                stay = ~ended
                net, best, waited = net[stay], best[stay], waited[stay]
                first, second = [m[stay] for m in first], [m[stay] for m in second]
                weights = [w[stay].requires_grad_() for w in weights]
                if not len(net):
                    return right.view(pairs, folds).mean(1).tolist()
    raise RuntimeError(f"classifiers of C2ST did not converge in {most_epochs} epochs")


def jensen_shannon(a: NDArray[np.float64], b: NDArray[np.float64], grid: int = 1000) -> NDArray[np.float64]:
    """Jensen-Shannon divergence of each marginal of two sets of draws (n, D) and (m, D), in mnat: (D,).

    As in gravitational-wave astronomy (Romero-Shaw et al., 2020; Dax et al., 2021): Gaussian kernel density estimates with Scott's
    width, on a grid over the range of both sets, base e. Of two sets of 10,000 draws of one law it is about 0.3.
    """
    from scipy.spatial.distance import jensenshannon
    from scipy.stats import gaussian_kde

    found = []
    for first, second in zip(a.T, b.T, strict=True):
        places = np.linspace(min(first.min(), second.min()), max(first.max(), second.max()), grid)
        densities = [gaussian_kde(draws)(places) for draws in (first, second)]
        found.append(1e3 * jensenshannon(*(np.where(d > 1e-200 * d.max(), d, 0) for d in densities)) ** 2)  # half of a denormal is 0
    return np.array(found)


def table(rows: list[list[Any]], header: list[str]) -> str:
    """A Markdown table."""
    cells = [header, ["---"] * len(header), *[[f"{v:.3g}" if isinstance(v, float) else str(v) for v in row] for row in rows]]
    return "\n".join("| " + " | ".join(row) + " |" for row in cells)
