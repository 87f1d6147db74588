"""A segment: one immutable HDF5 file that holds a run of rows. Written whole or not at all, and read without trust.

    /theta (k, D) float64     /x (k, ...) or /x/<name> (k, ...)     /status (k,) uint8
    /block_sha256 (m, 32)     SHA-256 of each block's rows in this segment: theta, then x by name, then status
    /seconds (k,) float32     time of each row; facts of scheduling, outside every digest
    /failures/row, /message   first lines of what failed rows raised

Data are contiguous and uncompressed: a reader may map them at the dataset's offset. Reading follows no link, allocates
nothing by a declared shape alone, and runs no code: every dataset must lie inside the file, in the form named above.
"""

from __future__ import annotations

import hashlib
import os
import re
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import h5py
import numpy as np
from numpy.typing import NDArray

from sbiplat import files
from sbiplat.bank.layout import Header, pieces
from sbiplat.errors import BankError

_NAME = re.compile(r"(\d{12})-(\d{12})\.h5")
_MESSAGE_BYTES = 240
_MAX_MESSAGES = 1000


@dataclass
class Rows:
    """Rows first..first+len-1 in memory: theta (k, D), x name -> (k, ...), status (k,), seconds (k,), messages by row."""

    first: int
    theta: NDArray[np.float64]
    x: dict[str, NDArray[Any]]
    status: NDArray[np.uint8]
    seconds: NDArray[np.float32]
    messages: dict[int, str] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.status)

    @staticmethod
    def join(parts: list[Rows]) -> Rows:
        """Consecutive parts as one."""
        return Rows(
            parts[0].first, np.concatenate([p.theta for p in parts]),
            {k: np.concatenate([p.x[k] for p in parts]) for k in parts[0].x},
            np.concatenate([p.status for p in parts]), np.concatenate([p.seconds for p in parts]),
            {row: text for p in parts for row, text in p.messages.items()},
        )


@dataclass(frozen=True)
class Segment:
    """A committed segment: its file and the rows first..stop-1 that it holds."""

    path: Path
    first: int
    stop: int

    def __len__(self) -> int:
        return self.stop - self.first


def name_of(first: int, stop: int) -> str:
    """The file name of the segment of rows first..stop-1."""
    return f"{first:012d}-{stop:012d}.h5"


def listing(folder: Path) -> list[Segment]:
    """The committed segments of a folder by first row, longest first; temporary files are not among them."""
    found = []
    if folder.is_dir():
        with os.scandir(folder) as entries:
            for entry in entries:
                if match := _NAME.fullmatch(entry.name):
                    first, stop = int(match[1]), int(match[2])
                    if stop > first:
                        found.append(Segment(folder / entry.name, first, stop))
    return sorted(found, key=lambda s: (s.first, -s.stop))


def strangers(folder: Path) -> list[Path]:
    """Files of a folder of segments that are neither segments by name, nor hidden (temporary, or a file system's own), nor set aside."""
    names = sorted(p.name for p in folder.iterdir()) if folder.is_dir() else []
    return [folder / n for n in names if not (_NAME.fullmatch(n) or n.startswith(".") or ".damaged-" in n)]


def block_digest(theta: NDArray[Any], x: dict[str, NDArray[Any]], status: NDArray[Any]) -> bytes:
    """SHA-256 over the rows of one block (or the part of it that a bank has): theta, x by name, status."""
    digest = hashlib.sha256()
    for array in (theta, *(x[name] for name in sorted(x)), status):
        digest.update(np.ascontiguousarray(array).data)
    return digest.digest()


def dataset_names(header: Header) -> dict[str, str]:
    """Array of x -> its dataset."""
    return {name: "x" if header.x.plain else f"x/{name}" for name in header.x.shapes}


def row_shapes(header: Header) -> dict[str, tuple[tuple[int, ...], np.dtype[Any]]]:
    """Dataset -> (shape of a row, dtype), of all that a bank's digest covers."""
    names = dataset_names(header)
    return {
        "theta": ((header.prior.dim,), np.dtype("<f8")),
        **{names[k]: (shape, np.dtype(header.x.dtype).newbyteorder("<")) for k, shape in header.x.shapes.items()},
        "status": ((), np.dtype("u1")),
    }


