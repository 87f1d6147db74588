"""The farm: one digest on any workers and ranks, through kills, signals, full disks and crashes."""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from farm_simulators import PRIOR, batchwise, kills_its_worker, rowwise

import sbiplat as sp
from sbiplat import files
from sbiplat.bank import farm, segment
from sbiplat.bank.bank import Bank
from sbiplat.bank.fill import simulate
from sbiplat.bank.layout import Header
from sbiplat.progress import silent
from sbiplat.signals import Interrupted, Signals, Stopped

HERE = Path(__file__).parent
FILE = HERE / "farm_simulators.py"
MPIEXEC = Path(sys.prefix) / "bin" / "mpiexec"
LIMIT = 60  # seconds, for a job that hangs
RUN = """
import os
import sys
from pathlib import Path
import sbiplat as sp
from sbiplat.errors import UserError
spec, n, out, workers = sys.argv[1], int(sys.argv[2]), sys.argv[3], int(sys.argv[4])
exec(sys.argv[5] if len(sys.argv) > 5 else "")
try:
    os.write(1, f"{sp.simulate(spec, n, 1, out, workers=workers).digest}\\n".encode())
except UserError as error:
    print(f"error: {error}", file=sys.stderr)
    sys.exit(error.exit_code)
"""


def command(name, n, out, workers=1, extra=""):
    spec = f"{FILE}:{name}" if hasattr(sys.modules["farm_simulators"], name) else name
    return [sys.executable, "-c", RUN, spec, str(n), str(out), str(workers), extra]


def start(args, **settings):
    """A process in a group of its own."""
    return subprocess.Popen(args, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True, **settings)


def finish(process):
    try:
        out, err = process.communicate(timeout=LIMIT)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        pytest.fail("the job hangs")
    return process.returncode, out, err


def run(*args, **settings):
    return finish(start(command(*args, **settings)))


def mpi(ranks, *args, **settings):
    assert MPIEXEC.exists(), "these tests need mpiexec: pip install 'sbiplat[mpi]'"
    return start([str(MPIEXEC), "-n", str(ranks), *command(*args, **settings)])


def errors_in(text):
    return [line for line in text.splitlines() if line.startswith("error:")]


def wait_for(condition, process):
    end = time.monotonic() + LIMIT
    while not condition():
        assert process.poll() is None, "the job ended before it could be stopped"
        assert time.monotonic() < end, "the job never began"
        time.sleep(0.005)


def segments_of(out):
    return [p for p in (out / "segments").glob("[0-9]*.h5")] if (out / "segments").is_dir() else []


N = 2000


@pytest.fixture(scope="module")
def digest(tmp_path_factory):
    return simulate(rowwise, N, 1, tmp_path_factory.mktemp("whole") / "b", workers=1, progress=silent).digest


# ------------------------------------------------------------------------------------------------------- one content


@pytest.mark.parametrize("workers", [2, 3])
def test_a_bank_is_identical_on_any_number_of_workers(workers, digest, tmp_path):
    made = simulate(rowwise, N, 1, tmp_path / "b", workers=workers, progress=silent)
    assert made.digest == digest
    assert not made.verify()


@pytest.mark.parametrize("ranks", [2, 3, 5])
def test_a_bank_is_identical_on_any_number_of_ranks(ranks, digest, tmp_path):
    code, out, err = finish(mpi(ranks, "rowwise", N, tmp_path / "b"))
    assert (code, out.split()) == (0, [digest] * ranks), err


def test_a_batched_bank_is_identical_on_workers_and_ranks(tmp_path):
    here = simulate(batchwise, 5000, 1, tmp_path / "a", workers=2, progress=silent).digest
    assert finish(mpi(2, "batchwise", 5000, tmp_path / "b"))[1].split() == [here] * 2


def test_simulating_never_imports_torch(tmp_path):
    assert run("rowwise", 100, tmp_path / "b", 2,
               "import atexit; atexit.register(lambda: print('torch' in sys.modules))")[1].endswith("False\n")


# ------------------------------------------------------------------------------------------------------ kills, signals


