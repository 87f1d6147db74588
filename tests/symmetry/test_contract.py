"""The contract of actions: ready-made ones keep it; each breach is found, and an exact action is refused as seldom as stated."""

import dataclasses
import json
import math

import numpy as np
import pytest
import torch
from scipy import stats

import sbiplat as sp
from sbiplat.errors import SymmetryError, UserError
from sbiplat.observation import ObservationSpec
from sbiplat.symmetry import (
    Euclidean2,
    GroupAction,
    ImageRotation,
    Permutation,
    Phase,
    Product,
    Rotation2D,
    Rotation3D,
    Scaling,
    SpectrumShift,
    TimeShift,
    Translation,
    Units,
    contract,
)
from sbiplat.symmetry.algebra import check_algebra
from sbiplat.symmetry.contract import LEVEL, check_action

TURN = 2 * math.pi
SPAN = np.arange(32)
TIME = sp.Prior({"t0": sp.Uniform(-5, 5), "w": sp.Uniform(1.5, 4)})
SCALE = sp.Prior({"s": sp.LogUniform(1, 10), "w": sp.Uniform(2, 4)})


def declared(prior, shape, symmetry=None, **more):
    return sp.simulator(prior=prior, x_shape=shape, symmetry=symmetry, batched=True, **more)


def pulse(theta, noise):
    """A periodic pulse (B, 32) at t0, of width w."""
    return 3 * np.exp(-0.5 * (((SPAN - theta[:, :1]) % 32 - 16) / theta[:, 1:]) ** 2) + noise


def scaled(theta, noise):
    """A pulse (B, 32) and its noise times s, of width w."""
    return theta[:, :1] * pulse(np.stack([0 * theta[:, 0], theta[:, 1]], 1), noise)


# ------------------------------------------------------------------------------------------------------ the algebra

READY = [
    (Translation(("a", "b"), "v"), {"a": sp.Normal(1e9, 1e5), "b": sp.Uniform(0, 1)}, (5, 2)),
    (TimeShift("t", 1e-3, "v", channels=(1,)), {"t": sp.Uniform(-0.1, 0.1)}, (2, 64)),
    (SpectrumShift("t", 0.25, 20.0, "v"), {"t": sp.Uniform(-0.1, 0.1)}, (2, 64)),
    (Scaling("s", "v"), {"s": sp.LogUniform(1e-23, 1e-20)}, (5,)),
    (Units({"m": 1, "r": -2}, {"v": 3}), {"m": sp.LogUniform(1, 2), "r": sp.LogUniform(1, 3)}, (5,)),
    (Phase("p", "v", order=2, fold=2, low=0.0), {"p": sp.Uniform(0, math.pi)}, (5, 2)),
    (Rotation2D("p", "v", low=0.0), {"p": sp.Uniform(0, TURN)}, (5, 2)),
    (ImageRotation("p", "v"), {"p": sp.Uniform(-math.pi, math.pi)}, (9, 9)),
    (Euclidean2(("p", "x", "y"), "v", pixel=0.2, middle=(3.0, 3.0), low=0.0, fold=2),
     {"p": sp.Uniform(0, math.pi), "x": sp.Uniform(2, 4), "y": sp.Uniform(2, 4)}, (9, 11)),
    (Rotation3D(("a", "b", "c"), "v"), {"a": sp.Uniform(0, TURN), "b": sp.Uniform(-1, 1), "c": sp.Uniform(0, TURN)}, (4, 3)),
    (Permutation("v"), {"m": sp.Normal(0, 1)}, (6, 2)),
    (Product(Permutation("v"), TimeShift("t", 1.0, "v"), Scaling("s", "v")), {"t": sp.Normal(0, 3), "s": sp.LogUniform(1, 2)}, (6, 16)),
]


@pytest.mark.parametrize(("action", "laws", "shape"), READY, ids=[contract.name_of(a) for a, *_ in READY])
def test_ready_made_actions_keep_the_laws(action, laws, shape):
    spec = ObservationSpec.declare({"v": shape, "other": ()})
    figures = check_algebra(action, sp.Prior({**laws, "else": sp.Normal(0, 1)}), spec)
    if action.moves:
        assert figures["log-det"] < 1e-8
        assert figures["log_volume"] < 1e-6
    json.dumps(figures)


