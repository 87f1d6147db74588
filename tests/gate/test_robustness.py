"""Attacks and their criteria on posteriors whose answer is known: the attack attains the closed form, exact posteriors pass, fragile ones do not."""

from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
from conftest import QUICK
from scipy import stats

import sbiplat as sp
from sbiplat.diagnostics import adversarial
from sbiplat.diagnostics.adversarial import AttackSettings, Draws, Objective, divergence, energy_distance
from sbiplat.diagnostics.examined import Examined
from sbiplat.diagnostics.fragility import Attacked
from sbiplat.diagnostics.targets import target_of
from sbiplat.diagnostics.whitened import Ball, Limits, Whitening
from sbiplat.errors import SettingError
from sbiplat.gate import robustness
from sbiplat.gate.criteria import Criteria
from sbiplat.observation import ObservationSpec
from sbiplat.posteriors.base import Posterior
from sbiplat.posteriors.convergence import ChainError
from sbiplat.posteriors.of_run import from_run
from sbiplat.progress import silent


class Known:
    """A sampler that brings its own target: log-density and draws of z given x, in torch. rounded: sees x rounded, so without gradient."""

    gradients, normalised, objectives, masks = True, True, ("forward", "reverse", "energy"), {}

    def __init__(self, rounded=0.0):
        self.rounded = rounded

    def target(self):
        return self

    def condition(self, x):
        u = x["x"].double()
        return torch.round(u / self.rounded) * self.rounded if self.rounded else u

    def sample(self, x, n, generator):
        if isinstance(x, dict):
            seeded = torch.Generator().manual_seed(generator)
            return self.sample(self.condition({k: torch.as_tensor(v) for k, v in x.items()}), n, seeded).numpy()
        return self.draw(x, n, generator)

    def log_prob(self, z, x):
        if isinstance(x, dict):
            return self.density(torch.as_tensor(z).double(), self.condition({k: torch.as_tensor(v) for k, v in x.items()})).numpy()
        return self.density(z.double(), x)


class LinearGaussian(Known):
    """z ~ N(0, I), x = M z + e: the posterior N(Gx, S). fragile: in a direction that the data hardly have the mean runs away."""

    def __init__(self, M, noise, fragile=0.0, **kwargs):
        super().__init__(**kwargs)
        self.M, self.noise, self.fragile = torch.as_tensor(M, dtype=torch.float64), noise, fragile
        self.S = torch.linalg.inv(torch.eye(self.M.shape[1], dtype=torch.float64) + self.M.T @ self.M / noise**2)
        self.G = self.S @ self.M.T / noise**2
        self.L = torch.linalg.cholesky(self.S)

    def mean(self, x):
        off = torch.linalg.svd(self.M)[0][:, -1]  # a direction that no theta makes
        return x @ self.G.T + self.fragile * (x @ off[:, None]) ** 3

    def draw(self, x, n, generator):
        return self.mean(x)[:, None] + torch.randn(len(x), n, len(self.S), generator=generator, dtype=torch.float64) @ self.L.T

    def density(self, z, x):
        w = torch.linalg.solve_triangular(self.L, (z - self.mean(x)[:, None]).mT, upper=False)
        return -0.5 * w.square().sum(-2) - torch.diagonal(self.L).log().sum() - 0.5 * len(self.S) * np.log(2 * np.pi)

    def pairs(self, rng, n):
        z = rng.standard_normal((n, len(self.S)))
        x = z @ self.M.numpy().T + self.noise * rng.standard_normal((n, len(self.M)))
        return {"theta": z.astype(np.float32), "x": {"x": x.astype(np.float32)}}

    def prior(self):
        return sp.Prior({f"p{k}": sp.Normal(0.0, 1.0) for k in range(len(self.S))})


