"""Importance weights against closed forms: efficiency, k-hat, evidence, another prior, pinned parameters, auxiliary proxies."""

import json
import math
import re
import subprocess
import sys

import numpy as np
import pytest
from conftest import NOISE, line_posterior
from scipy import stats

import sbiplat as sp
from sbiplat.errors import PriorError, SettingError, SimulatorError, Unreliable
from sbiplat.observation import ObservationSpec
from sbiplat.posteriors.base import Posterior
from sbiplat.posteriors.steps import in_words
from sbiplat.posteriors.weighted import k_hat

PRIOR = sp.Prior({"a": sp.Normal(0.0, 1.0), "b": sp.Normal(0.0, 1.0)})
COV = np.array([[1.0, 0.6], [0.6, 0.5]])  # of x given theta
SPEC = ObservationSpec.declare(2, "float64")
POSTERIOR_COV = np.linalg.inv(np.eye(2) + np.linalg.inv(COV))


def posterior_mean(x):
    return x @ (POSTERIOR_COV @ np.linalg.inv(COV)).T


def log_likelihood(theta, x):
    """log N(x; theta, COV), (N,)."""
    return stats.multivariate_normal(np.zeros(2), COV).logpdf(np.atleast_2d(x - theta))


def log_evidence(x):
    return stats.multivariate_normal(np.zeros(2), np.eye(2) + COV).logpdf(x)


class Gaussian:
    """The exact posterior of theta = z, its covariance times scale^2, its mean moved by offset sd."""

    def __init__(self, scale=1.0, offset=0.0):
        self.factor = scale * np.linalg.cholesky(POSTERIOR_COV)
        self.offset = offset * np.sqrt(np.diag(POSTERIOR_COV))

    def sample(self, x, n, seed):
        noise = np.random.default_rng(seed).standard_normal((len(x["x"]), n, 2))
        return ((posterior_mean(x["x"]) + self.offset)[:, None] + noise @ self.factor.T).astype(np.float32)

    def log_prob(self, z, x):
        gap = np.asarray(z, float) - (posterior_mean(x["x"]) + self.offset)[:, None]
        return stats.multivariate_normal(np.zeros(2), self.factor @ self.factor.T).logpdf(gap).reshape(gap.shape[:2])


def posterior(*args):
    return Posterior(PRIOR, SPEC, Gaussian(*args), {"certified": "yes"})


X = np.array([0.7, -1.2])
BATCH = np.array([[0.7, -1.2], [0.0, 0.0], [-1.5, 0.4]])


def predicted(scale, dims=2):
    """ESS / n of p = N(0, I), q = N(0, scale^2 I)."""
    return (math.sqrt(2 * scale**2 - 1) / scale**2) ** dims


@pytest.mark.parametrize("scale", [1.0, 1.2, 1.6])
def test_efficiency_is_the_gaussian_closed_form_and_the_evidence_is_exact(scale):
    made = posterior(scale).importance(BATCH, 20_000, log_likelihood=log_likelihood, seed=1)
    np.testing.assert_allclose(made.efficiency, predicted(scale), rtol=0.02)
    np.testing.assert_allclose(made.ess, made.efficiency * 20_000)
    assert (made.k_hat < 0.5).all()
    gap = made.log_evidence - log_evidence(BATCH)
    assert (np.abs(gap) < 4 * made.log_evidence_error + 1e-5).all()
    mean = (made.weights[..., None] * made.theta).sum(1)
    np.testing.assert_allclose(mean, posterior_mean(BATCH), atol=5 * scale / math.sqrt(20_000))


def test_the_standard_error_of_the_evidence_is_that_of_repetition():
    made = [posterior(1.5, 0.5).importance(X, 1000, log_likelihood=log_likelihood, seed=s) for s in range(300)]
    z = [(m.log_evidence - log_evidence(X)) / m.log_evidence_error for m in made]
    assert np.std(z) == pytest.approx(1.0, abs=0.15), "300 repetitions give an sd to 4 %"
    assert abs(np.mean(z)) < 0.25


