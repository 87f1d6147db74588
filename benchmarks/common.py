"""What the benchmarks share: results as JSON cells kept as they are made, C2ST by sbibm's protocol, the machine's description."""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

RESULTS = Path(__file__).parent / "results"
RESULTS.mkdir(exist_ok=True)


class Cells:
    """Results by key in one JSON file; a cell that is there is not measured again, so a benchmark resumes cell by cell."""

    def __init__(self, name: str) -> None:
        self.path = RESULTS / f"{name}.json"
        self.content: dict[str, Any] = json.loads(self.path.read_text()) if self.path.exists() else {"machine": machine(), "cells": {}}

    def __getitem__(self, key: str) -> Any:
        return self.content["cells"][key]

    def measure(self, key: str, function: Callable[[], Any]) -> Any:
        """The cell's value: from the file, or measured now and written at once."""
        if key not in self.content["cells"]:
            self.content["cells"][key] = function()
            self.path.write_text(json.dumps(self.content, indent=1, default=float) + "\n")
        return self.content["cells"][key]


def machine() -> dict[str, Any]:
    """What the figures were made on, without names of machines."""
    from sbiplat.bank.layout import versions

    return {"cores": len(os.sched_getaffinity(0)), "processor": platform.machine(), "versions": versions()}


def peak() -> float:
    """MB of resident memory at most so far (getrusage would count the process that started this one)."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) / 1024


def c2st(a: NDArray[np.float64], b: NDArray[np.float64], seed: int = 1) -> float:
    """Classifier two-sample test by sbibm's protocol: z-scored by a, an MLP of 2 x 10 D units, five folds; 0.5 is indistinguishable."""
    from sklearn.model_selection import KFold, cross_val_score
    from sklearn.neural_network import MLPClassifier

    mean, sd = a.mean(0), a.std(0)
    data = np.concatenate([(a - mean) / sd, (b - mean) / sd])
    target = np.concatenate([np.zeros(len(a)), np.ones(len(b))])
    width = 10 * a.shape[1]
    net = MLPClassifier(activation="relu", hidden_layer_sizes=(width, width), max_iter=1000, solver="adam", random_state=seed)
    folds = KFold(n_splits=5, shuffle=True, random_state=seed)
    return float(np.mean(cross_val_score(net, data, target, cv=folds, scoring="accuracy")))


def table(rows: list[list[Any]], header: list[str]) -> str:
    """A Markdown table."""
    cells = [header, ["---"] * len(header), *[[f"{v:.3g}" if isinstance(v, float) else str(v) for v in row] for row in rows]]
    return "\n".join("| " + " | ".join(row) + " |" for row in cells)
