"""The index of a bank: bank.h5, which shows all segments as one file, and remembers where their data lie.

Any HDF5 program reads /theta, /x (or /x/<name>) and /status of the whole bank there. The group /segments holds what
`segment.inspect` found (names, sizes, offsets, block hashes), so that a large bank opens without opening its segments;
a segment whose size is not the remembered one is inspected anew. The index is a cache: without it nothing is lost.
"""

from __future__ import annotations

import math
import os
from pathlib import Path
from typing import Any

import h5py
import numpy as np
from numpy.typing import NDArray

from sbiplat import files
from sbiplat.bank import segment
from sbiplat.bank.layout import MISSING, Header
from sbiplat.bank.segment import Opened, Segment, hdf5_in_memory, row_shapes

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
    with files.disk_errors(path), files.atomic_path(path) as temporary, hdf5_in_memory(temporary, libver="latest") as file:
        segment.label(file, "sbiplat index 1", header, 0)
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


Remembered = dict[tuple[int, int, int], tuple[dict[str, int], NDArray[np.uint8]]]
_COLUMNS = ("first", "stop", "bytes", "offsets", "block_sha256")


def read(path: Path, header: Header) -> Remembered:
    """(first, stop, bytes) -> what the index remembers of that segment; empty where it is absent, damaged or another bank's."""
    try:
        with h5py.File(path, "r") as file:
            group, limit = file["segments"], path.stat().st_size
            own = all(isinstance(group.get(k, getlink=True), h5py.HardLink) and group[k].nbytes <= limit
                      and not group[k].is_virtual and not group[k].external for k in _COLUMNS)
            if not own or not segment.is_of(file, header):
                return {}
            return _remembered(header, *(group[k][()] for k in _COLUMNS))
    except (OSError, RuntimeError, KeyError, ValueError, TypeError, AttributeError, OverflowError, IndexError, MemoryError):
        return {}


def _remembered(header: Header, firsts: Any, stops: Any, sizes: Any, offsets: Any, hashes: Any) -> Remembered:
    """The columns as records, less those that cannot be."""
    shapes = row_shapes(header)
    found: Remembered = {}
    at = 0
    for first, stop, size, places in zip(firsts.tolist(), stops.tolist(), sizes.tolist(), offsets.tolist(), strict=True):
        count = segment.blocks_of(Segment(Path(), first, stop), header)
        ends = [place + dtype.itemsize * (stop - first) * math.prod(shape)
                for place, (shape, dtype) in zip(places, shapes.values(), strict=True)]
        if 0 <= first < stop and min(places) >= 0 and max(ends) <= size and at + count <= len(hashes):
            found[first, stop, size] = (dict(zip(shapes, places, strict=True)), hashes[at:at + count])
        at += count
    return found


def open_segments(folder: Path, header: Header, remembered: Remembered) -> list[Opened]:
    """Every segment of the folder, from memory where its size is the remembered one; raises BankError at the first bad one."""
    opened = []
    for item in segment.listing(folder):
        known = remembered.get((item.first, item.stop, os.stat(item.path).st_size))
        opened.append(Opened(item, *known) if known else segment.inspect(item, header))
    return opened
