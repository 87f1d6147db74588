"""The two trainings of GNPE: seeded, resumable, one posterior with conjugate answers, and one line for what cannot work."""

import json
import os
import shutil
import signal

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import sbiplat as sp
from sbiplat.bank.stream import pairs_at
from sbiplat.errors import OtherTraining, RunError, SettingError, SimulatorError, SymmetryError
from sbiplat.posteriors.convergence import ChainError
from sbiplat.posteriors.of_run import from_run
from sbiplat.progress import Progress, silent
from sbiplat.symmetry import Product, Translation
from sbiplat.training import equivariant, trainer
from sbiplat.training.trainer import Stopped
from simulators.location import location

QUICK = {"max_epochs": 3, "batch_size": 64, "embedding_hidden": [16], "context": 8}
OF_BASE = {"npe": {"flow": "gaussian"}, "fmpe": {"blocks": 1, "steps": 8}, "npse": {"blocks": 1}}


def made(x_shape=(2,), prior=None, symmetry=None, observe=None, name="near", **settings):
    """x_i = mu + noise, with a prior as wide as the noise: the posterior is N(sum x / 3, 1 / 3), far from flat."""
    def near(theta, rng):
        mu = theta[:, :1]
        if observe is not None:
            return np.repeat(mu, 2, 1)
        x = mu + rng.standard_normal((len(theta), 2))
        return x if x_shape == (2,) else {k: x if k == "a" else rng.standard_normal((len(theta), *s)) for k, s in x_shape.items()}

    symmetry = Translation(("mu",), field="x" if x_shape == (2,) else "a") if symmetry is None else symmetry
    return sp.simulator(prior=prior or sp.Prior({"mu": sp.Normal(0, 1)}), x_shape=x_shape, batched=True, symmetry=symmetry or None,
                        observe=observe, name=name, **settings)(near)


def simulated(simulator, folder, n=600):
    return sp.simulate(simulator, n, 1, folder / "bank", workers=1, progress=silent)


@pytest.fixture(scope="module")
def bank(tmp_path_factory):
    return simulated(made(), tmp_path_factory.mktemp("near"))


@pytest.fixture(scope="module")
def run(bank, tmp_path_factory):
    return train(bank, tmp_path_factory.mktemp("near") / "run", held_out=0.4, validation=0.35)


def train(bank, out, estimator="npe", simulator=None, progress=silent, **settings):
    return sp.train(bank, estimator, out=out, simulator=simulator or made(), progress=progress,
                    **{**QUICK, **OF_BASE.get(estimator, {}), "symmetry": "gnpe", **settings})


def found(run, x, n=4000):
    """Mean and sd of draws in units of the exact posterior's: (0, 1) where they are right."""
    draws = from_run(run).sample(x, n, seed=0)[:, 0]
    sd = np.sqrt(1 / 3)
    return (draws.mean() - np.sum(x["a"] if isinstance(x, dict) else x) / 3) / sd, draws.std() / sd


# ------------------------------------------------------------------------------------------------- seeded and resumable


def test_the_same_seed_gives_the_same_weights_and_another_seed_others(bank, tmp_path):
    runs = [train(bank, tmp_path / str(k), seed=s, max_epochs=1) for k, s in enumerate((3, 3, 4))]
    assert runs[0].weights_digest == runs[1].weights_digest != runs[2].weights_digest
    assert runs[0].architecture == runs[1].architecture


@pytest.mark.parametrize("base", ["npe", "fmpe", "npse"])
def test_a_kill_in_either_training_resumes_to_the_weights_of_an_unbroken_run(bank, tmp_path, monkeypatch, base):
    whole = train(bank, tmp_path / "whole", base)
    out, step = tmp_path / "broken", trainer._Training._step
    for part, at in ((out / "initial", 5), (out / "initial", 15), (out, 4), (out, 16)):
        def stopping(self, batch, part=part, at=at):
            if self.run.path == part and self.state["step"] == at:
                os.kill(os.getpid(), signal.SIGTERM)
            return step(self, batch)

        with monkeypatch.context() as patch:
            patch.setattr(trainer._Training, "_step", stopping)
            with pytest.raises(Stopped):
                train(bank, out, base)
        assert (part / "checkpoint").exists()
    resumed = train(bank, out, base)
    assert resumed.weights_digest == whole.weights_digest
    assert resumed.architecture == whole.architecture


