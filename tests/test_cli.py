"""The commands, as a user types them: what they do, what they say of a mistake, and their exit codes."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import h5py
import numpy as np
import pytest

BIN = Path(sys.executable).parent

PULSE = '''
import numpy as np
import sbiplat as sp

@sp.simulator(prior=sp.Prior({"height": sp.Uniform(0.1, 1.0, unit="V"), "when": sp.Normal(0.0, 1.0, unit="s")}), x_shape=(6,),
              x_axis=("t", range(6)), x_unit="V")
def pulse(theta, rng):
    """A pulse of some height at some time, in noise."""
    t = np.linspace(-2, 2, 6)
    return theta[0] * np.exp(-0.5 * (t - theta[1]) ** 2) + 0.1 * rng.standard_normal(6)

@sp.simulator(prior=sp.Prior({"a": sp.Uniform(0, 1)}), x_shape=(3,))
def misshapen(theta, rng):
    return np.zeros(4)

not_one = 3
'''
TINY = ["--set", "flow=gaussian", "--set", "max_epochs=6", "--set", "batch_size=64", "--set", "embedding_hidden=[32]"]


def sbiplat(*words, cwd=None, env=None):
    return subprocess.run([BIN / "sbiplat", *map(str, words)], capture_output=True, text=True, cwd=cwd, timeout=240, env=env)


def mistake(result, code=2):
    """The one line on standard error of a user's mistake."""
    assert result.returncode == code, (result.returncode, result.stdout, result.stderr)
    lines = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1, result.stderr
    assert "Traceback" not in result.stderr
    return lines[0]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A user's own folder, outside the project, after simulate and train."""
    place = tmp_path_factory.mktemp("user")
    (place / "mine.py").write_text(PULSE)
    made = sbiplat("simulate", "mine.py:pulse", "--n", 3000, "--seed", 1, "--out", "b", "--workers", 2, cwd=place)
    assert made.returncode == 0, made.stderr
    trained = sbiplat("train", "b", "--estimator", "npe", "--out", "r", *TINY, cwd=place)
    assert trained.returncode == 0, trained.stderr
    rng = np.random.default_rng(0)
    np.save(place / "x.npy", 0.5 * np.exp(-0.5 * np.linspace(-2, 2, 6) ** 2) + 0.1 * rng.standard_normal(6))
    return place


def test_a_users_own_simulator_goes_through_every_command(place):
    card = json.loads(sbiplat("simulators", "mine.py:pulse", "--json", cwd=place).stdout)
    assert card["check"]["finite"] == 1.0
    info = json.loads(sbiplat("bank", "info", "b", "--json", cwd=place).stdout)
    assert info["rows"] == 3000
    assert info["status"]["ok"] == 3000
    assert sbiplat("bank", "verify", "b", cwd=place).returncode == 0
    assert sbiplat("bank", "pack", "b", "--out", "b.h5", cwd=place).returncode == 0
    assert json.loads(sbiplat("bank", "info", "b.h5", "--json", cwd=place).stdout)["digest"] == info["digest"]
    refused = sbiplat("sample", "r", "--observation", "x.npy", "--n", 10, "--out", "d.csv", cwd=place)
    assert "has not been through the gate" in mistake(refused, 4)
    assert not (place / "d.csv").exists()
    gated = sbiplat("gate", "r", "--json", cwd=place)
    certificate = json.loads((place / "r" / "certificate.json").read_text())
    assert gated.returncode == (0 if certificate["passed"] else 3)
    assert json.loads(gated.stdout) == certificate
    assert certificate["digests"]["bank"] == info["digest"]
    for suffix in ("csv", "h5", "nc"):
        result = sbiplat("sample", "r", "--observation", "x.npy", "--n", 500, "--out", f"d.{suffix}", "--allow-uncertified", cwd=place)
        assert result.returncode == 0, result.stderr
    lines = (place / "d.csv").read_text().splitlines()
    assert lines[0] == "height,when"
    assert len(lines) == 501
    draws = np.loadtxt(place / "d.csv", delimiter=",", skiprows=1)
    with h5py.File(place / "d.h5") as file:
        np.testing.assert_allclose(file["theta"][:], draws, rtol=1e-12)
        assert list(file["theta"].attrs["units"]) == ["V", "s"]
    assert ((draws[:, 0] >= 0.1) & (draws[:, 0] <= 1.0)).all()
    reported = sbiplat("report", "r", "--observation", "x.npy", "--simulator", "mine.py:pulse", cwd=place)
    assert reported.returncode == 0, reported.stderr
    assert "<html" in (place / "r" / "report.html").read_text()[:300]