@pytest.mark.parametrize("attempt", range(3))
def test_a_bank_survives_kills_of_its_whole_group_at_random_moments(attempt, digest, tmp_path):
    rng, out = np.random.default_rng(attempt), tmp_path / "b"
    for _ in range(3):
        process = start(command("rowwise", N, out, 2))
        wait_for((out / "bank.json").exists, process)
        time.sleep(rng.uniform(0, 0.5))
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
    made = simulate(rowwise, N, 1, out, workers=2, progress=silent)
    assert made.digest == digest
    assert not made.verify()
    assert not list(out.rglob(".tmp-*"))


def test_workers_end_with_their_parent_and_free_the_lock(digest, tmp_path):
    process = start(command("rowwise", N, tmp_path / "b", 2))
    wait_for(lambda: segments_of(tmp_path / "b"), process)
    process.kill()  # the parent alone
    process.communicate(timeout=LIMIT)  # its workers held the other ends of the pipes
    assert simulate(rowwise, N, 1, tmp_path / "b", workers=1, progress=silent).digest == digest


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("workers", [1, 2])
def test_a_signal_stops_in_one_line_and_the_same_command_resumes(number, workers, digest, tmp_path):
    process = start(command("rowwise", N, tmp_path / "b", workers))
    wait_for(lambda: (tmp_path / "b" / "bank.json").exists(), process)
    time.sleep(0.2)
    os.killpg(process.pid, number)  # as a terminal does
    code, out, err = finish(process)
    assert (code, out) == (130, "")
    kept, = re.findall(r"^error: stopped: (\d+) of 2000 rows are kept in .*; the same command resumes$", err, re.MULTILINE)
    assert Bank.open(tmp_path / "b").present == int(kept)
    assert simulate(rowwise, N, 1, tmp_path / "b", workers=2, progress=silent).digest == digest


def test_a_signal_between_two_looks_is_not_missed():
    signals = Signals()
    signals(signal.SIGINT, None)  # nothing may be interrupted yet
    with pytest.raises(Interrupted), signals.interruptible():
        pytest.fail("the request was forgotten")
    signals.requested = False
    with signals.interruptible():
        pass
    signals(signal.SIGINT, None)
    assert signals.requested


def test_a_second_process_is_told_to_wait(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "LOCK_SECONDS", 0.1)
    process = start(command("rowwise", N, tmp_path / "b"))
    wait_for(lambda: (tmp_path / "b" / "bank.json").exists(), process)
    with pytest.raises(sp.UserError, match="another process is filling"):
        simulate(rowwise, N, 1, tmp_path / "b", workers=1, progress=silent)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()


def test_a_worker_that_is_killed_is_one_line_and_the_rest_is_kept(tmp_path):
    simulate(kills_its_worker, 100, 1, tmp_path / "b", workers=1, progress=silent)
    code, _, err = run("kills_its_worker", 500, tmp_path / "b", 2, "import os; os.environ['SBIPLAT_TEST_DIE'] = '1'")
    assert code == 2
    assert "a worker process was killed while it ran simulator 'kills_its_worker'" in errors_in(err)[0]
    assert Bank.open(tmp_path / "b").present == 100


# --------------------------------------------------------------------------------------------------------- full disk

FULL = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (9000, 9000))"  # a segment of 64 rows is larger


@pytest.mark.parametrize("workers", [1, 2])
def test_a_full_disk_is_one_line_and_nothing_is_lost(workers, digest, tmp_path):
    simulate(rowwise, 640, 1, tmp_path / "b", workers=1, progress=silent)
    code, _, err = run("rowwise", N, tmp_path / "b", workers, FULL)
    assert code == 2
    assert re.fullmatch("error: the disk is full at .*; free some space and run the same command again; "
                        "what was committed before is kept", errors_in(err)[0])
    assert "Traceback" not in err
    assert not list((tmp_path / "b").rglob(".tmp-*"))
    assert Bank.open(tmp_path / "b").present == 640
    assert simulate(rowwise, N, 1, tmp_path / "b", workers=1, progress=silent).digest == digest