def test_a_signal_at_the_end_of_the_initial_training_stops_there(bank, tmp_path, monkeypatch):
    end = trainer._Training._end_epoch

    def last(self, advance):
        end(self, advance)
        if self.run.path.name == "initial" and self.state["epoch"] == 3:
            os.kill(os.getpid(), signal.SIGTERM)

    with monkeypatch.context() as patch:
        patch.setattr(trainer._Training, "_end_epoch", last)
        with pytest.raises(Stopped):
            train(bank, tmp_path / "run")
    assert sp.Run.open(tmp_path / "run" / "initial").finished
    assert not (tmp_path / "run" / "run.json").exists()
    assert train(bank, tmp_path / "run").finished


def test_a_finished_run_is_returned_at_once_and_other_settings_are_told(bank, run, monkeypatch):
    same = {"held_out": 0.4, "validation": 0.35}
    with monkeypatch.context() as patch:
        patch.setattr(equivariant, "measured", None)
        patch.setattr(trainer, "_Training", None)
        assert train(bank, run.path, **same).weights_digest == run.weights_digest
    for settings, message in (({"kernel_ratio": 0.7}, "kernel_ratio = 0.5, not 0.7"), ({"proxy": "dropped"}, "proxy = 'auto', not 'dropped'"),
                              ({"symmetry": "none"}, "symmetry = 'gnpe', not 'none'"), ({"gibbs_steps": 50}, "gibbs_steps = 100, not 50"),
                              ({"initial": {"max_epochs": 2}}, "initial = None, not"), ({"max_epochs": 4}, "max_epochs = 3, not 4"),
                              ({"simulator": made(symmetry=Translation(("mu",), exact=False))}, "the action = ")):
        with pytest.raises(OtherTraining, match=message) as error:
            train(bank, run.path, **{**same, **settings})
        assert "\n" not in str(error.value)


def test_settings_in_tuples_are_those_in_lists(bank, tmp_path):
    settings = {"initial": {"embedding_hidden": (8, 8), "max_epochs": 2}, "kernel_widths": {"mu": 0.4}}
    first = train(bank, tmp_path / "run", **settings)
    assert first.architecture.symmetry["initial"]["embedding_hidden"] == [8, 8]
    assert sp.Run.open(tmp_path / "run" / "initial").record["training"]["max_epochs"] == 2
    settings["initial"]["embedding_hidden"] = [8, 8]
    assert train(bank, tmp_path / "run", **settings).weights_digest == first.weights_digest


# ---------------------------------------------------------------------------------------------------- known posteriors


@pytest.mark.parametrize("base", ["npe", "fmpe", "npse"])
def test_told_proxies_give_the_conjugate_posterior_under_a_prior_that_is_not_flat(bank, tmp_path, base):
    run = train(bank, tmp_path / "run", base, proxy="told", initial={"flow": "gaussian"})
    mean, sd = found(run, np.array([2.0, 2.0]), 2000)
    assert abs(mean) < 0.35
    assert abs(sd - 1) < 0.2


def test_a_proxy_that_is_dropped_under_such_a_prior_is_found_and_auto_tells_it(bank, run, tmp_path):
    assert run.architecture.symmetry["told"] == [True]
    assert run.architecture.symmetry["slope"] > equivariant.MOST_SLOPE
    dropped = train(bank, tmp_path / "run", proxy="dropped")
    assert dropped.architecture.symmetry["told"] == [False]
    assert found(dropped, np.array([2.0, 2.0]))[0] > 0.6, "draws that forget the prior"