def test_train_again_returns_at_once_and_other_settings_are_refused(place):
    before = (place / "r" / "weights.safetensors").read_bytes()
    assert sbiplat("train", "b", "--estimator", "npe", "--out", "r", *TINY, cwd=place).returncode == 0
    assert (place / "r" / "weights.safetensors").read_bytes() == before
    line = mistake(sbiplat("train", "b", "--out", "r", *TINY, "--seed", 4, cwd=place))
    assert "was begun with seed = 0, not 4" in line


@pytest.mark.parametrize(("words", "says"), [
    (["simulate", "two_mons", "--n", 9, "--seed", 1, "--out", "z"], "did you mean two_moons"),
    (["simulate", "mine.py:puls", "--n", 9, "--seed", 1, "--out", "z"], "simulators there: pulse, misshapen"),
    (["simulate", "mine.py:not_one", "--n", 9, "--seed", 1, "--out", "z"], "is not decorated with @sp.simulator"),
    (["simulate", "gone.py:pulse", "--n", 9, "--seed", 1, "--out", "z"], "no simulator file at"),
    (["simulate", "mine.py:misshapen", "--n", 9, "--seed", 1, "--out", "z"], "x has shape (4,), declared is (3,)"),
    (["simulate", "mine.py:pulse", "--n", 0, "--seed", 1, "--out", "z"], "n must be a whole number of at least 1"),
    (["simulate", "mine.py:pulse", "--n", "many", "--seed", 1, "--out", "z"], "'--n'"),
    (["simulate", "mine.py:pulse", "--n", 9, "--out", "z"], "--seed"),
    (["simulate", "mine.py:pulse", "--n", 5000, "--seed", 2, "--out", "b"], "use --seed 1, or another --out"),
    (["simulate", "two_moons", "--n", 5000, "--seed", 1, "--out", "b"], "another --out"),
    (["simulate", "mine.py:pulse", "--n", 9, "--seed", 1, "--out", "mine.py"], "another --out"),
    (["bank", "info", "gone"], "no bank at gone"),
    (["bank", "info", "mine.py"], "not a packed bank"),
    (["train", "gone", "--out", "z"], "no bank at gone"),
    (["train", "b", "--out", "z", "--set", "flow=nfs"], "one of nsf"),
    (["train", "b", "--out", "z", "--set", "flow"], "expected key=value"),
    (["train", "b", "--out", "z", "--config", "gone.toml"], "no settings file at gone.toml"),
    (["train", "b", "--out", "z", "--config", "mine.py"], "is not TOML"),
    (["train", "b", "--out", "b"], "holds other files"),
    (["gate", "gone"], "no run at gone"),
    (["gate", "b"], "is this a run?"),
    (["train", "b", "--out", "z", "--set", "bank=c"], "bank is no setting"),
    (["train", "b", "--out", "z", "--set", "seed=-3"], "seed must be a whole number"),
    (["train", "b", "--out", "z", "--set", "estimator=np"], "no estimator is called"),
    (["gate", "r", "--set", "pair=3"], "did you mean pairs"),
    (["gate", "r", "--set", "progress=3"], "progress is no setting"),
    (["sample", "r", "--observation", "x.npy", "--n", 5, "--out", "z.csv", "--seed", -1, "--allow-uncertified"], "seed must be a whole number"),
    (["sample", "r", "--observation", "gone.npy", "--n", 5, "--out", "z.csv", "--allow-uncertified"], "no observation file at gone.npy"),
    (["sample", "r", "--observation", "x.npy", "--n", 5, "--out", "z.txt", "--allow-uncertified"], ".nc (ArviZ), .h5 or .csv"),
    (["sample", "r", "--observation", "x.npy", "--n", 5, "--out", "no/z.csv", "--allow-uncertified"], "there is no folder no"),
    (["sample", "r", "--observation", "x.npy", "--n", 0, "--out", "z.csv", "--allow-uncertified"], "n must be a whole number"),
    (["report", "gone"], "no run at gone"),
    (["run", "gone.toml"], "no settings file at gone.toml"),
    (["frobnicate"], "frobnicate"),
])
def test_a_users_mistake_is_one_line_and_exit_2(place, words, says):
    assert says in mistake(sbiplat(*words, cwd=place))
    assert not (place / "z").exists(), "nothing is left behind"


