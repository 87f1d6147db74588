"""Log lines of a task: its rate and the time left count what this sitting did."""

from __future__ import annotations

import io
from itertools import count

import pytest

from sbiplat import progress


@pytest.fixture
def clock(monkeypatch):
    """A clock that goes on by 4 s each time it is read."""
    seconds = count(0, 4)
    monkeypatch.setattr(progress.time, "monotonic", lambda: next(seconds))


@pytest.mark.parametrize("done", [0, 2600])
def test_what_an_earlier_sitting_did_is_not_of_this_ones_rate(clock, done):
    stream = io.StringIO()
    with progress.Log(stream).task("train", done + 64, done) as advance:
        for _ in range(3):
            advance(4)
    first = stream.getvalue().splitlines()[0]
    assert first.startswith(f"train: {done + 12}/{done + 64}, ")
    assert first.endswith(f"{12 / 20:.4g}/s, {52 * 20 / 12:.0f} s left")


def test_a_task_that_was_done_before_is_one_line(clock):
    stream = io.StringIO()
    with progress.Log(stream).task("train", 8, 8):
        pass
    assert stream.getvalue().splitlines() == ["train: 8/8, 0/s"]


def test_a_bar_begins_where_the_earlier_sitting_ended(capsys):
    with progress.Bar().task("train", 10, 7) as advance:
        advance(1, "a note")
    assert "8/10" in capsys.readouterr().err
