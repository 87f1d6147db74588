"""The gate on posteriors whose truth is known: the exact one is certified, every broken one is refused, by the criterion that is made for it."""

import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

import sbiplat as sp
from sbiplat.diagnostics.coverage import bootstrap_weights, cauchy, coverage, distances, holm, outside_figures, ranks, uniformity_p_value
from sbiplat.diagnostics.held_out import held_out_figures
from sbiplat.gate.calibration import decide, examine, joint_factor, looks
from sbiplat.gate.criteria import Criteria

sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))
from known import CASES, DEFECTS, DRAWS_ONLY, PROBLEMS, Defect, Gaussian, examined

DIM, NOISE, SEEDS = 3, 0.7, 10
PLAIN = Gaussian(tuple(map(tuple, np.eye(DIM))), NOISE)


def part_of(problem, defect, seed, criteria=None, **kwargs):
    return examine(examined(problem, defect, seed, **kwargs), criteria or Criteria())


def verdicts(defect, seed, n=1000):
    return decide(held_out_figures(examined(PLAIN, defect, seed, n, rows=5000), 1000), Criteria())


def failed(defect, seed, problem=PLAIN, **kwargs):
    return {v.name: v for v in part_of(problem, defect, seed, **kwargs).criteria if not v.passed}


@pytest.mark.parametrize(("problem", "density"), [("Gaussian, 2", True), ("mixture", True), ("uniform", True), ("Gaussian, 2", False)])
def test_the_exact_posterior_is_certified(problem, density):
    """A hundred seeds are in benchmarks/gate_power.py; of these few none, or one by chance, is refused."""
    assert sum(bool(failed(Defect(), seed, PROBLEMS[problem], density=density)) for seed in range(500, 505)) <= 1


def test_the_exact_posterior_is_certified_in_twenty_dimensions():
    assert not failed(Defect(), 500, PROBLEMS["Gaussian, 20"])


@pytest.mark.parametrize(("problem", "defect", "by"), [
    ("Gaussian, 2", "sd x 0.8", "under-coverage"), ("Gaussian, 2", "sd x 1.25", "over-coverage"), ("Gaussian, 2", "shift 0.3 sd", "coverage SBC p0"),
    ("Gaussian, 2", "correlations dropped", "coverage TARP Mahalanobis"), ("Gaussian, 2", "correlations dropped", "C2ST"),
    ("mixture", "one mode lost", "coverage SBC p0"), ("mixture", "one mode lost", "coverage by theta"), ("Gaussian, 2", "tails cut at 2 sd", "tails"),
    ("Gaussian, 2", "prior returned", "information"), ("uniform", "prior returned", "nearest rows"),
    ("Gaussian, 2", "sd halved for a tenth of x", "local coverage"), ("Gaussian, 2", "moved by 1 sd for a tenth of x", "local coverage"),
    ("Gaussian, 2", "variance halved", "under-coverage"),
])
@pytest.mark.parametrize("density", [True, False], ids=["density", "draws only"])
def test_a_defect_is_refused_by_the_criterion_made_for_it(problem, defect, by, density):
    assert by in failed(DEFECTS[defect], 1, PROBLEMS[problem], density=density)


def test_each_defect_is_called_by_its_name():
    assert "too narrow" in failed(Defect(sd=0.7), 0)["under-coverage"].mend
    assert "too wide" in failed(Defect(sd=1.5), 0)["over-coverage"].mend
    assert "biased high in p0" in failed(Defect(shift=0.5), 0)["coverage SBC p0"].mend
    assert "biased low in p1" in failed(Defect(shift=-0.5), 0)["coverage SBC p1"].mend
    assert "hardly uses x" in failed(Defect(prior=True), 0)["information"].mend
    assert "the data are ignored" in failed(Defect(prior=True), 0)["information"].mend
    assert "tails are cut" in failed(Defect(cut=2.0), 0)["tails"].mend


@pytest.mark.parametrize("tenth", ["narrow", "moved"])
def test_the_place_of_a_local_defect_is_named(tenth):
    """It lies where x_1 is in its largest tenth, and what is right elsewhere is not blamed."""
    verdict = failed(Defect(tenth=tenth), 2, PROBLEMS["Gaussian, 2"])["local coverage"]
    assert "too narrow in the 10th tenth" in verdict.statement if tenth == "narrow" else "10th tenth" in verdict.statement
    assert verdict.mend