def test_location_drops_the_proxy_and_finds_its_posterior(tmp_path):
    bank = simulated(location, tmp_path, 1500)
    for proxy in ("auto", "told"):
        run = train(bank, tmp_path / proxy, simulator=location, proxy=proxy)
        assert run.architecture.symmetry["told"] == [proxy == "told"]
        draws = from_run(run).sample(np.full(5, 3.0), 4000, seed=0)[:, 0]
        assert abs(draws.mean() - 3) < 0.35 / np.sqrt(5)
        assert abs(draws.std() * np.sqrt(5) - 1) < 0.15


def test_signals_that_are_observed(tmp_path):
    def observe(signal, theta, rng):
        return signal + torch.randn(signal.shape, generator=rng, device=signal.device)

    simulator = made(observe=observe, name="observed")
    run = train(simulated(simulator, tmp_path, 1000), tmp_path / "run", simulator=simulator)
    mean, sd = found(run, np.array([1.0, -2.0]))
    assert abs(mean) < 0.35
    assert abs(sd - 1) < 0.2


def test_a_dict_with_embeddings_by_field(tmp_path):
    simulator = made(x_shape={"a": (2,), "b": (12,)}, name="fields")
    bank = simulated(simulator, tmp_path, 1000)
    for k, embedding in enumerate(({"a": "none", "b": "cnn1d"}, "mlp")):
        run = train(bank, tmp_path / str(k), simulator=simulator, embedding=embedding, channels=[4, 4])
        mean, sd = found(run, {"a": np.array([2.0, 2.0]), "b": np.zeros(12)})
        assert abs(mean) < 0.6
        assert abs(sd - 1) < 0.3


# ----------------------------------------------------------------------------------------------------- what cannot work


class Never:
    """In place of a training: none may begin."""

    def __init__(self, *arguments):
        raise AssertionError("a training began")


@pytest.mark.parametrize(("settings", "message"), [
    ({"kernel_widths": {"nu": 0.3}}, "kernel width of 'nu': .*mu"),
    ({"kernel_widths": 1}, "kernel_widths = 1: expected a table"),
    ({"kernel_widths": {"mu": -1.0}}, "kernel width of mu = -1.0: expected a number above 0"),
    ({"compile": True}, "does not go with compile = true"),
    ({"members": 2}, "does not go with members"),
    ({"defend": ["fisher:0.1"]}, "can be defended by noise and slab, and not by fisher"),
    ({"estimator": "nle", "flow": "gaussian"}, "goes with npe, fmpe, npse, and the estimator is nle"),
    ({"estimator": "nre"}, "goes with npe, fmpe, npse, and the estimator is nre"),
    ({"simulator": made(symmetry=False)}, "declares no symmetry; give it one"),
    ({"simulator": made(symmetry=Translation(("nu",)))}, "Translation: the prior has no parameter 'nu'"),
    ({"symmetry": "gnep"}, "symmetry = 'gnep': expected"),
    ({"kernel_ratio": 0.0}, "kernel_ratio = 0.0"),
    ({"initial": {"flwo": "nsf"}}, "no setting is called 'flwo'; did you mean flow"),
    ({"initial": {"held_out": 0.4}}, "initial: held_out is the same for both nets"),
])
def test_what_cannot_work_is_one_line_before_anything_is_trained(bank, tmp_path, monkeypatch, settings, message):
    monkeypatch.setattr(trainer, "_Training", Never)
    if settings.get("estimator") == "nle":
        for name in ("embedding_hidden", "context"):
            monkeypatch.delitem(QUICK, name)
    with pytest.raises((SettingError, SimulatorError, SymmetryError), match=message) as error:
        train(bank, tmp_path / "run", **settings)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "run").exists()


