"""GNPE's chains and densities with exact conditionals in place of nets, whose laws are known in closed form; each check with its power."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from scipy import integrate, special, stats

import sbiplat as sp
from sbiplat.errors import SettingError
from sbiplat.gate import calibration
from sbiplat.observation import ObservationSpec
from sbiplat.posteriors import convergence, gnpe
from sbiplat.posteriors.base import Posterior
from sbiplat.posteriors.convergence import ChainError, Convergence, judging
from sbiplat.posteriors.gnpe import GNPESampler
from sbiplat.posteriors.of_run import from_run
from sbiplat.posteriors.recalibrated import Maps, RecalibratedSampler
from sbiplat.progress import silent
from sbiplat.symmetry import GroupAction, Permutation, Phase, Product, Rotation2D, Translation
from sbiplat.symmetry.frame import PROXY, Frame
from sbiplat.training.equivariant import predicted_steps
from simulators import location

S = math.sqrt(location.VARIANCE)
LOG_2PI = math.log(2 * math.pi)


# ------------------------------------------------------------------------------------------- exact nets


@dataclass
class Gaussian:
    """A net whose law given fields is N(mean, sd^2), coordinate by coordinate: `moments` of fields (R, ...) gives both, (R, D)."""

    moments: Any

    def prepare(self, x):
        return x

    prepare_differentiably = prepare

    def context(self, x):
        return torch.cat(self.moments(x), -1)

    def sample(self, context, n, generator):
        mean, sd = context.chunk(2, -1)
        noise = torch.randn(len(context), n, mean.shape[-1], generator=generator, dtype=torch.float64)
        return mean[:, None] + sd[:, None] * noise

    def draws(self, context, n, generator):
        return self.sample(context, n, generator).float()

    def densities(self, u, context):
        mean, sd = context.chunk(2, -1)
        return (-0.5 * ((u.double() - mean) / sd).square() - sd.log() - 0.5 * LOG_2PI).sum(-1)


def sampler_of(frame, initial, main, most_steps=400, stretch=None):
    """The sampler of an estimator with these laws of the pose and of u given x'."""
    law = Gaussian(main)
    net = SimpleNamespace(frame=frame, most_steps=most_steps, initial=SimpleNamespace(net=Gaussian(initial), prepare=lambda x: x), main=law,
                          stretch=stretch or (lambda x: None))
    net.eval = lambda: net
    return GNPESampler(net, law)


def of_location(width, *, off=5.0, wide=3.0, prior=None, told=True, scale=location.SCALE, **more):
    """Of the location model: the exact conditional, and an initial net that is `off` sd off and so many times too wide. told: of the
    proxy, and so exact under the normal prior; else that of a flat prior."""
    v = 1 / (scale**-2 + location.COUNT) if told else 1 / location.COUNT
    share = width**2 / (v + width**2)

    def initial(x):
        mean = location.VARIANCE * x["x"].sum(-1, keepdim=True)
        return mean + off * S, torch.full_like(mean, wide * S)

    def main(x):
        proxy = x[PROXY] if told else 0.0
        mean = v * (x["x"].sum(-1, keepdim=True) + location.COUNT * proxy) - proxy  # of theta - proxy
        return share * mean, torch.full_like(mean, math.sqrt(share * v))

    frame = Frame(Translation(("mu",)), prior or location.location.prior, (width,), (told,))
    return sampler_of(frame, initial, main, **more)


def observed(*mu, seed=0):
    return {"x": np.random.default_rng(seed).standard_normal((len(mu), location.COUNT)) + np.array(mu)[:, None]}

def theta_of(z, prior=location.location.prior):
    return prior.constrain(np.asarray(z, float))[..., 0]


def density(sampler, theta, x, prior=location.location.prior):
    """log q(theta | x) of theta (n,) for one observation."""
    return Posterior(prior, location.location.x, sampler).density(np.asarray(theta)[None, :, None], x)[0]


