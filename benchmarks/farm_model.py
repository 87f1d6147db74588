r"""Where does the farm saturate? A discrete-event model at 10 to 10,000 ranks, with costs measured here.

Modelled: rank 0 hands out tasks by the farm's own rule (`farm.spans`) and takes receipts, one at a time; a worker waits for its next
task (two are in flight for each), simulates, and commits each segment (on a node's own time) to a shared file system that
serialises metadata operations and shares a bandwidth. Measured first: seconds of rank 0 per task (through mpi4py.futures, two
workers, empty tasks) and seconds of a worker per commit. Assumed for the file system, as command-line options: 1 ms of serial
time for each new file, 1 GB/s. Not modelled: start-up of the interpreter on all nodes, the network's topology, failing nodes.

    python benchmarks/farm_model.py
"""

from __future__ import annotations

import argparse
import heapq
import subprocess
import sys
import tempfile
import time
from collections import deque
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from common import Cells, table
from farm_simulators import busy1

from sbiplat.bank import farm, segment
from sbiplat.bank.layout import Header, row_bytes
from sbiplat.bank.sandbox import simulate_rows

HERE = Path(__file__).parent
RANKS = (10, 100, 1000, 10_000)
HOUR = 3600.0


def nothing(first: int, stop: int) -> list[farm.Receipt]:
    """An empty task."""
    return [farm.Receipt(first, stop, (stop - first, 0, 0, 0, 0), 0.0)]


def measure_dispatch(tasks: int = 4000) -> None:
    """Under mpiexec: seconds of rank 0 per task."""
    from mpi4py import MPI
    from mpi4py.futures import MPICommExecutor

    farm.fill = nothing
    with MPICommExecutor(MPI.COMM_WORLD, root=0) as executor:
        if executor is not None:
            start = time.process_time()
            farm.dispatch(executor, iter([(k, k + 1) for k in range(tasks)]), 4, lambda receipts: None)
            print((time.process_time() - start) / tasks)


def dispatch_seconds() -> float:
    words = [str(Path(sys.executable).parent / "mpiexec"), "-n", "3", sys.executable, str(HERE / "farm_model.py"), "--dispatch"]
    return float(subprocess.run(words, check=True, capture_output=True, text=True).stdout)


def commit_seconds(header: Header) -> float:
    """Seconds of a worker for a segment of one block, flushed to the disk."""
    rows = simulate_rows(busy1, header, 0, header.block_size)
    with tempfile.TemporaryDirectory() as folder:
        start = time.perf_counter()
        for k in range(50):
            rows.first = k * header.block_size
            segment.commit(Path(folder), header, rows)
        return (time.perf_counter() - start) / 50


@dataclass
class Costs:
    """Seconds: of rank 0 a task, of a worker a commit, of the file system a new file; and its bytes/s."""

    dispatch: float
    commit: float
    file: float
    bandwidth: float


def model(ranks: int, row_seconds: float, rows: int, costs: Costs) -> dict[str, float]:
    """Efficiency, segments, and how busy rank 0 and the file system are, for one bank."""
    header, workers = Header.of(busy1, 1, rows, None), ranks - 1
    known = False
    tasks = farm.spans([(0, rows)], header, workers, lambda: row_seconds if known else None)
    noise = np.random.default_rng(0)
    root = disk = busy_root = busy_disk = now = 0.0
    segments = in_flight = 0
    waiting: deque[tuple[float, int]] = deque()  # (when it was handed out, rows): tasks that no worker has yet
    free = deque(range(workers))
    events: list[tuple[float, int, float]] = []  # (when, worker, seconds that the file system needs; 0: a receipt arrives)

    while True:
        while in_flight < 2 * workers and (task := next(tasks, None)) is not None:
            root = max(root, now) + costs.dispatch
            busy_root += costs.dispatch
            in_flight += 1
            waiting.append((root, task[1] - task[0]))
        while waiting and free:
            handed, count = waiting.popleft()
            end = max(handed, now) + count * row_seconds * noise.uniform(0.95, 1.05)
            pieces = max(1, int(count * row_seconds // farm.COMMIT_SECONDS))
            serial = pieces * costs.file + count * row_bytes(header) / costs.bandwidth
            segments += pieces
            heapq.heappush(events, (end, free.popleft(), serial))
        if not events:
            break
        now, worker, serial = heapq.heappop(events)
        if serial:
            disk = max(disk, now) + serial
            busy_disk += serial
            heapq.heappush(events, (max(now + costs.commit, disk), worker, 0.0))
            continue
        free.append(worker)
        in_flight -= 1
        known = True
    return {"efficiency": rows * row_seconds / (workers * now), "segments": segments, "rank 0 busy": busy_root / now,
            "file system busy": busy_disk / now}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--dispatch", action="store_true")
    parser.add_argument("--files-seconds", type=float, default=1e-3)
    parser.add_argument("--bandwidth", type=float, default=1e9)
    arguments = parser.parse_args()
    if arguments.dispatch:
        measure_dispatch()
        return
    cells = Cells("farm_model")
    costs = Costs(cells.measure("dispatch seconds", dispatch_seconds),
                  cells.measure("commit seconds", lambda: commit_seconds(Header.of(busy1, 1, 10_000, None))),
                  arguments.files_seconds, arguments.bandwidth)
    print(f"measured: rank 0 {1e3 * costs.dispatch:.2f} ms a task; a worker {1e3 * costs.commit:.1f} ms a commit\n")
    lines = []
    for row_seconds in (1e-3, 1e-1, 10.0):
        for ranks in RANKS:
            rows = round(min(HOUR * (ranks - 1) / row_seconds, 3e9))
            made = cells.measure(f"{ranks} ranks, {row_seconds:g} s a row", lambda r=ranks, s=row_seconds, n=rows: model(r, s, n, costs))
            lines.append([f"{row_seconds:g} s", ranks, f"{rows:.3g}", *made.values()])
    print(table(lines, ["a row", "ranks", "rows", "efficiency", "segments", "rank 0 busy", "file system busy"]))


if __name__ == "__main__":
    main()
