"""Defended training: the penalty is the trace of the Fisher information, its gradient is whole, and what is trained is what is said."""

import math

import numpy as np
import pytest
import torch
from conftest import NOISE, QUICK

import sbiplat as sp
from sbiplat.errors import OtherTraining, SettingError
from sbiplat.nets.flows import FLOWS
from sbiplat.progress import silent
from sbiplat.training import begin, defence
from sbiplat.training.defence import Adversarial, Defence, Fisher, Noise, fisher_trace

SD = math.sqrt(1 + NOISE**2)  # of x, which is z + noise
UNITS = {"x": torch.ones(())}
SMALL = {"embedding_hidden": [16], "context": 4}


def made(bank, estimator="npe", seed=1, spread=0.2, **settings):
    """An untrained estimator whose weights are all at work, in evaluation mode."""
    net = begin.plan(bank, estimator, 0, None, {**SMALL, **settings}).architecture.build(seed)
    rows = {"theta": torch.as_tensor(bank.header.prior.unconstrain(bank.theta[:2000])).float(), "x": torch.as_tensor(bank.x[:2000])}
    net.fit_scales(rows["theta"], {"x": rows["x"]})
    rng = torch.Generator().manual_seed(seed)
    for p in net.parameters():
        torch.nn.init.normal_(p, std=spread, generator=rng)
    return net.eval(), rows["theta"], net.prepare({"x": rows["x"]})


@pytest.fixture(autouse=True)
def seeded():
    with torch.random.fork_rng():
        torch.manual_seed(7)
        yield


def gaussian_law(net, x):
    """Mean (D,) and covariance (D, D) of z given one prepared x (2,), of `flow = gaussian`: differentiable in x and in the weights."""
    context = net.context({"x": x[None]})
    mu, A, _ = net.density.head(context)
    factor = net.regression.factor @ torch.linalg.inv(A[0])
    return net.regression.factor @ mu[0] + context[0, -net.dim:], factor @ factor.T


def exact_trace(net, x):
    """tr F = sum over features of m' S^-1 m + tr(S^-1 S' S^-1 S') / 2, with m and S' slopes of mean and covariance."""
    _, S = gaussian_law(net, x)
    m, slope = torch.func.jacfwd(lambda x: gaussian_law(net, x))(x)
    inverse = torch.linalg.inv(S)
    whole = torch.stack([inverse @ slope[..., k] for k in range(len(x))])
    return torch.einsum("ak,ab,bk->", m, inverse, m) + 0.5 * (whole @ whole).diagonal(dim1=1, dim2=2).sum()


def test_the_trace_of_a_gaussian_is_the_closed_form_with_the_part_of_its_covariance(line_bank):
    net, _, x = made(line_bank, flow="gaussian")
    for row in (0, 1, 2):
        one = x["x"][row]
        exact = float(exact_trace(net, one).detach())
        many = {"x": one.expand(40_000, 2)}
        found = fisher_trace(net, torch.zeros(40_000, 2), many, UNITS)[0]
        assert abs(float(found.mean()) - exact) < 4 * float(found.std()) / 200
        still = fisher_trace(net, torch.zeros(40_000, 2), many, {"x": torch.tensor(2.0)})[0]
        assert abs(float(still.mean()) - 4 * exact) < 16 * float(still.std()) / 800, "of twice the unit, four times the information"


