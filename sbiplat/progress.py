"""Progress: a bar on a terminal, plain log lines elsewhere, or nothing.

One protocol: `with progress.task("simulate", total, done) as advance: advance(steps, note)`, done of an earlier sitting.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TextIO

Advance = Callable[..., None]
LOG_SECONDS = 10.0


class Progress:
    """Shows nothing; the base of those that do."""

    @contextmanager
    def task(self, name: str, total: int, done: int = 0) -> Iterator[Advance]:
        yield lambda steps=1, note="": None

    def say(self, line: str) -> None:
        """One line that belongs to no task."""

    @staticmethod
    def auto(stream: TextIO | None = None) -> Progress:
        """A bar where standard error is a terminal, log lines elsewhere."""
        stream = stream or sys.stderr
        return Bar() if stream.isatty() else Log(stream)


silent = Progress()


class Log(Progress):
    """A line at most every ten seconds, and one at the end."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def say(self, line: str) -> None:
        print(line, file=self._stream, flush=True)

    @contextmanager
    def task(self, name: str, total: int, done: int = 0) -> Iterator[Advance]:
        start = shown = time.monotonic()
        before, told, last = done, done, ""

        def line() -> str:
            rate = (done - before) / max(time.monotonic() - start, 1e-9)
            left = f", {(total - done) / rate:.0f} s left" if rate and done < total else ""
            return f"{name}: {done}/{total}, {rate:.4g}/s{left}{last and '; ' + last}"

        def advance(steps: int = 1, note: str = "") -> None:
            nonlocal done, shown, last, told
            done, last = done + steps, note or last
            if time.monotonic() - shown >= LOG_SECONDS:
                shown, told = time.monotonic(), done
                self.say(line())

        yield advance
        if total and (shown == start or done != told):
            self.say(line())


class Bar(Progress):
    """A rich progress bar on standard error."""

    def say(self, line: str) -> None:
        print(line, file=sys.stderr, flush=True)  # noqa: T201 - this is the place that prints

    @contextmanager
    def task(self, name: str, total: int, done: int = 0) -> Iterator[Advance]:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
        from rich.progress import Progress as Rich

        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn(),
                   TextColumn("{task.fields[note]}"))
        with Rich(*columns, console=Console(stderr=True)) as bar:
            task = bar.add_task(name, total=total, completed=done, note="")
            yield lambda steps=1, note="": bar.update(task, advance=steps, **({"note": note} if note else {}))
