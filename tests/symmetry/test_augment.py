"""Augmentation: the law of moved rows is that of the bank's, and a training with it is seeded, resumable and a plain run."""

import json

import numpy as np
import pytest
import torch
from scipy import stats

import sbiplat as sp
from sbiplat.bank.stream import Batches
from sbiplat.errors import OtherTraining, SettingError
from sbiplat.estimators.base import Estimator
from sbiplat.progress import Progress, silent
from sbiplat.symmetry import GroupAction, Permutation, Product, Rotation3D, TimeShift, Translation
from sbiplat.symmetry.augment import Augmentation
from sbiplat.training import batches, trainer
from simulators import damped_oscillator as oscillator
from simulators import location

ROWS = 20_000
QUICK = {"max_epochs": 3, "batch_size": 64, "context": 8, "embedding_hidden": [16]}


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def worst(*laws):
    """The least p-value of KS tests of (values, law)."""
    return min(stats.kstest(values, law.cdf).pvalue for values, law in laws)


def rows_of(prior, simulate, n=ROWS):
    """z and x of the prior."""
    rng = np.random.default_rng(3)
    theta = prior.sample(rng, n)
    return torch.as_tensor(prior.unconstrain(theta)), {"x": torch.as_tensor(simulate(theta, rng))}


def always(self, h, theta):
    """A change of the prior that accepts every move."""
    return self.action.act_theta(h, theta)[0], torch.zeros(len(theta), dtype=torch.float64)


def moved_location(steps=4):
    prior = sp.Prior({"mu": sp.Normal(0, location.SCALE)})
    z, x = rows_of(prior, lambda theta, rng: theta + rng.standard_normal((len(theta), location.COUNT)))
    augment, random = Augmentation.of(Translation(("mu",)), prior), generator()
    for _ in range(steps):
        z, x = augment(z, x, random)
    return prior.constrain(z.numpy())[:, 0], x["x"].numpy(), augment


def p_of_location(mu, x):
    """Of the prior, of the exact posterior, of the evidence, and of mu's independence of m given that."""
    mean, sd = location.posterior_mean(x), np.sqrt(location.VARIANCE)
    spread = np.sqrt(location.SCALE**2 + 1 / location.COUNT)
    known = worst((mu, stats.norm(0, location.SCALE)), ((mu - mean) / sd, stats.norm()), (x.mean(1), stats.norm(0, spread)))
    return min(known, stats.pearsonr((mu - mean) / sd, mean).pvalue)


def test_moved_rows_have_the_law_of_the_bank_s():
    mu, x, _ = moved_location()
    assert p_of_location(mu, x) > 1e-3


def test_a_move_without_the_acceptance_step_is_found(monkeypatch):
    monkeypatch.setattr("sbiplat.symmetry.frame.Frame.moved_by", always)
    mu, x, _ = moved_location(1)
    assert p_of_location(mu, x) < 1e-6


def test_an_x_that_stays_behind_is_found(monkeypatch):
    monkeypatch.setattr(Translation, "act_data", lambda self, g, x: x)
    mu, x, _ = moved_location(1)
    assert p_of_location(mu, x) < 1e-6


def test_the_acceptance_is_that_of_theory():
    """Of a normal law and normal steps of c of its sd: 2 / pi arctan(2 / c) (Gelman, Roberts and Gilks, 1996)."""
    augment = moved_location(1)[2]
    width = augment.frame.widths[0] / location.SCALE
    assert abs(width - 2.38) < 0.1
    assert abs(augment.acceptance - 2 / np.pi * np.arctan(2 / width)) < 4 * 0.5 / 64


