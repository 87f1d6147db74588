"""Embeddings: what each kind must not see (order, padding, shifts), what it must keep, and that it trains to known answers."""

import json
import sys

import numpy as np
import pytest
import torch
from conftest import QUICK

import sbiplat as sp
from sbiplat.errors import SettingError
from sbiplat.estimators.base import Architecture
from sbiplat.estimators.npe import NPESettings
from sbiplat.nets import embeddings
from sbiplat.nets.embeddings import names
from sbiplat.nets.embeddings.dense import MLP
from sbiplat.observation import ObservationSpec
from sbiplat.progress import silent
from sbiplat.runs import Run
from sbiplat.settings import build as build_settings
from sbiplat.training import trainer

SHAPES = {"mlp": (6,), "resmlp": (3, 4), "cnn1d": (2, 20), "resnet1d": (21,), "cnn2d": (9, 12), "resnet2d": (2, 8, 7), "transformer": (2, 37),
          "deepset": (5, 2), "settransformer": (5,)}
SMALL = embeddings.Shape(hidden=(16,), context=8, width=8, heads=2, channels=(4, 6), kernel=3, patch=8)
SETS = ("deepset", "settransformer")


def built(name, spec, shape=SMALL, seed=0, **changes):
    """An embedding away from its start, where residual blocks are the identity."""
    spec = spec if isinstance(spec, ObservationSpec) else ObservationSpec.declare(spec)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        net = embeddings.build(name, spec, embeddings.Shape(**{**vars(shape), **changes}))
    noise = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter += 0.2 * torch.randn(parameter.shape, generator=noise)
    return net


