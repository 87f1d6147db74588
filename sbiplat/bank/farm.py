"""The farm: who runs the blocks. This process, local processes, or MPI ranks, all through `concurrent.futures`.

A task is a run of consecutive rows. Its worker simulates block by block and commits what it has as one segment, at the
end of the run, after 64 MB or after 60 s, whichever comes first; only the row numbers and small receipts travel. Runs
are handed out large at first and smaller towards the end, so that segments are few and workers finish together.

SIGINT and SIGTERM stop cleanly: the block under way is dropped, finished ones are committed, and the same command
resumes. Workers end with the process that started them, however it ends. Under MPI all ranks share one fate: a mistake
that one rank finds is told once and ends all, and any other error aborts the job at once. Nothing here imports torch.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_COMPLETED, Executor, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass
from multiprocessing.util import Finalize
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import numpy as np

from sbiplat.bank import segment
from sbiplat.bank.layout import STATUS, Header, default_rows_per_segment
from sbiplat.bank.sandbox import Direct, Limits, Runner, Sandbox
from sbiplat.bank.together import Together, signals_end_what_waits
from sbiplat.errors import BankError, UserError
from sbiplat.launch import launched_ranks
from sbiplat.signals import Interrupted, Signals
from sbiplat.simulator import Simulator

COMMIT_SECONDS = 60.0
TASK_SECONDS = 0.1  # a task is not worth its commit below
T = TypeVar("T")


@dataclass(frozen=True)
class Receipt:
    """What a worker says of a committed segment."""

    first: int
    stop: int
    status: tuple[int, ...]
    seconds: float


@dataclass(frozen=True)
class Job:
    """What every worker needs to make any block."""

    simulator: Simulator
    header: Header
    folder: Path
    limits: Limits

    def runner(self) -> Runner:
        if _group is not None:
            return Direct(_group, self.header, signals, whole_rows=True)
        if self.limits.isolate:
            return Sandbox(self.simulator, self.header, self.limits, signals)
        return Direct(self.simulator, self.header, signals)


_job: Job | None = None
_runner: Runner | None = None
_group: Together | None = None  # this rank's, where several ranks simulate a row together


signals = Signals()


# ------------------------------------------------------------------------------------------------------- a worker


def fill(first: int, stop: int) -> list[Receipt]:
    """A task: simulate rows first..stop-1 and commit them. Stops early, with what is whole, when asked to."""
    global _runner
    job = _job
    assert job is not None
    if _runner is None:
        _runner = job.runner()
    done: list[Receipt] = []
    kept, since = first, time.monotonic()

    def commit(end: int) -> None:
        nonlocal kept, since
        if end > kept:
            rows = _runner.rows(kept, end)
            made = segment.commit(job.folder, job.header, rows)
            counts = np.bincount(rows.status, minlength=len(STATUS))
            done.append(Receipt(made.first, made.stop, tuple(int(c) for c in counts), float(rows.seconds.sum())))
            kept = end
        since = time.monotonic()

    _runner.start(first, stop)
    try:
        while not _runner.step(COMMIT_SECONDS - (time.monotonic() - since)):
            if time.monotonic() - since >= COMMIT_SECONDS:
                whole = _runner.done // job.header.block_size * job.header.block_size
                commit(whole if whole > kept else _runner.done)
        commit(stop)
    except Interrupted:
        commit(_runner.done)
    return done


def _end_runner() -> None:
    global _runner
    if _runner is not None:
        _runner.close()
        _runner = None


def _start_worker(job: Job) -> None:
    global _job
    _job = job
    Finalize(None, _end_runner, exitpriority=10)  # a worker's own end: its simulator's process and working folders
    threading.Thread(target=_end_with_parent, daemon=True).start()
    if "torch" in sys.modules:  # forked from a process that has torch: its thread pool did not come along
        sys.modules["torch"].set_num_threads(1)


def _end_with_parent() -> None:
    """An orphan would hold the bank's lock for ever."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        with suppress(Exception):
            _end_runner()
        os._exit(1)


# ------------------------------------------------------------------------------------------------------- executors


class _Here(Executor):
    """This process as an executor."""

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        future: Future[Any] = Future()
        try:
            future.set_result(fn(*args, **kwargs))
        except Exception as error:
            future.set_exception(error)
        return future


