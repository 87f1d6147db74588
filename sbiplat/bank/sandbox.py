"""The sandbox: a child process in which the user's simulator runs, so that nothing it does harms the farm.

The child writes its rows into memory that it shares with its owner (a worker, or an MPI rank). What it has finished
outlives it: when it crashes, hangs beyond the time limit, or is recycled, the owner marks the row at fault, forks
another child, and goes on. Only row numbers and messages go through the pipe.

A row that takes its process down is tried once more, since a kill may come from outside; the second time it is marked.
What the simulator prints goes to a scratch file, whose last line is told if it crashes. `Direct` has the same interface
without a child, for simulators that cannot be forked (CUDA, MPI).
"""

from __future__ import annotations

import math
import mmap
import os
import shutil
import signal
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from contextlib import nullcontext, suppress
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any, Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray

from sbiplat.bank.child import Child, asked_to_stop, end_of, fork, last_line
from sbiplat.bank.layout import MISSING, STATUS, Header, default_rows_per_segment, pieces, streams
from sbiplat.bank.segment import Rows
from sbiplat.errors import SimulatorError, UserError
from sbiplat.settings import setting
from sbiplat.signals import Interrupted, Signals
from sbiplat.simulator import CheckResult, Simulator, check

T = TypeVar("T")
ENDING_SECONDS = 0.3  # that a process which has closed its pipe may take to end
LOOK_SECONDS = 0.5  # how often a child's death is looked for where its pipe does not tell
ASKED_TO_STOP = 75  # exit code of a child that had a signal
GRACE_SECONDS = {-signal.SIGKILL: 0.05, ASKED_TO_STOP: 1.0}  # by exit code: what ends the whole job may reach the child before its owner
TRIES = 2
AGAIN_SECONDS = 1.0  # a row that takes longer is not run twice to see whether it is a function of its stream
OUTPUT_BYTES = 2**20


@dataclass(frozen=True)
class Limits:
    """How a simulator is run; none of it changes a row that succeeds. A call is a row, or a block where it is batched."""

    time_limit: float | None = setting(None, "seconds a call may take; later its rows are marked timed-out", low=1e-3, high=1e7)
    recycle: int | None = setting(None, "blocks after which a simulator's process is replaced", low=1)
    isolate: bool = setting(True, "run the simulator in a child process")
    ranks_per_simulation: int = setting(1, "MPI ranks that simulate one row together", low=1)


class Runner(Protocol):
    """What simulates a run of rows for `farm.fill`."""

    @property
    def done(self) -> int:
        """All rows before this one are finished."""
        ...

    def start(self, first: int, stop: int) -> None:
        """Begin rows first..stop-1."""

    def step(self, seconds: float) -> bool:
        """Go on for about so long; whether all rows are done. A signal raises Interrupted here; finished rows stay."""
        ...

    def rows(self, first: int, stop: int) -> Rows:
        """Finished rows; valid until the next `start`."""
        ...

    def close(self) -> None:
        """End it; what is under way is dropped."""


def simulate_into(simulator: Simulator, header: Header, into: Rows, first: int, stop: int, on_row: Any, on_message: Any) -> None:
    """Rows first..stop-1 of one block, each with its status; whatever the simulator raises stays in its row.

    on_row(row, done): called before (done = row) and after each call. on_message(row, text): what a row raised.
    """
    start, end, here = first - into.first, stop - into.first, os.getpid()
    rngs = streams(header, first, stop)
    into.theta[start:end] = simulator.prior.sample(rngs[0], stop - first) if simulator.batched else simulator.prior.sample_each(rngs)
    calls = [(slice(start, end), rngs[0], (stop - first,))] if simulator.batched else [(start + i, rng, ()) for i, rng in enumerate(rngs)]
    for where, rng, lead in calls:
        row = first if simulator.batched else into.first + where
        on_row(row, row)
        began = time.perf_counter()
        status = STATUS["ok"]
        try:
            try:
                made = simulator(into.theta[where].copy(), rng)
            finally:
                if os.getpid() != here:  # a process that the simulator forked, and that has strayed out of it
                    os._exit(0)
            x = simulator.conform(made, lead)
            for name, values in x.items():
                into.x[name][where] = values
        except (Exception, SystemExit) as error:  # the user's own code: anything may come
            status = STATUS["raised"]
            for values in into.x.values():
                values[where] = np.nan
            text = str(error) if isinstance(error, SimulatorError) else f"{type(error).__name__}: {error}"
            on_message(row, text.replace("\n", " "))
        into.seconds[where] = (time.perf_counter() - began) / (lead[0] if lead else 1)
        into.status[where] = status
        if status == STATUS["ok"]:
            finite = np.all([np.isfinite(v[where]).reshape(*lead, -1).all(-1) for v in into.x.values()], axis=0)
            into.status[where] = np.where(finite, status, STATUS["non-finite"])
        on_row(row, row + (lead[0] if lead else 1))