def test_a_posterior_that_is_too_narrow_is_told_by_k_hat_and_one_that_is_not_is_not(recwarn):
    """q = N(0, s^2): weights have the tail index 1 - s^2, so k = 0.91 at s = 0.3, and none at s > 1."""
    posterior(1.3).importance(X, 10_000, log_likelihood=log_likelihood, seed=0)
    assert not [w for w in recwarn if w.category is Unreliable]
    with pytest.warns(Unreliable, match=r"not to be relied on \(k-hat = .*, above 0.7; .*train longer") as told:
        made = posterior(0.3).importance(X, 10_000, log_likelihood=log_likelihood, seed=0)
    assert made.k_hat > 0.7
    assert "\n" not in str(told[0].message)
    with pytest.warns(Unreliable, match="for 3 of 3 observations"):
        posterior(0.3).importance(BATCH, 10_000, log_likelihood=log_likelihood, seed=0)


def test_weights_that_are_all_but_equal_give_no_alarm_whatever_their_shape(recwarn):
    """k-hat has no scale: of weights that differ by a thousandth it may be above 1."""
    noise = np.random.default_rng(0).standard_t(0.7, 2000)

    def nearly(theta, x):
        return log_likelihood(theta, x) + np.clip(1e-4 * np.abs(noise), 0, 0.5)

    made = posterior().importance(X, 2000, log_likelihood=nearly, seed=0)
    assert made.k_hat > 0.7
    assert made.efficiency > 0.99
    assert not [w for w in recwarn if w.category is Unreliable]


def test_of_sets_of_observations_the_likelihoods_multiply():
    """Three observations of one theta, drawn from a posterior that knows only the first."""
    class OfFirst(Gaussian):
        def sample(self, x, n, seed):
            return super().sample({"x": x["x"][:, 0]}, n, seed)

        def log_prob(self, z, x):
            return super().log_prob(z, {"x": x["x"][:, 0]})

    three = np.array([[0.7, -1.2], [0.3, -0.8], [0.9, -0.6]])
    made = Posterior(PRIOR, ObservationSpec.declare((3, 2), "float64"), OfFirst(1.1), {"certified": "yes"}, set_size=3).importance(
        three, 40_000, log_likelihood=log_likelihood, seed=0)
    joint = np.kron(np.ones((3, 3)), np.eye(2)) + np.kron(np.eye(3), COV)
    assert made.log_evidence == pytest.approx(stats.multivariate_normal(np.zeros(6), joint).logpdf(three.ravel()), abs=4 * made.log_evidence_error)
    cov = np.linalg.inv(np.eye(2) + 3 * np.linalg.inv(COV))
    np.testing.assert_allclose(made.weights @ made.theta, cov @ np.linalg.inv(COV) @ three.sum(0), atol=5 * math.sqrt(cov.max() / made.ess))


def test_efficiency_of_a_pilot_flatters_where_weights_are_heavy():
    """Why figures are of all draws (field notes): with k near 0.8 the mean efficiency of 200 draws is far above that of 20,000."""
    z = 0.45 * np.random.default_rng(0).standard_normal((40, 20_000))
    w = np.exp(-0.5 * z**2 + 0.5 * (z / 0.45) ** 2)
    def efficiency(v):
        return (v.sum(1) ** 2 / (v**2).sum(1) / v.shape[1]).mean()
    assert efficiency(w[:, :200]) > 1.5 * efficiency(w)


def test_k_hat_of_flat_and_of_hopeless_weights():
    assert k_hat(np.zeros(1000)) == 0.0
    assert k_hat(np.where(np.arange(2000) < 3, 0.0, -np.inf)) == math.inf


def test_draws_are_those_that_sample_gives_for_the_same_seed():
    made = posterior().importance(X, 500, log_likelihood=log_likelihood, seed=7)
    np.testing.assert_array_equal(made.theta, posterior().sample(X, 500, seed=7))


