"""Filling a bank: `simulate` makes, resumes and extends one, with local processes or MPI ranks.

One process prepares (under the bank's lock) and finishes; the farm runs what is missing. A bank that never began leaves nothing behind.
"""

from __future__ import annotations

import socket
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from sbiplat import files
from sbiplat.bank import farm, index
from sbiplat.bank.bank import Bank, read_header
from sbiplat.bank.farm import one_fate, together
from sbiplat.bank.layout import STATUS, Header, row_bytes
from sbiplat.bank.sandbox import Limits, check_apart
from sbiplat.bank.segment import Opened
from sbiplat.errors import BankError, SettingError, SimulatorError
from sbiplat.progress import Progress, silent
from sbiplat.settings import build
from sbiplat.signals import Interrupted, Stopped
from sbiplat.simulator import Simulator, check, resolve

MOST_BLOCK_BYTES = 2**31


@dataclass(frozen=True)
class _Order:
    """What `simulate` was asked for."""

    simulator: Simulator
    n: int
    seed: int
    out: Path
    block_size: int | None
    checked: bool
    progress: Progress
    limits: Limits

    @property
    def header_path(self) -> Path:
        return self.out / "bank.json"

    def locked(self) -> AbstractContextManager[None]:
        return files.locked(self.out, BankError(f"another process is filling {self.out}; wait for it, or stop it first"))

    def job(self, header: Header) -> farm.Job:
        limits = replace(self.limits, time_limit=self.limits.time_limit or self.simulator.time_limit,
                         isolate=self.limits.isolate and not self.simulator.parallel)
        return farm.Job(self.simulator, header, self.out / "segments", limits)


Gaps = list[tuple[int, int]]


def simulate(
    simulator: Simulator | str,
    n: int,
    seed: int,
    out: str | Path,
    *,
    workers: int | None = None,
    block_size: int | None = None,
    checked: bool = True,
    time_limit: float | None = None,
    recycle: int | None = None,
    isolate: bool = True,
    ranks_per_simulation: int = 1,
    progress: Progress | None = None,
) -> Bank:
    """Fill a bank with n rows; the same call resumes it, a larger n extends it.

    Local processes run the blocks (`workers`, by default one a core), or the MPI ranks where this program was started
    under mpiexec or srun. `checked=False` leaves out the contract check that runs a few rows before a new bank.
    The simulator runs in child processes, which are replaced when it crashes, after `recycle` blocks where it leaks, and when
    a call (a row, or a block where it is batched) takes longer than `time_limit` seconds; `isolate=False` runs it in the
    worker itself, for what cannot be forked (CUDA, MPI), without any of that. `ranks_per_simulation`: for a simulator
    registered with parallel=True, which gets a communicator of so many ranks.
    Raises SimulatorError, BankError, and Stopped after SIGINT or SIGTERM; what was committed is kept in every case.
    Under MPI rank 0 raises, and the other ranks exit quietly with the same code.
    """
    for name, value, least in (("n", n, 1), ("seed", seed, 0), ("workers", workers, 1), ("block_size", block_size, 1)):
        optional = name in ("workers", "block_size") and value is None
        if not optional and (isinstance(value, bool) or not isinstance(value, int | np.integer) or not least <= value < 2**62):
            raise SettingError(f"{name} must be a whole number of at least {least}, got {value!r}")
    if block_size is not None and block_size > 2**31:
        raise SettingError(f"block_size must be at most 2^31, got {block_size!r}")
    limits = build(Limits, {"time_limit": time_limit, "recycle": recycle, "isolate": isolate,
                            "ranks_per_simulation": ranks_per_simulation})
    progress = progress or Progress.auto()
    comm = farm.mpi_world()
    if comm is None:
        order = _Order(resolve(simulator), int(n), int(seed), Path(out), block_size, checked, progress, limits)
        return _simulate_here(order, workers or farm.available_cores())
    with one_fate(comm):
        made = together(comm, lambda: resolve(simulator))
        return _simulate_with(comm, _Order(made, int(n), int(seed), Path(out), block_size, checked, progress, limits))