def test_a_mild_departure_passes():
    """Nets that are good stray by 0.02, and a defended posterior is somewhat too wide."""
    for defect in (Defect(sd=0.95), Defect(sd=1.07)):
        assert not failed(defect, 3, n=2000), defect


def test_a_small_departure_in_each_of_twenty_parameters_passes():
    """It shows in joint tests sqrt(20) times as much, and so do their limits."""
    assert joint_factor(1) == 1
    assert joint_factor(20) == pytest.approx(5.17, abs=0.01)
    assert not failed(Defect(sd=0.97), 4, PROBLEMS["Gaussian, 20"])


# ---------------------------------------------------------------------------------------------------------- traps


def test_tarp_with_references_that_see_x_refuses_the_prior_and_with_others_does_not():
    case = examined(PLAIN, Defect(prior=True), 3)
    blind = replace(case, references=lambda x: np.random.default_rng(0).standard_normal(x.shape))
    by_name = {v.name: v for v in examine(blind, Criteria()).criteria}
    assert not by_name["coverage TARP"].passed
    assert by_name["coverage TARP own references"].passed, "references that ignore x cannot see it"
    assert all(by_name[f"coverage SBC p{k}"].passed for k in range(DIM)), "SBC alone is blind to it"
    seeing = replace(case, references=lambda x: np.stack([0.9 * x, x - 1.0], axis=1))
    assert "coverage TARP own references" in {v.name for v in examine(seeing, Criteria()).criteria if not v.passed}


def test_the_two_sample_test_between_curve_and_grid_has_no_power_and_ours_has():
    from scipy.stats import ks_2samp

    rng = np.random.default_rng(0)
    z = rng.standard_normal(1000)
    u = ranks(0.7 * rng.standard_normal((1000, 1000)), z, rng)
    assert uniformity_p_value(u) < 1e-4
    grid = np.linspace(0, 1, 101)
    assert ks_2samp((u[:, None] <= grid).mean(0), grid).pvalue > 0.05


def test_signed_areas_cancel_where_folded_ranks_do_not():
    """Of a posterior that is too narrow the area between curve and diagonal is 0."""
    rng = np.random.default_rng(1)
    c = coverage("u", ranks(0.8 * rng.standard_normal((2000, 1000)), rng.standard_normal(2000), rng), rng)
    assert abs((c.ecp - np.linspace(0, 1, 101)).mean()) < 0.015
    assert c.folded_p_value < 1e-6
    assert c.under > 0.07 > c.over


def test_draws_that_are_not_finite_are_refused_and_hang_nothing():
    case = examined(PLAIN, Defect(), 0, n=300)
    sampler = case.posterior.sampler

    class Sick:
        log_prob = sampler.log_prob

        def sample(self, x, n, seed):
            z = sampler.sample(x, n, seed)
            z[0, 0] = np.nan
            return z

    verdict = {v.name: v for v in examine(replace(case, posterior=replace(case.posterior, sampler=Sick())), Criteria()).criteria}["finite"]
    assert not verdict.passed
    assert verdict.figure > 0


def test_bootstraps_differ_and_leave_the_global_generators_alone():
    import torch

    before = np.random.get_state()[1].copy(), torch.random.get_rng_state()  # noqa: NPY002
    assert len(np.unique(bootstrap_weights(50, np.random.default_rng(0)), axis=0)) == 200
    verdicts(Defect(), 0, n=200)
    assert np.array_equal(before[0], np.random.get_state()[1])  # noqa: NPY002
    assert torch.equal(before[1], torch.random.get_rng_state())


def test_too_few_pairs_certify_nothing():
    assert [v.name for v in verdicts(Defect(), 0, n=50) if not v.passed] == ["pairs"]


def test_the_figures_are_a_function_of_the_seed():
    assert verdicts(Defect(), 4, n=200) == verdicts(Defect(), 4, n=200)
    assert verdicts(Defect(), 4, n=200) != verdicts(Defect(), 5, n=200)


