"""Training: seeded, resumable to the same weights, and safe against what goes wrong."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import QUICK, line_posterior

import sbiplat as sp
from sbiplat import files
from sbiplat.bank.stream import Batches, split
from sbiplat.errors import OtherTraining, RunError, SettingError
from sbiplat.estimators.npe import NPE
from sbiplat.progress import silent
from sbiplat.runs import Run
from sbiplat.training import batches, begin, trainer


def train(bank, out, estimator="npe", **settings):
    quick = QUICK if estimator == "npe" else {k: v for k, v in QUICK.items() if k not in ("flow", "embedding_hidden")}
    return sp.train(bank, estimator, out=out, progress=silent, **{**quick, **settings})


def test_npe_finds_the_gaussian_posterior(line_run):
    posterior = sp.load(line_run)
    for x in ([0.0, 0.0], [1.0, -1.5]):
        draws = posterior.sample(np.array(x), 20_000, seed=0)
        mean, sd = line_posterior(x)
        np.testing.assert_allclose(draws.mean(0), mean, atol=0.15 * sd.max())
        np.testing.assert_allclose(draws.std(0), sd, rtol=0.12)


def test_same_seed_gives_the_same_weights_and_another_seed_others(line_bank, tmp_path):
    runs = [train(line_bank, tmp_path / str(k), seed=s, max_epochs=2) for k, s in enumerate((3, 3, 4))]
    assert runs[0].weights_digest == runs[1].weights_digest
    assert runs[0].weights_digest != runs[2].weights_digest


@pytest.mark.parametrize("settings", [
    {}, {"ema": 0.99}, {"optimizer": "muon", "embedding_hidden": [64, 64]}, {"memory_mb": 1.0, "flow": "nsf", "transforms": 1}, {"flow": "mog"},
    {"estimator": "npse"}, {"estimator": "fmpe"}, {"estimator": "nle"}, {"estimator": "nre", "hidden": 32, "balance": 100.0},
    {"defend": ["fisher:0.1", "noise:0.1"]}, {"estimator": "npse", "defend": ["fisher:0.1", "adversarial:0.2"], "ema": 0.0},
    {"members": 2}, {"flow": "cnf", "trace": "hutchinson", "ode_steps": 2},
    {"accumulate": 3}, {"estimator": "npse", "accumulate": 2},
    {"precision": "bf16", "flow": "nsf", "transforms": 1}, {"smooth": 0.8, "patience": 1, "learning_rate": 0.05},
    pytest.param({"compile": True, "estimator": "npse", "blocks": 1, "precision": "bf16", "accumulate": 3}, marks=pytest.mark.science),
], ids=["adamw", "ema", "muon", "streamed", "mog", "npse", "fmpe", "nle", "nre", "defended", "npse defended", "ensemble", "cnf", "accumulate", "npse accumulate", "bf16",
        "smooth", "compile"])
def test_a_resumed_training_ends_with_the_weights_of_an_unbroken_one(line_bank, tmp_path, monkeypatch, settings):
    settings = {"max_epochs": 3, **settings}
    if "memory_mb" in settings:
        monkeypatch.setattr(batches, "Batches", lambda *a: Batches(*a[:-1], 40_000))  # a budget that the bank exceeds
    unbroken = train(line_bank, tmp_path / "unbroken", **settings)
    for stop_after in (7, 40, 61, 95):  # optimizer steps, in different epochs and places
        steps, original = [0], trainer._Training._step

        def step(self, batch, steps=steps, original=original, stop_after=stop_after):
            steps[0] += 1
            if self.state["step"] + 1 >= stop_after and steps[0] > 1:
                raise trainer.Interrupted
            return original(self, batch)

        monkeypatch.setattr(trainer._Training, "_step", step)
        with pytest.raises(trainer.Stopped):
            train(line_bank, tmp_path / "broken", **settings)
        monkeypatch.setattr(trainer._Training, "_step", original)
    resumed = train(line_bank, tmp_path / "broken", **settings)
    assert resumed.weights_digest == unbroken.weights_digest
    strip = [[{k: v for k, v in m.items() if k != "seconds"} for m in r.metrics()] for r in (resumed, unbroken)]
    assert strip[0] == strip[1]
    assert not (resumed.path / "checkpoint").exists()


def test_training_leaves_the_global_generators_alone(line_bank, tmp_path):
    torch_before, numpy_before = torch.get_rng_state(), np.random.get_state()[1].copy()  # noqa: NPY002 - it must not change
    train(line_bank, tmp_path / "run", max_epochs=1)
    assert torch.equal(torch_before, torch.get_rng_state())
    np.testing.assert_array_equal(numpy_before, np.random.get_state()[1])  # noqa: NPY002


def test_a_finished_run_is_returned_at_once_and_other_settings_are_refused(line_bank, line_run):
    again = train(line_bank, line_run.path)
    assert again.weights_digest == line_run.weights_digest
    with pytest.raises(OtherTraining, match="max_epochs = 12, not 13"):
        train(line_bank, line_run.path, max_epochs=13)
    with pytest.raises(OtherTraining, match="seed = 0, not 5"):
        train(line_bank, line_run.path, seed=5)
    train(line_bank, line_run.path, checkpoint_seconds=5)  # practical settings may change


def test_a_run_of_before_a_setting_was_trained_with_its_default(line_bank, line_run, tmp_path):
    shutil.copytree(line_run.path, tmp_path / "run")
    record = json.loads((tmp_path / "run" / "run.json").read_text())
    for name in ("smooth", "accumulate", "precision", "compile", "defend"):
        del record["training"][name]
    files.write_json(tmp_path / "run" / "run.json", record)
    assert train(line_bank, tmp_path / "run").weights_digest == line_run.weights_digest
    with pytest.raises(OtherTraining, match="accumulate = 1, not 2"):
        train(line_bank, tmp_path / "run", accumulate=2)


def test_averages_follow_weights_that_a_module_replaces(line_bank, tmp_path):
    """A buffer that is bound anew in every step, not changed in place, is averaged as it is now; what has no home is refused."""
    class Counts(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("count", torch.zeros(()))

        def forward(self, x):
            if self.training:
                self.count = self.count + 1
            return x

    run = train(line_bank, tmp_path / "run", embedding=Counts, ema=0.5, max_epochs=2)
    steps = run.record["outcome"]["steps"]
    assert abs(float(run.estimator().embedding.count) - (steps - 1)) < 1e-3, "sum of 2^-k (n - k) over k = 1, 2, ..."
    odd = torch.nn.Linear(2, 2)
    odd.register_state_dict_post_hook(lambda module, state, prefix, local: state.update(made_up=torch.zeros(1)))
    with pytest.raises(SettingError, match="ema cannot average made_up"):
        trainer._homes(odd)


def test_best_weights_are_kept_when_later_epochs_are_worse(line_bank, tmp_path, monkeypatch):
    losses = iter([1.0, 0.5, 0.7, 0.8, 0.9, 0.95])
    kept = []
    original = trainer._Training._validation_loss

    def validation(self):
        original(self)
        kept.append({k: v.clone() for k, v in self.estimator.state_dict().items()})
        return next(losses)

    monkeypatch.setattr(trainer._Training, "_validation_loss", validation)
    run = train(line_bank, tmp_path / "run", max_epochs=50, patience=3, ema=0)
    assert len(kept) == 5, "three epochs without a better loss stop the training"
    for name, value in run.estimator().state_dict().items():
        assert torch.equal(value, kept[1][name])


def test_smoothed_losses_decide_when_to_stop_and_not_which_weights_are_kept(line_bank, tmp_path, monkeypatch):
    """v = 1, 0, .9, .8, ...: s = .9 s + .1 v falls on after v was least, in epoch 1."""
    losses = [1.0, 0.0, 0.9, 0.85, 0.95, 0.95, 0.95, 0.95, 0.95]
    smoothed = [1.0]
    for value in losses[1:]:
        smoothed.append(0.9 * smoothed[-1] + 0.1 * value)
    assert int(np.argmin(smoothed)) == 3
    left = iter(losses)
    monkeypatch.setattr(trainer._Training, "_validation_loss", lambda self: next(left))
    run = train(line_bank, tmp_path / "run", max_epochs=50, patience=2, smooth=0.9)
    assert run.record["outcome"]["best_epoch"] == 1
    assert run.record["outcome"]["epochs"] == 3 + 2 + 1, "patience counts from the least smoothed loss"
    np.testing.assert_allclose([m["smoothed_loss"] for m in run.metrics()], smoothed[:6])


def test_a_training_recovers_from_a_burst_of_bad_steps_with_its_best_weights_at_half_the_rate(line_bank, tmp_path, monkeypatch):
    original, recovered, made = NPE.loss, trainer._Training._recover, []

    def loss(self, theta, x):
        made.append(self.training)
        bad = self.training and 45 < sum(made) <= 45 + trainer.PATIENCE_WITH_NON_FINITE
        return original(self, theta, x) * (float("inf") if bad else 1.0)

    def recover(self):
        recovered(self)
        for name, value in self.estimator.state_dict().items():
            assert torch.equal(value, self.best[name])
        assert not any(o.state for o in self.optimizers), "the optimizer's memory goes"

    monkeypatch.setattr(NPE, "loss", loss)
    monkeypatch.setattr(trainer._Training, "_recover", recover)
    run = train(line_bank, tmp_path / "run", max_epochs=4)
    outcome = run.record["outcome"]
    assert (outcome["recoveries"], outcome["skipped_steps"]) == (1, trainer.PATIENCE_WITH_NON_FINITE)
    monkeypatch.undo()
    whole = train(line_bank, tmp_path / "whole", max_epochs=4)
    rates = [[m["learning_rate"] for m in r.metrics()] for r in (run, whole)]
    np.testing.assert_allclose(np.divide(*rates), [1, 0.5, 0.5, 0.5])
    assert run.metrics()[-1]["validation_loss"] < run.metrics()[0]["validation_loss"]


def test_steps_with_a_non_finite_loss_are_left_out(line_bank, tmp_path, monkeypatch):
    original, calls = NPE.loss, [0]

    def loss(self, theta, x):
        calls[0] += self.training
        return original(self, theta, x) * (float("nan") if self.training and calls[0] in (3, 4, 50) else 1.0)

    monkeypatch.setattr(NPE, "loss", loss)
    run = train(line_bank, tmp_path / "run", max_epochs=3)
    assert run.record["outcome"]["skipped_steps"] == 3
    assert all(np.isfinite(v).all() for v in (p.detach().numpy() for p in run.estimator().parameters()))


def test_a_training_that_diverges_for_good_says_so(line_bank, tmp_path, monkeypatch):
    original = NPE.loss
    monkeypatch.setattr(NPE, "loss", lambda self, t, x: original(self, t, x) * (float("inf") if self.training else 1.0))
    with pytest.raises(RunError, match=r"diverged 4 times .* try --set learning_rate="):
        train(line_bank, tmp_path / "run", max_epochs=10)


def test_an_outlier_in_the_bank_does_not_break_training(tmp_path):
    @sp.simulator(prior=sp.Prior({"a": sp.Normal(0, 1)}), x_shape=(3,), batched=True, name="outlier")
    def outlier(theta, rng):
        x = np.concatenate([theta + 0.1 * rng.standard_normal(theta.shape), np.ones_like(theta), rng.standard_cauchy(theta.shape) ** 3], axis=1)
        x[0, 0] = 1e30
        return x

    bank = sp.simulate(outlier, 4000, 1, tmp_path / "bank", workers=1, progress=silent)
    run = train(bank, tmp_path / "run", max_epochs=40)
    draws = sp.load(run, allow_uncertified=True).sample(np.array([0.5, 1.0, 0.0]), 2000, seed=0)
    assert abs(draws.mean() - 0.5) < 0.05
    assert draws.std() < 0.15, "the exact sd is 0.0995"


@pytest.mark.parametrize(("settings", "message"), [
    ({"batch_size": 0}, "batch_size = 0: expected a whole number of at least 1"),
    ({"learning_rate": float("nan")}, "learning_rate = nan"),
    ({"flow": "nfs"}, "flow = 'nfs': expected text, one of nsf, maf"),
    ({"flwo": "nsf"}, "no setting is called 'flwo'; did you mean flow"),
    ({"hidden": [64, "a"]}, "hidden = "),
    ({"device": "cuda:7"}, "not to be had here"),
    ({"device": "meta"}, "not to be had here"),
    ({"hidden": [10**9]}, "hidden = "),
    ({"seed": -1}, "seed must be a whole number"),
    ({"embedding": torch.nn.Linear(2, 2)}, "give the class Linear, not an instance"),
    ({"embedding": "nowhere.py:Net"}, "no simulator file|nowhere.py"),
    ({"embedding": torch.nn.Identity}, "must return"),
])
def test_impossible_settings_are_one_clear_line(line_bank, tmp_path, settings, message):
    if "embedding" in settings and settings["embedding"] is torch.nn.Identity:
        settings = {"embedding": type("Bad", (torch.nn.Module,), {"forward": lambda self, x: x[:, :, None]})}
    with pytest.raises(SettingError, match=message) as error:
        train(line_bank, tmp_path / "run", **settings)
    assert "\n" not in str(error.value)


def test_unknown_estimator_names_the_near_ones(line_bank, tmp_path):
    with pytest.raises(SettingError, match="no estimator is called 'npx'; did you mean npe"):
        sp.train(line_bank, "npx", out=tmp_path / "run")


# ------------------------------------------------------------------------------------------------------- batches


def test_every_training_row_comes_once_an_epoch_and_held_out_rows_never(line_bank):
    apart = split(line_bank, 0, 0.05, 0.1, 5000)
    assert not set(apart.validation) & set(apart.held_out)
    z = line_bank.header.prior.unconstrain(line_bank.theta).astype(np.float32)
    out = {tuple(row) for row in z[np.concatenate([apart.validation, apart.held_out])]}
    for budget in (2**30, 40_000):
        batches = Batches(line_bank, apart, 100, 0, budget)
        assert batches.resident == (budget == 2**30)
        seen = [tuple(row) for batch in batches.epoch(0) for row in batch["theta"]]
        assert len(seen) == len(set(seen)) == batches.per_epoch * 100
        assert not set(seen) & out
        assert [len(b["theta"]) for b in batches.epoch(1)] == [100] * batches.per_epoch


def test_the_order_of_an_epoch_is_a_function_of_seed_and_epoch(line_bank):
    apart = split(line_bank, 0, 0.05, 0.1, 5000)
    for budget in (2**30, 40_000):
        def first(seed, epoch, skip=0, budget=budget):
            return next(iter(Batches(line_bank, apart, 100, seed, budget).epoch(epoch, skip)))["theta"]

        np.testing.assert_array_equal(first(0, 0), first(0, 0))
        assert not np.array_equal(first(0, 0), first(0, 1))
        assert not np.array_equal(first(0, 0), first(1, 0))
        np.testing.assert_array_equal(first(0, 0, skip=3), list(Batches(line_bank, apart, 100, 0, budget).epoch(0))[3]["theta"])


def test_failed_rows_are_left_out_and_counted(tmp_path):
    @sp.simulator(prior=sp.Prior({"a": sp.Uniform(0, 1)}), x_shape=(1,), name="sometimes")
    def sometimes(theta, rng):
        if theta[0] > 0.9:
            raise ValueError("no convergence")
        return theta + rng.standard_normal(1)

    bank = sp.simulate(sometimes, 2000, 1, tmp_path / "bank", workers=1, progress=silent)
    failed = bank.status_counts()["raised"]
    assert 130 < failed < 270
    run = train(bank, tmp_path / "run", max_epochs=2)
    assert run.record["split"]["left_out"] == failed
    apart = split(bank, 0, 0.05, 0.1, 5000)
    assert (bank.status[np.concatenate([apart.validation, apart.held_out])] == 0).all()
    assert (bank.theta[apart.held_out] <= 0.9).all()


def test_metrics_are_json_lines_one_an_epoch(line_run):
    lines = (line_run.path / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["epoch"] for line in lines] == list(range(12))


@pytest.mark.parametrize("shape", [(), {"trace": (4,), "count": ()}], ids=["scalar", "dict with a scalar"])
def test_scalar_observations_train_gate_and_sample(tmp_path, shape):
    @sp.simulator(prior=sp.Prior({"a": sp.Normal(0, 1)}), x_shape=shape, batched=True, name="scalar")
    def scalar(theta, rng):
        count = theta[:, 0] + 0.5 * rng.standard_normal(len(theta))
        return count if shape == () else {"trace": rng.standard_normal((len(theta), 4)), "count": count}

    bank = sp.simulate(scalar, 3000, 1, tmp_path / "bank", workers=1, progress=silent)
    run = train(bank, tmp_path / "run")
    assert sp.gate(run, progress=silent).figures["information"]["gain"] > 0.4
    x = np.array(1.0) if shape == () else {"trace": np.zeros(4), "count": np.array(1.0)}
    assert abs(sp.load(run, allow_uncertified=True).sample(x, 4000, seed=0).mean() - 0.8) < 0.15


def test_a_training_that_cannot_begin_leaves_nothing_behind(line_bank, tmp_path):
    class Bad(torch.nn.Module):
        def forward(self, x):
            return x[:, :, None]

    with pytest.raises(SettingError, match="must return"):
        train(line_bank, tmp_path / "run", embedding=Bad)
    assert not (tmp_path / "run").exists()


def test_a_checkpoint_of_another_training_is_never_resumed(line_bank, tmp_path, monkeypatch):
    """run.json went, its checkpoint stayed: the next training must not take over foreign weights."""
    def stop(self, batch):
        raise trainer.Interrupted

    with monkeypatch.context() as patch:
        patch.setattr(trainer._Training, "_step", stop)
        with pytest.raises(trainer.Stopped):
            train(line_bank, tmp_path / "run", seed=1)
        with pytest.raises(trainer.Stopped):
            train(line_bank, tmp_path / "other", seed=2)
    shutil.copytree(tmp_path / "run" / "checkpoint", tmp_path / "other" / "checkpoint", dirs_exist_ok=True)
    with pytest.raises(RunError, match="is of another training"):
        train(line_bank, tmp_path / "other", seed=2)
    (tmp_path / "run" / "run.json").unlink()
    with pytest.raises(RunError, match="holds other files"):
        train(line_bank, tmp_path / "run", seed=2)


def test_two_processes_that_begin_at_once_make_one_run(line_bank, tmp_path, monkeypatch):
    """The other one writes run.json between this one's look and its lock."""
    original, out = files.locked, tmp_path / "run"

    def late(folder, busy):
        if not (out / "run.json").exists():
            with monkeypatch.context() as patch:
                patch.setattr(trainer.files, "locked", original)
                train(line_bank, out, seed=7)
        return original(folder, busy)

    monkeypatch.setattr(trainer.files, "locked", late)
    with pytest.raises(OtherTraining, match="seed = 7, not 8"):
        train(line_bank, out, seed=8)
    assert Run.open(out).seed == 7


