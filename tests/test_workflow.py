"""Workflows: one file in, a report out; what is done stays done, what changes is done again, and nothing is lost."""

import hashlib
import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import sbiplat.workflow
from sbiplat import cli
from sbiplat.bank.bank import Bank
from sbiplat.errors import UserError
from sbiplat.gate.certificate import Certificate
from sbiplat.runs import Run
from sbiplat.workflow import run_workflow

SIMULATOR = '''
import numpy as np
import sbiplat as sp

@sp.simulator(prior=sp.Prior({"height": sp.Uniform(0, 1, unit="m"), "drift": sp.Normal(0, 1)}), x_shape=(3,), batched=True)
def walk(theta, rng):
    """A drift seen three times."""
    return theta[:, :1] + theta[:, 1:] * np.arange(3) + 0.3 * rng.standard_normal((len(theta), 3))
'''
WORKFLOW = '''
out = "done"

[simulate]
simulator = "walk.py:walk"
n = 3000
seed = 1
block_size = 500
workers = 1

[train]
flow = "gaussian"
max_epochs = 30
batch_size = 128
held_out = 0.2
embedding_hidden = [32]
context = 8

[gate]
draws = 500
deviation = 0.1
under_coverage = 0.2
over_coverage = 0.2
tails = 0.1
local = 0.5

[sample]
observation = "x.csv"
n = 200
out = "draws.csv"
'''
STAGES = ["simulate", "train", "gate", "sample", "report"]


class Place:
    """A user's folder with a simulator, an observation and a workflow."""

    def __init__(self, folder):
        self.folder, self.file, self.out = folder, folder / "flow.toml", folder / "done"

    def write(self, text=WORKFLOW, **changes):
        """The workflow file with some of its values changed, as name=text of the new value."""
        for name, value in changes.items():
            lines = [f"{name} = {value}" if line.startswith(f"{name} = ") else line for line in text.splitlines()]
            assert lines != text.splitlines(), name
            text = "\n".join(lines)
        self.file.write_text(text)
        return self

    def run(self):
        """(result, its stages by outcome, what it said)."""
        said = []
        result = run_workflow(self.file, said.append)
        return result, {stage: outcome for stage, outcome, _ in result.stages}, "\n".join(said)

    def contents(self):
        """Every file of the output: path -> (time of the last change, SHA-256)."""
        return {str(p.relative_to(self.out)): (p.stat().st_mtime_ns, hashlib.sha256(p.read_bytes()).hexdigest())
                for p in self.out.rglob("*") if p.is_file()}


def outcomes(again):
    """All stages skipped but these."""
    return {stage: "done" if stage in again else "skipped" for stage in STAGES}


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    place = Place(tmp_path_factory.mktemp("workflow") / "user")
    place.folder.mkdir()
    (place.folder / "walk.py").write_text(SIMULATOR)
    (place.folder / "x.csv").write_text("0.4,0.9,1.5\n")
    (place.folder / "other.csv").write_text("0.5,0.4,0.1\n")
    place.write()
    place.first = place.run()
    return place


@pytest.fixture
def light_report(monkeypatch):
    """A report of one line: what the page shows has its own tests, and drawing it takes most of a workflow's time here."""
    def write(run, observation, simulator, summaries):
        path = run.path / "report.html"
        path.write_text(f"<html>{Certificate.read(run).sha256} {observation}")
        return path

    monkeypatch.setattr(sbiplat.workflow, "write_report", write)


@pytest.fixture
def place(finished, tmp_path, light_report):
    """A copy of the finished workflow, in a folder of its own, so that its simulator's file is loaded anew."""
    shutil.copytree(finished.folder, tmp_path / "user")
    return Place(tmp_path / "user")


# ------------------------------------------------------------------------------------------------------ what is run


def test_all_stages_run_and_leave_what_they_promise(finished):
    result, stages, said = finished.first
    assert stages == {stage: "done" for stage in STAGES}
    assert result.passed
    assert list(stages) == STAGES
    assert [line.partition(":")[0] for line in said.splitlines()] == STAGES
    run = Run.open(finished.out / "run")
    Certificate.read(run).require(run)
    assert Bank.open(finished.out / "bank").digest == result.digests["bank"] == run.bank_digest
    assert (finished.out / "draws.csv").read_text().splitlines()[0] == "height,drift"
    assert np.loadtxt(finished.out / "draws.csv", delimiter=",", skiprows=1).shape == (200, 2)
    assert "<html" in (finished.out / "report.html").read_text()[:300]


