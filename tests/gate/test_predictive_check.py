"""Posterior-predictive p-values of summaries: known answers, ties, what a user names, and what is refused."""

import sys
from dataclasses import dataclass

import numpy as np
import pytest
from scipy import stats

import sbiplat as sp
from sbiplat.diagnostics.predictive import builtin_summaries, summaries_from, two_sided
from sbiplat.errors import ObservationError, SettingError, SimulatorError
from sbiplat.observation import ObservationSpec
from sbiplat.posteriors.base import Posterior
from sbiplat.progress import silent

PRIOR = sp.Prior({"a": sp.Normal(0.0, 1.0)})
SIZE = 30


@sp.simulator(prior=PRIOR, x_shape=(SIZE,), batched=True)
def noise_at(theta, rng):
    """White noise about a."""
    return theta + rng.standard_normal((len(theta), SIZE))


@dataclass(frozen=True)
class ExactSampler:
    """The exact posterior of a given x."""

    def sample(self, x, n, seed):
        mean = x["x"].astype(float).sum(1) / (SIZE + 1)
        return mean[:, None, None] + np.random.default_rng(seed).standard_normal((len(mean), n, 1)) / np.sqrt(SIZE + 1)


POSTERIOR = Posterior(PRIOR, noise_at.x, ExactSampler())


def check(x, summaries=None, **settings):
    return sp.predictive_check(POSTERIOR, noise_at, x, summaries, progress=silent, **{"draws": 200, **settings})


def observed(seed):
    rng = np.random.default_rng([seed, 4])
    return rng.standard_normal() + rng.standard_normal(SIZE)


def test_a_summary_that_the_posterior_was_not_found_by_has_uniform_p_values():
    """The sample variance of white noise says nothing of a, so its predictive p-value is uniform; the mean's keeps away from 0."""
    found = [check(observed(seed), {"sd": np.std, "mean": np.mean}).p_values for seed in range(150)]
    sd, mean = (np.array([p[name] for p in found]) for name in ("sd", "mean"))
    assert stats.kstest(sd, "uniform").pvalue > 1e-3
    assert stats.kstest(mean, "uniform").pvalue < 1e-3
    assert mean.min() > 0.5


def test_data_that_the_simulator_cannot_make_are_found():
    walk = np.cumsum(observed(1))
    found = check(walk)
    assert found["lag-1 autocorrelation of x"].p_value == 1 / 201
    assert found["lag-1 autocorrelation of x"].adjusted < 0.05
    assert found["mean of x"].p_value > 0.2
    assert "lag-1 autocorrelation of x" in str(found)


def test_p_values_are_mid_ranks():
    rng = np.random.default_rng(0)
    assert two_sided(np.zeros(99), 0.0) == 1.0
    assert two_sided(np.arange(99.0), 200.0) == pytest.approx(1 / 100)
    assert two_sided(np.arange(99.0), 49.0) == pytest.approx(1.0)
    draws = rng.integers(0, 3, (2000, 60))
    u = np.array([two_sided(row[1:], row[0]) for row in draws])
    assert (u <= 1).all()
    assert abs(u.mean() - np.mean([two_sided(draws[:, 0], k) for k in draws[:, 1]])) < 0.05


def test_the_same_seed_gives_the_same_p_values():
    assert check(observed(0), seed=3) == check(observed(0), seed=3)
    assert check(observed(0), seed=3) != check(observed(0), seed=4)


