"""Priors against scipy.stats, against finite differences, and against people."""

import json
import math
import subprocess
import sys

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from torch import distributions as td

from sbiplat.errors import PriorError
from sbiplat.prior import (
    Beta,
    Gamma,
    HalfNormal,
    LogNormal,
    LogUniform,
    Marginal,
    MultivariateNormal,
    Normal,
    Prior,
    TruncatedNormal,
    Uniform,
)

INF = math.inf
KNOWN = [
    (Uniform(-2, 3), stats.uniform(-2, 5)),
    (LogUniform(1e-3, 1e2), stats.loguniform(1e-3, 1e2)),
    (Normal(1, 2), stats.norm(1, 2)),
    (TruncatedNormal(0, 1, -1, 2), stats.truncnorm(-1, 2)),
    (TruncatedNormal(0, 1, -INF, -6), stats.truncnorm(-INF, -6)),
    (TruncatedNormal(0, 1, 5, 7), stats.truncnorm(5, 7)),
    (TruncatedNormal(3, 2), stats.norm(3, 2)),
    (LogNormal(0.3, 0.7), stats.lognorm(0.7, scale=math.exp(0.3))),
    (HalfNormal(2), stats.halfnorm(scale=2)),
    (Beta(2, 3), stats.beta(2, 3)),
    (Gamma(2, 3), stats.gamma(2, scale=1 / 3)),
]
EXTREME = [
    Beta(0.05, 0.05), Beta(0.2, 0.2), Gamma(0.01, 1.0), Gamma(1e3, 1e-3), LogNormal(0, 200.0), TruncatedNormal(0, 1, 50, INF),
    TruncatedNormal(0, 1, -1e-9, 1e-9), LogUniform(1e-300, 1e300), Uniform(1e9, 1e9 + 1e-6), HalfNormal(1e-300),
]
LAWS = [m for m, _ in KNOWN] + EXTREME


def name_of(law):
    return repr(law).replace(", unit=''", "")


@pytest.mark.parametrize(("law", "truth"), KNOWN, ids=lambda v: name_of(v) if isinstance(v, Marginal) else "")
class TestAgainstScipy:
    def test_draws_follow_the_law(self, law, truth):
        draws = Prior({"a": law}).sample(np.random.default_rng(1), 20_000)[:, 0]
        assert stats.kstest(draws, truth.cdf).pvalue > 1e-4  # one false alarm in 10,000

    def test_log_density_is_scipys(self, law, truth):
        theta = law.from_normal(np.linspace(-5, 5, 101))
        np.testing.assert_allclose(law.log_prob(theta), truth.logpdf(theta), rtol=1e-10, atol=1e-10)

    def test_quantiles_are_scipys_in_both_tails(self, law, truth):
        z = np.linspace(-5, 5, 101)
        expected = np.where(z < 0, truth.ppf(stats.norm.cdf(z)), truth.isf(stats.norm.sf(z)))
        np.testing.assert_allclose(law.from_normal(z), expected, rtol=1e-7, atol=1e-12)

    def test_log_det_is_the_slope_of_the_map(self, law, truth):
        prior, z, h = Prior({"a": law}), np.linspace(-3, 3, 31)[:, None], 1e-5
        slope = (prior.constrain(z + h) - prior.constrain(z - h))[:, 0] / (2 * h)
        np.testing.assert_allclose(prior.log_abs_det_jacobian(z), np.log(slope), atol=1e-4)


@pytest.mark.parametrize("law", LAWS, ids=name_of)
class TestEveryLaw:
    def test_draws_lie_inside_where_the_density_is_finite(self, law):
        prior = Prior({"a": law})
        draws = prior.sample(np.random.default_rng(2), 100_000)
        assert prior.contains(draws).all()
        assert np.isfinite(prior.log_prob(draws)).all()
        assert np.isfinite(prior.unconstrain(draws)).all()

    def test_no_z_however_far_leaves_the_support(self, law):
        prior = Prior({"a": law})
        theta = prior.constrain(np.array([[-1e6], [-40.0], [40.0], [1e6]]))
        assert np.isfinite(theta).all()
        assert prior.contains(theta).all()

    def test_the_map_rises(self, law):
        theta = law.from_normal(np.linspace(-30, 30, 601))
        assert (np.diff(theta) >= 0).all()

    def test_outside_the_support_the_density_is_zero(self, law):
        low, high = law.support
        outside = np.array([v for v in (np.nextafter(low, -INF), np.nextafter(high, INF), INF, -INF, math.nan)
                            if not low < v < high or not math.isfinite(v)])
        assert (law.log_prob(outside) == -INF).all()
        assert not law.contains(outside).any()

    def test_json_brings_the_same_prior_back(self, law):
        prior = Prior({"a": law})
        again = Prior.from_json(json.loads(json.dumps(prior.to_json(), allow_nan=False)))
        assert again == prior
        assert np.array_equal(again.sample(np.random.default_rng(3), 9), prior.sample(np.random.default_rng(3), 9))

    def test_a_row_has_the_same_bits_alone_and_among_others(self, law):
        prior = Prior({"a": law, "b": Normal(0, 1), "c": law})
        z = np.random.default_rng(4).standard_normal((67, 3))
        assert np.array_equal(prior.constrain(z), np.concatenate([prior.constrain(row[None]) for row in z]))