def test_the_second_time_every_stage_is_skipped_and_no_file_is_touched(finished):
    before = finished.contents()
    result, stages, _ = finished.run()
    assert stages == outcomes([])
    assert result.passed
    assert result.digests == finished.first[0].digests
    assert finished.contents() == before


def test_settings_that_change_nothing_skip_every_stage(place):
    changed = WORKFLOW.replace("workers = 1", "workers = 2").replace("batch_size", "threads = 2\nbatch_size")
    assert place.write(changed).run()[1] == outcomes([])


def test_a_changed_training_keeps_the_old_run_aside_and_says_why(place):
    old = (place.out / "run" / "weights.safetensors").read_bytes()
    draws = (place.out / "draws.csv").read_bytes()
    result, stages, said = place.write(max_epochs=25).run()
    assert stages == outcomes(["train", "gate", "sample", "report"])
    assert "run: again, since" in said
    assert "max_epochs = 30, not 25; the old one is kept as run.old-1" in said
    assert (place.out / "run.old-1" / "weights.safetensors").read_bytes() == old
    assert (place.out / "draws.old-1.csv").read_bytes() == draws
    assert (place.out / "draws.csv").read_bytes() != draws
    assert result.digests["bank"] == Bank.open(place.out / "bank").digest
    place.write().run()
    assert (place.out / "run.old-2").is_dir(), "a name that is taken is never taken again"


def test_a_larger_n_extends_the_bank(place):
    segments = {k: v for k, v in place.contents().items() if k.startswith("bank/segments")}
    result, stages, said = place.write(WORKFLOW.replace("n = 3000", "n = 4000")).run()
    assert stages == outcomes(STAGES)
    assert "the old one is kept as run.old-1" in said
    assert not list(place.out.glob("bank.old-*"))
    now = place.contents()
    assert all(now[k] == v for k, v in segments.items()), "what was simulated stays as it was"
    assert Bank.open(place.out / "bank").first(3000).digest == Run.open(place.out / "run.old-1").bank_digest
    assert Run.open(place.out / "run").record["bank"]["rows"] == 4000
    assert result.digests["bank"] == Bank.open(place.out / "bank").digest


def test_a_smaller_n_simulates_nothing_and_trains_on_the_first_rows(place):
    result, stages, _ = place.write(WORKFLOW.replace("n = 3000", "n = 2500")).run()
    assert stages == outcomes(["train", "gate", "sample", "report"])
    assert result.digests["bank"] == Bank.open(place.out / "bank").first(2500).digest
    assert place.run()[1] == outcomes([])


def test_a_bank_that_was_wanted_larger_and_not_finished_trains_the_same_run(place):
    """Else the next run of the workflow would find another bank, and train again."""
    header = json.loads((place.out / "bank" / "bank.json").read_text())
    (place.out / "bank" / "bank.json").write_text(json.dumps({**header, "rows": 3500}))
    assert Bank.open(place.out / "bank").gaps
    assert place.run()[1] == outcomes(["simulate"])
    assert place.run()[1] == outcomes([])


def test_a_changed_seed_keeps_the_old_bank_aside(place):
    old = Bank.open(place.out / "bank").digest
    text = WORKFLOW.replace("seed = 1", "seed = 2")
    result, stages, said = place.write(text).run()
    assert stages == outcomes(STAGES)
    assert "made with another seed: 1, not 2; the old one is kept as bank.old-1" in said
    assert Bank.open(place.out / "bank.old-1").digest == old != result.digests["bank"]


def test_a_changed_simulator_keeps_the_old_bank_aside(place):
    (place.folder / "walk.py").write_text(SIMULATOR.replace("0.3 *", "0.4 *"))
    _, stages, said = place.run()
    assert stages["simulate"] == stages["train"] == "done"
    assert "made with another source digest; the old one is kept as bank.old-1" in said