def test_one_of_a_batch_has_the_figures_of_itself():
    batch = posterior(1.2).importance(X[None], 2000, log_likelihood=log_likelihood, seed=7)
    one = posterior(1.2).importance(X, 2000, log_likelihood=log_likelihood, seed=7)
    assert one.theta.shape == (2000, 2)
    assert one.log_weight.shape == one.weights.shape == (2000,)
    assert batch.theta.shape == (1, 2000, 2)
    assert isinstance(one.efficiency, float)
    assert (batch.efficiency[0], batch.k_hat[0], batch.log_evidence[0]) == (one.efficiency, one.k_hat, one.log_evidence)
    assert one.weights.sum() == pytest.approx(1)


# -------------------------------------------------------------------------------------------------- another prior

OTHER = sp.Prior({"a": sp.Normal(0.5, 0.7), "b": sp.Normal(-0.5, 0.6)})


def other_posterior(x):
    """Mean, covariance and log evidence under OTHER."""
    mean, precision = np.array([0.5, -0.5]), np.diag([0.7**-2, 0.6**-2])
    cov = np.linalg.inv(precision + np.linalg.inv(COV))
    return cov @ (precision @ mean + np.linalg.inv(COV) @ x), cov, stats.multivariate_normal(mean, np.linalg.inv(precision) + COV).logpdf(x)


@pytest.mark.parametrize("given", [{"log_likelihood": log_likelihood}, {}])
def test_another_prior_with_a_likelihood_or_by_the_ratio_alone(given):
    made = posterior().importance(X, 40_000, prior=OTHER, seed=2, **given)
    mean, cov, log_z = other_posterior(X)
    own = made.weights @ made.theta
    np.testing.assert_allclose(own, mean, atol=5 * np.sqrt(np.diag(cov) / made.ess).max())
    np.testing.assert_allclose(made.weights @ (made.theta - own) ** 2, np.diag(cov), rtol=0.05)
    wanted = log_z if given else log_z - log_evidence(X)
    assert abs(made.log_evidence - wanted) < 4 * made.log_evidence_error
    assert made.evidence_of == ("p(x)" if given else "p'(x) / p(x), p' the other prior")
    assert made.facts["certified"] == "no"
    assert "another prior" in made.facts["refusal"]


def test_a_ratio_of_priors_needs_no_density():
    class Silent(Gaussian):
        def log_prob(self, z, x):
            raise NotImplementedError

    silent = Posterior(PRIOR, SPEC, Silent(), {"certified": "yes"})
    same = posterior().importance(X, 1000, prior=OTHER, seed=2)
    np.testing.assert_array_equal(silent.importance(X, 1000, prior=OTHER, seed=2).log_weight, same.log_weight)
    with pytest.raises(SettingError, match="has no density"):
        silent.importance(X, 1000, log_likelihood=log_likelihood)


# ------------------------------------------------------------------------------------------------------ pinned


def conditional(x, b):
    """Mean and sd of a given b and x; log p(b | x); log p(x | b)."""
    m = posterior_mean(x)
    slope = POSTERIOR_COV[0, 1] / POSTERIOR_COV[1, 1]
    at_b = stats.norm(m[1], math.sqrt(POSTERIOR_COV[1, 1])).logpdf(b)
    sd = math.sqrt(POSTERIOR_COV[0, 0] - slope * POSTERIOR_COV[0, 1])
    return m[0] + slope * (b - m[1]), sd, at_b, log_evidence(x) + at_b - stats.norm.logpdf(b)


@pytest.mark.parametrize("given", [{"log_likelihood": log_likelihood}, {}])
@pytest.mark.parametrize("b", [-0.6, 0.8])
def test_pinned_parameters_give_the_conditional_posterior_at_nearly_full_efficiency(given, b):
    made = posterior().importance(X, 20_000, pinned={"b": b}, seed=3, **given)
    mean, sd, log_q, log_z = conditional(X, b)
    assert (made.theta[:, 1] == b).all()
    a = made.theta[:, 0]
    own = made.weights @ a
    assert own == pytest.approx(mean, abs=5 * sd / math.sqrt(made.ess))
    assert math.sqrt(made.weights @ (a - own) ** 2) == pytest.approx(sd, rel=0.03)
    assert made.efficiency > 0.97, "where q is Gaussian the weights are constant, but for the pilot's errors"
    wanted = log_z if given else log_q
    assert made.log_evidence == pytest.approx(wanted, abs=4 * made.log_evidence_error + 1e-5)
    assert made.evidence_of == (f"p(x | b = {b:g})" if given else f"q(b = {b:g} | x)")