def test_without_a_density_the_certificate_says_what_was_not_tested():
    told = part_of(PLAIN, Defect(), 0, n=300, density=False)
    assert told.not_tested == ("coverage of regions of highest density",)
    assert told.figures["information"]["gain"] is None
    assert "coverage HPD" not in {v.name for v in told.criteria}
    assert not part_of(PLAIN, Defect(), 0, n=300).not_tested


# ------------------------------------------------------------------------------------------------- users' functions


def test_functions_of_theta_are_in_the_users_own_space():
    seen = []

    def largest(theta):
        seen.append(np.abs(theta).max())
        return theta.max(-1)

    case = replace(examined(PROBLEMS["uniform"], Defect(), 0, n=300), functions={"largest": largest})
    assert {v.name: v for v in examine(case, Criteria()).criteria}["coverage function largest"].passed
    assert 0.9 < max(seen) <= 1


def test_a_function_sees_what_the_parameters_do_not():
    """The sum of parameters whose correlation was dropped, without TARP's or the density's help."""
    case = examined(PROBLEMS["Gaussian, 2"], DEFECTS["correlations dropped"], 0, density=False)
    figures = held_out_figures(replace(case, functions={"sum": lambda theta: theta.sum(-1)}), 1000)
    by_name = {c.name: c for c in figures.coverages}
    assert by_name["function sum"].folded_p_value < 1e-6 < 1e-3 < min(by_name[f"SBC p{k}"].folded_p_value for k in range(2))


@pytest.mark.parametrize(("given", "message"), [
    ({"functions": {"bad": lambda theta: theta[0]}}, "'bad' must give one number a theta"),
    ({"functions": {"nan": lambda theta: theta[..., 0] * np.nan}}, "'nan' is not finite"),
    ({"functions": {"three": 3}}, "functions must be named functions of theta"),
    ({"references": 4}, "references must be a function of x"),
    ({"references": lambda x: x[:, :1]}, "expected an array"),
    ({"references": lambda x: x * np.inf}, "not finite"),
])
def test_a_users_function_that_is_none_is_one_line(line_run, given, message):
    with pytest.raises(sp.UserError, match=message) as error:
        sp.gate(line_run, n=200, **given)
    assert "\n" not in str(error.value)


# ------------------------------------------------------------------------------------------------------- sequential


def test_a_clear_verdict_ends_early():
    criteria = replace(Criteria(), looks=4)
    refused = part_of(PLAIN, Defect(sd=0.7), 0, criteria)
    assert refused.figures["pairs"] == 250
    assert not all(v.passed for v in refused.criteria)
    assert "of 1000, the verdict being clear" in refused.criteria[0].statement
    lenient = replace(criteria, deviation=0.3, under_coverage=0.3, over_coverage=0.3, tails=0.1, local=0.5, regions=0.5, c2st=0.8)
    passed = part_of(PLAIN, Defect(), 0, lenient)
    assert all(v.passed for v in passed.criteria)
    assert passed.figures["pairs"] == 250
    assert part_of(PLAIN, Defect(), 0, criteria).figures["pairs"] == 1000, "right, but not yet clear"


def test_looks_spend_the_level_once():
    criteria = replace(Criteria(), looks=5)
    at = looks(1000, criteria)
    assert at == [200, 400, 600, 800, 1000]
    assert looks(100, criteria) == [100]
    assert sum(np.diff([0, *at])) / 1000 * criteria.false_alarm == pytest.approx(criteria.false_alarm)


def test_the_first_look_sees_the_draws_that_a_shorter_gate_would_not_change():
    """The draws of a pair do not depend on where the gate ends."""
    from sbiplat.diagnostics.held_out import HeldOut

    case = examined(PLAIN, Defect(), 0, n=400)
    early = HeldOut(case, 500).until(200).figures()
    late = HeldOut(case, 500).until(400).figures()
    np.testing.assert_array_equal(early.ranks, late.ranks[:early.pairs])


# ------------------------------------------------------------------------------------------------------- arithmetic


def test_randomised_ranks_are_uniform_for_few_draws_and_for_ties():
    """Ranks from 9 draws take 10 values; unrandomised, they alone would look like a departure of 0.05."""
    rng = np.random.default_rng(0)
    u = ranks(rng.standard_normal((20_000, 9)), rng.standard_normal(20_000), rng)
    assert uniformity_p_value(u) > 1e-3
    tied = ranks(rng.integers(0, 3, (20_000, 9)).astype(float), rng.integers(0, 3, 20_000).astype(float), rng)
    assert uniformity_p_value(tied) > 1e-3


