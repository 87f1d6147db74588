"""Ensembles: one run, one posterior, one certificate; the equal mixture of members that differ."""

import numpy as np
import pytest
import torch
from conftest import QUICK, line_posterior
from safetensors.torch import load_file, save_file

import sbiplat as sp
from sbiplat.errors import OtherTraining, SettingError, Uncertified
from sbiplat.estimators.base import Architecture
from sbiplat.estimators.ensemble import Ensemble
from sbiplat.posteriors.ensemble import EnsembleSampler
from sbiplat.progress import silent
from sbiplat.runs import Run

MEMBERS = 3


@pytest.fixture(scope="module")
def run(line_bank, tmp_path_factory):
    return sp.train(line_bank, "npe", out=tmp_path_factory.mktemp("ensemble") / "run", progress=silent, members=MEMBERS, **{**QUICK, "max_epochs": 6})


@pytest.fixture(scope="module")
def held_out(line_simulator):
    rng = np.random.default_rng(5)
    theta = line_simulator.prior.sample(rng, 400)
    return theta, line_simulator(theta, rng)


def of_members(run, theta, x):
    """log q_k(theta | x) of each member, (K, N), by estimators of one member each that are given its weights."""
    record = run.record["architecture"]
    weights, out = load_file(run.weights_path), []
    for k in range(MEMBERS):
        alone = Architecture.from_json({**record, "settings": {**record["settings"], "members": 1}}).build()
        alone.load_state_dict({name.removeprefix(f"members.{k}."): v for name, v in weights.items() if name.startswith(f"members.{k}.")})
        z = run.prior.unconstrain(theta)
        with torch.no_grad():
            context = alone.eval().context(alone.prepare({"x": torch.as_tensor(x, dtype=torch.float32)}))
            log_q = alone.log_prob(torch.as_tensor(z, dtype=torch.float32), context).double().numpy()
        out.append(log_q - run.prior.log_abs_det_jacobian(z))
    return np.stack(out)


def test_members_differ_and_the_first_begins_as_the_estimator_alone_would(run):
    architecture = run.architecture
    ensemble = architecture.build(7)
    assert isinstance(ensemble, Ensemble)
    alone = Architecture.from_json({**architecture.to_json(), "settings": {**architecture.to_json()["settings"], "members": 1}}).build(7)
    first, second = (m.state_dict() for m in ensemble.members[:2])
    assert all(torch.equal(v, first[k]) for k, v in alone.state_dict().items())
    assert not torch.equal(first["density.head.net.weight"], second["density.head.net.weight"])
    trained = [m.density.head.net.weight for m in run.estimator().members]
    assert not torch.equal(trained[0], trained[1])


def test_the_density_is_the_equal_mixture_of_the_members(run, held_out):
    theta, x = held_out
    each = of_members(run, theta, x)
    found = sp.load(run, allow_uncertified=True).log_prob(theta, x)
    np.testing.assert_allclose(found, np.log(np.exp(each).mean(0)), rtol=1e-4, atol=1e-4)


def test_the_ensemble_is_at_least_as_good_as_its_members_on_average(run, held_out):
    """Jensen's inequality, row by row: log of the mean density >= mean of the log-densities; strictly, where members differ."""
    theta, x = held_out
    each, whole = of_members(run, theta, x), sp.load(run, allow_uncertified=True).log_prob(theta, x)
    assert np.all(whole >= each.mean(0) - 1e-4), "up to the float32 of the densities"
    most = each.std(0).argmax()
    assert whole[most] > each.mean(0)[most], "members differ"
    mean, sd = line_posterior(x)
    exact = (-0.5 * ((theta - mean) / sd) ** 2 - np.log(sd * np.sqrt(2 * np.pi))).sum(1)
    assert exact.mean() + 0.05 > whole.mean() > exact.mean() - 0.1, "and it is near the exact posterior"


def test_the_loss_is_the_members_mean_and_so_is_the_validation_loss(run, line_bank):
    estimator = run.estimator()
    theta, x = torch.randn(9, 2), estimator.prepare({"x": torch.randn(9, 2)})
    with torch.no_grad():
        torch.testing.assert_close(estimator.loss(theta, x), sum(m.loss(theta, x) for m in estimator.members) / MEMBERS)


class Known:
    """A Gaussian posterior N(x + shift, sd^2) of one parameter."""

    def __init__(self, shift, sd):
        self.shift, self.sd, self.rows = shift, sd, []

    def sample(self, x, n, seed):
        self.rows.append(len(x["x"]))
        noise = np.random.default_rng(seed).standard_normal((len(x["x"]), n, 1))
        return (x["x"][:, None] + self.shift + self.sd * noise).astype(np.float32)

    def log_prob(self, z, x):
        return (-0.5 * ((z - x["x"][:, None] - self.shift) / self.sd) ** 2 - np.log(self.sd * np.sqrt(2 * np.pi)))[..., 0].astype(float)


