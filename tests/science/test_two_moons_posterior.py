"""NPE at its defaults on Two Moons, against the exact posterior."""

import numpy as np
import pytest

import sbiplat as sp
from sbiplat.progress import silent
from simulators.two_moons import two_moons

OPTIMUM = 3.800  # nats: E[log p(theta | x)] of the exact posterior


@pytest.mark.science
@pytest.mark.parametrize("settings", [{}, {"flow": "mog", "components": 20}], ids=["default", "mog"])
def test_npe_comes_within_0_4_nats_of_the_exact_posterior_and_is_certified(tmp_path, settings):
    bank = sp.simulate(two_moons, 10_000, 1, tmp_path / "bank", workers=1, progress=silent)
    run = sp.train(bank, "npe", out=tmp_path / "run", progress=silent, **settings)
    assert sp.gate(run, progress=silent).passed
    rng = np.random.default_rng(99)
    theta = two_moons.prior.sample(rng, 2000)
    x = two_moons(theta, rng)
    log_q = sp.load(run).log_prob(theta, x)
    assert OPTIMUM - 0.4 < log_q.mean() < OPTIMUM + 0.1


@pytest.mark.science
def test_both_moons_get_half_of_the_draws(tmp_path):
    bank = sp.simulate(two_moons, 10_000, 2, tmp_path / "bank", workers=1, progress=silent)
    posterior = sp.load(sp.train(bank, "npe", out=tmp_path / "run", progress=silent), allow_uncertified=True)
    draws = posterior.sample(np.zeros(2), 10_000, seed=0)
    exact = two_moons.posterior_sampler(np.zeros(2), 10_000, np.random.default_rng(0))
    assert (draws.sum(1) > 0).mean() == pytest.approx((exact.sum(1) > 0).mean(), abs=0.08)
    np.testing.assert_allclose(draws.std(0), exact.std(0), rtol=0.1)