def test_a_changed_threshold_gates_again_and_neither_simulates_nor_trains(place):
    before = place.contents()
    result, stages, said = place.write(deviation=0.2).run()
    # The draws and the report name the certificate that they stand on, so they are made again with it.
    assert stages == outcomes(["gate", "sample", "report"])
    assert "gate: again, since [gate] now says deviation = 0.2, not 0.1" in said
    after = place.contents()
    same = [k for k in before if k.startswith("bank/") or k in ("run/run.json", "run/weights.safetensors")]
    assert len(same) > 4
    assert all(after[k] == before[k] for k in same)
    assert after["draws.csv"][1] == before["draws.csv"][1], "the same posterior and seed give the same draws"
    assert Certificate.read(Run.open(place.out / "run")).content["thresholds"]["deviation"] == 0.2
    assert result.passed


def test_a_changed_gate_seed_gates_again(place):
    _, stages, said = place.write(WORKFLOW.replace("[gate]", "[gate]\nseed = 3")).run()
    assert stages["gate"] == "done"
    assert "seed = 3, not 0" in said


def test_a_changed_observation_samples_again_and_no_more(place):
    before = place.contents()
    _, stages, said = place.write(observation='"other.csv"').run()
    assert stages == outcomes(["sample", "report"])
    assert "sample: again, since the observation has changed; the old one is kept as draws.old-1.csv" in said
    after = place.contents()
    assert after["draws.old-1.csv"] == before["draws.csv"]
    assert after["draws.csv"][1] != before["draws.csv"][1]
    assert after["run/certificate.json"] == before["run/certificate.json"]


def test_the_same_observation_file_with_other_values_samples_again(place):
    (place.folder / "x.csv").write_text("0.4,0.9,1.6\n")
    assert place.run()[1] == outcomes(["sample", "report"])


def test_named_summaries_go_to_the_report_alone(place):
    (place.folder / "mine.py").write_text("SUMMARIES = {'last': lambda x: x[-1]}\n")
    place.write(table("sample", 'summaries = "mine.py:SUMMARIES"'))
    assert place.run()[1] == outcomes(["report"])
    assert place.run()[1] == outcomes([])


@pytest.mark.parametrize(("name", "again"), [("draws.csv", ["sample"]), ("report.html", ["report"]), ("workflow.json", ["sample", "report"])])
def test_what_is_deleted_is_made_again(place, name, again):
    (place.out / name).unlink()
    assert place.run()[1] == outcomes(again)
    assert (place.out / name).exists()


def test_an_altered_certificate_does_not_count(place):
    path = place.out / "run" / "certificate.json"
    content = json.loads(path.read_text())
    path.write_text(json.dumps({**content, "figures": {**content["figures"], "pairs": 10**6}}))
    _, stages, said = place.run()
    assert stages["gate"] == "done"
    assert "gate: again, since the certificate was altered" in said


# ---------------------------------------------------------------------------------------------------------- refused


def test_a_refused_posterior_gives_a_report_but_no_draws(place):
    draws = (place.out / "draws.csv").read_bytes()
    place.write(WORKFLOW.replace("[gate]", "[gate]\ninformation = 50.0"))
    result, stages, said = place.run()
    assert not result.passed
    assert stages == outcomes(["gate", "report"])
    assert "gate: done; REFUSED by information" in said
    assert "REFUSED by the gate: information: held-out log-density beats the prior by" in result.text()
    assert "train longer, or with a larger net or bank" in result.text(), "the last line has the mend"
    assert not (place.out / "draws.csv").exists(), "draws that were once certified do not stand beside a refusal"
    assert (place.out / "draws.old-1.csv").read_bytes() == draws
    before = place.contents()
    assert place.run()[1] == outcomes([])
    assert place.contents() == before
    place.write()
    assert place.run()[0].passed, "the old thresholds certify it again"


