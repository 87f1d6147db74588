"""Hostile simulators: whatever one does stays in its row, and the bank is the same on any workers and after any stop."""

import ctypes
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

import sbiplat as sp
from sbiplat.bank import sandbox
from sbiplat.bank.bank import Bank
from sbiplat.bank.layout import STATUS
from sbiplat.bank.sight import look, where_failed
from sbiplat.progress import silent
from sbiplat.report.bank_figure import draw

PRIOR = sp.Prior({"a": sp.Uniform(0.0, 1.0), "b": sp.Normal(0.0, 1.0)})


def fill(simulator, n, out, **settings):
    return sp.simulate(simulator, n, 1, out, **{"workers": 1, "checked": False, "progress": silent, **settings})


def segfault():
    ctypes.string_at(0)


def hang():
    while True:
        time.sleep(60)


def spin():
    while True:
        pass


def in_a_grandchild():
    subprocess.run(["sleep", "60"], check=True)


FATAL = {
    "segfault": (segfault, "SIGSEGV"), "exit": (lambda: os._exit(3), "exit status 3"), "abort": (os.abort, "SIGABRT"),
    "kill": (lambda: os.kill(os.getpid(), signal.SIGKILL), "SIGKILL, perhaps for want of memory"),
    "interrupt": (lambda: (_ for _ in ()).throw(KeyboardInterrupt("no")), "it last printed: KeyboardInterrupt"),
}


@sp.simulator(prior=PRIOR, x_shape=(3,))
def sound(theta, rng):
    """What the others do in their good rows."""
    return theta[0] + rng.standard_normal(3)


def broken(fate, where=0.05, batched=False):
    """A simulator that meets its fate where a < `where`."""
    def simulator(theta, rng):
        if np.min(theta[..., 0]) < where:
            fate()
        return np.atleast_1d(theta[..., 0])[:, None] + rng.standard_normal((len(theta), 3)) if batched else sound(theta, rng)

    return sp.simulator(prior=PRIOR, x_shape=(3,), name=f"hostile{'s' * batched}", batched=batched)(simulator)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    return fill(sound, 200, tmp_path_factory.mktemp("sound") / "b")


def assert_only_bad_rows_differ(bank, whole, status, where=0.05):
    """The bad rows are marked, with theta and without x; all others are those of the sound simulator."""
    bad = whole.theta[:, 0] < where
    assert 3 < bad.sum() < 30
    np.testing.assert_array_equal(bank.theta, whole.theta)
    np.testing.assert_array_equal(bank.status, np.where(bad, STATUS[status], 0))
    np.testing.assert_array_equal(bank.x[~bad], whole.x[~bad])
    assert np.isnan(bank.x[bad]).all()
    assert not bank.verify()


@pytest.mark.parametrize("fate", FATAL)
@pytest.mark.parametrize("workers", [1, 2])
def test_a_row_that_takes_its_process_down_is_marked_and_the_others_kept(fate, workers, whole, tmp_path):
    does, says = FATAL[fate]
    bank = fill(broken(does), 200, tmp_path / "b", workers=workers)
    assert_only_bad_rows_differ(bank, whole, "crashed")
    assert says in bank.info()["first_failures"][0]["message"]


@pytest.mark.parametrize("fate", [hang, spin, in_a_grandchild], ids=["hang", "spin", "a program"])
def test_a_row_beyond_the_time_limit_is_marked_and_the_others_kept(fate, whole, tmp_path):
    bank = fill(broken(fate), 200, tmp_path / "b", workers=2, time_limit=0.2)
    assert_only_bad_rows_differ(bank, whole, "timed-out")
    assert "took longer than the time limit of 0.2 s" in bank.info()["first_failures"][0]["message"]


def test_a_program_that_a_late_row_started_ends_with_it(tmp_path):
    mark = f"{os.getpid()}.25"
    bank = fill(broken(lambda: subprocess.run(["sleep", mark], check=True), where=0.01), 200, tmp_path / "b", time_limit=0.2)
    assert bank.status_counts()["timed-out"] >= 1
    assert not [p for p in Path("/proc").glob("[0-9]*/cmdline") if mark.encode() in p.read_bytes()]