def test_the_gradient_is_that_of_the_closed_form_and_not_that_of_fixed_draws(line_bank):
    net, _, x = made(line_bank, flow="gaussian")
    one = x["x"][0]
    exact_trace(net, one).backward()
    wanted = net.density.head.net.weight.grad.clone()
    parts, naive = [], []
    for _ in range(40):
        many = {"x": one.expand(2000, 2)}
        net.zero_grad()
        Fisher(0.5).add_gradient(net, torch.zeros(2000, 2), many, UNITS, times=2.0)
        parts.append(net.density.head.net.weight.grad.clone())
        net.zero_grad()
        fisher_trace(net, torch.zeros(2000, 2), many, UNITS, graph=True)[0].mean().backward()
        naive.append(net.density.head.net.weight.grad.clone())
    found, error = torch.stack(parts).mean(0), torch.stack(parts).std(0) / math.sqrt(40)
    assert float(((found - wanted) / error.clamp_min(1e-6)).abs().max()) < 5
    rows = slice(2, 4)  # of the head's outputs: the logarithm of A's diagonal, so of the width
    ratio = float((torch.stack(naive).mean(0)[rows] * wanted[rows]).sum() / wanted[rows].square().sum())
    assert ratio > 1.3, "with the draws held fixed, a wider posterior would seem to gain more than it does"


@pytest.mark.parametrize(("estimator", "settings"), [*(("npe", {"flow": f, "transforms": 1, "hidden": [8]}) for f in FLOWS),
                                                     ("npse", {"hidden": 16}), ("fmpe", {"hidden": 16}), ("nre", {"hidden": 16})])
def test_slopes_in_x_and_in_the_weights_are_those_of_finite_differences(line_bank, monkeypatch, estimator, settings):
    """Through embedding, regression, head and flow: a part of the way from x that was left out would show."""
    net, theta, x = made(line_bank, estimator, **settings)
    theta, x = theta[:64], {"x": x["x"][:64].clone()}
    if estimator == "npe":  # the same theta throughout
        draws = net.sample(net.context(x), 1, torch.Generator().manual_seed(1)).detach()
        monkeypatch.setattr(net, "sample", lambda context, n, generator: draws)

    def root(x):
        torch.manual_seed(3)
        return fisher_trace(net, theta, {"x": x}, UNITS)[1].detach()

    torch.manual_seed(3)
    trace = fisher_trace(net, theta, x, UNITS)[0]
    if estimator not in ("npse", "fmpe"):  # whose noised theta is held at this x, and moves with the x of `root`
        h = 5e-3
        slopes = [(root(x["x"] + h * e) - root(x["x"] - h * e)) / (2 * h) for e in torch.eye(2)]
        numeric = sum(s.square() for s in slopes)
        close = (trace - numeric).abs() <= 0.03 * numeric + 0.01
        assert float(close.float().mean()) > 0.9, "knots of splines may lie in between"
    torch.manual_seed(3)
    fisher_trace(net, theta, x, UNITS, graph=True)[0].mean().backward()
    slopes = [p.grad if p.grad is not None else torch.zeros_like(p) for p in net.parameters()]
    size = torch.stack([s.square().sum() for s in slopes]).sum().sqrt()
    ends, h = [], 1e-3 / max(1.0, float(size) / 10)
    for side in (1, -1):
        for p, s in zip(net.parameters(), slopes, strict=True):
            p.data.add_(side * h * s / size)
        torch.manual_seed(3)
        ends.append(float(fisher_trace(net, theta, x, UNITS)[0].double().mean()))
        for p, s in zip(net.parameters(), slopes, strict=True):
            p.data.sub_(side * h * s / size)
    assert (ends[0] - ends[1]) / (2 * h) == pytest.approx(float(size), rel=0.03)


