"""Posteriors by likelihood: the sampler on laws that are known, and the whole way on a Gaussian: evidence, another prior, bad chains."""

import math

import numpy as np
import pytest
import torch
from conftest import NOISE, line_posterior
from scipy import stats

import sbiplat as sp
from sbiplat.bank.bank import Bank
from sbiplat.errors import ObservationError, PriorError, RunError, SettingError
from sbiplat.nets.standardise import Standardise
from sbiplat.observation import ObservationSpec
from sbiplat.posteriors import likelihood
from sbiplat.posteriors.annealing import Heights, Streams, anneal, move
from sbiplat.posteriors.convergence import effective_size, r_hat
from sbiplat.progress import silent

QUICK_NLE = {"flow": "gaussian", "max_epochs": 15, "batch_size": 128, "context_hidden": [32], "components": 2}


@pytest.fixture(scope="module")
def run(line_bank, tmp_path_factory):
    return sp.train(line_bank, "nle", out=tmp_path_factory.mktemp("nle") / "run", progress=silent, **QUICK_NLE)


@pytest.fixture(scope="module")
def posterior(run):
    return sp.load(run, allow_uncertified=True)


# ------------------------------------------------------------------------------------------------------- the sampler


class Between:
    """A path from N(loc, scale^2 I), which each population has for itself, to a law in closed form."""

    def __init__(self, log_density, loc, scale):
        self.log_density, self.loc, self.scale = log_density, loc, scale

    def draw(self, rows, n, streams):
        return self.loc[rows, None] + self.scale * streams.normal(rows, n, self.loc.shape[1])

    def heights(self, rows, z, power):
        with torch.enable_grad():
            z = z.detach().requires_grad_()
            base = (-0.5 * ((z - self.loc[rows, None]) / self.scale).square() - math.log(self.scale * math.sqrt(2 * math.pi))).sum(-1)
            target = self.log_density(z)
            slope = z if power is None else torch.autograd.grad((base + power[:, None] * (target - base)).sum(), z)[0]
        return Heights(base.detach().double(), target.detach().double(), slope.detach())


def annealed(log_density, loc, scale, populations=32, chains=64, moves=10):
    """The populations, and their draws at the last power, (populations, moves, chains, D)."""
    streams = Streams(range(populations), torch.device("cpu"))
    path, rows = Between(log_density, torch.as_tensor(loc).float().expand(populations, -1), scale), torch.arange(populations)
    made = anneal(path, streams, chains, moves, 3)
    return made, move(path, rows, made.states[:, -1], torch.ones(populations), made.step, made.factor, 2 * moves, 3, streams)[0].double().numpy()


def two_modes(z):
    """Weights 0.3 and 0.7 at (-6, -6) and (6, 6); the evidence is 5."""
    near = [math.log(5 * w / (2 * math.pi)) - 0.5 * (z - at).square().sum(-1) for w, at in ((0.3, -6), (0.7, 6))]
    return torch.logaddexp(*near)


def test_a_narrow_correlated_gaussian_is_found_from_afar_with_its_evidence():
    covariance = np.array([[0.01, 0.0099 * 2], [0.0099 * 2, 0.04]])
    law = torch.distributions.MultivariateNormal(torch.tensor([2.0, -3.0]), torch.as_tensor(covariance).float())
    made, draws = annealed(lambda z: law.log_prob(z) + 3.0, [[0.0, 0.0]], 3.0)
    assert made.powers.min() >= 3
    flat = draws.reshape(-1, 2)
    np.testing.assert_allclose(flat.mean(0), [2.0, -3.0], atol=0.01)
    np.testing.assert_allclose(np.cov(flat.T), covariance, rtol=0.05)
    log_z = made.log_evidence.numpy()
    assert log_z.mean() == pytest.approx(3.0, abs=4 * log_z.std() / math.sqrt(32) + log_z.var())
    assert log_z.std() < 0.5


def test_separate_modes_keep_their_weights():
    made, draws = annealed(two_modes, [[0.0, 0.0]], 6.0)
    upper = (draws[..., 0] > 0).mean((1, 2))
    assert upper.mean() == pytest.approx(0.7, abs=4 * upper.std() / math.sqrt(32))
    assert upper.std() < 0.1
    assert np.exp(made.log_evidence.numpy()).mean() == pytest.approx(5.0, rel=0.15)
    assert r_hat(draws[:4].reshape(1, 4, -1, 2).transpose(0, 2, 1, 3)).max() < 1.05


