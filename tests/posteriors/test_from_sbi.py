"""sbi's posteriors as runs: the same densities, corrected for leakage, gated like any other, loaded without code."""

import json
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import NOISE, line_posterior

import sbiplat as sp
from sbiplat.errors import LeakageError, OtherTraining, RunError, SettingError, Uncertified
from sbiplat.progress import silent
from sbiplat.workflow import run_workflow

pytest.importorskip("sbi")
MODELS = [{"model": "maf"}, {"model": "nsf", "num_bins": 5, "tail_bound": 4.0}, {"model": "mdn", "num_components": 3}, {"model": "made"},
          {"model": "maf_rqs"}, {"model": "zuko_nsf", "num_transforms": 2, "hidden_features": 20}, {"model": "zuko_maf", "randperm": True},
          {"model": "zuko_gf"}, {"model": "maf", "z_score_theta": "structured", "z_score_x": "none"}]


def train(theta, x, steps, seed=0, embedding_net=None, **arguments):
    """What sbi's NPE.train does, in a lean loop: maximum likelihood by Adam in batches of 200, the rate by a cosine."""
    from sbi.neural_nets import posterior_nn

    with torch.random.fork_rng():
        torch.manual_seed(seed)
        theta, x = torch.as_tensor(theta, dtype=torch.float32), torch.as_tensor(x, dtype=torch.float32)
        net = posterior_nn(**arguments, **({"embedding_net": embedding_net} if embedding_net else {}))(theta, x)
        optimizer = torch.optim.Adam(net.parameters(), 5e-3)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
        for _ in range(steps):
            rows = torch.randint(len(theta), (200,))
            optimizer.zero_grad()
            net.loss(theta[rows], x[rows]).mean().backward()
            optimizer.step()
            schedule.step()
    return net.eval()


@sp.simulator(prior=sp.Prior({"a": sp.Uniform(-1.0, 1.0), "b": sp.Uniform(0.0, 10.0)}), x_shape=(2,), batched=True)
def box(theta, rng):
    """x = theta and noise, in a box: a posterior near an edge is cut, and a Gaussian leaks."""
    return theta / [1.0, 5.0] + 0.3 * rng.standard_normal(theta.shape)


@pytest.fixture(scope="module")
def box_bank(tmp_path_factory):
    return sp.simulate(box, 3000, 1, tmp_path_factory.mktemp("box") / "bank", workers=1, progress=silent)


@pytest.fixture(scope="module")
def trained(line_bank):
    theta, x = sp.pairs(line_bank, "training")
    return train(theta, x, 1000, model="mdn", num_components=1), theta


@pytest.fixture(scope="module")
def run(trained, line_bank, tmp_path_factory):
    """A gated run of sbi's; tests that change it work on a copy."""
    net, theta = trained
    made = sp.from_sbi(net, line_bank, out=tmp_path_factory.mktemp("sbi") / "run", model="mdn", num_components=1, trained_on=theta,
                       progress=silent)
    sp.gate(made, progress=silent)
    return made


# ---------------------------------------------------------------------------------------------------------------- rows


def test_training_rows_are_those_that_our_own_training_sees(line_bank, line_run):
    theta, x = sp.pairs(line_bank, "training")
    assert theta.shape == (line_run.record["split"]["training"], 2) == x.shape
    np.testing.assert_array_equal(line_bank.theta[np.isin(line_bank.theta[:, 0], theta[:, 0])], theta)
    held_out, _ = sp.pairs(line_bank, "held_out")
    validation, _ = sp.pairs(line_bank, "validation")
    assert len(held_out) == line_run.record["split"]["held_out"]
    assert len(theta) + len(held_out) + len(validation) == line_bank.rows
    assert not np.isin(theta[:, 0], np.concatenate([held_out, validation])[:, 0]).any()
    assert not np.array_equal(sp.pairs(line_bank, "held_out", seed=1)[0], held_out)
    for wrong, said in (({"part": "test"}, "expected one of training"), ({"batch_size": 3}, "no share is called 'batch_size'")):
        with pytest.raises(SettingError, match=said):
            sp.pairs(line_bank, **wrong)