def test_leftovers_of_a_killed_write_do_no_harm(line_bank, tmp_path, monkeypatch):
    out = tmp_path / "run"
    out.mkdir()
    (out / ".tmp-run.json-1").write_text("{")
    original = trainer._Training._write_result

    def leave(self):
        (self.run.path / "checkpoint").mkdir(exist_ok=True)
        (self.run.path / "checkpoint" / ".tmp-state.safetensors-1").write_text("half")
        return original(self)

    monkeypatch.setattr(trainer._Training, "_write_result", leave)
    assert train(line_bank, out, max_epochs=1).finished
    assert not (out / "checkpoint").exists()


def test_a_full_disk_is_one_clear_line(line_bank, tmp_path, monkeypatch):
    from safetensors import SafetensorError

    def full(*args, **kwargs):
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    monkeypatch.setattr("safetensors.torch.save_file", full)
    with pytest.raises(sp.UserError, match="the disk is full at"):
        train(line_bank, tmp_path / "run", max_epochs=1)


def test_weights_can_be_read_by_others(line_run):
    mode = line_run.weights_path.stat().st_mode
    assert mode & 0o777 == (line_run.path / "run.json").stat().st_mode & 0o777 != 0o600


def test_changed_code_of_an_embedding_is_another_training(line_bank, tmp_path):
    net = tmp_path / "net.py"
    text = "import torch\n\nSCALE = 1.0\n\nclass Net(torch.nn.Module):\n    def forward(self, x):\n        return SCALE * x\n"
    net.write_text(text)
    code = "import sys; sys.path.insert(0, sys.argv[4]); from test_trainer import retrain; print(retrain(*sys.argv[1:4]))"

    def retrain_apart():
        words = [sys.executable, "-c", code, line_bank.path, tmp_path / "run", f"{net}:Net", Path(__file__).parent]
        env = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}
        return subprocess.run(words, capture_output=True, text=True, timeout=120, env=env)

    first = retrain_apart()
    assert "trained" in first.stdout, first.stderr
    net.write_text(text.replace("SCALE = 1.0", "SCALE = 2.0"))
    assert "the embedding's code" in retrain_apart().stdout


