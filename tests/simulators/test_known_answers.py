"""The shipped benchmark simulators against what is known of them: closed forms, independent computation, sbibm's figures."""

import subprocess
import sys

import numpy as np
import pytest
from scipy import integrate, stats
from scipy.special import expit

from sbiplat.errors import ObservationError
from sbiplat.simulator import check, resolve
from simulators import bernoulli_glm, gaussian_linear, gaussian_linear_uniform, gaussian_mixture, lotka_volterra, sir, slcp, two_moons

NAMES = ("two_moons", "gaussian_linear", "gaussian_linear_uniform", "gaussian_mixture", "slcp", "sir", "bernoulli_glm", "lotka_volterra")

# Nothing cut; cut where theta_1 + theta_2 changes sign; 4/5 cut by two edges of the prior.
MOONS = {"whole": np.array([-0.64, 0.16]), "touching": np.array([0.30, 0.60]), "cornered": np.array([-1.06, 0.02])}
CELLS = (2000, 1850)  # unequal, so that the crescents' tips, which lie at 45 degrees, do not run along the grid's diagonals


@pytest.fixture
def rng():
    return np.random.default_rng(20210223)


def within_error(values, expected, errors=4.5):
    """Whether the means of the columns of values lie within so many standard errors of what is expected."""
    values = np.asarray(values)
    return np.all(np.abs(values.mean(0) - expected) <= errors * values.std(0) / np.sqrt(len(values)))


@pytest.mark.parametrize("name", NAMES)
def test_each_keeps_its_contract_and_every_row_is_finite(name):
    result = check(resolve(name))
    assert result.finite == 1
    assert result.raised == 0


def test_simulating_imports_no_torch():
    modules = ", ".join(f"simulators.{name}" for name in NAMES)
    subprocess.run([sys.executable, "-c", f"import sys, {modules}; sys.exit('torch' in sys.modules)"], check=True)


# ------------------------------------------------------------------------------------------------------- two moons


def test_two_moons_x_has_the_papers_moments(rng):
    """cos a has the mean 2 / pi, cos^2 a and sin^2 a have 1/2, and r^2 has 0.1^2 + 0.01^2."""
    t1, t2 = theta = np.array([-0.5, 0.3])
    x = two_moons.two_moons(np.tile(theta, (20_000, 1)), rng)
    p = x - np.array([-abs(t1 + t2), t2 - t1]) / np.sqrt(2) - [0.25, 0]
    assert within_error(p, [0.2 / np.pi, 0])
    assert within_error(p**2, 0.0101 / 2)


def log_prob_on_grid(x):
    """log p(theta | x) at the centres of CELLS cells of the prior's square, and the area of a cell."""
    first, second = ((np.arange(n) + 0.5) * 2 / n - 1 for n in CELLS)
    theta = np.stack(np.meshgrid(first, second, indexing="ij"), axis=-1).reshape(-1, 2)
    return two_moons.posterior_log_prob(theta, x).reshape(CELLS), 4 / np.prod(CELLS)


