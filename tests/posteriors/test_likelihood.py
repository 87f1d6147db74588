"""Posteriors by likelihood: the sampler on laws that are known, and the whole way on a Gaussian: evidence, another prior, bad chains."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import NOISE, line_posterior
from scipy import stats

import sbiplat as sp
from sbiplat.bank.bank import Bank
from sbiplat.errors import PriorError, RunError, SettingError
from sbiplat.nets.standardise import Standardise
from sbiplat.observation import ObservationSpec
from sbiplat.posteriors import likelihood
from sbiplat.posteriors.chains import effective_size, ensemble_slice, pareto_k, r_hat
from sbiplat.progress import silent

QUICK_NLE = {"flow": "gaussian", "max_epochs": 15, "batch_size": 128, "context_hidden": [32], "components": 2}


@pytest.fixture(scope="module")
def run(line_bank, tmp_path_factory):
    return sp.train(line_bank, "nle", out=tmp_path_factory.mktemp("nle") / "run", progress=silent, **QUICK_NLE)


@pytest.fixture(scope="module")
def posterior(run):
    return sp.load(run, allow_uncertified=True)


# ------------------------------------------------------------------------------------------------------- the sampler


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def test_chains_follow_a_narrow_correlated_gaussian():
    covariance = torch.tensor([[1.0, 0.995 * 20], [0.995 * 20, 400.0]])
    law = torch.distributions.MultivariateNormal(torch.tensor([3.0, -50.0]), covariance)
    start = torch.randn(2, 40, 2, generator=generator())
    draws = ensemble_slice(lambda z, owner: law.log_prob(z), start, 600, generator(1))[:, 200:].double().numpy()
    assert r_hat(draws).max() < 1.05
    flat = draws.reshape(-1, 2)
    assert np.all(np.abs(flat.mean(0) - [3.0, -50.0]) < 4 * np.sqrt([1, 400] / effective_size(draws).min()))
    np.testing.assert_allclose(np.cov(flat.T), covariance, rtol=0.1)


def two_modes(z, owner):
    return torch.logaddexp(math.log(0.2) - 0.5 * ((z + 8) ** 2).sum(-1), math.log(0.8) - 0.5 * ((z - 8) ** 2).sum(-1))


class Wide:
    """A proposal that reaches both modes."""

    def __init__(self):
        self.generator = generator(5)

    def draw(self, n):
        return 10 * torch.randn(1, n, 1, generator=self.generator)

    def log_prob(self, z):
        return -0.5 * (z / 10).square().sum(-1)


def test_jumps_from_a_proposal_find_the_weights_of_far_modes_and_chains_without_are_seen():
    start = torch.cat([torch.full((1, 20, 1), -8.0), torch.full((1, 20, 1), 8.0)], 1) + 0.1 * torch.randn(1, 40, 1, generator=generator())
    start = start[:, torch.randperm(40, generator=generator())]
    jumping = ensemble_slice(two_modes, start, 400, generator(1), Wide())[:, 100:].double().numpy()
    assert r_hat(jumping).max() < 1.05
    assert (jumping < 0).mean() == pytest.approx(0.2, abs=0.05)
    apart = torch.full((1, 20, 1), -8.0) + 0.1 * torch.randn(1, 20, 1, generator=generator())
    other = torch.full((1, 20, 1), 8.0) + 0.1 * torch.randn(1, 20, 1, generator=generator())
    stuck = np.concatenate([ensemble_slice(two_modes, s, 100, generator(1)).double().numpy() for s in (apart, other)], axis=2)
    assert r_hat(stuck).max() > 1.5


def test_the_effective_size_of_an_autoregression():
    """A chain of lag-one autocorrelation rho has T (1 - rho) / (1 + rho) effective draws."""
    rng, rho, steps, chains = np.random.default_rng(0), 0.8, 2000, 20
    x = np.zeros((1, steps, chains, 1))
    x[:, 0] = rng.standard_normal((1, chains, 1))
    for t in range(1, steps):
        x[:, t] = rho * x[:, t - 1] + math.sqrt(1 - rho**2) * rng.standard_normal((1, chains, 1))
    assert effective_size(x)[0, 0] == pytest.approx(steps * chains * (1 - rho) / (1 + rho), rel=0.15)


def test_k_hat_tells_a_proposal_that_is_too_narrow():
    rng = np.random.default_rng(0)
    z = rng.standard_normal(4000)
    assert pareto_k(stats.norm(0, 0.9).logpdf(z) - stats.norm.logpdf(z)) < 0.5
    assert pareto_k(stats.norm(0, 3.0).logpdf(z) - stats.norm.logpdf(z)) > 0.7


# --------------------------------------------------------------------------------------------------- a whole posterior


@pytest.mark.parametrize("sampler", ["auto", "slice", "importance"])
def test_the_gaussian_posterior_is_found(sampler, run):
    posterior = sp.load(run, allow_uncertified=True)
    posterior.sampler.estimator.settings = replace(posterior.sampler.estimator.settings, sampler=sampler)
    for x in ([0.0, 0.0], [1.0, -1.5]):
        draws = posterior.sample(np.array(x), 4000, seed=0)
        mean, sd = line_posterior(x)
        np.testing.assert_allclose(draws.mean(0), mean, atol=0.15 * sd.max())
        np.testing.assert_allclose(draws.std(0), sd, rtol=0.12)
        theta = mean + sd * np.array([[0.0, 0.0], [1.0, 0.0], [0.0, -1.0]])
        np.testing.assert_allclose(posterior.log_prob(theta, np.array(x)), stats.norm(mean, sd).logpdf(theta).sum(1), atol=0.2)
    assert np.array_equal(posterior.sample(np.array([0.0, 0.0]), 50, seed=3), posterior.sample(np.array([0.0, 0.0]), 50, seed=3))


def test_the_evidence_is_that_of_the_marginal(posterior):
    x = np.array([[0.3, -0.8], [1.5, 0.2]])
    log_z, k_hat = posterior.sampler.log_evidence({"x": x.astype(np.float32)})
    np.testing.assert_allclose(log_z, stats.norm(0, math.sqrt(1 + NOISE**2)).logpdf(x).sum(1), atol=0.1)
    assert k_hat.max() < 0.7


def test_the_prior_may_be_changed(posterior):
    """Under slope ~ N(2, 0.5) the posterior of a Gaussian likelihood is Gaussian again."""
    x = np.array([1.0, -1.5])
    other = sp.Prior({"slope": sp.Normal(2.0, 0.5, unit="m/s"), "offset": sp.Normal(0.0, 1.0, unit="m")})
    changed = posterior.with_prior(other)
    draws = changed.sample(x, 4000, seed=0)
    precision = np.array([1 / 0.25 + 1 / (2 * NOISE) ** 2, 1 + 1 / NOISE**2])
    mean = np.array([(2 / 0.25 + (1 + 2 * x[0]) / (2 * NOISE) ** 2), x[1] / NOISE**2]) / precision
    np.testing.assert_allclose(draws.mean(0), mean, atol=0.1)
    np.testing.assert_allclose(draws.std(0), precision**-0.5, rtol=0.12)
    theta = mean + np.array([[0.0, 0.0], [0.3, -0.3]])
    np.testing.assert_allclose(changed.log_prob(theta, x), stats.norm(mean, precision**-0.5).logpdf(theta).sum(1), atol=0.2)
    facts = changed.to_arviz(x, 40, seed=0).posterior.attrs
    assert facts["certified"] == "no"
    assert max(facts.get("r_hat_max", 1.0), facts.get("k_hat_max", 0.0)) < 1.1


def test_a_prior_that_cannot_be_changed_so_is_one_line(posterior, line_run, tmp_path):
    with pytest.raises(PriorError, match="same parameters, slope, offset"):
        posterior.with_prior(sp.Prior({"a": sp.Normal(0, 1)}))
    with pytest.raises(SettingError, match="train nle"):
        sp.load(line_run).with_prior(posterior.prior)


def test_the_gate_certifies_it(run):
    assert sp.gate(run, progress=silent).passed


def test_bad_draws_are_refused(run, monkeypatch):
    posterior = sp.load(run, allow_uncertified=True)
    settings = posterior.sampler.estimator.settings
    monkeypatch.setattr(likelihood, "MOST_R_HAT", 0.9)
    posterior.sampler.estimator.settings = replace(settings, sampler="slice")
    with pytest.raises(likelihood.ChainError, match=r"r_hat 1.* is over 0.9; give more warmup"):
        posterior.sample(np.zeros(2), 100, seed=0)
    with pytest.raises(likelihood.ChainError, match="in 3 of 3 observations"):
        posterior.sample(np.zeros((3, 2)), 100, seed=0)
    monkeypatch.setattr(likelihood, "MOST_K_HAT", -9.0)
    posterior.sampler.estimator.settings = replace(settings, sampler="importance")
    with pytest.raises(likelihood.ChainError, match=r"k_hat .* is over -9; use sampler = 'slice'"):
        posterior.sample(np.zeros(2), 100, seed=0)


def test_auto_takes_chains_where_importance_cannot_be_trusted(run, monkeypatch):
    posterior = sp.load(run, allow_uncertified=True)
    posterior.sample(np.zeros((3, 2)), 500, seed=0)
    assert posterior.sampler.diagnostics["by_chains"] == 0
    monkeypatch.setattr(likelihood, "MOST_K_HAT", -9.0)
    draws = posterior.sample(np.zeros((3, 2)), 500, seed=0)
    assert posterior.sampler.diagnostics["by_chains"] == 3
    np.testing.assert_allclose(draws.std(1), np.tile(line_posterior([0, 0])[1], (3, 1)), rtol=0.2)


# ------------------------------------------------------------------------------------------------------- awkward data


def test_the_jacobian_of_standardisation_is_autograds():
    spec = ObservationSpec.declare({"a": (3,), "b": (2,)}, "float64", {"a": "log", "b": "asinh"})
    made = Standardise(spec)
    rng = np.random.default_rng(0)
    x = {"a": torch.as_tensor(rng.lognormal(0, 3, (50, 3))), "b": torch.as_tensor(rng.standard_cauchy((50, 2)))}
    made.fit(x)
    far = {k: (v[:5] * 50).requires_grad_() for k, v in x.items()}
    out, slopes = made(far), made.log_slopes(far)
    for name in x:
        slope = torch.autograd.grad(out[name].sum(), far[name])[0]
        np.testing.assert_allclose(slopes[name].detach(), slope.abs().log(), rtol=1e-5, atol=1e-5)


@sp.simulator(prior=sp.Prior({"rate": sp.LogUniform(1.0, 20.0)}), x_shape=(4,), batched=True)
def counts(theta, rng):
    """Three counts and a constant."""
    return np.concatenate([rng.poisson(theta, (len(theta), 3)), np.full((len(theta), 1), 7.0)], axis=1)


def test_counts_and_constants_are_modelled(tmp_path):
    bank = sp.simulate(counts, 8000, 1, tmp_path / "b", workers=1, progress=silent)
    run = sp.train(bank, "nle", out=tmp_path / "run", progress=silent, **{**QUICK_NLE, "flow": "nsf", "transforms": 1})
    draws = sp.load(run, allow_uncertified=True).sample(np.array([6.0, 9.0, 7.0, 7.0]), 2000, seed=0)[:, 0]
    exact = stats.gamma(22, scale=1 / 3)  # a prior of 1 / rate
    assert draws.mean() == pytest.approx(exact.mean(), rel=0.08)
    assert draws.std() == pytest.approx(exact.std(), rel=0.2)


def test_failed_rows_that_would_bias_it_are_refused(tmp_path):
    @sp.simulator(prior=sp.Prior({"a": sp.Uniform(0, 1)}), x_shape=(2,), batched=True)
    def fails(theta, rng):
        x = theta + rng.standard_normal((len(theta), 2))
        x[theta[:, 0] < 0.1] = np.nan
        return x

    bank = sp.simulate(fails, 1000, 1, tmp_path / "b", workers=1, progress=silent)
    with pytest.raises(RunError, match=r"failed, and nle may leave out at most 1.00%"):
        sp.train(bank, "nle", out=tmp_path / "run", progress=silent, **QUICK_NLE)
    assert not (tmp_path / "run" / "run.json").exists()
    assert Bank.open(tmp_path / "b").rows == 1000


def test_an_image_is_too_much(tmp_path):
    @sp.simulator(prior=sp.Prior({"a": sp.Normal(0, 1)}), x_shape=(30, 30), batched=True)
    def image(theta, rng):
        return theta[:, :, None] + rng.standard_normal((len(theta), 30, 30))

    bank = sp.simulate(image, 1000, 1, tmp_path / "b", workers=1, progress=silent)
    with pytest.raises(SettingError, match="900 numbers"):
        sp.train(bank, "nle", out=tmp_path / "run", progress=silent, **QUICK_NLE)


def test_a_density_whose_evidence_cannot_be_trusted_is_refused(posterior):
    x = np.array([1.0, -1.5])
    narrow = sp.Prior({"slope": sp.TruncatedNormal(20.0, 0.001, low=19.0, high=21.0), "offset": sp.Normal(0.0, 1.0)})
    with pytest.raises(likelihood.ChainError, match=r"no draw of the proposal|k_hat"):
        posterior.with_prior(narrow).log_prob(np.array([20.0, 0.0]), x)
    half = posterior.with_prior(sp.Prior({"slope": sp.TruncatedNormal(1.0, 2.0, low=1.0), "offset": sp.Normal(0.0, 1.0)}))
    assert half.log_prob(np.array([0.5, -1.0]), x) == -np.inf
    grid = np.stack(np.meshgrid(np.linspace(1, 7, 121), np.linspace(-4, 2, 121), indexing="ij"), -1).reshape(-1, 2)
    assert np.exp(half.log_prob(grid, x)).sum() * 0.05**2 == pytest.approx(1, abs=0.05)


def test_a_density_does_not_depend_on_its_neighbours_in_a_batch(posterior):
    rng = np.random.default_rng(0)
    x, theta = rng.standard_normal((3, 2)), rng.standard_normal((3, 2))
    one_by_one = [float(posterior.log_prob(t, o)) for t, o in zip(theta, x, strict=True)]
    np.testing.assert_allclose(posterior.log_prob(theta, x), one_by_one, atol=1e-4)