def test_trajectories_alone_would_keep_wrong_weights():
    """What the test above could see: chains that begin in equal shares, with jumps that are never taken, stay so."""
    rows, streams = torch.arange(32), Streams(range(32), torch.device("cpu"))
    side = torch.where(torch.arange(64) % 2 == 0, -6.0, 6.0)[None, :, None].expand(32, 64, 2)
    kept, *_ = move(Between(two_modes, torch.full((32, 2), 60.0), 1e-3), rows, side + 0.1 * streams.normal(rows, 64, 2), torch.ones(32),
                    torch.full((32,), 0.3).double(), torch.eye(2).expand(32, 2, 2), 20, 3, streams)
    assert (kept[..., 0] > 0).float().mean() == pytest.approx(0.5, abs=0.01)
    assert kept[:, -1, :32:2].std() == pytest.approx(1.0, abs=0.1), "they do move, within their mode"


def test_the_effective_size_of_an_autoregression():
    """A chain of lag-one autocorrelation rho has T (1 - rho) / (1 + rho) effective draws."""
    rng, rho, steps, chains = np.random.default_rng(0), 0.8, 2000, 20
    x = np.zeros((1, steps, chains, 1))
    x[:, 0] = rng.standard_normal((1, chains, 1))
    for t in range(1, steps):
        x[:, t] = rho * x[:, t - 1] + math.sqrt(1 - rho**2) * rng.standard_normal((1, chains, 1))
    assert effective_size(x)[0, 0] == pytest.approx(steps * chains * (1 - rho) / (1 + rho), rel=0.15)


def test_what_a_population_draws_does_not_depend_on_those_beside_it():
    both, one = Streams([5, 6], torch.device("cpu")), Streams([6], torch.device("cpu"))
    first, second = torch.arange(2), torch.arange(1)
    for _ in range(2):
        assert torch.equal(both.normal(first, 3, 2)[1:], one.normal(second, 3, 2))
        assert torch.equal(both.uniform(first, 4)[1:], one.uniform(second, 4))
        assert torch.equal(both.which(first, torch.ones(2, 5), 7)[1:], one.which(second, torch.ones(1, 5), 7))


# --------------------------------------------------------------------------------------------------- a whole posterior


def test_the_gaussian_posterior_is_found(posterior):
    for x in ([0.0, 0.0], [1.0, -1.5]):
        draws = posterior.sample(np.array(x), 4000, seed=0)
        mean, sd = line_posterior(x)
        np.testing.assert_allclose(draws.mean(0), mean, atol=0.15 * sd.max())
        np.testing.assert_allclose(draws.std(0), sd, rtol=0.12)
        assert abs(np.corrcoef(draws.T)[0, 1]) < 0.1
        theta = mean + sd * np.array([[0.0, 0.0], [1.0, 0.0], [0.0, -1.0]])
        np.testing.assert_allclose(posterior.log_prob(theta, np.array(x)), stats.norm(mean, sd).logpdf(theta).sum(1), atol=0.2)
    assert np.array_equal(posterior.sample(np.array([0.0, 0.0]), 50, seed=3), posterior.sample(np.array([0.0, 0.0]), 50, seed=3))
    assert len(np.unique(draws, axis=0)) > 0.98 * 4000, "draws are states of moving chains, hardly one of them twice"


@pytest.mark.parametrize("k", [1, 3])
def test_populations_begin_at_a_law_whose_density_is_known(run, k):
    """Of one observation and of a set, and where z is not at unit scale: the mean of N(z; m, 1) / r(z) over draws of r is 1."""
    estimator = run.estimator("cpu").eval()
    estimator.theta_loc.copy_(torch.tensor([1.0, -1.0]))
    estimator.theta_scale.copy_(torch.tensor([2.0, 0.5]))
    with torch.no_grad():
        path = likelihood._Path(estimator, 0.3 * torch.randn(2, k, 2, generator=torch.Generator().manual_seed(0)), lambda z: 0 * z[..., 0], 1)
        rows = torch.arange(2)
        z = path.draw(rows, 40_000, Streams([1, 2], torch.device("cpu")))
        base = path.heights(rows, z, None).base
    target = torch.distributions.Normal(estimator.unscaled(torch.zeros(2)), 0.3 * estimator.theta_scale).log_prob(z).sum(-1)
    weights = (target - base).exp()
    assert weights.mean(1).numpy() == pytest.approx(1.0, abs=5 * float(weights.std() / 200))
    assert weights.std() < 5