X = observed(1.0)
M = float(location.posterior_mean(X["x"])[0])
RATIOS = pytest.mark.parametrize("ratio", [0.2, 0.5, 1.0, 3.0])


# --------------------------------------------------------------------------------------------- the chains


@RATIOS
def test_chains_have_the_law_that_theory_gives_them_and_stop_when_it_says(ratio):
    """From an initial net 5 sd off and 3 times too wide the law at step t is N(m + 5 s rho^t, v + 8 v rho^2t): its last two terms are what
    the rule leaves, less than a twentieth of an sd."""
    chains, rho, found = 4000, location.autocorrelation(ratio * S), []
    for seed in range(3):
        sampler = of_location(ratio * S)
        theta = theta_of(sampler.sample(X, chains, seed))[0]
        steps = sampler.diagnostics["gibbs_steps"]
        law = stats.norm(M + 5 * S * rho**steps, S * math.sqrt(1 + 8 * rho ** (2 * steps)))
        found.append(stats.kstest(theta, law.cdf).pvalue)
        assert predicted_steps(ratio) <= steps <= 1.1 * predicted_steps(ratio) + 2
        assert abs(theta.mean() - M) < (0.05 + 4 / math.sqrt(chains)) * S
        assert sampler.diagnostics["gibbs_rho"] == pytest.approx(rho, abs=5 * (1 - rho**2) / math.sqrt(chains) + 0.003)
        assert sampler.diagnostics["gibbs_rho_theory"] == pytest.approx(rho, abs=0.02)
        assert stats.kstest(theta, stats.norm(law.mean() + 0.2 * S, law.std()).cdf).pvalue < 1e-4, "power: a fifth of an sd is seen"
    assert stats.combine_pvalues(found).pvalue > 1e-3


def test_chains_that_stop_too_early_are_seen(monkeypatch):
    """Power of the test above: with a rule that lets them be two sd off, they are not at their law."""
    monkeypatch.setattr(convergence, "NEAR", 2.0)
    sampler = of_location(0.5 * S)
    theta = theta_of(sampler.sample(X, 4000, 0))[0]
    assert sampler.diagnostics["gibbs_steps"] < 12
    assert theta.mean() - M > 0.3 * S
    assert stats.kstest(theta, stats.norm(M, S).cdf).pvalue < 1e-6


def test_the_lag_one_autocorrelation_is_that_of_theory():
    """Of theta itself, over stationary chains, and not as the rule measures it."""
    sampler, rng = of_location(0.5 * S), torch.Generator().manual_seed(0)
    x = {k: torch.as_tensor(v) for k, v in X.items()}
    chains = 20_000
    theta = M + S * torch.randn(1, chains, 1, generator=rng, dtype=torch.float64)
    z, _, _ = sampler.conditional(x, sampler.frame.action.blur(theta[0], sampler.widths(x), rng)[None], rng)
    rho = location.autocorrelation(0.5 * S)
    assert np.arctanh(np.corrcoef(theta[0, :, 0], theta_of(z)[0])[0, 1]) == pytest.approx(math.atanh(rho), abs=4 / math.sqrt(chains))


def test_a_seed_fixes_the_draws_and_one_draw_is_enough():
    sampler = of_location(0.5 * S)
    x = observed(1.0, -7.0)
    first = sampler.sample(x, 1, 3)
    assert first.shape == (2, 1, 1)
    assert np.array_equal(first, sampler.sample(x, 1, 3))
    assert not np.array_equal(first, sampler.sample(x, 1, 4))
    assert np.array_equal(of_location(0.5 * S).log_prob(first, x), sampler.log_prob(first, x))