@pytest.mark.parametrize("law", [m for m, _ in KNOWN], ids=name_of)
@settings(max_examples=40, deadline=None)
@given(z=st.floats(-5, 5))
def test_unconstrain_undoes_constrain(law, z):
    theta = law.from_normal(np.array(z))
    spacing = np.spacing(np.abs(theta)) / np.exp(stats.norm.logpdf(z) - law.log_prob(theta))  # what one step of theta is in z
    assert abs(law.to_normal(theta) - z) <= 1e-6 + 4 * spacing


@settings(max_examples=60, deadline=None)
@given(loc=st.floats(-5, 5), scale=st.floats(0.1, 10), a=st.floats(-20, 20), width=st.floats(0.01, 30))
def test_truncated_normal_keeps_its_digits_wherever_it_is_cut(loc, scale, a, width):
    law = TruncatedNormal(loc, scale, loc + scale * a, loc + scale * (a + width))
    z = np.linspace(-4, 4, 17)
    theta = law.from_normal(z)
    steps = np.spacing(np.maximum(np.abs(theta), abs(loc))) / np.exp(stats.norm.logpdf(z) - law.log_prob(theta))
    assert (np.abs(law.to_normal(theta) - z) <= 1e-6 + 8 * steps).all()


def test_truncated_normal_below_minus_six_has_its_upper_tail():
    law = TruncatedNormal(0, 1, -INF, -6)
    theta = law.from_normal(np.array([3.0, 5.0, 7.0]))
    assert (np.diff(theta) > 0).all()
    np.testing.assert_allclose(law.to_normal(theta), [3, 5, 7], atol=1e-2)  # theta has 1e-15 steps, some 1e-3 of z there


# ---------------------------------------------------------------------------------------------------- joint priors

TWO = torch.ones(2)
TORCH_LAWS = [
    td.LogNormal(0 * TWO, TWO), td.HalfNormal(TWO), td.HalfCauchy(TWO), td.Gumbel(0 * TWO, TWO), td.Kumaraswamy(TWO, 2 * TWO),
    td.Pareto(TWO, 3 * TWO), td.Weibull(TWO, TWO), td.InverseGamma(3 * TWO, TWO), td.StudentT(5 * TWO),
    td.Beta(0.05 * TWO, 0.05 * TWO), td.Gamma(0.01 * TWO, TWO), td.Uniform(0 * TWO, torch.tensor([1.0, 2.0])),
    td.Exponential(TWO), td.Laplace(0 * TWO, TWO),
    td.LowRankMultivariateNormal(0 * TWO, torch.tensor([[1.0], [0.5]]), TWO),
    td.MixtureSameFamily(td.Categorical(torch.tensor([0.3, 0.7])),
                         td.MultivariateNormal(torch.tensor([[0.0, 0.0], [3.0, 1.0]]), torch.eye(2).expand(2, 2, 2))),
    td.MixtureSameFamily(td.Categorical(logits=torch.tensor([0.3, 0.7])),
                         td.Independent(td.Beta(2 * torch.ones(2, 2), TWO), 1)),
]


