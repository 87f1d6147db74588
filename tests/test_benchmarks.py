"""The yardsticks of the benchmarks: C2ST against the classifier that nobody can beat, and against scikit-learn's own; Jensen-Shannon
divergences of known laws; and the benchmark of GNPE from end to end, where the posterior, its evidence and the chains are known."""

import json
import math
import sys
from pathlib import Path

import numpy as np
import pytest
from scipy.integrate import trapezoid
from scipy.stats import multivariate_normal, norm

sys.path.append(str(Path(__file__).parents[1] / "benchmarks"))
import common
import gnpe
from common import c2st, jensen_shannon

from simulators import location

ROWS = 1500
TINY = gnpe.Size(draws=1000, timed=500, pool=2000, observations=2, watched=1, walkers=20, settings={"max_epochs": 4})


def test_c2st_finds_what_the_best_classifier_finds():
    rng = np.random.default_rng(1)
    # N(0, I) from N(shift e_1, I): the best classifier is right with probability Phi(shift / 2). Binomial sd of 3000: 0.009.
    shifts = np.array([0.0, 0.5, 1.5])
    a = rng.standard_normal((3, ROWS, 2))
    b = rng.standard_normal((3, ROWS, 2))
    b[..., 0] += shifts[:, None]
    np.testing.assert_allclose(c2st(a, b), norm.cdf(shifts / 2), atol=0.035)


def test_c2st_of_a_pair_does_not_depend_on_its_scale():
    rng = np.random.default_rng(1)
    a, b = rng.standard_normal((2, 1, 500, 2))
    assert c2st(1e-3 * a, 1e-3 * b) == pytest.approx(c2st(a, b), abs=0.02)


@pytest.mark.science
def test_c2st_is_scikit_learns():
    rng = np.random.default_rng(1)
    sklearn = pytest.importorskip("sklearn.neural_network")
    from sklearn.model_selection import KFold, cross_val_score

    a, b = rng.standard_normal((3, 2000, 4)), 0.8 * rng.standard_normal((3, 2000, 4))
    net = sklearn.MLPClassifier(hidden_layer_sizes=(40, 40), max_iter=1000, random_state=1)
    theirs = []
    for first, second in zip(a, b, strict=True):
        data = (np.concatenate([first, second]) - first.mean(0)) / first.std(0)
        folds = KFold(5, shuffle=True, random_state=1)
        theirs.append(cross_val_score(net, data, np.repeat([0, 1], 2000), cv=folds).mean())
    np.testing.assert_allclose(c2st(a, b), theirs, atol=0.02)  # the binomial sd of each is 0.008


def exact_divergence(shift, variance):
    """Jensen-Shannon divergence of N(0, variance) from N(shift, variance), in mnat, by quadrature."""
    x = np.linspace(-12, 12 + shift, 20_001)
    p, q = norm.pdf(x, 0, variance**0.5), norm.pdf(x, shift, variance**0.5)
    m = np.log((p + q) / 2)
    return 500 * trapezoid(p * (norm.logpdf(x, 0, variance**0.5) - m) + q * (norm.logpdf(x, shift, variance**0.5) - m), x)


def test_divergence_is_that_of_known_gaussians():
    rng, n = np.random.default_rng(1), 10_000
    shifts = np.array([0.2, 0.5, 2.0])
    a, b = rng.standard_normal((n, 3)), rng.standard_normal((n, 3)) + shifts
    smoothed = 1 + n**-0.4  # Scott's kernel adds its own variance
    # A shift's own error is sqrt(2 / n) = 0.014, and the divergence goes with its square: three of them are 42 %, 17 % and 4 %.
    for found, shift in zip(jensen_shannon(a, b), shifts, strict=True):
        assert found == pytest.approx(exact_divergence(shift, smoothed), rel=3 * 2 * 0.0142 / shift)


def test_divergence_has_a_floor_below_what_gravitational_waves_call_indistinguishable():
    a, b = np.random.default_rng(1).standard_normal((2, 10_000, 4))
    floor = jensen_shannon(a, b)
    assert (floor > 0).all()
    assert (floor < 1).all()


def test_divergence_of_laws_apart_is_log_2_whatever_the_scale():
    a, b = np.random.default_rng(1).standard_normal((2, 2000, 1))
    np.testing.assert_allclose(jensen_shannon(1e-6 * a, 1e-6 * (b + 50)), 1e3 * math.log(2), rtol=1e-6)
    np.testing.assert_allclose(jensen_shannon(1e-6 * a, 1e-6 * (b + 0.5)), jensen_shannon(a, b + 0.5), rtol=1e-6)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setattr(common, "RESULTS", tmp_path)
    monkeypatch.setattr(gnpe, "KEPT", tmp_path / "references")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    return tmp_path


