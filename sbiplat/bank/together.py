"""Several MPI ranks that simulate a row together.

A rank inside an MPI call of the simulator cannot be reached: Python's signal handlers wait for the call to end, which never
happens where another rank has raised or has gone another way. A thread of each rank sees to it. A single rank cannot be
stopped and go on, so what waits in vain ends the job, in one line; committed rows are kept.
"""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np

from sbiplat.simulator import Simulator

GRACE = 30.0  # seconds that a rank which has raised waits for the others; half the time limit, where there is one
SIGNAL_GRACE = 10.0  # seconds from a signal to the end of a row that is to be finished


class Together:
    """A simulator that runs on all ranks of a group; what its first rank calls, with the others in `follow`."""

    def __init__(self, simulator: Simulator, group: Any, time_limit: float | None) -> None:
        self._simulator, self._group, self._limit = simulator, group, time_limit
        self._own = group.Dup()  # the simulator's: its messages are never taken for ours
        self.leads = group.Get_rank() == 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._simulator, name)

    def __call__(self, theta: Any, rng: np.random.Generator) -> Any:
        self._group.bcast((theta, rng))
        x, errors = self._row(theta, rng)
        if errors:
            raise RuntimeError(errors[0])
        return x

    def follow(self) -> None:
        """What the other ranks of a group do: the same rows, until there are no more."""
        while (task := self._group.bcast(None)) is not None:
            self._row(*task)

    def release(self) -> None:
        """Let the others go; called by the first rank."""
        self._group.bcast(None)

    def _row(self, theta: Any, rng: np.random.Generator) -> tuple[Any, list[str]]:
        """This rank's x, and the errors of all."""
        x, error = None, ""
        late = (f"simulator {self._simulator.name!r} took longer than the time limit of {self._limit} s on several ranks at once, which "
                "cannot be stopped one by one, so the job ends; committed rows are kept. Raise the limit, or let the simulator give up")
        with deadline(self._limit, late):
            try:
                x = self._simulator(theta, rng, self._own)
            except (Exception, SystemExit) as raised:  # the user's own code: anything may come
                error = f"{type(raised).__name__}: {raised}"
            alone = (f"simulator {self._simulator.name!r} raised on one rank ({error}) and the others wait for it in MPI, so the job ends; "
                     "committed rows are kept. Raise on all ranks of comm alike")
            with deadline((self._limit / 2 if self._limit else GRACE) if error else None, alone):
                self._group.Barrier()
        return x, [e for e in self._group.allgather(error) if e]


@contextmanager
def deadline(seconds: float | None, line: str) -> Iterator[None]:
    """End the job with this line where what is inside takes longer."""
    if seconds is None:
        yield
        return
    timer = threading.Timer(seconds, end_job, (line,))
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


@contextmanager
def signals_end_what_waits() -> Iterator[None]:
    """Where SIGINT or SIGTERM ends the job, if the row under way does not end in time."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    read, write = os.pipe()
    os.set_blocking(write, False)
    before = signal.set_wakeup_fd(write, warn_on_full_buffer=False)
    over = threading.Event()

    def watch() -> None:
        heard = os.read(read, 1)
        if heard and not over.wait(SIGNAL_GRACE):
            end_job(f"stopped, within a row that did not end in {SIGNAL_GRACE:g} s; committed rows are kept, and the same command resumes")

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        signal.set_wakeup_fd(before)
        os.close(write)
        thread.join()
        os.close(read)


def end_job(line: str) -> None:
    """One line, and death: the launcher then ends all ranks. MPI's own Abort may wait for the very call that hangs."""
    os.write(2, f"error: {line}\n".encode())
    os.kill(os.getpid(), signal.SIGKILL)
