"""GNPE where the prior has edges, on circles and in products of actions, against known posteriors."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
import torch
from exact_nets import LOG_2PI, Gaussian, M, S, X, density, observed, of_location, sampler_of, theta_of
from scipy import integrate, special, stats

import sbiplat as sp
from sbiplat.observation import ObservationSpec
from sbiplat.posteriors.base import Posterior
from sbiplat.posteriors.convergence import ChainError
from sbiplat.posteriors.gnpe import GNPESampler
from sbiplat.symmetry import GroupAction, Permutation, Phase, Product, Rotation2D
from sbiplat.symmetry.frame import PROXY, Frame
from simulators import location

# ------------------------------------------------------------------------------------------- the prior's edges and slope


EDGED = sp.Prior({"mu": sp.Uniform(0, 20)})


@pytest.mark.parametrize("mu", [0.0, 0.3, 5.0])
def test_at_a_hard_edge_of_a_flat_prior_dropping_the_proxy_stays_exact(mu):
    """Relative coordinates in training know nothing of the edge, so a net without the proxy learns the conditional under a flat prior; what
    it draws beyond the edge is drawn again, and the chain's law is the truncated posterior, density and all."""
    sampler, x = of_location(0.5 * S, off=1.0, prior=EDGED, told=False), observed(mu, seed=2)
    centre, sd = float(x["x"].mean()), 1 / math.sqrt(location.COUNT)
    law = stats.truncnorm((0 - centre) / sd, (20 - centre) / sd, centre, sd)
    z = sampler.sample(x, 4000, 0)
    theta = theta_of(z, EDGED)[0]
    assert theta.min() > 0
    assert stats.kstest(theta, law.cdf).statistic < 0.02 + 2 / math.sqrt(4000)
    grid = np.linspace(0, 5 * sd + max(centre, 0.0) + sd, 400)[1:]
    log_q = density(sampler, grid, x, EDGED)
    assert integrate.trapezoid(np.exp(log_q), grid) == pytest.approx(1, abs=0.03)
    bulk = law.logpdf(grid) > law.logpdf(law.ppf(0.5)) - 2
    assert np.sqrt(np.mean((log_q - law.logpdf(grid))[bulk] ** 2)) < 0.15
    posterior = Posterior(EDGED, location.location.x, sampler)
    with_likelihood = posterior.importance(x["x"][0], 4000, log_likelihood=location.log_likelihood, seed=1)
    evidence = integrate.quad(lambda t: math.exp(location.log_likelihood(np.array([[t]]), x["x"][0])[0]) / 20, 0, 20, points=[max(centre, 0.1)])[0]
    assert with_likelihood.log_evidence == pytest.approx(math.log(evidence), abs=5 * with_likelihood.log_evidence_error + 1e-3)
    assert stats.kstest(with_likelihood.resample(2000)[:, 0], law.cdf).pvalue > 1e-3


def test_chains_that_find_no_draw_within_the_prior_are_refused():
    """An x whose posterior under a flat prior lies some forty of its sds beyond the edge: what is clipped to the edge is no draw."""
    prior = sp.Prior({"mu": sp.Uniform(-20, 20)})
    sampler = of_location(0.5 * S, off=0.0, wide=1.0, prior=prior, told=False, most_steps=20)
    sampler.judged = []
    sampler.sample(observed(40.0, 1.0), 200, 0)
    assert sampler.judged[0].tolist() == [True, False]
    sampler.judged = None
    with pytest.raises(ChainError, match="found no draw within the prior"):
        sampler.sample(observed(40.0), 200, 0)


def test_without_its_mass_inside_the_density_at_an_edge_would_be_too_low(monkeypatch):
    """Power of the test above."""
    x, grid = observed(0.0, seed=2), np.linspace(0, 4, 400)[1:]
    sampler = of_location(0.5 * S, off=1.0, prior=EDGED, told=False)
    monkeypatch.setattr(GNPESampler, "_log_tries", lambda self, x, proxy, edged, generator: torch.zeros(proxy.shape[:2], dtype=torch.float64))
    assert integrate.trapezoid(np.exp(density(sampler, grid, x, EDGED)), grid) < 0.9


