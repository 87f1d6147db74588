"""GNPE's chains and densities with exact conditionals in place of nets, whose laws are known in closed form; each check with its power."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch
from exact_nets import RATIOS, M, S, X, density, observed, of_location, sampler_of, theta_of
from scipy import integrate, special, stats

import sbiplat as sp
from sbiplat.gate import calibration
from sbiplat.observation import ObservationSpec
from sbiplat.posteriors import convergence, gnpe
from sbiplat.posteriors.base import Posterior
from sbiplat.posteriors.convergence import ChainError, Convergence, judging
from sbiplat.posteriors.recalibrated import Maps, RecalibratedSampler
from sbiplat.symmetry import Translation
from sbiplat.symmetry.frame import PROXY, Frame, Sight
from sbiplat.training.equivariant import predicted_steps
from simulators import location

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


def test_an_observation_beyond_the_prior_is_given_up_at_once():
    """Each step draws 127 times a chain there; one observation within the prior goes on to its end."""
    sampler = of_location(0.3 * S, prior=sp.Prior({"mu": sp.Uniform(-4, 4)}), told=False)
    x = observed(40.0, 0.0)
    with judging(sampler) as judged:
        sampler.sample({"x": x["x"][:1]}, 500, 0)
        assert sampler.diagnostics["gibbs_steps"] == 5
        sampler.sample(x, 500, 0)
    assert sampler.diagnostics["gibbs_steps"] > 20
    assert judged[1].tolist() == [True, False]
    with pytest.raises(ChainError, match="found no draw within the prior; see whether x is of the kind"):
        sampler.sample({"x": x["x"][:1]}, 500, 0)


# ------------------------------------------------------------------------------------------------ adaptive kernels


FLAT = sp.Prior({"mu": sp.Uniform(-500, 500)})
FAINT = {"x": np.array([[1.0, 1.2], [-40.0, -20.0], [7.0, 7.02]])}  # m - s and m + s: posteriors N(m, s^2) under a flat prior


def of_pair(told=lambda log_f: log_f, ratio=0.5):
    """The exact conditional where the kernel is `ratio` s(x) wide and the net is told log f = log s(x); told: what it makes of that."""
    def moments(x):
        return x["x"].mean(-1, keepdim=True), (x["x"][:, 1:] - x["x"][:, :1]).abs() / 2

    def main(x):
        mean, s = moments(x)
        log_f = x[PROXY][:, :1]
        share = 1 / (1 + (s / (ratio * told(log_f).exp())).square())  # kappa^2 / (s^2 + kappa^2)
        f = log_f.exp()
        return share * mean / f, share.sqrt() * s / f

    def initial(x):
        mean, s = moments(x)
        return mean + 5 * s, 3 * s

    frame = Frame(Translation(("mu",)), FLAT, (ratio,), (False,), adaptive=True)
    return sampler_of(frame, initial, main, sight=lambda x: Sight(moments(x)[1].log(), moments(x)[0]))


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
    found = Posterior(FLAT, ObservationSpec.declare((2,), "float64", "none"), sampler).density(grid[..., None], FAINT)
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


def blind(law, ratio=0.5, unit=1e-3):
    """A main net that sees nothing of x, `law` of u / unit being all that it makes of what it is told: log f = log s(x) / unit, and the
    centre m(x) from the proxy, in widths of the kernel."""
    def initial(x):
        return x["x"].mean(-1, keepdim=True), (x["x"][:, 1:] - x["x"][:, :1]).abs() / 2

    def main(x):
        mean, sd = law(x[PROXY][:, 1:])
        return unit * mean, unit * sd

    frame = Frame(Translation(("mu",)), FLAT, (ratio * unit,), (False,), adaptive=True)
    return sampler_of(frame, initial, main, sight=lambda x: Sight((initial(x)[1] / unit).log(), initial(x)[0]), most_steps=100)


def test_a_net_that_sees_nothing_itself_still_has_the_initial_nets_law():
    """u given the centre's place c from the proxy: N(kappa c share, share s^2), in units of s, with share = kappa^2 / (s^2 + kappa^2)."""
    share = 0.5**2 / (1 + 0.5**2)
    theta = theta_of(blind(lambda c: (share * 0.5 * c, torch.full_like(c, math.sqrt(share)))).sample(FAINT, 4000, 0), FLAT)
    m, s = FAINT["x"].mean(1), np.ptp(FAINT["x"], axis=1) / 2
    assert all(stats.kstest(theta[k], stats.norm(m[k], s[k]).cdf).pvalue > 1e-3 for k in range(3))


def test_power_a_net_that_is_not_told_where_the_pose_is_wanders_off():
    """All that it knows of u is the kernel, and chains of the kernel are a random walk."""
    with pytest.raises(ChainError, match="have not converged"):
        blind(lambda c: (torch.zeros_like(c), torch.full_like(c, 0.5))).sample(FAINT, 4000, 0)


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