@pytest.mark.parametrize("sigma", [1.0, 0.3])
@pytest.mark.parametrize("estimator", ["npse", "fmpe"])
def test_of_denoisers_the_trace_is_that_of_the_posterior_that_they_denoise(line_bank, monkeypatch, estimator, sigma):
    """The denoiser of w ~ N(M c, sigma^2 I), with M c linear in x: tr F = |L^-1 W' + M|^2 / sigma^2, whatever the whitening."""
    net, _, x = made(line_bank, estimator, noises=4)
    M = torch.tensor([[0.5, -0.3], [0.2, 0.4]])
    monkeypatch.setattr(net, "context", lambda x: torch.cat([x["x"], net.regression(x["x"])], dim=1))
    monkeypatch.setattr(net.field, "conditions", lambda context: context[:, None])

    def velocity_back(z, t, context):
        s2 = t.tan().square()
        D = (sigma**2 * z / t.cos() + s2 * (context[..., :2] @ M.T)) / (sigma**2 + s2)
        return (D - t.cos() * z) / t.sin()

    monkeypatch.setattr(net, "velocity_back", velocity_back)
    whole = net.regression.inverse @ net.regression.weight.T + M
    exact = float(whole.square().sum()) / sigma**2
    many = {"x": x["x"][:1].expand(40_000, 2)}
    found = fisher_trace(net, torch.randn(40_000, 2), many, UNITS)[0]
    assert abs(float(found.mean()) - exact) < 4 * float(found.std()) / 200
    assert float(found.std()) < 3 * exact, "few draws are enough"


@pytest.mark.parametrize(("estimator", "settings"), [("npse", {}), ("npse", {"weighting": "likelihood", "schedule": "ve"}), ("fmpe", {}),
                                                     ("fmpe", {"path": "vp"})])
def test_a_nat_of_a_denoiser_is_what_a_displaced_gaussian_costs(line_bank, monkeypatch, estimator, settings):
    """F = 0 denoises N(0, I); of the law displaced by d it is |d|^2 / 2 nats away."""
    net, _, x = made(line_bank, estimator, **settings)
    monkeypatch.setattr(net, "velocity_back", lambda z, t, conditions: torch.zeros_like(z))
    many, w, losses = {"x": x["x"][:1].expand(100_000, 2)}, torch.randn(100_000, 2), []
    for moved in (0.0, 1.0):  # each of two coordinates: a nat
        torch.manual_seed(1)
        losses.append(net.loss(net.unwhiten(w + moved, net.context(many)), many).detach())
    risen = losses[1] - losses[0]
    assert abs(float(risen.mean()) - net.nat()) < 4 * float(risen.std()) / math.sqrt(100_000) + 1e-3
    assert Defence(("fisher:0.5",), net, x).fisher.weight == pytest.approx(0.5 * net.nat())


def train(bank, out, estimator="npe", **settings):
    quick = QUICK if estimator == "npe" else {k: v for k, v in QUICK.items() if k != "flow"}
    return sp.train(bank, estimator, out=out, progress=silent, **{**quick, **settings})


def law(run):
    """Mean slope of z in standardised x, (D,), and sd of z, (D,), about the middle of the data."""
    posterior = sp.load(run, allow_uncertified=True)
    x = np.array([[0.0, 0.0], [SD, SD], [-SD, -SD]])
    z = posterior.unconstrained_sample({"x": x}, 20_000, 1)
    return (z[1].mean(0) - z[2].mean(0)) / 2, z[0].std(0)


def test_a_defended_gaussian_is_the_minimum_of_the_penalised_loss(line_bank, tmp_path):
    """For z | x ~ N(g x, v), x of unit variance: q = N(G x, S) with G = g / (1 + 2 W), S = v + (g - G)^2 + 2 W G^2."""
    weight, g, v = 0.1, 1 / SD, NOISE**2 / SD**2
    run = train(line_bank, tmp_path / "run", defend=f"fisher:{weight}", max_epochs=30)
    G = g / (1 + 2 * weight)
    slope, sd = law(run)
    np.testing.assert_allclose(slope, G, atol=0.05)
    np.testing.assert_allclose(sd, math.sqrt(v + (g - G) ** 2 + 2 * weight * G**2), rtol=0.07)
    last = run.metrics()[-1]
    trace = 2 * G**2 / sd[0] ** 2
    assert last["fisher_trace"] == pytest.approx(trace, rel=0.15)
    assert last["validation_loss"] == pytest.approx(last["plain_loss"] + weight * last["fisher_trace"])


