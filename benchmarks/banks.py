r"""Reading banks: a shuffled epoch from a bank larger than its memory budget, verify, pack, and opening a very large one.

Each measurement is a process of its own, on one thread, interleaved, medians. The epoch is laid beside np.memmap over one flat file
with the same rows: read in order in batches (no shuffle), and gathered at random (a full shuffle). RSS is the process's peak above
what it had after its imports. Files are in the page cache, which is told apart by nothing here: the disk's own speed comes on top.

    python benchmarks/banks.py --rows 2000000 --repeats 3
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
from common import Cells, peak, table

import sbiplat as sp
from sbiplat.bank import index
from sbiplat.bank.bank import Bank
from sbiplat.bank.layout import Header, row_bytes
from sbiplat.bank.segment import Opened, Segment, blocks_of, name_of, row_shapes
from sbiplat.bank.stream import Batches, split
from sbiplat.files import write_json
from sbiplat.progress import silent

HERE = Path(__file__).parent
SIZE, BATCH, BUDGET_MB = 250, 1024, 256


@sp.simulator(prior=sp.Prior({"a": sp.Uniform(0.0, 1.0), "b": sp.Uniform(0.0, 1.0)}), x_shape=(SIZE,), batched=True)
def wide(theta, rng):
    """Rows of a kilobyte."""
    return theta[:, :1].astype(np.float32) + rng.standard_normal((len(theta), SIZE), dtype=np.float32)


@sp.simulator(prior=sp.Prior({"a": sp.Normal(0.0, 1.0)}), x_shape=(24,), batched=True)
def narrow(theta, rng):
    """Rows of a hundred bytes."""
    return theta.astype(np.float32) + rng.standard_normal((len(theta), 24), dtype=np.float32)


def epoch(path: Path) -> dict[str, float]:
    bank, before = Bank.open(path), peak()
    budget = min(BUDGET_MB * 2**20, bank.rows * row_bytes(bank.header))
    batches = Batches(bank, split(bank, 0, 0.001, 0.001, 1000), BATCH, 0, budget)
    assert not batches.resident
    for _ in batches.epoch(1):  # memory is touched for the first time
        pass
    start, rows = time.perf_counter(), 0
    for pairs in batches.epoch(0):
        rows += len(pairs["theta"])
    return {"rows_per_s": rows / (time.perf_counter() - start), "rss_mb": peak() - before}


def memmap(path: Path, shuffled: bool) -> dict[str, float]:
    x = np.memmap(path.with_suffix(".flat"), np.float32, "r").reshape(-1, SIZE)
    order = np.random.default_rng(0).permutation(len(x)) if shuffled else None
    before = peak()
    for _ in range(2):  # the second time counts, as above
        start = time.perf_counter()
        for a in range(0, len(x) - BATCH + 1, BATCH):
            _ = x[order[a:a + BATCH]] if order is not None else np.array(x[a:a + BATCH])
    return {"rows_per_s": len(x) // BATCH * BATCH / (time.perf_counter() - start), "rss_mb": peak() - before}


def verify(path: Path) -> dict[str, float]:
    bank = Bank.open(path)
    before, start = peak(), time.perf_counter()
    assert not bank.verify()
    return {"gb_per_s": bank.rows * row_bytes(bank.header) / 1e9 / (time.perf_counter() - start), "rss_mb": peak() - before}


def pack(path: Path) -> dict[str, float]:
    bank, before = Bank.open(path), peak()
    for _ in range(2):  # the second time counts: a virtual machine may be slow to find pages that it never had
        start = time.perf_counter()
        out = bank.pack(path.with_suffix(".h5"))
        seconds = time.perf_counter() - start
        out.unlink()
    return {"gb_per_s": bank.rows * row_bytes(bank.header) / 1e9 / seconds, "rss_mb": peak() - before}


def plain(path: Path) -> dict[str, float]:
    """Writing as many bytes to a plain file, flushed to the disk: what pack can reach at most."""
    bank, data = Bank.open(path), np.random.default_rng(0).bytes(16 * 2**20)
    count, out = bank.rows * row_bytes(bank.header) // len(data), path.with_suffix(".plain")
    before = peak()
    for _ in range(2):
        start = time.perf_counter()
        with out.open("wb", buffering=0) as file:
            for _ in range(count):
                file.write(data)
            os.fsync(file.fileno())
        seconds = time.perf_counter() - start
        out.unlink()
    return {"gb_per_s": count * len(data) / 1e9 / seconds, "rss_mb": peak() - before}


def opening(path: Path) -> dict[str, float]:
    start = time.perf_counter()
    bank = Bank.open(path)
    assert bank.complete
    return {"seconds": time.perf_counter() - start, "segments": len(bank.segments)}


def very_large(path: Path, rows: int = 10**8) -> None:
    """A bank of 10^8 rows as far as opening it goes: header, index, and segments that are holes of the right size."""
    (path / "segments").mkdir(parents=True)
    header = Header.of(wide, 1, rows, None)
    write_json(path / "bank.json", header.to_json())
    each, opened = 64 * header.block_size, []
    for first in range(0, header.stored_rows, each):
        stop = min(first + each, header.stored_rows)
        item = Segment(path / "segments" / name_of(first, stop), first, stop)
        with item.path.open("wb") as file:
            file.truncate(len(item) * row_bytes(header) + 4096)
        opened.append(Opened(item, dict.fromkeys(row_shapes(header), 4096), np.zeros((blocks_of(item, header), 32), np.uint8)))
    index.write(path / "bank.h5", header, opened)


WHAT = {"epoch": epoch, "memmap in order": lambda p: memmap(p, False), "memmap at random": lambda p: memmap(p, True),
        "verify": verify, "pack": pack, "plain file": plain, "open": opening}


def apart(what: str, path: Path) -> Any:
    """A measurement in a process of its own."""
    words = [sys.executable, str(HERE / "banks.py"), "--child", what, str(path)]
    return json.loads(subprocess.run(words, check=True, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"}).stdout)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--rows", type=int, default=2_000_000)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--child", nargs=2)
    arguments = parser.parse_args()
    if arguments.child:
        print(json.dumps(WHAT[arguments.child[0]](Path(arguments.child[1]))))
        return
    cells = Cells("banks")
    sizes = [arguments.rows // 10, arguments.rows]
    with tempfile.TemporaryDirectory() as folder:
        for rows in sizes:
            if all(f"{what}; {rows}; {k}" in cells.content["cells"] for what in WHAT for k in range(arguments.repeats) if what != "open"):
                continue
            path = Path(folder) / str(rows)
            sp.simulate(wide, rows, 1, path, progress=silent)
            with path.with_suffix(".flat").open("wb") as file:
                for first in range(0, rows, 100_000):
                    file.write(Bank.open(path).read(first, min(first + 100_000, rows))["x"].tobytes())
            for k in range(arguments.repeats):
                for what in WHAT:
                    if what != "open":
                        cells.measure(f"{what}; {rows}; {k}", lambda what=what, path=path: apart(what, path))
        for rows in (10**5, 10**6, 10**7):
            if f"narrow epoch; {rows}; {arguments.repeats - 1}" not in cells.content["cells"]:
                path = Path(folder) / f"narrow{rows}"
                sp.simulate(narrow, rows, 1, path, progress=silent)
                for k in range(arguments.repeats):
                    cells.measure(f"narrow epoch; {rows}; {k}", lambda path=path: apart("epoch", path))
        if "open; 0" not in cells.content["cells"]:
            very_large(Path(folder) / "large")
            for k in range(arguments.repeats):
                cells.measure(f"open; {k}", lambda: apart("open", Path(folder) / "large"))

    def mid(key: str, field: str) -> float:
        return median(cells[f"{key}; {k}"][field] for k in range(arguments.repeats))

    for rows in sizes:
        speed = mid(f"epoch; {rows}", "rows_per_s")
        speeds = {what: mid(f"{what}; {rows}", "rows_per_s") for what in ("epoch", "memmap in order", "memmap at random")}
        lines = [[what, v, speed / v, mid(f"{what}; {rows}", "rss_mb")] for what, v in speeds.items()]
        print(table(lines, [f"{rows} rows of 1 kB, budget {BUDGET_MB} MB", "rows/s", "ours over it", "peak RSS, MB"]), "\n")
        whole = [[what, mid(f"{what}; {rows}", "gb_per_s"), mid(f"{what}; {rows}", "rss_mb")] for what in ("verify", "pack", "plain file")]
        print(table(whole, ["", "GB/s", "peak RSS, MB"]), "\n")
    lines = [[f"{rows:.0e}", 1e6 / mid(f"narrow epoch; {rows}", "rows_per_s"), mid(f"narrow epoch; {rows}", "rss_mb")]
             for rows in (10**5, 10**6, 10**7)]
    print(table(lines, ["rows of 100 bytes, shuffled epoch", "us a row", "peak RSS, MB"]), "\n")
    print(f"opening a bank of 10^8 rows in {mid('open', 'segments'):.0f} segments: {mid('open', 'seconds'):.2f} s")


if __name__ == "__main__":
    main()