def test_uniformity_test_has_its_level():
    rng = np.random.default_rng(1)
    p = np.array([uniformity_p_value(rng.uniform(size=300)) for _ in range(2000)])
    assert abs((p < 0.05).mean() - 0.05) < 4 * np.sqrt(0.05 * 0.95 / 2000)


def test_references_that_are_joined_keep_the_level():
    """Four references of a pair give ranks that depend on each other; under the hypothesis at most about 1 % of p lie below 1 %."""
    p = []
    for seed in range(300):
        rng = np.random.default_rng(seed)
        z, reference = rng.standard_normal((300, 100, 2)), 0.5 * rng.standard_normal((300, 4, 2))
        u = ranks(distances(z[:, 1:], reference), distances(z[:, :1], reference)[:, 0], rng)
        p.append(coverage("TARP", u, rng, "TARP", weights=np.full((2, 300), 1 / 300, np.float32)).p_value)
    assert np.mean(np.array(p) < 0.05) < 0.05 + 4 * np.sqrt(0.05 * 0.95 / 300)
    assert np.mean(np.array(p) < 0.5) > 0.3


def test_cauchy_combination():
    assert cauchy([0.3]) == pytest.approx(0.3)
    assert cauchy([1e-20, 0.5]) == pytest.approx(2e-20, rel=1e-3)
    assert cauchy([1.0, 0.5]) <= 1


def test_truths_outside_of_all_draws():
    from scipy.stats import binomtest

    found = outside_figures(9, 1000, 2 / 1001)
    test = binomtest(9, 1000, 2 / 1001, "greater")
    assert found.p_value == pytest.approx(test.pvalue, rel=1e-9)
    interval = binomtest(9, 1000).proportion_ci(0.95, "exact")
    assert found.band == pytest.approx((interval.low, interval.high), rel=1e-9)
    assert outside_figures(0, 10, 0.1).p_value == 1


def test_bootstrap_bands_hold_the_truth_as_often_as_they_say():
    rng = np.random.default_rng(2)
    level = 50  # the central half
    inside = 0
    for _ in range(200):
        c = coverage("u", rng.uniform(size=400), rng)
        inside += c.central_band[0][level] <= 0.5 <= c.central_band[1][level]
    assert 0.90 < inside / 200 < 0.99


def test_holm_controls_the_family():
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert holm([0.5]) == [0.5]
    assert max(holm([0.9, 0.8])) <= 1.0


def test_a_significant_but_small_departure_is_let_pass_with_many_pairs():
    """More pairs sharpen the test; what is good enough stays good enough."""
    figures = verdicts(Defect(sd=0.985), 0, n=10_000)
    assert all(v.passed for v in figures), [v for v in figures if not v.passed]


def test_a_figure_over_its_limit_that_passes_says_why():
    """A few pairs: the bands reach below the limits, and the statement tells what would else look like a slip."""
    passed = [v for seed in range(6) for v in verdicts(Defect(sd=0.85), seed, n=200) if v.passed]
    over = [v for v in passed if v.name.endswith("coverage") and v.figure > v.threshold]
    under = [v for v in passed if v.name.endswith("coverage") and v.figure <= v.threshold]
    assert over
    assert all("passed though over the limit" in v.statement for v in over)
    assert not any("passed though" in v.statement for v in under)


def test_thresholds_decide():
    figures = held_out_figures(examined(PLAIN, Defect(), 0, n=300), 600)
    assert [v.name for v in decide(figures, replace(Criteria(), information=50.0)) if not v.passed] == ["information"]


@pytest.mark.science
@pytest.mark.parametrize(("problem", "defect"), CASES)
def test_refusals_in_twenty_seeds(problem, defect):
    refused = sum(bool(failed(DEFECTS[defect], seed, PROBLEMS[problem], density=problem not in DRAWS_ONLY)) for seed in range(1000, 1020))
    assert refused <= 2 if defect == "exact" else refused >= 18