def test_the_evidence_is_that_of_the_marginal(posterior):
    x = np.array([[0.3, -0.8], [1.5, 0.2]])
    log_z, error = posterior.sampler.log_evidence({"x": x.astype(np.float32)})
    np.testing.assert_allclose(log_z, stats.norm(0, math.sqrt(1 + NOISE**2)).logpdf(x).sum(1), atol=0.1)
    assert error.max() < 0.1


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
    assert facts["r_hat_max"] < 1.05


def test_a_prior_that_cannot_be_changed_so_is_one_line(posterior, line_run, tmp_path):
    with pytest.raises(PriorError, match="same parameters, slope, offset"):
        posterior.with_prior(sp.Prior({"a": sp.Normal(0, 1)}))
    with pytest.raises(SettingError, match="train nle"):
        sp.load(line_run).with_prior(posterior.prior)


def test_the_gate_certifies_it(run):
    assert sp.gate(run, n=400, progress=silent).passed


def test_populations_that_lost_a_mode_are_refused(posterior, monkeypatch):
    """The power of the judgement: two of four populations begin, and stay, in one of two far modes."""
    def path(loc, scale):
        monkeypatch.setattr(likelihood, "_Path", lambda *_: Between(two_modes, torch.as_tensor(loc).float().expand(4, 2), scale))

    x = np.zeros(2)
    path([[0.0, 0.0]], 6.0)
    assert posterior.sample(x, 4000, seed=0).shape == (4000, 2)
    assert np.isfinite(posterior.log_prob(np.zeros(2), x))
    path([[-6.0, -6.0], [6.0, 6.0], [-6.0, -6.0], [6.0, 6.0]], 1.5)
    with pytest.raises(likelihood.ChainError, match=r"the populations disagree, r_hat [1-9][\d.]* is over 1.05; give more chains"):
        posterior.sample(x, 4000, seed=0)
    with pytest.raises(likelihood.ChainError, match=r"populations that give the evidence disagree, r_hat [1-9]"):
        posterior.log_prob(np.zeros(2), x)
    path([[-6.0, -6.0], [6.0, 6.0], [6.0, 6.0], [6.0, 6.0]], 1.5)
    with pytest.raises(likelihood.ChainError, match="populations disagree"):
        posterior.sample(x, 200, seed=0)
    path([[0.0, 0.0]], 6.0)
    monkeypatch.setattr(likelihood, "MOST_EVIDENCE_ERROR", 1e-9)
    with pytest.raises(likelihood.ChainError, match=r"standard error of the log-evidence, in nats, 0\.\d+ is over 1e-09"):
        posterior.log_prob(np.zeros(2), x)


# ------------------------------------------------------------------------------------------- independent observations


def of_many(x):
    """Mean and sd of theta given k observations of `line`, (k, 2), and their log-evidence."""
    k = len(x)
    precision = 1 + k / NOISE**2
    covariance = np.eye(k) * NOISE**2 + 1
    log_z = stats.multivariate_normal(np.zeros(k), covariance).logpdf(x.T).sum()
    return np.array([1.0, 0.0]) + np.array([2.0, 1.0]) * x.sum(0) / NOISE**2 / precision, np.array([2.0, 1.0]) / np.sqrt(precision), log_z


@pytest.fixture
def exact(posterior, monkeypatch):
    """The posterior with the likelihood that is known in place of the learnt one."""
    estimator = posterior.sampler.estimator
    loc, scale = estimator.standardise.loc_x, estimator.standardise.scale_x

    def log_likelihood(theta, values):
        return (-0.5 * ((values * scale + loc - theta) / NOISE).square() - math.log(NOISE * math.sqrt(2 * math.pi)) + scale.log()).sum(-1)

    monkeypatch.setattr(estimator, "log_likelihood", log_likelihood)
    return posterior


