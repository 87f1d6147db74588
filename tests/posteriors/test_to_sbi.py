"""Our posteriors behind sbi's interface: its own analysis and diagnostics run on them, on the right numbers, and the gate still stands."""

import warnings

import numpy as np
import pytest
import torch
from conftest import QUICK, line_posterior
from scipy import stats

import sbiplat as sp
from sbiplat.errors import ObservationError, PriorError, SettingError, Uncertified
from sbiplat.progress import silent

pytest.importorskip("sbi")


@pytest.fixture(scope="module")
def posterior(line_run):
    return line_run.to_sbi()


@pytest.fixture(scope="module")
def pairs(line_bank):
    theta, x = sp.pairs(line_bank, "held_out")
    return torch.as_tensor(theta, dtype=torch.float32), torch.as_tensor(x)


def test_draws_and_densities_are_those_of_our_own_posterior(posterior, line_run):
    ours, x = sp.load(line_run), torch.tensor([0.5, -0.5])
    theta = posterior.sample((4000,), x=x)
    assert theta.dtype == torch.float32
    mean, sd = line_posterior(x.numpy())
    np.testing.assert_allclose(theta.mean(0), mean, atol=0.15)
    np.testing.assert_allclose(theta.std(0), sd, rtol=0.15)
    np.testing.assert_allclose(posterior.log_prob(theta[:50], x), ours.log_prob(theta[:50], x), rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(posterior.potential(theta[:50], x), posterior.log_prob(theta[:50], x))
    assert posterior.log_prob(theta[0], x).shape == (1,)


def test_shapes_are_sbis(posterior):
    x = torch.tensor([[0.0, 0.0], [1.0, 1.0], [-1.0, 2.0]])
    assert posterior.sample((7, 2), x=x[0]).shape == (7, 2, 2)
    assert posterior.sample((), x=x[:1]).shape == (2,)
    drawn = posterior.sample_batched((500, 2), x=x)
    assert drawn.shape == (500, 2, 3, 2)
    for b in range(3):
        np.testing.assert_allclose(drawn[:, :, b].mean((0, 1)), line_posterior(x[b].numpy())[0], atol=0.2)
    log_q = posterior.log_prob_batched(drawn, x)
    assert log_q.shape == (500, 2, 3)
    np.testing.assert_allclose(log_q[3, 1, 2], posterior.log_prob(drawn[3, 1, 2], x[2])[0], rtol=1e-4)


def test_torchs_global_seed_governs_and_one_number_of_it_is_used(posterior):
    x = torch.zeros(2)
    torch.manual_seed(3)
    first, second = posterior.sample((5,), x=x), posterior.sample((5,), x=x)
    after = torch.rand(())
    assert not torch.equal(first, second)
    torch.manual_seed(3)
    assert torch.equal(first, posterior.sample((5,), x=x))
    torch.manual_seed(3)
    _ = torch.randint(2**62, ()), torch.randint(2**62, ())
    assert torch.rand(()) == after


def test_the_default_x_serves_where_none_is_given_and_the_map_is_the_mode(posterior):
    x = torch.tensor([0.8, -1.2])
    with pytest.raises(ObservationError, match="set_default_x"):
        posterior.sample((3,))
    assert posterior.set_default_x(x) is posterior
    mean, sd = line_posterior(x.numpy())
    np.testing.assert_allclose(posterior.sample((4000,)).mean(0), mean, atol=0.15)
    best = posterior.map()
    assert best.shape == (1, 2)
    np.testing.assert_allclose(best[0], mean, atol=0.1 * sd.max())
    around = best + 0.02 * torch.tensor([[1.0, 0], [-1, 0], [0, 1], [0, -1]])
    assert (posterior.log_prob(best) > posterior.log_prob(around)).all()
    other = posterior.set_default_x(-x).map()
    assert (best - other).abs().max() > 1


def test_sbis_sbc_and_tarp_pass_a_calibrated_posterior_and_refuse_another(posterior, pairs, line_bank, tmp_path):
    from sbi.diagnostics import check_sbc, check_tarp, run_sbc, run_tarp

    theta, x = (v[:200] for v in pairs)
    torch.manual_seed(0)
    ranks, dap = run_sbc(theta, x, posterior, num_posterior_samples=200, show_progress_bar=False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        checks = check_sbc(ranks, posterior.prior.sample((200,)), dap, num_posterior_samples=200)
    assert (checks["ks_pvals"] > 0.001).all()
    ecp, alpha = run_tarp(theta, x, posterior, num_posterior_samples=200, show_progress_bar=False)
    assert check_tarp(ecp, alpha)[1] > 0.05
    shifted, _ = run_sbc(theta + 0.5, x, posterior, num_posterior_samples=200, show_progress_bar=False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert (check_sbc(shifted, theta, dap, num_posterior_samples=200)["ks_pvals"] < 0.001).all()
    hpd, _ = run_sbc(theta[:100], x[:100], posterior, num_posterior_samples=200, reduce_fns=posterior.log_prob, show_progress_bar=False)
    assert stats.kstest(hpd[:, 0] / 200, "uniform").pvalue > 0.001


def test_sbis_plots_take_the_draws(posterior):
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot
    from sbi.analysis import conditional_pairplot, pairplot

    posterior.set_default_x(torch.zeros(2))
    _, axes = pairplot(posterior.sample((500,)))
    assert axes.shape == (2, 2)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        conditional_pairplot(posterior, posterior.sample((1,))[0], limits=[[-4, 6], [-3, 3]], resolution=10)
    pyplot.close("all")


def test_the_prior_is_a_torch_distribution(posterior, line_simulator):
    prior = posterior.prior
    torch.manual_seed(0)
    drawn = prior.sample((4000,))
    np.testing.assert_allclose(drawn.std(0), [2.0, 1.0], rtol=0.1)
    np.testing.assert_allclose(prior.log_prob(drawn), line_simulator.prior.log_prob(drawn.numpy()), rtol=1e-4, atol=1e-4)
    assert prior.sample().shape == (2,)
    assert prior.support.check(drawn).all()


def test_the_support_of_a_bounded_prior_is_its_box(tmp_path):
    prior = sp.Prior({"a": sp.Uniform(0.0, 1.0), "b": sp.HalfNormal(1.0), "c": sp.Normal(0.0, 1.0)})

    @sp.simulator(prior=prior, x_shape=(), batched=True, dtype="float64")
    def scalar(theta, rng):
        return theta.sum(1) + 0.1 * rng.standard_normal(len(theta))

    bank = sp.simulate(scalar, 600, 1, tmp_path / "bank", workers=1, progress=silent)
    run = sp.train(bank, "npe", out=tmp_path / "run", progress=silent, **{**QUICK, "max_epochs": 4})
    with pytest.raises(Uncertified, match="has not been through the gate"):
        run.to_sbi()
    posterior = run.to_sbi(allow_uncertified=True)
    assert posterior.prior.support.check(torch.tensor([[0.5, 1.0, -9.0], [1.5, 1.0, 0.0], [0.5, -1.0, 0.0]])).tolist() == [True, False, False]
    assert posterior.sample((4,), x=torch.tensor(0.3)).shape == (4, 3)
    assert posterior.sample((4,), x=torch.tensor([[0.3]])).shape == (4, 3), "sbi makes this of a scalar"
    assert posterior.sample_batched((4,), x=torch.zeros(5)).shape == (4, 5, 3)
    theta = posterior.map(torch.tensor(0.3))
    assert posterior.prior.support.check(theta).all()
    heights = posterior.log_prob(posterior.sample((200,)))
    assert (heights <= posterior.log_prob(theta) + 1e-3).float().mean() > 0.98, "all but draws beyond the box of others"


def test_draws_stay_in_the_support_when_they_are_rounded_to_float32(tmp_path):
    """0.1 in float32 is above 0.1, and some of these draws round to it."""
    @sp.simulator(prior=sp.Prior({"a": sp.Uniform(0.1 - 2e-8, 0.1)}), x_shape=(1,), batched=True)
    def narrow(theta, rng):
        return rng.standard_normal(theta.shape)

    bank = sp.simulate(narrow, 500, 1, tmp_path / "bank", workers=1, progress=silent)
    run = sp.train(bank, "npe", out=tmp_path / "run", progress=silent, **{**QUICK, "max_epochs": 1})
    posterior = run.to_sbi(allow_uncertified=True)
    x = torch.zeros(1)
    for drawn in (posterior.sample((200,), x=x), posterior.sample_batched((200,), x=x[None])[:, 0], posterior.prior.sample((200,))):
        assert narrow.prior.contains(drawn.double().numpy()).all()


def test_mistakes_are_one_line(posterior, tmp_path):
    for error, said, call in (
        (ObservationError, "2 observations were given, one is expected", lambda: posterior.sample((3,), x=torch.zeros(2, 2))),
        (ObservationError, r"x has shape \(3,\); expected \(2,\)", lambda: posterior.sample((3,), x=torch.zeros(3))),
        (ObservationError, "NaN or infinite", lambda: posterior.sample((3,), x=torch.tensor([0.0, float("nan")]))),
        (PriorError, r"theta has shape \(4, 3\)", lambda: posterior.log_prob(torch.zeros(4, 3), torch.zeros(2))),
        (PriorError, "its last axes must be", lambda: posterior.log_prob_batched(torch.zeros(4, 2), torch.zeros(3, 2))),
        (SettingError, "no gradients", lambda: posterior.log_prob(torch.zeros(4, 2), torch.zeros(2), track_gradients=True)),
        (SettingError, "no gradients", lambda: posterior.potential_fn(torch.zeros(4, 2, requires_grad=True))),
    ):
        with pytest.raises(error, match=said) as told:
            call()
        assert "\n" not in str(told.value)


def test_a_dict_x_is_refused(tmp_path):
    @sp.simulator(prior=sp.Prior({"a": sp.Normal(0.0, 1.0)}), x_shape={"u": (2,), "v": ()}, batched=True)
    def two(theta, rng):
        return {"u": theta + rng.standard_normal((len(theta), 2)), "v": theta[:, 0]}

    bank = sp.simulate(two, 500, 1, tmp_path / "bank", workers=1, progress=silent)
    run = sp.train(bank, "npe", out=tmp_path / "run", progress=silent, **{**QUICK, "max_epochs": 1})
    with pytest.raises(SettingError, match=r"x is a dict \(u, v\), and sbi's tools take one tensor"):
        run.to_sbi(allow_uncertified=True)


def test_there_and_back_from_sbis_own_training(line_bank, tmp_path, monkeypatch):
    """The snippet of docs/how-to.md, with few epochs."""
    from sbi.inference import NPE

    monkeypatch.chdir(tmp_path)  # sbi writes logs where it stands
    torch.manual_seed(0)
    theta, x = sp.pairs(line_bank, "training")
    trainer = NPE(density_estimator="mdn", show_progress_bars=False)
    trainer.append_simulations(torch.as_tensor(theta, dtype=torch.float32), torch.as_tensor(x))
    net = trainer.train(max_num_epochs=20)
    run = sp.from_sbi(net, line_bank, out="sbi.run", model="mdn", trained_on=theta, progress=silent)
    sp.gate(run, progress=silent, draws=500)
    whole = trainer.build_posterior(net, prior=torch.distributions.MultivariateNormal(torch.tensor([1.0, 0.0]), torch.diag(torch.tensor([4.0, 1.0]))))
    assert sp.from_sbi(whole, line_bank, out="sbi.run", model="mdn", progress=silent).weights_digest == run.weights_digest
    posterior = run.to_sbi(allow_uncertified=True).set_default_x(torch.tensor([0.5, -0.5]))
    mean, sd = line_posterior([0.5, -0.5])
    np.testing.assert_allclose(posterior.sample((4000,)).mean(0), mean, atol=0.3 * sd.max())