def test_gnpe_benchmark_finds_what_is_known_of_location(folder, capsys):
    asked = ["--problems", "location", "--budgets", "1000", "--results", "tiny"]
    gnpe.main(asked, TINY)
    first = (folder / "tiny.json").read_text()
    cells = json.loads(first)["cells"]
    assert set(cells) == {"location reference", "location npe 1000", "location gnpe 1000", "location mcmc"}
    cell = cells["location gnpe 1000"]
    assert gnpe.score(cells["location reference"] | {"refused": []}) == pytest.approx(0.5, abs=0.04)  # binomial sd of 2000: 0.011
    for made in (cells["location npe 1000"], cell, cell["weighted"]):
        assert gnpe.score(made) < 0.6
    cost = cell["cost"][0]
    assert cost["ratio"] == gnpe.cost_ratio(cost["seconds"], cost["steps"], cost["pass_seconds"])
    np.testing.assert_allclose(cell["chains"]["gibbs_rho"], location.autocorrelation(cell["kernel"]["widths"][0]), atol=0.05)
    assert min(cell["weighted"]["efficiency"]) > 0.5
    assert max(cell["weighted"]["k_hat"]) < 0.7
    for k, (known, found) in enumerate(zip(gnpe.known("location", TINY), cell["weighted"]["log_evidence"], strict=True)):
        evidence = multivariate_normal.logpdf(known.x, np.zeros(5), np.eye(5) + location.SCALE**2 * np.ones((5, 5)))
        error = math.sqrt((1 / cell["weighted"]["efficiency"][k] - 1) / TINY.pool)
        assert found == pytest.approx(evidence, abs=4 * error + 1e-3)
    gnpe.main(asked, TINY)
    assert (folder / "tiny.json").read_text() == first
    assert "| location | 1,000 | gnpe |" in capsys.readouterr().out


def test_gnpe_benchmark_sees_draws_that_are_off_and_counts_refused_ones(folder):
    known = gnpe.known("location", TINY)
    off = known[0].halves[1] + 1.5 * location.VARIANCE**0.5
    found = gnpe.against("location", known, [gnpe.Attempt(off, 1.0), gnpe.Attempt(None, 1.0, refusal="observation 1: no")])
    assert found["c2st"] == pytest.approx([norm.cdf(0.75)], abs=0.035)
    assert found["jsd"][0] == pytest.approx([exact_divergence(1.5, 1 + 1000**-0.4)], rel=0.2)
    assert gnpe.score(found) == (found["c2st"][0] + 1) / 2


def test_cost_is_seconds_a_step_over_those_of_one_pass():
    assert gnpe.cost_ratio([7.0, 14.0, 100.0], [6, 13, 9], [0.5, 1.0, 0.25]) == 1.0 / 0.5


def test_simulations_needed_are_read_log_linearly():
    scores = {1_000: 0.9, 10_000: 0.7, 100_000: 0.5}
    assert gnpe.needed(scores, 0.6) == pytest.approx(10**4.5)
    assert gnpe.needed(scores, 0.95) == 1_000
    assert gnpe.needed(scores, 0.49) is None


def test_systematic_resampling_takes_the_floor_or_the_ceiling_of_what_a_weight_is_due():
    rng = np.random.default_rng(1)
    weights = rng.exponential(size=50) * (np.arange(50) % 5 > 0)
    due = 200 * weights / weights.sum()
    count = np.bincount(gnpe.systematic(weights, 200, rng), minlength=50)
    assert ((np.floor(due - 1e-9) <= count) & (count <= np.ceil(due + 1e-9))).all()


def test_a_circular_parameter_is_cut_where_the_posterior_is_not(monkeypatch):
    monkeypatch.setitem(gnpe.PROBLEMS, "location", gnpe.Problem("simulators.location:location", periods={"mu": np.pi}))
    whole = 0.1 + 0.2 * np.random.default_rng(1).standard_normal((2, 2000, 1))
    cut = whole % np.pi
    reference, draws = gnpe._on_one_branch("location", cut[0]), gnpe._on_one_branch("location", cut[1], cut[0])
    np.testing.assert_allclose(jensen_shannon(reference, draws), jensen_shannon(*whole), rtol=1e-6)
    np.testing.assert_allclose(gnpe._in_support(location.location.prior, {}, draws), draws)