@pytest.mark.parametrize("k", [1, 5, 32])
def test_independent_observations_multiply_their_likelihoods(exact, k):
    rng = np.random.default_rng(k)
    x = rng.standard_normal((3, 1, 2)) + NOISE * rng.standard_normal((3, k, 2))
    many = exact.iid(k)
    draws = many.sample(x, 4000, seed=0)
    log_z, error = many.sampler.log_evidence({"x": x.astype(np.float32)})
    for b in range(3):
        mean, sd, evidence = of_many(x[b])
        np.testing.assert_allclose(draws[b].mean(0), mean, atol=0.1 * sd.max())
        np.testing.assert_allclose(draws[b].std(0), sd, rtol=0.06)
        assert log_z[b] == pytest.approx(evidence, abs=5 * max(error[b], 0.02))
        theta = mean + sd * np.array([[0.0, 0.0], [1.0, -1.0]])
        np.testing.assert_allclose(many.log_prob(theta, x[b]), stats.norm(mean, sd).logpdf(theta).sum(1), atol=5 * max(error[b], 0.02))
    assert error.max() < 0.15


def test_the_learnt_likelihood_of_five_observations_is_near_the_known_posterior(posterior):
    x = np.array([0.6, -0.9]) + NOISE * np.random.default_rng(0).standard_normal((5, 2))
    mean, sd, _ = of_many(x)
    draws = posterior.iid(5).sample(x, 4000, seed=0)
    np.testing.assert_allclose(draws.mean(0), mean, atol=0.4 * sd.max())
    np.testing.assert_allclose(draws.std(0), sd, rtol=0.15)


def test_one_set_of_observations_is_no_batch(posterior):
    x = np.zeros((5, 2))
    assert posterior.sample(x, 20, seed=0).shape == (5, 20, 2)
    many = posterior.iid(5)
    assert many.x.shapes == {"x": (5, 2)}
    assert many.sample(x, 20, seed=0).shape == (20, 2)
    assert many.sample(x[None].repeat(3, 0), 20, seed=0).shape == (3, 20, 2)
    assert many.log_prob(np.zeros((3, 2)), x[None].repeat(3, 0)).shape == (3,)
    for wrong in (x[0], x[:4], np.zeros((3, 4, 2))):
        with pytest.raises(ObservationError, match=r"declared is \(.*5, 2\)|expected \(5, 2\)"):
            many.sample(wrong, 20)
    facts = many.to_arviz(x, 20, seed=0).posterior.attrs
    assert facts["certified"] == "no"
    assert facts["refusal"] == "the gate tested single observations"


def test_a_changed_prior_and_a_set_of_observations_go_together(exact):
    """Under slope ~ N(2, 0.5), in either order."""
    x = np.array([[1.0, -1.5], [0.4, -0.9], [0.7, -1.2]])
    other = sp.Prior({"slope": sp.Normal(2.0, 0.5, unit="m/s"), "offset": sp.Normal(0.0, 1.0, unit="m")})
    precision = np.array([1 / 0.25 + 3 / (2 * NOISE) ** 2, 1 + 3 / NOISE**2])
    mean = np.array([2 / 0.25 + (3 + 2 * x[:, 0].sum()) / (2 * NOISE) ** 2, x[:, 1].sum() / NOISE**2]) / precision
    for changed in (exact.iid(3).with_prior(other), exact.with_prior(other).iid(3)):
        draws = changed.sample(x, 4000, seed=0)
        np.testing.assert_allclose(draws.mean(0), mean, atol=0.1 * precision.min() ** -0.5)
        np.testing.assert_allclose(draws.std(0), precision**-0.5, rtol=0.06)


def test_sets_that_cannot_be_are_one_line(posterior, line_run):
    with pytest.raises(SettingError, match="cannot join independent ones; train nle or nre"):
        sp.load(line_run).iid(3)
    for k in (0, 2.0, True, "3"):
        with pytest.raises(SettingError, match="whole number of at least 1"):
            posterior.iid(k)
    with pytest.raises(SettingError, match=r"already that of 3 independent"):
        posterior.iid(3).iid(2)


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
    with pytest.raises(likelihood.ChainError, match="no draw of the proposal"):
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