def test_a_joint_prior_and_a_field_named_proxy_are_refused(tmp_path, monkeypatch):
    prior = sp.Prior.joint({"mu": "", "b": ""}, sp.MultivariateNormal([0, 0], [[1, 0.5], [0.5, 1]]))
    for k, (simulator, message) in enumerate((
            (made(prior=prior, name="joint"), "needs a prior of independent parameters"),
            (made(x_shape={"a": (2,), "proxy": (2,)}, name="taken"), "x has a field 'proxy' of its own"))):
        (tmp_path / str(k)).mkdir()
        bank = simulated(simulator, tmp_path / str(k), 400)
        with pytest.raises((SettingError, SymmetryError), match=message):
            train(bank, tmp_path / "run", simulator=simulator)
        assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(("settings", "message"), [
    ({"kernel_widths": {"mu": 0.05}}, r"the kernel of mu, 0.05, is far too narrow for a pose known to 0.\d+: chains would take about \d{3} steps"),
    ({"kernel_ratio": 0.05}, "far too narrow"),
    ({"kernel_widths": {"mu": 3.0}}, r"the kernel of mu, 3, is as wide as the prior of the pose"),
    ({"kernel_ratio": 50.0}, "as wide as the prior of the pose"),
])
def test_a_kernel_that_is_far_too_narrow_or_wide_is_told_and_another_needs_no_new_initial_net(bank, tmp_path, settings, message):
    with pytest.raises(SettingError, match=message) as error:
        train(bank, tmp_path / "run", **settings)
    assert "\n" not in str(error.value)
    before = sp.Run.open(tmp_path / "run" / "initial").weights_path.stat().st_mtime_ns
    assert train(bank, tmp_path / "run", max_epochs=3).finished
    assert sp.Run.open(tmp_path / "run" / "initial").weights_path.stat().st_mtime_ns == before


def test_an_approximate_factor_alone_is_told_its_proxy(tmp_path):
    prior = sp.Prior({"mu": sp.Normal(0, 1), "b": sp.Uniform(-50, 50)})
    simulator = made(prior=prior, symmetry=Product(Translation(("mu",), exact=False)), name="rough")
    run = train(simulated(simulator, tmp_path), tmp_path / "run", simulator=simulator, proxy="dropped")
    assert run.architecture.symmetry["told"] == [True]


# ------------------------------------------------------------------------------------------------- what else takes a run


def test_a_search_is_refused_in_one_line(bank, tmp_path):
    with pytest.raises(SettingError, match="each trial's are of its own kernel; tune with symmetry = 'none' or 'augment'"):
        sp.tune(bank, "npe", out=tmp_path / "run", trials=1, simulator=made(), progress=silent, symmetry="gnpe", **QUICK)
    assert not (tmp_path / "run").exists()


def test_a_search_of_an_augmented_training_is_not_one_of_a_plain_one(bank, tmp_path):
    pytest.importorskip("optuna")
    settings = {**QUICK, "flow": "gaussian", "search": {"learning_rate": [1e-3, 3e-3]}, "simulator": made(), "progress": silent}
    run = sp.tune(bank, "npe", out=tmp_path / "run", trials=1, symmetry="augment", **settings)
    assert run.record["symmetry"]["symmetry"] == "augment"
    with pytest.raises(OtherTraining, match="symmetry = 'augment', not 'none'"):
        sp.tune(bank, "npe", out=tmp_path / "run", trials=1, **settings)


def test_a_learning_curve_is_of_trainings_with_the_symmetry(run):
    curve = sp.learning_curve(run, simulator=made(), progress=silent)
    assert curve.rows == (150, 300, 600)
    for name in ("quarter", "half"):
        part = sp.Run.open(run.path / "learning_curve" / name)
        assert part.record["symmetry"]["symmetry"] == "gnpe"
        assert part.architecture.symmetry["role"] == "gnpe"
    assert all(abs(v - curve.log_density[-1]) < 0.5 for v in curve.log_density), "all begin at the regression"


@pytest.mark.science
def test_a_run_recalibrates(run, tmp_path):
    again = sp.recalibrate(run, out=tmp_path / "recalibrated", simulator=made(), progress=silent)
    mean, sd = found(again, np.array([2.0, 2.0]), 1000)
    assert abs(mean) < 0.5
    assert abs(sd - 1) < 0.3


def test_the_initial_net_s_contexts_are_summaries_for_the_nearest_rows(bank, run):
    draws = sp.nearest(bank, keep=0.3, summaries=run).sample(np.array([1.0, 1.0]), 2000, seed=0)
    assert abs(draws.mean() - 2 / 3) < 0.5 / np.sqrt(3)