def test_bad_observations_are_one_line(place):
    for name, array, says in (("short", np.zeros(5), "(6,)"), ("nan", np.r_[np.zeros(5), np.nan], "NaN")):
        np.save(place / f"{name}.npy", array)
        line = mistake(sbiplat("sample", "r", "--observation", f"{name}.npy", "--n", 5, "--out", "z.csv", "--allow-uncertified", cwd=place))
        assert says in line
    np.save(place / "evil.npy", np.array([print], dtype=object), allow_pickle=True)
    mistake(sbiplat("sample", "r", "--observation", "evil.npy", "--n", 5, "--out", "z.csv", "--allow-uncertified", cwd=place))


def test_debug_shows_the_traceback(place):
    result = sbiplat("bank", "info", "gone", "--debug", cwd=place)
    assert "Traceback" in result.stderr


def test_a_stop_promises_only_what_is_kept():
    from sbiplat import cli

    assert "goes on from there" in cli._stopped(["train", "moons.bank"])
    assert "begins anew" in cli._stopped(["gate", "moons.run"])


@pytest.mark.parametrize("command", [[], ["bank"], ["simulators"], ["simulate"], ["bank", "info"], ["bank", "verify"], ["bank", "pack"], ["bank", "compact"], ["bank", "plot"], ["train"],
                                     ["gate"], ["certificate"], ["certificate", "show"], ["certificate", "verify"], ["certificate", "sign"],
                                     ["certificate", "keygen"], ["certificate", "schema"], ["sample"], ["report"], ["run"]])
def test_every_command_has_help_with_an_example(command):
    result = sbiplat(*command, "--help")
    assert result.returncode == 0
    assert "Example: sbiplat" in result.stdout or command in ([], ["bank"], ["certificate"])