def test_a_sloping_prior_needs_the_proxy_or_weights():
    """Without the proxy the chain's law is the posterior under a flat prior, however narrow the kernel: off by s d log p / d theta sd."""
    scale = 1.0
    prior = sp.Prior({"mu": sp.Normal(0, scale)})
    v = 1 / (scale**-2 + location.COUNT)
    x = observed(2.0)
    law = stats.norm(v * x["x"].sum(), math.sqrt(v))
    told = theta_of(of_location(0.5 * S, off=0.3, prior=prior, scale=scale).sample(x, 4000, 0), prior)[0]
    assert abs(told.mean() - law.mean()) < (0.05 + 4 / math.sqrt(4000)) * law.std()
    for ratio in (0.2, 1.0):
        sampler = of_location(ratio * S, off=0.3, prior=prior, told=False)
        dropped = theta_of(sampler.sample(x, 4000, 0), prior)[0]
        assert stats.kstest(dropped, stats.norm(x["x"].mean(), 1 / math.sqrt(location.COUNT)).cdf).statistic < 0.02 + 2 / math.sqrt(4000)
        assert (dropped.mean() - law.mean()) / law.std() > 0.5
        weighted = Posterior(prior, location.location.x, sampler).importance(x["x"][0], 4000, log_likelihood=location.log_likelihood, seed=1)
        assert stats.kstest(weighted.resample(1000)[:, 0], law.cdf).pvalue > 1e-3


# ------------------------------------------------------------------------------------------------------- circles


CELLS = 720


@dataclass
class Cells:
    """A net over one coordinate whose density is constant over cells of (-half, half), given their logs: `heights` of fields and middles."""

    heights: Any
    half: float

    def prepare(self, x):
        return x

    @property
    def middles(self):
        return ((torch.arange(CELLS, dtype=torch.float64) + 0.5) / CELLS * 2 - 1) * self.half

    def context(self, x):
        return torch.log_softmax(self.heights(x, self.middles), -1)

    def draws(self, context, n, generator):
        cell = torch.multinomial(context.exp(), n, replacement=True, generator=generator)
        within = torch.rand(cell.shape, generator=generator, dtype=torch.float64)
        return (((cell + within) / CELLS * 2 - 1) * self.half)[..., None]

    def densities(self, u, context):
        cell = ((u[:, 0].double() / self.half + 1) / 2 * CELLS).long().clamp(0, CELLS - 1)
        return context.gather(1, cell[:, None])[:, 0] - math.log(2 * self.half / CELLS)


def on_a_circle(action, order, width, net=None, most_steps=400):
    """The sampler of a direction x = (cos, sin)(order phi) + noise of sd 1/2 with its exact conditional, and its prior."""
    prior = sp.Prior({"phi": sp.Uniform(0, action.period)})

    def heights(x, u):
        """log p(x' | u) + log K(e | u)."""
        a, b = x["x"].unbind(-1)
        widths = torch.tensor([width], dtype=torch.float64)
        kernel = action.log_kernel(action.identity(CELLS), action.exp(u[:, None]), widths)
        return 4 * (a[:, None] * (order * u).cos() + b[:, None] * (order * u).sin()) + kernel

    def initial(x):
        return torch.atan2(x["x"][:, 1:], x["x"][:, :1]) / order, torch.full((len(x["x"]), 1), 0.5, dtype=torch.float64)

    frame = Frame(action, prior, (width,), (False,))
    sampler = sampler_of(frame, initial, None, most_steps)
    law = net or Cells(heights, action.period / 2)
    sampler.inner = sampler.estimator.main = law
    return sampler, prior


PAIR = ObservationSpec.declare((2,), "float64", "none")
CIRCLES = pytest.mark.parametrize(("action", "order"), [(Rotation2D("phi", low=0.0), 1), (Phase("phi", order=2, fold=2, low=0.0), 2)],
                                  ids=["a whole turn", "half turns"])


def posterior_on(theta, x, order):
    """p(phi | x) of theta (n,): von Mises."""
    a, b = x["x"][0]
    size, place = 4 * math.hypot(a, b), math.atan2(b, a)
    return stats.vonmises.logpdf(order * theta - place, size) + math.log(order)