class Mixture(Known):
    """z ~ N(0, I), x = z + e, e a wide or a narrow Gaussian: a posterior of two components."""

    sds = torch.tensor([1.0, 0.1], dtype=torch.float64)

    def parts(self, x):
        v = self.sds**2
        logits = -0.5 * x.square().sum(-1, keepdim=True) / (1 + v) - 0.5 * x.shape[-1] * (1 + v).log()
        return logits.log_softmax(-1), x[:, None] / (1 + v)[:, None], (v / (1 + v)).sqrt()

    def draw(self, x, n, generator):
        logits, means, sds = self.parts(x)
        which = torch.multinomial(logits.exp(), n, replacement=True, generator=generator)
        rows = torch.arange(len(x))[:, None]
        return means[rows, which] + sds[which][..., None] * torch.randn(len(x), n, x.shape[-1], generator=generator, dtype=torch.float64)

    def density(self, z, x):
        logits, means, sds = self.parts(x)
        w = (z[:, :, None] - means[:, None]) / sds[:, None]
        return torch.logsumexp(logits[:, None] - 0.5 * w.square().sum(-1) - z.shape[-1] * (sds * np.sqrt(2 * np.pi)).log(), -1)

    def pairs(self, rng, n):
        z = rng.standard_normal((n, 2))
        x = z + self.sds.numpy()[rng.integers(0, 2, n)][:, None] * rng.standard_normal(z.shape)
        return {"theta": z.astype(np.float32), "x": {"x": x.astype(np.float32)}}

    def prior(self):
        return sp.Prior({"a": sp.Normal(0, 1), "b": sp.Normal(0, 1)})


class Bounded(Known):
    """theta ~ U(0, 1)^2, x = theta + 0.1 e: truncated Gaussians, over z = Phi^-1(theta)."""

    noise = 0.1

    def ends(self, x):
        return torch.special.ndtr(-x / self.noise), torch.special.ndtr((1 - x) / self.noise)

    def draw(self, x, n, generator):
        low, high = self.ends(x)
        u = low[:, None] + (high - low)[:, None] * torch.rand(len(x), n, 2, generator=generator, dtype=torch.float64)
        theta = (x[:, None] + self.noise * torch.special.ndtri(u.clamp(1e-15, 1 - 1e-15))).clamp(1e-9, 1 - 1e-9)
        return torch.special.ndtri(theta)

    def density(self, z, x):
        theta = torch.special.ndtr(z)
        low, high = (torch.special.log_ndtr(v / self.noise) for v in (-x, 1 - x))
        upper, lower = torch.special.log_ndtr(x / self.noise), torch.special.log_ndtr((x - 1) / self.noise)
        mass = torch.where(x > 0.5, upper + torch.log1p(-torch.exp(lower - upper)), high + torch.log1p(-torch.exp(low - high)))
        w = (theta - x[:, None]) / self.noise
        return (-0.5 * w.square() - mass[:, None] - np.log(self.noise) - 0.5 * z.square() - np.log(2 * np.pi)).sum(-1)

    def pairs(self, rng, n):
        theta = rng.uniform(size=(n, 2))
        return {"theta": stats.norm.ppf(theta).astype(np.float32), "x": {"x": (theta + self.noise * rng.standard_normal((n, 2))).astype(np.float32)}}

    def prior(self):
        return sp.Prior({"a": sp.Uniform(0, 1), "b": sp.Uniform(0, 1)})


class Prior(LinearGaussian):
    """It ignores x: N(0, I)."""

    def __init__(self, M, noise):
        super().__init__(M, noise)
        self.L = torch.eye(len(self.S), dtype=torch.float64)

    def mean(self, x):
        return 0 * (x @ self.G.T)


def matrix(features, dim, seed=0):
    return np.random.default_rng(seed).standard_normal((features, dim)) / np.sqrt(dim)


EXACT = {"2": LinearGaussian(matrix(5, 2), 0.7), "20": LinearGaussian(matrix(20, 20), 0.5), "informative": LinearGaussian(matrix(30, 2), 0.01),
         "mixture": Mixture(), "bounded": Bounded(), "prior": Prior(matrix(5, 2), 0.7)}
FRAGILE = LinearGaussian(matrix(20, 2), 0.3, fragile=0.5)


def examined(sampler, seed, n=100):
    rng = np.random.default_rng([seed, 7])
    pairs, training = sampler.pairs(rng, n), sampler.pairs(rng, 4000)
    spec = ObservationSpec.declare(pairs["x"]["x"].shape[1:])
    return Examined(Posterior(sampler.prior(), spec, sampler), pairs, training, seed)