def test_a_run_goes_through_sbi(run):
    pytest.importorskip("sbi")
    posterior = run.to_sbi(allow_uncertified=True)
    x = torch.tensor([[2.0, 2.0]])
    torch.manual_seed(0)
    draws = posterior.sample((1000,), x=x)
    assert abs(float(draws.mean()) - 4 / 3) < 0.35
    exact = torch.distributions.Normal(4 / 3, 3**-0.5)
    near = torch.tensor([[1.0], [1.5]])
    torch.testing.assert_close(posterior.log_prob(near, x=x), exact.log_prob(near)[:, 0].float(), atol=0.3, rtol=0)


def test_a_slab_makes_the_posterior_give_way_where_x_is_far_from_all_rows(bank, tmp_path):
    """The defence of the other estimators, in units of x: two numbers that contradict each other leave more doubt with it than without."""
    settings = {**QUICK, "max_epochs": 20, "flow": "nsf", "transforms": 1, "hidden": [16, 16]}
    spreads = []
    for defend in ((), ("slab:0.2",)):
        made_run = train(bank, tmp_path / "-".join(("run", *defend)).replace(":", ""), **{**settings, "defend": list(defend)})
        assert made_run.record["training"]["defend"] == (["slab:0.2"] if defend else [])
        assert (sp.Run.open(made_run.path / "initial").record["training"]["defend"] != []) == bool(defend)
        spreads.append(found(made_run, np.array([0.0, 6.0]))[1])
    assert spreads[1] > 1.15 * spreads[0]


def test_another_initial_net_in_a_begun_run_is_refused(bank, tmp_path, monkeypatch):
    """Its weights are part of the run, which names them."""
    step = trainer._Training._step

    def stopping(self, batch):
        if self.run.path == tmp_path / "run" and self.state["step"] == 4:
            os.kill(os.getpid(), signal.SIGTERM)
        return step(self, batch)

    with monkeypatch.context() as patch:
        patch.setattr(trainer._Training, "_step", stopping)
        with pytest.raises(Stopped):
            train(bank, tmp_path / "run")
    weights = load_file(tmp_path / "run" / "initial" / "weights.safetensors")
    save_file({k: 1.1 * v for k, v in weights.items()}, tmp_path / "run" / "initial" / "weights.safetensors")
    with pytest.raises(RunError, match=r"is not the initial net that .* was begun with"):
        train(bank, tmp_path / "run")


@pytest.mark.parametrize(("place", "value", "message"), [
    (("widths",), [-1.0], "kernel widths above 0"), (("told",), [None], "expected true or false"), (("stretch",), [[1.0]], "two ends of stretch"), (("stretch",), 0, "two ends of stretch"),
    (("stretch",), [[5.0], [-5.0]], "the least first"), (("spread",), [0.0], "spreads above 0"), (("role",), "x", "the role 'x'"),
    (("gibbs_steps",), 10**9, "gibbs_steps"), (("action", "field"), "y", "cannot act on this x"), (("initial",), [], "cannot act on this x"),
])
def test_a_damaged_symmetry_in_run_json_is_one_line(run, tmp_path, place, value, message):
    shutil.copytree(run.path, tmp_path / "run")
    record = json.loads((tmp_path / "run" / "run.json").read_text())
    found = record["architecture"]["symmetry"]
    for key in place[:-1]:
        found = found[key]
    found[place[-1]] = value
    (tmp_path / "run" / "run.json").write_text(json.dumps(record))
    with pytest.raises((RunError, SettingError), match=message):
        from_run(sp.Run.open(tmp_path / "run"))


