"""The posterior in the user's own space: right shapes, right densities, inside the support, the same for a batch as one by one."""

import numpy as np
import pytest
from conftest import NOISE, QUICK, line_posterior

import sbiplat as sp
from sbiplat.errors import ObservationError, PriorError
from sbiplat.posteriors import passes
from sbiplat.progress import silent


@pytest.fixture(scope="module")
def posterior(line_run):
    return sp.load(line_run)


def test_shapes_of_one_and_of_a_batch(posterior):
    x = np.zeros((3, 2))
    assert posterior.sample(x[0], 5).shape == (5, 2)
    assert posterior.sample(x, 5).shape == (3, 5, 2)
    assert posterior.log_prob(np.zeros(2), x[0]).shape == ()
    assert posterior.log_prob(np.zeros((7, 2)), x[0]).shape == (7,)
    assert posterior.log_prob(np.zeros((3, 2)), x).shape == (3,)
    assert posterior.log_prob(np.zeros((3, 7, 2)), x).shape == (3, 7)


def test_log_prob_is_the_gaussian_that_is_known(posterior):
    x = np.array([0.5, -0.5])
    mean, sd = line_posterior(x)
    theta = mean + sd * np.array([[0.0, 0.0], [1.0, 0.0], [0.0, -1.0]])
    exact = -0.5 * (((theta - mean) / sd) ** 2).sum(1) - np.log(sd * np.sqrt(2 * np.pi)).sum()
    np.testing.assert_allclose(posterior.log_prob(theta, x), exact, atol=0.2)


def test_log_prob_of_a_batch_is_that_of_each(posterior):
    rng = np.random.default_rng(0)
    x, theta = rng.standard_normal((4, 2)), rng.standard_normal((4, 6, 2))
    one_by_one = np.stack([posterior.log_prob(t, o) for t, o in zip(theta, x, strict=True)])
    np.testing.assert_allclose(posterior.log_prob(theta, x), one_by_one, rtol=1e-4, atol=1e-4)


def test_draws_of_a_batch_belong_to_their_own_observation(posterior):
    x = np.array([[-2.0, 0.0], [0.0, 0.0], [2.0, 0.0]])
    means = posterior.sample(x, 4000, seed=0).mean(1)
    for mean, one in zip(means, x, strict=True):
        np.testing.assert_allclose(mean, line_posterior(one)[0], atol=0.35)


@pytest.mark.parametrize("rows", [7, 100, 10**6])
def test_draws_and_densities_do_not_depend_on_the_memory_of_a_pass(posterior, monkeypatch, rows):
    monkeypatch.setattr(passes, "ROWS_PER_PASS", rows)
    x = np.linspace(-1, 1, 10).reshape(5, 2)
    draws = posterior.sample(x, 60, seed=1)
    assert draws.shape == (5, 60, 2)
    assert len(np.unique(draws.reshape(-1, 2), axis=0)) == 300, "no draw comes twice"
    np.testing.assert_allclose(posterior.log_prob(draws, x)[3, 4], posterior.log_prob(draws[3, 4], x[3]), rtol=1e-4, atol=1e-4)


def test_a_seed_fixes_the_draws_and_none_gives_fresh_ones(posterior):
    x = np.zeros(2)
    np.testing.assert_array_equal(posterior.sample(x, 5, seed=3), posterior.sample(x, 5, seed=3))
    assert not np.array_equal(posterior.sample(x, 5), posterior.sample(x, 5))


