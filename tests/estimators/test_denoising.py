"""Score and flow matching as one regression: the losses are those of the literature, written in the house's coordinates."""

import math

import numpy as np
import pytest
import torch

from sbiplat.estimators.base import Architecture, find
from sbiplat.estimators.denoising import LEAST, MOST
from sbiplat.observation import ObservationSpec


def made(name, **settings):
    """An estimator of two parameters with a field that is not 0."""
    shape = find(name).settings_class(embedding="none", hidden=16, blocks=1, **settings)
    estimator = Architecture(name, shape, 2, ObservationSpec.declare((3,)), True).build(0)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in estimator.field.parameters():
            p.add_(0.2 * torch.randn(p.shape, generator=generator))
    return estimator


@pytest.mark.parametrize(("path", "constant"), [("linear", 1.0), ("vp", (math.pi / 2) ** 2)])
def test_flow_matchings_squared_error_of_the_velocity_is_the_fields_with_the_stated_weight(path, constant):
    """|v_pred - v|^2 = weight(s) |F - F*|^2 on the linear path; on the other the weight is constant."""
    estimator, generator = made("fmpe", path=path), torch.Generator().manual_seed(2)
    w, noise = (torch.randn(5, 4, 2, generator=generator) for _ in range(2))
    conditions = estimator.field.conditions(torch.randn(5, estimator.width, generator=generator))
    for time in (0.02, 0.2, 0.5, 0.8, 0.97):
        half = 0.5 * math.pi
        alpha, sigma, d_alpha, d_sigma = (1 - time, time, -1.0, 1.0) if path == "linear" else (
            math.cos(half * time), math.sin(half * time), -half * math.sin(half * time), half * math.cos(half * time))
        s = torch.full((1, 1, 1), sigma / alpha)
        t = s.atan()
        with torch.no_grad():
            v = estimator.velocity(alpha * w + sigma * noise, torch.full((1, 1, 1), time), conditions)
            F = estimator.velocity_back(t.cos() * w + t.sin() * noise, t, conditions)
        of_velocity = (v - (d_alpha * w + d_sigma * noise)).square().sum(-1)
        of_field = (F - (t.sin() * w - t.cos() * noise)).square().sum(-1)
        assert float(of_field.mean()) > 0.1, "the net is not yet right"
        torch.testing.assert_close(of_velocity, constant * estimator.weight(s)[..., 0] * of_field, rtol=1e-3, atol=1e-4)


def test_the_loss_of_fmpe_is_conditional_flow_matching():
    """The mean over `noises` times t = u^p of |v_pred - v|^2, with the loss's own draws."""
    estimator, generator = made("fmpe", noises=3, time_power=1.5), torch.Generator().manual_seed(3)
    theta, x = torch.randn(6, 2, generator=generator), {"x": torch.randn(6, 3, generator=generator)}
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(4)
        found = estimator.loss(theta, x)
        torch.manual_seed(4)
        u = (torch.rand(6, 1, 1) + torch.arange(3)[:, None] / 3) % 1
        noise = torch.randn(6, 3, 2)
    with torch.no_grad():
        context = estimator.context(x)
        t, at = u**1.5, estimator.whiten(theta, context)[:, None]
        v = estimator.velocity((1 - t) * at + t * noise, t, estimator.field.conditions(context))
        expected = (v - (noise - at)).square().sum(-1).mean(1)
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("schedule", ["edm", "vp", "ve"])
def test_the_likelihood_weighting_has_mean_about_one_over_its_schedule(schedule):
    """The integral of 1 / (1 + s^2) over log s, from LEAST to MOST, is log 1 / LEAST: less what the clamp at 10 takes away.

    Below the level s* where the clamp sets in, log(s* / LEAST) of the integral is replaced by 10 times the chance of such a level.
    """
    estimator = made("npse", schedule=schedule, weighting="likelihood")
    u = (torch.arange(400_000, dtype=torch.float64) + 0.5) / 400_000
    s = estimator.levels(u.clamp(1e-6, 1 - 1e-6)).clamp(LEAST, MOST)
    weight = estimator.weight(s).numpy()
    capped = weight >= 10.0 - 1e-9
    lost = np.log(s.numpy()[capped].max() / LEAST) / np.log(1 / LEAST) - 10 * capped.mean() if capped.any() else 0.0
    assert weight.mean() == pytest.approx(1 - lost, abs=0.01)  # the sum over u, and levels beyond MOST, which `vp` and `edm` draw
    assert 0.65 < weight.mean() < 1.01
