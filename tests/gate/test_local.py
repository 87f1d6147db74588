"""Local tests: they keep their level for the exact posterior, and see where, in x and in the prior, a posterior fails."""

import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import sbiplat as sp
from sbiplat.diagnostics.classifier import local_c2st
from sbiplat.diagnostics.held_out import HeldOut
from sbiplat.diagnostics.local import TENTHS, by_theta, by_x, sequential_p_value

sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))
from known import DEFECTS, PROBLEMS, Defect, examined

GAUSSIAN = PROBLEMS["Gaussian, 2"]
OUTSIDE, INSIDE = np.array([[-0.5, -0.5]], np.float32), np.array([[2.8, 2.5]], np.float32)  # of the tenth of x where x_1 is largest


def level_holds(p, at=0.1):
    """The share of p below `at` is at most `at`, within four binomial standard errors."""
    return np.mean(np.array(p) < at) <= at + 4 * np.sqrt(at * (1 - at) / len(p))


def test_a_monte_carlo_p_value_is_exact_and_ends_early():
    rng = np.random.default_rng(0)
    drawn = []

    def null(n):
        drawn.append(n)
        return rng.standard_normal(n)

    p = [sequential_p_value(rng.standard_normal(), null, 500) for _ in range(400)]
    assert level_holds(p)
    assert level_holds(p, 0.5)
    assert np.mean(np.array(p) < 0.5) > 0.4
    assert sum(drawn) < 400 * 500 / 2
    assert sequential_p_value(9.0, null, 500) == 1 / 501


def test_local_coverage_by_x_keeps_its_level_with_ranks_that_depend_on_each_other():
    p = []
    for seed in range(60):
        rng = np.random.default_rng(seed)
        u = rng.uniform(size=(400, 1))
        u = np.concatenate([u, np.where(rng.uniform(size=(400, 1)) < 0.7, u, rng.uniform(size=(400, 1)))], axis=1)
        x = np.stack([rng.standard_normal(400), rng.integers(0, 2, 400)], axis=1)  # one feature that takes two values
        p.append(by_x(u, ("a", "b"), x, ("x 0", "x 1"), rng, 200).p_value)
    assert level_holds(p)


def test_what_is_wrong_everywhere_is_not_local():
    rng = np.random.default_rng(0)
    u, x = rng.uniform(size=(1000, 1)) ** 2, rng.standard_normal((1000, 3))
    assert by_x(u, ("a",), x, ("x 0", "x 1", "x 2"), rng, 1000).p_value > 0.01


def test_heat_maps_hold_the_departure_where_it_is():
    rng = np.random.default_rng(0)
    x = rng.standard_normal((2000, 2))
    there = x[:, 1] > np.quantile(x[:, 1], 0.9)
    u = np.where(there, rng.uniform(size=2000) ** 2, rng.uniform(size=2000))[:, None]
    found = by_x(u, ("a",), x, ("x 0", "x 1"), rng, 1000)
    assert (found.axis, found.tenth, found.kind, found.p_value) == ("x 1", 9, "too high", 1 / 1001)
    assert found.bias.shape == (2, TENTHS, 1)
    assert found.bias[1, 9, 0] == pytest.approx(1 / 3 - 1 / 2, abs=4 * 0.3 / np.sqrt(200))
    assert np.abs(found.bias[1, :9]).max() < 4 * 0.29 / np.sqrt(200)


def test_coverage_by_theta_asks_of_regions_not_of_ranks_given_theta():
    """Given theta* in the prior's tail, the exact posterior's ranks are far from uniform: to call that a failure is the trap."""
    measured = HeldOut(examined(GAUSSIAN, Defect(), 0), 500).until(1000)
    figures = measured.figures()
    rank = figures.ranks[:, [c.name for c in figures.coverages].index("SBC p0")]
    assert rank[measured.truth[:, 0] > 1.3].mean() > 0.6
    assert figures.by_theta.p_value > 0.01
    assert figures.by_theta.found.sum() == pytest.approx(2)
    assert figures.by_theta.stated.sum() == pytest.approx(2)


