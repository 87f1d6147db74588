"""Signals in the bank, noise in the trainer: fresh every epoch, seeded, held to its contract, and never run from a bank."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import sbiplat as sp
from sbiplat.errors import OtherTraining, RunError, SimulatorError
from sbiplat.progress import silent
from sbiplat.simulator import check
from sbiplat.training import batches, trainer

NOISE = 0.5
PRIOR = sp.Prior({"a": sp.Normal(0.0, 1.0), "b": sp.Normal(0.0, 1.0)})
SMALL = {"flow": "gaussian", "max_epochs": 30, "batch_size": 64, "embedding_hidden": [32], "context": 8, "learning_rate": 3e-3}


def noisy(signal, theta, rng):
    return signal + NOISE * torch.randn(signal.shape, generator=rng, device=signal.device)


def simulator(observe=noisy, x_shape=(2,), **settings):
    def wave(theta, rng):
        """The parameters themselves."""
        return np.asarray(theta)

    return sp.simulator(prior=PRIOR, x_shape=x_shape, batched=True, observe=observe, name="wave", **settings)(wave)


def train(bank, out, made, **settings):
    return sp.train(bank, out=out, simulator=made, progress=silent, **{**SMALL, **settings})


@pytest.fixture(scope="module")
def bank(tmp_path_factory):
    return sp.simulate(simulator(), 2500, 1, tmp_path_factory.mktemp("signals") / "b", workers=1, progress=silent)


@pytest.fixture(scope="module")
def run(bank, tmp_path_factory):
    return train(bank, tmp_path_factory.mktemp("signals") / "run", simulator())


def test_the_bank_holds_signals_without_noise(bank):
    assert bank.header.signals
    np.testing.assert_array_equal(bank.x, bank.theta.astype(np.float32))


def test_the_posterior_is_that_of_the_noisy_data(run):
    certificate = sp.gate(run, simulator=simulator(), progress=silent)
    assert certificate.passed, certificate.failed
    draws = sp.load(run).sample(np.array([1.0, -1.0]), 20_000, seed=0)
    shrink = 1 / (1 + NOISE**2)
    np.testing.assert_allclose(draws.mean(0), [shrink, -shrink], atol=0.07)
    np.testing.assert_allclose(draws.std(0), NOISE * np.sqrt(shrink), rtol=0.12)


def test_noise_is_fresh_every_epoch_and_fixed_for_validation(bank, tmp_path, monkeypatch):
    seen = []

    def spy(signal, theta, rng):
        x = noisy(signal, theta, rng)
        seen.append((len(signal), float((x - signal)[0, 0]), rng.initial_seed()))
        return x

    train(bank, tmp_path / "run", simulator(spy), max_epochs=3)
    batches = [s for s in seen if s[0] == 64]
    assert len(batches) > 60
    seen = [s for s in seen if s[0] > 8]  # less the check of its contract
    assert len({s[2] for s in seen}) == len(seen), "no noise is used twice"
    assert sum(s[0] == 125 for s in seen) == 1, "the validation rows are observed once"


@pytest.mark.parametrize("streamed", [False, True])
def test_a_resumed_training_ends_with_the_weights_of_an_unbroken_one(streamed, bank, tmp_path, monkeypatch):
    if streamed:
        original = batches.Batches
        monkeypatch.setattr(batches, "Batches", lambda *a: original(*a[:-1], 20_000))
    whole = train(bank, tmp_path / "whole", simulator(), max_epochs=3)
    steps, step = [0], trainer._Training._step

    def stopping(self, batch):
        steps[0] += 1
        if steps[0] == 45:
            raise trainer.Interrupted
        return step(self, batch)

    monkeypatch.setattr(trainer._Training, "_step", stopping)
    with pytest.raises(trainer.Stopped):
        train(bank, tmp_path / "broken", simulator(), max_epochs=3)
    assert train(bank, tmp_path / "broken", simulator(), max_epochs=3).weights_digest == whole.weights_digest


def test_the_gate_s_noise_is_fixed_by_its_seed(run):
    figures = [sp.gate(run, simulator=simulator(), n=250, seed=s, progress=silent).figures for s in (3, 3, 4)]
    assert figures[0] == figures[1]
    assert figures[0]["information"] != figures[2]["information"]


def test_another_noise_needs_no_new_bank_but_a_new_training(bank, run, tmp_path):
    def louder(signal, theta, rng):
        return signal + 2 * torch.randn(signal.shape, generator=rng, device=signal.device)

    assert sp.simulate(simulator(louder), 2500, 1, bank.path, workers=1, progress=silent).digest == bank.digest
    with pytest.raises(OtherTraining, match="the code of observe"):
        train(bank, run.path, simulator(louder))
    with pytest.raises(RunError, match="the code of observe has changed"):
        sp.gate(run, simulator=simulator(louder), progress=silent)
    draws = sp.load(train(bank, tmp_path / "run", simulator(louder)), allow_uncertified=True).sample(np.zeros(2), 5000, seed=0)
    np.testing.assert_allclose(draws.std(0), 2 / np.sqrt(5), rtol=0.15)


def test_a_mask_may_change_the_shape_and_read_theta(tmp_path):
    def masked(signal, theta, rng):
        keep = torch.rand((len(theta), 3), generator=rng) < 0.7
        return {"seen": torch.where(keep, signal["s"] + 0.1 * theta[:, :1], torch.zeros(())), "mask": keep.float()}

    @sp.simulator(prior=PRIOR, x_shape={"seen": (3,), "mask": (3,)}, signal_shape={"s": (3,)}, observe=masked, name="masked")
    def made(theta, rng):
        return {"s": theta[0] + rng.standard_normal(3)}

    assert check(made).finite == 1.0
    bank = sp.simulate(made, 600, 1, tmp_path / "b", workers=1, progress=silent)
    run = train(bank, tmp_path / "run", made, max_epochs=2)
    assert sp.load(run, allow_uncertified=True).sample({"seen": np.zeros(3), "mask": np.ones(3)}, 5).shape == (5, 2)
    row = made.rows(np.zeros((2, 2)), [np.random.default_rng(0)] * 2)[0]
    assert set(row) == {"seen", "mask"}


@pytest.mark.parametrize(("observe", "says"), [
    (lambda s, t, rng: s[:, :1], "of shape (8, 1), declared is (8, 2)"), (lambda s, t, rng: s.numpy(), "must return a tensor"),
    (lambda s, t, rng: s / 0 * 0, "NaN or infinite"), (lambda s, t, rng: 1 / 0, "observe failed: ZeroDivisionError"),
    (lambda s, t, rng: s + torch.randn(s.shape), "draw all randomness from it"), (lambda s, t, rng: s + 1, "draws nothing from its rng"),
])
def test_a_broken_observe_is_told_before_anything_is_simulated(observe, says, tmp_path):
    with pytest.raises(SimulatorError) as error:
        sp.simulate(simulator(observe), 100, 1, tmp_path / "b", workers=1, progress=silent)
    assert says in str(error.value)
    assert not (tmp_path / "b").exists()


def test_an_observe_that_writes_to_its_signal_does_no_harm(bank, tmp_path):
    def rude(signal, theta, rng):
        signal += NOISE * torch.randn(signal.shape, generator=rng)
        return signal

    def polite(signal, theta, rng):
        return signal + NOISE * torch.randn(signal.shape, generator=rng)

    digests = [train(bank, tmp_path / f.__name__, simulator(f), max_epochs=2).weights_digest for f in (rude, polite)]
    assert digests[0] == digests[1]


def test_signals_are_never_taken_for_observations(bank, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(sys.modules["sbiplat.simulator"], "_registered", {})  # as in another process
        with pytest.raises(SimulatorError, match="no simulator is registered here as"):
            sp.train(bank.path, out=tmp_path / "run", progress=silent, **SMALL)
    bare = simulator(None)
    with pytest.raises(sp.UserError, match="holds signals, and the simulator has no observe now"):
        sp.train(bank, out=tmp_path / "run", simulator=bare, progress=silent, **SMALL)
    assert not (tmp_path / "run").exists()


WAVE = """
import torch
import sbiplat as sp

