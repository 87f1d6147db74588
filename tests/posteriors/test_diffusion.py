"""Score and flow-matching posteriors: solvers and densities against laws whose denoiser is known, and the whole way on a Gaussian."""

import math

import numpy as np
import pytest
import torch
from conftest import QUICK, line_posterior
from scipy import stats

import sbiplat as sp
from sbiplat.estimators.base import Architecture, find
from sbiplat.estimators.denoising import LEAST, MOST, SOLVERS
from sbiplat.observation import ObservationSpec
from sbiplat.posteriors import diffusion
from sbiplat.progress import silent

LOGITS, MEANS, SDS = torch.log(torch.tensor([0.3, 0.7])), torch.tensor([[-1.0, 0.5], [0.8, -0.4]]), torch.tensor([0.2, 0.4])


def mixture_field(z, t):
    """E[sin t w - cos t e | z] for w from a mixture of two round Gaussians and z = cos t w + sin t e."""
    cos, sin = t.cos(), t.sin()
    variance = cos**2 * SDS**2 + sin**2
    gap = z[..., None, :] - cos[..., None] * MEANS
    log_p = LOGITS - 0.5 * gap.square().sum(-1) / variance - variance.log()
    each = MEANS + (cos * SDS**2 / variance)[..., None] * gap
    w = (log_p.softmax(-1)[..., None] * each).sum(-2)
    return sin * w - cos * (z - cos * w) / sin


def mixture_log_prob(w):
    gap = w[..., None, :] - MEANS
    return torch.logsumexp(LOGITS - 0.5 * gap.square().sum(-1) / SDS**2 - torch.log(2 * math.pi * SDS**2), -1)


def mixture_draws(n, solver, steps):
    generator = torch.Generator().manual_seed(0)
    z = torch.randn(1, n, 2, generator=generator)
    if solver == "heun":
        return diffusion.solve_heun(mixture_field, z, steps)[0]
    return diffusion.solve_dpm(mixture_field, z, steps, generator if solver == "sde" else None)[0]


@pytest.mark.parametrize(("solver", "steps"), [("heun", 12), ("dpm", 20), ("sde", 60)])
def test_draws_have_the_modes_and_weights_of_a_known_mixture(solver, steps):
    draws = mixture_draws(20_000, solver, steps)
    exact = torch.distributions.MixtureSameFamily(
        torch.distributions.Categorical(logits=LOGITS),
        torch.distributions.Independent(torch.distributions.Normal(MEANS, SDS[:, None].expand(2, 2)), 1))
    torch.manual_seed(1)
    own = exact.sample((20_000,))
    shares = [float(((w - MEANS[0]).norm(dim=-1) < (w - MEANS[1]).norm(dim=-1)).float().mean()) for w in (draws, own)]
    assert shares[0] == pytest.approx(shares[1], abs=0.015)
    for k in range(2):
        assert stats.ks_2samp(draws[:, k].numpy(), own[:, k].numpy()).statistic < 0.02


@pytest.mark.parametrize("solver", list(SOLVERS))
def test_the_default_steps_of_a_solver_keep_the_width_of_a_gaussian(solver):
    """F = 0: w is N(0, I). sd of 400,000 numbers: 0.001. A dozen steps of the stochastic solver are 4 % too wide."""
    def sd(steps):
        generator = torch.Generator().manual_seed(0)
        z = torch.randn(1, 200_000, 2, generator=generator)
        if solver == "heun":
            return float(diffusion.solve_heun(lambda z, t: torch.zeros_like(z), z, steps).std())
        return float(diffusion.solve_dpm(lambda z, t: torch.zeros_like(z), z, steps, generator if solver == "sde" else None).std())

    assert sd(SOLVERS[solver]) == pytest.approx(1.0, abs=0.008)
    assert solver == "heun" or abs(sd(12) - 1) > 0.02


def test_too_few_steps_are_seen_by_the_same_measure():
    few, many = mixture_draws(20_000, "dpm", 4), mixture_draws(20_000, "heun", 60)
    assert stats.ks_2samp(few[:, 0].numpy(), many[:, 0].numpy()).statistic > 0.02


def test_the_density_of_a_known_mixture():
    w = mixture_draws(500, "heun", 40)[None]
    np.testing.assert_allclose(diffusion.log_density(mixture_field, w)[0], mixture_log_prob(w[0]), atol=0.02)