def simulate_rows(simulator: Simulator, header: Header, first: int, stop: int) -> Rows:
    """Rows first..stop-1 of one block, made here and now."""
    rows = _empty(header, first, stop)
    simulate_into(simulator, header, rows, first, stop, lambda row, done: None, rows.messages.__setitem__)
    return rows


def _empty(header: Header, first: int, stop: int) -> Rows:
    count = stop - first
    x = {k: np.full((count, *shape), np.nan, header.x.dtype) for k, shape in header.x.shapes.items()}
    return Rows(first, np.empty((count, header.prior.dim)), x, np.full(count, MISSING, np.uint8), np.zeros(count, np.float32))


class Direct:
    """The simulator in this very process. whole_rows: a signal stops it only between rows, since other ranks are in the row too."""

    def __init__(self, simulator: Any, header: Header, signals: Signals, whole_rows: bool = False) -> None:
        self._simulator, self._header, self._signals, self._whole_rows = simulator, header, signals, whole_rows
        self.done = 0

    def start(self, first: int, stop: int) -> None:
        self._rows, self._pieces, self.done = _empty(self._header, first, stop), pieces(first, stop, self._header.block_size), first

    def step(self, seconds: float) -> bool:
        first, stop = self._pieces[0]

        def on_row(row: int, done: int) -> None:
            if self._signals.requested and not self._whole_rows:  # the simulator may have swallowed it: this row does not count
                raise Interrupted
            self.done = done
            if self._signals.requested:
                raise Interrupted

        folder = os.getcwd()
        try:
            with nullcontext() if self._whole_rows else self._signals.interruptible():
                simulate_into(self._simulator, self._header, self._rows, first, stop, on_row, self._rows.messages.__setitem__)
        finally:
            os.chdir(folder)  # a simulator may have gone elsewhere
        self._pieces = self._pieces[1:]
        return not self._pieces

    def rows(self, first: int, stop: int) -> Rows:
        return _part(self._rows, first, stop)

    def close(self) -> None:
        pass


def _part(rows: Rows, first: int, stop: int) -> Rows:
    part = slice(first - rows.first, stop - rows.first)
    return Rows(first, rows.theta[part], {k: v[part] for k, v in rows.x.items()}, rows.status[part], rows.seconds[part],
                {r: m for r, m in rows.messages.items() if first <= r < stop})