def test_a_full_disk_on_one_rank_ends_the_job_in_one_line(digest, tmp_path):
    one = f"from mpi4py import MPI\nif MPI.COMM_WORLD.Get_rank() == 2: {FULL}"
    code, _, err = finish(mpi(3, "rowwise", N, tmp_path / "b", extra=one))
    assert code == 2
    assert len(errors_in(err)) == 1
    assert "the disk is full" in err
    assert simulate(rowwise, N, 1, tmp_path / "b", workers=1, progress=silent).digest == digest


# --------------------------------------------------------------------------------------------------------------- MPI


def test_a_mistake_that_all_ranks_make_is_told_once(tmp_path):
    code, _, err = finish(mpi(3, "rowwize", 100, tmp_path / "b"))
    assert code == 2
    line, = errors_in(err)
    assert "no simulator is called 'rowwize'" in line
    assert not (tmp_path / "b").exists()


@pytest.mark.parametrize("place", ["_prepare", "_shown", "segment.commit", "_finish"])
@pytest.mark.parametrize("error", ["MemoryError('no room')", "KeyboardInterrupt()", "SystemExit(5)"])
def test_an_error_on_one_rank_ends_the_job_at_once(place, error, tmp_path):
    rank = 0 if place in ("_prepare", "_finish") else 1
    sabotage = f"""
from mpi4py import MPI
from sbiplat.bank import fill, segment
def fails(*_, **__): raise {error}
if MPI.COMM_WORLD.Get_rank() == {rank}: {'' if '.' in place else 'fill.'}{place} = fails
"""
    code, _, err = finish(mpi(2, "rowwise", 300, tmp_path / "b", extra=sabotage))
    assert code != 0
    assert len(errors_in(err)) == 1 or "SystemExit" in error
    assert "Traceback" not in err


def test_ranks_with_different_code_are_refused(tmp_path):
    other = ("from mpi4py import MPI\nif MPI.COMM_WORLD.Get_rank() == 1: "
             "spec = sp.simulator(prior={'a': sp.Normal(0, 1)}, x_shape=(1,), name='rowwise')(lambda theta, rng: theta)")
    code, _, err = finish(mpi(2, "rowwise", 100, tmp_path / "b", extra=other))
    assert code == 2
    assert "rank 1 on" in errors_in(err)[0]


def test_ctrl_c_on_mpiexec_stops_in_one_line_and_resumes(digest, tmp_path):
    process = mpi(3, "rowwise", N, tmp_path / "b")
    wait_for(lambda: segments_of(tmp_path / "b"), process)
    process.send_signal(signal.SIGINT)
    code, _, err = finish(process)
    assert code != 0
    assert re.fullmatch(r"error: stopped: \d+ of 2000 rows are kept in .*; the same command resumes", errors_in(err)[0])
    assert finish(mpi(2, "rowwise", N, tmp_path / "b"))[1].split() == [digest] * 2


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_rank_stopped_before_all_are_joined_ends_the_job(number, tmp_path):
    """The others wait for it inside MPI; a rank that just exits there leaves them waiting for ever."""
    program = (f"import os; from sbiplat.bank import farm; from sbiplat.cli import main; world = farm.mpi_world\n"
               f"farm.mpi_world = lambda: os.kill(os.getpid(), {number:d}) if os.environ['PMI_RANK'] == '1' else world()\nmain()")
    words = ["simulate", f"{FILE}:rowwise", "--n", "64", "--seed", "1", "--out", str(tmp_path / "b")]
    code, _, err = finish(start([str(MPIEXEC), "-n", "3", sys.executable, "-c", program, *words]))
    assert code != 0
    assert "error: stopped; what was committed is kept" in err


def test_a_rank_killed_twice_ends_the_job_each_time_and_the_same_command_resumes(digest, tmp_path):
    killed = """
from mpi4py import MPI
from sbiplat.bank import segment
import os
def commit(*given, real=segment.commit):
    real(*given)
    os.kill(os.getpid(), 9)
if MPI.COMM_WORLD.Get_rank() == 2: segment.commit = commit
"""
    present = 0
    for _ in range(2):
        assert finish(mpi(3, "rowwise", N, tmp_path / "b", extra=killed))[0] != 0
        assert present < Bank.open(tmp_path / "b").present < N
        present = Bank.open(tmp_path / "b").present
    assert finish(mpi(3, "rowwise", N, tmp_path / "b"))[1].split() == [digest] * 3