def test_a_draft_samples_nothing_and_a_certificate_stands_for_one(place):
    place.write(WORKFLOW.replace("[gate]", '[gate]\nlevel = "draft"'))
    result, stages, said = place.run()
    assert stages == outcomes([]), "a certificate that stands is more than a draft"
    assert "the certificate stands: certified (standard, by thresholds that were changed: " in said
    (place.out / "run" / "certificate.json").unlink()
    result, stages, said = place.run()
    assert "gate: done; passed as a draft, which certifies nothing" in said
    assert "the posterior has passed a draft only" in said
    assert result.passed
    assert "passed as a draft" in result.text()
    assert not (place.out / "draws.csv").exists()
    result, stages, said = place.write().run()
    assert "gate: again, since [gate] now says level = 'standard', not 'draft'" in said
    assert stages["sample"] == "done"


def command(monkeypatch, capsys, folder, *words):
    """(exit code, standard output, standard error) of the command, in this process."""
    monkeypatch.chdir(folder)
    monkeypatch.setattr(sys, "argv", ["sbiplat", *words])
    capsys.readouterr()
    with pytest.raises(SystemExit) as end:
        cli.main()
    return end.value.code, *capsys.readouterr()


def test_the_command_exits_0_where_the_posterior_is_certified(finished, monkeypatch, capsys):
    code, out, _ = command(monkeypatch, capsys, finished.folder, "run", "flow.toml", "--json")
    assert code == 0
    told = json.loads(out)
    assert told["passed"] is True
    assert [(s["stage"], s["outcome"]) for s in told["stages"]] == [(s, "skipped") for s in STAGES]


def test_the_command_exits_3_where_it_is_refused_and_the_report_says_so(finished, tmp_path):
    """With the real report, in a process of its own."""
    shutil.copytree(finished.folder, tmp_path / "user")
    place = Place(tmp_path / "user").write(WORKFLOW.replace("[gate]", "[gate]\ninformation = 50.0"))
    done = subprocess.run([Path(sys.executable).parent / "sbiplat", "run", "flow.toml", "--json"], cwd=place.folder, capture_output=True,
                          text=True, timeout=120)
    assert done.returncode == 3, done.stderr
    assert json.loads(done.stdout)["passed"] is False
    assert "Traceback" not in done.stderr
    assert "refused" in (place.out / "report.html").read_text().lower()
    assert not (place.out / "draws.csv").exists()


# --------------------------------------------------------------------------------------------------------- mistakes


def table(name, line):
    return WORKFLOW.replace(f"[{name}]", f"[{name}]\n{line}")


