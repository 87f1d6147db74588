"""The yardstick of the accuracy benchmarks: C2ST against the classifier that nobody can beat, and against scikit-learn's own."""

import sys
from pathlib import Path

import numpy as np
import pytest
from scipy.stats import norm

sys.path.append(str(Path(__file__).parents[1] / "benchmarks"))
from common import c2st

ROWS = 1500


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