def test_commands_that_need_no_torch_do_not_import_it(place):
    code = "import sys\nfrom sbiplat import cli\nsys.argv = ['sbiplat', *{words!r}]\ntry:\n    cli.main()\nexcept SystemExit:\n    pass\nassert 'torch' not in sys.modules"
    for words in (["--help"], ["simulators"], ["simulators", "two_moons"], ["simulate", "two_moons", "--n", "100", "--seed", "1", "--out", "light"],
                  ["bank", "info", "light"]):
        done = subprocess.run([sys.executable, "-c", code.format(words=words)], cwd=place, capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, done.stderr


def test_ctrl_c_stops_a_training_cleanly_and_the_same_command_resumes(place):
    words = ["train", "b", "--out", "long", "--set", "flow=gaussian", "--set", "max_epochs=400", "--set", "patience=400", "--set", "batch_size=64"]
    process = subprocess.Popen([BIN / "sbiplat", *words], cwd=place, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    metrics = place / "long" / "metrics.jsonl"
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and not (metrics.exists() and metrics.read_text().count("\n") >= 2):
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 130, stderr
    assert "the same command resumes" in stderr
    assert "Traceback" not in stderr
    assert (place / "long" / "checkpoint" / "state.safetensors").exists()
    assert "has not finished" in mistake(sbiplat("gate", "long", cwd=place))


def test_ctrl_c_stops_a_simulation_cleanly_and_the_same_command_resumes(tmp_path):
    slow = PULSE.replace('"""A pulse of some height at some time, in noise."""', "import time; time.sleep(0.002)")
    (tmp_path / "mine.py").write_text(slow)
    words = ["simulate", "mine.py:pulse", "--n", "1500", "--seed", "1", "--out", "b", "--workers", "2"]
    process = subprocess.Popen([BIN / "sbiplat", *words], cwd=tmp_path, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and not list((tmp_path / "b" / "segments").glob("0*.h5") if (tmp_path / "b").exists() else []):
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 130, stderr
    assert "rows are kept" in stderr
    kept = json.loads(sbiplat("bank", "info", "b", "--json", cwd=tmp_path).stdout)
    assert 0 < kept["present"] < 1500
    assert "lacks" in mistake(sbiplat("train", "b", "--out", "r", cwd=tmp_path))
    resumed = sbiplat(*words, cwd=tmp_path)
    assert resumed.returncode == 0, resumed.stderr
    assert sbiplat(*[w if w != "b" else "whole" for w in words], cwd=tmp_path).returncode == 0
    digests = [json.loads(sbiplat("bank", "info", b, "--json", cwd=tmp_path).stdout)["digest"] for b in ("b", "whole")]
    assert digests[0] == digests[1]


def test_mpi_ranks_and_one_worker_give_banks_of_the_same_digest(tmp_path):
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    ranks = subprocess.run([BIN / "mpiexec", "-n", "3", BIN / "sbiplat", "simulate", "two_moons", "--n", "20000", "--seed", "1", "--out", "b3"],
                           cwd=tmp_path, capture_output=True, text=True, timeout=120, env=environment)
    assert ranks.returncode == 0, ranks.stderr
    one = sbiplat("simulate", "two_moons", "--n", 20000, "--seed", 1, "--out", "b1", "--workers", 1, cwd=tmp_path)
    assert one.returncode == 0, one.stderr
    digests = [json.loads(sbiplat("bank", "info", b, "--json", cwd=tmp_path).stdout)["digest"] for b in ("b1", "b3")]
    assert digests[0] == digests[1]
    assert ranks.stdout.count("digest") == 1, "one rank speaks for all"


def test_machines_get_a_mistake_as_json_too(place):
    result = sbiplat("bank", "info", "gone", "--json", cwd=place)
    assert result.returncode == 2
    assert json.loads(result.stdout) == {"error": result.stderr.removeprefix("error: ").strip(), "exit_code": 2}


def test_a_table_may_name_seed_and_estimator(place):
    (place / "t.toml").write_text('[train]\nestimator = "npe"\nseed = 5\nflow = "gaussian"\nmax_epochs = 1\n')
    for words, seed in ((["--out", "t5"], 5), (["--out", "t6", "--seed", 6], 6)):
        result = sbiplat("train", "b", *words, "--config", "t.toml", cwd=place)
        assert result.returncode == 0, result.stderr
        assert json.loads((place / words[1] / "run.json").read_text())["seed"] == seed


@pytest.mark.parametrize("streams", ["2>&-", ">&-", "| head -c 1", ">/dev/null"], ids=["no stderr", "no stdout", "a reader that leaves", "null"])
def test_closed_streams_raise_no_traceback(place, streams):
    for words in ("bank info b", "bank info gone", "simulators two_moons"):
        done = subprocess.run(f"{BIN / 'sbiplat'} {words} {streams}", shell=True, cwd=place, capture_output=True, text=True, timeout=60)
        assert "Traceback" not in done.stderr + done.stdout
        assert "Exception ignored" not in done.stderr


def test_a_terminal_of_few_letters_is_no_error(place):
    environment = {**os.environ, "PYTHONIOENCODING": "ascii"}
    (place / "odd.py").write_text(PULSE.replace('unit="s"', 'unit="µs"'))
    result = sbiplat("simulators", "odd.py:pulse", cwd=place, env=environment)
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_the_gate_with_one_line(place, number):
    words = ["gate", "r", "--set", "draws=200000"]
    process = subprocess.Popen([BIN / "sbiplat", *words], cwd=place, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    time.sleep(4)
    process.send_signal(number)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 130, stderr
    assert "stopped" in stderr
    assert "Traceback" not in stderr


@pytest.mark.parametrize("suffix", ["nc", "h5", "csv"])
def test_a_full_disk_while_draws_are_written_is_one_line_and_leaves_nothing(place, suffix):
    """A limit on the size of files stands in for a full disk."""
    words = f"sample r --observation x.npy --n 100000 --out full.{suffix} --allow-uncertified"
    done = subprocess.run(["bash", "-c", f"ulimit -f 500; exec {BIN / 'sbiplat'} {words}"], cwd=place, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2, (done.returncode, done.stderr)
    assert "the disk is full" in done.stderr
    assert not list(place.glob("*full*"))


def test_a_training_is_defended_as_often_as_it_is_asked_to_be(place):
    words = ["train", "b", "--out", "defended", *TINY, "--set", "max_epochs=2", "--defend", "fisher:0.01", "--defend", "noise:0.1"]
    trained = sbiplat(*words, cwd=place)
    assert trained.returncode == 0, trained.stderr
    assert json.loads((place / "defended" / "run.json").read_text())["training"]["defend"] == ["noise:0.1", "fisher:0.01"]
    by_set = sbiplat("train", "b", "--out", "defended", *TINY, "--set", "max_epochs=2", "--set", 'defend=["fisher:0.01", "noise:0.1"]', cwd=place)
    assert by_set.returncode == 0, by_set.stderr
    line = mistake(sbiplat("train", "b", "--out", "no", *TINY, "--defend", "fisher", cwd=place))
    assert line == "error: defend = 'fisher': expected fisher:WEIGHT, a number above 0, such as fisher:0.1"
    assert not (place / "no").exists()