def verdicts(sampler, seed, **settings):
    return {v.name: v for v in robustness.examine(examined(sampler, seed), replace(Criteria(), **settings)).criteria}


def under_attack(sampler, n=6, seed=0, rows=1000):
    """The posterior with observations whose features all have about unit scale, and the scales that were found."""
    given = examined(sampler, seed, n)
    whitening = Whitening.fit(given.posterior.x, given.training["x"])
    return Attacked.of(given.posterior, target_of(given.posterior), whitening, given.pairs["x"], AttackSettings(), seed), whitening


# --------------------------------------------------------------------------------------------------------- known answers


@pytest.mark.parametrize("kind", ["forward", "reverse", "energy"])
def test_the_l2_attack_attains_the_closed_form(kind):
    """Worst KL of N(Gx, S) within root mean square eps: 0.5 F eps^2 lambda_max(s G' S^-1 G s), s the features' scales."""
    sampler = LinearGaussian(matrix(5, 2), 0.7)
    attacked, whitening = under_attack(sampler)
    eps = 0.4
    ball = Ball(whitening, attacked.x, eps)
    settings = AttackSettings(steps=120, restarts=3, draws=32)
    delta, vanished = adversarial.pgd(attacked.objective(ball, kind), settings, torch.Generator().manual_seed(0))
    assert float(vanished.max()) == 0.0
    scale = whitening.scale["x"]
    A = (sampler.G.T @ torch.linalg.inv(sampler.S) @ sampler.G) * scale * scale[:, None]
    exact = 0.5 * torch.einsum("rbf,fg,rbg->rb", delta, A, delta)
    closed = 0.5 * 5 * eps**2 * float(torch.linalg.eigvalsh(A)[-1])
    assert float(exact.max()) <= closed * (1 + 1e-6)
    assert float(exact.amax(0).min()) > (0.98 if kind != "energy" else 0.9) * closed  # energy weighs directions otherwise than KL does


def test_the_linf_attack_attains_the_best_corner():
    sampler = LinearGaussian(matrix(6, 2, seed=3), 0.7)
    attacked, whitening = under_attack(sampler)
    ball = Ball(whitening, attacked.x, 0.3, "linf")
    delta, _ = adversarial.pgd(attacked.objective(ball), AttackSettings(norm="linf", steps=100, restarts=10, draws=32), torch.Generator().manual_seed(0))
    corners = 0.3 * (2 * ((torch.arange(64)[:, None] >> torch.arange(6)) & 1).double() - 1)
    scale = whitening.scale["x"]
    A = (sampler.G.T @ torch.linalg.inv(sampler.S) @ sampler.G) * scale * scale[:, None]
    best = float(torch.einsum("kf,fg,kg->k", corners, A, corners).max())
    found = torch.einsum("rbf,fg,rbg->rb", delta, A, delta).amax(0)
    assert float(delta.abs().max()) <= 0.3 * (1 + 1e-9)
    assert float(found.min()) > 0.98 * best
    assert float(found.max()) <= best * (1 + 1e-6)


def test_the_search_comes_near_the_closed_form_without_gradients():
    sampler = LinearGaussian(matrix(5, 2), 0.7)
    attacked, whitening = under_attack(sampler)
    ball = Ball(whitening, attacked.x, 0.4)
    delta = adversarial.search(attacked.objective(ball), AttackSettings(restarts=2, queries=300, draws=64), torch.Generator().manual_seed(0))
    scale = whitening.scale["x"]
    A = (sampler.G.T @ torch.linalg.inv(sampler.S) @ sampler.G) * scale * scale[:, None]
    exact = 0.5 * torch.einsum("rbf,fg,rbg->rb", delta, A, delta)
    assert float(exact.amax(0).min()) > 0.85 * 0.5 * 5 * 0.4**2 * float(torch.linalg.eigvalsh(A)[-1])