def test_pinning_is_exact_where_the_posterior_is_not_gaussian():
    """Bounded parameters, a skew q that is not the posterior, two observations: against quadrature over the one that is free."""
    prior = sp.Prior({"p": sp.Uniform(0.0, 1.0), "rate": sp.LogNormal(0.0, 0.5)})

    def likelihood(theta, x):
        return stats.norm(theta[:, :1] * theta[:, 1:], 0.3).logpdf(x[0])[:, 0]

    class Skew(Gaussian):
        def sample(self, x, n, seed):
            u, v = 1.3 * np.random.default_rng(seed).standard_normal((2, len(x["x"]), n))
            return np.stack([u, v + 0.1 * u**2], -1).astype(np.float32)

        def log_prob(self, z, x):
            z = np.asarray(z, float)
            return stats.norm.logpdf(z[..., 0], scale=1.3) + stats.norm.logpdf(z[..., 1] - 0.1 * z[..., 0] ** 2, scale=1.3)

    made = Posterior(prior, SPEC, Skew(), {"certified": "yes"}).importance(
        np.array([[0.5, 0.0], [0.9, 0.0]]), 40_000, log_likelihood=likelihood, pinned={"rate": 1.3}, seed=0)
    grid = np.linspace(0.0005, 0.9995, 1000)
    for k, x in enumerate((0.5, 0.9)):
        height = stats.norm(grid * 1.3, 0.3).pdf(x)
        assert made.log_evidence[k] == pytest.approx(math.log(height.mean()), abs=4 * made.log_evidence_error[k])
        wanted = (height * grid).sum() / height.sum()
        assert made.weights[k] @ made.theta[k, :, 0] == pytest.approx(wanted, abs=5 * 0.3 / math.sqrt(made.ess[k]))


# ----------------------------------------------------------------------------------------------------- auxiliary


class WithProxies(Gaussian):
    """theta with proxies v of a: v ~ N(m, s^2) widened, theta | v exact, as density recovery of GNPE gives them."""

    KAPPA = 0.5

    def sample_and_log_prob(self, x, n, seed):
        rng = np.random.default_rng(seed)
        mean = posterior_mean(x["x"])[:, None]
        wide = 1.2 * math.sqrt(POSTERIOR_COV[0, 0] + self.KAPPA**2)
        v = mean[..., 0] + wide * rng.standard_normal((len(mean), n))
        gain = POSTERIOR_COV[0] / (POSTERIOR_COV[0, 0] + self.KAPPA**2)
        cov = POSTERIOR_COV - np.outer(gain, POSTERIOR_COV[0])
        centre = mean + (v - mean[..., 0])[..., None] * gain
        z = (centre + rng.standard_normal((len(mean), n, 2)) @ np.linalg.cholesky(cov).T).astype(np.float32)
        log_q = stats.norm.logpdf(v, mean[..., 0], wide) + stats.multivariate_normal(np.zeros(2), cov).logpdf(z - centre).reshape(v.shape)
        return z, log_q, self.log_kernel(v, z)

    def log_kernel(self, v, z):
        return stats.norm.logpdf(v, np.asarray(z[..., 0], float), self.KAPPA)


def test_a_joint_density_with_proxies_has_the_evidence_of_the_marginal():
    made = Posterior(PRIOR, SPEC, WithProxies(), {"certified": "yes"}).importance(BATCH, 20_000, log_likelihood=log_likelihood, seed=1)
    assert (np.abs(made.log_evidence - log_evidence(BATCH)) < 4 * made.log_evidence_error).all()
    np.testing.assert_allclose(made.efficiency, predicted(1.2, 1), rtol=0.02)

    class Forgetful(WithProxies):
        def log_kernel(self, v, z):
            return 0 * v

    with pytest.warns(Unreliable, match="for 3 of 3 observations"):
        wrong = Posterior(PRIOR, SPEC, Forgetful(), {"certified": "yes"}).importance(BATCH, 20_000, log_likelihood=log_likelihood, seed=1)
    assert (np.abs(wrong.log_evidence - log_evidence(BATCH)) > 5 * wrong.log_evidence_error).all(), "without the proxies' law it is not"


