"""One parameter is a vector of one: every flow finds a conjugate posterior of it."""

import numpy as np
import pytest
from scipy import stats

import sbiplat as sp
from sbiplat.nets.flows import FLOWS
from sbiplat.progress import silent

NOISE = 0.5
SMALL = {"max_epochs": 12, "batch_size": 128, "embedding_hidden": [16], "context": 8, "hidden": [16, 16], "transforms": 2, "bins": 4, "ode_steps": 2}


@sp.simulator(prior=sp.Prior({"a": sp.Normal(2.0, 3.0)}), x_shape=(1,), batched=True)
def one(theta, rng):
    """x = (a - 2) / 3 + noise."""
    return (theta - 2.0) / 3.0 + NOISE * rng.standard_normal(theta.shape)


@pytest.fixture(scope="module")
def bank(tmp_path_factory):
    return sp.simulate(one, 4000, 1, tmp_path_factory.mktemp("one") / "bank", workers=1, progress=silent)


@pytest.mark.parametrize("flow", list(FLOWS))
def test_the_conjugate_posterior_of_one_parameter(flow, bank, tmp_path):
    posterior = sp.load(sp.train(bank, "npe", out=tmp_path / "run", progress=silent, flow=flow, **SMALL), allow_uncertified=True)
    x, shrink = np.array([[-1.0], [0.5]]), 1 / (1 + NOISE**2)
    mean, sd = 2.0 + 3.0 * shrink * x, 3.0 * NOISE * np.sqrt(shrink)
    draws = posterior.sample(x, 8000, seed=0)
    assert draws.shape == (2, 8000, 1)
    np.testing.assert_array_equal(draws, posterior.sample(x, 8000, seed=0))
    assert not np.array_equal(draws, posterior.sample(x, 8000, seed=1))
    np.testing.assert_allclose(draws.mean(1), mean, atol=0.15 * sd)  # of 3400 training rows, after 12 epochs
    np.testing.assert_allclose(draws.std(1), np.full((2, 1), sd), rtol=0.12)
    theta = mean[:, None] + sd * np.array([[-1.0], [0.0], [1.0]])
    np.testing.assert_allclose(posterior.log_prob(theta, x), stats.norm(mean, sd).logpdf(theta[..., 0]), atol=0.25)
    axis = np.linspace(mean[0, 0] - 12 * sd, mean[0, 0] + 12 * sd, 4001)
    assert np.trapezoid(np.exp(posterior.log_prob(axis[:, None], x[0])), axis) == pytest.approx(1.0, abs=5e-3)