def broken(**methods):
    """A translation of which one thing is wrong."""
    return type("Wrong", (Translation,), methods)("a", "v")


class LogShift(Translation):
    """A multiplicative action without its log-det."""

    def pose_of(self, theta):
        return theta.log()

    def act_theta(self, g, theta):
        return theta * g.exp(), theta.new_zeros(len(theta))


BROKEN = {
    "did you mean amplitude": Translation("amplitud", "v"),
    "has no parameter 'zz'": Translation("zz", "v"),
    "keep shapes and dtypes.*'v'": broken(act_data=lambda self, g, x: {**x, "v": x["v"][:, :2]}),
    "float64.*of 'v'": broken(act_data=lambda self, g, x: {**x, "v": x["v"].double()}),
    "return the fields v, got w": broken(act_data=lambda self, g, x: {"w": x["v"]}),
    "writes to the x": broken(act_data=lambda self, g, x: {"v": x["v"].add_(g.float())}),
    "NaN or infinite": broken(act_data=lambda self, g, x: {"v": x["v"] * math.nan}),
    "T_e x = x": broken(act_data=lambda self, g, x: {"v": x["v"] + 1}),
    "T_g\\^-1 T_g x = x": broken(act_data=lambda self, g, x: {"v": x["v"] + g.float() ** 2}),
    "act_data failed: KeyError": broken(act_data=lambda self, g, x: x["u"]),
    "e g = g": broken(identity=lambda self, count: torch.ones(count, 1, dtype=torch.float64)),
    "g\\^-1 g = e": broken(inverse=lambda self, g: -1.1 * g),
    "\\(g h\\) k = g \\(h k\\)": broken(compose=lambda self, g, h: g + h + g * h * (g + h)),
    "pose_of\\(g theta\\)": broken(act_theta=lambda self, g, theta: (theta + 2 * g, theta.new_zeros(len(theta)))),
    "e theta = theta fails by .*; see its identity and act_theta": broken(act_theta=lambda self, g, theta: (theta + g + 1, theta.new_zeros(len(theta)))),
    "act_theta's log-det": LogShift("a", "v"),
    "chart's log-det": broken(chart=lambda self, theta: (2 * theta, theta.new_zeros(len(theta))), unchart=lambda self, u: u / 2),
    "unchart": broken(chart=lambda self, theta: (2 * theta, theta.new_zeros(len(theta)) + math.log(2))),
    "log_volume": broken(log_volume=lambda self, v: v.sum(-1)),
    "exp\\(log\\(g\\)\\)": broken(exp=lambda self, v: 2 * v),
    "pose_of must give finite torch.float64": broken(pose_of=lambda self, theta: theta.float()),
    "pose_of failed: RuntimeError|its group operations failed": broken(pose_of=lambda self, theta: theta @ theta),
    "poses": Product(Translation("a", "v"), type("Sum", (GroupAction,), {
        "parameters": ("a", "amplitude"), "moves": False, "exact": False, "coordinates": ("sum",),
        "pose_of": lambda self, theta: theta.sum(-1, keepdim=True), "act_data": lambda self, g, x: x})()),
    "two factors move": Product(Translation("a", "v"), type("Other", (Translation,), {"coordinates": ("b",)})("a", "v")),
}


@pytest.mark.parametrize("told", BROKEN)
def test_each_breach_is_one_line(told):
    prior = sp.Prior({"a": sp.LogUniform(1, 3), "amplitude": sp.Normal(0, 1)})
    with pytest.raises(SymmetryError, match=told) as found:
        check_algebra(BROKEN[told], prior, ObservationSpec.declare({"v": (3,)}))
    assert "\n" not in str(found.value)


def test_dependent_priors_are_refused():
    prior = sp.Prior.joint(["a", "b"], sp.MultivariateNormal([0.0, 0.0], [[1.0, 0.5], [0.5, 1.0]]))
    with pytest.raises(SymmetryError, match="independent parameters"):
        check_algebra(Translation("a"), prior, ObservationSpec.declare(3))


# -------------------------------------------------------------------------------------------------- the simulations