@pytest.mark.parametrize("law", TORCH_LAWS, ids=lambda d: type(d).__name__)
class TestTorchLaws:
    def test_json_brings_the_same_prior_back_even_after_use(self, law):
        prior = Prior.joint(["a", "b"], law)
        prior.log_prob(prior.sample(np.random.default_rng(0), 5))  # torch caches alternative parameters
        again = Prior.from_json(json.loads(json.dumps(prior.to_json(), allow_nan=False)))
        assert again == prior == Prior.joint(["a", "b"], law)
        assert again.to_json() == Prior.from_json(again.to_json()).to_json()
        assert np.array_equal(again.sample(np.random.default_rng(1), 50), prior.sample(np.random.default_rng(1), 50))

    def test_draws_lie_inside_and_go_to_r_d_and_back(self, law):
        prior = Prior.joint(["a", "b"], law)
        theta = prior.sample(np.random.default_rng(2), 5000)
        assert prior.contains(theta).all()
        assert np.isfinite(prior.log_prob(theta)).all()
        np.testing.assert_allclose(prior.constrain(prior.unconstrain(theta)), theta, rtol=1e-9, atol=1e-12)

    def test_log_det_is_that_of_the_numerical_jacobian(self, law):
        prior, h = Prior.joint(["a", "b"], law), 1e-6
        for z in np.random.default_rng(3).uniform(-1, 1, (5, 2)):
            jacobian = np.stack([(prior.constrain(z + h * e) - prior.constrain(z - h * e)) / (2 * h) for e in np.eye(2)], 1)
            assert prior.log_abs_det_jacobian(z) == pytest.approx(np.linalg.slogdet(jacobian)[1], abs=1e-5)


def test_support_of_a_torch_law_is_read_from_its_constraint():
    def bounds(law):
        return [v.tolist() for v in Prior.joint(["a", "b"], law).support]

    assert bounds(td.Uniform(torch.tensor([-3.0, 0.0]), torch.tensor([1e7, 2.0]))) == [[-3.0, 0.0], [1e7, 2.0]]
    assert bounds(td.Pareto(2 * TWO, TWO)) == [[2.0, 2.0], [INF, INF]]
    assert bounds(td.Normal(0 * TWO, TWO)) == [[-INF, -INF], [INF, INF]]


def test_a_torch_law_is_the_one_that_is_recorded_in_float64():
    prior = Prior.joint(["a", "b"], td.MultivariateNormal(torch.zeros(2), torch.tensor([[2.0, 0.5], [0.5, 1.0]])))
    assert "multivariate_normal" in prior.to_json()
    assert prior.gaussianised


@pytest.mark.parametrize(("law", "why"), [
    (td.TransformedDistribution(td.Normal(0 * TWO, TWO), [td.ExpTransform()]), "cannot be written to a bank"),
    (td.RelaxedBernoulli(torch.tensor(1.0), 0.3 * TWO), "cannot be written to a bank"),
    (td.Dirichlet(torch.ones(2)), "not a box"),
    (td.MixtureSameFamily(td.Categorical(TWO),
                          td.Independent(td.Uniform(torch.zeros(2, 2), torch.tensor([[1.0, 2.0], [2.0, 2.0]])),
                                                              1)), "not a box"),
    (td.Poisson(TWO), "no bijection"),
    (td.Normal(0.0, 1.0), "must draw vectors"),
    ("a string", "takes a torch distribution"),
])
def test_a_torch_law_that_cannot_be_a_prior_is_refused(law, why):
    with pytest.raises(PriorError, match=why):
        Prior.joint(["a", "b"], law)


def test_a_law_of_the_users_own_class_is_refused():
    class Mine(td.Normal):
        pass

    with pytest.raises(PriorError, match="not one of torch"):
        Prior.joint(["a", "b"], Mine(0 * TWO, TWO))


def test_multivariate_normal_has_its_mean_and_covariance():
    covariance = np.array([[2.0, 0.8], [0.8, 1.0]])
    prior = Prior.joint(["a", "b"], MultivariateNormal([1, -1], covariance))
    draws = prior.sample(np.random.default_rng(0), 40_000)
    np.testing.assert_allclose(np.cov(draws.T), covariance, atol=0.06)  # 4 sd of a variance of 2 from 40,000 draws
    expected = stats.multivariate_normal([1, -1], covariance).logpdf(draws[:9])
    np.testing.assert_allclose(prior.log_prob(draws[:9]), expected, rtol=1e-12)
    assert prior.log_prob([math.nan, 0.0]) == -INF


@pytest.mark.parametrize(("loc", "covariance", "why"), [
    ([0, 0], [[1, math.nan], [math.nan, 1]], "NaN"), ([0, math.inf], np.eye(2), "NaN or infinity"),
    ([0, 0], [[1, 0.5], [0.1, 1]], "symmetric"), ([0, 0], [[1, 2], [2, 1]], "positive definite"),
    ([0, 0], np.eye(3), "does not go with"), (["a"], [[1]], "arrays of numbers"),
])
def test_an_impossible_covariance_is_refused(loc, covariance, why):
    with pytest.raises(PriorError, match=why):
        MultivariateNormal(loc, covariance)