def test_rows_that_failed_are_left_out(tmp_path):
    @sp.simulator(prior=sp.Prior({"a": sp.Normal(0.0, 1.0)}), x_shape=(1,), batched=True)
    def failing(theta, rng):
        return np.where(theta > 1, np.nan, theta + rng.standard_normal(theta.shape))

    bank = sp.simulate(failing, 1000, 1, tmp_path / "bank", workers=1, progress=silent)
    theta, x = sp.pairs(bank)
    assert theta.max() <= 1
    assert np.isfinite(x).all()


# ------------------------------------------------------------------------------------------------------- the same net


@pytest.mark.parametrize("arguments", MODELS, ids=lambda a: " ".join(map(str, a.values())))
def test_a_run_gives_the_densities_and_draws_of_the_net_that_it_came_from(line_bank, tmp_path, arguments):
    theta, x = sp.pairs(line_bank, "validation")
    net = train(*sp.pairs(line_bank), 20, **arguments)
    sp.from_sbi(net, line_bank, out=tmp_path / "run", progress=silent, **arguments)
    state = torch.get_rng_state()
    posterior = sp.load(tmp_path / "run", allow_uncertified=True)
    with torch.no_grad():
        wanted = net.log_prob(torch.as_tensor(theta, dtype=torch.float32)[None], condition=torch.as_tensor(x))[0].numpy()
    np.testing.assert_allclose(posterior.log_prob(theta, x), wanted, rtol=1e-3, atol=1e-3)
    draws = posterior.sample(x[:3], 500, seed=4)
    np.testing.assert_array_equal(draws, posterior.sample(x[:3], 500, seed=4))
    assert torch.equal(state, torch.get_rng_state())
    with torch.no_grad():
        own = np.stack([net.sample((4000,), condition=torch.as_tensor(one[None]))[:, 0].numpy() for one in x[:3]])
    spread = own.std(1)
    np.testing.assert_allclose(draws.mean(1), own.mean(1), atol=0.3 * spread.max())  # 500 draws: sd / 22
    np.testing.assert_allclose(draws.std(1), spread, rtol=0.35)


def test_draws_and_densities_of_a_batch_belong_to_their_own_observation(run):
    """sbi's own sample_and_log_prob mixes them."""
    posterior = sp.load(run)
    x = np.array([[-2.0, 0.0], [0.0, 1.0], [2.0, -1.0]])
    for draws, one in zip(posterior.sample(x, 4000, seed=0), x, strict=True):
        mean, sd = line_posterior(one)
        np.testing.assert_allclose(draws.mean(0), mean, atol=0.2 * sd.max())
        np.testing.assert_allclose(draws.std(0), sd, rtol=0.15)
    theta = posterior.sample(x, 50, seed=1)
    one_by_one = np.stack([posterior.log_prob(t, o) for t, o in zip(theta, x, strict=True)])
    np.testing.assert_allclose(posterior.log_prob(theta, x), one_by_one, rtol=1e-4, atol=1e-4)


def test_the_density_is_the_gaussian_that_is_known_and_draws_nothing_where_nothing_can_leak(run, monkeypatch):
    """sbi draws 10,000 for every new x."""
    monkeypatch.setattr("sbiplat.estimators.sbi_npe.SbiNPE.sample", None)
    x = np.array([0.5, -0.5])
    mean, sd = line_posterior(x)
    theta = mean + sd * np.array([[0.0, 0.0], [1.0, 0.0], [0.0, -1.0]])
    exact = -0.5 * (((theta - mean) / sd) ** 2).sum(1) - np.log(sd * np.sqrt(2 * np.pi)).sum()
    np.testing.assert_allclose(sp.load(run).log_prob(theta, x), exact, atol=0.2)