def test_a_kernel_that_follows_the_spread_serves_rows_that_tell_little_of_the_pose(tmp_path):
    """One row in four has hardly any signal: its pose is the prior's, a hundred kernels wide."""
    @sp.simulator(prior=sp.Prior({"mu": sp.Uniform(-50, 50), "loud": sp.Uniform(0, 1)}), x_shape=(2,), batched=True, name="faint",
                  symmetry=Translation(("mu",), exact=False))
    def faint(theta, rng):
        return theta[:, :1] + np.where(theta[:, 1:] < 0.25, 500.0, 0.1) * rng.standard_normal((len(theta), 2))

    said = []

    class Kept(Progress):
        def say(self, line):
            said.append(line)

    bank = simulated(faint, tmp_path, 2000)
    fixed = train(bank, tmp_path / "fixed", simulator=faint, progress=Kept(), flow="nsf", max_epochs=15, kernel_kind="fixed")
    assert 0.1 < fixed.architecture.symmetry["slow"] < 0.5
    assert any("tell so little of the pose" in line and "kernel_kind = adaptive" in line for line in said)
    said.clear()
    shutil.copytree(tmp_path / "fixed" / "initial", tmp_path / "adaptive" / "initial")
    adaptive = train(bank, tmp_path / "adaptive", simulator=faint, progress=Kept(), flow="nsf", max_epochs=15)
    assert adaptive.architecture.symmetry["slow"] == 0
    assert any("the kernel is adaptive" in line for line in said)
    x = np.array([[0.0, 400.0], [3.0, 3.1], [-300.0, 50.0], [20.0, 19.9]], np.float32)
    estimator, fields = adaptive.estimator(), {"x": torch.as_tensor(x)}
    log_f, centre = estimator.sight(fields)
    torch.testing.assert_close(centre[[1, 3], 0], torch.tensor([3.05, 19.95], dtype=centre.dtype), atol=2.0, rtol=0)
    assert (log_f[[0, 2]] > log_f[[1, 3]] + 2).all(), "wider by far where x tells little"
    torch.testing.assert_close(estimator.sight({"x": fields["x"][2:3]}).log_f, log_f[2:3], rtol=1e-4, atol=1e-4)
    posterior = from_run(adaptive)
    posterior.sample(x, 500, seed=0)
    assert posterior.sampler.diagnostics["gibbs_steps"] < 40
    with pytest.raises(ChainError, match="have not converged"):
        from_run(fixed).sample(x, 500, seed=0)
    again = adaptive.architecture.build(0)  # scales are those that the trained initial net's f gives, and not an untrained one's
    again.initial.load_state_dict(estimator.initial.state_dict())
    rows = pairs_at(bank, np.arange(2000))
    again.fit_scales(torch.as_tensor(rows["theta"]), {k: torch.as_tensor(v) for k, v in rows["x"].items()})
    names = [k for k, _ in estimator.main.standardise.named_buffers() if "proxy" in k]
    assert names
    for k in names:
        found, wanted = (e.main.standardise.get_buffer(k)[-2] for e in (estimator, again))  # of log f
        torch.testing.assert_close(found, wanted, atol=0.1, rtol=0.1)
    estimator.train()
    assert not any(part.training for part in estimator.initial.modules()), "frozen"


def test_how_flat_the_prior_is_counts_over_each_rows_own_spread(tmp_path):
    """A row in ten is a hundred times fainter, and there the normal prior is far from flat: the net is told the proxy."""
    @sp.simulator(prior=sp.Prior({"mu": sp.Normal(0, 5)}), x_shape={"a": (1,), "s": (1,)}, batched=True, name="tenth",
                  symmetry=Translation(("mu",), field="a"))
    def tenth(theta, rng):
        sd = np.where(rng.random((len(theta), 1)) < 0.1, 3.0, 0.03)
        return {"a": theta + sd * rng.standard_normal(theta.shape), "s": np.log(sd)}

    bank, settings = simulated(tenth, tmp_path, 3000), {"flow": "gaussian", "max_epochs": 15, "batch_size": 128}
    kinds = {kind: train(bank, tmp_path / kind, simulator=tenth, kernel_kind=kind, **settings).architecture.symmetry for kind in ("auto", "fixed")}
    assert kinds["auto"]["stretch"] is not None
    assert kinds["auto"]["told"] == [True]
    assert kinds["auto"]["slope"] > 0.1
    assert kinds["fixed"]["told"] == [False], "the median row is served by it, and others are refused"