def test_pinning_a_joint_density_is_refused():
    with pytest.raises(SettingError, match="proxies of their pose, which cannot be moved to pinned values"):
        Posterior(PRIOR, SPEC, WithProxies(), {"certified": "yes"}).importance(X, 500, log_likelihood=log_likelihood, pinned={"a": 0.0})


# ---------------------------------------------------------------------------------------------------- mistakes


@pytest.mark.parametrize(("arguments", "told"), [
    ({}, "nothing to correct to: give the simulator"),
    ({"n": 50}, "at least 100"),
    ({"pinned": {"c": 1.0}}, "there is no parameter 'c'; there are a, b"),
    ({"pinned": {"a": 1.0, "b": 1.0}}, "none is left to draw"),
    ({"pinned": {"a": math.nan}}, "must be a number"),
    ({"prior": sp.Prior({"a": sp.Normal(0, 1)})}, "must be of the same parameters, a, b"),
    ({"prior": "flat"}, "prior must be a Prior"),
    ({"log_likelihood": lambda t, x: np.zeros((len(t), 1))}, r"shape \(100, 1\) for theta of shape \(100, 2\); expected \(100,\)"),
    ({"log_likelihood": lambda t, x: np.full(len(t), np.nan)}, "log_likelihood is nan for 100 of 100 draws, first at a = "),
    ({"log_likelihood": lambda t, x: np.full(len(t), -np.inf)}, "no draw has any density under the target: posterior and target do not overlap"),
    ({"log_likelihood": lambda t, x: t.nothing}, "log_likelihood raised AttributeError"),
])
def test_a_mistake_is_one_line(arguments, told):
    with pytest.raises((SettingError, PriorError, SimulatorError), match=told) as error:
        posterior().importance(X, **{"n": 100, **arguments})
    assert "\n" not in str(error.value)


def test_a_simulator_without_log_likelihood_or_of_another_problem_is_told(line_simulator):
    @sp.simulator(prior=PRIOR, x_shape=2, name="without")
    def without(theta, rng):
        return theta

    with pytest.raises(SimulatorError, match=r"'without' has no log_likelihood, .*give it one: @sp.simulator\(\.\.\., log_likelihood=f\)"):
        posterior().importance(X, 100, simulator=without)
    with pytest.raises(SimulatorError, match="other parameters or another shape of x"):
        posterior().importance(X, 100, simulator=line_simulator)


def test_pins_outside_the_prior_and_joint_priors_are_told():
    bounded = Posterior(sp.Prior({"a": sp.Uniform(0, 1), "b": sp.Normal(0, 1)}), SPEC, Gaussian(), {"certified": "yes"})
    with pytest.raises(PriorError, match="pinned: a = 2 lies outside the prior's support, 0 to 1"):
        bounded.importance(X, 100, pinned={"a": 2.0})
    joint = Posterior(sp.Prior.joint(["a", "b"], sp.MultivariateNormal([0, 0], COV)), SPEC, Gaussian(), {"certified": "yes"})
    with pytest.raises(SettingError, match="need a prior of independent parameters"):
        joint.importance(X, 100, pinned={"a": 2.0})


# ------------------------------------------------------------------------------------------------ runs and files


def line_log_likelihood(theta, x):
    z = (theta - [1.0, 0.0]) / [2.0, 1.0]
    return stats.norm(0, NOISE).logpdf(x - z).sum(-1)