def test_tasks_that_mpi_does_not_join_are_refused(monkeypatch):
    for name in ("PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "4")
    with pytest.raises(sp.UserError, match="4 tasks were started, but MPI joins 1 of them"):
        farm.mpi_world()
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "garbage")
    assert farm.mpi_world() is None


# ------------------------------------------------------------------------------------------------------- scheduling


@pytest.mark.parametrize("workers", [1, 2, 7, 500])
@pytest.mark.parametrize("gaps", [[(0, 1000)], [(0, 64)], [(3, 70), (128, 129), (640, 1000)], []])
def test_tasks_cover_the_gaps_once_and_cut_only_at_blocks(workers, gaps):
    header = Header.of(rowwise, 1, 1000, 64)
    tasks = list(farm.spans(gaps, header, workers))
    rows = [row for first, stop in tasks for row in range(first, stop)]
    assert rows == [row for first, stop in gaps for row in range(first, stop)]
    edges = {edge for gap in gaps for edge in gap}
    assert all(edge % 64 == 0 or edge in edges for task in tasks for edge in task)


@pytest.mark.parametrize("workers", [2, 7, 500])
@pytest.mark.parametrize("gaps", [[(0, 1000)], [(3, 70), (128, 129), (640, 1000)]])
def test_slow_rows_are_cut_inside_blocks_towards_the_end(workers, gaps):
    header = Header.of(rowwise, 1, 1000, 64)
    tasks = list(farm.spans(gaps, header, workers, lambda: 1.0))
    assert sorted(r for a, b in tasks for r in range(a, b)) == [r for a, b in gaps for r in range(a, b)]
    assert tasks[-1][1] - tasks[-1][0] == 1
    whole = list(farm.spans(gaps, Header.of(batchwise, 1, 1000, 64), workers, lambda: 1.0))
    unknown = list(farm.spans([(0, 64)], header, 8, lambda: None))
    assert max(b - a for a, b in unknown) <= 2, "64 rows of an hour each are not one worker's"
    assert whole == list(farm.spans(gaps, Header.of(batchwise, 1, 1000, 64), workers)), "a block of a batched simulator is one call"


def test_a_long_task_is_committed_as_it_goes(tmp_path, monkeypatch):
    monkeypatch.setattr(farm, "COMMIT_SECONDS", 0.0)
    often = simulate(rowwise, 256, 1, tmp_path / "b", workers=1, progress=silent)
    assert often.info()["segments"] >= 4
    monkeypatch.undo()
    once = simulate(rowwise, 256, 1, tmp_path / "c", workers=1, progress=silent)
    assert once.info()["segments"] == 1
    assert once.digest == often.digest


@pytest.mark.parametrize("direct", [True, False], ids=["here", "in a child"])
def test_a_simulator_that_swallows_everything_still_stops(direct, tmp_path):
    calls = []

    def stubborn(theta, rng):
        calls.append(1)
        try:
            if len(calls) == 70:
                os.kill(os.getpid() if direct else os.getppid(), signal.SIGINT)
                time.sleep(0 if direct else 5)
        except BaseException:
            return theta
        return theta

    swallowing = sp.simulator(prior=PRIOR, x_shape=(2,), name="stubborn")(stubborn)
    with pytest.raises(Stopped, match=f"{69 if direct else 68} of 1000 rows are kept"):
        simulate(swallowing, 1000, 1, tmp_path / "b", workers=1, checked=False, isolate=not direct, progress=silent)


def test_the_callers_signal_handlers_come_back(tmp_path):
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    simulate(batchwise, 10, 1, tmp_path / "b", workers=1, progress=silent)
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before