def test_draws_have_the_moments_of_a_known_mixture():
    """N(-2, 0.5^2) and N(2, 1): mean 0, variance 4 + (0.25 + 1) / 2, half of the draws from each, for every x its own choice."""
    sampler, x = EnsembleSampler([Known(-2.0, 0.5), Known(2.0, 1.0)]), {"x": np.array([[0.0], [10.0], [-5.0]])}
    n = 100_000
    draws = sampler.sample(x, n, seed=3)
    assert draws.shape == (3, n, 1)
    gap = draws[..., 0] - x["x"]
    sd = np.sqrt(4 + 1.25 / 2)
    np.testing.assert_allclose(gap.mean(1), 0.0, atol=5 * sd / np.sqrt(n))
    np.testing.assert_allclose(gap.var(1), sd**2, rtol=0.02)
    low = (gap < 0).mean(1)
    share = 0.5 * (1 + 0.02275)  # Phi(-2) of the second lies below 0 as well
    np.testing.assert_allclose(low, share, atol=5 * 0.5 / np.sqrt(n))
    assert len(np.unique(low)) == 3, "each observation has its own choice of members"
    np.testing.assert_allclose(np.corrcoef((gap < 0).astype(float))[np.triu_indices(3, 1)], 0.0, atol=5 / np.sqrt(n))
    np.testing.assert_allclose(np.corrcoef(gap[0, :-1], gap[0, 1:])[0, 1], 0.0, atol=5 / np.sqrt(n), err_msg="no order among the draws")
    np.testing.assert_array_equal(draws, sampler.sample(x, n, seed=3))
    assert not np.array_equal(draws, sampler.sample(x, n, seed=4))


def test_members_draw_from_streams_of_their_own():
    """Two members that are alike give no draw twice."""
    draws = EnsembleSampler([Known(0.0, 1.0), Known(0.0, 1.0)]).sample({"x": np.zeros((1, 1))}, 1000, seed=0)
    assert len(np.unique(draws)) == 1000


def test_a_member_is_asked_only_for_observations_that_it_serves():
    members = [Known(0.0, 1.0) for _ in range(4)]
    draws = EnsembleSampler(members).sample({"x": np.arange(40.0)[:, None]}, 1, seed=0)
    assert sum(sum(m.rows) for m in members) == 40
    np.testing.assert_allclose(draws[:, 0, 0], np.arange(40.0), atol=6)


def test_the_certificate_is_bound_to_every_members_weights(run, tmp_path):
    import shutil

    copy = tmp_path / "run"
    shutil.copytree(run.path, copy)
    assert sp.gate(copy, bank=run.record["bank"]["path"], progress=silent).passed
    sp.load(copy)
    weights = load_file(copy / "weights.safetensors")
    for k in range(MEMBERS):
        changed = {n: v + 1e-6 if n == f"members.{k}.density.head.net.bias" else v for n, v in weights.items()}
        save_file(changed, copy / "weights.safetensors")
        with pytest.raises(Uncertified, match="is for other weights"):
            sp.load(copy)


def test_an_ensemble_is_resumed_as_the_ensemble_it_is(run, line_bank):
    with pytest.raises(OtherTraining, match="members = 3, not 2"):
        sp.train(line_bank, "npe", out=run.path, progress=silent, members=2, **{**QUICK, "max_epochs": 6})
    for count in (0, 101, 1.5):
        with pytest.raises(SettingError, match="members = "):
            sp.train(line_bank, "npe", out=run.path, progress=silent, members=count)


@pytest.mark.parametrize("name", ["npse", "fmpe"])
def test_ensembles_of_diffusion_posteriors(name, line_bank, tmp_path):
    quick = {k: v for k, v in QUICK.items() if k != "flow"} | {"hidden": 32, "blocks": 2, "noises": 4}
    posterior = sp.load(sp.train(line_bank, name, out=tmp_path / "run", progress=silent, members=2, **quick), allow_uncertified=True)
    x = np.array([1.0, -1.5])
    mean, sd = line_posterior(x)
    draws = posterior.sample(x, 10_000, seed=0)
    np.testing.assert_allclose(draws.mean(0), mean, atol=0.2 * sd.max())
    np.testing.assert_allclose(draws.std(0), sd, rtol=0.15)
    theta = mean + sd * np.array([[0.0, 0.0], [1.0, 0.0]])
    exact = (-0.5 * ((theta - mean) / sd) ** 2 - np.log(sd * np.sqrt(2 * np.pi))).sum(1)
    np.testing.assert_allclose(posterior.log_prob(theta, x), exact, atol=0.3)


def test_all_members_take_x_as_the_first_prepares_it(line_bank, tmp_path):
    """An embedding whose fixed summaries hold random numbers: after loading, members see what they saw in training."""

    class Projected(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("directions", torch.randn(2, 6))
            self.net = torch.nn.Linear(6, 8)

        def summaries(self, x):
            return x @ self.directions

        def forward(self, summaries):
            return self.net(summaries)

    quick = {k: v for k, v in QUICK.items() if k not in ("embedding_hidden", "context")}
    run = sp.train(line_bank, "npe", out=tmp_path / "run", progress=silent, members=2, embedding=Projected, **quick)
    estimator = run.estimator()
    x = {"x": torch.randn(5, 2)}
    assert not torch.equal(*(m.embedding.directions for m in estimator.members))
    first = estimator.members[0].prepare(x)["x"]
    for member in estimator.members:
        assert torch.equal(member.prepare(x)["x"], first)
    mean, sd = line_posterior([1.0, -1.5])
    theta = mean + np.zeros((1, 2))
    exact = -np.log(sd * np.sqrt(2 * np.pi)).sum()
    assert sp.load(run, allow_uncertified=True).log_prob(theta, np.array([1.0, -1.5])) == pytest.approx(exact, abs=0.3)
    assert Run.open(run.path).weights_digest == run.weights_digest


def test_the_contexts_of_an_ensemble_serve_as_summaries(run, line_bank):
    draws = sp.nearest(line_bank, summaries=run).sample(np.array([0.5, -0.5]), 4000, seed=0)
    mean, sd = line_posterior([0.5, -0.5])
    np.testing.assert_allclose(draws.mean(0), mean, atol=0.4 * sd.max())
