"""Identity: any block size, extension pattern, kill point, worker count and compaction give the digest of the bank made in one go."""

import tempfile
from pathlib import Path

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

import sbiplat as sp
from sbiplat.bank import care, farm, segment
from sbiplat.progress import silent

PRIOR = sp.Prior({"a": sp.Uniform(0.0, 1.0), "b": sp.Gamma(2.0, 3.0)})


@sp.simulator(prior=PRIOR, x_shape={"trace": (3,), "count": ()}, dtype="float64", name="scalar_identity")
def scalar(theta, rng):
    if rng.random() < 0.1:
        raise ValueError("unlucky")
    return {"trace": theta[0] + rng.standard_normal(3), "count": np.nan if rng.random() < 0.1 else theta[1]}


@sp.simulator(prior=PRIOR, x_shape=(4,), batched=True, name="batched_identity")
def batched(theta, rng):
    x = theta[:, :1] + rng.standard_normal((len(theta), 4))
    x[rng.random(len(theta)) < 0.1] = np.inf
    return x


class Killed(BaseException):
    """What a kill looks like from the next command: nothing after it happens."""


def fill(simulator, n, out, block_size, workers, isolate, kill_after, commit_seconds):
    """Fill a bank; at the `kill_after`-th commit of this process the file is half written and all ends."""
    left = [kill_after]
    original, before = segment.write, farm.COMMIT_SECONDS

    def write(path, header, rows):
        left[0] -= 1
        if left[0] == 0:
            path.write_bytes(b"half")
            raise Killed
        original(path, header, rows)

    segment.write, farm.COMMIT_SECONDS = write, commit_seconds
    try:
        return sp.simulate(simulator, n, 7, out, workers=workers, block_size=block_size, isolate=isolate, checked=False, progress=silent)
    except Killed:
        return None
    finally:
        segment.write, farm.COMMIT_SECONDS = original, before


@settings(max_examples=40, deadline=None)
@given(
    simulator=st.sampled_from([scalar, batched]), block_size=st.integers(1, 70), commit_seconds=st.sampled_from([0.0, 60.0]),
    steps=st.lists(st.tuples(st.integers(1, 300), st.sampled_from([0, 1, 2, 3]), st.booleans(), st.sampled_from([1, 1, 1, 3])), min_size=1, max_size=4),
    compacted=st.booleans(),
)
def test_any_history_gives_the_same_bank(simulator, block_size, commit_seconds, steps, compacted):
    with tempfile.TemporaryDirectory() as folder:
        largest = 0
        for n, kill_after, isolate, workers in steps:
            largest = max(largest, n)
            # a kill is played in this process, so it needs the one worker that is here
            kill = kill_after if workers == 1 else 0
            fill(simulator, largest, Path(folder) / "b", block_size, workers, isolate, kill, commit_seconds)
        made = fill(simulator, largest, Path(folder) / "b", block_size, 1, True, 0, 60.0)
        if compacted:
            made = care.compact(Path(folder) / "b")
        whole = fill(simulator, largest, Path(folder) / "whole", block_size, 1, False, 0, 60.0)
        assert made.digest == whole.digest
        assert not care.survey(Path(folder) / "b").problems
        assert not [p for p in (Path(folder) / "b" / "segments").iterdir() if p.name.startswith(".tmp")]


def test_the_check_can_fail():
    """A bank of one other bit has another digest: the property above is not empty."""
    with tempfile.TemporaryDirectory() as folder:
        digests = {fill(s, 50, Path(folder) / str(k), size, 1, True, 0, 60.0).digest
                   for k, (s, size) in enumerate([(scalar, 10), (scalar, 11), (batched, 10), (batched, 11)])}
        assert len(digests) == 4
