"""The equivariant problems: their laws against independent computation, their symmetries, and their reference posteriors."""

import subprocess
import sys
import tomllib
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy import integrate, stats

import sbiplat as sp
from sbiplat.errors import ObservationError
from sbiplat.simulator import check
from simulators import damped_oscillator, location, rotated_galaxy

ROOT = Path(location.__file__).parents[1]
PROBLEMS = {"location": location.location, "damped_oscillator": damped_oscillator.damped_oscillator,
            "rotated_galaxy": rotated_galaxy.rotated_galaxy}
OBSERVED = {"location": [3.0], "damped_oscillator": [6.0, 0.3, -2.0], "rotated_galaxy": [2.0, 1.0, -0.5, 600.0, 1.6, 0.45]}
EXACT = ["location", "damped_oscillator"]


@pytest.fixture
def rng():
    return np.random.default_rng(20211113)


def x_of(simulator, theta, rng):
    """Observations (B, ...)."""
    rngs = [rng] * (1 if simulator.batched else len(theta))
    return np.stack([row["x"] for row in simulator.rows(theta, rngs)]).astype(float)


def least_p(draws, others):
    """The least p-value of two-sample KS tests of columns."""
    return min(stats.ks_2samp(a, b).pvalue for a, b in zip(draws.T, others.T, strict=True))


@pytest.mark.parametrize("name", PROBLEMS)
def test_each_keeps_its_contract(name):
    assert check(PROBLEMS[name]).finite == 1


def test_simulating_imports_no_torch():
    modules = ", ".join(f"simulators.{name}" for name in PROBLEMS)
    subprocess.run([sys.executable, "-c", f"import sys, {modules}; sys.exit('torch' in sys.modules)"], check=True)