@pytest.mark.parametrize(("spec", "wanted"), [
    (ObservationSpec.declare((3,), labels=["a", "b", "c"]), ["a", "b", "c"]),
    (ObservationSpec.declare((30,)), [f"{k} of x" for k in ("min", "max", "mean", "sd", "lag-1 autocorrelation")]),
    (ObservationSpec.declare((25, 2), labels=["up", "down"]),
     [f"{k} of {c}" for c in ("up", "down") for k in ("min", "max", "mean", "sd", "lag-1 autocorrelation")]),
    (ObservationSpec.declare((2, 25)), [f"{k} of x[{c}]" for c in (0, 1) for k in ("min", "max", "mean", "sd", "lag-1 autocorrelation")]),
    (ObservationSpec.declare((20, 20)), [f"{k} of x" for k in ("min", "max", "mean", "sd")]),
    (ObservationSpec.declare({"n": (), "t": (24,)}), [f"{k} of t" for k in ("min", "max", "mean", "sd", "lag-1 autocorrelation")]),
    (ObservationSpec.declare((25,), labels=[f"s{k}" for k in range(25)]), [f"s{k}" for k in range(25)]),
])
def test_built_in_summaries_suit_the_shape_of_x(spec, wanted):
    rng = np.random.default_rng(0)
    x = {k: rng.standard_normal((4, *shape)) for k, shape in spec.shapes.items()}
    names, values = builtin_summaries(spec, x)
    assert names == wanted
    assert values.shape == (4, len(wanted))
    if "max of x" in names:
        np.testing.assert_array_equal(values[:, names.index("max of x")], x["x"].reshape(4, -1).max(1))


def test_lag_1_is_the_autocorrelation():
    x = np.random.default_rng(0).standard_normal((1, 5000))
    for k in range(1, 5000):
        x[0, k] += 0.7 * x[0, k - 1]
    names, values = builtin_summaries(ObservationSpec.declare((5000,)), {"x": x})
    assert values[0, names.index("lag-1 autocorrelation of x")] == pytest.approx(0.7, abs=0.05)


@pytest.mark.parametrize(("summaries", "message"), [
    ({}, "a dict of functions"), (np.max, "a dict of functions"), ({"bad": lambda x: x["y"]}, "'bad' fails on x"),
    ({"none": lambda x: np.nan}, "the summary none of the observation is nan"), ({"text": lambda x: "a"}, "'text' fails on x"),
])
def test_summaries_that_are_none_are_one_line(summaries, message):
    with pytest.raises(SettingError, match=message) as error:
        check(observed(0), summaries)
    assert "\n" not in str(error.value)


def test_wrong_arguments_are_one_line():
    other = sp.simulator(prior=PRIOR, x_shape=(2,), name="other")(lambda theta, rng: np.zeros(2))
    with pytest.raises(SimulatorError, match="another shape of x"):
        sp.predictive_check(POSTERIOR, other, observed(0))
    with pytest.raises(ObservationError, match="a batch was given"):
        check(np.zeros((2, SIZE)))
    with pytest.raises(SettingError, match="draws must be"):
        check(observed(0), draws=1)
    broken = sp.simulator(prior=PRIOR, x_shape=(SIZE,), name="broken")(lambda theta, rng: 1 / 0)
    with pytest.raises(SimulatorError, match=r"failed on 200 of 200 draws .*ZeroDivisionError"):
        sp.predictive_check(POSTERIOR, broken, observed(0), draws=200, progress=silent)


def test_a_run_is_opened_at_the_door(line_run, line_simulator):
    found = sp.predictive_check(line_run.path, line_simulator, [0.3, -0.2], {"sum": np.sum, "both": lambda x: x}, draws=100, progress=silent)
    assert list(found.p_values) == ["sum", "both[0]", "both[1]"]
    assert found.rows == 100
    (line_run.path / "certificate.json").rename(line_run.path / "away")
    try:
        with pytest.raises(sp.Uncertified):
            sp.predictive_check(line_run, line_simulator, [0.3, -0.2])
    finally:
        (line_run.path / "away").rename(line_run.path / "certificate.json")


def test_summaries_are_found_by_name(tmp_path):
    place = tmp_path / "mine.py"
    place.write_text("import numpy as np\n\ndef peak(x):\n    return x.max()\n\nSUMMARIES = {'peak': peak, 'spread': np.std}\nNUMBER = 3\n")
    assert list(summaries_from(f"{place}:SUMMARIES")) == ["peak", "spread"]
    assert summaries_from(f"{place}:peak")["peak"](np.arange(3)) == 2
    for spec, message in ((f"{place}:NUMBER", "no function"), (f"{place}:nothing", "no function"), ("peak", "expected file.py:object")):
        with pytest.raises(SettingError, match=message):
            summaries_from(spec)
    with pytest.raises(SimulatorError, match="no simulator file"):
        summaries_from(f"{tmp_path / 'gone.py'}:peak")
    assert str(tmp_path) not in sys.path