def test_an_embedding_is_named_and_evaluated_once_for_all_draws(line_bank, tmp_path, monkeypatch):
    calls = []

    class Net(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.net = torch.nn.Linear(2, 3)

        def forward(self, x):
            calls.append(len(x))
            return self.net(x)

    net = train(*sp.pairs(line_bank), 20, model="maf", embedding_net=Net())
    with pytest.raises(SettingError, match="built it with other arguments"):
        sp.from_sbi(net, line_bank, out=tmp_path / "run", progress=silent)
    run = sp.from_sbi(net, line_bank, out=tmp_path / "run", embedding=Net, progress=silent)
    posterior = sp.load(run, allow_uncertified=True, embedding=Net)
    calls.clear()
    posterior.log_prob(np.zeros((500, 2)), np.zeros(2))
    posterior.sample(np.zeros(2), 500, seed=0)
    assert calls == [1, 1]
    with torch.no_grad():
        wanted = float(net.log_prob(torch.zeros(1, 1, 2), condition=torch.zeros(1, 2)))
    assert posterior.log_prob(np.zeros(2), np.zeros(2)) == pytest.approx(wanted, abs=1e-3)


# ------------------------------------------------------------------------------------------------------------- leakage


def test_leaked_mass_is_rejected_from_draws_and_taken_off_densities(box_bank, tmp_path):
    net = train(*sp.pairs(box_bank), 300, model="mdn", num_components=1)
    run = sp.from_sbi(net, box_bank, out=tmp_path / "run", model="mdn", num_components=1, progress=silent)
    posterior = sp.load(run, allow_uncertified=True)
    x = np.array([1.3, 2.6])  # beyond a corner: much of a Gaussian lies outside
    draws = posterior.sample(x, 20_000, seed=0)
    assert box.prior.contains(draws).all()
    leaked = posterior.facts["leaked_max"]
    with torch.no_grad():
        own = net.sample((20_000,), condition=torch.as_tensor(x[None], dtype=torch.float32))[:, 0].double().numpy()
    assert leaked > 0.3
    assert leaked == pytest.approx(1 - box.prior.contains(own).mean(), abs=0.02)
    grid = np.stack(np.meshgrid(np.linspace(-1, 1, 201)[1::2], np.linspace(0, 10, 201)[1::2], indexing="ij"), -1).reshape(-1, 2)
    density = np.exp(posterior.log_prob(grid, x))
    assert density.sum() * (2 * 10) / len(grid) == pytest.approx(1.0, abs=0.1)  # uncorrected: 1 - leaked
    weights = density / density.sum()
    np.testing.assert_allclose(draws.mean(0) / [1, 5], weights @ grid / [1, 5], atol=0.01)
    assert posterior.log_prob(np.array([1.01, 5.0]), x) == -np.inf
    batch = posterior.sample(np.stack([x, [0.0, 1.0]]), 5000, seed=0)
    np.testing.assert_allclose(batch[0].mean(0) / [1, 5], draws.mean(0) / [1, 5], atol=0.02)


def test_where_little_mass_lies_inside_more_draws_tell_how_much(box_bank, tmp_path):
    net = train(*sp.pairs(box_bank), 300, model="mdn", num_components=1)
    posterior = sp.load(sp.from_sbi(net, box_bank, out=tmp_path / "run", model="mdn", num_components=1, progress=silent), allow_uncertified=True)
    grid = np.stack(np.meshgrid(np.linspace(-1, 1, 401)[1::2], np.linspace(0, 10, 401)[1::2], indexing="ij"), -1).reshape(-1, 2)
    cell, seen = 20 / len(grid), []
    for x in np.linspace(1.2, 2.4, 9)[:, None] * [1.0, 2.0]:
        with torch.no_grad():
            condition = torch.as_tensor(x[None], dtype=torch.float32)
            mass = float(net.log_prob(torch.as_tensor(grid, dtype=torch.float32)[:, None], condition=condition).double().exp().sum() * cell)
        if mass > 2e-3:
            seen.append(mass)
            assert np.exp(posterior.log_prob(grid, x)).sum() * cell == pytest.approx(1.0, abs=0.7), x  # 3 errors of 0.22
            assert box.prior.contains(posterior.sample(x, 50, seed=0)).all()
    assert min(seen) < 0.02 < max(seen)


def test_a_density_that_lies_outside_of_the_support_is_refused_in_one_line(box_bank, tmp_path):
    theta, x = sp.pairs(box_bank)
    net = train(theta, x, 300, model="mdn", num_components=1)
    run = sp.from_sbi(net, box_bank, out=tmp_path / "run", model="mdn", num_components=1, progress=silent)
    posterior = sp.load(run, allow_uncertified=True)
    for call in (lambda: posterior.sample(np.array([30.0, 60.0]), 10, seed=0), lambda: posterior.log_prob(np.zeros(2), np.array([30.0, 60.0]))):
        with pytest.raises(LeakageError, match="of the density's mass lies in the prior's support"):
            call()
    shifted = train(theta + np.array([5.0, 50.0]), x, 100, model="mdn")
    run = sp.from_sbi(shifted, box_bank, out=tmp_path / "shifted", model="mdn", progress=silent)
    with pytest.raises(LeakageError, match="on other parameters"):
        sp.gate(run, progress=silent)


# ---------------------------------------------------------------------------------------------------------- the gate


def test_a_well_trained_net_of_sbis_is_certified(run):
    certificate = sp.Certificate.read(run).require(run)
    assert certificate.content["estimator"] == "sbi"
    assert run.record["split"]["trained_on"] == "5100 rows of the bank, none held out (checked)"
    assert run.record["versions"]["sbi"]
    exact = -np.log(line_posterior(np.zeros(2))[1] / [2.0, 1.0] * np.sqrt(2 * np.pi * np.e)).sum()  # of z
    assert -run.record["outcome"]["validation_loss"] == pytest.approx(exact, abs=0.15)


def test_a_net_with_wrong_sds_is_refused(line_bank, tmp_path):
    theta, _ = sp.pairs(line_bank)
    sharper = (theta - [1.0, 0.0]) / [2.0, 1.0] + 0.5 * NOISE * np.random.default_rng(0).standard_normal(theta.shape)
    net = train(theta, sharper, 300, model="mdn", num_components=1)
    certificate = sp.gate(sp.from_sbi(net, line_bank, out=tmp_path / "run", model="mdn", num_components=1, progress=silent), progress=silent)
    assert not certificate.passed
    assert "under-coverage" in [c.name for c in certificate.failed]


def test_the_commands_work_on_such_a_run(run, tmp_path, capsys):
    from sbiplat.cli import app

    copy = tmp_path / "run"
    shutil.copytree(run.path, copy)
    np.save(tmp_path / "x.npy", np.zeros(2, np.float32))

    def sbiplat(*words):
        app([*map(str, words)], standalone_mode=False)
        return capsys.readouterr().out

    assert "certified" in sbiplat("gate", copy, "--n", "300", "--set", "draws=500")
    sbiplat("sample", copy, "--observation", tmp_path / "x.npy", "--n", "200", "--out", tmp_path / "draws.csv")
    assert np.loadtxt(tmp_path / "draws.csv", delimiter=",", skiprows=1).shape == (200, 2)
    sbiplat("report", copy, "--observation", tmp_path / "x.npy")
    assert "none held out (checked)" in (copy / "report.html").read_text()
    record = json.loads((copy / "run.json").read_text())
    record["split"]["trained_on"] = "by the user's word: those of sp.pairs"
    (copy / "run.json").write_text(json.dumps(record))
    with pytest.raises(Uncertified, match="is for other settings"):
        sp.load(copy)


# ------------------------------------------------------------------------------------------------------ mistakes


@pytest.mark.parametrize("arguments", [{"model": "maf"}, {"model": "mdn"}, {"hidden_features": 20}, {"z_score_x": "none"}],
                         ids=lambda a: next(iter(a.values())))
def test_wrong_arguments_are_one_line_and_nothing_is_written(trained, line_bank, tmp_path, arguments):
    right = {"model": "mdn", "num_components": 1}
    with pytest.raises(SettingError, match=r"built it with other arguments than .*") as told:
        sp.from_sbi(trained[0], line_bank, out=tmp_path / "run", progress=silent, **({**right, **arguments} if "model" not in arguments else arguments))
    assert "\n" not in str(told.value)
    assert not (tmp_path / "run").exists()


def test_arguments_that_shape_no_weight_are_found_out_by_the_densities(line_bank, tmp_path):
    net = train(*sp.pairs(line_bank), 50, model="nsf", tail_bound=3.0)
    with pytest.raises(SettingError, match="its log-densities differ by up to"):
        sp.from_sbi(net, line_bank, out=tmp_path / "run", model="nsf", tail_bound=2.0, progress=silent)


def test_other_mistakes_are_one_line(trained, box_bank, line_bank, run, tmp_path):
    net, theta = trained
    right = {"model": "mdn", "num_components": 1, "progress": silent}
    held_out, _ = sp.pairs(line_bank, "held_out")
    three = np.zeros((3, 3))
    for error, said, call in (
        (SettingError, "got Linear", lambda: sp.from_sbi(torch.nn.Linear(2, 2), line_bank, out=tmp_path / "r")),
        (SettingError, "no setting is called 'flow'", lambda: sp.from_sbi(net, line_bank, out=tmp_path / "r", flow="nsf")),
        (SettingError, "model = 'nfs'", lambda: sp.from_sbi(net, line_bank, out=tmp_path / "r", model="nfs")),
        (SettingError, "600 of the 600 rows that sbi was trained on are held out",
         lambda: sp.from_sbi(net, line_bank, out=tmp_path / "r", trained_on=held_out, **right)),
        (SettingError, "held out", lambda: sp.from_sbi(net, line_bank, out=tmp_path / "r", trained_on=theta, seed=1, **right)),
        (SettingError, "are not rows of", lambda: sp.from_sbi(net, line_bank, out=tmp_path / "r", trained_on=torch.zeros(5, 2), **right)),
        (SettingError, r"trained_on has shape \(3, 3\)", lambda: sp.from_sbi(net, line_bank, out=tmp_path / "r", trained_on=three, **right)),
        (OtherTraining, "was begun with", lambda: sp.from_sbi(net, line_bank, out=run.path, seed=1, **right)),
        (RunError, "holds another net", lambda: sp.from_sbi(train(theta, theta, 1, model="mdn", num_components=1), line_bank, out=run.path, **right)),
        (SettingError, "sbi is not trained here: train it with sbi", lambda: sp.train(line_bank, "sbi", out=tmp_path / "r")),
    ):
        with pytest.raises(error, match=said) as told:
            call()
        assert "\n" not in str(told.value)
    assert not (tmp_path / "r").exists()
    assert sp.from_sbi(net, line_bank, out=run.path, **right).weights_digest == run.weights_digest, "the same again"
    assert sp.Certificate.read(run).require(run).passed


def test_a_workflow_that_would_train_it_is_refused_before_it_simulates(tmp_path):
    (tmp_path / "flow.toml").write_text('out = "out"\n[simulate]\nsimulator = "two_moons"\nn = 100\n[train]\nestimator = "sbi"\n')
    with pytest.raises(SettingError, match="sbi is not trained here: train it with sbi"):
        run_workflow(tmp_path / "flow.toml")
    assert not (tmp_path / "out").exists()


def test_a_dict_x_is_refused(tmp_path, trained):
    @sp.simulator(prior=sp.Prior({"a": sp.Normal(0.0, 1.0)}), x_shape={"u": (2,), "v": ()}, batched=True)
    def two(theta, rng):
        return {"u": theta + rng.standard_normal((len(theta), 2)), "v": theta[:, 0]}

    bank = sp.simulate(two, 500, 1, tmp_path / "bank", workers=1, progress=silent)
    with pytest.raises(SettingError, match="x is a dict"):
        sp.from_sbi(trained[0], bank, out=tmp_path / "run", progress=silent)


def test_weights_that_another_sbi_would_read_otherwise_are_refused(run, tmp_path, monkeypatch):
    """The densities that are kept with the weights say so: here the net's meaning is changed, as another version might."""
    from sbi.neural_nets.estimators.mixture_density_estimator import MixtureDensityEstimator

    original = MixtureDensityEstimator.log_prob
    monkeypatch.setattr(MixtureDensityEstimator, "log_prob", lambda self, *a, **k: original(self, *a, **k) + 0.05)
    with pytest.raises(RunError, match="computes other densities from these weights"):
        sp.load(run)


def test_without_sbi_it_is_one_line(run, tmp_path):
    code = ("import sys; sys.modules['sbi'] = None\n"
            f"import sbiplat as sp\nrun = sp.Run.open({str(run.path)!r}); print(run.finished)\n"
            "for call in (lambda: sp.load(run), lambda: run.to_sbi(), lambda: sp.from_sbi(None, 'no.bank', out='r')):\n"
            "    try: call()\n    except sp.UserError as error: print(error)")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, cwd=tmp_path)
    assert done.stdout.splitlines() == ["True", *["this needs sbi, which is not installed: pip install 'sbiplat[sbi]'"] * 3], done.stderr


def test_opening_the_record_of_such_a_run_imports_no_sbi(run):
    code = f"import sys, sbiplat as sp; sp.Run.open({str(run.path)!r}).config_digest; assert 'sbi' not in sys.modules"
    assert subprocess.run([sys.executable, "-c", code], timeout=120).returncode == 0


def test_a_run_is_json_and_safetensors_alone(run):
    assert {p.name for p in run.path.iterdir()} <= {"run.json", "weights.safetensors", "certificate.json", "diagnostics.npz", "lock", "report.html"}
    settings = json.loads((run.path / "run.json").read_text())["architecture"]["settings"]
    assert settings["model"] == "mdn"
    assert settings["num_components"] == 1
