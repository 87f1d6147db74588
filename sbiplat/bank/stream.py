"""From a bank to training batches: which rows train, and in what order they come.

`split` sets rows aside, once and for all, for validation (early stopping) and for the gate, which training never sees.
`Batches` yields shuffled batches of the rest: from memory where the rows fit the budget, else streamed in slabs of
contiguous rows, which are shuffled, gathered in a buffer and shuffled again there. The order is a function of (seed, epoch).
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sbiplat.bank.bank import Bank
from sbiplat.bank.layout import STATUS
from sbiplat.bank.segment import dataset_names
from sbiplat.errors import BankError

SLAB_ROWS = 512
# {"theta": (n, D) unconstrained float32, "x": {name: (n, ...)}}; of a bank of signals also "parameters": theta as the user has it
Pairs = dict[str, Any]


@dataclass(frozen=True)
class Split:
    """Rows set aside from training: indices into the bank, in random order; and how many ok rows are left to train on."""

    validation: NDArray[np.int64]
    held_out: NDArray[np.int64]
    training_rows: int
    left_out: int

    def digest(self) -> str:
        return hashlib.sha256(self.validation.tobytes() + b"/" + self.held_out.tobytes()).hexdigest()


def split(bank: Bank, seed: int, validation: float, held_out: float, most: int) -> Split:
    """Choose the given shares of the ok rows at random (at most `most` of each), without listing the rest."""
    ok = bank.status == STATUS["ok"]
    rows = int(ok.sum())
    sizes = [min(most, max(1, round(rows * share))) for share in (validation, held_out)]
    if rows - sum(sizes) < 10:
        raise BankError(f"bank {bank.path} has {rows} rows that can be trained on ({bank.rows - rows} failed); that is too few")
    rng = np.random.default_rng(np.random.SeedSequence(seed, spawn_key=(0x5B17,)))
    wanted, chosen = sum(sizes), np.zeros(0, np.int64)
    drawn = min(bank.rows, int(1.1 * wanted * bank.rows / rows) + 100)
    while len(chosen) < wanted:
        candidates = rng.choice(bank.rows, drawn, replace=False)
        chosen = candidates[ok[candidates]][:wanted]
        drawn = min(bank.rows, 2 * drawn)
    return Split(chosen[:sizes[0]], chosen[sizes[0]:], rows - wanted, bank.rows - rows)


def pairs_at(bank: Bank, rows: NDArray[np.int64]) -> Pairs:
    """The given rows as (unconstrained theta, x)."""
    return _pairs(bank, bank.at(rows))


def _pairs(bank: Bank, data: dict[str, NDArray[Any]]) -> Pairs:
    pairs = {"theta": bank.header.prior.unconstrain(data["theta"]).astype(np.float32),
             "x": {name: data[ds] for name, ds in dataset_names(bank.header).items()}}
    return {**pairs, "parameters": data["theta"].astype(bank.header.x.dtype)} if bank.header.signals else pairs


def take(pairs: Pairs, index: Any) -> Pairs:
    """The pairs at an index or slice."""
    return {k: {n: a[index] for n, a in v.items()} if k == "x" else v[index] for k, v in pairs.items()}


def _join(parts: list[Pairs]) -> Pairs:
    return {k: {n: np.concatenate([p["x"][n] for p in parts]) for n in v} if k == "x" else np.concatenate([p[k] for p in parts])
            for k, v in parts[0].items()}


class Batches:
    """Shuffled batches of a bank's training rows, as numpy pairs; an epoch leaves out the last, incomplete batch.

    budget: bytes that the rows in memory may take. `resident` says whether all fit.
    """

    def __init__(self, bank: Bank, apart: Split, batch_size: int, seed: int, budget: int) -> None:
        self._bank, self._seed, self._training_rows = bank, seed, apart.training_rows
        self._out = np.sort(np.concatenate([apart.validation, apart.held_out]))
        self.batch_size = min(batch_size, apart.training_rows)
        self.per_epoch = apart.training_rows // self.batch_size
        row_bytes = bank.header.x.row_bytes + 4 * bank.header.prior.dim
        self.resident = 2 * row_bytes * bank.rows <= budget  # twice: rows and the copy that a selection makes
        self._buffer_rows = max(4 * SLAB_ROWS, self.batch_size, budget // (4 * row_bytes))
        self._all: Pairs | None = None
        self._buffer: dict[str, NDArray[Any]] | None = None

    def sample(self, rows: int) -> Pairs:
        """Up to `rows` training rows spread over the bank, for setting scales."""
        rng = np.random.default_rng(np.random.SeedSequence(self._seed, spawn_key=(0x5CA1E,)))
        slabs = self._slabs()
        parts, count = [], 0
        for k in rng.permutation(len(slabs)):
            parts.append(self._rows(*slabs[k]))
            count += len(parts[-1]["theta"])
            if count >= rows:
                break
        return take(_join(parts), slice(rows))

    def epoch(self, number: int, skip: int = 0) -> Iterator[Pairs]:
        """The batches of an epoch, without the first `skip`."""
        rng = np.random.default_rng(np.random.SeedSequence(self._seed, spawn_key=(0xE90C, number)))
        source = self._resident_epoch(rng) if self.resident else self._streamed_epoch(rng)
        for k, batch in enumerate(source):
            if k >= skip:
                yield batch() if callable(batch) else batch

    def resident_pairs(self) -> Pairs:
        """All training rows in memory."""
        if self._all is None:
            self._all = self._gathered()
        return self._all

    def release(self) -> Pairs:
        """All training rows, which are then the caller's alone."""
        pairs, self._all = self.resident_pairs(), None
        return pairs

    def order(self, number: int) -> NDArray[np.int64]:
        """The order of an epoch over resident rows."""
        rng = np.random.default_rng(np.random.SeedSequence(self._seed, spawn_key=(0xE90C, number)))
        return rng.permutation(self._training_rows)

    def _resident_epoch(self, rng: np.random.Generator) -> Iterator[Any]:
        pairs = self.resident_pairs()
        order = rng.permutation(len(pairs["theta"]))
        for k in range(self.per_epoch):
            chosen = order[k * self.batch_size:(k + 1) * self.batch_size]
            yield lambda chosen=chosen: take(pairs, chosen)

    def _streamed_epoch(self, rng: np.random.Generator) -> Iterator[Any]:
        """Slabs in random order are read into one buffer, whose good rows are shuffled, emitted and filled up again."""
        slabs = self._slabs()
        if self._buffer is None:
            self._buffer = self._bank.empty(self._buffer_rows + SLAB_ROWS + self.batch_size)
        buffer = self._buffer
        good: list[NDArray[np.int64]] = []  # the places in the buffer of rows that train
        at = count = made = 0
        for k in rng.permutation(len(slabs)):
            first, stop = slabs[k]
            self._bank.read_into(first, stop, buffer, at)
            good.append(at + np.flatnonzero(self._trains(first, stop, buffer["status"][at:at + stop - first])))
            at, count = at + stop - first, count + len(good[-1])
            if count >= self._buffer_rows or at + SLAB_ROWS > len(buffer["status"]):
                places, whole = self._shuffled(good, rng, self.per_epoch - made)
                yield from self._emit(buffer, places[:whole * self.batch_size])
                made += whole
                rest = places[whole * self.batch_size:]
                for values in buffer.values():
                    values[:len(rest)] = values[rest]
                good, at, count = [np.arange(len(rest))], len(rest), len(rest)
        if count:
            places, whole = self._shuffled(good, rng, self.per_epoch - made)
            yield from self._emit(buffer, places[:whole * self.batch_size])

    def _shuffled(self, good: list[NDArray[np.int64]], rng: np.random.Generator, most: int) -> tuple[NDArray[np.int64], int]:
        """The places in random order, and how many whole batches they make, at most `most`."""
        places = np.concatenate(good)
        return places[rng.permutation(len(places))], min(most, len(places) // self.batch_size)

    def _emit(self, buffer: dict[str, NDArray[Any]], places: NDArray[np.int64]) -> Iterator[Pairs]:
        """Batches of the buffer's rows at these places; the prior's bijection is applied to many rows at once."""
        theta = dict(zip(("theta", "parameters"), self._parameters(buffer["theta"][places]), strict=False))
        for a in range(0, len(places), self.batch_size):
            part = slice(a, a + self.batch_size)
            yield {**{k: v[part] for k, v in theta.items()},
                   "x": {name: buffer[ds][places[part]] for name, ds in dataset_names(self._bank.header).items()}}

    def _parameters(self, theta: NDArray[np.float64]) -> tuple[NDArray[Any], ...]:
        header = self._bank.header
        z = header.prior.unconstrain(theta).astype(np.float32)
        return (z, theta.astype(header.x.dtype)) if header.signals else (z,)

    def _gathered(self) -> Pairs:
        """All training rows in arrays of just their size: little stands in memory twice."""
        out, at = self._bank.empty(self._training_rows), 0
        for first, stop in self._slabs(64 * SLAB_ROWS):
            data = self._bank.read(first, stop)
            keep = self._trains(first, stop, data["status"])
            count = int(keep.sum())
            for name, values in data.items():
                np.compress(keep, values, axis=0, out=out[name][at:at + count])
            at += count
        return _pairs(self._bank, out)

    def _slabs(self, rows: int = SLAB_ROWS) -> list[tuple[int, int]]:
        return [(a, min(a + rows, self._bank.rows)) for a in range(0, self._bank.rows, rows)]

    def _trains(self, first: int, stop: int, status: NDArray[np.uint8]) -> NDArray[np.bool_]:
        """Which of the rows first..stop-1 are trained on: those that did not fail and are not set aside."""
        keep = status == STATUS["ok"]
        keep[self._out[np.searchsorted(self._out, first):np.searchsorted(self._out, stop)] - first] = False
        return keep

    def _rows(self, first: int, stop: int) -> Pairs:
        data = self._bank.read(first, stop)
        keep = self._trains(first, stop, data["status"])
        return _pairs(self._bank, {k: v[keep] for k, v in data.items()})