def test_a_trained_run_is_carried_to_the_exact_posterior(line_run):
    x = np.array([1.5, -0.5])
    made = sp.load(line_run).importance(x, 20_000, log_likelihood=line_log_likelihood, seed=0)
    mean, sd = line_posterior(x)
    np.testing.assert_allclose(made.weights @ made.theta, mean, atol=5 * (sd / math.sqrt(made.ess)).max())
    np.testing.assert_allclose(np.sqrt(made.weights @ (made.theta - mean) ** 2), sd, rtol=0.05)
    wanted = stats.norm(0, math.sqrt(1 + NOISE**2)).logpdf(x).sum()
    assert made.log_evidence == pytest.approx(wanted, abs=4 * made.log_evidence_error)
    assert made.efficiency > 0.5
    assert made.facts["certified"] == "yes", "the draws are those that were certified; the weights carry them on"
    equal = made.resample(4000, seed=1)
    np.testing.assert_allclose(equal.mean(0), mean, atol=5 * sd.max() * math.sqrt(1 / made.ess + 1 / 4000))


def test_weights_go_into_files(tmp_path):
    import arviz
    import h5py

    made = posterior(1.2).importance(BATCH, 200, log_likelihood=log_likelihood, seed=1)
    one = posterior(1.2).importance(X, 200, log_likelihood=log_likelihood, seed=1)
    for name, weighted in (("batch", made), ("one", one)):
        for suffix in ("nc", "h5", "csv"):
            weighted.write(tmp_path / f"{name}.{suffix}")
    data = arviz.from_netcdf(tmp_path / "batch.nc")
    np.testing.assert_allclose(data.sample_stats.log_weight.values[0].T, made.log_weight)
    np.testing.assert_allclose(data.posterior.attrs["importance_efficiency"], made.efficiency)
    assert data.posterior.attrs["importance_evidence_of"] == "p(x)"
    assert json.loads(data.posterior.attrs["chain"]) == made.chain
    assert in_words(made.chain) == "Gaussian -> z; prior (reparametrisation) -> theta; log_likelihood and prior (target)"
    with h5py.File(tmp_path / "one.h5") as file:
        np.testing.assert_array_equal(file["log_weight"][:], one.log_weight)
        assert file.attrs["importance_k_hat"] == one.k_hat
    header = (tmp_path / "batch.csv").read_text().splitlines()[0]
    assert header == "observation,a,b,log_weight"
    np.testing.assert_allclose(np.loadtxt(tmp_path / "one.csv", delimiter=",", skiprows=1)[:, -1], one.log_weight)
    equal = made.to_arviz(resampled=50)
    assert equal.posterior["a"].shape == (1, 50, 3)
    assert not hasattr(equal, "sample_stats")


OWN = """
import numpy as np
import sbiplat as sp

def log_likelihood(theta, x):
    z = (theta - [1.0, 0.0]) / [2.0, 1.0]
    return -0.5 * (((x - z) / 0.5) ** 2).sum(-1) - 2 * np.log(0.5 * np.sqrt(2 * np.pi))

prior = sp.Prior({"slope": sp.Normal(1.0, 2.0), "offset": sp.Normal(0.0, 1.0)})

same = sp.Prior({"slope": sp.Normal(1.0, 2.0, unit="m/s"), "offset": sp.Normal(0.0, 1.0, unit="m")})
narrow = sp.Prior({"slope": sp.Normal(1.0, 1.0), "offset": sp.Normal(0.0, 1.0)})

@sp.simulator(prior=prior, x_shape=(2,), log_likelihood=log_likelihood)
def own(theta, rng):
    return (theta - [1.0, 0.0]) / [2.0, 1.0] + 0.5 * rng.standard_normal(2)

@sp.simulator(prior=prior, x_shape=(2,))
def without(theta, rng):
    return theta
"""


def sample(run, folder, *words):
    done = subprocess.run([sys.executable, "-m", "sbiplat", "sample", str(run.path), "--observation", str(folder / "x.npy"), "--n", "5000", *words],
                          capture_output=True, text=True, timeout=120, cwd=folder)
    return done.returncode, done.stdout, done.stderr