@pytest.mark.parametrize("rows_at_once", [None, 3 * 1000])
def test_observations_together_are_as_each_alone(rows_at_once, monkeypatch):
    """In law, also where they are drawn in parts."""
    if rows_at_once:
        monkeypatch.setattr(gnpe, "ROWS_AT_ONCE", rows_at_once)
    x = observed(-20.0, -3.0, 0.0, 1.0, 2.0, 4.0, 15.0)
    sampler = of_location(S, off=0.3)
    theta = theta_of(sampler.sample(x, 1000, 0))
    standard = (theta - location.posterior_mean(x["x"])[:, None]) / S
    found = [stats.kstest(row, "norm").pvalue for row in standard]
    assert stats.combine_pvalues(found).pvalue > 1e-3
    assert abs(np.corrcoef(standard)[np.triu_indices(7, 1)]).max() < 5 / math.sqrt(1000), "parts have streams of their own"
    log_q = sampler.log_prob(np.zeros((7, 1, 1), np.float32) + sampler.sample(x, 1, 1), x)
    alone = [sampler.log_prob(sampler.sample(x, 1, 1)[k:k + 1], {"x": x["x"][k:k + 1]})[0] for k in range(7)]
    assert abs(log_q - np.array(alone)).max() < 0.5


# ------------------------------------------------------------------------------------------ where they do not converge


def test_chains_that_have_not_converged_are_one_line():
    with pytest.raises(ChainError, match=r"have not converged after 3 steps .* wider kernel .*gibbs_steps") as told:
        of_location(0.1 * S, most_steps=3).sample(X, 100, 0)
    assert "\n" not in str(told.value)
    with pytest.raises(ChainError, match=r"of 7 of 7 observations \(0, 1, 2, 3, 4, \.\.\.\)"):
        of_location(0.1 * S, most_steps=3).sample(observed(*range(7)), 100, 0)
    with pytest.raises(ChainError):
        of_location(0.1 * S, most_steps=3).log_prob(np.zeros((1, 1, 1), np.float32), X)


def of_some(bad, **more):
    """The exact sampler, whose initial net is 70 sd off for the observations whose first number is above 30."""
    sampler = of_location(S, off=0.0, wide=1.0, most_steps=7, **more)
    good = sampler.estimator.initial.net.moments

    def initial(x):
        mean, sd = good(x)
        return mean + torch.where(x["x"][:, :1] > 30, 70 * S, 0.0), sd

    sampler.estimator.initial.net.moments = initial
    mu = np.zeros(200)
    mu[:bad] = 40
    return sampler, observed(*mu)


def test_few_observations_may_fail_in_a_batch_and_are_counted():
    sampler, x = of_some(3)
    sampler.sample(x, 100, 0)
    assert sampler.diagnostics["unconverged"] == 3
    sampler, x = of_some(5)
    with pytest.raises(ChainError, match=r"of 5 of 200 observations \(0, 1, 2, 3, 4\)"):
        sampler.sample(x, 100, 0)


def test_chains_that_stand_still_are_refused_with_figures_that_are_numbers():
    """An observation beyond all that the prior reaches: all poses are clipped to one number, whose correlation is 0 / 0."""
    x, sampler = observed(200.0, 300.0, -400.0), of_location(S, most_steps=5)
    with pytest.raises(ChainError, match=r"of 3 of 3 observations .* lag-1 correlation is \d\.\d+"):
        sampler.sample(x, 100, 0)
    assert math.isfinite(sampler.diagnostics["gibbs_rho"])


def test_the_gate_collects_what_has_not_converged_and_refuses():
    sampler, x = of_some(5)
    with judging(sampler) as judged:
        sampler.sample(x, 100, 0)
        sampler.log_prob(np.zeros((200, 1, 1), np.float32), x)
    assert sampler.judged is None
    assert np.array_equal(np.flatnonzero(np.any(judged, axis=0)), np.arange(5))
    verdict = calibration._chains(float(np.any(judged, axis=0).mean()), calibration.CalibrationCriteria())
    assert not verdict.passed
    assert "have not converged" in verdict.statement
    assert "kernel_ratio" in verdict.mend
    assert calibration._chains(0.015, calibration.CalibrationCriteria()).passed