@CIRCLES
@pytest.mark.parametrize("at", [0.05, 1.0])
def test_on_a_circle_draws_wrap_and_the_density_is_the_posteriors(action, order, at):
    """At 0.05 the posterior lies on both sides of where the angle wraps."""
    sampler, prior = on_a_circle(action, order, 0.2)
    x = {"x": np.array([[math.cos(order * at), math.sin(order * at)]])}
    theta = theta_of(sampler.sample(x, 4000, 0), prior)[0]
    assert theta.min() >= 0
    assert theta.max() <= action.period
    assert sampler.diagnostics["unconverged"] == 0
    assert sampler.diagnostics["gibbs_rho_theory"] < 0.9, "chains on both sides of the wrap are no two modes"
    if at < 0.1:
        assert 0.2 < (theta > action.period / 2).mean() < 0.8
    standard = stats.vonmises.cdf((order * (theta - at) + math.pi) % (2 * math.pi) - math.pi, 4)
    assert stats.kstest(standard, "uniform").statistic < 0.02 + 2 / math.sqrt(4000)
    grid = (np.arange(400) + 0.5) / 400 * action.period
    log_q = density(sampler, grid, x, prior)
    wanted = posterior_on(grid, x, order)
    assert np.exp(log_q).mean() * action.period == pytest.approx(1, abs=0.03)
    bulk = wanted > wanted.max() - 3
    assert np.sqrt(np.mean((log_q - wanted)[bulk] ** 2)) < 0.15


@CIRCLES
def test_weights_on_a_circle_give_the_evidence(action, order):
    sampler, prior = on_a_circle(action, order, 0.3)
    x = np.array([math.cos(0.05), math.sin(0.05)])

    def log_likelihood(theta, x):
        return stats.norm(x[0], 0.5).logpdf(np.cos(order * theta[:, 0])) + stats.norm(x[1], 0.5).logpdf(np.sin(order * theta[:, 0]))

    found = Posterior(prior, PAIR, sampler).importance(x, 2000, log_likelihood=log_likelihood, seed=1)
    theta = (np.arange(2000) + 0.5) / 2000 * action.period
    evidence = special.logsumexp(log_likelihood(theta[:, None], x)) - math.log(2000)
    assert found.efficiency > 0.9
    assert found.log_evidence == pytest.approx(evidence, abs=5 * found.log_evidence_error + 1e-3)


def test_a_net_that_reaches_once_around_a_circle_is_drawn_again_and_its_density_normalised():
    """A Gaussian far wider than the circle: uniform on it, and all that it has beyond half a turn counts as outside."""
    wide = Gaussian(lambda x: (torch.zeros(len(x["x"]), 1, dtype=torch.float64), torch.full((len(x["x"]), 1), 4.0, dtype=torch.float64)))
    sampler, prior = on_a_circle(Rotation2D("phi", low=0.0), 1, 1.0, wide)
    x = {"x": np.zeros((1, 2))}
    grid = (np.arange(200) + 0.5) / 200 * 2 * math.pi
    assert np.exp(density(sampler, grid, x, prior)).mean() * 2 * math.pi == pytest.approx(1, abs=0.05)
    _, log_q, log_kernel = sampler.sample_and_log_prob(x, 2000, 0)
    kept = np.isfinite(log_kernel[0])
    share = 2 * stats.norm.cdf(math.pi / 4) - 1
    assert kept.mean() == pytest.approx(share, abs=0.05), "draws beyond half a turn weigh nothing"
    assert np.isfinite(log_q).all()


# ------------------------------------------------------------------------------------------------------ products


class Common(GroupAction):
    """Both fields move by as much as t."""

    parameters = ("t",)

    def act_data(self, g, x):
        return {k: v + g.to(v) for k, v in x.items()}


class Delay(GroupAction):
    """The second field alone moves by c, its delay behind the first: a derived pose, which moves no parameter."""

    parameters, coordinates = ("c",), ("delay",)
    exact = moves = False

    def act_data(self, g, x):
        return {**x, "b": x["b"] + g.to(x["b"])}


TWO = sp.Prior({"t": sp.Normal(0, 100), "c": sp.Normal(0, 3)})
KAPPA = (0.3, 0.2)
BOTH = ObservationSpec.declare({"a": (5,), "b": (5,)}, "float64", "none")