@pytest.mark.parametrize("name", PROBLEMS)
def test_the_observation_of_a_workflow_is_the_simulators_from_a_fixed_seed(name):
    workflow = ROOT / "workflows" / f"{name}.toml"
    path = workflow.parent / tomllib.loads(workflow.read_text())["sample"]["observation"]
    made = x_of(PROBLEMS[name], np.array([OBSERVED[name]]), np.random.default_rng(2022))[0]
    np.testing.assert_allclose(sp.read_observation(path, PROBLEMS[name].x), made, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("name", EXACT)
def test_the_likelihood_is_unchanged_by_an_exact_action(name, rng):
    """log p(T_g x | g theta) = log p(x | theta), for shifts by a fraction of a sample too; and not where only theta moves."""
    simulator, theta = PROBLEMS[name], PROBLEMS[name].prior.sample(rng, 50)
    action = simulator.symmetry
    columns = [simulator.prior.names.index(p) for p in action.parameters]
    x = x_of(simulator, theta, rng)
    g = torch.tensor(rng.normal(0, 0.7, (50, action.size)))
    shifted = action.act_data(g, {"x": torch.tensor(x)})["x"].numpy()
    moved = theta.copy()
    moved[:, columns] = action.act_theta(g, torch.tensor(theta[:, columns]))[0].numpy()

    def each(theta, x):
        return np.array([simulator.log_likelihood(t[None], v)[0] for t, v in zip(theta, x, strict=True)])

    np.testing.assert_allclose(each(moved, shifted), each(theta, x), rtol=1e-9)
    assert np.median(np.abs(each(moved, x) - each(theta, x))) > 0.3


# ------------------------------------------------------------------------------------------------------- location


def test_location_obeys_bayes_with_its_exact_evidence(rng):
    theta, x = rng.normal(0, 3, (40, 1)), np.array([1.0, 2.5, 0.3, -0.2, 1.9])
    evidence = stats.multivariate_normal(np.zeros(5), np.eye(5) + 100).logpdf(x)
    likelihood = stats.norm(theta, 1).logpdf(x).sum(-1)
    np.testing.assert_allclose(location.log_likelihood(theta, x), likelihood, rtol=1e-12)
    np.testing.assert_allclose(location.posterior_log_prob(theta, x), likelihood + stats.norm(0, 10).logpdf(theta[:, 0]) - evidence, rtol=1e-9)


def test_location_draws_follow_the_density(rng):
    x = np.array([1.0, 2.5, 0.3, -0.2, 1.9])
    law = stats.norm(location.posterior_mean(x), np.sqrt(location.VARIANCE))
    draws = location.posterior_sampler(x, 20_000, rng)[:, 0]
    assert stats.kstest(draws, law.cdf).pvalue > 1e-3
    assert stats.kstest(draws + 0.1 * law.std(), law.cdf).pvalue < 1e-6


def test_location_conditional_is_the_kernel_times_the_posterior():
    x, proxy, width = np.array([1.0, 2.5, 0.3, -0.2, 1.9]), 0.4, 0.3
    mu = np.linspace(-4, 6, 20_001)
    p = np.exp(location.posterior_log_prob(mu[:, None], x)) * stats.norm(mu, width).pdf(proxy)
    p /= integrate.trapezoid(p, mu)
    mean = integrate.trapezoid(p * mu, mu)
    found = location.conditional(x, proxy, width)
    np.testing.assert_allclose(found, (mean, integrate.trapezoid(p * (mu - mean) ** 2, mu)), rtol=1e-9)


@pytest.mark.parametrize("share", [0.5, 1.0, 2.0])
def test_gibbs_with_the_exact_conditional_has_the_known_law_and_autocorrelation(share, rng):
    x, width, chains = np.array([1.0, 2.5, 0.3, -0.2, 1.9]), share * np.sqrt(location.VARIANCE), 20_000
    mu = np.full(chains, 8.0)  # far off
    action, widths = location.location.symmetry, torch.tensor([width])
    generator = torch.Generator().manual_seed(5)
    for _ in range(int(25 / share) + 25):
        before = mu
        proxy = action.blur(torch.tensor(mu)[:, None], widths, generator)[:, 0].numpy()
        mean, variance = location.conditional(x, proxy, width)
        mu = mean + np.sqrt(variance) * rng.standard_normal(chains)
    law = stats.norm(location.posterior_mean(x), np.sqrt(location.VARIANCE))
    rho = location.autocorrelation(width)
    assert stats.kstest(mu, law.cdf).pvalue > 1e-3
    assert abs(np.arctanh(np.corrcoef(before, mu)[0, 1]) - np.arctanh(rho)) < 4 / np.sqrt(chains - 3)
    assert stats.kstest(law.mean() + 1.05 * (mu - law.mean()), law.cdf).pvalue < 0.05  # what the test would see


# ---------------------------------------------------------------------------------------------- damped oscillator


def response(t, omega_0, beta):
    """Of the oscillator to one kick, at t >= 0."""
    omega = np.sqrt(omega_0**2 - beta**2)
    return np.exp(-beta * t) * np.sin(omega * t) / omega


def test_oscillator_harmonics_are_those_of_the_response_to_kicks():
    t = np.linspace(0, 150, 300_001)
    for omega_0, beta in ((3.1, 0.21), (9.5, 0.45)):
        found = damped_oscillator.transfer(np.array([omega_0]), np.array([beta]))[0]
        for k in (0, 3, 17, 100):
            w = damped_oscillator.FREQUENCIES[k]
            expected = integrate.simpson(response(t, omega_0, beta) * np.exp(-1j * w * t), x=t)
            assert abs(found[k] - expected) < 1e-8


def test_oscillator_is_what_one_kick_gives_but_for_the_filter_and_what_is_left_of_the_kick_before():
    theta = damped_oscillator.prior.sample(np.random.default_rng(1), 200)
    since = damped_oscillator.TIMES - theta[:, 2:]
    kicked = np.where(since > 0, response(np.maximum(since, 0), theta[:, :1], theta[:, 1:2]), 0)
    assert np.abs(damped_oscillator.signal(theta) - kicked).max() < 0.1 * np.abs(kicked).max()
    assert np.sqrt(np.mean((damped_oscillator.signal(theta) - kicked) ** 2)) < 0.1 * np.sqrt(np.mean(kicked**2))


def test_oscillator_likelihood_is_white_noise(rng):
    theta = damped_oscillator.prior.sample(rng, 20)
    x = x_of(damped_oscillator.damped_oscillator, theta[:1], rng)[0]
    np.testing.assert_allclose(damped_oscillator.log_likelihood(theta, x),
                               stats.norm(damped_oscillator.signal(theta), 0.02).logpdf(x).sum(-1), rtol=1e-10)


def test_oscillator_reference_is_the_posterior_by_quadrature(rng):
    """Against a grid of 45^3 points over 12 standard deviations: marginals, evidence, density; and it sees a shift by a tenth of one."""
    x = x_of(damped_oscillator.damped_oscillator, np.array([[6.0, 0.32, -2.0]]), rng)[0]
    draws = damped_oscillator.posterior_sampler(x, 10_000, rng)
    axes = [np.linspace(m - 6 * s, m + 6 * s, 45) for m, s in zip(draws.mean(0), draws.std(0), strict=True)]
    axes = [np.clip(a, *bounds) for a, bounds in zip(axes, [(3, 10), (0.2, 0.5), (-5, 0)], strict=True)]
    grid = np.stack(np.meshgrid(*axes, indexing="ij"), -1).reshape(-1, 3)
    log_p = np.concatenate([damped_oscillator.log_likelihood(g, x) for g in np.array_split(grid, 90)])
    p = np.exp(log_p - log_p.max()).reshape(45, 45, 45)

    def integral(values, over):
        for k in sorted(over, reverse=True):
            values = integrate.trapezoid(values, axes[k], axis=k)
        return values

    log_evidence = np.log(integral(p, (0, 1, 2))) + log_p.max() - np.log(7 * 0.3 * 5)
    for shift, sees in ((0, False), (0.1, True)):
        least = 1
        for k in range(3):
            cdf = integrate.cumulative_simpson(integral(p, {0, 1, 2} - {k}), x=axes[k], initial=0)
            moved = draws[:, k] + shift * draws[:, k].std()
            least = min(least, stats.kstest(moved, lambda t, k=k, cdf=cdf: np.interp(t, axes[k], cdf / cdf[-1])).pvalue)
        assert (least < 1e-4) == sees
    theta = draws[:20]
    exact = damped_oscillator.log_likelihood(theta, x) + damped_oscillator.prior.log_prob(theta) - log_evidence
    np.testing.assert_allclose(damped_oscillator.posterior_log_prob(theta, x), exact, atol=0.03)
    assert damped_oscillator.posterior_log_prob(np.array([[6.0, 0.6, -2.0]]), x)[0] == -np.inf


# ------------------------------------------------------------------------------------------------- rotated galaxy


def test_galaxy_is_a_disc_behind_the_point_spread_function():
    """By summing over a fine grid in the plane, without any Fourier transform."""
    theta = np.array([[0.7, 0.4, -0.8, 600.0, 1.5, 0.5]])
    angle, cx, cy, flux, radius, ratio = theta[0]
    fine = np.arange(-14, 14, 0.05) + 0.025
    x, y = np.meshgrid(fine, fine)
    along, across = (x - cx) * np.cos(angle) + (y - cy) * np.sin(angle), (y - cy) * np.cos(angle) - (x - cx) * np.sin(angle)
    disc = flux * np.exp(-np.hypot(along, across / ratio) / radius) / (2 * np.pi * ratio * radius**2) * 0.05**2
    image = rotated_galaxy.image(theta)[0]
    for row, column in ((16, 16), (15, 18), (20, 14), (10, 16)):
        seen = np.exp(-0.5 * ((x - column + 16) ** 2 + (y - row + 16) ** 2) / 1.5**2) / (2 * np.pi * 1.5**2)
        assert image[row, column] == pytest.approx((disc * seen).sum(), abs=2e-3 * image.max())


def test_galaxy_likelihood_is_white_noise(rng):
    theta = rotated_galaxy.prior.sample(rng, 20)
    x = x_of(rotated_galaxy.rotated_galaxy, theta[:1], rng)[0]
    np.testing.assert_allclose(rotated_galaxy.log_likelihood(theta, x),
                               stats.norm(rotated_galaxy.image(theta), 1).logpdf(x).sum((-1, -2)), rtol=1e-9)


def motions(rng, n):
    return torch.tensor(np.stack([rng.uniform(-np.pi, np.pi, n), *rng.normal(0, 1, (2, n))], -1))


def test_motions_are_a_group(rng):
    action = rotated_galaxy.Motion()
    f, g, h = (motions(rng, 200) for _ in range(3))
    torch.testing.assert_close(action.compose(action.compose(f, g), h), action.compose(f, action.compose(g, h)))
    torch.testing.assert_close(action.compose(g, action.inverse(g)), action.identity(200), atol=1e-12, rtol=0)
    torch.testing.assert_close(action.exp(action.log(g)), g)
    theta = torch.tensor(rotated_galaxy.prior.sample(rng, 200)[:, :3])
    once, twice = action.act_theta(action.compose(f, g), theta)[0], action.act_theta(f, action.act_theta(g, theta)[0])[0]
    torch.testing.assert_close(torch.cat([(2 * once[:, :1]).cos(), once[:, 1:]], -1), torch.cat([(2 * twice[:, :1]).cos(), twice[:, 1:]], -1))


def test_motions_turn_a_galaxy_to_far_below_the_noise_and_keep_white_noise_white(rng):
    """The error of a whole image in units of the noise; a motion by other angles is far off."""
    action, n = rotated_galaxy.Motion(), 1000
    theta, g = torch.tensor(rotated_galaxy.prior.sample(rng, n)), motions(rng, n)
    image = torch.tensor(rotated_galaxy.image(theta.numpy()))
    wanted = torch.tensor(rotated_galaxy.image(torch.cat([action.act_theta(g, theta[:, :3])[0], theta[:, 3:]], -1).numpy()))
    error = (action.act_data(g, {"x": image})["x"] - wanted).square().sum((1, 2)).sqrt()
    assert error.median() < 0.01
    assert error.mean() < 0.05
    off = action.act_data(g + torch.tensor([0.2, 0, 0]), {"x": image})["x"] - wanted
    assert off.square().sum((1, 2)).sqrt().median() > 1
    basis = torch.eye(33**2, dtype=torch.float64).reshape(-1, 33, 33)
    matrix = rotated_galaxy.moved(basis, g[:1].expand(33**2, -1)).reshape(33**2, -1)
    torch.testing.assert_close(matrix @ matrix.T, torch.eye(33**2, dtype=torch.float64), atol=1e-10, rtol=0)


def test_the_kernel_of_motions_is_equivariant_though_the_angle_is_known_up_to_a_half_turn(rng):
    """K(g proxy | g theta) = K(proxy | theta), which a kernel around one of the two poses breaks where the angle wraps."""
    action, n, widths = rotated_galaxy.Motion(), 500, torch.tensor([0.2, 0.3, 0.4], dtype=torch.float64)
    theta, g = torch.tensor(rotated_galaxy.prior.sample(rng, n)[:, :3]), motions(rng, n)
    pose, moved = action.pose_of(theta), action.pose_of(action.act_theta(g, theta)[0])
    proxy = action.blur(pose, widths, torch.Generator().manual_seed(1))
    torch.testing.assert_close(action.log_kernel(action.compose(g, proxy), moved, widths), action.log_kernel(proxy, pose, widths))

    def around_one(proxy, pose):
        return -0.5 * (action.log(action.compose(action.inverse(pose), proxy)) / widths).square().sum(-1)

    one = around_one(action.compose(g, proxy), moved), around_one(proxy, pose)
    assert (one[0] - one[1]).abs().max() > 1


def test_the_kernel_of_motions_is_a_density(rng):
    """Its mean over proxies that are uniform on a box around the pose, times the box's volume, is 1."""
    action, n, widths = rotated_galaxy.Motion(), 400_000, torch.tensor([0.4, 0.3, 0.4], dtype=torch.float64)
    pose = torch.tensor([[3.0, 0.5, -1.0]], dtype=torch.float64).expand(n, -1)
    proxy = pose + torch.tensor(np.stack([rng.uniform(-np.pi, np.pi, n), *rng.uniform(-2.5, 2.5, (2, n))], -1))
    values = action.log_kernel(rotated_galaxy._element(proxy[:, 0], proxy[:, 1:]), pose, widths).exp().numpy() * 2 * np.pi * 25
    assert abs(values.mean() - 1) < 4 * values.std() / np.sqrt(n)


def metropolis(log_density, start, covariance, rng, steps=900):
    """States (4 x chains, D) of random-walk Metropolis chains, of its last 600 steps each 150th."""
    root, states, value, kept = np.linalg.cholesky(covariance) * 2.38 / np.sqrt(start.shape[1]), start, log_density(start), []
    for step in range(1, steps + 1):
        proposed = states + rng.standard_normal(states.shape) @ root.T
        new = log_density(proposed)
        accept = np.log(rng.random(len(states))) < new - value
        states, value = np.where(accept[:, None], proposed, states), np.where(accept, new, value)
        if step > steps - 600 and step % 150 == 0:
            kept.append(states)
    return np.concatenate(kept)


def test_galaxy_reference_is_the_posterior_by_mcmc(rng):
    """Chains in theta itself, begun at the truth; and a shift by 0.3 standard deviations of the angle is seen."""
    truth = np.array([0.05, 1.0, -0.5, 600.0, 1.6, 0.5])  # at the edge of the angle's interval
    x = x_of(rotated_galaxy.rotated_galaxy, truth[None], rng)[0]

    def about_zero(theta):
        return np.concatenate([(theta[:, :1] + np.pi / 2) % np.pi - np.pi / 2, theta[:, 1:]], -1)

    draws = about_zero(rotated_galaxy.posterior_sampler(x, 10_000, rng))

    def log_density(theta):
        wrapped = np.concatenate([theta[:, :1] % np.pi, theta[:, 1:]], -1)
        inside = rotated_galaxy.prior.contains(wrapped)
        safe = np.where(inside[:, None], wrapped, truth)
        return np.where(inside, rotated_galaxy.log_likelihood(safe, x) + rotated_galaxy.prior.log_prob(safe), -np.inf)

    chains = about_zero(metropolis(log_density, np.tile(truth, (200, 1)), np.cov(draws.T), rng))
    assert least_p(draws, chains) > 1e-3
    draws[:, 0] += 0.3 * draws[:, 0].std()
    assert least_p(draws, chains) < 1e-4


# ------------------------------------------------------------------------------------------------------ references


@pytest.mark.parametrize("name", ["damped_oscillator", "rotated_galaxy"])
def test_a_reference_refuses_an_x_that_is_not_finite(name, rng):
    x = x_of(PROBLEMS[name], PROBLEMS[name].prior.sample(rng, 1), rng)[0]
    x.flat[3] = np.nan
    with pytest.raises(ObservationError, match="finite"):
        PROBLEMS[name].posterior_sampler(x, 10, rng)


@pytest.mark.parametrize("name", ["damped_oscillator", "rotated_galaxy"])
def test_a_reference_refuses_an_x_without_a_signal(name, rng):
    """Its posterior is broad and may have many modes, of which the sampler would show one."""
    x = {"damped_oscillator": damped_oscillator, "rotated_galaxy": rotated_galaxy}[name].NOISE * rng.standard_normal(PROBLEMS[name].x.shapes["x"])
    with pytest.raises(ObservationError, match="no clear signal"):
        PROBLEMS[name].posterior_sampler(x, 10, rng)


def ranks(name, rng, pairs=150, draws=99, narrower=0.6):
    """Ranks (2, pairs, D) of the truth among the draws, and among draws that are drawn together by that factor."""
    simulator = PROBLEMS[name]
    theta = simulator.prior.sample(rng, pairs)
    found = []
    for t, x in zip(theta, x_of(simulator, theta, rng), strict=True):
        posterior = simulator.posterior_sampler(x, draws, rng)
        middle = posterior.mean(0)
        found.append([(p < t).sum(0) for p in (posterior, middle + narrower * (posterior - middle))])
    return np.array(found).swapaxes(0, 1)


def uniform_p(found, draws=99):
    """The least p-value over the parameters of chi-square tests of ten bins."""
    return min(stats.chisquare(np.histogram(f, bins=10, range=(0, draws + 1))[0]).pvalue for f in found.T)


@pytest.mark.science
@pytest.mark.parametrize("name", PROBLEMS)
def test_simulation_based_calibration_of_the_reference(name, rng):
    first = 1 if name == "rotated_galaxy" else 0  # ranks of an angle on a circle say nothing where the draws straddle its edge
    found, narrower = ranks(name, rng)
    assert uniform_p(found[:, first:]) > 1e-3
    assert uniform_p(narrower[:, first:]) < 1e-4