MISTAKES = [
    (WORKFLOW.replace("[train]", "[trian]"), "no table is called 'trian'; did you mean train"),
    (WORKFLOW + "\n[report]\nx = 1\n", "no table is called 'report'"),
    ("n = 5\n" + WORKFLOW, "no table is called 'n'"),
    (WORKFLOW.replace('out = "done"', ""), 'it needs out = "folder"'),
    (WORKFLOW.replace('out = "done"', "out = 3"), 'it needs out = "folder"'),
    (WORKFLOW.replace('out = "done"', 'out = ""'), 'it needs out = "folder"'),
    ('out = "done"\n[train]\n', "it needs a table [simulate]"),
    ('out = "done"\nsimulate = "walk.py:walk"\n[train]\n', "it needs a table [simulate]"),
    ('out = "done"\n[simulate]\nsimulator = "two_moons"\nn = 10\n', "it needs a table [train]"),
    ('out = "done"\ngate = 1\n[simulate]\n[train]\n', "it needs a table [gate]"),
    ('out = "done"\nsample = "x.csv"\n[simulate]\n[train]\n', "it needs a table [sample]"),
    (WORKFLOW.replace("n = 3000\n", ""), "[simulate] it needs simulator and n"),
    (WORKFLOW.replace('simulator = "walk.py:walk"\n', ""), "[simulate] it needs simulator and n"),
    (WORKFLOW.replace("n = 3000", 'n = "many"'), "[simulate] n = 'many': expected a whole number"),
    (WORKFLOW.replace("n = 3000", "n = inf"), "[simulate] n = inf: expected a whole number"),
    (WORKFLOW.replace("n = 3000", "n = 0"), "[simulate] n = 0: expected a whole number of at least 1"),
    (WORKFLOW.replace("seed = 1", "seed = -1"), "[simulate] seed = -1"),
    (table("simulate", "rows = 3"), "[simulate] no setting is called 'rows'"),
    (WORKFLOW.replace("walk.py:walk", "gone.py:walk"), "no simulator file at"),
    (WORKFLOW.replace("walk.py:walk", "walk.py:run"), "simulators there: walk"),
    (WORKFLOW.replace("walk.py:walk", "walk.py"), "say which object"),
    (WORKFLOW.replace("walk.py:walk", "two_mons"), "did you mean two_moons"),
    (table("train", 'estimator = "npq"'), "[train] no estimator is called 'npq'"),
    (table("train", "estimator = 3"), "[train] estimator = 3: expected text"),
    (table("train", 'seed = "x"'), "[train] seed = 'x': expected a whole number"),
    (table("train", "layers = 3"), "[train] no setting is called 'layers'"),
    (WORKFLOW.replace('flow = "gaussian"', 'flow = "nfs"'), "[train] flow = 'nfs': expected text, one of nsf"),
    (WORKFLOW.replace("[32]", '"wide"'), "[train] embedding_hidden = 'wide': expected a list of whole numbers"),
    (WORKFLOW.replace("max_epochs = 30", "max_epochs = 0.5"), "[train] max_epochs = 0.5"),
    (table("train", 'defend = "fisher"'), "[train] defend = 'fisher': expected fisher:WEIGHT"),
    (table("train", 'embedding = "gone.py:Net"'), "[train] embedding"),
    (table("train", 'embedding = "no_such"'), "[train] no embedding is called 'no_such'"),
    (table("train", 'embedding = "cnn2d"'), "[train] embedding = cnn2d takes an array of shape (H, W) or (C, H, W)"),
    (table("train", 'embedding = {signal = "cnn1d"}'), "[train] embedding = signal=cnn1d is of a dict x, and x is one array"),
    (table("train", 'embedding = {signal = "gone.py:Net"}'), "gone.py:Net: no simulator file at"),
    (table("train", "embedding = {signal = 3}"), "[train] no embedding is called '3'"),
    (table("gate", 'seed = "x"'), "[gate] seed = 'x': expected a whole number"),
    (table("gate", "seed = 1.5"), "[gate] seed = 1.5: expected a whole number"),
    (table("gate", "pair = 3"), "[gate] no setting is called 'pair'; did you mean pairs"),
    (WORKFLOW.replace("deviation = 0.1", "deviation = 2.0"), "[gate] deviation = 2.0: expected a number between 0 and 1"),
    (WORKFLOW.replace('observation = "x.csv"\n', ""), "[sample] it needs an observation"),
    (WORKFLOW.replace('"x.csv"', '"gone.csv"'), "[sample] no observation file at"),
    (WORKFLOW.replace('"x.csv"', '"walk.py"'), "an observation is read from .npy"),
    (WORKFLOW.replace("draws.csv", "draws.txt"), "draws are written as .nc (ArviZ), .h5 or .csv"),
    (WORKFLOW.replace("draws.csv", "../draws.csv"), "[sample] out = '../draws.csv': expected the name of a file"),
    (table("sample", 'summaries = "gone.py:peak"'), "no simulator file at"),
    (table("sample", 'summaries = "peak"'), "[sample] summaries = 'peak': expected file.py:object"),
    (WORKFLOW.replace("n = 200", "n = true"), "[sample] n = True: expected a whole number"),
    ("out = ", "is not TOML"),
    ("\0", "is not TOML"),
]


@pytest.mark.parametrize(("text", "says"), MISTAKES, ids=[f"{k}-{says[:40]}" for k, (_, says) in enumerate(MISTAKES)])
def test_a_mistake_is_one_line_that_names_the_file_and_nothing_is_begun(finished, tmp_path, text, says):
    place = Place(tmp_path)
    for name in ("walk.py", "x.csv"):
        shutil.copy(finished.folder / name, tmp_path)
    place.file.write_text(text)
    with pytest.raises(UserError) as told:
        place.run()
    line = str(told.value)
    assert says in line
    assert line.startswith(str(place.file)), line
    assert "\n" not in line
    assert told.value.exit_code == 2
    assert not place.out.exists()


