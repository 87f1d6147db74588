"""Tuning: an ordinary run of the best trial, which a kill cannot change and held-out rows never enter."""

import json
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import numpy as np
import pytest
from conftest import QUICK

import sbiplat as sp
from sbiplat.bank.bank import Bank
from sbiplat.errors import OtherTraining, RunError, SettingError
from sbiplat.estimators.base import ESTIMATORS, find
from sbiplat.estimators.npe import NPE
from sbiplat.progress import silent
from sbiplat.runs import Run
from sbiplat.settings import Interval, space
from sbiplat.training import begin, trainer
from sbiplat.training import tune as rooms
from sbiplat.training.begin import TrainSettings

ROOT = Path(__file__).parents[2]
FAST = {k: v for k, v in QUICK.items() if k != "embedding_hidden"} | {"max_epochs": 9, "batch_size": 500}
SEARCH = {"learning_rate": {"low": 1e-5, "high": 0.02, "log": True}, "embedding_hidden": [[8], [32]]}
TRIALS = 6


def tune(bank, out, trials=TRIALS, search=SEARCH, **settings):
    return sp.tune(bank, "npe", out=out, trials=trials, search=search, progress=silent, **{**FAST, **settings})


def told(out):
    return json.loads((out / "tune.json").read_text())["trials"]


@pytest.fixture(scope="module")
def tuned(line_bank, tmp_path_factory):
    """A search of six trials."""
    return tune(line_bank, tmp_path_factory.mktemp("tuned") / "run")


def test_the_run_is_that_of_the_best_trial_and_of_an_ordinary_training_with_its_settings(line_bank, tuned, tmp_path):
    trials = told(tuned.path)
    complete = [t for t in trials if t["state"] == "complete"]
    best = min(complete, key=lambda t: t["validation_loss"])
    assert len(trials) == TRIALS
    assert tuned.record["tune"]["trial"] == best["number"]
    assert tuned.record["outcome"]["validation_loss"] == best["validation_loss"] == min(t["validation_loss"] for t in trials)
    table = tomllib.loads((tuned.path / "tuned.toml").read_text())["train"]
    assert {k: table[k] for k in best["settings"]} == best["settings"]
    assert sp.train(line_bank, out=tmp_path / "plain", progress=silent, **table).weights_digest == tuned.weights_digest
    assert sp.train(line_bank, out=tuned.path, progress=silent, **table).weights_digest == tuned.weights_digest, "the run itself resumes so"


def test_the_gate_accepts_it_like_any_other(tuned, tmp_path):
    run = Run.open(shutil.copytree(tuned.path, tmp_path / "run"))
    assert sp.gate(run, bank=tuned.bank().path, progress=silent).passed
    assert sp.load(run).sample(np.zeros(2), 10, seed=0).shape == (10, 2)
    assert (run.path / run.record["bank"]["relative_path"]).is_absolute() or tuned.bank(tuned.path / run.record["bank"]["relative_path"])