def retrain(bank, out, embedding):
    try:
        sp.train(bank, "npe", out=out, progress=silent, embedding=embedding, **QUICK)
    except OtherTraining as error:
        return error
    return "trained"


def test_digits_behind_a_large_offset_are_kept(tmp_path):
    """GPS seconds: float64 x of 1.2e9 with milliseconds that matter."""
    @sp.simulator(prior=sp.Prior({"a": sp.Normal(0, 1)}), x_shape=(2,), dtype="float64", batched=True, name="late")
    def late(theta, rng):
        return 1.2e9 + 1e-3 * (theta + 0.5 * rng.standard_normal((len(theta), 2)))

    bank = sp.simulate(late, 3000, 1, tmp_path / "bank", workers=1, progress=silent)
    run = train(bank, tmp_path / "run")
    x = 1.2e9 + 1e-3 * np.array([1.0, 1.0])
    assert abs(sp.load(run, allow_uncertified=True).sample(x, 4000, seed=0).mean() - 8 / 9) < 0.15


def test_an_embedding_of_double_precision_trains(line_bank, tmp_path):
    class Double(torch.nn.Module):
        def forward(self, x):
            return x.double()

    assert train(line_bank, tmp_path / "run", embedding=Double, max_epochs=1).finished


@pytest.mark.parametrize(("rows", "pairs"), [(6000, 600), (4000, 500), (1000, 200)])
def test_small_banks_keep_more_for_the_gate(line_bank, rows, pairs):
    filled = begin.filled(begin.TrainSettings(), line_bank.first(rows), NPE.training_defaults)
    apart = split(line_bank.first(rows), 0, filled.validation, filled.held_out, filled.held_out_most)
    assert len(apart.held_out) == pairs