def test_a_recalibrated_posterior_is_judged_once_an_observation():
    sampler, x = of_some(2)
    x = {"x": x["x"][:10]}
    knots = np.linspace(-2, 2, 7)[None]
    stretched = RecalibratedSampler(sampler, Maps(knots, 1.5 * knots))
    with judging(stretched) as judged:
        z = stretched.sample(x, 4000, 0)
    assert [len(part) for part in judged] == [10]
    assert np.array_equal(np.flatnonzero(judged[0]), [0, 1])
    with pytest.raises(ChainError):
        stretched.sample(x, 100, 0)
    assert theta_of(z)[2:].std(1) == pytest.approx(1.5 * S, rel=0.1)
    good = {"x": x["x"][2:3]}
    theta = np.linspace(-12, 12, 1201) * S + location.posterior_mean(good["x"])
    assert integrate.trapezoid(np.exp(density(stretched, theta, good)), theta) == pytest.approx(1, abs=0.05)


# -------------------------------------------------------------------------------------------------- densities


@pytest.mark.parametrize("ratio", [0.5, 1.0, 3.0])
def test_the_recovered_density_is_the_posteriors(ratio):
    sampler, law = of_location(ratio * S), stats.norm(M, S)
    error = density(sampler, theta := law.rvs(500, random_state=1), X) - law.logpdf(theta)
    assert abs(error.mean()) < 0.03
    assert error.std() < 0.1
    grid = M + S * np.linspace(-8, 8, 401)
    assert integrate.trapezoid(np.exp(density(sampler, grid, X)), grid) == pytest.approx(1, abs=0.02)


@RATIOS
def test_weights_with_the_proxys_law_give_the_evidence(ratio):
    """The joint of sample_and_log_prob: efficiency near 1 for exact conditionals; without the proxy's law the evidence is wrong."""
    sampler = of_location(ratio * S)
    posterior = Posterior(location.location.prior, location.location.x, sampler)
    found = posterior.importance(X["x"][0], 4000, simulator=location.location, seed=1)
    evidence = stats.multivariate_normal(np.zeros(location.COUNT), np.eye(location.COUNT) + location.SCALE**2).logpdf(X["x"][0])
    assert found.efficiency > 0.97
    assert found.log_evidence == pytest.approx(evidence, abs=5 * found.log_evidence_error + 1e-3)
    assert stats.kstest(found.resample(2000)[:, 0], stats.norm(M, S).cdf).pvalue > 1e-3
    z, log_q, log_kernel = sampler.sample_and_log_prob(X, 4000, 1)
    theta = theta_of(z)[0]
    log_target = location.log_likelihood(theta[:, None], X["x"][0]) + stats.norm.logpdf(z[0, :, 0].astype(float))
    assert special.logsumexp(log_target + log_kernel[0] - log_q[0]) - math.log(4000) == pytest.approx(found.log_evidence, abs=1e-5)
    assert abs(special.logsumexp(log_target - log_q[0]) - math.log(4000) - evidence) > 0.2, "power: without the proxy's law"


# ------------------------------------------------------------------------------------------------ adaptive kernels


FLAT = sp.Prior({"mu": sp.Uniform(-500, 500)})
FAINT = {"x": np.array([[1.0, 1.2], [-40.0, -20.0], [7.0, 7.02]])}  # m - s and m + s: posteriors N(m, s^2) under a flat prior


def of_pair(told=lambda log_f: log_f, ratio=0.5):
    """The exact conditional where the kernel is `ratio` s(x) wide and the net is told log f = log s(x); told: what it makes of that."""
    def moments(x):
        return x["x"].mean(-1, keepdim=True), (x["x"][:, 1:] - x["x"][:, :1]).abs() / 2

    def main(x):
        mean, s = moments(x)
        share = 1 / (1 + (s / (ratio * told(x[PROXY]).exp())).square())  # kappa^2 / (s^2 + kappa^2)
        f = x[PROXY].exp()
        return share * mean / f, share.sqrt() * s / f

    def initial(x):
        mean, s = moments(x)
        return mean + 5 * s, 3 * s

    frame = Frame(Translation(("mu",)), FLAT, (ratio,), (False,), adaptive=True)
    return sampler_of(frame, initial, main, stretch=lambda x: moments(x)[1].log())