class Sandbox:
    """The simulator in a child process of its own, which is replaced when it dies."""

    def __init__(self, simulator: Simulator, header: Header, limits: Limits, signals: Signals) -> None:
        self._simulator, self._header, self._limits, self._signals = simulator, header, limits, signals
        self._memory = _SharedRows(header, min(default_rows_per_segment(header), header.stored_rows))
        self._output = tempfile.TemporaryFile()  # noqa: SIM115 - as long as the sandbox
        self._scratch = tempfile.TemporaryDirectory(prefix="sbiplat-", ignore_cleanup_errors=True)
        self._child: Child | None = None
        self._deaths: Counter[int] = Counter()

    @property
    def done(self) -> int:
        return int(self._memory.done[0])

    def start(self, first: int, stop: int) -> None:
        self._memory.rows = replace(self._memory.rows, first=first, messages={})
        self._stop = stop
        self._deaths.clear()
        self._memory.done[0] = first
        self._order(first)

    def step(self, seconds: float) -> bool:
        """See Runner. One event of the child at most is taken a call."""
        assert self._child is not None
        with self._signals.interruptible():
            told = wait([self._child.pipe], max(0.0, min(seconds, LOOK_SECONDS, self._time_left())))
        if told:
            try:
                message = self._child.pipe.recv()
            except (EOFError, OSError):
                return self._died()
            return self._heard(message)
        if self._time_left() <= 0:
            return self._late()
        return self._died() if self._child.has_ended() else False

    def rows(self, first: int, stop: int) -> Rows:
        return _part(self._memory.rows, first, stop)

    def close(self) -> None:
        self._kill()
        self._scratch.cleanup()

    # ---------------------------------------------------------------------------------------------- what happened

    def _heard(self, message: Any) -> bool:
        kind, row, text = message
        if kind == "done":
            return True
        if kind == "breach":
            raise SimulatorError(text)
        if kind == "recycle":
            self._kill()
            return self._resume(self.done)
        self._memory.rows.messages[row] = text
        return False

    def _died(self) -> bool:
        """The child has ended on its own: its row is tried once more, and then marked."""
        assert self._child is not None
        end = time.monotonic() + ENDING_SECONDS
        while not (ended := self._child.has_ended()) and time.monotonic() < end:
            time.sleep(0.01)
        self._child.kill()  # with the programs that it started
        code, row = self._wait(), self.done
        how = end_of(code) if ended else "it closed the pipe to its worker"
        with self._signals.interruptible():
            time.sleep(GRACE_SECONDS.get(code, 0.0))
        self._deaths[row] += 1
        if self._deaths[row] < TRIES:
            return self._resume(row)
        return self._mark(STATUS["crashed"], f"the simulator ended its process ({how}){last_line(self._output)}")

    def _late(self) -> bool:
        self._kill()
        if self._memory.again[0]:
            raise SimulatorError(f"simulator {self._simulator.name!r} took longer than its time limit when a row was run again: it keeps "
                                 "a memory of its own; keep nothing between calls")
        if self._time_left() > 0:  # it was done in the last moment, and another call had begun
            return self._resume(self.done)
        return self._mark(STATUS["timed-out"], f"took longer than the time limit of {self._limits.time_limit:g} s")

    def _mark(self, status: int, text: str) -> bool:
        """Mark the call that was under way, and go on after it."""
        row = self.done
        stop = min(self._stop, (row // self._header.block_size + 1) * self._header.block_size) if self._header.batched else row + 1
        rows = self._memory.rows
        where = slice(row - rows.first, stop - rows.first)
        rows.status[where] = status
        rows.seconds[where] = (time.monotonic() - self._memory.since[0]) / (stop - row) if self._memory.since[0] else 0.0
        rows.messages[row] = text
        for values in rows.x.values():
            values[where] = np.nan
        self._memory.done[0] = stop
        return self._resume(stop)

    def _resume(self, row: int) -> bool:
        if row >= self._stop:
            return True
        self._order(row)
        return False

    def _time_left(self) -> float:
        if self._limits.time_limit is None or not self._memory.since[0]:
            return math.inf
        return float(self._memory.since[0]) + self._limits.time_limit - time.monotonic()

    # -------------------------------------------------------------------------------------------------- the child

    def _order(self, first: int) -> None:
        self._memory.since[0], self._memory.again[0] = 0.0, 0
        if self._child is None:
            self._fork()
        assert self._child is not None
        with suppress(OSError):  # it died between two tasks: `step` finds out
            self._child.pipe.send((self._memory.rows.first, first, self._stop))

    def _fork(self) -> None:
        self._output.seek(0)
        self._output.truncate()
        for left in Path(self._scratch.name).iterdir():  # working folders of rows that were killed
            shutil.rmtree(left, ignore_errors=True)
        self._child = fork(lambda pipe: _serve(self, pipe), self._output.fileno())

    def _wait(self) -> int:
        """The exit status of a child that has ended."""
        code, self._child = (self._child.wait() if self._child else 0), None
        return code

    def _kill(self) -> None:
        if self._child is not None:
            self._child.kill()
            self._wait()


def check_apart(simulator: Simulator, rows: int, time_limit: float | None) -> CheckResult | None:
    """The contract check in a child process; raises SimulatorError where the contract is broken or the child goes down.

    With a time limit a call: where the check takes longer than all its calls may, it is broken off, and the result is None. A parallel
    simulator is checked in this process, since MPI cannot be forked.
    """
    return apart(simulator, lambda: check(simulator, rows), None if time_limit is None else 2 * rows * time_limit)


def apart(simulator: Simulator, work: Callable[[], T], seconds: float | None) -> T | None:
    """What `work` returns, which runs the simulator, done in a child process; None where it takes longer than `seconds`.

    Raises the UserError that it raises, and SimulatorError where it goes down. Of a parallel simulator it is done in this process.
    """
    if simulator.parallel:
        return work()

    def serve(pipe: Connection) -> None:
        os.environ["SBIPLAT_SCRATCH"] = scratch
        try:
            pipe.send(work())
        except UserError as error:
            pipe.send(type(error)(str(error)))

    folder = tempfile.TemporaryDirectory(prefix="sbiplat-", ignore_cleanup_errors=True)
    with tempfile.TemporaryFile() as output, folder as scratch:
        child = fork(serve, output.fileno())
        try:
            if not child.pipe.poll(seconds):
                return None
            found: Any = child.pipe.recv()
        except (EOFError, OSError):
            child.kill()
            found = SimulatorError(f"simulator {simulator.name!r} ended its process in one of its first rows ({end_of(child.wait())})"
                                   f"{last_line(output)}; mend it, or have such rows marked with simulate --no-check")
        finally:
            child.kill()
            with suppress(ChildProcessError):
                child.wait()
    if isinstance(found, UserError):
        raise found
    return found


class _SharedRows:
    """Rows in memory that owner and children share. done: the row under way; since: when its call began, 0 between calls; again: whether
    a row is being run once more."""

    def __init__(self, header: Header, count: int) -> None:
        parts: dict[str, tuple[tuple[int, ...], Any]] = {
            "done": ((1,), np.int64), "again": ((1,), np.int64), "since": ((1,), np.float64),
            "theta": ((count, header.prior.dim), np.float64),
            **{f"x/{k}": ((count, *shape), np.dtype(header.x.dtype)) for k, shape in header.x.shapes.items()},
            "seconds": ((count,), np.float32), "status": ((count,), np.uint8),
        }
        sizes = {k: -(-math.prod(shape) * np.dtype(dtype).itemsize // 64) * 64 for k, (shape, dtype) in parts.items()}
        memory = mmap.mmap(-1, sum(sizes.values()))
        arrays: dict[str, NDArray[Any]] = {}
        offset = 0
        for name, (shape, dtype) in parts.items():
            arrays[name] = np.frombuffer(memory, dtype, math.prod(shape), offset).reshape(shape)
            offset += sizes[name]
        self.done, self.since, self.again = arrays["done"], arrays["since"], arrays["again"]
        self.rows = Rows(0, arrays["theta"], {k: arrays[f"x/{k}"] for k in header.x.shapes}, arrays["status"], arrays["seconds"])


# -------------------------------------------------------------------------------------------------- inside the child


def _serve(box: Sandbox, pipe: Connection) -> None:
    os.environ["SBIPLAT_SCRATCH"] = box._scratch.name
    simulator, header, memory, recycle = box._simulator, box._header, box._memory, box._limits.recycle
    blocks = 0

    def on_row(row: int, done: int) -> None:
        if asked_to_stop():
            os._exit(ASKED_TO_STOP)
        memory.since[0] = time.monotonic() if row == done else 0.0
        memory.done[0] = done

    def on_message(row: int, text: str) -> None:
        pipe.send(("raised", row, text))

    while True:
        base, first, stop = pipe.recv()
        rows = memory.rows = replace(memory.rows, first=base)
        for a, b in pieces(first, stop, header.block_size):
            if recycle is not None and blocks >= recycle:
                pipe.send(("recycle", a, ""))
                return
            simulate_into(simulator, header, rows, a, b, on_row, on_message)
            memory.again[0], memory.since[0] = 1, time.monotonic()
            same = blocks > 0 or _same_again(simulator, header, rows, a, b)
            memory.again[0], memory.since[0] = 0, 0.0
            if not same:
                pipe.send(("breach", a, f"simulator {simulator.name!r} gave another x when row {a} was run again: it uses randomness or "
                                        "memory of its own; draw all randomness from its rng, and keep nothing between calls"))
                return
            blocks += 1
            if os.fstat(1).st_size > OUTPUT_BYTES:
                os.ftruncate(1, 0)
                os.lseek(1, 0, os.SEEK_SET)
        pipe.send(("done", stop, ""))


def _same_again(simulator: Simulator, header: Header, rows: Rows, first: int, stop: int) -> bool:
    """Whether the first call of a piece gives the same x after the others have been made."""
    if not simulator.batched:
        stop = first + 1
    part = _part(rows, first, stop)
    if float(part.seconds.sum()) > AGAIN_SECONDS:
        return True
    again = simulate_rows(simulator, header, first, stop)
    return bool(np.array_equal(part.status, again.status)
                and all(np.array_equal(again.x[k], part.x[k], equal_nan=True) for k in part.x))
