"""Work in numbered tasks, spread over MPI ranks or local processes, with the same result as in one process.

A task's randomness is a function of its number, and results come back in order: so who did which task cannot be seen in them. Ranks all
run the same program, task k on rank k mod R, and every rank gets all results: what follows a spread is done by each alone, alike.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, TypeVar

import torch

from sbiplat.bank.farm import together
from sbiplat.errors import UserError

T = TypeVar("T")

_function: Callable[[int], Any] | None = None  # what forked workers inherit


@dataclass(frozen=True)
class Spread:
    """Over whom: the ranks of an MPI communicator, or `workers` forked processes; by default this process alone."""

    comm: Any = None
    workers: int = 1

    @property
    def processes(self) -> int:
        return self.comm.Get_size() if self.comm else self.workers

    def map(self, function: Callable[[int], T], tasks: int, on_done: Callable[[int], None] = lambda k: None) -> list[T]:
        """[function(0), ..., function(tasks - 1)]; on_done(k) as they are done. Raises the first error of any process."""
        if self.comm:
            return self._over_ranks(function, tasks, on_done)
        if self.workers > 1 and tasks > 1:
            return self._over_workers(function, tasks, on_done)
        return [_done(function(k), k, on_done) for k in range(tasks)]

    def _over_ranks(self, function: Callable[[int], T], tasks: int, on_done: Callable[[int], None]) -> list[T]:
        rank, size = self.comm.Get_rank(), self.comm.Get_size()

        def mine() -> list[T]:
            out = []
            for k in range(rank, tasks, size):
                out.append(function(k))
                for beside in range(k - rank, min(k - rank + size, tasks)):  # the others' tasks take as long
                    on_done(beside)
            return out

        parts = self.comm.allgather(together(self.comm, mine))
        return [parts[k % size][k // size] for k in range(tasks)]

    def _over_workers(self, function: Callable[[int], T], tasks: int, on_done: Callable[[int], None]) -> list[T]:
        global _function
        _function = function
        others = set(multiprocessing.active_children())
        pool = ProcessPoolExecutor(min(self.workers, tasks), multiprocessing.get_context("fork"), _begin)
        try:
            return [_done(result, k, on_done) for k, result in enumerate(pool.map(_run, range(tasks)))]
        except BrokenProcessPool:
            raise UserError("a worker process was killed, perhaps for want of memory; use fewer workers") from None
        except BaseException:
            for process in set(multiprocessing.active_children()) - others:
                with suppress(ProcessLookupError):
                    process.kill()
            raise
        finally:
            pool.shutdown(cancel_futures=True)
            _function = None


ALONE = Spread()


def _done(result: T, k: int, on_done: Callable[[int], None]) -> T:
    on_done(k)
    return result


def _begin() -> None:
    """A forked worker: torch's thread pool did not come along, Ctrl-C is for its parent, and it ends with that."""
    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _run(k: int) -> Any:
    assert _function is not None
    return _function(k)
