"""Posteriors that no Gaussian fits, known exactly: an angle across the edge of its prior, and two modes of unequal weight."""

import numpy as np
import pytest
from scipy import stats
from scipy.special import i0, i1

import sbiplat as sp
from sbiplat.progress import silent

NOISE, DRAWS = 0.4, 4000
SMALL = {"embedding_hidden": [64], "context": 16}
SETTINGS = {
    "npe": {"flow": "nsf", "transforms": 2, "hidden": [32, 32], "max_epochs": 30, **SMALL},
    "npse": {"hidden": 48, "blocks": 2, "max_epochs": 60, **SMALL},
    "fmpe": {"hidden": 48, "blocks": 2, "max_epochs": 60, **SMALL},
    "nle": {"max_epochs": 25},
    "nre": {"hidden": 48, "blocks": 1, "max_epochs": 25, **SMALL},
}


@sp.simulator(prior=sp.Prior({"phase": sp.Uniform(-np.pi, np.pi, unit="rad")}), x_shape=(2,), batched=True)
def compass(theta, rng):
    """A direction in the plane, with noise: the posterior of the phase is von Mises."""
    return np.concatenate([np.cos(theta), np.sin(theta)], axis=1) + NOISE * rng.standard_normal((len(theta), 2))


@sp.simulator(prior=sp.Prior({"a": sp.Normal(0.4, 1.0)}), x_shape=(1,), batched=True)
def size(theta, rng):
    """The size of a number whose sign is lost, with noise."""
    return np.abs(theta) + NOISE * rng.standard_normal(theta.shape)


@pytest.fixture(scope="module")
def banks(tmp_path_factory):
    folder = tmp_path_factory.mktemp("known")
    return {s.name: sp.simulate(s, 5000, 1, folder / s.name, workers=1, progress=silent) for s in (compass, size)}


def trained(bank, estimator, out):
    return sp.load(sp.train(bank, estimator, out=out, progress=silent, batch_size=128, **SETTINGS[estimator]), allow_uncertified=True)


@pytest.mark.parametrize("estimator", ["npe", "npse", "nle"])
def test_an_angle_across_the_edge_of_its_prior(estimator, banks, tmp_path):
    posterior = trained(banks["compass"], estimator, tmp_path / "run")
    concentration = 1 / NOISE**2  # where |x| = 1
    for angle in (np.pi, 0.5):
        draws = posterior.sample(np.array([np.cos(angle), np.sin(angle)]), DRAWS, seed=0)[:, 0]
        assert np.abs(draws).max() <= np.pi
        mean = np.exp(1j * (draws - angle)).mean()
        assert abs(np.angle(mean)) < 0.08  # the posterior's sd is 0.42
        assert abs(mean) == pytest.approx(i1(concentration) / i0(concentration), abs=0.05)  # a few percent bridge the ends
        if angle == np.pi:  # half of the mass on either side of the edge
            assert (draws > 0).mean() == pytest.approx(0.5, abs=0.08)


@pytest.mark.parametrize("estimator", ["npe", "fmpe", "nre"])
def test_two_modes_have_their_weights(estimator, banks, tmp_path):
    posterior, x = trained(banks["size"], estimator, tmp_path / "run"), np.array([1.2])
    axis = np.linspace(-5, 5, 20_001)
    density = stats.norm(0.4, 1).pdf(axis) * stats.norm(np.abs(axis), NOISE).pdf(x[0])
    density /= density.sum()
    draws = posterior.sample(x, DRAWS, seed=0)[:, 0]
    above = axis > 0
    assert (draws > 0).mean() == pytest.approx(density[above].sum(), abs=0.06)  # 0.70; the other mode has 0.30
    for side, part in ((draws[draws > 0], above), (draws[draws < 0], ~above)):
        share = density[part] / density[part].sum()
        mean = share @ axis[part]
        assert side.mean() == pytest.approx(mean, abs=0.08)
        assert side.std() == pytest.approx(np.sqrt(share @ (axis[part] - mean) ** 2), rel=0.15)