def noisy(signal, theta, rng):
    return signal + 0.5 * torch.randn(signal.shape, generator=rng, device=signal.device)

@sp.simulator(prior=sp.Prior({"a": sp.Normal(0, 1)}), x_shape=(2,), batched=True, observe=noisy)
def wave(theta, rng):
    \"\"\"A wave.\"\"\"
    return theta.repeat(2, 1)
"""


def test_the_commands_take_the_simulator_of_a_bank_of_signals(tmp_path):
    (tmp_path / "wave.py").write_text(WAVE)
    np.save(tmp_path / "x.npy", np.ones(2))
    (tmp_path / "w.toml").write_text("""out = "w"
[simulate]
simulator = "wave.py:wave"
n = 3000
seed = 1
[train]
flow = "gaussian"
max_epochs = 12
[sample]
observation = "x.npy"
n = 100
""")

    def sbiplat(*words):
        return subprocess.run([Path(sys.executable).parent / "sbiplat", *words], cwd=tmp_path, capture_output=True, text=True, timeout=120)

    assert "banks hold it" in sbiplat("simulators", "wave.py:wave").stdout
    assert sbiplat("simulate", "wave.py:wave", "--n", "3000", "--seed", "1", "--out", "b").returncode == 0
    settings = ["--set", "flow=gaussian", "--set", "max_epochs=12"]
    lost = sbiplat("train", "b", "--out", "r", *settings)
    assert lost.returncode == 2
    assert "name it: sbiplat train b --simulator file.py:object" in lost.stderr
    assert sbiplat("train", "b", "--out", "r", *settings, "--simulator", "wave.py:wave").returncode == 0
    assert "--simulator file.py:object" in sbiplat("gate", "r").stderr
    assert sbiplat("gate", "r", "--simulator", "wave.py:wave").returncode == 0
    assert sbiplat("sample", "r", "--observation", "x.npy", "--n", "10", "--out", "d.csv").returncode == 0, "it needs no simulator"
    done = sbiplat("run", "w.toml")
    assert done.returncode == 0, done.stderr
    again = sbiplat("run", "w.toml")
    assert again.stderr.count("skipped") == 5, again.stderr


def test_a_bank_of_x_does_not_become_one_of_signals(tmp_path):
    bank = sp.simulate(simulator(None), 600, 1, tmp_path / "b", workers=1, progress=silent)
    with pytest.raises(sp.UserError, match="holds x itself, and the simulator has an observe now"):
        sp.simulate(simulator(), 700, 1, bank.path, workers=1, progress=silent)
    with pytest.raises(SimulatorError, match="was made without one"):
        train(bank, tmp_path / "run", simulator())
    assert not sp.Bank.open(bank.path).header.signals


def test_a_noise_that_ignores_its_generator_is_told_by_train_and_gate(bank, run, tmp_path, monkeypatch):
    def ignores(signal, theta, rng):
        return signal + torch.randn(signal.shape)

    with pytest.raises(SimulatorError, match="draw all randomness from it"):
        train(bank, tmp_path / "run", simulator(ignores))
    assert not (tmp_path / "run").exists()


def test_train_refuses_a_simulator_that_is_not_the_banks(line_bank, tmp_path):
    @sp.simulator(prior=sp.Prior({"a": sp.Normal(0, 1)}), x_shape=(2,))
    def other(theta, rng):
        return theta[0] + rng.standard_normal(2)

    with pytest.raises(sp.UserError, match="other"):
        sp.train(line_bank, "npe", out=tmp_path / "run", simulator=other, progress=silent, **SMALL)