def test_coverage_by_theta_keeps_its_level_and_finds_the_region():
    p = []
    for seed in range(60):
        rng = np.random.default_rng(seed)
        tenths = rng.integers(0, TENTHS, (300, 21, 1))
        stated = (tenths == np.arange(TENTHS)).mean(1)[:, None]
        p.append(by_theta(tenths[:, 0], stated, tenths, ("a",), rng, 200).p_value)
    assert level_holds(p)
    tenths[:, 0] = np.where(rng.uniform(size=(300, 1)) < 0.3, 4, tenths[:, 0])
    found = by_theta(tenths[:, 0], stated, tenths, ("a",), rng, 1000)
    assert (found.name, found.tenth) == ("a", 4)
    assert found.p_value < 0.01


def test_joint_c2st_keeps_its_level_and_its_area_is_one_half():
    figures = [HeldOut(examined(GAUSSIAN, Defect(), seed, n=200, rows=1000), 100, density_draws=0).until(200).figures(100).joint
               for seed in range(25)]
    assert level_holds([f.p_value for f in figures])
    areas = np.array([f.area for f in figures])
    assert abs(areas.mean() - 0.5) < 4 * areas.std() / 5
    assert np.mean([f.error for f in figures]) == pytest.approx(areas.std(), rel=0.5)


# --------------------------------------------------------------------------------------- at the user's observation


def test_lc2st_keeps_its_level():
    p = [local_c2st(examined(GAUSSIAN, Defect(), seed, n=400, rows=1000), {"x": OUTSIDE}, 200, 100).p_value for seed in range(25)]
    assert level_holds(p)
    assert max(p) > 0.3


@pytest.mark.parametrize("tenth", ["sd halved for a tenth of x", "moved by 1 sd for a tenth of x"])
def test_lc2st_refuses_at_the_observation_where_the_posterior_is_wrong_and_not_elsewhere(tenth):
    case = examined(GAUSSIAN, DEFECTS[tenth], 0, n=5000)
    inside, outside = (local_c2st(case, {"x": x}, 500, 200) for x in (INSIDE, OUTSIDE))
    assert inside.p_value < 0.01
    assert inside.statistic > 5 * outside.statistic
    assert inside.theta.shape == (500, 2)


def test_lc2st_probability_says_where_the_posterior_gives_too_little():
    """Of a posterior moved up by one sd, truths lie lower: the classifier gives low draws more."""
    found = local_c2st(examined(GAUSSIAN, Defect(shift=1.0), 0, n=2000), {"x": OUTSIDE}, 500, 100)
    low = found.theta.sum(1) < np.median(found.theta.sum(1))
    assert found.probability[low].mean() > found.probability[~low].mean() + 0.05


def test_lc2st_is_a_function_of_the_seed_and_leaves_the_global_generators_alone():
    before = torch.random.get_rng_state()
    first, second = (local_c2st(examined(GAUSSIAN, Defect(), 0, n=300, rows=1000), {"x": OUTSIDE}, 100, 50) for _ in range(2))
    assert first.p_value == second.p_value
    np.testing.assert_array_equal(first.null, second.null)
    assert torch.equal(before, torch.random.get_rng_state())


def test_lc2st_of_a_run(line_run):
    found = sp.local_c2st(line_run, np.zeros(2), n=300, draws=200, nulls=99)
    assert 0 < found.p_value <= 1
    assert found.pairs <= 300
    assert found.theta.shape == (200, 2)
    with pytest.raises(sp.UserError, match="one observation at a time"):
        sp.local_c2st(line_run, np.zeros((3, 2)))
    with pytest.raises(sp.UserError, match="nulls must be a whole number of at least 19"):
        sp.local_c2st(line_run, np.zeros(2), nulls=3)