def spans(
    gaps: list[tuple[int, int]], header: Header, workers: int, row_seconds: Callable[[], float | None] = lambda: 0.0
) -> Iterator[tuple[int, int]]:
    """The tasks that cover the gaps: guided self-scheduling, at most one segment's bytes each.

    Whole blocks; but where each row has a stream of its own, the first tasks, before the time of a row is known, and if it is long
    the last ones too, are parts of blocks: so a few slow rows are shared by all workers, and these end together.
    """
    remaining = sum(stop - first for first, stop in gaps)
    size, limit = header.block_size, default_rows_per_segment(header)
    for first, stop in gaps:
        while first < stop:
            share = remaining if workers == 1 else remaining // (3 * workers)
            pace = 0.0 if header.batched or workers == 1 else row_seconds()
            if pace is None or (pace * size > TASK_SECONDS and share < size):
                cut = min(stop, (first // size + 1) * size, first + max(1, share, round(TASK_SECONDS / pace) if pace else 1))
            else:
                rows = max(size, min(limit, share // size * size))
                cut = min(stop, (first + rows) // size * size)
            yield first, cut
            remaining -= cut - first
            first = cut


class _Pace:
    """The mean time of a row so far, from receipts on their way to who asked for them."""

    def __init__(self, on_receipts: Callable[[list[Receipt]], None]) -> None:
        self._on_receipts, self._rows, self._seconds = on_receipts, 0, 0.0

    def __call__(self, receipts: list[Receipt]) -> None:
        for receipt in receipts:
            self._rows += receipt.stop - receipt.first
            self._seconds += receipt.seconds
        self._on_receipts(receipts)

    def row_seconds(self) -> float | None:
        return self._seconds / self._rows if self._rows else None


def dispatch(
    executor: Executor, tasks: Iterator[tuple[int, int]], in_flight: int, on_receipts: Callable[[list[Receipt]], None],
    on_stop: Callable[[], None] = lambda: None,
) -> None:
    """Keep `in_flight` tasks with the executor until none is left; raises the first error of any worker."""
    pending: set[Future[list[Receipt]]] = set()

    def collect(done: set[Future[list[Receipt]]]) -> None:
        for future in done:
            on_receipts(future.result())

    try:
        for task in tasks:
            with signals.interruptible():  # a signal that came while a task was made here is seen now
                pass
            pending.add(executor.submit(fill, *task))
            while len(pending) >= in_flight:
                with signals.interruptible():
                    done, pending = wait(pending, return_when=FIRST_COMPLETED)
                collect(done)
        while pending:
            with signals.interruptible():
                done, pending = wait(pending, return_when=FIRST_COMPLETED)
            collect(done)
    except Interrupted:
        on_stop()
        collect(wait({future for future in pending if not future.cancel()}).done)
        raise
    except BaseException:
        for future in pending:
            future.cancel()
        raise


def run_local(job: Job, gaps: list[tuple[int, int]], workers: int, on_receipts: Callable[[list[Receipt]], None]) -> None:
    """Fill the gaps with this process (one worker) or with forked ones."""
    global _job
    pace = _Pace(on_receipts)
    tasks = spans(gaps, job.header, workers, pace.row_seconds)
    _job = job
    if workers == 1:
        try:
            dispatch(_Here(), tasks, 1, pace)
        finally:
            _end_runner()
        return
    others = set(multiprocessing.active_children())

    def stop_workers() -> None:
        for process in set(multiprocessing.active_children()) - others:
            with suppress(ProcessLookupError):
                os.kill(process.pid, signal.SIGINT)

    with ProcessPoolExecutor(workers, multiprocessing.get_context("fork"), _start_worker, (job,)) as pool:
        try:
            dispatch(pool, tasks, 2 * workers, pace, stop_workers)
        except BrokenProcessPool:
            raise BankError(f"a worker process was killed while it ran simulator {job.simulator.name!r} (perhaps for want of "
                            "memory); committed rows are kept, the same command resumes") from None


# ------------------------------------------------------------------------------------------------------------- MPI


def run_mpi(job: Job, gaps: list[tuple[int, int]], comm: Any, on_receipts: Callable[[list[Receipt]], None]) -> None:
    """Fill the gaps with the ranks of `comm`: rank 0 hands out, the others simulate. An error anywhere ends the job."""
    global _job, _group
    from mpi4py.futures import MPICommExecutor

    _job = job
    if job.limits.ranks_per_simulation > 1:
        from mpi4py import MPI

        team = (comm.Get_rank() - 1) // job.limits.ranks_per_simulation  # -1: rank 0, which hands out
        _group = Together(job.simulator, comm.Split(team + 1, comm.Get_rank()), job.limits.time_limit)
        leads = comm.Get_rank() == 0 or _group.leads
        comm = comm.Split(0 if leads else MPI.UNDEFINED, comm.Get_rank())
        if not leads:
            with signals_end_what_waits():
                _group.follow()
            return
    heard = signals_end_what_waits() if _group is not None and comm.Get_rank() > 0 else nullcontext()
    try:
        with heard, MPICommExecutor(comm, root=0) as executor:
            if executor is not None:
                workers, pace = comm.Get_size() - 1, _Pace(on_receipts)
                dispatch(executor, spans(gaps, job.header, workers, pace.row_seconds), 2 * workers, pace)
    except Interrupted:
        signals.requested = True
    except BaseException as error:
        abort(comm, error)
    finally:
        _end_runner()
        if _group is not None and comm.Get_rank() > 0:
            _group.release()
        _group = None


def check_ranks(comm: Any, simulator: Simulator, ranks: int) -> None:
    """Whether these ranks can be split so; raises BankError."""
    size = comm.Get_size() if comm else 1
    if simulator.parallel and ranks == 1 and comm is None:
        return  # this process alone
    if ranks > 1 and not simulator.parallel:
        raise BankError(f"simulator {simulator.name!r} does not take a communicator: register it with parallel=True to run it on "
                        f"{ranks} ranks at once")
    if ranks > 1 and (size < 1 + ranks or (size - 1) % ranks):
        raise BankError(f"{ranks} ranks a simulation need 1 + a multiple of {ranks} ranks (the first hands out), and there are {size}; "
                        f"use mpiexec -n {1 + ranks * max(1, (size - 1) // ranks)}")


def together(comm: Any, function: Callable[[], T]) -> T:
    """Run `function` on every rank and return this rank's result; where one raises a UserError, all end with the first.

    Rank 0 raises it, and the others leave quietly with its exit code, so that it is told once.
    """
    result: Any = None
    mistake = None
    try:
        result = function()
    except UserError as error:
        mistake = error
    except BaseException as error:
        abort(comm, error)
    found = next((m for m in comm.allgather(mistake) if m is not None), None)
    if found is None:
        return result
    end: Any = found if comm.Get_rank() == 0 else SystemExit(found.exit_code)
    end.agreed = True  # all ranks know of it
    raise end


@contextmanager
def one_fate(comm: Any) -> Iterator[None]:
    """End the whole job with any error that did not come through `together`: other ranks may wait for this one."""
    try:
        yield
    except BaseException as error:
        if not getattr(error, "agreed", False):
            abort(comm, error)
        raise


def abort(comm: Any, error: BaseException) -> NoReturn:
    """One line, and the end of all ranks."""
    text = str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {error}"
    print(f"error: {' '.join(text.split())}", file=sys.stderr, flush=True)  # noqa: T201 - the job ends here
    code = getattr(error, "exit_code", 1)
    time.sleep(0.2)  # the launcher drops what it has not yet forwarded
    comm.Abort(code)
    os._exit(code)  # MPICH's Abort may return before the launcher has ended this rank


def mpi_world() -> Any | None:
    """COMM_WORLD where this process is one of several MPI ranks, else None; mpi4py is imported only then."""
    ranks = launched_ranks()
    if ranks == 1:
        return None
    try:
        from mpi4py import MPI
    except (ImportError, RuntimeError) as error:
        raise BankError(f"started as one of {ranks} MPI ranks, but mpi4py does not work here ({str(error).splitlines()[0]}); "
                        "pip install 'sbiplat[mpi]'") from None
    comm = MPI.COMM_WORLD
    if comm.Get_size() != ranks:
        raise BankError(f"{ranks} tasks were started, but MPI joins {comm.Get_size()} of them; use the mpiexec of the MPI "
                        "library that mpi4py uses, or srun --mpi=pmi2")
    return comm


def available_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