MODELS = {
    "shift": (TIME, 32, TimeShift("t0", 1.0), lambda theta, rng: pulse(theta, rng.standard_normal((len(theta), 32)))),
    "scale": (SCALE, 32, Scaling("s"), lambda theta, rng: scaled(theta, rng.standard_t(2, (len(theta), 32)))),
    "angle": ({"p": sp.Uniform(0, TURN)}, (3, 2), Rotation2D("p", low=0.0),
              lambda theta, rng: 2 * np.stack([np.cos(theta), np.sin(theta)], -1) + rng.standard_normal((len(theta), 3, 2))),
    "set": ({"m": sp.Normal(0, 1)}, (6, 2), Permutation(), lambda theta, rng: theta[:, :, None] + rng.standard_normal((len(theta), 6, 2))),
}


def model(name, symmetry=None, function=None):
    prior, shape, action, made = MODELS[name]
    return declared(prior, shape, symmetry or action, name=f"contract_{name}")(function or made)


@pytest.mark.parametrize("name", MODELS)
def test_p_values_of_exact_actions_are_uniform(name, monkeypatch):
    """20 seeds of a small check; the level of a permutation test is exact, whatever the noise (Student's t with 2 degrees here too)."""
    monkeypatch.setattr(contract, "LEVEL", -1.0)
    p = [check_action(model(name), rows=256, seed=seed).p_value for seed in range(20)]
    assert stats.kstest(p, "uniform").pvalue > 1e-4


def uneven(theta, rng):
    """A pulse whose noise grows along the series: it does not move with the pulse."""
    return pulse(theta, rng.standard_normal((len(theta), 32)) * (1 + SPAN / 16))


WRONG = {
    "a power of 1.05 instead of 1": ("scale", Units({"s": 1}, {"x": 1.05}), lambda theta, rng: scaled(theta, rng.standard_normal((len(theta), 32)))),
    "a sample too much": ("shift", TimeShift("t0", 10 / 11), None),
    "the wrong way": ("shift", TimeShift("t0", 1e-9), None),
    "noise that does not scale": ("scale", Scaling("s"), lambda theta, rng: scaled(theta, 0) + rng.standard_normal((len(theta), 32))),
    "noise that does not shift": ("shift", TimeShift("t0", 1.0), uneven),
    "noise that does not turn": ("angle", Rotation2D("p", low=0.0), lambda theta, rng: 2 * np.stack([np.cos(theta), np.sin(theta)], -1)
                                 + rng.standard_normal((len(theta), 3, 2)) * [1.0, 1.7]),
    "elements in an order": ("set", Permutation(), lambda theta, rng: np.cumsum(rng.standard_normal((len(theta), 6, 2)), 1)),
}


@pytest.mark.parametrize("what", WRONG)
def test_wrong_actions_are_refused_with_the_figure(what):
    name, action, function = WRONG[what]
    with pytest.raises(SymmetryError, match=r"declared exact.*p = 0.000.*sd of the noise.*exact=False") as found:
        check_action(model(name, action, function), rows=4096)
    assert "\n" not in str(found.value)


def test_the_same_action_declared_approximate_is_measured():
    action = dataclasses.replace(TimeShift("t0", 2.0), exact=False)
    found = check_action(model("shift", action))
    assert found.p_value is None
    assert found.inexact["shift"] > 0.3
    assert found.inexact["noise_ratio"] == pytest.approx(1, abs=0.05)
    right = check_action(model("shift", dataclasses.replace(action, spacing=1.0)))
    assert right.inexact["shift"] < 0.06
    json.dumps(dataclasses.asdict(found))


def test_a_simulator_without_noise_is_compared_directly():
    exact = model("shift", None, lambda theta, rng: pulse(theta, 0))
    found = check_action(exact)
    assert found.p_value is None
    assert found.difference < contract.TOLERANCE
    assert found.rows == 2 * 64 + 2 * contract.TRIALS
    with pytest.raises(SymmetryError, match=r"without noise differs by 0\.0.* of its spread"):
        check_action(exact, Product(TimeShift("t0", 1 / 1.05)))


