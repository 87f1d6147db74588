"""The index of a bank: bank.h5, which shows all segments as one file, and remembers where their data lie.

Any HDF5 program reads /theta, /x (or /x/<name>) and /status of the whole bank there. The group /segments holds what
`segment.inspect` found (names, sizes, offsets, block hashes), so that a large bank opens without opening its segments;
a segment whose size is not the remembered one is inspected anew. The index is a cache: without it nothing is lost.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import h5py
import numpy as np
from numpy.typing import NDArray

from sbiplat import files
from sbiplat.bank import segment
from sbiplat.bank.layout import MISSING, Header, pieces
from sbiplat.bank.segment import Opened, Segment, row_shapes

Cover = list[tuple[Opened, int, int]]  # (segment, first, stop): the segment answers for rows first..stop-1


def cover(opened: list[Opened], rows: int) -> tuple[Cover, list[tuple[int, int]]]:
    """Which segment answers for which of the rows 0..rows-1, and the gaps that none holds. Equal rows may stand twice."""
    parts: Cover = []
    gaps: list[tuple[int, int]] = []
    reached = 0
    for item in opened:  # sorted by first row
        if item.segment.first >= rows:
            break
        if item.segment.first > reached:
            gaps.append((reached, item.segment.first))
            reached = item.segment.first
        stop = min(item.segment.stop, rows)
        if stop > reached:
            parts.append((item, reached, stop))
            reached = stop
    if reached < rows:
        gaps.append((reached, rows))
    return parts, gaps


def write(path: Path, header: Header, opened: list[Opened]) -> None:
    """Write the index over these segments, atomically."""
    parts, _ = cover(opened, header.rows)
    names = list(row_shapes(header))
    with files.disk_errors(path), files.atomic_path(path) as temporary, h5py.File(temporary, "w", libver="latest") as file:
        file.attrs["bank_uid"] = header.uid
        file.attrs["rows"] = header.rows
        for name, (shape, dtype) in row_shapes(header).items():
            layout = h5py.VirtualLayout((header.rows, *shape), dtype)
            for item, first, stop in parts:
                source = h5py.VirtualSource(f"segments/{item.segment.path.name}", name, (len(item.segment), *shape), dtype)
                offset = item.segment.first
                layout[first:stop] = source[first - offset:stop - offset]
            file.create_virtual_dataset(name, layout, fillvalue=MISSING if name == "status" else np.nan)
        group = file.create_group("segments")
        group["first"] = np.array([o.segment.first for o in opened], np.int64)
        group["stop"] = np.array([o.segment.stop for o in opened], np.int64)
        group["bytes"] = np.array([o.segment.path.stat().st_size for o in opened], np.int64)
        group["offsets"] = np.array([[o.offsets[n] for n in names] for o in opened], np.int64).reshape(-1, len(names))
        group["block_sha256"] = np.concatenate([np.zeros((0, 32), np.uint8), *(o.block_sha256 for o in opened)])


def read(path: Path, header: Header) -> dict[tuple[int, int, int], tuple[dict[str, int], NDArray[np.uint8]]]:
    """(first, stop, bytes) -> what the index remembers of that segment; empty where it is absent, damaged or of another bank."""
    names = list(row_shapes(header))
    try:
        with h5py.File(path, "r") as file:
            if file.attrs.get("bank_uid") != header.uid:
                return {}
            group = file["segments"]
            limit = path.stat().st_size
            if any(not isinstance(group.get(k, getlink=True), h5py.HardLink) or group[k].nbytes > limit or group[k].is_virtual
                   for k in ("first", "stop", "bytes", "offsets", "block_sha256")):
                return {}
            columns = {k: group[k][()] for k in ("first", "stop", "bytes", "offsets", "block_sha256")}
    except (OSError, RuntimeError, KeyError, ValueError, TypeError, AttributeError):
        return {}
    found: dict[tuple[int, int, int], Any] = {}
    at = 0
    for first, stop, size, offsets in zip(*(columns[k] for k in ("first", "stop", "bytes", "offsets")), strict=True):
        count = len(pieces(int(first), int(stop), header.block_size))
        ends = [int(o) + dtype.itemsize * int(stop - first) * int(np.prod(shape, dtype=object))
                for o, (shape, dtype) in zip(offsets, row_shapes(header).values(), strict=True)]
        if min(offsets) >= 0 and max(ends) <= size:
            found[int(first), int(stop), int(size)] = (dict(zip(names, map(int, offsets), strict=True)),
                                                       columns["block_sha256"][at:at + count])
        at += count
    return found


def open_segments(folder: Path, header: Header, remembered: dict[tuple[int, int, int], Any]) -> list[Opened]:
    """Every segment of the folder in the right form, from memory where it is unchanged; raises BankError at the first that is not."""
    opened = []
    for item in segment.listing(folder):
        known = remembered.get((item.first, item.stop, os.stat(item.path).st_size))
        opened.append(Opened(Segment(item.path, item.first, item.stop), *known) if known else segment.inspect(item, header))
    return opened
