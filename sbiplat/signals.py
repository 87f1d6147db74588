"""SIGINT and SIGTERM as a request for a clean stop: what is finished is kept, and the same command resumes."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from sbiplat.errors import UserError


class Interrupted(BaseException):
    """Raised by SIGINT or SIGTERM where a block may be dropped without harm."""


class Stopped(UserError):
    """The farm was asked to stop; what it had committed is kept."""

    exit_code = 130


class Signals:
    """SIGINT and SIGTERM as a request to stop, which interrupts only where that is safe."""

    def __init__(self) -> None:
        self.requested = False
        self._interruptible = False

    def __call__(self, number: int, frame: FrameType | None) -> None:
        self.requested = True
        if self._interruptible:
            self._interruptible = False
            raise Interrupted

    @contextmanager
    def interruptible(self) -> Iterator[None]:
        """Where a signal may break off what is under way: it raises Interrupted here, at once."""
        self._interruptible = True  # first: a signal that comes between these lines is not missed
        try:
            if self.requested:
                raise Interrupted
            yield
        finally:
            self._interruptible = False

    @contextmanager
    def installed(self) -> Iterator[None]:
        """Where signals are taken so; the handlers before it come back afterwards. Outside the main thread nothing changes."""
        self.requested = False
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {number: signal.signal(number, self) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, signal.SIG_DFL if handler is None else handler)  # None: not set from Python