def test_an_observation_of_the_wrong_shape_is_told_before_anything_is_simulated(finished, tmp_path):
    place = Place(tmp_path)
    shutil.copy(finished.folder / "walk.py", tmp_path)
    (tmp_path / "x.csv").write_text("1,2\n")
    with pytest.raises(UserError, match=r"flow.toml: \[sample\] .*x.csv: x has shape \(1, 2\), declared is \(1, 3\)"):
        place.write().run()
    assert not place.out.exists()


def test_an_embedding_that_cannot_take_x_is_told_before_anything_is_simulated(finished, tmp_path):
    place = Place(tmp_path)
    for name in ("walk.py", "x.csv"):
        shutil.copy(finished.folder / name, tmp_path)
    (tmp_path / "net.py").write_text("from torch import nn\nclass Net(nn.Linear):\n    def __init__(self):\n        super().__init__(7, 2)\n")
    with pytest.raises(UserError, match=r"flow.toml: \[train\] embedding .* fails on x of shape"):
        place.write(table("train", 'embedding = "net.py:Net"')).run()
    assert not place.out.exists()


def test_the_command_tells_a_mistake_in_one_line(tmp_path, monkeypatch, capsys):
    (tmp_path / "flow.toml").write_text(table("gate", 'seed = "x"'))
    code, _, err = command(monkeypatch, capsys, tmp_path, "run", "flow.toml")
    assert code == 2
    assert err.splitlines() == ["error: flow.toml: [gate] seed = 'x': expected a whole number of at least 0"]


def test_a_workflow_under_mpi_is_refused_with_the_mend(finished, monkeypatch):
    """Else every rank would train into the same folder."""
    monkeypatch.setattr(sbiplat.workflow, "mpi_world", object)
    with pytest.raises(UserError, match=r"runs as one process; fill its bank under mpiexec with `sbiplat simulate walk[.]py:walk"):
        finished.run()


# ---------------------------------------------------------------------------------------------------------- resuming


class Killed(BaseException):
    pass


@pytest.mark.parametrize("last", STAGES[:-1])
def test_a_workflow_killed_between_stages_goes_on_where_it_was(finished, tmp_path, light_report, last):
    place = Place(tmp_path)
    for name in ("walk.py", "x.csv", "flow.toml"):
        shutil.copy(finished.folder / name, tmp_path)
    if last != "simulate":  # what comes before is not what is tested here
        shutil.copytree(finished.out / "bank", place.out / "bank")

    def kill(line):
        if line.startswith(f"{last}: "):
            raise Killed

    with pytest.raises(Killed):
        run_workflow(place.file, kill)
    kept = place.contents()
    result, stages, _ = place.run()
    done = STAGES[STAGES.index(last) + 1:]
    assert stages == outcomes(done)
    for name in ("bank", "weights"):
        assert result.digests[name] == finished.first[0].digests[name], "the same as of an unbroken one"
    now = place.contents()
    assert all(now[k] == v for k, v in kept.items() if k != "workflow.json"), "what was finished is not written again"
    assert place.run()[1] == outcomes([])


def test_a_workflow_killed_within_a_stage_leaves_nothing_half_made(place):
    """As kill -9 leaves it: a temporary file, a run without weights, an incomplete bank."""
    finished = {k: v[1] for k, v in place.contents().items()}
    run = place.out / "run"
    for name in ("weights.safetensors", "certificate.json", "diagnostics.npz"):
        (run / name).unlink()
    record = json.loads((run / "run.json").read_text())
    (run / "run.json").write_text(json.dumps({k: v for k, v in {**record, "finished": False}.items() if k != "outcome"}))
    for segment in (place.out / "bank" / "segments").glob("*.h5"):
        segment.unlink()
    (place.out / "bank" / "segments" / ".tmp-torn.h5-1").write_bytes(b"torn")
    result, stages, _ = place.run()
    assert stages == outcomes(STAGES)
    assert result.passed
    now = {k: v[1] for k, v in place.contents().items()}
    assert not [k for k in now if ".tmp" in k]
    for name in ("run/weights.safetensors", "draws.csv"):
        assert now[name] == finished[name], name