def _simulate_here(order: _Order, workers: int) -> Bank:
    _refuse(order)
    with order.locked():
        header, gaps = _prepare(order)
        missing = sum(stop - first for first, stop in gaps)
        workers = max(1, min(workers, -(-missing // header.block_size) if header.batched else missing))
        with farm.signals.installed(), _shown(order, gaps, workers) as on_receipts:
            try:
                farm.run_local(order.job(header), gaps, workers, on_receipts)
            except Interrupted:
                raise _stopped(order.out) from None
        return _finish(order, header)


def _simulate_with(comm: Any, order: _Order) -> Bank:
    """The same under MPI: rank 0 holds the lock, prepares and finishes; all ranks run blocks."""
    root = comm.Get_rank() == 0
    with ExitStack() as held:
        def prepare() -> tuple[dict[str, Any], Gaps]:
            _refuse(order)
            held.enter_context(order.locked())
            header, gaps = _prepare(order)
            return header.to_json(), gaps

        description, gaps = comm.bcast(together(comm, lambda: prepare() if root else None))
        header = Header.from_json(description, order.header_path)
        together(comm, lambda: _same_code(comm, order, header))
        shown = order if root else replace(order, progress=silent)
        teams = (comm.Get_size() - 1) // order.limits.ranks_per_simulation
        with farm.signals.installed(), _shown(shown, gaps, teams) as on_receipts:
            farm.run_mpi(order.job(header), gaps, comm, on_receipts)
            stopped = any(comm.allgather(farm.signals.requested))

        def finish() -> None:
            if stopped:
                raise _stopped(order.out)
            _finish(order, header)

        together(comm, lambda: finish() if root else None)
    return together(comm, lambda: Bank.open(order.out))


def _same_code(comm: Any, order: _Order, header: Header) -> None:
    if Header.of(order.simulator, order.seed, header.rows, header.block_size).uid != header.uid:
        raise BankError(f"rank {comm.Get_rank()} on {socket.gethostname()} has another version of simulator "
                        f"{order.simulator.name!r} than rank 0; give all nodes the same code")


def _refuse(order: _Order) -> None:
    """Refuse a place that is no bank's, and a simulator that breaks its contract, before anything is made."""
    out = order.out
    header = Header.of(order.simulator, order.seed, order.n, order.block_size)
    if order.simulator.batched and header.block_size * row_bytes(header) > MOST_BLOCK_BYTES:
        size = header.block_size * row_bytes(header) / 1e9
        raise SettingError(f"a block of {header.block_size} rows takes {size:.3g} GB; give a smaller --block-size")
    farm.check_ranks(farm.mpi_world(), order.simulator, order.limits.ranks_per_simulation)
    if out.exists() and not out.is_dir():
        raise BankError(f"{out} is a file, and a bank grows in a directory (a packed one cannot be extended); "
                        "give another --out")
    known = order.header_path.exists()
    if out.is_dir() and not known and any(entry.name not in ("lock", "segments") for entry in out.iterdir()):
        raise BankError(f"{out} holds other files and is no bank; give the bank another --out")
    if order.checked and not known:
        try:
            if order.limits.isolate:
                check_apart(order.simulator, 2, order.limits.time_limit or order.simulator.time_limit)
            else:
                check(order.simulator, rows=2)
        except SimulatorError as error:
            left_out = "" if "--no-check" in str(error) else " (simulate --no-check leaves out this check, and marks such rows)"
            raise SimulatorError(f"{error}{left_out}") from None


def _prepare(order: _Order) -> tuple[Header, Gaps]:
    """The header and the row ranges still to simulate; makes the bank's header where there is none."""
    out, folder = order.out, order.out / "segments"
    if order.header_path.exists():
        old = read_header(out)
        wanted = Header.of(order.simulator, order.seed, order.n, order.block_size or old.block_size)
        old.check_same(wanted, out)
        header = replace(wanted, rows=max(order.n, old.rows), versions=old.versions, created=old.created)
        if order.n < old.rows:
            order.progress.say(f"{out} has {old.rows} rows already; all are kept (--n {order.n} asks for fewer)")
        if order.n > old.rows:
            files.write_json(order.header_path, header.to_json())
        for left in (*out.glob(".tmp-*"), *folder.glob(".tmp-*")):  # under the lock no other writer has them
            left.unlink(missing_ok=True)
    else:
        header = Header.of(order.simulator, order.seed, order.n, order.block_size)
        with files.disk_errors(order.header_path):
            folder.mkdir(exist_ok=True)
        files.write_json(order.header_path, header.to_json())
    opened = index.open_segments(folder, header, index.read(out / "bank.h5", header))
    return header, index.cover(opened, header.stored_rows)[1]


def _finish(order: _Order, header: Header) -> Bank:
    return Bank(order.out, header, write_index(order.out, header)).require_complete()


def write_index(out: Path, header: Header) -> list[Opened]:
    """Write the index over the segments that are there; under the bank's lock."""
    opened = index.open_segments(out / "segments", header, index.read(out / "bank.h5", header))
    index.write(out / "bank.h5", header, opened)
    return opened


def _stopped(out: Path) -> Stopped:
    bank = Bank.open(out)
    return Stopped(f"stopped: {bank.present} of {bank.rows} rows are kept in {out}; the same command resumes")


@contextmanager
def _shown(order: _Order, gaps: Gaps, workers: int) -> Iterator[Any]:
    """Progress over the rows of the gaps, with failures and efficiency; yields what takes the receipts.

    Efficiency is the share of the workers' time that the simulator itself ran.
    """
    failures: Counter[str] = Counter()
    seconds, start = 0.0, time.monotonic()
    total = sum(stop - first for first, stop in gaps)
    with order.progress.task(f"simulate {order.simulator.name}", total) as advance:
        def on_receipts(receipts: list[farm.Receipt]) -> None:
            nonlocal seconds
            for receipt in receipts:
                seconds += receipt.seconds
                failures.update({n: receipt.status[code] for n, code in STATUS.items() if code and receipt.status[code]})
                busy = f"efficiency {min(1.0, seconds / (workers * max(time.monotonic() - start, 1e-9))):.0%}"
                advance(receipt.stop - receipt.first, ", ".join([busy, *(f"{v} {k}" for k, v in failures.items())]))
        yield on_receipts