def test_a_row_killed_once_from_outside_is_made_again(whole, tmp_path):
    """An operator's kill -9 of the simulator's process leaves no trace in the bank."""
    once = tmp_path / "once"

    def fate():
        if not once.exists():
            once.touch()
            os.kill(os.getpid(), signal.SIGKILL)

    assert fill(broken(fate), 200, tmp_path / "b").status_counts()["crashed"] == 0
    np.testing.assert_array_equal(Bank.open(tmp_path / "b").x, whole.x)


def test_a_block_of_a_batched_simulator_fails_as_one(tmp_path):
    bank = fill(broken(lambda: os._exit(1), where=2e-3, batched=True), 20 * 64, tmp_path / "b", block_size=64)
    low = bank.theta[:, 0].reshape(20, 64).min(1) < 2e-3
    assert 0 < low.sum() < 20
    np.testing.assert_array_equal(bank.status.reshape(20, 64), np.where(low, STATUS["crashed"], 0)[:, None].repeat(64, 1))


def test_the_worst_of_all_gives_one_bank_on_any_workers_and_ranks(tmp_path):
    """Crashes, hangs, exceptions, wrong shapes and NaN in one simulator: 1 and 3 workers, and 3 MPI ranks."""
    words = [sys.executable, "-m", "sbiplat", "simulate", f"{__file__}:the_worst", "--n", "300", "--seed", "1", "--no-check", "--time-limit", "0.3"]
    mpiexec = Path(sys.prefix) / "bin" / "mpiexec"
    for line, out in (([*words, "--workers", "1"], "b1"), ([*words, "--workers", "3"], "b3"), ([mpiexec, "-n", "3", *words], "m3")):
        done = subprocess.run([*line, "--out", out], cwd=tmp_path, capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stderr
    banks = [Bank.open(tmp_path / k) for k in ("b1", "b3", "m3")]
    assert len({b.digest for b in banks}) == 1
    assert all(count > 0 for count in banks[0].status_counts().values())


@sp.simulator(prior=PRIOR, x_shape=(3,))
def the_worst(theta, rng):
    """One fault for every hundredth of a."""
    a = int(100 * theta[0])
    print("noise", a)  # noqa: T201
    if a < 6:
        (segfault, lambda: os._exit(3), hang, lambda: sys.exit("out"), lambda: 1 / 0, os.abort)[a]()
    if a < 8:
        return np.zeros(4 + a) if a == 6 else {"x": theta}
    return sound(theta, rng) if a > 10 else np.full(3, np.nan)


def test_what_it_prints_stays_out_of_the_way(tmp_path, capfd):
    def loud(theta, rng):
        print("hello")  # noqa: T201
        os.write(1, b"raw\n")
        os.system("echo shell")
        return theta

    fill(sp.simulator(prior=PRIOR, x_shape=(2,), name="loud")(loud), 100, tmp_path / "b")
    assert capfd.readouterr() == ("", "")


def test_what_it_prints_is_bounded_on_disk(tmp_path, monkeypatch):
    monkeypatch.setattr(sandbox, "OUTPUT_BYTES", 10_000)

    def loud(theta, rng):
        print("x" * 1000)  # noqa: T201
        return [os.fstat(1).st_blocks * 512 > 200_000, 0.0]

    assert not fill(sp.simulator(prior=PRIOR, x_shape=(2,), name="loud")(loud), 1000, tmp_path / "b").x.any()


def test_a_leak_ends_with_its_process(tmp_path):
    held = []

    def leaks(theta, rng):
        held.append(1)
        return np.full(2, os.getpid() if theta[1] > 9 else 0.0)

    simulator = sp.simulator(prior=PRIOR, x_shape=(2,), name="leaks")(leaks)
    pids = tmp_path / "pids"
    pids.mkdir()

    def noted(theta, rng):
        (pids / str(os.getpid())).touch()
        return leaks(theta, rng)

    simulator = sp.simulator(prior=PRIOR, x_shape=(2,), name="leaks")(noted)
    fill(simulator, 640, tmp_path / "b", recycle=2)
    assert len(list(pids.iterdir())) == 5
    assert not held, "the worker's own memory is untouched"


@pytest.mark.parametrize("source", [random.random, np.random.rand, time.time], ids=["random", "np.random", "clock"])
@pytest.mark.parametrize("isolate", [True, False], ids=["in a child", "here"])
def test_state_outside_its_stream_is_told(source, isolate, tmp_path):
    simulator = sp.simulator(prior=PRIOR, x_shape=(2,), name="moody", dtype="float64")(lambda theta, rng: theta + 1e-3 * source())
    with pytest.raises(sp.UserError, match=r"randomness|a different x for the same theta"):
        fill(simulator, 200, tmp_path / "b", checked=not isolate, isolate=isolate)


def test_a_crash_in_the_contract_check_does_not_take_the_command_down(tmp_path):
    done = subprocess.run([sys.executable, "-m", "sbiplat", "simulate", f"{__file__}:always_dies", "--n", "4", "--seed", "1", "--out", "b"],
                          cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2
    assert "SIGSEGV" in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "b").exists()


@sp.simulator(prior=PRIOR, x_shape=(2,))
def always_dies(theta, rng):
    segfault()


def test_a_stop_in_a_long_row_keeps_the_rows_before_it(whole, tmp_path):
    """An hour's row is dropped at once; what was finished in its block is committed, and the resume gives the same bank."""
    slow = tmp_path / "slow"
    slow.touch()

    def fate():
        if slow.exists():
            os.kill(os.getppid(), signal.SIGTERM)
            hang()

    simulator = broken(fate)
    began = time.monotonic()
    with pytest.raises(sp.UserError, match="rows are kept"):
        fill(simulator, 200, tmp_path / "b")
    assert time.monotonic() - began < 10
    first = int(np.argmax(whole.theta[:, 0] < 0.05))
    assert Bank.open(tmp_path / "b").present == first > 0
    slow.unlink()
    assert np.array_equal(fill(simulator, 200, tmp_path / "b").x, whole.x)


# ------------------------------------------------------------------------------------------------------------- sight


def test_info_says_where_in_theta_rows_fail(tmp_path):
    def fails(theta, rng):
        if theta[1] > 1:
            raise ValueError("steep")
        if rng.random() < 0.1:
            return np.full(3, np.nan)
        return sound(theta, rng)

    bank = fill(sp.simulator(prior=PRIOR, x_shape=(3,), name="fails")(fails), 1000, tmp_path / "b")
    where = {f["status"]: f for f in where_failed(look(bank), bank.header.prior.names)}
    assert where["raised"]["parameter"] == "b"
    assert where["raised"]["apart"] > 0.9
    assert where["raised"]["range"][0] >= 1
    assert where["non-finite"]["apart"] < 0.3, "nothing decides it"
    done = subprocess.run([sys.executable, "-m", "sbiplat", "bank", "info", tmp_path / "b"], capture_output=True, text=True, timeout=60)
    assert f"raised: {(bank.status == 2).sum()} rows, most of them with b from 1." in done.stdout
    picture = draw(bank, tmp_path / "p.png")
    assert picture.read_bytes().startswith(b"\x89PNG")
    with pytest.raises(sp.UserError, match=r"\.png, \.svg, \.pdf"):
        draw(bank, tmp_path / "p.txt")


def test_a_look_at_a_large_bank_is_bounded(whole, monkeypatch):
    monkeypatch.setattr("sbiplat.bank.sight.MOST_ROWS", 50)
    assert len(look(whole).status) == 50


# ------------------------------------------------------------------------------- processes, pipes, locks and streams of its own


@pytest.mark.parametrize("stray", [lambda: 1 / 0, lambda: sys.exit(0), lambda: None, lambda: (_ for _ in ()).throw(KeyboardInterrupt)],
                         ids=["raises", "exits", "returns", "interrupt"])
@pytest.mark.parametrize("workers", [1, 3])
def test_a_forked_process_that_strays_out_of_the_call_changes_nothing(stray, workers, whole, tmp_path):
    def fate():
        child = os.fork()
        if child == 0:
            stray()
        else:
            os.waitpid(child, 0)

    bank = fill(broken(fate), 200, tmp_path / "b", workers=workers)
    np.testing.assert_array_equal(bank.x, whole.x)
    assert bank.status_counts()["ok"] == 200


def test_a_signal_that_the_simulator_swallows_leaves_no_row_behind(tmp_path):
    """Here, without a child: the stop is raised inside the simulator, which answers with a wrong x."""
    def bare(theta, rng):
        try:
            if theta[0] < 0.05 and not (tmp_path / "once").exists():
                (tmp_path / "once").touch()
                os.kill(os.getpid(), signal.SIGINT)
                time.sleep(0.1)
        except BaseException:
            return np.full(3, -99.0)
        return sound(theta, rng)

    simulator = sp.simulator(prior=PRIOR, x_shape=(3,), name="bare")(bare)
    with pytest.raises(sp.UserError, match="rows are kept"):
        fill(simulator, 200, tmp_path / "b", isolate=False)
    assert (fill(simulator, 200, tmp_path / "b", isolate=False).x > -50).all()


def test_a_closed_pipe_is_a_crash_of_its_row(whole, tmp_path):
    def fate():
        os.closerange(3, 256)
        time.sleep(30)

    bank = fill(broken(fate), 200, tmp_path / "b")
    assert_only_bad_rows_differ(bank, whole, "crashed")
    assert "closed the pipe" in bank.info()["first_failures"][0]["message"]


def test_programs_of_a_crashed_row_end_with_it(whole, tmp_path):
    mark = f"{os.getpid()}.5"

    def fate():
        subprocess.Popen(["sleep", mark])
        os._exit(1)

    assert_only_bad_rows_differ(fill(broken(fate), 200, tmp_path / "b"), whole, "crashed")
    assert not [p for p in Path("/proc").glob("[0-9]*/cmdline") if mark.encode() in p.read_bytes()]


def test_a_row_that_hangs_when_it_is_run_again_is_told(tmp_path):
    calls = []

    def once(theta, rng):
        calls.append(1)
        if len(calls) > 64:
            hang()
        return theta

    with pytest.raises(sp.UserError, match="when a row was run again"):
        fill(sp.simulator(prior=PRIOR, x_shape=(2,), name="once")(once), 64, tmp_path / "b", time_limit=0.3)


def test_what_it_leaves_running_does_not_hold_the_bank(tmp_path):
    pid = tmp_path / "pid"

    def daemon(theta, rng):
        if not pid.exists():
            child = os.fork()
            if child == 0:
                os.setsid()
                time.sleep(30)
                os._exit(0)
            pid.write_text(str(child))
        return theta

    simulator = sp.simulator(prior=PRIOR, x_shape=(2,), name="daemon")(daemon)
    fill(simulator, 10, tmp_path / "b")
    assert fill(simulator, 20, tmp_path / "b").rows == 20
    os.kill(int(pid.read_text()), signal.SIGKILL)


def test_any_text_may_be_raised(tmp_path):
    def raises(theta, rng):
        raise ValueError("bad file \udcff " + "é" * 300)

    info = fill(sp.simulator(prior=PRIOR, x_shape=(2,), name="raises")(raises), 3, tmp_path / "b").info()
    assert "bad file ? éé" in info["first_failures"][0]["message"]


def test_a_masked_array_is_not_finite(tmp_path):
    def masked(theta, rng):
        return np.ma.masked_greater(theta, 0.5)

    bank = fill(sp.simulator(prior=PRIOR, x_shape=(2,), name="masked")(masked), 50, tmp_path / "b")
    np.testing.assert_array_equal(np.isnan(bank.x), bank.theta > 0.5)
    np.testing.assert_array_equal(bank.status == 1, (bank.theta > 0.5).any(1))


def test_a_simulator_that_goes_elsewhere_does_not_take_the_bank_along(tmp_path, monkeypatch):
    def goes(theta, rng):
        os.chdir("/")
        return theta

    monkeypatch.chdir(tmp_path)
    assert fill(sp.simulator(prior=PRIOR, x_shape=(2,), name="goes")(goes), 100, "b", isolate=False).complete
    assert (tmp_path / "b" / "bank.json").exists()


@pytest.mark.parametrize(("settings", "says"), [
    ({"time_limit": 1e12}, "between"), ({"block_size": 10**11}, "block_size must be"), ({"block_size": 2**31}, "give a smaller --block-size"),
])
def test_settings_beyond_reason_are_one_line(settings, says, tmp_path):
    simulator = broken(hang, batched=True)
    with pytest.raises(sp.UserError, match=says):
        fill(simulator, 10, tmp_path / "b", **settings)
    assert not (tmp_path / "b").exists()


def test_a_scalar_block_larger_than_memory_costs_nothing(tmp_path):
    assert fill(sound, 10, tmp_path / "b", block_size=2**31).complete


# ------------------------------------------------------------------------------------------------- the contract check


@pytest.mark.parametrize(("body", "code", "says"), [
    ("import ctypes; ctypes.string_at(0)", 2, "ended its process in one of its first rows (killed by SIGSEGV)"),
    ("import os; os._exit(3)", 2, "ended its process in one of its first rows (exit status 3)"),
    ("import time; time.sleep(1000)", 0, "check broken off: its rows took longer than the time limit"),
    ("print('noise')", 0, "check passed on 2 rows"),
], ids=["segfault", "exit", "hang", "prints"])
def test_the_card_survives_whatever_the_simulator_does(body, code, says, tmp_path):
    (tmp_path / "s.py").write_text(
        "import sbiplat as sp\n@sp.simulator(prior=sp.Prior({'a': sp.Normal(0, 1)}), x_shape=(1,))\n"
        f"def s(theta, rng):\n    {body}\n    return theta + rng.standard_normal(1)\n")
    words = [sys.executable, "-m", "sbiplat", "simulators", "s.py:s", "--rows", "2", "--time-limit", "0.3"]
    result = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True, timeout=60, check=False)
    assert result.returncode == code, result.stderr
    assert says in (result.stdout if code == 0 else result.stderr)
    assert "noise" not in result.stdout + result.stderr
    assert "Traceback" not in result.stderr


def test_a_breach_in_the_first_rows_names_the_way_around(tmp_path):
    odd = sp.simulator(prior=sp.Prior({"a": sp.Normal(0, 1)}), x_shape=(2,), name="odd")(lambda theta, rng: np.zeros(3 if theta[0] > -9 else 2))
    with pytest.raises(sp.UserError, match=r"declared is .2,.*--no-check"):
        fill(odd, 64, tmp_path / "b", checked=True)


def test_info_shows_one_row_of_each_kind_of_failure(tmp_path):
    @sp.simulator(prior=sp.Prior({"a": sp.Uniform(0, 1)}), x_shape=(1,))
    def many_ways(theta, rng):
        if theta[0] < 0.5:
            raise ValueError(f"a = {theta[0]:.3f} is low")
        if theta[0] < 0.6:
            raise KeyError("rare")
        return theta

    bank = fill(many_ways, 300, tmp_path / "b")
    kinds = bank.info()["first_failures"]
    assert [k["message"].split(":")[0] for k in sorted(kinds, key=lambda k: -k["rows_alike"])] == ["ValueError", "KeyError"]
    assert sum(k["rows_alike"] for k in kinds) == bank.status_counts()["raised"]