class Scale(GroupAction):
    """theta e^g and x e^g, whose determinant is not 1, in the chart log, or one that is not odd."""

    parameters = ("s",)
    skew = 0.0

    def exp(self, v):
        return v + self.skew * (torch.sqrt(1 + v * v) - 1)

    def log(self, g):
        if not self.skew:
            return g
        a, b = 1 - self.skew**2, g + self.skew
        return (b - self.skew * torch.sqrt(b * b + a)) / a

    def pose_of(self, theta):
        return theta.log()

    def act_theta(self, g, theta):
        return theta * g.exp(), g[:, 0]

    def act_data(self, g, x):
        return {"x": x["x"] * g.exp()}


class Skewed(Scale):
    skew = 0.9


def p_of_scale(action, steps=3):
    prior = sp.Prior({"s": sp.Uniform(1.0, 3.0)})
    z, x = rows_of(prior, lambda theta, rng: theta * rng.standard_normal((len(theta), 1)))
    augment, random = Augmentation.of(action, prior), generator(1)
    for _ in range(steps):
        z, x = augment(z, x, random)
    s = prior.constrain(z.numpy())[:, 0]
    return worst((s, stats.uniform(1, 2)), (x["x"][:, 0].numpy() / s, stats.norm()))


@pytest.mark.parametrize("action", [Scale(), Skewed()], ids=["log", "a skewed chart"])
def test_a_determinant_and_a_skewed_chart_leave_the_law(action):
    torch.testing.assert_close(action.log(action.exp(torch.linspace(-2, 2, 9))), torch.linspace(-2, 2, 9))
    assert p_of_scale(action) > 1e-3