def test_an_adaptive_kernel_is_exact_and_takes_as_many_steps_whatever_the_spread():
    sampler, steps = of_pair(), []
    m, s = FAINT["x"].mean(1), np.ptp(FAINT["x"], axis=1) / 2
    theta = theta_of(sampler.sample(FAINT, 4000, 0), FLAT)
    for k in range(3):
        assert stats.kstest(theta[k], stats.norm(m[k], s[k]).cdf).pvalue > 1e-3
        sampler.sample({"x": FAINT["x"][k:k + 1]}, 4000, 0)
        steps.append(sampler.diagnostics["gibbs_steps"])
        assert sampler.diagnostics["gibbs_rho"] == pytest.approx(0.8, abs=0.03)
        assert sampler.diagnostics["gibbs_rho_theory"] == pytest.approx(0.8, abs=0.03)
    assert max(steps) - min(steps) <= 2
    grid = m[:, None] + np.linspace(-2, 2, 25) * s[:, None]
    found = Posterior(FLAT, PAIR, sampler).density(grid[..., None], FAINT)
    np.testing.assert_allclose(found, stats.norm(m[:, None], s[:, None]).logpdf(grid), atol=0.2)


def test_the_joint_density_of_an_adaptive_kernel_is_that_of_its_draws():
    """Weights of p(theta | x) K(proxy | theta) / q(theta, proxy) are 1."""
    z, log_q, log_kernel = of_pair().sample_and_log_prob(FAINT, 2000, 0)
    theta, m, s = theta_of(z, FLAT), FAINT["x"].mean(1), np.ptp(FAINT["x"], axis=1) / 2
    target = stats.norm(m[:, None], s[:, None]).logpdf(theta) + math.log(1000) + stats.norm.logpdf(z[..., 0].astype(float))
    weight = np.exp(target + log_kernel - log_q)
    np.testing.assert_allclose(weight.mean(1), 1.0, atol=0.05)
    assert (weight.mean(1) ** 2 / (weight**2).mean(1) > 0.95).all()


def test_power_a_net_that_is_told_another_width_has_another_law():
    sampler = of_pair(told=lambda log_f: log_f - math.log(2))
    m, s = FAINT["x"].mean(1), np.ptp(FAINT["x"], axis=1) / 2
    theta = theta_of(sampler.sample(FAINT, 4000, 0), FLAT)
    assert all(stats.kstest(theta[k], stats.norm(m[k], s[k]).cdf).pvalue < 1e-4 for k in range(3))


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


# ----------------------------------------------------------------------------------------------- facts in files


def test_files_of_draws_name_the_chain_with_its_steps():
    posterior = Posterior(location.location.prior, location.location.x, of_location(0.5 * S))
    facts = posterior.to_arviz(X["x"][0], 500, seed=1).posterior.attrs
    assert facts["gibbs_steps"] == pytest.approx(21, abs=6)
    assert float(facts["gibbs_rho"]) == pytest.approx(0.8, abs=0.05)
    assert float(facts["gibbs_rho_theory"]) == pytest.approx(0.8, abs=0.05)
    chain = json.loads(facts["chain"], parse_constant=lambda name: pytest.fail(name))
    gibbs = next(step for step in chain if step["name"] == "gibbs")
    assert gibbs["steps"][0]["widths"] == {"mu": pytest.approx(0.5 * S)}
    assert next(step for step in chain if step["step"] == "recovery")["fit"] == "mixture of 512 kernels about the chains' poses"
    assert len(facts["chain"]) < 3000


# ---------------------------------------------------------------------------------------------- trained nets