def test_a_failed_commit_leaves_no_file(tmp_path, monkeypatch):
    monkeypatch.setattr(segment, "write", lambda path,
                        *_: path.write_bytes(b"half") and (_ for _ in ()).throw(OSError(28, "No space left")))
    with pytest.raises(sp.UserError, match="the disk is full"):
        simulate(batchwise, 10, 1, tmp_path / "b", workers=1, progress=silent)
    assert not list((tmp_path / "b" / "segments").iterdir())


# --------------------------------------------------------------------------------------------------- parallel simulators


def parallel_command(out, ranks, each, n=120):
    words = [sys.executable, "-m", "sbiplat", "simulate", f"{FILE}:parallel", "--n", str(n), "--seed", "1", "--out", str(out),
             "--ranks-per-simulation", str(each)]
    return [str(MPIEXEC), "-n", str(ranks), *words] if ranks > 1 else words


def test_a_parallel_simulator_gets_its_own_communicator_and_gives_the_same_bank(tmp_path):
    """One process; three ranks of which each simulates alone; two groups of two; one of three."""
    digests = set()
    for ranks, each in ((1, 1), (3, 1), (5, 2), (4, 3)):
        out, sizes = tmp_path / f"{ranks}-{each}", tmp_path / f"sizes-{ranks}-{each}"
        code, _, err = finish(start(parallel_command(out, ranks, each), env={**os.environ, "SBIPLAT_TEST_SIZES": str(sizes)}))
        assert code == 0, err
        bank = Bank.open(out)
        digests.add(bank.digest)
        rows = sizes.read_text().split()[-bank.status_counts()["ok"] * each:]
        assert set(rows) == {str(each)}
    assert len(digests) == 1
    np.testing.assert_array_equal(bank.status == 2, bank.theta[:, 0] < 0.1)
    assert "ValueError: low, on rank" in bank.info()["first_failures"][0]["message"]


@pytest.mark.parametrize(("name", "ranks", "each", "says"), [
    ("parallel", 4, 2, "need 1 + a multiple of 2 ranks (the first hands out), and there are 4; use mpiexec -n 3"),
    ("parallel", 1, 2, "and there are 1; use mpiexec -n 3"), ("rowwise", 3, 2, "does not take a communicator"),
])
def test_ranks_that_cannot_be_split_so_are_one_line(name, ranks, each, says, tmp_path):
    words = [w.replace(":parallel", f":{name}") for w in parallel_command(tmp_path / "b", ranks, each)]
    code, _, err = finish(start(words))
    assert code == 2
    assert len(errors_in(err)) == 1
    assert says in err
    assert not (tmp_path / "b").exists()


def test_a_signal_stops_a_parallel_simulator_between_rows(tmp_path):
    process = start(parallel_command(tmp_path / "b", 5, 2, 200_000))
    wait_for(lambda: segments_of(tmp_path / "b"), process)
    process.send_signal(signal.SIGINT)
    code, _, err = finish(process)
    assert code != 0
    assert 0 < Bank.open(tmp_path / "b").present < 200_000, err


@pytest.mark.parametrize(("limit", "says"), [
    ("2", "raised on one rank (ValueError: alone) and the others wait for it in MPI"), ("0.5", "took longer than the time limit of 0.5 s")])
def test_a_parallel_simulator_that_leaves_its_ranks_waiting_ends_the_job(limit, says, tmp_path):
    """One rank raises and the other is inside comm.allreduce; or both are, for ever."""
    name = "alone" if limit == "2" else "astray"
    words = [w.replace(":parallel", f":{name}") for w in parallel_command(tmp_path / "b", 3, 2)]
    code, _, err = finish(start([*words, "--no-check", "--time-limit", limit]))
    assert code != 0
    assert any(says in line for line in errors_in(err)), err


def test_a_signal_ends_a_parallel_simulator_that_waits_for_ever(tmp_path):
    words = [w.replace(":parallel", ":astray") for w in parallel_command(tmp_path / "b", 3, 2)]
    process = start([*words, "--no-check"])
    wait_for(lambda: (tmp_path / "b" / "bank.json").exists(), process)
    time.sleep(2)
    process.send_signal(signal.SIGTERM)
    code, _, err = finish(process)
    assert code != 0
    assert any("within a row that did not end in 10 s" in line for line in errors_in(err)), err