def test_the_command_writes_weights_and_says_what_they_are_worth(line_run, tmp_path):
    (tmp_path / "own.py").write_text(OWN)
    x = np.array([1.5, -0.5])
    np.save(tmp_path / "x.npy", x)
    code, out, err = sample(line_run, tmp_path, "--out", "draws.csv", "--importance", "--simulator", "own.py:own", "--json")
    assert code == 0, err
    told = json.loads(out)
    wanted = stats.norm(0, math.sqrt(1 + NOISE**2)).logpdf(x).sum()
    assert told["importance_log_evidence"] == pytest.approx(wanted, abs=5 * told["importance_log_evidence_error"])
    mean, sd = line_posterior(x)
    np.testing.assert_allclose(told["mean"], mean, atol=5 * (sd / math.sqrt(told["importance_ess"])).max())
    assert (tmp_path / "draws.csv").read_text().startswith("slope,offset,log_weight\n")
    code, out, err = sample(line_run, tmp_path, "--out", "draws.nc", "--importance", "--simulator", "own.py:own")
    assert (code, err) == (0, "")
    assert "importance: efficiency 0." in out
    assert "k-hat" in out
    assert "log of p(x) -" in out


def test_the_command_takes_pinned_parameters_and_another_prior(line_run, tmp_path):
    """Slope and offset are independent given x, so that a pinned offset leaves the slope as it was; under another prior it has a closed form."""
    (tmp_path / "own.py").write_text(OWN)
    x = np.array([1.5, -0.5])
    np.save(tmp_path / "x.npy", x)
    mean, sd = line_posterior(x)
    code, out, err = sample(line_run, tmp_path, "--out", "given.csv", "--pin", "offset=0.3", "--json")
    assert code == 0, err
    told = json.loads(out)
    assert told["mean"][1] == pytest.approx(0.3)
    assert told["mean"][0] == pytest.approx(mean[0], abs=0.1 * sd[0])
    assert told["sd"][0] == pytest.approx(sd[0], rel=0.15)
    code, out, err = sample(line_run, tmp_path, "--out", "other.csv", "--prior", "own.py:narrow", "--importance", "--simulator", "own.py:own", "--json")
    assert code == 0, err
    told = json.loads(out)
    z = (x[0] / NOISE**2) / (1 / 0.5**2 + 1 / NOISE**2)
    assert told["mean"][0] == pytest.approx(1 + 2 * z, abs=0.05)
    assert told["sd"][0] == pytest.approx(2 / math.sqrt(1 / 0.5**2 + 1 / NOISE**2), rel=0.1)


@pytest.mark.parametrize(("words", "told"), [
    (["--pin", "t0"], r"--pin 't0': expected key=value, such as --pin t0=0.1"),
    (["--pin", "slop=1"], r"pinned: there is no parameter 'slop'; there are slope, offset"),
    (["--pin", "slope=steep"], r"pinned: slope must be a number, got 'steep'"),
    (["--pin", "slope=1", "--pin", "slope=2"], r"--pin names a parameter twice"),
    (["--pin", "slope=1\noffset=2"], r"pinned: slope must be a number"),
    (["--pin", "slope=40"], r"pinned: slope = 40 lies where the prior has hardly any mass \(as 19.5 standard deviations"),
    (["--prior", "own.py:same"], r"the other prior is the posterior's own"),
    (["--prior", "narrow"], r"no prior is called 'narrow'; give file.py:object"),
    (["--prior", "own.py:narow"], r"'narow' in own.py does not exist; priors there: prior, same, narrow"),
    (["--importance"], r"no simulator is registered here as 'line'; name it: sbiplat sample .* --importance --simulator file.py:object"),
    (["--importance", "--simulator", "own.py:without"], "'without' has no log_likelihood"),
])
def test_the_commands_mistakes_are_one_line(line_run, tmp_path, words, told):
    (tmp_path / "own.py").write_text(OWN)
    np.save(tmp_path / "x.npy", np.zeros(2))
    code, _, err = sample(line_run, tmp_path, "--out", "draws.csv", *words)
    assert code == 2
    assert len(err.strip().splitlines()) == 1
    assert re.search(told, err), err
    assert not (tmp_path / "draws.csv").exists()