def test_kl_of_draws_is_that_of_the_gaussians():
    """Normalised or up to a factor of x alone."""
    sampler = LinearGaussian(matrix(5, 2), 0.7)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1, 5, generator=generator, dtype=torch.float64)
    height, along = torch.linalg.eigh(sampler.G.T @ torch.linalg.inv(sampler.S) @ sampler.G)
    moved = x + along[:, -1] / height[-1].sqrt()
    z = sampler.draw(x, 200_000, generator)
    clean, other = sampler.density(z, x), sampler.density(z, moved)
    assert float(divergence(clean, other, True)) == pytest.approx(0.5, rel=0.02)
    assert float(divergence(clean, other + 5.0, False)) == pytest.approx(0.5, rel=0.02)
    assert float(energy_distance(z[:, :100], z[:, :100])) == 0.0


@pytest.mark.parametrize("estimator", ["npe", "fmpe", "nle", "nre"])
def test_gradients_agree_with_finite_differences(line_bank, estimator, tmp_path):
    small = {"npe": QUICK, "fmpe": {"hidden": 16, "blocks": 1}, "nle": {"hidden": [16]}, "nre": {"hidden": 16}}[estimator]
    run = sp.train(line_bank, estimator, out=tmp_path / "run", progress=silent, **{"batch_size": 512, **small, "max_epochs": 1})
    posterior = from_run(run)
    target = target_of(posterior)
    assert target.gradients
    x = {"x": torch.tensor([[0.4, -0.7], [1.1, 0.2]])}
    rows = np.random.default_rng(0).standard_normal((500, 2))
    ball = Ball(Whitening.fit(posterior.x, {"x": rows}), x, 0.5)
    z = torch.randn(2, 16, 2, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        log_q = target.log_prob(z, target.condition(x)) if target.objectives[0] == "forward" else z[..., 0]
    objective = Objective(target, ball, Draws(z, log_q), "auto", 3)
    delta = 0.2 * torch.randn(1, 2, 2, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    here = delta.clone().requires_grad_()
    slope = torch.autograd.grad(objective(here, 0, 16)[1].sum(), here)[0]
    h = 1e-2  # the nets are of single precision
    for b in range(2):
        for f in range(2):
            step = torch.zeros_like(delta)
            step[0, b, f] = h
            with torch.no_grad():
                difference = float((objective(delta + step, 0, 16)[0] - objective(delta - step, 0, 16)[0]).sum()) / (2 * h)
            assert float(slope[0, b, f]) == pytest.approx(difference, rel=0.02, abs=2e-3)


# ------------------------------------------------------------------------------------------------------------- criteria


@pytest.mark.parametrize("name", EXACT)
def test_exact_posteriors_pass(name):
    found = verdicts(EXACT[name], 0, attacked=50)
    assert {n for n, v in found.items() if not v.passed} == set(), found


def test_a_posterior_that_runs_away_off_its_data_is_refused():
    found = verdicts(FRAGILE, 0, attacked=50)
    assert not found["fragility"].passed
    assert found["fragility"].mend


def test_masked_gradients_are_caught():
    """x is seen rounded: no gradient comes through, and a search without finds what PGD cannot."""
    found = verdicts(LinearGaussian(matrix(10, 1), 0.05, rounded=0.05), 0, attacked=50)
    assert not found["gradient masking"].passed
    assert "100% of gradient steps had none" in found["gradient masking"].statement


class Chained(LinearGaussian):
    """Refuses to draw, as samplers with chains do, unless its chains are only judged."""

    judged = None

    def sample(self, x, n, generator):
        if isinstance(x, dict):
            if self.judged is None:
                raise ChainError("have not converged")
            self.judged.append(np.ones(len(next(iter(x.values()))), bool))
        return super().sample(x, n, generator)


def test_chains_of_clean_data_that_have_not_converged_end_no_gate():
    """Coverage judges them; attacks go on with what they drew, and what is refused under attack is left out."""
    found = verdicts(Chained(matrix(4, 2), 0.5), 0, attacked=10, attack_steps=2, attack_queries=2)
    assert found["fragility"].passed
    assert "refuses all attacked data" in found["coverage under attack"].statement


def test_without_gradients_the_search_alone_decides_and_the_figures_say_so():
    @dataclass(frozen=True)
    class Bare:
        inner: LinearGaussian

        def sample(self, x, n, seed):
            return self.inner.sample(x, n, seed)

        def log_prob(self, z, x):
            return self.inner.log_prob(z, x)

    given = examined(FRAGILE, 0, 30)
    part = robustness.examine(replace(given, posterior=replace(given.posterior, sampler=Bare(FRAGILE))), Criteria())
    assert part.not_tested == ("attacks by gradient",)
    assert part.figures["robustness"]["gradients"] is False
    assert not {v.name: v for v in part.criteria}["fragility"].passed


def test_a_posterior_without_density_is_said_not_to_be_tested():
    class Draws:
        def sample(self, x, n, seed):
            return EXACT["2"].sample(x, n, seed)

        def log_prob(self, z, x):
            raise NotImplementedError("no density")

    given = examined(EXACT["2"], 0, 20)
    part = robustness.examine(replace(given, posterior=replace(given.posterior, sampler=Draws())), Criteria())
    assert part.not_tested == ("robustness",)
    assert part.criteria == ()


def test_the_same_seed_gives_the_same_verdicts_and_leaves_the_global_generators_alone():
    state = torch.get_rng_state()
    assert verdicts(EXACT["2"], 3, attacked=20) == verdicts(EXACT["2"], 3, attacked=20)
    assert verdicts(EXACT["2"], 3, attacked=20) != verdicts(EXACT["2"], 4, attacked=20)
    assert torch.equal(state, torch.get_rng_state())


@pytest.mark.science
@pytest.mark.parametrize("name", EXACT)
def test_exact_posteriors_pass_in_95_of_100_seeds(name):
    passed = [all(v.passed for v in verdicts(EXACT[name], seed).values()) for seed in range(1000, 1100)]
    assert sum(passed) >= 95


@pytest.mark.science
def test_a_fragile_posterior_is_refused_in_95_of_100_seeds():
    assert sum(not verdicts(FRAGILE, seed)["fragility"].passed for seed in range(1000, 1100)) >= 95


# -------------------------------------------------------------------------------------------------------------- limits


def spec_and_rows(transform="none", shape=(4,)):
    rng = np.random.default_rng(0)
    rows = np.exp(rng.standard_normal((500, *shape)))
    rows[:, 0] = 3.0
    return ObservationSpec.declare(shape, "float64", transform), {"x": rows}


@pytest.mark.parametrize("transform", ["none", "log", "asinh"])
def test_a_perturbation_is_in_robust_sds_after_the_declared_transform(transform):
    spec, rows = spec_and_rows(transform)
    whitening = Whitening.fit(spec, rows)
    assert whitening.size == 3, "the first feature is constant"
    x = {"x": torch.as_tensor(rows["x"][:5])}
    delta = 0.3 * torch.ones(5, 3, dtype=torch.float64)
    moved = whitening.move(x, delta)
    assert torch.equal(moved["x"][:, 0], x["x"][:, 0])
    assert torch.allclose(whitening.whiten(moved) - whitening.whiten(x), delta)
    t = {"none": lambda v: v, "log": np.log, "asinh": np.arcsinh}[transform](rows["x"][:, 1:])
    scale = (np.quantile(t, 0.75, axis=0) - np.quantile(t, 0.25, axis=0)) / 1.349
    assert np.allclose(whitening.scale["x"].numpy(), scale)


@pytest.mark.parametrize("norm", ["l2", "linf"])
def test_bounds_features_and_a_users_set_are_respected(norm):
    spec, rows = spec_and_rows()
    x = {"x": torch.as_tensor(rows["x"][:20])}

    def project(moved, clean):
        return np.where(np.arange(4) == 3, np.minimum(moved, clean), moved)  # the last may only fall

    limits = Limits(low=0.0, high=[9.0, 2.0, 9.0, 9.0], features=[1, 1, 0, 1], project=project)
    whitening = Whitening.fit(spec, rows, features=limits.features)
    ball = Ball(whitening, x, 2.0, norm, limits)
    moved = [ball.moved(part)["x"] for part in ball.random(10, torch.Generator().manual_seed(0))]
    for part in moved:
        assert (part >= 0).all()
        assert (part[:, 1] <= torch.maximum(x["x"][:, 1], torch.tensor(2.0)) + 1e-12).all()
        assert torch.equal(part[:, 2], x["x"][:, 2])
        assert (part[:, 3] <= x["x"][:, 3] + 1e-12).all()
    assert any((part[:, 3] < x["x"][:, 3] - 0.1).any() for part in moved)


def test_masks_and_what_they_leave_out_stay():
    spec = ObservationSpec.declare({"set": (3, 2), "set_mask": (3,)}, "float64")
    rng = np.random.default_rng(0)
    rows = {"set": rng.standard_normal((200, 3, 2)), "set_mask": (rng.uniform(size=(200, 3)) < 0.6).astype(float)}
    whitening = Whitening.fit(spec, rows, {"set": "set_mask"})
    x = {k: torch.as_tensor(v[:20]) for k, v in rows.items()}
    ball = Ball(whitening, x, 0.5)
    delta = ball.random(1, torch.Generator().manual_seed(0))
    moved = ball.moved(delta[0])
    present = x["set_mask"] > 0.5
    assert torch.equal(moved["set_mask"], x["set_mask"])
    assert torch.equal(moved["set"][~present], x["set"][~present])
    assert not torch.equal(moved["set"][present], x["set"][present])
    some = present.any(1)
    assert torch.allclose(ball.size(delta)[0][some], torch.tensor(0.5, dtype=torch.float64))


# ------------------------------------------------------------------------------------------------------------ sp.attack


def test_attack_of_a_run_finds_the_worst_and_says_how_far(line_run):
    x = np.array([[0.5, -1.0], [1.0, 0.3]])
    found = sp.attack(line_run, x, eps=0.3, steps=20)
    assert found.x.shape == (2, 2)
    assert found.names == ("x[0]", "x[1]")
    assert np.allclose(found.eps, 0.3, rtol=1e-4)
    assert (found.kl > 0.5 * found.noise_kl).all()
    again = sp.attack(line_run, x, eps=0.3, steps=20)
    assert np.array_equal(found.x, again.x)
    one = sp.attack(line_run.path, x[0], eps=0.3, steps=5, gradients=False, queries=20)
    assert one.x.shape == (2,)


def test_a_targeted_attack_moves_towards_its_target(line_run, line_simulator):
    posterior = from_run(line_run)
    x, goal = np.array([0.0, 0.0]), np.array([4.0, 0.0])
    before = posterior.log_prob(goal, x)
    found = sp.attack(line_run, x, eps=0.5, towards=goal, steps=20, simulator=line_simulator)
    assert posterior.log_prob(goal, found.x) > before + 0.5
    assert found.x[0] > 0.3
    assert found.predictive.shape == (1, 2)
    other = sp.attack(line_run, x, eps=0.5, towards_x=np.array([0.0, 2.0]), steps=20)
    assert other.x[1] > 0.3
    assert abs(other.x[0]) < abs(other.x[1])


def test_a_universal_perturbation_is_one_for_all(line_run):
    found = sp.attack(line_run, np.random.default_rng(0).standard_normal((5, 2)), eps=0.3, universal=True, steps=10)
    assert np.allclose(found.delta, found.delta[:1], atol=1e-6)
    assert np.allclose(found.eps, 0.3, rtol=1e-4)


@pytest.mark.parametrize(("given", "message"), [
    ({"eps": 0.0}, "must be above 0"), ({"norm": "l1"}, "expected text, one of l2, linf"), ({"towards": [1.0]}, "towards must be one theta"),
    ({"towards": [0.0, 0.0], "towards_x": [0.0, 0.0]}, "not both"), ({"features": [0, 0]}, "no feature of x may be perturbed"),
    ({"low": [0.0, 0.0, 0.0]}, "low of perturbed x must be a number or of x's shape"), ({"stpes": 3}, "no setting is called 'stpes'"),
])
def test_a_mistake_in_an_attack_is_one_line(line_run, given, message):
    with pytest.raises(sp.UserError, match=message) as error:
        sp.attack(line_run, np.zeros(2), **given)
    assert "\n" not in str(error.value)


def test_a_posterior_without_rows_says_what_it_needs(line_run):
    with pytest.raises(SettingError, match="give rows="):
        sp.attack(from_run(line_run), np.zeros(2))