def test_at_a_small_weight_the_density_stays_within_a_tenth_of_a_nat(line_bank, line_run, tmp_path):
    defended = train(line_bank, tmp_path / "run", defend="fisher:0.01")
    plain = line_run.record["outcome"]["validation_loss"]
    assert min(m["plain_loss"] for m in defended.metrics()) == pytest.approx(plain, abs=0.1)
    lost = defended.metrics()[defended.record["outcome"]["best_epoch"]]["plain_loss"] - plain
    assert -0.05 < lost < 0.1


@pytest.mark.parametrize(("estimator", "settings"), [("npse", {"hidden": 32}), ("fmpe", {"hidden": 32}), ("nre", {"hidden": 32, "balance": 1.0}),
                                                     ("npe", {"members": 2})])
def test_the_penalty_tames_every_estimator_that_has_it(line_bank, tmp_path, estimator, settings):
    common = {"max_epochs": 4, **settings}
    if estimator != "npe":
        common["embedding_hidden"] = [16]
    traces = [train(line_bank, tmp_path / f"{w}", estimator, defend=f"fisher:{w}", **common).metrics()[-1]["fisher_trace"]
              for w in (1e-6, 1.0)]
    assert traces[1] < 0.6 * traces[0]


def test_noise_gives_the_posterior_of_noisier_data(line_bank, tmp_path):
    """x + e with e of half an sd of x: z | x ~ N(x / (1.5625), ...) in x's own units."""
    slope, sd = law(train(line_bank, tmp_path / "run", defend="noise:0.5", max_epochs=20))
    shrink = 1 / (SD**2 * 1.25)
    np.testing.assert_allclose(slope, shrink * SD, atol=0.06)
    np.testing.assert_allclose(sd, math.sqrt(1 - shrink), rtol=0.1)


def test_noise_has_its_scale_and_spares_masks_and_what_is_no_x(line_bank):
    x = {"set": torch.zeros(4000, 3, 2), "mask": torch.ones(4000, 3), "unit": torch.full((4000,), 0.5)}
    units = {"set": torch.tensor([[1.0, 2.0]] * 3)}
    found = Noise(0.2).disturbed(None, torch.zeros(4000, 2), x, units)
    np.testing.assert_allclose(found["set"].std(0), [[0.2, 0.4]] * 3, rtol=0.06)
    assert found["mask"] is x["mask"]
    assert found["unit"] is x["unit"]


def test_an_attack_keeps_its_size_and_raises_the_loss_more_than_noise(line_run, line_bank):
    net = line_run.estimator()
    theta = torch.as_tensor(line_bank.header.prior.unconstrain(line_bank.theta[:2000])).float()
    x = net.prepare({"x": torch.as_tensor(line_bank.x[:2000])})
    units = {"x": torch.tensor([1.0, 0.5])}
    losses = []
    for _ in range(2):
        attacked = Adversarial(0.3).disturbed(net, theta, x, units)
        size = ((attacked["x"] - x["x"]) / units["x"]).square().mean(1).sqrt()
        assert float(size.max()) <= 0.3 * (1 + 1e-5)
        assert float(size.median()) > 0.29, "a convex loss is highest on the edge"
        noisy = {"x": x["x"] + (attacked["x"] - x["x"]).flip(0)}
        losses.append([float(net.loss(theta, v).mean().detach()) for v in (x, noisy, attacked)])
    clean, noise, attack = losses[0]
    assert attack - clean > 3 * (noise - clean) > 0
    assert all(p.grad is None for p in net.parameters())
    assert not net.training


def test_adversarial_training_lowers_the_loss_under_attack(line_bank, line_run, tmp_path):
    run = train(line_bank, tmp_path / "run", defend="adversarial:0.5")
    theta = torch.as_tensor(line_bank.header.prior.unconstrain(line_bank.theta[:2000])).float()
    losses = {}
    for name, net in (("plain", line_run.estimator()), ("defended", run.estimator())):
        x = net.prepare({"x": torch.as_tensor(line_bank.x[:2000])})
        torch.manual_seed(5)
        losses[name] = float(net.loss(theta, Adversarial(0.5).disturbed(net, theta, x, UNITS)).mean().detach())
    assert losses["defended"] < losses["plain"] - 0.2