def trained(folder, rows, simulator=location.location, **settings):
    bank = sp.simulate(simulator, rows, 1, folder / "bank", workers=1, progress=silent)
    return sp.train(bank, "npe", out=folder / "run", simulator=simulator, symmetry="gnpe", progress=silent, embedding_hidden=[32], context=8,
                    **{"flow": "gaussian", "batch_size": 128, **settings})


def with_width(run):
    """rho of theory for the kernel of a run on the location model."""
    return location.autocorrelation(run.architecture.symmetry["widths"][0])


def test_chains_of_trained_flows_have_the_known_law_and_autocorrelation(tmp_path):
    run = trained(tmp_path, 2000, max_epochs=15)
    posterior = from_run(run)
    theta = posterior.sample(X["x"][0], 4000, seed=0)[:, 0]
    facts = posterior.facts
    assert facts["gibbs_rho"] == pytest.approx(with_width(run), abs=0.08)
    assert facts["gibbs_rho_theory"] == pytest.approx(with_width(run), abs=0.08)
    assert stats.kstest(theta, stats.norm(M, S).cdf).statistic < 0.1
    assert stats.kstest(theta, stats.norm(0, 10).cdf).statistic > 0.3, "power: the prior is seen"


@pytest.mark.science
def test_chains_of_well_trained_flows_have_the_known_law_and_autocorrelation_to_a_hundredth(tmp_path):
    run = trained(tmp_path, 40_000, flow="nsf", batch_size=256, max_epochs=60)
    posterior, found = from_run(run), []
    for seed, mu in enumerate((-10.0, 0.0, 8.0)):
        x = observed(mu, seed=seed)["x"][0]
        theta = posterior.sample(x, 10_000, seed=seed)[:, 0]
        assert stats.kstest(theta, stats.norm(location.posterior_mean(x), S).cdf).statistic < 0.03
        found.append(posterior.facts["gibbs_rho"])
    assert np.mean(found) == pytest.approx(with_width(run), abs=0.02)


def test_a_set_in_a_product_trains_and_alone_is_refused(tmp_path):
    def simulator(symmetry):
        made = sp.simulator(prior=location.location.prior, x_shape=(location.COUNT,), batched=True, symmetry=symmetry, name="set")
        return made(lambda theta, rng: theta + rng.standard_normal((len(theta), location.COUNT)))

    (tmp_path / "alone").mkdir()
    with pytest.raises(SettingError, match=r"Permutation has no pose .*deepset") as told:
        trained(tmp_path / "alone", 500, simulator(Permutation()))
    assert "\n" not in str(told.value)
    posterior = from_run(trained(tmp_path, 2000, simulator(Product(Permutation(), Translation("mu"))), max_epochs=15))
    theta = posterior.sample(X["x"][0], 2000, seed=0)[:, 0]
    assert stats.kstest(theta, stats.norm(M, S).cdf).statistic < 0.15


def test_a_few_chains_in_a_far_mode_do_not_hide_that_the_others_have_converged():
    """One chain in a hundred stays a hundred standard deviations off: the plain correlation is then near 1 whatever the others do."""
    generator, rho = torch.Generator().manual_seed(3), 0.6
    far = 100.0 * (torch.arange(2000) % 100 == 0)[None, :, None]
    near = torch.randn(1, 2000, 1, generator=generator, dtype=torch.float64)
    watch = Convergence(Translation(("mu",)), lambda x: torch.ones(1, 1, dtype=torch.float64), 100).watch(None, {"pose": near + far})
    for _ in range(30):
        before = near
        near = rho * near + math.sqrt(1 - rho**2) * torch.randn(near.shape, generator=generator, dtype=torch.float64)
        if watch.done({"pose": near + far}).all():
            break
    assert watch.figures["steps"][0] < 20
    assert watch.figures["rho"][0] == pytest.approx(rho, abs=0.06)
    assert np.corrcoef((before + far).flatten(), (near + far).flatten())[0, 1] > 0.99, "what it would be of all chains alike"