def test_a_forgotten_determinant_and_a_lopsided_proposal_are_found(monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(Scale, "act_theta", lambda self, g, theta: (theta * g.exp(), torch.zeros(len(g), dtype=torch.float64)))
        assert p_of_scale(Scale()) < 1e-6
    monkeypatch.setattr(Skewed, "inverse", lambda self, g: g)
    assert p_of_scale(Skewed()) < 1e-6, "never the inverse: as lopsided as the chart"


def test_an_oscillator_moves_with_its_signal_and_within_the_prior():
    prior = oscillator.prior
    z, x = rows_of(prior, lambda theta, rng: oscillator.signal(theta), 2000)
    augment = Augmentation.of(TimeShift("tau", spacing=oscillator.SPACING), prior)
    moved, seen = augment(z, x, generator())
    theta = prior.constrain(moved.numpy())
    np.testing.assert_allclose(seen["x"], oscillator.signal(theta), atol=1e-6)
    assert torch.equal(moved[:, :2], z[:, :2])
    share = float((moved[:, 2] != z[:, 2]).double().mean())
    assert abs(share - augment.acceptance) < 5 * 0.5 * np.sqrt(1 / 2000 + 1 / 4096)
    assert worst((theta[:, 2], stats.uniform(-5, 5))) > 1e-3


def test_the_elements_of_a_set_come_in_another_order_for_every_row():
    """A set of draws around mu: its order alone, and beside a translation."""
    prior = sp.Prior({"mu": sp.Normal(0, 1)})
    z, x = rows_of(prior, lambda theta, rng: theta + np.arange(5.0), 500)
    for action in (Permutation(), Product(Translation(("mu",)), Permutation())):
        moved, seen = Augmentation.of(action, prior)(z, x, generator())
        mu = torch.as_tensor(prior.constrain(moved.numpy()))
        torch.testing.assert_close(seen["x"].sort(1).values - mu, torch.arange(5.0, dtype=torch.float64).expand(500, 5))
        first = (seen["x"] - mu)[:, 0]
        assert torch.equal(moved, z) == isinstance(action, Permutation)
        assert all(abs(float((first - k).abs().lt(1e-6).double().mean()) - 0.2) < 5 * 0.4 / np.sqrt(500) for k in range(5))


def test_an_orientation_of_the_haar_measure_is_always_moved_and_stays_haar():
    prior = sp.Prior({"alpha": sp.Uniform(0, 2 * np.pi), "cos_beta": sp.Uniform(-1, 1), "gamma": sp.Uniform(0, 2 * np.pi)})
    action = Rotation3D(("alpha", "cos_beta", "gamma"))
    axis = torch.tensor([[0.3, -0.5, 0.8]], dtype=torch.float64)
    z, _ = rows_of(prior, lambda theta, rng: theta)

    def seen_from(z):
        pose = action.pose_of(torch.as_tensor(prior.constrain(z.numpy())))
        return action.act_data(pose, {"x": axis.expand(len(z), 3)})["x"]

    augment = Augmentation.of(action, prior)
    assert augment.acceptance > 0.999
    moved, x = augment(z, {"x": seen_from(z)}, generator())
    theta = prior.constrain(moved.numpy())
    laws = (stats.uniform(0, 2 * np.pi), stats.uniform(-1, 2), stats.uniform(0, 2 * np.pi))
    assert worst(*zip(theta.T, laws, strict=True)) > 1e-3
    torch.testing.assert_close(x["x"], seen_from(moved), atol=1e-6, rtol=0)


# ---------------------------------------------------------------------------------------------------------- training


@pytest.fixture(scope="module")
def bank(tmp_path_factory):
    return sp.simulate(location.location, 800, 1, tmp_path_factory.mktemp("augment") / "bank", workers=1, progress=silent)


def train(bank, out, estimator="npe", progress=silent, simulator=location.location, **settings):
    quick = {"flow": "gaussian", **QUICK} if estimator == "npe" else {"max_epochs": 3, "batch_size": 64}
    return sp.train(bank, estimator, out=out, simulator=simulator, progress=progress, **{**quick, "symmetry": "augment", **settings})


@pytest.mark.parametrize("settings", [
    {}, {"streamed": True}, {"accumulate": 3}, {"members": 2}, {"estimator": "fmpe"}, {"estimator": "npse", "defend": ["noise:0.1"]},
    {"estimator": "nle", "flow": "gaussian"}, {"estimator": "nre", "hidden": 16}, {"signals": True},
], ids=lambda s: "-".join(map(str, s.values())) or "npe")
def test_a_resumed_training_ends_with_the_weights_of_an_unbroken_one(bank, tmp_path, monkeypatch, settings):
    settings = dict(settings)
    if settings.pop("streamed", False):
        monkeypatch.setattr(batches, "Batches", lambda *a: Batches(*a[:-1], 20_000))
    if settings.pop("signals", False):
        settings["simulator"] = noisy()
        bank = sp.simulate(settings["simulator"], 800, 1, tmp_path / "bank", workers=1, progress=silent)
    whole = train(bank, tmp_path / "whole", **settings)
    step = trainer._Training._step

    def stopping(self, batch):
        if self.state["step"] in (4, 16) and not self.run.path.joinpath(f"seen{self.state['step']}").exists():
            self.run.path.joinpath(f"seen{self.state['step']}").touch()
            raise trainer.Interrupted
        return step(self, batch)

    with monkeypatch.context() as patch:
        patch.setattr(trainer._Training, "_step", stopping)
        for _ in range(2):
            with pytest.raises(trainer.Stopped):
                train(bank, tmp_path / "broken", **settings)
        assert train(bank, tmp_path / "broken", **settings).weights_digest == whole.weights_digest


def noisy():
    def observe(signal, theta, rng):
        return signal + torch.randn(signal.shape, generator=rng, device=signal.device)

    return sp.simulator(prior=sp.Prior({"mu": sp.Normal(0, 10)}), x_shape=(5,), batched=True, observe=observe, name="noisy_location",
                        symmetry=Translation(("mu",)))(lambda theta, rng: np.repeat(theta, 5, 1))


def test_every_batch_is_moved_anew_and_validation_rows_stay(bank, tmp_path, monkeypatch):
    seen, rows, fitted = [], [], []
    step, validation = trainer._Training._step, trainer._Training._mean_loss

    def spy(self, batch):
        seen.append(batch["theta"].clone())
        return step(self, batch)

    def watch(self, disturbed):
        rows.append(self.validation["theta"].clone())
        fitted.extend(part.rows_were_fitted for part in self.estimator.modules() if isinstance(part, Estimator))
        return validation(self, disturbed)

    monkeypatch.setattr(trainer._Training, "_step", spy)
    monkeypatch.setattr(trainer._Training, "_mean_loss", watch)
    train(bank, tmp_path / "run", max_epochs=4)
    stored = set(bank.header.prior.unconstrain(bank.theta).astype(np.float32)[:, 0].tolist())
    moved = [v for v in torch.cat(seen)[:, 0].tolist() if v not in stored]
    acceptance = json.loads((tmp_path / "run" / "run.json").read_text())["symmetry"]["acceptance"]
    count = sum(map(len, seen))
    assert abs(len(moved) / count - acceptance) < 5 * 0.5 * np.sqrt(1 / count + 1 / 4096)
    assert len(set(moved)) == len(moved), "no row is moved twice to one place"
    assert all(set(r[:, 0].tolist()) <= stored for r in rows)
    assert not any(fitted), "a regression's leave-one-out is of rows that stay"


def test_the_run_is_a_plain_one_that_records_how_rows_were_moved(bank, tmp_path, monkeypatch):
    run = train(bank, tmp_path / "run")
    assert run.record["symmetry"]["action"]["action"] == "Translation"
    assert set(run.record["symmetry"]["widths"]) == {"mu"}
    assert "symmetry" not in run.record["architecture"]
    monkeypatch.setattr("sbiplat.symmetry.names.from_json", None)
    assert sp.load(run, allow_uncertified=True).sample(np.zeros(5), 10, seed=0).shape == (10, 1)
    assert train(bank, tmp_path / "run").weights_digest == run.weights_digest
    with pytest.raises(OtherTraining, match="symmetry = 'augment', not 'none'"):
        train(bank, tmp_path / "run", symmetry="none")
    plain = train(bank, tmp_path / "plain", symmetry="none")
    assert plain.weights_digest != run.weights_digest
    assert plain.config_digest != run.config_digest


def approximate(*factors):
    return sp.simulator(prior=sp.Prior({"mu": sp.Normal(0, 10), "b": sp.Normal(0, 1)}), x_shape=(5,), batched=True,
                        symmetry=Product(*factors) if len(factors) > 1 else factors[0], name="two_shifts")(
        lambda theta, rng: theta[:, :1] + 0.1 * theta[:, 1:] ** 2 + rng.standard_normal((len(theta), 5)))


def test_an_approximate_action_is_refused_and_of_a_product_its_exact_factors_move(tmp_path):
    exact, rough = Translation(("mu",)), Translation(("b",), exact=False)
    bank = sp.simulate(approximate(rough), 400, 1, tmp_path / "bank", workers=1, progress=silent)
    with pytest.raises(SettingError, match=r"approximate in b: .* take symmetry = .gnpe. or .none.") as error:
        train(bank, tmp_path / "run", simulator=approximate(rough))
    assert "\n" not in str(error.value)
    assert not (tmp_path / "run").exists()

    class Said(Progress):
        lines: list[str] = []

        def say(self, message):
            self.lines.append(message)

    train(bank, tmp_path / "run", simulator=approximate(exact, rough), progress=Said(), max_epochs=1)
    said = next(line for line in Said.lines if line.startswith("augment"))
    assert "mu by" in said
    assert said.endswith("not by b: approximate")


@pytest.mark.parametrize(("settings", "message"), [
    ({"kernel_ratio": 1.0}, "kernel_ratio is of symmetry = 'gnpe', and symmetry = 'augment'; leave it away"),
    ({"symmetry": "none", "proxy": "told"}, "proxy is of symmetry = 'gnpe'"),
    ({"symmetry": "agument"}, "symmetry = 'agument': expected"),
])
def test_settings_that_would_do_nothing_are_told(bank, tmp_path, settings, message):
    with pytest.raises(SettingError, match=message):
        train(bank, tmp_path / "run", **settings)
