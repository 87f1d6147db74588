"""Ratio estimation: its loss and its balance for a ratio that is known, and the whole way on a Gaussian."""

import math

import numpy as np
import pytest
import torch
from conftest import NOISE, line_posterior
from scipy import stats

import sbiplat as sp
from sbiplat.errors import SettingError
from sbiplat.estimators.nre import contrastive, imbalance
from sbiplat.progress import silent

QUICK_NRE = {"max_epochs": 20, "batch_size": 256, "embedding_hidden": [32], "hidden": 64, "blocks": 1, "components": 1, "classes": 16}


@pytest.fixture(scope="module")
def run(line_bank, tmp_path_factory):
    return sp.train(line_bank, "nre", out=tmp_path_factory.mktemp("nre") / "run", progress=silent, **QUICK_NRE)


@pytest.fixture(scope="module")
def posterior(run):
    return sp.load(run, allow_uncertified=True)


# ------------------------------------------------------------------------------------------------------- the loss


def known(rows=40_000, others=4):
    """log r of `line`'s own thetas (B,) and of others' (B, K), exactly, for one parameter."""
    rng = np.random.default_rng(0)
    z = rng.standard_normal(rows)
    x = z + NOISE * rng.standard_normal(rows)
    away = rng.standard_normal((rows, others))

    def log_ratio(z, x):
        return stats.norm(z, NOISE).logpdf(x) - stats.norm(0, math.sqrt(1 + NOISE**2)).logpdf(x)

    return torch.as_tensor(log_ratio(z, x)), torch.as_tensor(log_ratio(away, x[:, None]))


@pytest.mark.parametrize("gamma", [0.3, 1.0, 5.0])
@pytest.mark.parametrize("classes", [1, 4])
def test_the_exact_ratio_has_the_least_loss(gamma, classes):
    own, others = known(others=classes)
    least = contrastive(own, others, gamma)
    for wrong in (lambda r: 0.8 * r, lambda r: 1.25 * r, lambda r: r + 0.5, lambda r: r - 0.5):
        gap = contrastive(wrong(own), wrong(others), gamma) - least
        assert gap.mean() > 3 * gap.std() / math.sqrt(len(gap)) > 0


@pytest.mark.parametrize("gamma", [0.5, 1.0, 20.0])
@pytest.mark.parametrize("classes", [1, 7])
def test_a_ratio_of_one_has_the_loss_of_guessing(gamma, classes):
    """The entropy of the classes: none with 1 / (1 + gamma), each of K with gamma / (K (1 + gamma))."""
    loss = contrastive(torch.zeros(3), torch.zeros(3, classes), gamma)
    entropy = (math.log(1 + gamma) + gamma * math.log(classes * (1 + gamma) / gamma)) / (1 + gamma)
    np.testing.assert_allclose(loss, entropy, rtol=1e-6)


def test_one_class_of_even_odds_is_a_classifiers_cross_entropy():
    own, others = known(1000, 1)
    bce = torch.nn.functional.binary_cross_entropy_with_logits
    assert float(contrastive(own, others, 1.0).mean()) == pytest.approx(
        float(0.5 * bce(own, torch.ones_like(own)) + 0.5 * bce(others, torch.zeros_like(others))))


def test_the_exact_ratio_is_balanced_and_others_are_not():
    own, others = known()
    error = 3 * (own.sigmoid().std() + others.sigmoid().std()) / math.sqrt(len(own))
    assert abs(imbalance(own, others)) < error
    for wrong in (lambda r: 3 * r, lambda r: 0.3 * r, lambda r: r - 0.5, lambda r: r + 0.5):
        assert abs(imbalance(wrong(own), wrong(others))) > 3 * error


def test_the_balance_makes_a_posterior_of_few_simulations_wider(line_simulator, tmp_path):
    bank = sp.simulate(line_simulator, 1000, 3, tmp_path / "bank", workers=1, progress=silent)
    over = {**QUICK_NRE, "max_epochs": 25, "batch_size": 64, "classes": 4}
    sharp, wide = (sp.load(sp.train(bank, "nre", out=tmp_path / f"{weight}", progress=silent, balance=weight, **over), allow_uncertified=True)
                   for weight in (0.0, 100.0))
    x = np.random.default_rng(0).standard_normal((30, 2)) * math.sqrt(1 + NOISE**2)
    spread = [np.log(p.sample(x, 300, seed=0).std(1)).mean() for p in (sharp, wide)]
    assert spread[1] > spread[0] + 0.05


# ------------------------------------------------------------------------------------------------------- the whole way


def test_the_gaussian_posterior_is_found(posterior):
    for x in ([0.0, 0.0], [1.0, -1.5]):
        mean, sd = line_posterior(x)
        draws = posterior.sample(np.array(x), 4000, seed=0)
        np.testing.assert_allclose(draws.mean(0), mean, atol=0.2 * sd.max())
        np.testing.assert_allclose(draws.std(0), sd, rtol=0.15)
        assert abs(np.corrcoef(draws.T)[0, 1]) < 0.15
        theta = mean + sd * np.array([[0.0, 0.0], [1.0, 0.0], [0.0, -1.0]])
        np.testing.assert_allclose(posterior.log_prob(theta, np.array(x)), stats.norm(mean, sd).logpdf(theta).sum(1), atol=0.25)


def test_the_ratio_is_normalised_so_its_evidence_is_one(posterior):
    """NRE-C leaves no factor of x alone free."""
    x = np.array([[0.3, -0.8], [1.0, 0.2]], np.float32)
    log_z, error = posterior.sampler.log_evidence({"x": x})
    np.testing.assert_allclose(log_z, 0, atol=0.15)
    assert error.max() < 0.1


def test_another_prior_and_sets_of_observations(posterior):
    x = np.array([[1.0, -1.5], [0.4, -0.9]])
    other = sp.Prior({"slope": sp.Normal(2.0, 1.0, unit="m/s"), "offset": sp.Normal(0.0, 1.0, unit="m")})
    precision = np.array([1 + 2 / (2 * NOISE) ** 2, 1 + 2 / NOISE**2])
    mean = np.array([2 + (2 + 2 * x[:, 0].sum()) / (2 * NOISE) ** 2, x[:, 1].sum() / NOISE**2]) / precision
    draws = posterior.iid(2).with_prior(other).sample(x, 4000, seed=0)
    np.testing.assert_allclose(draws.mean(0), mean, atol=0.3 * precision.min() ** -0.5)
    np.testing.assert_allclose(draws.std(0), precision**-0.5, rtol=0.2)


def test_it_goes_through_gate_sample_and_report(run, tmp_path):
    certificate = sp.gate(run, n=200, draws=500, progress=silent)
    assert certificate.passed, certificate.failed
    facts = sp.load(run).to_arviz(np.zeros(2), 50, seed=0).posterior.attrs
    assert facts["r_hat_max"] < 1.1
    page = sp.report(run, out=tmp_path / "report.html", progress=silent)
    assert "CERTIFIED" in page.read_text()


def test_a_batch_of_one_row_is_refused(line_bank, tmp_path):
    with pytest.raises(SettingError, match="batch_size must be at least 2"):
        sp.train(line_bank, "nre", out=tmp_path / "run", progress=silent, **{**QUICK_NRE, "batch_size": 1})