def rows(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


# ------------------------------------------------------------------------------------------------- each kind by itself


@pytest.mark.parametrize("kind", SHAPES)
def test_every_number_of_x_reaches_the_context_and_every_weight_learns(kind):
    net, x = built(kind, SHAPES[kind]), rows(4, *SHAPES[kind]).requires_grad_()
    context = net(x)
    assert context.shape == (4, 8)
    assert context.dtype == torch.float32
    context.square().sum().backward(retain_graph=True)
    assert all(torch.isfinite(p.grad).all() and p.grad.any() for p in net.parameters())
    (by_x,) = torch.autograd.grad(context.square().sum(), x, create_graph=True)
    assert (by_x.abs() > 0).all()
    first = next(net.parameters())
    (second,) = torch.autograd.grad(by_x.square().sum(), first)  # penalties on the gradient with respect to x need it
    assert torch.isfinite(second).all()
    assert second.any()


@pytest.mark.parametrize("kind", SHAPES)
def test_rows_of_a_batch_do_not_see_each_other(kind):
    net, x = built(kind, SHAPES[kind]), rows(4, *SHAPES[kind])
    torch.testing.assert_close(net(x)[2:3], net(x[2:3]), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", SHAPES)
def test_how_large_x_is_reaches_the_context(kind):
    """A norm on the main path would hide it: the context would stay bounded, and here it grows as x does."""
    net, x = built(kind, SHAPES[kind]), rows(4, *SHAPES[kind])
    assert (net(4000 * x).norm(dim=1) / net(1000 * x).norm(dim=1)).min() > 3


@pytest.mark.parametrize("kind", SETS)
@pytest.mark.parametrize("size", [(7,), (7, 3)])
def test_the_order_of_a_set_cannot_be_seen(kind, size):
    net, x = built(kind, size), rows(5, *size)
    for seed in range(3):
        order = torch.randperm(7, generator=torch.Generator().manual_seed(seed))
        torch.testing.assert_close(net(x[:, order]), net(x), atol=2e-6, rtol=2e-6)
    plain = built("mlp", size)
    assert (plain(x.flip(1)) - plain(x)).abs().max() > 0.1, "the test can fail"


def masked(n, size=(8, 3), seed=0, filling=0.0):
    """Five sets of n elements in N places, and their mask."""
    x = torch.full((5, *size), filling)
    x[:, :n] = rows(5, n, *size[1:], seed=seed)
    return {"draws": x, "mask": (torch.arange(size[0]) < n).float().expand(5, -1)}


def set_spec(size=(8, 3)):
    return ObservationSpec.declare({"draws": size, "mask": size[:1]})


@pytest.mark.parametrize("kind", SETS)
@pytest.mark.parametrize("features", [(), (3,)])
def test_padding_cannot_be_seen_and_the_number_of_elements_can(kind, features):
    net = built(kind, set_spec((8, *features)))
    few = net(masked(5, (8, *features)))
    for places, filling in ((8, 1e6), (5, 0.0), (40, -3.0), (8, float("inf"))):
        torch.testing.assert_close(net(masked(5, (places, *features), filling=filling)), few, atol=2e-6, rtol=2e-6)
    spread = masked(5, (8, *features))
    order = torch.tensor([7, 0, 5, 1, 2, 6, 3, 4])  # the absent ones need not stand last
    torch.testing.assert_close(net({k: v[:, order] for k, v in spread.items()}), few, atol=2e-6, rtol=2e-6)
    twice = masked(5, (10, *features))
    twice = {"draws": torch.cat([twice["draws"][:, :5]] * 2, 1), "mask": torch.ones(5, 10)}
    assert (net(twice) - few).abs().max() > 0.05, "ten elements with the same mean tell more than five"


@pytest.mark.parametrize("kind", SETS)
def test_an_empty_set_has_a_context_and_gradients(kind):
    net = built(kind, set_spec())
    x = masked(0, filling=5.0)
    x["draws"].requires_grad_()
    context = net(x)
    context.sum().backward()
    torch.testing.assert_close(context, net(masked(0, (3, 3))))
    assert all(torch.isfinite(p.grad).all() for p in net.parameters() if p.grad is not None)
    assert not x["draws"].grad.any()


@pytest.mark.parametrize(("kind", "size"), [("cnn1d", (32,)), ("resnet1d", (2, 32)), ("cnn2d", (12, 16)), ("resnet2d", (2, 12, 13))])
def test_with_circular_padding_and_mean_pooling_no_shift_can_be_seen(kind, size):
    x, axes = rows(3, *size), tuple(range(-int(kind[-2]), 0))
    net = built(kind, size, padding="circular", pooling="mean")
    for shift in range(1, 9):
        torch.testing.assert_close(net(torch.roll(x, (shift,) * len(axes), axes)), net(x), atol=2e-6, rtol=2e-6)
    for changes in ({"padding": "zeros", "pooling": "mean"}, {"padding": "circular", "pooling": "flatten"}):
        other = built(kind, size, **changes)
        assert (other(torch.roll(x, 3, axes[-1])) - other(x)).abs().max() > 0.01, "the test can fail"


@pytest.mark.parametrize("kind", ["cnn1d", "resnet1d"])
def test_a_strided_net_follows_shifts_by_multiples_of_its_total_stride_alone(kind):
    """With strides, circular padding moves the last places along: three stages halve three times, so 8 samples are one place."""
    x, net = rows(3, 1, 64), built(kind, (1, 64), padding="circular", pooling="flatten", channels=(4, 4, 6))
    places = net.stages(x)
    assert places.shape[-1] == 8
    for shift in range(1, 17):
        moved = net.stages(torch.roll(x, shift, -1))
        if shift % 8 == 0:
            torch.testing.assert_close(moved, torch.roll(places, shift // 8, -1), atol=2e-6, rtol=2e-6)
        else:
            assert (moved.mean(-1) - places.mean(-1)).abs().max() > 1e-3, "so the mean over places would see the shift"


def test_the_context_of_a_whole_estimator_sees_no_shift():
    """Standardisation and the regression, too, treat all places alike."""
    spec, series = ObservationSpec.declare((24,)), rows(400, 24) * 3 + torch.linspace(0, 5, 24)
    invariant = {"embedding": "resnet1d", "padding": "circular", "pooling": "mean", "channels": (4, 8), "kernel": 3}
    for settings, sees in ((invariant, False), ({**invariant, "padding": "zeros"}, True), ({"embedding": "mlp"}, True)):
        estimator = architecture(spec, **settings).build()
        estimator.fit_scales(series[:, :1], {"x": series})
        context = [estimator.context(estimator.prepare({"x": torch.roll(series, k, 1)})) for k in (0, 1, 5)]
        assert context[0].std(0).max() > 0.01
        for other in context[1:]:
            if sees:
                assert (other - context[0]).abs().max() > 1e-3
            else:
                torch.testing.assert_close(other, context[0], atol=5e-6, rtol=5e-6)


@pytest.mark.parametrize("kind", ["transformer", "settransformer"])
def test_the_fused_kernel_gives_what_the_formula_gives(kind):
    net, x = built(kind, (32,)), rows(3, 32)
    torch.testing.assert_close(net(x), net(x.clone().requires_grad_()), atol=2e-6, rtol=2e-6)
    spec = ObservationSpec.declare({"draws": (8,), "mask": (8,)})
    if kind == "settransformer":
        net, x = built(kind, spec), masked(5, (8,))
        torch.testing.assert_close(net(x), net({**x, "draws": x["draws"].requires_grad_()}), atol=2e-6, rtol=2e-6)


def test_a_transformer_sees_where_its_patches_are():
    net, x = built("transformer", (32,)), rows(3, 32)
    assert (net(torch.roll(x, 8, -1)) - net(x)).abs().max() > 0.01


@pytest.mark.parametrize("shape", [(400, 30), (20, 30)])
def test_the_first_layer_is_numpys_projection_on_the_singular_vectors(shape):
    rng = np.random.default_rng(0)
    x = rng.standard_normal(shape) * np.linspace(3, 0.1, shape[1]) @ rng.standard_normal((shape[1], shape[1]))
    net = built("mlp", (30,), svd=6)
    net.seed_basis(torch.as_tensor(x, dtype=torch.float32))
    _, s, vt = np.linalg.svd(x, full_matrices=False)
    signs = np.sign(vt[np.arange(6), np.abs(vt[:6]).argmax(1)])
    wanted = x @ (vt[:6] * signs[:, None]).T / np.sqrt((s[:6] ** 2).mean() / len(x))
    found = net.basis(torch.as_tensor(x, dtype=torch.float32)).detach().numpy()
    np.testing.assert_allclose(found, wanted, atol=1e-4)
    np.testing.assert_allclose(np.square(found).mean(), 1, rtol=1e-4)
    before = net.basis.weight.clone()
    net.seed_basis(torch.as_tensor(x, dtype=torch.float32))
    assert torch.equal(before, net.basis.weight)


def test_fitting_scales_sets_the_first_layer_of_every_field_that_has_one():
    spec = ObservationSpec.declare({"signal": (30,), "few": (4,), "fewer": (3,), "image": (5, 5)})
    estimator = architecture(spec, embedding="signal=resmlp,image=cnn2d", svd=3).build()
    x = {k: 5 + 2 * rows(200, *shape) for k, shape in spec.shapes.items()}
    estimator.fit_scales(torch.zeros(200, 1), x)
    prepared, nets = estimator.prepare(x), estimator.embedding.by_field()
    assert nets["fewer"].basis is None, "three numbers need no reduced basis of three"
    for field in ("signal", "few"):
        _, _, vt = np.linalg.svd(prepared[field].double().numpy(), full_matrices=False)
        weight = nets[field].basis.weight.detach().double().numpy()
        np.testing.assert_allclose(np.abs((weight / np.linalg.norm(weight, axis=1, keepdims=True)) @ vt[:3].T), np.eye(3), atol=1e-4)


def test_more_components_than_the_rows_span_are_finite():
    net = built("mlp", (5,), svd=4)
    net.seed_basis(torch.ones(10, 1) * torch.arange(5.0))
    assert torch.isfinite(net.basis.weight).all()


# ------------------------------------------------------------------------------------------------- by name, and several


def architecture(spec, **settings):
    return Architecture("npe", build_settings(NPESettings, {**settings, "flow": "gaussian"}), 1, spec, True)


@pytest.mark.parametrize(("x_shape", "settings", "message"), [
    ((200,), {"embedding": "cnn2d"}, r"cnn2d takes an array of shape \(H, W\) or \(C, H, W\), and x has shape \(200,\); take mlp, cnn1d, "),
    ((2, 3, 4, 5), {"embedding": "deepset"}, r"and x has shape \(2, 3, 4, 5\); take mlp"),
    ((20,), {"embedding": "cnn1d", "kernel": 4}, "kernel = 4: take an odd number, such as 5"),
    ((20,), {"embedding": "transformer", "heads": 3}, "embedding_width = 64 is no multiple of heads = 3; take 63"),
    ((6,), {"embedding": "cnn1d", "padding": "circular", "pooling": "mean"}, "circular padding of 8 is more than x's 6 places"),
    ((6,), {"svd": 7}, "svd = 7: x has 6 numbers"),
    ((6,), {"embedding": "cnn1d", "svd": 3}, "svd = 3 is of an mlp or resmlp over more numbers; embedding = cnn1d has none"),
    ((6,), {"embedding": "x=cnn1d"}, "is of a dict x, and x is one array: give one name, such as cnn1d"),
    ((6,), {"embedding": "conv"}, "conv"),
    ((6,), {"pooling": "max"}, "pooling = 'max': expected text, one of flatten, mean"),
    ({"a": (6,), "b": (3, 3)}, {"embedding": "cnn2d"}, "cnn2d takes one array, and x has a, b: say which, as in embedding = a=cnn2d"),
    ({"a": (6,), "b": (3, 3)}, {"embedding": "signal=cnn1d"}, "names the field 'signal', which x does not have; it has a, b"),
    ({"image": (6, 6), "b": (3,)}, {"embedding": "imag=cnn2d"}, "'imag', which x does not have; did you mean image?"),
    ({"a": (6,), "b": (3, 3)}, {"embedding": "a=cnn1d,a=mlp"}, "names the field 'a' twice"),
    ({"a": (6,), "b": (3, 3)}, {"embedding": "a=cnn2d"}, r"cnn2d takes an array of shape .*, and a has shape \(6,\)"),
    ({"a": (6, 2), "mask": (5,)}, {"embedding": "deepset"}, r"x has mask of shape \(5,\), and a of shape \(6, 2\): a mask has shape \(6,\)"),
])
def test_what_an_embedding_cannot_take_is_one_line_with_the_mend(x_shape, settings, message):
    with pytest.raises(SettingError, match=message) as error:
        architecture(ObservationSpec.declare(x_shape), **settings).build()
    assert "\n" not in str(error.value)


def test_the_default_of_a_dict_is_one_mlp_of_all_of_it():
    estimator = architecture(ObservationSpec.declare({"x": (6,), "b": (3, 3)})).build()
    assert isinstance(estimator.embedding, MLP)
    assert estimator.embedding.net[0].in_features == 15
    assert sorted(k for k in estimator.state_dict() if "embedding" in k) == [f"embedding.net.{k}.{what}" for k in (0, 2, 4)
                                                                           for what in ("bias", "weight")]
    x = {"x": rows(4, 6), "b": rows(4, 3, 3)}
    assert estimator.context(estimator.prepare(x)).shape == (4, 33), "and the mean of the one parameter by regression"


def test_fields_have_embeddings_of_their_own_and_mlp_where_none_is_named():
    spec = ObservationSpec.declare({"signal": (20,), "image": (2, 8, 8), "few": (3,), "draws": (5, 2), "draws_mask": (5,)})
    net = built("image=cnn2d,signal=transformer,draws=deepset", spec)
    kinds = {field: type(branch).__name__ for field, branch in net.by_field().items()}
    assert kinds == {"signal": "Transformer", "image": "ConvNet", "few": "MLP", "draws": "DeepSet"}
    x = {k: rows(4, *shape) for k, shape in spec.shapes.items()}
    x["draws_mask"] = torch.tensor([1.0, 1, 1, 0, 0]).expand(4, -1)
    base = net(x)
    for field in kinds:
        assert (net({**x, field: x[field] + rows(*x[field].shape, seed=1)}) - base).abs().max() > 1e-3, field
    later = x["draws"].clone()
    later[:, 3:] = 9.0
    assert torch.equal(net({**x, "draws": later}), base)


def test_a_set_and_its_mask_through_the_whole_estimator_see_neither_order_nor_padding():
    """Standardisation, too, treats elements alike, and takes scales from those that are there."""
    spec = ObservationSpec.declare({"x": (6, 2), "mask": (6,)}, transform="log")
    rng = np.random.default_rng(0)
    mask = (np.arange(6) < rng.integers(1, 7, (500, 1))).astype(np.float32)
    values = np.where(mask[..., None] > 0, rng.lognormal(2.0, [0.5, 3.0], (500, 6, 2)), 1e-9).astype(np.float32)
    x = {"x": torch.as_tensor(values), "mask": torch.as_tensor(mask)}
    estimator = architecture(spec, embedding="deepset").build()
    estimator.fit_scales(torch.zeros(500, 1), x)
    np.testing.assert_allclose(estimator.standardise.loc_x.numpy(), [[2.0, 2.0]], atol=0.3)
    np.testing.assert_allclose(estimator.standardise.scale_x.numpy(), [[0.5, 3.0]], rtol=0.15)
    order = torch.tensor([3, 5, 0, 1, 4, 2])
    context = estimator.context(estimator.prepare(x))
    assert context.std(0).max() > 0.05
    torch.testing.assert_close(estimator.context(estimator.prepare({k: v[:, order] for k, v in x.items()})), context, atol=1e-5, rtol=1e-5)
    filled = {**x, "x": torch.where(x["mask"][..., None] > 0, x["x"], 7.0)}
    torch.testing.assert_close(estimator.context(estimator.prepare(filled)), context)
    for wrong, holds in ((torch.zeros(500, 6), "0"), (2 * x["mask"], "0, 2"), (1 - 2 * x["mask"], "-1, 1")):
        with pytest.raises(SettingError, match=f"mask must be 1 where x holds an element and 0 elsewhere; it holds {holds}$"):
            estimator.fit_scales(torch.zeros(500, 1), {**x, "mask": wrong})


def test_places_of_a_signal_share_one_scale_and_channels_have_their_own():
    x = {"x": torch.stack([rows(300, 16), 100 + 10 * rows(300, 16, seed=1)], dim=1)}
    for kind, sizes in (("cnn1d", (2, 1)), ("transformer", (2, 1)), ("mlp", (2, 16)), ("cnn2d", (1, 1))):
        estimator = architecture(ObservationSpec.declare((2, 16)), embedding=kind).build()
        estimator.fit_scales(torch.zeros(300, 1), x)
        assert estimator.standardise.scale_x.shape == sizes
        if sizes == (2, 1):
            np.testing.assert_allclose(estimator.standardise.loc_x.numpy(), [[0], [100]], atol=0.5)
            np.testing.assert_allclose(estimator.standardise.scale_x.numpy(), [[1], [10]], rtol=0.05)


NET = """import torch

class Net(torch.nn.Module):
    standardise = False

    def summaries(self, x):
        return x.mean(1, keepdim=True)

    def forward(self, s):
        return SCALE * s

SCALE = 1.0
"""


def test_a_field_may_have_an_embedding_of_yours(tmp_path):
    path = tmp_path / "a=b,c" / "net.py"  # a path may look like names by field
    path.parent.mkdir()
    path.write_text(NET)
    spec = ObservationSpec.declare({"signal": (20,), "few": (3,)})
    for given in (f"few=resmlp,signal={path}:Net", {"few": "resmlp", "signal": f"{path}:Net"}):
        name = embeddings.register(given)
        assert name == f"few=resmlp,signal={path.resolve()}:Net"
    estimator = architecture(spec, embedding=name).build()
    x = {"signal": 5 + rows(4, 20), "few": rows(4, 3)}
    prepared = estimator.prepare(x)
    torch.testing.assert_close(prepared["signal"], x["signal"].mean(1, keepdim=True))
    assert estimator.context(prepared).shape == (4, 33)
    assert embeddings.register(f"{path}:Net") == f"{path.resolve()}:Net"
    assert embeddings.source_digest(name) not in (None, embeddings.source_digest(f"{path.resolve()}:Net"))
    assert embeddings.source_digest("few=resmlp,signal=cnn1d") is None
    with pytest.raises(SettingError, match="which is code of yours: name it in this process"):
        embeddings.build("signal=elsewhere.py:Net", spec, SMALL)
    with pytest.raises(SettingError, match="cannot name the field 'a=b'"):
        embeddings.register({"a=b": "mlp"})


# ----------------------------------------------------------------------------------------------------------- training

FORMS = {"mlp": (12,), "resmlp": (12,), "cnn1d": (12,), "resnet1d": (12,), "cnn2d": (3, 4), "resnet2d": (3, 4), "transformer": (12,),
         "deepset": (12,), "settransformer": (4, 3)}
TINY = {**QUICK, "embedding_width": 8, "heads": 2, "channels": [4, 8], "kernel": 3, "patch": 4, "max_epochs": 2, "embedding_blocks": 1}


@pytest.fixture(scope="module")
def banks(tmp_path_factory):
    """A bank of twelve draws around a mean, in every form."""
    made = {}

    def bank(form):
        if form not in made:
            def draws(theta, rng):
                return (theta + rng.standard_normal((len(theta), 12))).reshape(-1, *form)

            simulator = sp.simulator(prior=sp.Prior({"mean": sp.Normal(0, 2)}), x_shape=form, batched=True, name=f"draws_{form}")(draws)
            made[form] = sp.simulate(simulator, 2000, 1, tmp_path_factory.mktemp("draws") / "bank", workers=1, progress=silent)
        return made[form]

    return bank


@pytest.mark.parametrize("kind", FORMS)
def test_each_kind_trains_gates_and_samples(banks, tmp_path, kind):
    run = sp.train(banks(FORMS[kind]), "npe", out=tmp_path / "run", embedding=kind, progress=silent, **{**TINY, "max_epochs": 15})
    certificate = sp.gate(run, progress=silent, draws=500)
    assert certificate.figures["information"]["gain"] > 1.0, "the exact posterior has 1.95 nats"
    posterior = sp.load(Run.open(run.path), allow_uncertified=True)
    noise = np.random.default_rng(0).standard_normal(FORMS[kind])
    x = 1.5 + noise - noise.mean()
    draws = posterior.sample(x, 500, seed=0)
    assert abs(draws.mean() - 1.5 * 48 / 49) < 0.6
    assert np.isfinite(posterior.log_prob(draws, x)).all()


@pytest.mark.parametrize("settings", [{"embedding": "resnet1d"}, {"embedding": "transformer"}, {"embedding": "resmlp", "svd": 5}],
                         ids=["resnet1d", "transformer", "svd"])
def test_a_resumed_training_of_an_embedding_ends_with_the_weights_of_an_unbroken_one(banks, tmp_path, monkeypatch, settings):
    def train(name, **changes):
        return sp.train(banks((12,)), "npe", out=tmp_path / name, progress=silent, **{**TINY, **settings, **changes})

    unbroken = train("unbroken")
    original = trainer._Training._step

    def step(self, batch):
        if self.state["step"] == 17:
            raise trainer.Interrupted
        return original(self, batch)

    with monkeypatch.context() as patch:
        patch.setattr(trainer._Training, "_step", step)
        with pytest.raises(trainer.Stopped):
            train("broken")
    assert train("broken").weights_digest == unbroken.weights_digest
    assert train("other", seed=1).weights_digest != unbroken.weights_digest


def test_a_table_of_embeddings_trains_and_is_recorded(tmp_path):
    def both(theta, rng):
        return {"signal": theta + rng.standard_normal((len(theta), 12)), "few": theta + rng.standard_normal((len(theta), 2))}

    simulator = sp.simulator(prior=sp.Prior({"mean": sp.Normal(0, 2)}), x_shape={"signal": (12,), "few": (2,)}, batched=True)(both)
    bank = sp.simulate(simulator, 2000, 1, tmp_path / "bank", workers=1, progress=silent)
    run = sp.train(bank, "fmpe", out=tmp_path / "run", embedding={"signal": "cnn1d", "few": "none"}, progress=silent,
                   **{k: v for k, v in TINY.items() if k != "flow"})
    assert json.loads((run.path / "run.json").read_text())["architecture"]["settings"]["embedding"] == "signal=cnn1d,few=none"
    assert sp.load(run, allow_uncertified=True).sample({"signal": np.zeros(12), "few": np.zeros(2)}, 10, seed=0).shape == (10, 1)


def test_a_deep_set_finds_the_conjugate_posterior_of_a_mean_for_every_number_of_draws(tmp_path):
    """n ~ 1..20 draws of N(mean, 1), mean ~ N(0, 1): the posterior is N(n xbar / (n + 1), 1 / (n + 1))."""
    def some(theta, rng):
        n = rng.integers(1, 21, (len(theta), 1))
        mask = np.arange(20) < n
        return {"draws": np.where(mask, theta + rng.standard_normal((len(theta), 20)), 0.0), "mask": mask.astype(float)}

    simulator = sp.simulator(prior=sp.Prior({"mean": sp.Normal(0, 1)}), x_shape={"draws": (20,), "mask": (20,)}, batched=True)(some)
    bank = sp.simulate(simulator, 10_000, 1, tmp_path / "bank", workers=1, progress=silent)
    run = sp.train(bank, "npe", out=tmp_path / "run", embedding="deepset", progress=silent, flow="gaussian", max_epochs=15, batch_size=128,
                   embedding_width=16, embedding_blocks=1, embedding_hidden=[32], context=8)
    posterior = sp.load(run, allow_uncertified=True)
    rng = np.random.default_rng(0)
    for n in (3, 8, 19):
        x = {"draws": np.zeros((50, 20)), "mask": np.tile(np.arange(20) < n, (50, 1)).astype(float)}
        x["draws"][:, :n] = rng.standard_normal((50, 1)) + rng.standard_normal((50, n))
        draws = posterior.sample(x, 2000, seed=0)[..., 0]
        exact = x["draws"].sum(1) / (n + 1), (n + 1) ** -0.5
        assert np.sqrt(np.square(draws.mean(1) - exact[0]).mean()) < 0.2 * exact[1]
        np.testing.assert_allclose(draws.std(1).mean(), exact[1], rtol=0.1)


def test_a_gated_run_with_an_embedding_of_yours_opens_where_it_is_named_again(banks, tmp_path, monkeypatch):
    (tmp_path / "net.py").write_text(NET)
    run = sp.train(banks((12,)), "npe", out=tmp_path / "run", embedding=f"{tmp_path / 'net.py'}:Net", progress=silent, **TINY)
    sp.gate(run, progress=silent, draws=500)
    for open_run in (sp.report, sp.load):
        monkeypatch.setattr(names, "_registered", {})
        kwargs = {"allow_uncertified": True} if open_run is sp.load else {"progress": silent}
        with pytest.raises(SettingError, match="code of yours"):
            open_run(Run.open(run.path), **kwargs)
        assert open_run(Run.open(run.path), embedding=f"{tmp_path / 'net.py'}:Net", **kwargs)


def test_no_module_is_imported_for_an_embedding_that_a_run_names(tmp_path):
    (tmp_path / "trap_of_embeddings.py").write_text("raise SystemExit('ran')")
    with pytest.raises(SettingError, match="code of yours"):
        architecture(ObservationSpec.declare({"a": (3,)}), embedding=f"a={tmp_path / 'trap_of_embeddings.py'}:Net").build()
    assert not [name for name in sys.modules if "trap_of_embeddings" in name]
