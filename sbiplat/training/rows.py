"""Rows of a bank for a training elsewhere, by the split that `train` makes: what is held out stays so for the gate."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sbiplat.bank.bank import Bank
from sbiplat.bank.layout import STATUS
from sbiplat.bank.segment import dataset_names
from sbiplat.bank.stream import Split, split
from sbiplat.errors import BankError, SettingError
from sbiplat.settings import build as build_settings
from sbiplat.settings import whole_seed
from sbiplat.training.begin import TrainSettings, filled

PARTS = ("training", "validation", "held_out")
SHARES = ("validation", "held_out", "held_out_most")


def pairs(bank: Bank | str | Path, part: str = "training", *, seed: int = 0, **shares: Any) -> tuple[NDArray[np.float64], Any]:
    """theta (n, D) in its own space, and x as the simulator returns it (a dict stays one), of the rows that did not fail.

    part: "training", the rows that training sees, in the bank's order; "validation"; or "held_out", which the gate tests on.
    seed and shares (validation, held_out, held_out_most) are those of `sp.train` and `sp.from_sbi`. Raises SettingError, BankError.
    """
    if part not in PARTS:
        raise SettingError(f"part = {part!r}: expected one of {', '.join(PARTS)}")
    bank = (bank if isinstance(bank, Bank) else Bank.open(bank)).require_complete()
    if bank.header.signals:
        raise BankError(f"{bank.path} holds signals, of which x is drawn anew in every epoch; this needs a bank of x itself")
    apart, _ = set_apart(bank, whole_seed(seed), shares)
    if part == "training":
        good = bank.status == STATUS["ok"]
        good[apart.validation] = good[apart.held_out] = False
        rows = np.flatnonzero(good)
    else:
        rows = getattr(apart, part)
    data = bank.at(rows)
    return data["theta"], bank.header.x.unwrap({name: data[ds] for name, ds in dataset_names(bank.header).items()})


def set_apart(bank: Bank, seed: int, shares: dict[str, Any]) -> tuple[Split, TrainSettings]:
    """The split, and the settings that have its shares as figures."""
    for name in shares:
        if name not in SHARES:
            raise SettingError(f"no share is called {name!r}; known: {', '.join(SHARES)}")
    settings = filled(build_settings(TrainSettings, shares), bank, {"steps": 1, "ema": 0.0})
    return split(bank, seed, settings.validation, settings.held_out or 0.0, settings.held_out_most or 0), settings
