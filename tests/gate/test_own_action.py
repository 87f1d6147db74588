"""A user's own action, in a file of theirs outside the project, all the way by the command line; and nothing of that file runs unasked."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from sbiplat.runs import Run

MINE = '''"""A slope adds a straight line to a series."""
import os
import numpy as np
import sbiplat as sp

if os.environ.get("MARKER"):
    open(os.environ["MARKER"], "a").write("was run")
TIMES = np.linspace(-1, 1, 12)


class Drift(sp.symmetry.GroupAction):
    """A straight line of slope g, added to the series."""

    parameters = ("slope",)

    def act_data(self, g, x):
        return {"x": x["x"] + (g * g.new_tensor(TIMES)).to(x["x"].dtype)}


@sp.simulator(prior={"slope": sp.Uniform(-20, 20, unit="m/s"), "height": sp.Uniform(0, 6)}, x_shape=(12,), batched=True, symmetry=Drift())
def drift(theta, rng):
    return theta[:, :1] * TIMES + theta[:, 1:] * np.exp(-8 * TIMES**2) + rng.standard_normal((len(theta), 12))
'''
LOOSE = {"least_pairs": 100, "draws": 500, "density_draws": 5, "attacked": 10, "attack_steps": 1, "attack_restarts": 1, "attack_queries": 2,
         "excess": 1e6, "attacked_coverage": 1, "masking": 1e6, "information": 0, "c2st": 1,
         **dict.fromkeys(("deviation", "under_coverage", "over_coverage", "tails", "local", "regions", "nearest"), 1)}


def sbiplat(place, *words, code=0, **environment):
    done = subprocess.run([sys.executable, "-m", "sbiplat", *map(str, words)], cwd=place, capture_output=True, text=True, timeout=300,
                          env={**os.environ, **environment})
    assert done.returncode == code, done.stderr
    return done


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with mine.py, a bank and a certified run."""
    folder = tmp_path_factory.mktemp("own")
    (folder / "mine.py").write_text(MINE)
    np.save(folder / "x.npy", 3 * np.linspace(-1, 1, 12) + 2 * np.exp(-8 * np.linspace(-1, 1, 12) ** 2))
    own = ("--simulator", "mine.py:drift")
    assert "Drift, exact, of slope" in sbiplat(folder, "simulators", "mine.py:drift").stdout
    sbiplat(folder, "simulate", "mine.py:drift", "--n", 2500, "--seed", 1, "--out", "bank", "--workers", 1)
    settings = {"symmetry": "gnpe", "flow": "gaussian", "max_epochs": 10, "batch_size": 128, "embedding_hidden": [16]}
    sbiplat(folder, "train", "bank", "--estimator", "npe", "--out", "run", *own,
            *(w for k, v in settings.items() for w in ("--set", f"{k}={json.dumps(v)}")))
    sbiplat(folder, "gate", "run", "--n", 100, *own, *(w for k, v in LOOSE.items() for w in ("--set", f"{k}={v}")))
    return folder


def test_what_is_to_be_typed_for_a_run_names_the_file_of_its_action():
    def command(action):
        return Run(Path("a.run"), {"architecture": {"symmetry": action and {"action": action}}}).gate_command

    assert command({"own": "work/mine.py:drift"}) == "sbiplat gate a.run --simulator work/mine.py:drift"
    assert command({"own": "my work/mine.py:drift"}).endswith("--simulator 'my work/mine.py:drift'")
    assert command({"own": "simulators.chirp:chirp"}) == command(None) == "sbiplat gate a.run"


def test_an_own_action_goes_all_the_way(place):
    sbiplat(place, "sample", "run", "--observation", "x.npy", "--n", 500, "--out", "draws.csv", "--simulator", "mine.py:drift")
    draws = np.genfromtxt(place / "draws.csv", delimiter=",", names=True)
    assert abs(draws["slope"].mean() - 3) < 1.5
    sbiplat(place, "report", "run", "--observation", "x.npy", "--simulator", "mine.py:drift")
    page = (place / "run" / "report.html").read_text()
    for words in ("CERTIFIED", "kernel of slope", "lag-1 correlation", "the net is not told the proxy", "beyond the prior&#39;s edges"):
        assert words in page, words
    chain = json.loads((place / "run" / "certificate.json").read_text())["chain"]
    gibbs = next(step for step in chain if step["step"] == "gibbs")
    assert set(gibbs["steps"][0]["widths"]) == {"slope"}
    assert any(step["step"] == "recovery" for step in chain)
    assert len(json.dumps(chain)) < 3000
    assert "proxies (recovery; mixture of 512 kernels" in sbiplat(place, "certificate", "show", "run").stdout


def test_nothing_of_the_users_file_runs_where_they_have_not_named_it(place, tmp_path):
    marker = tmp_path / "marker"
    for words in (("sample", "run", "--observation", "x.npy", "--n", 10, "--out", "no.csv"), ("gate", "run")):
        done = sbiplat(place, *words, code=2, MARKER=str(marker))
        lines = done.stderr.strip().splitlines()
        assert len(lines) == 1
        assert "--simulator" in lines[0]
        assert "mine.py:drift" in lines[0]
    sbiplat(place, "report", "run", "--observation", "x.npy", MARKER=str(marker))
    assert not marker.exists()
    sbiplat(place, "sample", "run", "--observation", "x.npy", "--n", 10, "--out", tmp_path / "d.csv", "--simulator", "mine.py:drift",
            MARKER=str(marker))
    assert marker.exists(), "power: a run of the file would have been seen"


def test_changed_code_of_the_action_is_one_line(place, tmp_path):
    path = place / "mine.py"  # which the run names by its place
    path.write_text(MINE.replace("(g * g.new_tensor(TIMES))", "(0.5 * g * g.new_tensor(TIMES))"))
    try:
        done = sbiplat(place, "sample", "run", "--observation", "x.npy", "--n", 10, "--out", tmp_path / "d.csv", "--simulator",
                       "mine.py:drift", code=2)
    finally:
        path.write_text(MINE)
    assert "has changed since the run was trained" in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
