"""The gradient of a batch: in pieces, in bfloat16 and compiled it is the same gradient, and leaves nothing behind in the weights."""

import math

import numpy as np
import pytest
import torch
from conftest import QUICK

import sbiplat as sp
from sbiplat.errors import SettingError
from sbiplat.progress import silent
from sbiplat.training import batches, begin, gradient, trainer
from sbiplat.training.begin import TrainSettings
from sbiplat.training.gradient import Gradient

NSF = {"flow": "nsf", "transforms": 2, "hidden": [32], "bins": 4}


@pytest.fixture
def net(line_bank):
    """A made net and one batch of prepared rows: (estimator, batch)."""
    rng = torch.Generator().manual_seed(0)
    plan = begin.plan(line_bank, "npe", 0, None, NSF)
    estimator = plan.architecture.build(1).train()
    for p in estimator.parameters():
        torch.nn.init.normal_(p, std=0.1, generator=rng)
    x = estimator.prepare({"x": torch.randn(100, 2, generator=rng)})
    return estimator, {"theta": torch.randn(100, 2, generator=rng), "x": x}


def gradients(net, **settings):
    """The loss and the gradients of one step."""
    estimator, batch = net
    estimator.zero_grad(set_to_none=True)
    loss = Gradient(estimator, TrainSettings(**settings))(batch)
    return float(loss), torch.cat([p.grad.flatten() for p in estimator.parameters()])


@pytest.mark.parametrize("pieces", [2, 3, 7, 100, 1000])
def test_pieces_add_up_to_the_gradient_of_the_whole_batch(net, pieces):
    """Of equal sizes or not; 7 pieces of 15 rows leave 10 for the last."""
    loss, whole = gradients(net)
    again, summed = gradients(net, accumulate=pieces)
    assert math.isclose(loss, again, rel_tol=1e-6)
    assert float((summed - whole).norm() / whole.norm()) < 1e-5


def test_no_piece_is_larger_than_its_share(net, monkeypatch):
    estimator, _ = net
    seen, loss = [], type(estimator).loss
    monkeypatch.setattr(type(estimator), "loss", lambda self, theta, x: (seen.append((len(theta), len(x["x"]))), loss(self, theta, x))[1])
    gradients(net, accumulate=7)
    assert seen == [(15, 15)] * 6 + [(10, 10)]


def test_training_in_pieces_ends_where_training_on_whole_batches_does(line_bank, tmp_path):
    whole, pieces = (sp.train(line_bank, "npe", out=tmp_path / str(k), progress=silent, **{**QUICK, "max_epochs": 3, "accumulate": k}) for k in (1, 4))
    for a, b in zip(whole.metrics(), pieces.metrics(), strict=True):
        assert math.isclose(a["validation_loss"], b["validation_loss"], abs_tol=1e-4)
    assert whole.weights_digest != pieces.weights_digest, "the sums are rounded otherwise: a bit for bit comparison would see it"


def test_only_layers_are_rounded_to_bfloat16_and_what_sums_is_not(net, monkeypatch):
    """bfloat16 has 8 bits: rounding all of a flow would cost its log-determinants percents."""
    estimator, batch = net
    loss, exact = gradients(net)
    kinds, layer = [], next(m for m in estimator.density.modules() if isinstance(m, torch.nn.Linear))
    whole = layer.forward
    monkeypatch.setattr(layer, "forward", lambda x: (kinds.append(torch.is_autocast_enabled("cpu")), whole(x))[1])
    mixed_loss, mixed = gradients(net, precision="bf16")
    assert kinds == [True]
    assert all(p.dtype == p.grad.dtype == torch.float32 for p in estimator.parameters())
    assert 0 < float((mixed - exact).norm() / exact.norm()) < 0.05
    assert 0 < abs(mixed_loss - loss) < 0.02
    each = estimator.loss(batch["theta"], batch["x"])
    assert each.dtype == torch.float32
    assert (each.bfloat16().float() != each).float().mean() > 0.9, "the log-densities themselves have float32's digits"
    with torch.autocast("cpu", torch.bfloat16):
        rounded = estimator.eval().loss(batch["theta"], batch["x"])
    plain = estimator.loss(batch["theta"], batch["x"])
    assert (each - plain).abs().median() < (rounded - plain).abs().median(), "autocast over the whole loss is worse"


def test_the_validation_loss_is_that_of_float32(line_bank, tmp_path):
    """What draws later is float32, so which weights are best is decided there."""
    run = sp.train(line_bank, "npe", out=tmp_path / "run", progress=silent, **{**QUICK, "max_epochs": 1, "precision": "bf16"})
    wanted = begin.plan(line_bank, "npe", 0, None, {**QUICK, "max_epochs": 1})
    pairs = batches.pairs_at(line_bank, wanted.apart.validation)
    estimator = run.estimator()
    with torch.no_grad():
        x = estimator.prepare({"x": torch.as_tensor(pairs["x"]["x"])})
        loss = float(estimator.loss(torch.as_tensor(pairs["theta"]), x).double().mean())
    assert math.isclose(loss, run.record["outcome"]["validation_loss"], rel_tol=1e-9)


def test_a_compiled_training_resumes_to_the_same_weights_under_the_same_names(line_bank, tmp_path, monkeypatch):
    settings = {**QUICK, "max_epochs": 2, "compile": True}
    unbroken = sp.train(line_bank, "npe", out=tmp_path / "unbroken", progress=silent, **settings)
    original, calls = Gradient.__call__, []

    def stop(self, batch):
        calls.append(1)
        if len(calls) == 50:
            raise trainer.Interrupted
        return original(self, batch)

    with monkeypatch.context() as patch:
        patch.setattr(Gradient, "__call__", stop)
        with pytest.raises(trainer.Stopped):
            sp.train(line_bank, "npe", out=tmp_path / "broken", progress=silent, **settings)
    resumed = sp.train(line_bank, "npe", out=tmp_path / "broken", progress=silent, **settings)
    assert resumed.weights_digest == unbroken.weights_digest
    plain = sp.train(line_bank, "npe", out=tmp_path / "plain", progress=silent, **{**settings, "compile": False})
    weights = [r.estimator().state_dict() for r in (plain, resumed)]
    assert list(weights[0]) == list(weights[1])
    losses = [[m["validation_loss"] for m in r.metrics()] for r in (plain, resumed)]
    np.testing.assert_allclose(*losses, atol=1e-4)


def test_without_a_compiler_a_training_does_not_begin(line_bank, tmp_path):
    from torch._inductor import config

    message = r"compile = true: nothing can be compiled here \(.*\); install a C\+\+ compiler"
    with config.patch({"cpp.cxx": (None, str(tmp_path / "no-compiler"))}), pytest.raises(SettingError, match=message) as error:
        sp.train(line_bank, "npe", out=tmp_path / "run", progress=silent, **QUICK, compile=True)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "run").exists()


def test_a_net_that_cannot_be_compiled_is_one_line(net, monkeypatch):
    estimator, batch = net

    def fails(graph, inputs):
        raise ValueError("no such kernel")

    compiled = torch.compile
    monkeypatch.setattr(gradient.torch, "compile", lambda f, dynamic: compiled(f, dynamic=dynamic, backend=fails))
    with pytest.raises(SettingError, match=r"torch.compile fails on this net \(.*no such kernel.*\); use compile = false"):
        Gradient(estimator, TrainSettings(compile=True))(batch)