def test_bounded_parameters_stay_inside_and_the_density_is_of_their_own_space(tmp_path):
    @sp.simulator(prior=sp.Prior({"p": sp.Uniform(0.0, 1.0), "rate": sp.LogNormal(0.0, 1.0)}), x_shape=(2,), batched=True, name="bounded")
    def bounded(theta, rng):
        return np.stack([theta[:, 0], np.log(theta[:, 1])], 1) + 0.3 * rng.standard_normal((len(theta), 2))

    bank = sp.simulate(bounded, 4000, 1, tmp_path / "bank", workers=1, progress=silent)
    posterior = sp.load(sp.train(bank, "npe", out=tmp_path / "run", progress=silent, **QUICK), allow_uncertified=True)
    x = np.array([1.2, -0.5])  # presses against the upper edge of p
    draws = posterior.sample(x, 20_000, seed=0)
    assert bank.header.prior.contains(draws).all()
    p, rate = np.linspace(0.0005, 0.9995, 500), np.exp(np.linspace(-6, 6, 600))
    grid = np.stack(np.meshgrid(p, rate, indexing="ij"), -1)
    density = np.exp(posterior.log_prob(grid, x))
    mass = np.trapezoid(np.trapezoid(density, rate, axis=1), p)
    assert mass == pytest.approx(1.0, abs=0.02)
    mean = np.trapezoid(np.trapezoid(density * grid[..., 0], rate, axis=1), p)
    assert draws[:, 0].mean() == pytest.approx(mean, abs=0.02)
    assert posterior.log_prob(np.array([1.5, 1.0]), x) == -np.inf
    assert posterior.log_prob(np.array([0.5, -1.0]), x) == -np.inf


def test_arviz_has_names_units_seed_and_digests(posterior, line_run):
    data = posterior.to_arviz(np.zeros(2), 50, seed=9)
    assert set(data.groups()) >= {"posterior", "prior", "observed_data"}
    assert data.posterior["slope"].dims == ("chain", "draw")
    assert data.posterior["slope"].shape == (1, 50)
    assert data.posterior["slope"].attrs["unit"] == "m/s"
    assert data.posterior.attrs["seed"] == 9
    assert data.posterior.attrs["weights_digest"] == line_run.weights_digest
    np.testing.assert_allclose(data.posterior["offset"].values[0], posterior.sample(np.zeros(2), 50, seed=9)[:, 1])
    many = posterior.to_arviz(np.array([[0.0, 0.0], [2.0, 2.0]]), 500, seed=0)
    assert many.posterior["slope"].dims == ("chain", "draw", "observation")
    gap = many.posterior["slope"].mean("draw").values[0]
    assert gap[1] - gap[0] == pytest.approx(4.0 / (1 + NOISE**2), abs=0.4)


@pytest.mark.parametrize(("x", "message"), [
    (np.zeros(3), r"shape \(3,\), declared is \(2,\)"), (np.zeros((0, 2)), "empty"), (np.array([0.0, np.nan]), r"NaN or infinite, first at x\[1\]"),
    (np.array(["a", "b"]), "real numbers"), ({"x": np.zeros(2)}, "declared is one array"), (np.zeros((2, 2, 2)), "leading axis"),
])
def test_a_wrong_observation_is_one_clear_line(posterior, x, message):
    with pytest.raises(ObservationError, match=message) as error:
        posterior.sample(x, 5)
    assert "\n" not in str(error.value)


def test_wrong_theta_and_wrong_n_are_refused(posterior):
    with pytest.raises(PriorError, match="slope, offset"):
        posterior.log_prob(np.zeros(3), np.zeros(2))
    with pytest.raises(PriorError, match=r"give \(3, 2\) or \(3, n, 2\)"):
        posterior.log_prob(np.zeros((5, 2)), np.zeros((3, 2)))
    for n in (0, -1, 2.5, True):
        with pytest.raises(sp.UserError, match="n must be a whole number"):
            posterior.sample(np.zeros(2), n)
    with pytest.raises(sp.UserError, match="ask for fewer at a time"):
        posterior.sample(np.zeros(2), 10**13)
    for theta in ("text", [["a", "b"]], [], None):
        with pytest.raises(PriorError, match="slope, offset"):
            posterior.log_prob(theta, np.zeros(2))
    for seed in (-1, 2.5, "x", True):
        with pytest.raises(sp.UserError, match="seed must be a whole number"):
            posterior.sample(np.zeros(2), 5, seed=seed)