def of_two():
    """a_i = t + noise and b_i = t + c + noise, by a common shift, dropped, and the delay, told: with the exact conditional."""
    precision = torch.tensor([[10 + KAPPA[0] ** -2, 5], [5, 5 + KAPPA[1] ** -2 + 1 / 9]], dtype=torch.float64)
    root = torch.linalg.cholesky(precision)

    class Pair(Gaussian):
        def draws(self, context, n, generator):
            noise = torch.randn(len(context), n, 2, generator=generator, dtype=torch.float64)
            values = context[:, None] + torch.linalg.solve_triangular(root.mT, noise.mT, upper=True).mT
            return (values / torch.tensor([1.0, 3.0])).float()

        def densities(self, u, context):
            gap = (u.double() * torch.tensor([1.0, 3.0]) - context) @ root
            return -0.5 * gap.square().sum(-1) + root.diagonal().log().sum() + math.log(3) - LOG_2PI

    def mean(x):
        assert x[PROXY].shape[1] == 1
        a, b = x["a"].sum(-1), x["b"].sum(-1) + 5 * x[PROXY][:, 0]
        return (torch.linalg.solve(precision, torch.stack([a + b, b + x[PROXY][:, 0] / KAPPA[1] ** 2], -1).mT).mT,)

    def initial(x):
        first = x["a"].mean(-1) + 1
        return torch.stack([first, x["b"].mean(-1) - first], -1), torch.full((len(first), 2), 0.6, dtype=torch.float64)

    sampler = sampler_of(Frame(Product(Common(), Delay()), TWO, KAPPA, (False, True)), initial, None)
    sampler.inner = sampler.estimator.main = Pair(mean)
    return sampler


def test_a_product_of_an_exact_shift_and_a_told_delay_has_the_right_posterior():
    rng = np.random.default_rng(3)
    x = {"a": 40 + rng.standard_normal((1, 5)), "b": 42 + rng.standard_normal((1, 5))}
    precision = np.array([[10 + 1e-4, 5], [5, 5 + 1 / 9]])
    a, b = x["a"].sum(), x["b"].sum()
    mean, covariance = np.linalg.solve(precision, [a + b, b]), np.linalg.inv(precision)
    sampler = of_two()
    theta = TWO.constrain(sampler.sample(x, 4000, 0).astype(float))[0]
    for k in range(2):
        sd = math.sqrt(covariance[k, k])
        assert stats.kstest(theta[:, k], stats.norm(mean[k], sd).cdf).statistic < 0.02 + 2 / math.sqrt(4000)
        assert stats.kstest(theta[:, k] + 0.2 * sd, stats.norm(mean[k], sd).cdf).statistic > 0.02 + 2 / math.sqrt(4000), "power"
    correlation = covariance[0, 1] / math.sqrt(covariance[0, 0] * covariance[1, 1])
    assert np.arctanh(np.corrcoef(theta.T)[0, 1]) == pytest.approx(math.atanh(correlation), abs=5 / math.sqrt(4000))
    law = stats.multivariate_normal(mean, covariance)
    points = law.rvs(300, random_state=2)
    posterior = Posterior(TWO, BOTH, sampler)
    error = posterior.density(points[None], x)[0] - law.logpdf(points)
    assert abs(error.mean()) < 0.05
    assert error.std() < 0.25

    def log_likelihood(theta, x):
        return stats.norm.logpdf(x["a"] - theta[:, :1]).sum(-1) + stats.norm.logpdf(x["b"] - theta.sum(-1, keepdims=True)).sum(-1)

    found = posterior.importance({k: v[0] for k, v in x.items()}, 4000, log_likelihood=log_likelihood, seed=1)
    design = np.concatenate([np.tile([1.0, 0.0], (5, 1)), np.tile([1.0, 1.0], (5, 1))])
    evidence = stats.multivariate_normal(np.zeros(10), np.eye(10) + design @ np.diag([100.0**2, 9.0]) @ design.T)
    assert found.log_evidence == pytest.approx(evidence.logpdf(np.concatenate([x["a"][0], x["b"][0]])), abs=5 * found.log_evidence_error + 1e-3)
    assert found.efficiency > 0.9


def test_a_set_in_a_product_leaves_the_law_as_it_is():
    """A Permutation has no coordinates: the product's are those of the translation alone."""
    sampler = of_location(S, off=1.0)
    frame = sampler.frame
    product = Product(Permutation(), frame.action)
    both = GNPESampler(sampler.estimator, sampler.inner)
    both.frame = both.estimator.frame = replace(frame, action=product)
    both = GNPESampler(both.estimator, both.inner)
    theta = theta_of(both.sample(X, 4000, 0))[0]
    assert stats.kstest(theta, stats.norm(M, S).cdf).statistic < 0.02 + 2 / math.sqrt(4000)
    grid = M + S * np.linspace(-3, 3, 50)
    np.testing.assert_allclose(density(both, grid, {"x": X["x"][:, ::-1]}), density(sampler, grid, X), atol=0.5)