def test_units_are_scales_of_summaries_and_ones_of_what_is_standardised(line_bank):
    class Summaries(torch.nn.Module):
        def summaries(self, x):
            return torch.stack([100 * x[:, 0], x.sum(1), torch.zeros(len(x))], dim=1)

        def forward(self, s):
            return s

    for embedding, wanted in ((Summaries, [100, math.sqrt(2), 1]), ("mlp", [1, 1])):
        net = begin.plan(line_bank, "npe", 0, None, {**QUICK, "embedding": embedding}).architecture.build(0)
        x = torch.as_tensor(line_bank.x[:])
        net.fit_scales(torch.as_tensor(line_bank.theta[:]).float(), {"x": x})
        units = net.units(net.prepare({"x": x}))
        np.testing.assert_allclose(units["x"].expand(len(wanted)), wanted, rtol=0.1)


def test_masks_of_sets_are_no_data(tmp_path):
    @sp.simulator(prior=sp.Prior({"a": sp.Normal(0, 1), "b": sp.Normal(0, 1)}), x_shape={"seen": (3, 2), "mask": (3,)}, batched=True)
    def sets(theta, rng):
        mask = (np.arange(3) < rng.integers(1, 4, (len(theta), 1))).astype(float)
        return {"seen": mask[..., None] * (theta[:, None] + rng.standard_normal((len(theta), 3, 2))), "mask": mask}

    bank = sp.simulate(sets, 400, 1, tmp_path / "bank", workers=1, progress=silent)
    net = begin.plan(bank, "npe", 0, None, {"flow": "gaussian", "embedding": "deepset"}).architecture.build(0)
    rows = {k: torch.as_tensor(v[:]) for k, v in bank.x.items()}
    net.fit_scales(torch.zeros(400, 2), rows)
    ready = net.prepare(rows)
    assert set(net.units(ready)) == {"seen"}
    for p in net.parameters():
        torch.nn.init.normal_(p, std=0.2)
    trace, _ = fisher_trace(net, torch.zeros(400, 2), ready, net.units(ready))
    assert trace.shape == (400,)
    assert float(trace.mean()) > 0


def test_defences_work_on_signals_that_are_observed(tmp_path):
    def detector(signal, theta, rng):
        return signal + NOISE * torch.randn(signal.shape, generator=rng, device=signal.device)

    @sp.simulator(prior=sp.Prior({"a": sp.Normal(0, 1), "b": sp.Normal(0, 1)}), x_shape=(2,), batched=True, observe=detector)
    def signal(theta, rng):
        return theta

    bank = sp.simulate(signal, 3000, 1, tmp_path / "bank", workers=1, progress=silent)
    run = train(bank, tmp_path / "run", simulator=signal, defend=["noise:0.5", "fisher:0.01", "adversarial:0.1"], max_epochs=3)
    assert all(m["fisher_trace"] > 0 for m in run.metrics())


def test_a_run_records_its_defence_and_no_other_resumes_it(line_bank, tmp_path):
    run = train(line_bank, tmp_path / "run", defend=["fisher:1e-2", "noise: 0.10"], max_epochs=1)
    assert run.record["training"]["defend"] == ["noise:0.1", "fisher:0.01"]
    assert train(line_bank, run.path, defend=["noise:0.1", "fisher:0.01"], max_epochs=1).weights_digest == run.weights_digest
    with pytest.raises(OtherTraining, match=r"defend = \['noise:0.1', 'fisher:0.01'\], not \['noise:0.1'\]"):
        train(line_bank, run.path, defend="noise:0.1", max_epochs=1)
    plain = train(line_bank, tmp_path / "plain", max_epochs=1)
    assert plain.config_digest != run.config_digest
    assert plain.record["training"]["defend"] == []
    assert "plain_loss" not in plain.metrics()[0]


