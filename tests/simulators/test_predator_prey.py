"""The predator-prey problem: the solver against an independent one, the likelihood, the record, and the embedding's fit."""

from pathlib import Path

import numpy as np
import pytest
import torch
from scipy import stats
from scipy.integrate import solve_ivp

import sbiplat as sp
from simulators import predator_prey_embedding as embedding
from simulators.predator_prey import YEARS, predator_prey, solve

RECORD = Path(embedding.__file__).parent / "data" / "hudson_bay.csv"
STAN_MEANS = np.array([0.55, 0.028, 0.80, 0.024, 33.9, 5.9, 0.25, 0.25])


def independent(theta):
    alpha, beta, gamma, delta, hare0, lynx0 = theta[:6]

    def slope(t, s):
        return [alpha - beta * np.exp(s[1]), -gamma + delta * np.exp(s[0])]

    return solve_ivp(slope, (0, YEARS), np.log([hare0, lynx0]), "DOP853", np.arange(YEARS + 1.0), rtol=1e-12, atol=1e-12).y.T


def test_the_solution_is_accurate_to_1e_6_over_the_prior():
    theta = predator_prey.prior.sample(np.random.default_rng(0), 60)
    ours = solve(theta)
    assert max(np.abs(ours[i] - independent(theta[i])).max() for i in range(60)) < 1e-6


def test_the_solution_keeps_what_the_equations_conserve_even_for_extreme_parameters():
    """V = delta u - gamma log u + beta v - alpha log v is constant along a solution."""
    theta = predator_prey.prior.constrain(np.random.default_rng(1).uniform(-3.5, 3.5, (2000, 8)))
    log_u, log_v = np.moveaxis(solve(theta), -1, 0)
    alpha, beta, gamma, delta = theta[:, :4].T[:, :, None]
    terms = np.stack([delta * np.exp(log_u), -gamma * log_u, beta * np.exp(log_v), -alpha * log_v])
    drift = np.abs(terms.sum(0) - terms.sum(0)[:, :1]) / np.abs(terms).max((0, 2), keepdims=True)[0]
    assert np.isfinite(log_u).all()
    assert np.isfinite(log_v).all()
    assert drift.max() < 1e-7


def test_a_row_does_not_depend_on_its_neighbours():
    theta = predator_prey.prior.sample(np.random.default_rng(2), 300)
    whole = solve(theta)
    np.testing.assert_array_equal(whole[17], solve(theta[17:18])[0])
    np.testing.assert_array_equal(whole[::-1], solve(theta[::-1]))


def test_log_likelihood_is_that_of_log_normal_errors():
    x = sp.read_observation(RECORD, predator_prey.x)
    theta = np.stack([STAN_MEANS, STAN_MEANS * 1.1])
    for value, t in zip(predator_prey.log_likelihood(theta, x), theta, strict=True):
        exact = stats.lognorm(s=t[6:8], scale=np.exp(independent(t))).logpdf(x).sum()
        assert value == pytest.approx(exact, abs=1e-5)


def test_the_record_is_read_by_its_column_names():
    x = sp.read_observation(RECORD, predator_prey.x)
    assert x.shape == (21, 2)
    np.testing.assert_array_equal(x[0], [30.0, 4.0])  # hare, lynx: not the file's order
    np.testing.assert_array_equal(x[-1], [24.7, 8.6])


def test_simulated_noise_has_the_stated_law():
    theta = np.tile(STAN_MEANS, (4000, 1))
    x = predator_prey(theta, np.random.default_rng(3))
    residual = (np.log(x) - solve(theta[:1])) / 0.25
    assert stats.kstest(residual.ravel(), "norm").pvalue > 1e-3


def test_the_embeddings_fit_finds_the_parameters_of_clean_records():
    rng = np.random.default_rng(4)
    theta = STAN_MEANS * np.exp(0.15 * rng.standard_normal((50, 8)))
    log_x = torch.as_tensor(solve(theta) + 0.02 * rng.standard_normal((50, 21, 2))).float().transpose(1, 2).contiguous()
    running, log_mean = embedding.integral(log_x)
    start, rate, effect, _ = embedding.integral_match(log_x, running.flip(1))
    phi, log_variance, _, _ = embedding.fit(log_x, embedding.first_guess(start, rate, effect, log_mean))
    np.testing.assert_allclose(phi.exp().numpy(), theta[:, :6], rtol=0.12)
    assert np.median(np.exp(0.5 * log_variance.numpy())) == pytest.approx(0.02, rel=0.3)


def test_the_fits_derivatives_are_those_of_its_solution():
    phi = torch.log(torch.tensor(STAN_MEANS[None, :6])).float()
    curve, slope = embedding.solve(phi)
    for k in range(6):
        step = torch.zeros(6)
        step[k] = 1e-2
        difference = (embedding.solve(phi + step)[0] - embedding.solve(phi - step)[0]) / 2e-2
        torch.testing.assert_close(slope[:, k], difference, rtol=0.02, atol=0.02)
    np.testing.assert_allclose(curve[0].numpy().T, independent(STAN_MEANS), atol=2e-3)


def test_the_summaries_are_finite_and_of_order_one_over_the_whole_prior():
    theta = predator_prey.prior.constrain(np.random.default_rng(5).uniform(-4, 4, (500, 8)))
    with np.errstate(over="ignore"):
        x = predator_prey(theta, np.random.default_rng(6))
    features = embedding.summaries(torch.log(torch.as_tensor(x).clamp(1e-308, 1e300)).float())
    assert torch.isfinite(features).all()
    assert features.shape[1] == embedding.FEATURES
    assert features.abs().max() < 100