def histogram_p_value(draws, x, bins=50):
    """Of the chi-square test of draws against the exact posterior's mass in bins x bins squares; the rare ones count as one."""
    log_prob, _ = log_prob_on_grid(x)
    mass = np.exp(log_prob).reshape(bins, CELLS[0] // bins, bins, CELLS[1] // bins).sum((1, 3)).ravel()
    expected = mass / mass.sum() * len(draws)
    observed = np.histogram2d(*draws.T, bins=bins, range=[(-1, 1)] * 2)[0].ravel()
    square = np.where(expected >= 10, np.arange(bins**2), bins**2)
    expected, observed = np.bincount(square, expected), np.bincount(square, observed)
    return stats.chi2.sf(np.sum((observed - expected)[expected > 0] ** 2 / expected[expected > 0]), np.sum(expected > 0) - 1)


@pytest.mark.parametrize("x", MOONS.values(), ids=MOONS)
def test_two_moons_posterior_integrates_to_one(x):
    log_prob, area = log_prob_on_grid(x)
    assert np.exp(log_prob).sum() * area == pytest.approx(1, abs=1e-4)  # the error of the grid and of the quadrature


@pytest.mark.parametrize("x", MOONS.values(), ids=MOONS)
def test_two_moons_posterior_is_likelihood_times_prior(x, rng):
    theta = two_moons.prior.sample(rng, 1000)
    rest = two_moons.posterior_log_prob(theta, x) - two_moons.log_likelihood(theta, x) - two_moons.prior.log_prob(theta)
    assert np.ptp(rest) < 1e-9 * np.abs(two_moons.log_likelihood(theta, x)).max()


def test_two_moons_posterior_vanishes_outside_the_prior():
    outside = np.array([[1.01, 0.0], [0.0, -1.01]])
    assert np.all(two_moons.posterior_log_prob(outside, MOONS["whole"]) == -np.inf)


@pytest.mark.parametrize("x", MOONS.values(), ids=MOONS)
def test_two_moons_draws_follow_the_density(x, rng):
    draws = two_moons.posterior_sampler(x, 20_000, rng)
    log_prob, area = log_prob_on_grid(x)
    minus_entropy = np.sum(np.exp(log_prob) * log_prob) * area
    assert draws.shape == (20_000, 2)
    assert within_error(two_moons.posterior_log_prob(draws, x), minus_entropy)
    assert histogram_p_value(draws, x) > 1e-3


def test_the_histogram_sees_a_lost_mode_and_a_shift_of_a_tenth_of_the_crescent(rng):
    x = MOONS["whole"]
    draws = two_moons.posterior_sampler(x, 20_000, rng)
    assert histogram_p_value(np.where(draws.sum(1, keepdims=True) > 0, draws, -draws[:, ::-1]), x) < 1e-6
    assert histogram_p_value(draws + 0.01, x) < 1e-6


def test_two_moons_posterior_is_as_sharp_as_sbibm_finds(rng):
    """E[log p(theta | x)] over the joint is 3.800 +- 0.013 nats in sbibm."""
    theta = two_moons.prior.sample(rng, 4000)
    x = two_moons.two_moons(theta, rng)
    values = [two_moons.posterior_log_prob(t[None], row)[0] for t, row in zip(theta, x, strict=True)]
    assert np.mean(values) == pytest.approx(3.800, abs=4 * np.hypot(0.013, np.std(values) / np.sqrt(len(values))))


def test_two_moons_refuses_an_x_that_no_theta_gives(rng):
    with pytest.raises(ObservationError, match="no theta"):
        two_moons.posterior_sampler(np.array([3.0, 0.0]), 10, rng)


# ------------------------------------------------------------------------------------------------- gaussian linear


def test_gaussian_linear_noise_has_variance_a_tenth(rng):
    theta = rng.standard_normal(10)
    residual = gaussian_linear.gaussian_linear(np.tile(theta, (20_000, 1)), rng) - theta
    assert within_error(residual, 0)
    assert within_error(np.einsum("ni,nj->nij", residual, residual), 0.1 * np.eye(10))


def test_gaussian_linear_densities_are_scipys(rng):
    x, theta = rng.standard_normal(10), 0.3 * rng.standard_normal((50, 10))
    likelihood = stats.multivariate_normal(x, 0.1 * np.eye(10)).logpdf(theta)
    posterior = stats.multivariate_normal(x / 2, 0.05 * np.eye(10)).logpdf(theta)
    np.testing.assert_allclose(gaussian_linear.log_likelihood(theta, x), likelihood, rtol=1e-12)
    np.testing.assert_allclose(gaussian_linear.posterior_log_prob(theta, x), posterior, rtol=1e-12)


def test_gaussian_linear_obeys_bayes_with_its_exact_evidence(rng):
    x, theta = rng.standard_normal(10), 0.3 * rng.standard_normal((50, 10))
    joint = gaussian_linear.log_likelihood(theta, x) + gaussian_linear.gaussian_linear.prior.log_prob(theta)
    evidence = stats.multivariate_normal(np.zeros(10), 0.2 * np.eye(10)).logpdf(x)
    np.testing.assert_allclose(gaussian_linear.posterior_log_prob(theta, x), joint - evidence, rtol=1e-11)


def test_gaussian_linear_draws_have_the_closed_forms_moments(rng):
    x = rng.standard_normal(10)
    residual = (gaussian_linear.posterior_sampler(x, 20_000, rng) - x / 2) / np.sqrt(0.05)
    assert within_error(residual, 0)
    assert within_error(np.einsum("ni,nj->nij", residual, residual), np.eye(10))


# ------------------------------------------------------------------------------------------------------------ slcp

SLCP_THETA = np.array([[0.7, -2.9, -1.0, -0.9, 0.6], [-1.0, 2.0, 2.5, 0.1, -2.5], [0.0, 0.0, 0.0, 1.0, 1.0]])


def slcp_gaussian(theta):
    s1, s2, correlation = theta[2] ** 2, theta[3] ** 2, np.tanh(theta[4])
    covariance = [[s1**2 + 1e-6, correlation * s1 * s2], [correlation * s1 * s2, s2**2 + 1e-6]]
    return stats.multivariate_normal(theta[:2], covariance)


def test_slcp_likelihood_is_four_gaussians(rng):
    theta = np.concatenate([SLCP_THETA, slcp.slcp.prior.sample(rng, 50)])
    for x in slcp.slcp(theta[:10], rng):
        expected = [slcp_gaussian(t).logpdf(x.reshape(4, 2)).sum() for t in theta]
        np.testing.assert_allclose(slcp.log_likelihood(theta, x), expected, rtol=1e-8)


@pytest.mark.parametrize("theta", SLCP_THETA)
def test_slcp_points_have_the_gaussians_moments_and_are_independent(theta, rng):
    law = slcp_gaussian(theta)
    residual = slcp.slcp(np.tile(theta, (20_000, 1)), rng) - np.tile(law.mean, 4)
    assert within_error(residual, 0)
    assert within_error(np.einsum("ni,nj->nij", residual, residual), np.kron(np.eye(4), law.cov))


def test_slcp_cannot_tell_the_signs_of_theta_3_and_theta_4(rng):
    theta = slcp.slcp.prior.sample(rng, 20)
    x = slcp.slcp(theta[:1], rng)[0]
    np.testing.assert_array_equal(slcp.log_likelihood(theta * [1, 1, -1, -1, 1], x), slcp.log_likelihood(theta, x))


# ------------------------------------------------------------------------------------------------------------- sir

SIR_EXTREMES = np.array([[0.05, 0.2], [0.4, 0.125], [1.0, 0.08], [2.5, 0.125], [5.0, 0.1]])


def sir_log_share_by_dop853(theta):
    beta, gamma = theta

    def slope(t, y):
        return [-beta * np.exp(y[1]), beta * np.exp(y[0]) - gamma]

    start = [np.log1p(-1e-6), np.log(1e-6)]
    return integrate.solve_ivp(slope, (0, 153), start, "DOP853", t_eval=17.0 * np.arange(10), rtol=1e-13, atol=1e-13).y[1]


def test_sir_is_surveyed_on_the_days_of_the_benchmark():
    name, days = sir.sir.x.axis
    assert name == "day"
    assert days == (0, 17, 34, 51, 68, 85, 102, 119, 136, 153)


def test_sir_integrator_agrees_with_dop853(rng):
    theta = np.concatenate([SIR_EXTREMES, sir.sir.prior.sample(rng, 20)])
    expected = np.stack([sir_log_share_by_dop853(t) for t in theta])
    np.testing.assert_allclose(np.exp(sir.log_infected_share(theta)), np.exp(expected), rtol=2e-8)


def test_sir_row_does_not_depend_on_the_rows_beside_it():
    np.testing.assert_array_equal(sir.log_infected_share(SIR_EXTREMES)[2], sir.log_infected_share(SIR_EXTREMES[2:3])[0])


def test_sir_likelihood_is_ten_binomials():
    x = np.array([0, 1, 352, 40, 3, 0, 0, 0, 0, 0])
    expected = [stats.binom(1000, np.exp(sir_log_share_by_dop853(t))).logpmf(x).sum() for t in SIR_EXTREMES]
    np.testing.assert_allclose(sir.log_likelihood(SIR_EXTREMES, x), expected, rtol=1e-7)


def test_sir_counts_have_the_binomials_moments(rng):
    share = np.exp(sir_log_share_by_dop853(SIR_EXTREMES[1]))
    often = share > 1e-3  # elsewhere the counts are too rare for a Gaussian error
    residual = (sir.sir(np.tile(SIR_EXTREMES[1], (4000, 1)), rng) - 1000 * share)[:, often]
    assert often.sum() >= 4
    assert within_error(residual, 0)
    assert within_error(residual**2, (1000 * share * (1 - share))[often])


# --------------------------------------------------------------------------------------------------- bernoulli glm


def test_glm_current_is_the_benchmarks():
    """stimulus_I.pt of sbibm begins and ends so; its 9 delays and a column of ones are the design matrix."""
    current = bernoulli_glm.V[:, 1]
    np.testing.assert_array_equal(current[[0, 1, 2, -1]], np.float32([0.49671414, -0.1382643, 0.64768857, -0.23458713]))
    np.testing.assert_array_equal(bernoulli_glm.V[:, 0], 1)
    np.testing.assert_array_equal(bernoulli_glm.V[8:, 9], current[:-8])
    np.testing.assert_array_equal(bernoulli_glm.V[:8, 9], 0)


def test_glm_prior_is_the_benchmarks(rng):
    """F as the paper writes it, entry by entry; the offset has variance 2."""
    smoothing = np.zeros((9, 9))
    for i in range(9):
        smoothing[i, i] = 1 + np.sqrt(i / 9)
        if i >= 1:
            smoothing[i, i - 1] = -2
        if i >= 2:
            smoothing[i, i - 2] = 1
    theta = rng.standard_normal((20, 10))
    of_filter = stats.norm().logpdf(theta[:, 1:] @ smoothing.T).sum(1) + np.log(np.diag(smoothing)).sum()
    expected = stats.norm(0, np.sqrt(2)).logpdf(theta[:, 0]) + of_filter
    np.testing.assert_allclose(bernoulli_glm.bernoulli_glm.prior.log_prob(theta), expected, rtol=1e-8)


def test_glm_likelihood_of_the_statistics_is_that_of_the_spikes(rng):
    theta, current = bernoulli_glm.bernoulli_glm.prior.sample(rng, 30), bernoulli_glm.V[:, 1]
    spikes = rng.random(100) < 0.5
    x = np.array([spikes.sum(), *(spikes[lag:] @ current[: 100 - lag] for lag in range(9))])
    filtered = np.stack([t[0] + np.convolve(current, t[1:])[:100] for t in theta])
    expected = stats.bernoulli(expit(filtered)).logpmf(spikes).sum(1)
    np.testing.assert_allclose(bernoulli_glm.log_likelihood(theta, x), expected, rtol=1e-9)


def test_glm_statistics_have_the_exponential_familys_moments(rng):
    """The first two derivatives of the log-likelihood's normaliser."""
    theta = bernoulli_glm.bernoulli_glm.prior.sample(rng)
    rate = expit(bernoulli_glm.V @ theta)
    residual = bernoulli_glm.bernoulli_glm(np.tile(theta, (20_000, 1)), rng) - bernoulli_glm.V.T @ rate
    assert within_error(residual, 0)
    expected = bernoulli_glm.V.T @ (rate * (1 - rate) * bernoulli_glm.V.T).T
    assert within_error(np.einsum("ni,nj->nij", residual, residual), expected)


# ------------------------------------------------------------------------------- gaussian linear uniform, gaussian mixture


@pytest.mark.parametrize("x", [np.linspace(-0.9, 0.9, 10), np.full(10, 1.8), np.linspace(-2.5, 0, 10)], ids=["inside", "beyond", "both"])
def test_gaussian_linear_uniform_is_a_cut_gaussian(x, rng):
    draws = gaussian_linear_uniform.posterior_sampler(x, 20_000, rng)
    scale = gaussian_linear_uniform.SCALE
    law = stats.truncnorm((-1 - x) / scale, (1 - x) / scale, loc=x, scale=scale)
    assert min(stats.kstest(draws[:, k], lambda t, k=k: law.cdf(np.broadcast_to(t[:, None], (len(t), 10)))[:, k]).pvalue for k in range(10)) > 1e-4
    theta = np.clip(draws[:50], -0.999, 0.999)
    np.testing.assert_allclose(gaussian_linear_uniform.posterior_log_prob(theta, x), law.logpdf(theta).sum(1), rtol=1e-6)
    assert gaussian_linear_uniform.posterior_log_prob(np.full((1, 10), 1.01), x)[0] == -np.inf


@pytest.mark.parametrize("x", [np.array([1.0, -3.0]), np.array([9.8, 10.4])], ids=["inside", "cornered"])
def test_gaussian_mixture_integrates_to_one_and_draws_follow_it(x, rng):
    axes = [np.unique(np.concatenate([np.linspace(-10, 10, 2001), np.clip(c + np.linspace(-0.6, 0.6, 1201), -10, 10)])) for c in x]
    grid = np.stack(np.meshgrid(*axes, indexing="ij"), -1)
    p = np.exp(gaussian_mixture.posterior_log_prob(grid.reshape(-1, 2), x)).reshape(grid.shape[:2])
    assert integrate.trapezoid(integrate.trapezoid(p, axes[1]), axes[0]) == pytest.approx(1, abs=2e-3)
    draws = gaussian_mixture.posterior_sampler(x, 20_000, rng)
    marginal = integrate.trapezoid(p, axes[1])
    cdf = integrate.cumulative_trapezoid(marginal, axes[0], initial=0)
    assert stats.kstest(draws[:, 0], lambda t: np.interp(t, axes[0], cdf / cdf[-1])).pvalue > 1e-4


def test_gaussian_mixture_simulates_its_likelihood(rng):
    x = gaussian_mixture.gaussian_mixture(np.tile([2.0, -1.0], (20_000, 1)), rng)
    assert within_error(x, [2.0, -1.0])
    assert within_error((x - [2.0, -1.0]) ** 2, [0.505, 0.505])


# ----------------------------------------------------------------------------------------------------- Lotka-Volterra


def test_lotka_volterra_solves_its_equations_and_has_log_normal_noise(rng):
    theta = np.array([[0.7, 0.06, 0.9, 0.04], [1.5, 0.02, 0.5, 0.1]])
    for row, found in zip(theta, lotka_volterra.log_populations(theta), strict=True):
        a, b, c, d = row
        exact = integrate.solve_ivp(lambda t, y, a=a, b=b, c=c, d=d: [a - b * np.exp(y[1]), d * np.exp(y[0]) - c], (0, 19),
                                    lotka_volterra.START, t_eval=lotka_volterra.DAYS, rtol=1e-10, atol=1e-10).y
        np.testing.assert_allclose(found, exact.reshape(-1), atol=1e-5)
    x = lotka_volterra.lotka_volterra(np.tile(theta[:1], (5000, 1)), rng)
    z = (np.log(x) - lotka_volterra.log_populations(theta[:1])) / 0.1
    assert within_error(z, 0)
    assert within_error(z**2, 1)
    law = stats.lognorm(0.1, scale=np.exp(lotka_volterra.log_populations(theta[:1])))
    np.testing.assert_allclose(lotka_volterra.log_likelihood(np.tile(theta[:1], (3, 1)), x[:3]), law.logpdf(x[:3]).sum(1), rtol=1e-5)
