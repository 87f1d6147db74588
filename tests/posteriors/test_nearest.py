"""The bank's nearest rows: right where regression makes it exact, blunt without, in bounded passes, and its mistakes in one line."""

import subprocess
import sys

import numpy as np
import pytest
from conftest import line_posterior

import sbiplat as sp
from sbiplat.errors import BankError, SettingError
from sbiplat.posteriors import nearest as room
from sbiplat.progress import silent


def test_regression_finds_the_gaussian_posterior_and_rejection_alone_is_wider(line_bank):
    x = np.array([0.5, -0.8])
    mean, sd = line_posterior(x)
    adjusted = sp.nearest(line_bank, keep=0.1).sample(x, 20_000, seed=0)
    np.testing.assert_allclose(adjusted.mean(0), mean, atol=0.12 * sd.max())
    np.testing.assert_allclose(adjusted.std(0), sd, rtol=0.12)
    plain = sp.nearest(line_bank, keep=0.1, adjust=False).sample(x, 20_000, seed=0)
    assert np.all(plain.std(0) > 1.05 * adjusted.std(0))


def test_a_runs_contexts_serve_as_summaries(line_bank, line_run):
    x = np.array([0.5, -0.8])
    draws = sp.nearest(line_bank, keep=0.1, summaries=line_run).sample(x, 20_000, seed=0)
    np.testing.assert_allclose(draws.mean(0), line_posterior(x)[0], atol=0.3)


def test_passes_and_batches_change_nothing(line_bank, monkeypatch):
    x = np.array([[0.5, -0.8], [2.0, 1.0], [0.0, 0.0]])
    whole = sp.nearest(line_bank).sample(x, 100, seed=0)
    scales = room.SCALE_ROWS
    monkeypatch.setattr(room, "PASS_BYTES", 100_000)
    monkeypatch.setattr(room, "SCALE_ROWS", 600)
    parts = sp.nearest(line_bank)
    assert parts.sampler._rows_a_pass < len(line_bank) < scales
    assert whole.shape == parts.sample(x, 100, seed=0).shape == (3, 100, 2)
    monkeypatch.setattr(room, "SCALE_ROWS", scales)
    monkeypatch.setattr(room, "PASS_BYTES", 2**26)
    again = sp.nearest(line_bank)
    again.sampler._rows_a_pass = 700
    np.testing.assert_array_equal(again.sample(x, 100, seed=0), whole)


def test_failed_rows_are_never_kept(tmp_path):
    @sp.simulator(prior=sp.Prior({"a": sp.Uniform(0, 1)}), x_shape=(1,), batched=True)
    def half(theta, rng):
        x = theta + 0.01 * rng.standard_normal(theta.shape)
        x[theta[:, 0] < 0.5] = np.nan
        return x

    bank = sp.simulate(half, 2000, 1, tmp_path / "b", workers=1, progress=silent)
    assert sp.nearest(bank, keep=1.0, adjust=False).sample(np.array([0.2]), 500, seed=0).min() >= 0.5


def test_no_density_no_certificate_and_mistakes_in_one_line(line_bank, tmp_path):
    posterior = sp.nearest(line_bank)
    assert posterior.to_arviz(np.zeros(2), 10, seed=0).posterior.attrs["certified"] == "no"
    with pytest.raises(SettingError, match="no density"):
        posterior.log_prob(np.zeros(2), np.zeros(2))
    with pytest.raises(SettingError, match="between 0 and 1"):
        sp.nearest(line_bank, keep=2)
    np.save(tmp_path / "x.npy", np.zeros(2))
    words = [sys.executable, "-m", "sbiplat", "bank", "query", str(line_bank.path), "--observation", "x.npy", "--n", "50", "--out", "d.csv"]
    made = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True, timeout=100, check=False)
    assert made.returncode == 0, made.stderr
    assert "uncertified" in made.stderr
    assert len((tmp_path / "d.csv").read_text().splitlines()) == 51
    made = subprocess.run([*words, "--keep", "0"], cwd=tmp_path, capture_output=True, text=True, timeout=100, check=False)
    assert made.returncode == 2


def test_many_numbers_of_x_without_summaries_are_told(tmp_path):
    @sp.simulator(prior=sp.Prior({"a": sp.Normal(0.0, 1.0)}), x_shape=(30,), name="wide_line", batched=True)
    def wide(theta, rng):
        return theta + rng.standard_normal((len(theta), 30))

    bank = sp.simulate(wide, 200, 1, tmp_path / "bank", workers=1, progress=silent)
    assert "nearest in all 30 numbers of x" in sp.nearest(bank).provenance["refusal"]


def test_figures_of_a_batch_are_the_worst_of_it_and_foreign_summaries_are_refused(line_bank, line_run, tmp_path):
    far, near = [30.0, 30.0], [0.0, 0.0]
    posterior = sp.nearest(line_bank)
    posterior.sample(np.array([far, near]), 5, seed=0)
    first = dict(posterior.facts)
    posterior.sample(np.array([near, far]), 5, seed=0)
    assert posterior.facts == first
    assert first["farthest"] > 5

    @sp.simulator(prior=sp.Prior({"slope": sp.Normal(0, 1), "offset": sp.Normal(0, 1)}), x_shape=(2,), batched=True)
    def other(theta, rng):
        return theta + rng.standard_normal(theta.shape)

    bank = sp.simulate(other, 200, 1, tmp_path / "b", workers=1, progress=silent)
    with pytest.raises(SettingError, match="give a run of this bank's simulator"):
        sp.nearest(bank, summaries=line_run.path)
    with pytest.raises(BankError, match="has 50 rows that did not fail; a query needs at least 100"):
        sp.nearest(sp.simulate(other, 50, 1, tmp_path / "few", workers=1, progress=silent))


def test_a_first_pass_of_failed_rows_is_passed_over(tmp_path, monkeypatch):
    @sp.simulator(prior=sp.Prior({"a": sp.Uniform(0, 1)}), x_shape=(1,), batched=True)
    def late(theta, rng):
        return np.where(rng.random() < 0.7, np.nan, theta + 0.01 * rng.standard_normal(theta.shape))

    bank = sp.simulate(late, 4000, 1, tmp_path / "b", workers=1, block_size=10, progress=silent, checked=False)
    monkeypatch.setattr(room, "PASS_BYTES", 1)
    assert sp.nearest(bank).sample(np.array([0.5]), 50, seed=0).mean() == pytest.approx(0.5, abs=0.02)