def test_the_density_of_a_linear_flow_is_base_and_trace():
    """dz / dt = A z takes w to exp(T A) w, and adds T tr A to the log-density."""
    A, T = torch.tensor([[0.3, 0.1], [0.0, -0.2]]), math.atan(MOST) - math.atan(LEAST)
    w = torch.tensor([[[0.4, -1.0], [2.0, 0.3]]])
    base = torch.distributions.Normal(0.0, 1.0).log_prob(w @ torch.linalg.matrix_exp(T * A).mT).sum(-1)

    def field(z, t):
        return -z @ A.mT

    np.testing.assert_allclose(diffusion.log_density(field, w), base + T * A.trace(), rtol=1e-4)
    signs = 2.0 * torch.randint(0, 2, (4000, *w.shape), generator=torch.Generator().manual_seed(0)) - 1
    np.testing.assert_allclose(diffusion.log_density(field, w, signs), base + T * A.trace(), atol=0.01)


def made(name, **settings):
    shape = find(name).settings_class(embedding="none", hidden=16, blocks=1, **settings)
    return Architecture(name, shape, 1, ObservationSpec.declare((1,)), True).build(0)


@pytest.mark.parametrize("path", ["linear", "vp"])
def test_the_velocity_between_gaussians_in_closed_form(path, monkeypatch):
    """w ~ N(m, v) and noise N(0, 1): E[w | z] and E[e | z] are linear in z."""
    estimator, m, v = made("fmpe", path=path), 0.7, 0.25
    monkeypatch.setattr(estimator, "denoise", lambda y, s, c: m + v / (v + s**2) * (y - m))
    for time in (0.1, 0.5, 0.9):
        z, t = torch.linspace(-2, 2, 5).view(1, 5, 1), torch.full((1, 1, 1), time)
        if path == "linear":
            alpha, sigma, d_alpha, d_sigma = 1 - time, time, -1.0, 1.0
        else:
            half = math.pi / 2
            alpha, sigma = math.cos(half * time), math.sin(half * time)
            d_alpha, d_sigma = -half * sigma, half * alpha
        total = alpha**2 * v + sigma**2
        w, noise = m + alpha * v / total * (z - alpha * m), sigma / total * (z - alpha * m)
        np.testing.assert_allclose(estimator.velocity(z, t, None), d_alpha * w + d_sigma * noise, rtol=2e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["npse", "fmpe"])
def test_the_target_is_the_denoisers(name):
    """A net that predicts the target gives back w itself."""
    estimator = made(name)
    w, noise, s = torch.randn(3, 4, 1), torch.randn(3, 4, 1), 0.1 + 3 * torch.rand(3, 4, 1)
    estimator.velocity_back = lambda z, t, c: t.sin() * w - t.cos() * noise
    np.testing.assert_allclose(estimator.denoise(w + s * noise, s, None), w, atol=1e-5)
    np.testing.assert_allclose(estimator.score(w + s * noise, s, None), -noise / s, rtol=1e-3)


@pytest.mark.parametrize(("name", "settings"), [
    ("npse", {}), ("npse", {"schedule": "vp", "weighting": "likelihood", "solver": "dpm", "max_epochs": 30}), ("npse", {"schedule": "ve", "solver": "sde", "steps": 40}),
    ("fmpe", {}), ("fmpe", {"path": "vp", "trace": "hutchinson"}),
], ids=lambda v: v if isinstance(v, str) else "-".join(map(str, v.values())) or "default")
def test_the_gaussian_posterior_is_found(name, settings, line_bank, tmp_path):
    quick = {k: v for k, v in QUICK.items() if k != "flow"} | {"hidden": 32, "blocks": 2, "noises": 4}
    run = sp.train(line_bank, name, out=tmp_path / "run", progress=silent, **{**quick, **settings})
    posterior = sp.load(run, allow_uncertified=True)
    for x in ([0.0, 0.0], [1.0, -1.5]):
        draws = posterior.sample(np.array(x), 20_000, seed=0)
        mean, sd = line_posterior(x)
        np.testing.assert_allclose(draws.mean(0), mean, atol=0.2 * sd.max())
        np.testing.assert_allclose(draws.std(0), sd, rtol=0.15)
        theta = mean + sd * np.array([[0.0, 0.0], [1.0, 0.0], [0.0, -1.0]])
        exact = stats.norm(mean, sd).logpdf(theta).sum(1)
        np.testing.assert_allclose(posterior.log_prob(theta, np.array(x)), exact, atol=0.3)
    if "trace" in settings:
        same = posterior.log_prob(np.tile(theta[:1, None], (3, 2, 1)), np.zeros((3, 2)))
        np.testing.assert_allclose(same, same[0, 0], atol=1e-4, err_msg="a density must not depend on its place in a batch")
    if not settings:
        assert sp.gate(run, progress=silent).passed
        batch = np.zeros((3, 2))
        assert posterior.sample(batch, 7, seed=1).shape == (3, 7, 2)
        assert posterior.log_prob(np.zeros((0, 2)), batch[0]).shape == (0,)
        assert np.array_equal(posterior.sample(batch, 7, seed=1), posterior.sample(batch, 7, seed=1))