def test_defaults_are_the_first_trial_and_bad_rates_are_given_up_early(line_bank, tuned):
    trials = told(tuned.path)
    default = begin.plan(line_bank, "npe", 0, None, FAST).training.learning_rate
    assert trials[0]["settings"]["learning_rate"] == default
    assert trials[0]["state"] == "complete"
    assert {"complete", "pruned"} == {t["state"] for t in trials}
    rungs = (3, 6)
    for k, t in enumerate(trials):
        assert len(t["losses"]) == t["epochs"] == (9 if t["state"] == "complete" else t["epochs"])
        if t["state"] == "pruned":
            assert t["epochs"] in rungs
            before = [u["losses"][t["epochs"] - 1] for u in trials[:k + 1] if u["epochs"] >= t["epochs"]]
            assert t["losses"][-1] > sorted(before)[max(0, len(before) // 2 - 1)], "not among the better half"
        assert t["losses"] == sorted(t["losses"], reverse=True), "the best so far"


def test_the_same_seed_tries_the_same_and_another_seed_does_not(line_bank, tuned, tmp_path):
    assert told(tune(line_bank, tmp_path / "same").path) == told(tuned.path)
    other = told(tune(line_bank, tmp_path / "other", trials=2, seed=1).path)
    assert other[1]["settings"] != told(tuned.path)[1]["settings"]


def test_more_trials_extend_a_search_to_the_larger_one(line_bank, tuned, tmp_path):
    assert told(tune(line_bank, tmp_path / "run", trials=2).path) == told(tuned.path)[:2]
    run = tune(line_bank, tmp_path / "run")
    assert told(run.path) == told(tuned.path)
    assert run.weights_digest == tuned.weights_digest
    before = (run.path / "run.json").stat().st_mtime_ns
    tune(line_bank, tmp_path / "run")
    tune(line_bank, tmp_path / "run", trials=3)
    assert (run.path / "run.json").stat().st_mtime_ns == before, "a finished search is returned at once"


def test_a_search_that_is_stopped_again_and_again_ends_where_an_unbroken_one_does(line_bank, tuned, tmp_path, monkeypatch):
    original, out = trainer._Training._step, tmp_path / "run"
    for stop_after in (25, 25, 40):
        steps = []

        def step(self, batch, steps=steps, stop_after=stop_after):
            steps.append(1)
            if len(steps) > stop_after:
                raise trainer.Interrupted
            return original(self, batch)

        with monkeypatch.context() as patch:
            patch.setattr(trainer._Training, "_step", step)
            with pytest.raises(trainer.Stopped, match=r"trials/00\d; the same command resumes"):
                tune(line_bank, out)
    assert tune(line_bank, out).weights_digest == tuned.weights_digest
    assert told(out) == told(tuned.path)


@pytest.mark.parametrize("place", ["amid a trial", "after a trial", "before tune.json", "amid the result"])
def test_a_kill_at_any_place_changes_nothing(line_bank, tuned, tmp_path, monkeypatch, place):
    class Killed(BaseException):
        pass

    calls, out = [], tmp_path / "run"
    home, name, when = {"amid a trial": (trainer._Training, "_step", 130), "after a trial": (rooms._Search, "_tell", 4),
                        "before tune.json": (rooms._Search, "_write", 4), "amid the result": (rooms, "toml_table", 1)}[place]
    whole = getattr(home, name)

    def dies(*args):
        calls.append(1)
        if len(calls) == when:
            raise Killed
        return whole(*args)

    with monkeypatch.context() as patch:
        patch.setattr(home, name, dies)
        with pytest.raises(Killed):
            tune(line_bank, out)
    assert tune(line_bank, out).weights_digest == tuned.weights_digest
    assert told(out) == told(tuned.path)
    assert Run.open(out).record["tune"] == tuned.record["tune"]


def test_held_out_rows_are_never_read(line_bank, tmp_path, monkeypatch):
    """All reading of rows by number goes through `Bank.at`; slabs are read whole, and held-out rows dropped."""
    apart = begin.plan(line_bank, "npe", 0, None, FAST).apart
    asked, original = [], Bank.at
    monkeypatch.setattr(Bank, "at", lambda self, rows: (asked.append(np.asarray(rows)), original(self, rows))[1])
    gathered, loss = [], NPE.loss
    monkeypatch.setattr(NPE, "loss", lambda self, theta, x: (gathered.append(theta.numpy().copy()), loss(self, theta, x))[1])
    tune(line_bank, tmp_path / "run", trials=3)
    assert asked
    assert not set(np.concatenate(asked)) & set(apart.held_out)
    z = line_bank.header.prior.unconstrain(line_bank.theta[apart.held_out]).astype(np.float32)
    seen = {row.tobytes() for part in gathered for row in part}
    assert len(seen) > 4000
    assert not {row.tobytes() for row in z} & seen


def test_a_trial_that_diverges_is_one_bad_trial(line_bank, tmp_path, monkeypatch):
    original = NPE.loss
    wide = [32]

    def loss(self, theta, x):
        broken = self.training and self.embedding.net[0].out_features in wide
        return original(self, theta, x) * (float("inf") if broken else 1.0)

    monkeypatch.setattr(NPE, "loss", loss)
    short = {"search": {"embedding_hidden": [[8], [32]]}, "batch_size": 50, "max_epochs": 2}  # 80 bad steps come before the first rung
    run = tune(line_bank, tmp_path / "run", trials=3, **short)
    trials = told(run.path)
    bad = [t for t in trials if t["state"] == "diverged"]
    assert bad
    assert all(t["settings"] == {"embedding_hidden": [32]} and "diverged 4 times" in t["message"] for t in bad)
    assert run.record["tune"]["settings"] == {"embedding_hidden": [8]}
    wide.append(8)
    with pytest.raises(RunError, match=r"no trial in .* came to its end"):
        tune(line_bank, tmp_path / "none", trials=2, **short)


TRAINED = [name for name in ESTIMATORS if not find(name).made_by]


@pytest.mark.parametrize("estimator", TRAINED)
def test_every_estimator_has_a_space_around_its_defaults_over_which_losses_compare(line_bank, tmp_path, estimator):
    kind = find(estimator)
    made = space(kind.search, TrainSettings, kind.settings_class)
    assert "learning_rate" in made
    assert len(made) >= 3
    assert not set(made) & {*kind.of_the_loss, *rooms.NOT_SEARCHED}
    base = begin.plan(line_bank, estimator, 0, None, {})
    search = rooms._Search(base, made, {}, None, tmp_path / "none", silent)
    assert set(search._defaults()) == set(made), "the defaults are the first trial"


def test_a_search_of_npse_ends_in_a_run(line_bank, tmp_path):
    run = sp.tune(line_bank, "npse", out=tmp_path / "run", trials=2, progress=silent, max_epochs=2, batch_size=1000, blocks=1)
    assert set(run.record["tune"]["settings"]) == {"hidden", "learning_rate"}, "what is given is not searched"
    assert run.finished


@pytest.mark.parametrize(("estimator", "given", "message"), [
    ("npe", {"trials": 0}, "trials = 0: expected a whole number of at least 1"),
    ("npe", {"search": {"flwo": ["nsf"]}}, "no setting is called 'flwo'; did you mean flow"),
    ("npe", {"search": {"flow": ["nfs"]}}, "flow = 'nfs': expected text, one of nsf"),
    ("npe", {"search": {"flow": "nsf"}}, "search of flow = 'nsf': expected a list of values"),
    ("npe", {"search": {"learning_rate": {"low": 0.1}}}, "search of learning_rate: expected {low = "),
    ("npe", {"search": {"learning_rate": {"low": 0.1, "high": 0.01}}}, "low = 0.1 must be below high = 0.01"),
    ("npe", {"search": {"weight_decay": {"low": 0, "high": 0.1, "log": True}}}, "low = 0.0 must be above 0 where log = true"),
    ("npe", {"search": {"held_out": [0.1, 0.2]}}, "search of held_out: validation losses cannot be compared"),
    ("npe", {"search": {"max_epochs": [5, 10]}}, "search of max_epochs: validation losses cannot be compared"),
    ("npse", {"search": {"weighting": ["unit", "likelihood"]}}, "search of weighting: the meaning of the loss of npse depends on it"),
    ("fmpe", {"search": {"time_power": {"low": 1.0, "high": 2.0}}}, "search of time_power: the meaning of the loss of fmpe depends on it"),
    ("npe", {"search": {"flow": ["nsf", "maf"]}, "flow": "nsf"}, "flow is given and searched"),
    ("npse", {"hidden": 64, "blocks": 2, "learning_rate": 1e-3}, "nothing is left to search"),
])
def test_impossible_searches_are_one_clear_line(line_bank, tmp_path, estimator, given, message):
    with pytest.raises(SettingError) as error:
        sp.tune(line_bank, estimator, out=tmp_path / "run", progress=silent, **given)
    assert message in str(error.value)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "run").exists()


def test_another_search_needs_another_place(line_bank, tuned, line_run):
    with pytest.raises(OtherTraining, match="begun with seed = 0, not 3"):
        tune(line_bank, tuned.path, seed=3)
    with pytest.raises(OtherTraining, match="the search of embedding_hidden"):
        tune(line_bank, tuned.path, search={**SEARCH, "embedding_hidden": [[16], [32]]})
    with pytest.raises(OtherTraining, match="batch_size = 500, not 400"):
        tune(line_bank, tuned.path, batch_size=400)
    with pytest.raises(RunError, match="holds a run that was not tuned"):
        tune(line_bank, line_run.path)


@pytest.mark.parametrize("change", [lambda t: t[1].pop("losses"), lambda t: t[0]["settings"].pop("learning_rate"), lambda t: t[2].update(state="odd"),
                                    lambda t: t.insert(0, 3)])
def test_a_damaged_record_is_one_line(line_bank, tuned, tmp_path, change):
    shutil.copytree(tuned.path, tmp_path / "run")
    record = json.loads((tmp_path / "run" / "tune.json").read_text())
    change(record["trials"])
    (tmp_path / "run" / "tune.json").write_text(json.dumps(record))
    with pytest.raises(RunError, match=r"tune\.json is damaged: its trials are no list of trials"):
        tune(line_bank, tmp_path / "run")


def test_without_optuna_it_says_what_to_install(line_bank, tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "optuna", None)
    with pytest.raises(SettingError, match="tuning needs optuna, which is in the extra `tune`"):
        tune(line_bank, tmp_path / "run")


def test_an_interval_is_checked_at_both_ends_by_the_settings_own_range():
    assert space({"transforms": {"low": 2, "high": 6}}, NPE.settings_class) == {"transforms": Interval(2, 6)}
    with pytest.raises(SettingError, match="transforms = 65: expected a whole number between 1 and 64"):
        space({"transforms": {"low": 2, "high": 65}}, NPE.settings_class)


def search_table():
    """What each estimator's search tries, as the docs show it."""
    def words(v):
        return f"{v.low:g} to {v.high:g}{', even in its logarithm' if v.log else ''}" if isinstance(v, Interval) else ", ".join(
            w if isinstance(w, str) else json.dumps(w) for w in v)

    rows = ["| estimator | tried, where you say nothing |", "|---|---|"]
    for name in TRAINED:
        rows.append(f"| `{name}` | {'; '.join(f'`{k}`: {words(v)}' for k, v in find(name).search.items())} |")
    return "\n".join(rows)


def test_a_choice_that_no_trial_could_make_is_told_before_the_first(line_bank, tmp_path):
    with pytest.raises(SettingError, match="embedding = cnn2d takes an array"):
        sp.tune(line_bank, "npe", out=tmp_path / "run", trials=2, max_epochs=1, search={"embedding": ["mlp", "cnn2d"]}, progress=silent)
    assert not (tmp_path / "run" / "tune.json").exists()


@pytest.mark.parametrize("edit", [{"losses": ["a"]}, {"losses": None}, {"validation_loss": None}, {"number": 7}, {"settings": {"context": "x"}}])
def test_a_damaged_list_of_trials_is_one_line(edit, line_bank, tmp_path):
    def search():
        return sp.tune(line_bank, "npe", out=tmp_path / "run", trials=1, search={"context": [8, 16]}, progress=silent, flow="gaussian", max_epochs=1)

    search()
    told = json.loads((tmp_path / "run" / "tune.json").read_text())
    told["trials"][0].update(edit)
    (tmp_path / "run" / "tune.json").write_text(json.dumps(told))
    with pytest.raises(RunError, match=r"tune.json is damaged"):
        search()


def test_the_docs_list_the_search_spaces():
    shown = (ROOT / "docs" / "how-to.md").read_text().partition("<!-- search -->\n\n")[2]
    assert shown.startswith(search_table() + "\n"), f"put this under <!-- search --> in docs/how-to.md:\n{search_table()}"


def test_the_command_tunes_prints_what_it_found_and_resumes_at_once(line_bank, tmp_path):
    (tmp_path / "s.toml").write_text("[train]\nflow = 'gaussian'\nmax_epochs = 3\nbatch_size = 500\n[search]\ncontext = [8, 32]\n"
                                     "learning_rate = {low = 1e-3, high = 1e-2, log = true}\n")
    words = [Path(sys.executable).parent / "sbiplat", "train", line_bank.path, "--out", tmp_path / "run", "--config", tmp_path / "s.toml", "--tune", "2"]
    first, again = (subprocess.run([*words, *more], capture_output=True, text=True, timeout=120) for more in ([], ["--json"]))
    assert first.returncode == again.returncode == 0, first.stderr + again.stderr
    assert re.search(r"trial [12] of 2 \([01] given up early\): context = (8|32), learning_rate = 0\.\d+; in .*tuned.toml", first.stdout)
    assert "trial 1 of 2: context = 32, learning_rate" in first.stderr
    assert "trial" not in again.stderr
    found = json.loads(again.stdout)
    assert found["tune"]["settings"] == told(tmp_path / "run")[found["tune"]["trial"]]["settings"]
    refused = subprocess.run([*words[:-2], "--tune", "0"], capture_output=True, text=True, timeout=120)
    assert (refused.returncode, refused.stderr) == (2, "error: trials = 0: expected a whole number of at least 1\n")