# -------------------------------------------------------------------------------------------- mistakes, and manners


@pytest.mark.parametrize(("make", "why"), [
    (lambda: Uniform(1, 1), "low must be below high"), (lambda: Uniform(-1e308, 1e308), "finite"),
    (lambda: Uniform("0", 1), "low must be a number"), (lambda: Uniform(math.nan, 1), "NaN"),
    (lambda: LogUniform(0, 1), "0 < low"),
    (lambda: Normal(0, -1), "scale positive"), (lambda: TruncatedNormal(0, 1, 2, 1), "low must be below"),
    (lambda: Beta(0, 1), "positive"), (lambda: Uniform(0, 1, unit=3), "unit must be text"), (lambda: Prior({}), "at least one"),
    (lambda: Prior({"a": 1.0}), "expected one of"), (lambda: Prior([1, 2]), "dict of name"),
    (lambda: Prior(5), "dict of name"), (lambda: Prior({"a,b": Normal(0, 1)}), "plain text"),
    (lambda: Prior([("a", Normal(0, 1)), ("a", Normal(0, 1))]), "given twice"),
    (lambda: Prior.joint("ab", MultivariateNormal([0, 0], np.eye(2))), "names must be a list"),
    (lambda: Prior.joint(["a", "b"], MultivariateNormal([0, 0], np.eye(2)), units="ms"), "units must be a list"),
    (lambda: Prior.joint(["a", "b"], MultivariateNormal([0, 0], np.eye(2)), units=[1, 2]), "must be text"),
    (lambda: Prior.joint(["a", "b"], MultivariateNormal([0, 0], np.eye(2)), units=["m"]), "1 units for 2"),
    (lambda: Prior.joint(["a"], MultivariateNormal([0, 0], np.eye(2))), "dimension 2"),
    (lambda: Prior({"a": Normal(0, 1)}).log_prob(np.zeros((3, 2))), "expected 1 parameters"),
])
def test_a_mistake_is_one_line_that_names_it(make, why):
    with pytest.raises(PriorError, match=why) as told:
        make()
    assert "\n" not in str(told.value)


@pytest.mark.parametrize("value", [1.5, -0.1, math.nan, INF])
def test_theta_outside_the_support_is_refused_by_name(value):
    prior = Prior({"rate": Normal(0, 1), "share": Beta(2, 2)})
    with pytest.raises(PriorError, match=r"share = .* outside the prior's support, 0 to 1 \(row 1\)"):
        prior.unconstrain([[0.0, 0.5], [0.0, value]])


@pytest.mark.parametrize("garbage", [
    {}, {"independent": [{"law": "os.system"}]}, {"independent": [{"law": "Normal", "loc": 10**400, "scale": 1}]},
    {"independent": 3},
    {"torch": {"law": "__loader__"}}, {"torch": {"law": "Normal", "loc": "x"}}, {"torch": []},
    {"multivariate_normal": {"loc": 1}},
    {"torch": {"law": "Normal", "loc": [[0.0]], "scale": [1.0, 2.0, 3.0]}}, {"names": 3, "independent": []},
])
def test_a_garbled_description_is_a_prior_error(garbage):
    with pytest.raises(PriorError):
        Prior.from_json({"names": ["a"], "units": [""], **garbage})


def test_the_global_generators_are_left_alone():
    np.random.seed(1)  # noqa: NPY002 - the global generator is what is tested
    torch.manual_seed(1)
    before = np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()  # noqa: NPY002
    for prior in (Prior({"a": Normal(0, 1)}), Prior.joint(["a", "b"], TORCH_LAWS[0])):
        prior.sample(np.random.default_rng(0), 10)
        prior.sample_each([np.random.default_rng(k) for k in range(3)])
    assert (np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()) == before  # noqa: NPY002


def test_a_prior_without_torch_laws_never_imports_torch():
    code = ("import sys, numpy as np; from sbiplat.prior import *; "
            "p = Prior.joint(['a'], MultivariateNormal([0.], [[1.]])); p.sample(np.random.default_rng(0), 3); "
            "q = Prior({'a': Beta(2, 2)}); Prior.from_json(q.to_json()).unconstrain(q.sample(np.random.default_rng(0))); "
            "sys.exit('torch' in sys.modules)")
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
