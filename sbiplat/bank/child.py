"""Child processes: forked, in a group of their own, silent, and gone when their owner goes."""

from __future__ import annotations

import ctypes
import os
import signal
import sys
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from typing import Any, NoReturn

from sbiplat import files


@dataclass(frozen=True)
class Child:
    """A forked process and the pipe to it."""

    pid: int
    pipe: Connection

    def has_ended(self) -> bool:
        return os.waitid(os.P_PID, self.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None

    def kill(self) -> None:
        """End it and the programs that it started."""
        for kill in (os.killpg, os.kill):
            with suppress(ProcessLookupError, PermissionError):
                kill(self.pid, signal.SIGKILL)

    def wait(self) -> int:
        """Reap it; its exit status, or less than 0 for a signal."""
        self.pipe.close()
        return os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])


def fork(work: Callable[[Connection], None], output: int) -> Child:
    """A child that does `work(pipe)` and ends; what it prints goes to the file `output`."""
    ours, theirs = Pipe()
    owner = os.getpid()
    for stream in (sys.stdout, sys.stderr):
        with suppress(Exception):
            stream.flush()
    before = signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGINT, signal.SIGTERM))  # none may find a half-made child
    try:
        pid = os.fork()
        if pid == 0:
            ours.close()
            _be_child(work, theirs, output, owner, before)
        return Child(pid, ours)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
        theirs.close()


def _be_child(work: Callable[[Connection], None], pipe: Connection, output: int, owner: int, mask: set[signal.Signals]) -> NoReturn:
    code = 1
    try:
        files.let_go_of_locks()
        _settle(owner, output)
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        work(pipe)
        code = 0
    except (EOFError, ConnectionError):  # the owner has gone
        code = 0
    except BaseException as error:  # told through the output, as a crash of this row
        print(f"{type(error).__name__}: {error}", file=sys.stderr, flush=True)  # noqa: T201
    finally:
        os._exit(code)


def end_of(code: int) -> str:
    """How a process ended, in words."""
    if code >= 0:
        return f"exit status {code}"
    try:
        return f"killed by {signal.Signals(-code).name}" + (", perhaps for want of memory" if code == -signal.SIGKILL else "")
    except ValueError:
        return f"killed by signal {-code}"


def last_line(output: Any) -> str:
    """What a child printed last, for a message; "" where it printed nothing."""
    output.seek(max(0, output.seek(0, os.SEEK_END) - 4096))
    lines = [line.strip() for line in output.read().decode(errors="replace").splitlines() if line.strip()]
    return f"; it last printed: {lines[-1][:160]}" if lines else ""


# -------------------------------------------------------------------------------------------------- inside the child


def _settle(owner: int, output: int) -> None:
    """A process group of its own, output to the scratch file, and death with the owner."""
    with suppress(OSError):
        os.setpgid(0, 0)
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
        if os.getppid() != owner:
            os._exit(1)
    for number in (signal.SIGINT, signal.SIGTERM):  # no SIG_IGN: programs would inherit it
        signal.signal(number, _take_note)
    null = os.open(os.devnull, os.O_RDONLY)
    os.dup2(null, 0)
    os.dup2(output, 1)
    os.dup2(output, 2)
    sys.stdout, sys.stderr = (os.fdopen(os.dup(k), "w", buffering=1, encoding="utf-8", errors="replace") for k in (1, 2))
    if "torch" in sys.modules:  # forked from a process that has torch: its thread pool did not come along
        sys.modules["torch"].set_num_threads(1)


_asked = False


def asked_to_stop() -> bool:
    """In a child: whether SIGINT or SIGTERM has come."""
    return _asked


def _take_note(number: int, frame: Any) -> None:
    """The owner decides whether to stop; but a row made meanwhile does not count, since a program in it may have been stopped."""
    global _asked
    _asked = True