def test_signals_are_compared_where_observe_adds_noise():
    """An error of 3 % is far below noise of ten times the signal, and is found in the signal."""
    @sp.simulator(prior=SCALE, x_shape=32, observe=lambda s, theta, rng: s + 30 * theta[:, :1] * torch.randn(s.shape, generator=rng))
    def seen(theta, rng):
        return theta[0] * pulse(np.array([[16.0, theta[1]]]), 0)[0]

    found = check_action(seen, Scaling("s"), rows=256)
    assert found.difference < 1e-5
    assert found.p_value > LEVEL
    with pytest.raises(SymmetryError, match="without noise differs"):
        check_action(seen, Units({"s": 1}, {"x": 1.03}), rows=256)


def test_factors_are_judged_each_as_declared():
    """The exact factor is tested alone; a derived pose that moves nothing is left out; one that is approximate is measured."""
    derived = type("Delay", (GroupAction,), {"parameters": ("w",), "moves": False, "exact": False, "coordinates": ("delay",),
                                             "act_data": lambda self, g, x: {"x": x["x"] + g.to(x["x"].dtype)}})()
    found = check_action(model("shift", Product(TimeShift("t0", 1.0), derived)))
    assert not found.exact
    assert found.p_value > LEVEL
    with pytest.raises(SymmetryError, match=r"^TimeShift is declared exact"):
        check_action(model("shift", Product(TimeShift("t0", 0.5), derived)))


def test_theta_that_leaves_the_prior_is_told():
    @declared({"a": sp.Uniform(0, 1), "b": sp.Uniform(0, 1)}, 3)
    def both(theta, rng):
        return theta.sum(-1, keepdims=True) + rng.standard_normal((len(theta), 3))

    class Far(Translation):
        def pose_of(self, theta):
            return theta[:, :1].expand(-1, 2)

        def act_theta(self, g, theta):
            return theta + g.new_tensor([1.0, 0.0]) * g + g.new_tensor([0.0, 1.0]) * (g + 5), theta.new_zeros(len(theta))

    with pytest.raises(SymmetryError, match=r"leaves the prior's support in 100\.0%"):
        contract._points(both.prior, Far(("a", "b")), [True], 0)


def test_failing_rows_are_left_out_and_slow_simulators_are_said():
    def some(theta, rng):
        x = pulse(theta[None], rng.standard_normal((1, 32)))[0]
        if rng.uniform() < 0.1:
            raise ArithmeticError
        return x * (np.nan if rng.uniform() < 0.1 else 1)

    simulator = sp.simulator(prior=TIME, x_shape=32, symmetry=TimeShift("t0", 1.0), name="contract_failing")(some)
    assert check_action(simulator, rows=1024).p_value > LEVEL
    assert "longer than their budget" in check_action(simulator, seconds=0.0).statement
    with pytest.raises(UserError, match="at least 64 rows"):
        check_action(simulator, rows=10)


def test_the_same_seed_gives_the_same_figures():
    first, again, other = (check_action(model("shift"), rows=256, seed=s) for s in (3, 3, 4))
    assert first.p_value == again.p_value
    assert first.shift == again.shift
    assert first.p_value != other.p_value


class Derived(Translation):
    """A pose that nothing moves, declared exact."""

    moves = False


class WiderKernel(Translation):
    """log_kernel of twice the width beside the blur of the base."""

    def log_kernel(self, proxy, pose, widths):
        return super().log_kernel(proxy, pose, 2 * widths)


class FlatKernel(Translation):
    """A kernel that is no density."""

    def log_kernel(self, proxy, pose, widths):
        return proxy.new_zeros(len(proxy))


class Standstill(Translation):
    """A pose that is the same for all theta."""

    def pose_of(self, theta):
        return 0.0 * theta

    def act_theta(self, g, theta):
        return theta, theta.new_zeros(len(theta))


@pytest.mark.parametrize(("action", "message"), [
    (Derived(("mu",)), "it has a pose and moves no parameter, so it is not exact"),
    (WiderKernel(("mu",)), r"log_kernel is not the density of what blur draws: the mean of K\(0.[89] widths\)"),
    (FlatKernel(("mu",)), "log_kernel is not the density of what blur draws"),
    (Standstill(("mu",)), "the pose's coordinate mu is the same for all theta"),
])
def test_a_kernel_or_a_pose_that_contradicts_itself_is_refused(action, message):
    with pytest.raises(SymmetryError, match=message):
        check_algebra(action, sp.Prior({"mu": sp.Normal(0, 1)}), ObservationSpec.declare((3,)))
