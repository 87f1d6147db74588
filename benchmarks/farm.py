r"""How much of the workers' time is simulation? Whole commands, start-up included, side by side with what people use else.

Efficiency = simulator time x rows / (workers that simulate x wall). Two workers (MPI: three ranks, of which two simulate), twenty
seconds of work each, interleaved, medians. And a batched simulator of a microsecond a row: bytes of the bank by wall time,
beside writing as many bytes to a file, with and without flushing them to the disk.

    python benchmarks/farm.py --repeats 3
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

import numpy as np
from common import Cells, table
from farm_simulators import SECONDS, spin

HERE = Path(__file__).parent
BIN = Path(sys.executable).parent
WORKERS, WORK = 2, 20.0
QUICK_ROWS = 4_000_000
TOOLS = ("sbiplat, 2 workers", "sbiplat, 3 ranks", "sbi", "joblib", "mpi4py.futures, 3 ranks")


def command(tool: str, name: str, n: int, out: Path) -> list[str]:
    """The whole command of one tool."""
    simulator = f"{HERE / 'farm_simulators.py'}:{name}"
    ours = [str(BIN / "sbiplat"), "simulate", simulator, "--n", str(n), "--seed", "1", "--out", str(out / "b")]
    child = [sys.executable, str(HERE / "farm.py"), "--child", tool, name, str(n)]
    mpiexec = [str(BIN / "mpiexec"), "-n", "3"]
    return {
        "sbiplat, 2 workers": [*ours, "--workers", "2"], "sbiplat, 3 ranks": [*mpiexec, *ours], "sbi": child, "joblib": child,
        "mpi4py.futures, 3 ranks": [*mpiexec, sys.executable, "-m", "mpi4py.futures", *child[1:]],
    }[tool]


def child(tool: str, name: str, n: int) -> None:
    """What a user of the other tools would write."""
    seconds = SECONDS[name]
    if tool == "sbi":
        import torch
        from sbi.inference import simulate_for_sbi
        from sbi.utils import BoxUniform

        def simulator(theta: torch.Tensor) -> torch.Tensor:
            x = spin(seconds, np.asarray(theta).reshape(-1), np.random.default_rng())
            return torch.as_tensor(x, dtype=torch.float32)[None]

        simulate_for_sbi(simulator, BoxUniform(torch.zeros(2), torch.ones(2)), n, num_workers=WORKERS, show_progress_bar=False)
        return
    theta = np.random.default_rng(0).uniform(size=(n, 2))
    if tool == "joblib":
        from joblib import Parallel, delayed

        Parallel(n_jobs=WORKERS)(delayed(row)(seconds, t, k) for k, t in enumerate(theta))
        return
    from mpi4py.futures import MPIPoolExecutor

    with MPIPoolExecutor() as pool:
        np.array(list(pool.map(row, [seconds] * n, theta, range(n), chunksize=16)))


def row(seconds: float, theta: np.ndarray, seed: int) -> np.ndarray:
    """One row with a stream of its own."""
    return spin(seconds, theta, np.random.default_rng([1, seed]))


def wall(words: list[str]) -> float:
    """Seconds of a command."""
    start = time.perf_counter()
    subprocess.run(words, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env={**os.environ, "OMP_NUM_THREADS": "1"})
    return time.perf_counter() - start


def efficiency(tool: str, name: str) -> float:
    n = round(WORKERS * WORK / SECONDS[name])
    with tempfile.TemporaryDirectory() as folder:
        return SECONDS[name] * n / (WORKERS * wall(command(tool, name, n, Path(folder))))


def write_speed(flush: bool) -> float:
    """Bytes/s of a plain file as large as the bank."""
    data = np.random.default_rng(0).bytes(64 * 2**20)
    with tempfile.TemporaryDirectory() as folder:
        start = time.perf_counter()
        for k in range(QUICK_ROWS * 417 // len(data)):
            with (Path(folder) / str(k)).open("wb") as file:
                file.write(data)
                if flush:
                    file.flush()
                    os.fsync(file.fileno())
        return (QUICK_ROWS * 417 // len(data)) * len(data) / (time.perf_counter() - start)


def quick_speed(tool: str) -> float:
    """Bytes/s of a bank by a batched simulator of a microsecond a row."""
    folder = Path(tempfile.mkdtemp())
    try:
        return QUICK_ROWS * 417 / wall(command(tool, "quick", QUICK_ROWS, folder))
    finally:
        shutil.rmtree(folder)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--child", nargs=3)
    arguments = parser.parse_args()
    if arguments.child:
        child(arguments.child[0], arguments.child[1], int(arguments.child[2]))
        return
    cells = Cells("farm")
    for k in range(arguments.repeats):
        for name in SECONDS:
            for tool in TOOLS:
                cells.measure(f"{tool}; {name}; {k}", lambda tool=tool, name=name: efficiency(tool, name))
        for flush in (True, False):
            cells.measure(f"plain file, flushed {flush}; {k}", lambda flush=flush: write_speed(flush))
        for tool in TOOLS[:2]:
            cells.measure(f"{tool}; quick; {k}", lambda tool=tool: quick_speed(tool))

    def mid(key: str) -> float:
        return median(cells[f"{key}; {k}"] for k in range(arguments.repeats))

    print(table([[tool, *(mid(f"{tool}; {name}") for name in SECONDS)] for tool in TOOLS], ["efficiency", "1 ms a row", "10 ms a row"]))
    flushed, cached = mid("plain file, flushed True"), mid("plain file, flushed False")
    speeds = {tool: mid(f"{tool}; quick") for tool in TOOLS[:2]}
    print(table([[tool, v / 1e6, v / flushed, v / cached] for tool, v in speeds.items()],
                ["1 us a row, batched", "MB/s", "of a flushed plain file", "of the page cache"]))


if __name__ == "__main__":
    main()
