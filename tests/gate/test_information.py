"""Information against known answers: mutual information, energy scores in closed form, and what ignored data are called."""

import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from sbiplat.diagnostics.held_out import HeldOut, held_out_figures
from sbiplat.diagnostics.information import energy_scores, nearest_figures, prior_energy_scores
from sbiplat.gate.calibration import decide, examine
from sbiplat.gate.criteria import Criteria

sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))
from known import PROBLEMS, Defect, examined

GAUSSIAN = PROBLEMS["Gaussian, 2"]


def test_energy_score_of_a_normal_is_the_closed_form():
    """E|X - y| - E|X - X'| / 2 of N(0, 1) at y, in one dimension (Gneiting & Raftery, 2007): 0.2337 at y = 0."""
    rng = np.random.default_rng(0)
    scores = energy_scores(rng.standard_normal((4000, 400, 1)), np.zeros((4000, 1)))
    assert scores.mean() == pytest.approx(2 / np.sqrt(2 * np.pi) - 1 / np.sqrt(np.pi), abs=4 * scores.std() / np.sqrt(4000))
    rows = rng.standard_normal((500, 1))
    assert prior_energy_scores(rows, np.zeros((1, 1)))[0] == pytest.approx(0.2337, abs=0.06)


def test_gain_of_the_exact_posterior_is_the_mutual_information():
    a = np.asarray(GAUSSIAN.matrix)
    known = 0.5 * np.linalg.slogdet(np.eye(2) + a @ a.T / GAUSSIAN.noise**2)[1]
    told = held_out_figures(examined(GAUSSIAN, Defect(), 0), 500).information
    assert told.gain == pytest.approx(known, abs=4 * told.error)
    covariance = np.linalg.inv(np.eye(2) + a.T @ a / GAUSSIAN.noise**2)
    assert told.contraction == pytest.approx(1 - np.diag(covariance), abs=0.01)
    assert told.moved == pytest.approx(told.contraction, abs=0.1), "the law of total variance"


def test_the_exact_posterior_has_the_best_energy_score():
    told = held_out_figures(examined(GAUSSIAN, Defect(), 0), 500).information
    assert told.energy_gain > 0.3
    assert told.nearest_gain > -3 * told.nearest_error
    worse = held_out_figures(examined(GAUSSIAN, Defect(shift=1.0), 0), 500).information
    assert worse.nearest_gain < -10 * worse.nearest_error


def test_nearest_rows_of_a_line_are_its_posterior():
    """x = z: rows near x, moved by the regression, all say z."""
    z = np.random.default_rng(0).standard_normal((5000, 1))
    scores, variances = nearest_figures(z, z, z[:50], z[:50], np.ones(1))
    assert scores.max() < 1e-2
    assert variances.max() < 1e-3


@pytest.mark.parametrize("density", [True, False])
def test_ignored_data_are_named(density):
    case = examined(GAUSSIAN, Defect(prior=True), 0, density=density)
    failed = {v.name: v for v in examine(case, Criteria()).criteria if not v.passed}
    for name in ("information", "nearest rows"):
        assert "the posterior is the same for every x (posterior = prior)" in failed[name].mend
    assert "not learnt, though the nearest rows know: p0, p1" in failed["nearest rows"].statement


def test_a_collapsed_embedding_is_named():
    import torch

    case = examined(GAUSSIAN, Defect(prior=True), 0, n=300)
    sampler = case.posterior.sampler

    class Collapsed:
        sample, log_prob = staticmethod(sampler.sample), staticmethod(sampler.log_prob)

        @staticmethod
        def contexts(x):
            return torch.ones(len(x["x"]), 4)

    figures = held_out_figures(replace(case, posterior=replace(case.posterior, sampler=Collapsed())), 500)
    assert figures.information.context_moves is False
    mend = {v.name: v for v in decide(figures, Criteria())}["information"].mend
    assert "the embedding has collapsed" in mend


def test_a_trained_runs_context_moves(line_run):
    import sbiplat as sp
    from sbiplat.gate.examine import examined_of
    from sbiplat.progress import silent

    case = examined_of(sp.Run.open(line_run.path), line_run.bank(None), 300, 0, None, "cpu", silent)
    assert HeldOut(case, 100).until(300).figures(100).information.context_moves is True