def commit(folder: Path, header: Header, rows: Rows) -> Segment:
    """Write rows as one segment: temporary file, flush, fsync, rename."""
    segment = Segment(folder / name_of(rows.first, rows.first + len(rows)), rows.first, rows.first + len(rows))
    kept = "; what was committed before is kept"
    with files.disk_errors(segment.path, lambda: kept), files.atomic_path(segment.path) as temporary:
        write(temporary, header, rows)
    return segment


@contextmanager
def hdf5_in_memory(path: Path, **settings: Any) -> Iterator[h5py.File]:
    """An HDF5 file that is built in memory, then written in one go: on a full disk HDF5 itself may crash the process."""
    with h5py.File(path.name, "w", driver="core", backing_store=False, block_size=2**20, **settings) as file:
        yield file
        file.flush()
        image = file.id.get_file_image()
    path.write_bytes(image)


def write(path: Path, header: Header, rows: Rows) -> None:
    """The segment's content, to a path that is not yet the segment's."""
    names = dataset_names(header)
    with hdf5_in_memory(path) as file:
        label(file, "sbiplat segment 1", header, rows.first)
        file.attrs["host"] = np.bytes_(f"{socket.gethostname()}:{os.getpid()}")
        file["theta"] = rows.theta
        for name, values in rows.x.items():
            file[names[name]] = values
        file["status"] = rows.status
        spans = pieces(rows.first, rows.first + len(rows), header.block_size)
        hashes = [block_digest(rows.theta[a:b], {k: v[a:b] for k, v in rows.x.items()}, rows.status[a:b])
                  for a, b in ((a - rows.first, b - rows.first) for a, b in spans)]
        file["block_sha256"] = np.frombuffer(b"".join(hashes), np.uint8).reshape(-1, 32)
        file["seconds"] = rows.seconds
        shown = list(rows.messages.items())[:_MAX_MESSAGES]
        if shown:
            file["failures/row"] = np.array([row for row, _ in shown], np.int64)
            texts = [text.encode(errors="replace")[:_MESSAGE_BYTES].decode(errors="ignore").encode() for _, text in shown]
            file["failures/message"] = np.array(texts, f"S{_MESSAGE_BYTES}")


@dataclass(frozen=True)
class Opened:
    """A segment that was found to be in the right form: datasets' offsets for mapping, block hashes, facts."""

    segment: Segment
    offsets: dict[str, int]
    block_sha256: NDArray[np.uint8]

    def map(self, header: Header) -> dict[str, NDArray[Any]]:
        """Dataset -> read-only memory map of its rows."""
        size = len(self.segment)
        return {name: np.memmap(self.segment.path, dtype, "r", self.offsets[name], (size, *shape))
                for name, (shape, dtype) in row_shapes(header).items()}


# What h5py may raise where a file is damaged, whatever the damage.
DAMAGE = (OSError, RuntimeError, KeyError, ValueError, TypeError, AttributeError, OverflowError, MemoryError)


def inspect(segment: Segment, header: Header) -> Opened:
    """Open a segment and check its form; raises BankError that says what is wrong with which file."""
    path = segment.path
    try:
        size = path.stat().st_size
        with h5py.File(path, "r") as file:
            if not is_of(file, header):
                raise BankError(f"{path} belongs to another bank (simulator, prior or seed differ); move it away")
            if _attribute(file, "first_row", np.dtype("<i8")) != segment.first:
                raise BankError(f"{path} holds other rows than its name says: it was renamed; move it away")
            offsets = {name: _contiguous(file, name, (len(segment), *shape), dtype, size, path)
                       for name, (shape, dtype) in row_shapes(header).items()}
            _contiguous(file, "block_sha256", (blocks_of(segment, header), 32), np.dtype("u1"), size, path)
            return Opened(segment, offsets, file["block_sha256"][()])
    except DAMAGE as error:
        raise BankError(f"{path} is damaged: {_first_line(error)}; {mend(path)}") from None


