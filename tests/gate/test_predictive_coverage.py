"""PIT of new data: uniform for the exact posterior, and not where the posterior, or the simulator that it is asked of, is another."""

import numpy as np
import pytest

import sbiplat as sp
from sbiplat.errors import SettingError, SimulatorError
from sbiplat.progress import silent

SUMMARIES = {"first": lambda x: x[0], "sum": lambda x: x.sum()}


def test_predictions_of_a_good_posterior_are_frequencies(line_run, line_simulator):
    found = sp.predictive_coverage(line_run, line_simulator, SUMMARIES, n=200, progress=silent)
    assert found.ranks.shape == (200, 2)
    assert min(found.adjusted.values()) > 0.01
    assert "sum" in str(found)


def test_another_noise_is_seen(line_run):
    """The simulator that the predictions are held against makes less noise than the one that the posterior knows."""
    @sp.simulator(prior=sp.Prior({"slope": sp.Normal(1.0, 2.0, unit="m/s"), "offset": sp.Normal(0.0, 1.0, unit="m")}), x_shape=(2,),
                  batched=True, name="quieter_line")
    def quieter(theta, rng):
        z = (theta - [1.0, 0.0]) / [2.0, 1.0]
        far = np.abs(z - z[:1]).max(1) > 0  # all but the first, which is the truth's own
        return z + np.where(far, 0.0, 1.5)[:, None] * rng.standard_normal(z.shape)

    found = sp.predictive_coverage(line_run, quieter, SUMMARIES, n=200, progress=silent)
    assert min(found.adjusted.values()) < 0.01


def test_the_data_themselves_would_not_be_uniform(line_run, line_simulator):
    """Why new data are ranked: x itself, which made the posterior, lies too often in the middle of its own predictions."""
    posterior = sp.load(line_run)
    _, x = sp.pairs(line_run.bank(), "held_out", seed=line_run.seed)
    rng = np.random.default_rng(0)
    draws = posterior.sample(x[:300], 100, seed=0).reshape(-1, 2)
    made = np.stack([row["x"] for row in line_simulator.rows(draws, [rng])]).reshape(300, 100, 2)
    central = np.abs((made < x[:300, None]).mean(1) - 0.5)
    assert (central < 0.25).mean() > 0.6


def test_mistakes_are_one_line(line_run, line_simulator):
    with pytest.raises(SettingError, match="n must be"):
        sp.predictive_coverage(line_run, line_simulator, n=3)
    with pytest.raises(SimulatorError, match="another shape of x"):
        sp.predictive_coverage(line_run, "two_moons" if line_run.prior.names != ("theta_1", "theta_2") else "sir")
