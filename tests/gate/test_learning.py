"""The learning curve: exact on a power law, paired on rows that no training saw, and right about a bank that is large enough."""

import json
import shutil

import numpy as np
import pytest

import sbiplat as sp
from sbiplat.errors import RunError
from sbiplat.gate import learning
from sbiplat.progress import silent


def power_law(a, b, rows, pairs=400, noise=0.0):
    """Log-densities (3, P) along 1 - a n^-b."""
    rng = np.random.default_rng(0)
    return np.stack([np.full(pairs, 1 - a * n**-b) + noise * rng.standard_normal(pairs) for n in rows])


def test_a_power_law_is_carried_on_exactly():
    rows, a, b = (1000, 2000, 4000), 60.0, 0.5
    curve = learning.of_three(rows, power_law(a, b, rows))
    def gain(n):
        return a * (n / 2) ** -b - a * n**-b

    assert curve.gains[1][0] == pytest.approx(gain(4000))
    assert curve.next_gain == pytest.approx(gain(8000))
    assert gain(2 * curve.enough) < learning.TOLERANCE <= gain(curve.enough)
    assert f"{curve.enough:,}" in curve.statement


def test_a_flat_curve_says_that_more_would_not_help():
    curve = learning.of_three((1000, 2000, 4000), power_law(0.0, 1.0, (1000, 2000, 4000), noise=0.2))
    assert "would hardly help" in curve.statement
    assert curve.enough == 4000


def test_a_curve_without_an_end_says_so():
    curve = learning.of_three((1, 2, 4), np.array([[0.0] * 50, [1.0] * 50, [2.5] * 50]))
    assert curve.enough is None
    assert "no end is in sight" in curve.statement
    assert curve.next_rows == 16


def test_a_linear_gaussian_bank_is_large_enough_and_the_curve_stands_in_the_run(line_run, tmp_path):
    shutil.copytree(line_run.path, tmp_path / "run")
    run = sp.Run.open(tmp_path / "run")
    curve = sp.learning_curve(run, progress=silent)
    assert curve.rows == (1500, 3000, 6000)
    assert "would hardly help" in curve.statement
    assert learning.read(run) == curve
    before = (run.path / "learning_curve" / "half" / "weights.safetensors").stat().st_mtime_ns
    assert sp.learning_curve(run, progress=silent) == curve
    assert (run.path / "learning_curve" / "half" / "weights.safetensors").stat().st_mtime_ns == before, "trained anew"
    half = sp.Run.open(run.path / "learning_curve" / "half")
    assert half.record["training"]["max_epochs"] == run.record["training"]["max_epochs"], "what the user set holds for the parts too"


@pytest.mark.parametrize("text", ["", "{}", '{"format_version": 1, "weights": "HERE", "rows": 3}', '{"format_version": 2}'])
def test_a_damaged_curve_is_one_line(line_run, tmp_path, text):
    shutil.copytree(line_run.path, tmp_path / "run")
    run = sp.Run.open(tmp_path / "run")
    (run.path / learning.FILE).write_text(text.replace("HERE", run.weights_digest))
    with pytest.raises(RunError, match="learning"):
        learning.read(run)


def test_a_curve_of_other_weights_is_none(line_run, tmp_path):
    shutil.copytree(line_run.path, tmp_path / "run")
    (tmp_path / "run" / learning.FILE).write_text(json.dumps({"format_version": 1, "weights": "0" * 64}))
    assert learning.read(sp.Run.open(tmp_path / "run")) is None
