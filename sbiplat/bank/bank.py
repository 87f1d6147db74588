"""Banks: (theta, x, status) rows drawn from one simulator, one prior and one seed.

`Bank` opens, reads, verifies and packs one; `sbiplat.bank.fill` makes it. The content, and with it the digest, depends on the
header (simulator, prior, seed, block size, rows) and on nothing else: not on workers, ranks, order, crashes or resumes.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from bisect import bisect_left, bisect_right
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import h5py
import numpy as np
from numpy.typing import NDArray

from sbiplat import files
from sbiplat.bank import index, segment
from sbiplat.bank.layout import FORMAT_VERSION, STATUS, Header, pieces, row_bytes
from sbiplat.bank.segment import Opened, Segment, dataset_names, row_shapes
from sbiplat.errors import BankError
from sbiplat.progress import Progress, silent

CHUNK_BYTES = 16 * 2**20
MOST_KINDS = 1000


@dataclass(frozen=True)
class Problem:
    """One thing that `Bank.verify` found wrong."""

    where: str
    what: str

    def __str__(self) -> str:
        return f"{self.where}: {self.what}"


class Bank:
    """A bank on disk: a directory, or one packed .h5 file. Reading never changes it, and holds no file open.

    theta is float64 (rows, D); x a dict of arrays (rows, ...), where a plain array has the name "x"; status uint8.
    """

    def __init__(self, path: Path, header: Header, opened: list[Opened]) -> None:
        self.path, self.header, self._opened = path, header, opened
        self._parts, self.gaps = index.cover(opened, header.rows)
        self._firsts = [first for _, first, _ in self._parts]

    @classmethod
    def open(cls, path: str | Path) -> Bank:
        """Open a bank; raises BankError where it is none, is damaged, or is of another format."""
        path = Path(path)
        if path.is_file():
            return _open_packed(path)
        header = read_header(path)
        remembered = index.read(path / "bank.h5", header)
        return cls(path, header, index.open_segments(path / "segments", header, remembered))

    # -------------------------------------------------------------------------------------------------- contents

    @cached_property
    def _shapes(self) -> dict[str, tuple[tuple[int, ...], np.dtype[Any]]]:
        return row_shapes(self.header)

    @property
    def rows(self) -> int:
        """Rows wanted; `complete` says whether all are there."""
        return self.header.rows

    def __len__(self) -> int:
        return self.rows

    @property
    def complete(self) -> bool:
        return not self.gaps

    @property
    def present(self) -> int:
        """Rows that are there."""
        return self.rows - sum(stop - first for first, stop in self.gaps)

    def require_complete(self) -> Bank:
        """This bank, or a BankError that says how much of it is missing and the mend."""
        if self.gaps:
            first, stop = self.gaps[0]
            raise BankError(f"bank {self.path} lacks {self.rows - self.present} of its {self.rows} rows (first rows {first} to "
                            f"{stop - 1}); run the same `sbiplat simulate {self.header.simulator['name']} --n {self.rows} "
                            f"--seed {self.header.seed} --out {self.path}` to fill it")
        return self

    def first(self, rows: int) -> Bank:
        """The same bank as it was when it had only `rows` rows."""
        if rows > self.rows:
            raise BankError(f"bank {self.path} has {self.rows} rows, {rows} are needed; extend it with "
                            f"sbiplat simulate --n {rows}")
        return Bank(self.path, self.header.with_rows(rows), self._opened)

    @property
    def segments(self) -> list[Opened]:
        """Its segments, by first row."""
        return list(self._opened)

    def slab(self, part: Opened, first: int, stop: int, names: list[str] | None = None) -> dict[str, NDArray[Any]]:
        """Rows first..stop-1 of one segment, by ordinary file reads: dataset (by default each) -> array."""
        return self._slab(part, first, stop, names or list(row_shapes(self.header)))

    @property
    def theta(self) -> NDArray[np.float64]:
        """All parameters, in memory: (rows, D)."""
        return self.read(0, self.rows)["theta"]

    @property
    def x(self) -> Any:
        """All observations, in memory, in the user's own form."""
        data = self.read(0, self.rows)
        return self.header.x.unwrap({name: data[ds] for name, ds in dataset_names(self.header).items()})

    @cached_property
    def status(self) -> NDArray[np.uint8]:
        """The status of every row, (rows,): see layout.STATUS."""
        return np.concatenate([self._slab(p, a, b, ["status"])["status"] for p, a, b in self.require_complete()._parts])

    def status_counts(self) -> dict[str, int]:
        """Rows present by status."""
        parts = [self._slab(p, a, b, ["status"])["status"] for p, a, b in self._parts]
        counts = np.bincount(np.concatenate([np.zeros(0, np.uint8), *parts]), minlength=len(STATUS))
        return {name: int(counts[code]) for name, code in STATUS.items()}

    def read(self, first: int, stop: int) -> dict[str, NDArray[Any]]:
        """Rows first..stop-1 by ordinary file reads (no mapped pages stay behind): dataset -> array."""
        out = self.empty(stop - first)
        self.read_into(first, stop, out, 0)
        return out

    def empty(self, count: int) -> dict[str, NDArray[Any]]:
        """Room for so many rows: dataset -> array."""
        return {name: np.empty((count, *shape), dtype) for name, (shape, dtype) in self._shapes.items()}

    def read_into(self, first: int, stop: int, out: dict[str, NDArray[Any]], at: int) -> None:
        """Rows first..stop-1 into rows at, at + 1, ... of the arrays in `out`, without a copy between."""
        self.require_complete()
        nearest = max(bisect_right(self._firsts, first) - 1, 0)
        for part, a, b in self._parts[nearest:bisect_left(self._firsts, stop)]:
            a, b = max(a, first), min(b, stop)
            self._slab_into(part, a, b, out, at + a - first)

    def at(self, rows: NDArray[np.int64]) -> dict[str, NDArray[Any]]:
        """The given rows, in the given order, through memory maps: dataset -> array."""
        self.require_complete()
        rows = np.asarray(rows, np.int64)
        if len(rows) and not 0 <= rows.min() <= rows.max() < self.rows:
            raise IndexError(f"bank {self.path} has rows 0 to {self.rows - 1}")
        out = {name: np.empty((len(rows), *shape), dtype) for name, (shape, dtype) in row_shapes(self.header).items()}
        which = np.searchsorted(self._firsts, rows, "right") - 1
        order = np.argsort(which, kind="stable")
        for here in np.split(order, np.flatnonzero(np.diff(which[order])) + 1) if len(rows) else ():
            part = self._parts[which[here[0]]][0]
            for name, values in part.map(self.header).items():
                out[name][here] = values[rows[here] - part.segment.first]
        return out

    def _slab(self, part: Opened, first: int, stop: int, names: list[str]) -> dict[str, NDArray[Any]]:
        out = {name: np.empty((stop - first, *self._shapes[name][0]), self._shapes[name][1]) for name in names}
        self._slab_into(part, first, stop, out, 0)
        return out

    def _slab_into(self, part: Opened, first: int, stop: int, out: dict[str, NDArray[Any]], at: int) -> None:
        try:
            file = part.segment.path.open("rb", buffering=0)
        except FileNotFoundError:
            raise BankError(f"{part.segment.path} has gone since the bank was opened (bank compact moves rows); run the same command again"
                            ) from None
        with file:
            for name, values in out.items():
                target = values[at:at + stop - first].reshape(-1).view(np.uint8)
                file.seek(part.offsets[name] + (first - part.segment.first) * len(target) // (stop - first))
                done = 0
                while done < len(target):
                    count = file.readinto(target[done:])
                    if not count:
                        raise BankError(f"{part.segment.path} is cut short; `sbiplat bank verify {self.path}` says what is missing")
                    done += count

    # ---------------------------------------------------------------------------------------------------- digest

    @cached_property
    def digest(self) -> str:
        """SHA-256 of the content: names, shapes and dtypes, then each block's own SHA-256 in order.

        Computed from the hashes that were stored with the blocks; `verify` holds those against the data.
        """
        return self._digest(stored if stored is not None else self.digest_of_rows(a, b) for a, b, stored in self._block_digests())

    def digest_of_bytes(self, progress: Progress = silent) -> str:
        """The digest from every byte of the content, whatever hashes are stored."""
        def blocks() -> Iterator[bytes]:
            with progress.task("read", self.rows) as advance:
                for first, stop, _ in self._block_digests():
                    yield self.digest_of_rows(first, stop)
                    advance(stop - first)

        return self._digest(blocks())

    def _digest(self, blocks: Iterator[bytes]) -> str:
        total = hashlib.sha256(files.canonical({n: [list(s), str(d)] for n, (s, d) in row_shapes(self.header).items()}))
        for block in blocks:
            total.update(block)
        return total.hexdigest()

    def _block_digests(self) -> Iterator[tuple[int, int, bytes | None]]:
        """(first, stop, stored hash) of every block, None where no segment holds just these rows of it."""
        self.require_complete()
        size, stored = self.header.block_size, {}
        for part, _, _ in self._parts:
            first_block = part.segment.first // size
            for k, value in enumerate(part.block_sha256):
                a = max(part.segment.first, (first_block + k) * size)
                stored[a, min(part.segment.stop, (first_block + k + 1) * size)] = value.tobytes()
        for first in range(0, self.rows, size):
            stop = min(first + size, self.rows)
            yield first, stop, stored.get((first, stop))

    def digest_of_rows(self, first: int, stop: int) -> bytes:
        """SHA-256 of rows of one block, from the data."""
        return self._digest_of(self.read(first, stop))

    def _digest_of(self, data: dict[str, NDArray[Any]]) -> bytes:
        x = {name: data[dataset] for name, dataset in dataset_names(self.header).items()}
        return segment.block_digest(data["theta"], x, data["status"])

    def verify(self, progress: Progress = silent) -> list[Problem]:
        """Read every byte and hold it against the stored hashes; returns what is wrong, empty where nothing is."""
        problems = [Problem(str(self.path), f"rows {first} to {stop - 1} are missing") for first, stop in self.gaps]
        return problems + self.verify_segments(progress)

    def verify_segments(self, progress: Progress = silent) -> list[Problem]:
        """The same for the rows that are there, whether or not others are missing."""
        problems = []
        with progress.task("verify", len(self._opened)) as advance:
            for part in self._opened:
                problems += [Problem(str(part.segment.path), what) for what in self._verify_segment(part)]
                advance(1)
        return problems

    def _verify_segment(self, part: Opened) -> list[str]:
        try:
            fresh = part if self.path.is_file() else segment.inspect(part.segment, self.header)
            found = []
            stored = iter(fresh.block_sha256)
            for first, stop in self._chunks(part.segment.first, part.segment.stop):
                data = self.slab(fresh, first, stop)
                for a, b in pieces(first, stop, self.header.block_size):
                    if self._digest_of(_rows_of(data, a - first, b - first)) != next(stored).tobytes():
                        found.append(f"rows {a} to {b - 1} do not match their SHA-256: damaged since they were written; "
                                     f"{segment.mend(part.segment.path)}")
            return found
        except BankError as error:
            return [str(error)]

    def _chunks(self, first: int, stop: int) -> list[tuple[int, int]]:
        """Row ranges that cut first..stop at block boundaries into about CHUNK_BYTES each."""
        blocks = max(1, CHUNK_BYTES // (row_bytes(self.header) * self.header.block_size))
        return pieces(first, stop, blocks * self.header.block_size)

    # ------------------------------------------------------------------------------------------------------ facts

    def info(self) -> dict[str, Any]:
        """What `sbiplat bank info` shows; plain JSON."""
        seconds, kinds = 0.0, FailureKinds()
        for part in self._opened:
            time, text = segment.facts(part.segment)
            seconds += float(time.sum(dtype=float))
            kinds.add(text)
        return {
            "path": str(self.path), "format_version": FORMAT_VERSION, "simulator": self.header.simulator["name"],
            "rows": self.rows, "present": self.present, "complete": self.complete,
            "digest": self.digest if self.complete else None, "status": self.status_counts(),
            "seed": self.header.seed, "block_size": self.header.block_size, "segments": len(self._opened),
            "bytes": sum(p.segment.path.stat().st_size for p in self._opened),
            "simulation_seconds": seconds, "parameters": list(self.header.prior.names),
            "x": self.header.x.to_json()["shapes"], "dtype": self.header.x.dtype, "created": self.header.created,
            "versions": self.header.versions,
            "first_failures": kinds.first(),
        }

    def pack(self, out: str | Path, progress: Progress = silent) -> Path:
        """Copy the bank into one ordinary .h5 file, which `Bank.open` opens as well; bounded memory."""
        self.require_complete()
        out = Path(out)
        with files.disk_errors(out), files.atomic_path(out) as temporary:
            _make_room(temporary, self.rows * row_bytes(self.header))
            self._pack_into(temporary, progress)
        return out

    def _pack_into(self, path: Path, progress: Progress) -> None:
        with h5py.File(path, "w") as file, progress.task("pack", self.rows) as advance:
            for name, (shape, dtype) in self._shapes.items():
                file.create_dataset(name, (self.rows, *shape), dtype)
            hashes = []
            for first, stop in self._chunks(0, self.rows):
                data = self.read(first, stop)
                for name, values in data.items():
                    file[name][first:stop] = values
                hashes += [self._digest_of(_rows_of(data, a - first, b - first)) for a, b in pieces(first, stop, self.header.block_size)]
                advance(stop - first)
            file["block_sha256"] = np.frombuffer(b"".join(hashes), np.uint8).reshape(-1, 32)
            segment.label(file, "sbiplat bank 1", self.header, 0)
            file.attrs.update({"digest": np.bytes_(self.digest), "parameters": list(self.header.prior.names),
                               "units": list(self.header.prior.units)})
            file["header"] = np.bytes_(json.dumps(self.header.to_json()))


def _rows_of(data: dict[str, NDArray[Any]], first: int, stop: int) -> dict[str, NDArray[Any]]:
    return {name: values[first:stop] for name, values in data.items()}


def _make_room(path: Path, size: int) -> None:
    """Raise OSError now if the disk or a quota has no room for `size` bytes: HDF5 may crash when it finds out midway."""
    with path.open("wb") as file:
        os.posix_fallocate(file.fileno(), 0, size)


def read_header(path: Path) -> Header:
    """The header of the bank at `path`; raises BankError where there is none or it is damaged."""
    if not path.is_dir():
        raise BankError(f"no bank at {path}; make one with `sbiplat simulate SIM --n N --seed S --out {path}`")
    return Header.from_json(files.read_json(path / "bank.json", "bank.json (is this a bank?)", BankError), path / "bank.json")


def _open_packed(path: Path) -> Bank:
    try:
        with h5py.File(path, "r") as file:
            item = file.get("header", getlink=True)
            if not isinstance(item, h5py.HardLink) or file["header"].shape != () or file["header"].dtype.kind != "S":
                raise BankError(f"{path} is not a packed bank")
            header = Header.from_json(dict(json.loads(bytes(file["header"][()]))), path)
    except segment.DAMAGE as error:
        raise BankError(f"{path} is not a packed bank: {(str(error) or repr(error)).splitlines()[0]}") from None
    # A packed bank holds the rows it shows, no more: it reads as a scalar bank's single segment.
    return Bank(path, header, [segment.inspect(Segment(path, 0, header.rows), header)])


class FailureKinds:
    """The first row of each kind of failure and how many are like it, in bounded memory.

    Messages that differ in numbers alone are one kind. Past `MOST_KINDS` of them, new ones are not told apart any more.
    """

    def __init__(self) -> None:
        self._kinds: dict[str, tuple[int, str, int]] = {}

    def add(self, messages: dict[int, str]) -> None:
        for row, message in messages.items():
            kind = re.sub(r"[-+]?[\d.]+(e[-+]?\d+)?", "#", message)
            kind = kind if kind in self._kinds or len(self._kinds) < MOST_KINDS else ""
            first, text, alike = self._kinds.get(kind, (row, message, 0))
            self._kinds[kind] = (*((row, message) if row < first else (first, text)), alike + 1)

    def first(self, most: int = 10) -> list[dict[str, Any]]:
        """Plain JSON, by row."""
        return [{"row": row, "message": text, "rows_alike": alike} for row, text, alike in sorted(self._kinds.values())[:most]]