def mend(path: Path) -> str:
    """What helps where a segment, or a packed bank, is damaged."""
    if path.parent.name == "segments":
        return f"`sbiplat bank verify {path.parent.parent} --repair` simulates its rows again"
    return "pack the bank again"


def label(file: h5py.File, format: str, header: Header, first: int) -> None:
    """Say in a file what it is. Texts have a fixed length: HDF5 may hang in the heap that others lie in, if it is damaged."""
    file.attrs["format"] = np.bytes_(format)
    file.attrs["bank_uid"] = np.bytes_(header.uid)
    file.attrs["first_row"] = np.int64(first)


def is_of(file: h5py.File, header: Header) -> bool:
    """Whether a file is labelled as this bank's."""
    uid = header.uid.encode()
    return bool(_attribute(file, "bank_uid", np.dtype(f"S{len(uid)}")) == uid)


def _attribute(file: h5py.File, name: str, dtype: np.dtype[Any]) -> Any:
    """A scalar attribute of this type, None where it has another."""
    known = name in file.attrs and file.attrs.get_id(name)
    return file.attrs[name] if known and known.dtype == dtype and known.shape == () else None


def blocks_of(segment: Segment, header: Header) -> int:
    """How many blocks a segment holds rows of."""
    return (segment.stop - 1) // header.block_size - segment.first // header.block_size + 1


def facts(segment: Segment) -> tuple[NDArray[np.float32], dict[int, str]]:
    """Seconds of each row, and messages of failed rows; empty where they cannot be read (no result depends on them)."""
    path = segment.path
    try:
        size = path.stat().st_size
        with h5py.File(path, "r") as file:
            _contiguous(file, "seconds", (len(segment),), np.dtype("<f4"), size, path)
            messages = {}
            if "failures" in file:
                count = min(file["failures/row"].shape[0], _MAX_MESSAGES)
                _contiguous(file, "failures/row", (count,), np.dtype("<i8"), size, path)
                _contiguous(file, "failures/message", (count,), np.dtype(f"S{_MESSAGE_BYTES}"), size, path)
                rows, texts = file["failures/row"][()], file["failures/message"][()]
                messages = {int(r): bytes(t).decode(errors="replace") for r, t in zip(rows, texts, strict=True)}
            return file["seconds"][()], messages
    except (*DAMAGE, BankError):
        return np.zeros(0, np.float32), {}


def no_seconds(count: int) -> NDArray[np.float32]:
    """What stands for times that cannot be read."""
    return np.zeros(count, np.float32)


def _contiguous(file: h5py.File, name: str, shape: tuple[int, ...], dtype: np.dtype[Any], size: int, path: Path) -> int:
    """The offset of a dataset that lies whole in this very file with this shape and dtype."""
    parent: Any = file
    for part in name.split("/"):
        if not isinstance(parent, h5py.Group) or not isinstance(parent.get(part, getlink=True), h5py.HardLink):
            raise BankError(f"{path} is damaged: it has no {name} of its own")
        parent = parent[part]
    if not isinstance(parent, h5py.Dataset) or parent.shape != shape or parent.dtype != dtype:
        found = f"{parent.dtype} {parent.shape}" if isinstance(parent, h5py.Dataset) else "a group"
        raise BankError(f"{path} is damaged: {name} is {found}, expected {dtype} {shape}")
    offset = parent.id.get_offset()
    if parent.chunks is not None or parent.external or parent.is_virtual or offset is None:
        raise BankError(f"{path} is damaged: {name} is not stored in one piece")
    if offset + dtype.itemsize * int(np.prod(shape, dtype=object)) > size:
        raise BankError(f"{path} is cut short: {name} ends beyond the end of the file; {mend(path)}")
    return int(offset)


def _first_line(error: BaseException) -> str:
    return (str(error) or repr(error)).splitlines()[0][:200]