@pytest.mark.parametrize(("estimator", "words", "told"), [
    ("npe", "fisher", r"defend = 'fisher': expected fisher:WEIGHT, a number above 0"),
    ("npe", "fisher:", r"expected fisher:WEIGHT"),
    ("npe", ["noise:0.1", "adversarial:none"], r"defend = 'adversarial:none': expected adversarial:ROOT_MEAN_SQUARE"),
    ("npe", "fisher:-0.1", r"expected fisher:WEIGHT, a number above 0"),
    ("npe", "noise:inf", r"expected noise:SCALE"),
    ("npe", "fischer:0.1", r"no defence is called 'fischer'; did you mean fisher\?"),
    ("npe", "slab:2", r"'slab:2': expected slab:SHARE, a number above 0 and below 1"),
    ("npe", "magic:0.1", r"no defence is called 'magic'; known: noise, slab, adversarial, fisher"),
    ("npe", ["fisher:0.1", "fisher:0.2"], r"defend has fisher twice, 0.1 and 0.2"),
    ("npe", [0.1], r"defend = \[0.1\]: expected a text, or a list of texts"),
    ("nle", "fisher:0.1", r"'fisher:0.1': nle learns the density of x and not of theta, and can be defended by noise, slab alone"),
    ("nle", "adversarial:0.1", r"can be defended by noise, slab alone; take that, or npe, npse, fmpe or nre"),
])
def test_a_defence_that_cannot_be_is_one_line_before_anything_is_written(line_bank, tmp_path, estimator, words, told):
    with pytest.raises(SettingError, match=told) as error:
        sp.train(line_bank, estimator, out=tmp_path / "run", progress=silent, defend=words)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "run").exists()


def test_the_best_epoch_is_that_of_the_defended_objective(line_bank, tmp_path, monkeypatch):
    """The plain loss is least where the training begins, at the regression; what is kept is what was defended."""
    run = train(line_bank, tmp_path / "run", defend="fisher:1", max_epochs=6, embedding_hidden=[16])
    plain, whole = ([m[k] for m in run.metrics()] for k in ("plain_loss", "validation_loss"))
    assert int(np.argmin(plain)) < int(np.argmin(whole)) == run.record["outcome"]["best_epoch"]


def test_the_penalty_is_taken_in_some_steps_and_counts_for_all(line_bank):
    net, theta, x = made(line_bank, flow="gaussian")
    theta, x = theta[:500], {"x": x["x"][:500]}
    guard = Defence(("fisher:0.5",), net, x)
    added = [float(guard.add_gradient(theta, x, step)) for step in range(2 * defence.EVERY)]
    assert [v > 0 for v in added] == 2 * [True, *(defence.EVERY - 1) * [False]]
    half = math.ceil(defence.SHARE * 500)
    mean = np.mean([float(fisher_trace(net, theta[:half], {"x": x["x"][:half]}, guard.units)[0].mean()) for _ in range(50)])
    several = np.mean([float(guard.add_gradient(theta, x, 0)) for _ in range(50)])
    assert several / defence.EVERY == pytest.approx(0.5 * mean, rel=0.1)


def test_where_batches_go_in_pieces_so_does_the_penalty(line_bank, monkeypatch):
    net, theta, x = made(line_bank, flow="gaussian")
    seen = []
    monkeypatch.setattr(defence, "fisher_trace", lambda m, theta, x, units, graph: (seen.append(len(theta)), fisher_trace(m, theta, x, units, graph))[1])
    for pieces in (1, 4, 1000):
        Defence(("fisher:0.5",), net, x, pieces).add_gradient(theta[:500], {"x": x["x"][:500]}, 0)
    assert seen == [250, 63, 1]
