"""Where a training's batches come from: rows of the bank, observed, moved by the symmetry and prepared for the net.

What is fixed in x is computed once a row where the rows fit in memory. What is another in every step, by `observe` or by augmentation, is
made anew for each batch, on the training device, from a generator that is fixed by (seed, epoch, step).
"""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sbiplat.bank.stream import Batches, Pairs, pairs_at, take
from sbiplat.estimators.base import Estimator
from sbiplat.progress import Progress
from sbiplat.training.begin import Plan

SCALE_ROWS = 50_000
SCALE_BYTES = 2**28
PREPARE_ROWS = 8192
_OBSERVED, _MOVED = 0x0B5E, 0xA06E


class Rows:
    """The rows that a training reads, as tensors: {"theta": (n, D), "x": {name: (n, ...)}}.

    scales: those that set the estimator's scales, with x as the simulator returns it. every_row: whether they are all that it trains on,
    and x of a row is the same in every step.
    """

    def __init__(self, wanted: Plan, seed: int, progress: Progress) -> None:
        bank, settings = wanted.bank, wanted.training
        self.seed, self.progress, self.threads, self.device = seed, progress, settings.threads, torch.device(settings.device)
        self._bank, self._apart, self._observe, self._augment = bank, wanted.apart, wanted.observe, wanted.augmentation
        self._batches = Batches(bank, wanted.apart, settings.batch_size or 1, seed, int(settings.memory_mb * 2**20))
        self.per_epoch = self._batches.per_epoch
        rows = max(1000, min(SCALE_ROWS, SCALE_BYTES // bank.header.x.row_bytes))
        self.scales = self._observed(self._tensors(self._batches.sample(rows), torch.device("cpu")), -2, 0)
        self.made_anew = wanted.observe is not None or wanted.augmentation is not None
        if wanted.augmentation is not None:
            progress.say(wanted.augmentation.words())
        self.every_row = not self.made_anew and len(self.scales["theta"]) >= wanted.apart.training_rows

    def to(self, estimator: Estimator) -> Rows:
        """The same, prepared from here on by an estimator whose scales are set."""
        self.estimator, self.resident, self.scales = estimator, None, {}
        self.validation = self._prepared(pairs_at(self._bank, self._apart.validation))
        if self._batches.resident:
            pairs = self._batches.release()
            self.resident = self._tensors(pairs) if self.made_anew else self._prepared(pairs)
        return self

    def epoch(self, number: int, skip: int) -> Iterator[dict[str, Any]]:
        """The batches of an epoch as the loss takes them, without the first `skip`."""
        if self.made_anew:
            for k, batch in enumerate(self._as_stored(number, skip), skip):
                seen = self._moved(self._observed(batch, number, k), number, k)
                yield {"theta": seen["theta"], "x": self.estimator.prepare(seen["x"])}
        elif self.resident is None:
            for pairs in self._batches.epoch(number, skip):
                yield self._prepared(pairs)
        else:
            yield from self._as_stored(number, skip)

    def _as_stored(self, number: int, skip: int) -> Iterator[dict[str, Any]]:
        """Batches as they stand in memory, or in the bank."""
        if self.resident is None:
            yield from map(self._tensors, self._batches.epoch(number, skip))
            return
        order = torch.as_tensor(self._batches.order(number), device=self.device)
        size = self._batches.batch_size
        for k in range(skip, self.per_epoch):
            yield take(self.resident, order[k * size:(k + 1) * size])

    def _observed(self, pairs: dict[str, Any], epoch: int, step: int) -> dict[str, Any]:
        """Tensors with x in place of the signal, where there is an observe; epoch -1 is validation, -2 the rows that set scales."""
        if self._observe is None:
            return pairs
        return {"theta": pairs["theta"], "x": self._observe(pairs["x"], pairs["parameters"], self._stream(_OBSERVED, epoch, step))}

    def _moved(self, pairs: dict[str, Any], epoch: int, step: int) -> dict[str, Any]:
        """Tensors moved by a step over the group, where the training augments."""
        if self._augment is None:
            return pairs
        generator = torch.Generator(self.device).manual_seed(self._stream(_MOVED, epoch, step))
        theta, x = self._augment(pairs["theta"], pairs["x"], generator)
        return {"theta": theta, "x": x}

    def _stream(self, use: int, epoch: int, step: int) -> int:
        return int(np.random.SeedSequence(self.seed, spawn_key=(use, epoch + 2, step)).generate_state(1, np.uint64)[0] >> 1)

    def _tensors(self, pairs: Pairs, device: torch.device | None = None) -> dict[str, Any]:
        device = device or self.device

        def tensor(values: Any) -> Tensor:
            return torch.as_tensor(np.ascontiguousarray(values), device=device)

        return {k: {n: tensor(a) for n, a in v.items()} if k == "x" else tensor(v) for k, v in pairs.items()}

    def _prepared(self, pairs: Pairs) -> dict[str, Any]:
        """Pairs as the loss takes them; in pieces, on as many threads as training has, so that little stands in memory twice."""
        starts = range(0, len(pairs["theta"]), PREPARE_ROWS)

        def piece(a: int) -> dict[str, Tensor]:
            part = self._observed(self._tensors(take(pairs, slice(a, a + PREPARE_ROWS))), -1, a)
            return self.estimator.prepare(part["x"])

        if len(starts) == 1:
            parts = [piece(0)]
        else:
            with one_thread(), ThreadPoolExecutor(self.threads) as pool, self.progress.task("prepare", len(starts)) as advance:
                parts = [(part, advance(1))[0] for part in pool.map(piece, starts)]
        return {"theta": torch.as_tensor(pairs["theta"], device=self.device), "x": {k: torch.cat([p[k] for p in parts]) for k in parts[0]}}


@contextmanager
def one_thread() -> Iterator[None]:
    """One thread an operation meanwhile: the threads of a pool each run operations of their own."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
