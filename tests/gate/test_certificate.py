"""The certificate: bound to the exact weights, configuration and bank; one changed byte and the door stays shut."""

import json
import re
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import QUICK

import sbiplat as sp
from sbiplat.errors import BankError, RunError, Uncertified
from sbiplat.gate.certificate import Certificate, hashed
from sbiplat.progress import silent
from sbiplat.runs import Run


@pytest.fixture
def run_copy(line_run, tmp_path):
    shutil.copytree(line_run.path, tmp_path / "run")
    return tmp_path / "run"


def test_a_certified_run_opens(run_copy):
    posterior = sp.load(run_copy)
    assert posterior.provenance["certified"] == "yes"
    assert sp.load(str(run_copy)).sample(np.zeros(2), 10).shape == (10, 2)


def test_one_changed_byte_of_the_weights_shuts_it(run_copy):
    path = run_copy / "weights.safetensors"
    data = bytearray(path.read_bytes())
    data[-3] ^= 1
    path.write_bytes(data)
    with pytest.raises(Uncertified, match=r"is for other weights: .* run `sbiplat gate"):
        sp.load(run_copy)


@pytest.mark.parametrize("edit", [
    lambda c: c["figures"]["information"].update(gain=99.0), lambda c: c.update(created="2020-01-01"), lambda c: c["seeds"].update(gate=1),
    lambda c: c["criteria"][0].update(figure=1), lambda c: c.update(sha256="0" * 64), lambda c: c["digests"].update(bank="0" * 64),
])
def test_an_altered_certificate_shuts_it(run_copy, edit):
    content = json.loads((run_copy / "certificate.json").read_text())
    edit(content)
    (run_copy / "certificate.json").write_text(json.dumps(content))
    with pytest.raises(Uncertified, match="altered"):
        sp.load(run_copy)


@pytest.mark.parametrize("text", ["", "[]", "{}", "not json", '{"format_version": 1}', '{"format_version": 99, "passed": true}', "[" * 5000, '{"passed": NaN}'])
def test_a_damaged_certificate_is_one_clear_line(run_copy, text):
    (run_copy / "certificate.json").write_text(text)
    with pytest.raises(Uncertified) as error:
        sp.load(run_copy)
    assert "\n" not in str(error.value)


def test_an_ungated_run_stays_shut(run_copy):
    (run_copy / "certificate.json").unlink()
    with pytest.raises(Uncertified, match="has not been through the gate; run `sbiplat gate"):
        sp.load(run_copy)
    assert sp.load(run_copy, allow_uncertified=True).provenance["certified"] == "no"


def test_another_runs_certificate_does_not_fit(line_bank, run_copy, tmp_path):
    other = sp.train(line_bank, "npe", out=tmp_path / "other", seed=1, progress=silent, **QUICK)
    shutil.copy(run_copy / "certificate.json", other.path)
    with pytest.raises(Uncertified, match="other weights"):
        sp.load(other)


def test_a_changed_prior_shuts_it_and_is_named(run_copy):
    record = json.loads((run_copy / "run.json").read_text())
    record["prior"]["independent"][0]["scale"] = 3.0
    (run_copy / "run.json").write_text(json.dumps(record))
    with pytest.raises(Uncertified, match="is for another prior"):
        sp.load(run_copy)


def test_a_refused_run_says_which_criterion_by_how_much_and_the_mend(line_bank, tmp_path):
    shapeless = {"embedding": "deepset", "embedding_width": 4, "context": 1}  # no order of x, so no regression on it
    run = sp.train(line_bank, "npe", out=tmp_path / "run", progress=silent,
                   **{**QUICK, **shapeless, "max_epochs": 1, "learning_rate": 1e-8})
    certificate = sp.gate(run, progress=silent)
    assert not certificate.passed
    assert {"information"} <= {c.name for c in certificate.failed}
    with pytest.raises(Uncertified, match=r"refused by the gate: .*"):
        sp.load(run)
    assert all(c.mend for c in certificate.failed)


@pytest.mark.parametrize(("change", "message"), [
    (lambda t: torch.full_like(t, torch.nan), "not finite"), (lambda t: t.to(torch.int64), r"holds torch.int64, expected torch.float32"),
])
def test_weights_of_another_kind_are_refused_in_one_line(change, message, run_copy):
    from safetensors.torch import load_file, save_file

    tensors = load_file(run_copy / "weights.safetensors")
    name = next(k for k, v in tensors.items() if v.is_floating_point() and v.numel())
    save_file({**tensors, name: change(tensors[name])}, run_copy / "weights.safetensors")
    with pytest.raises(RunError, match=message) as error:
        sp.Run.open(run_copy).estimator()
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("shape", [[10**30], [10**13]])
def test_a_net_that_cannot_be_made_is_one_line(shape, run_copy):
    record = json.loads((run_copy / "run.json").read_text())
    record["architecture"]["x"]["shapes"]["x"] = shape
    (run_copy / "run.json").write_text(json.dumps(record))
    with pytest.raises(sp.UserError) as error:
        sp.Run.open(run_copy).estimator()
    assert "\n" not in str(error.value)


def test_the_same_gate_gives_the_same_figures(run_copy, line_bank):
    first = json.loads((run_copy / "certificate.json").read_text())
    again = sp.gate(run_copy, bank=line_bank.path, progress=silent).content
    changing = {"created", "cost", "sha256"}
    assert {k: v for k, v in first.items() if k not in changing} == {k: v for k, v in again.items() if k not in changing}
    other = sp.gate(run_copy, bank=line_bank.path, seed=1, progress=silent)
    assert other.figures["coverage"] != first["figures"]["coverage"]


def test_what_is_not_tested_yet_is_named(line_run):
    content = json.loads((line_run.path / "certificate.json").read_text())
    assert content["not_tested"] == []
    assert content["digests"]["bank"] == line_run.bank_digest


def test_the_gate_wants_the_very_bank(run_copy, line_simulator, tmp_path):
    other = sp.simulate(line_simulator, 6000, 2, tmp_path / "other", workers=1, progress=silent)
    with pytest.raises(BankError, match="is not the bank that"):
        sp.gate(run_copy, bank=other.path, progress=silent)


def test_an_extended_bank_still_gates_a_run_made_before(line_simulator, tmp_path):
    path = tmp_path / "bank"
    run = sp.train(sp.simulate(line_simulator, 3000, 5, path, workers=1, progress=silent), "npe", out=tmp_path / "run", progress=silent, **QUICK)
    sp.simulate(line_simulator, 5000, 5, path, workers=1, progress=silent)
    assert sp.gate(run, progress=silent).content["digests"]["bank"] == run.bank_digest


@pytest.mark.parametrize(("file", "text", "message"), [
    ("run.json", "{}", "format None"), ("run.json", '{"format_version": 2}', "is of run format 2, this sbiplat reads 1"),
    ("run.json", '{"format_version": 1}', "it lacks"), ("run.json", '{"format_version": Infinity}', "Infinity"), ("run.json", "nonsense", "not JSON"), ("weights.safetensors", "nonsense", "damaged"),
])
def test_a_damaged_run_is_one_clear_line(run_copy, file, text, message):
    (run_copy / file).write_text(text)
    with pytest.raises((RunError, Uncertified), match=message) as error:
        sp.load(run_copy, allow_uncertified=True)
    assert "\n" not in str(error.value)


def test_loading_a_run_never_runs_code_that_it_names(run_copy, tmp_path):
    trap = tmp_path / "trap.py"
    trap.write_text(f"open({str(tmp_path / 'sprung')!r}, 'w').close()\nclass Net: pass\n")
    record = json.loads((run_copy / "run.json").read_text())
    record["architecture"]["settings"]["embedding"] = f"{trap}:Net"
    (run_copy / "run.json").write_text(json.dumps(record))
    with pytest.raises(sp.UserError, match="code of yours"):
        sp.load(run_copy, allow_uncertified=True)
    assert not (tmp_path / "sprung").exists()


def test_changed_code_of_an_embedding_shuts_it(line_bank, tmp_path):
    """The same weights in another net are another posterior."""
    net = tmp_path / "net.py"
    text = "import torch\n\nSCALE = 1.0\n\nclass Net(torch.nn.Module):\n    def forward(self, x):\n        return SCALE * x\n"
    net.write_text(text)
    run = sp.train(line_bank, "npe", out=tmp_path / "run", embedding=f"{net}:Net", progress=silent, **QUICK)
    sp.gate(run, progress=silent)
    assert sp.load(run.path, allow_uncertified=True).provenance["certified"] == ("yes" if sp.Certificate.read(run).passed else "no")
    code = ("import sys, sbiplat as sp\ntry:\n    sp.load(sys.argv[1], embedding=sys.argv[2])\nexcept sp.UserError as error:\n    print(error)\n"
            "else:\n    print('opened')\n")

    def opened():
        done = subprocess.run([sys.executable, "-c", code, run.path, f"{net}:Net"], capture_output=True, text=True, timeout=60)
        return done.stdout.strip()

    assert opened() == "opened" or "refused" in opened()
    net.write_text(text.replace("SCALE = 1.0", "SCALE = 2.0"))
    assert "is for other settings" in opened()


@pytest.mark.parametrize(("place", "value"), [
    ("finished", "yes"), ("seed", 1.5), ("bank.rows", "6000"), ("bank.path", None), ("split.digest", 3), ("training", []), ("outcome", {}),
    ("architecture", []), ("prior", "p"),
])
def test_odd_values_in_a_run_are_one_clear_line(run_copy, place, value):
    record = json.loads((run_copy / "run.json").read_text())
    *folders, key = place.split(".")
    table = record[folders[0]] if folders else record
    table[key] = value
    (run_copy / "run.json").write_text(json.dumps(record))
    with pytest.raises(RunError, match="is damaged") as error:
        sp.load(run_copy, allow_uncertified=True)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("edit", [
    lambda r: r.update(seed=5), lambda r: r["training"].update(held_out=0.2), lambda r: r["split"].update(digest="0" * 64),
    lambda r: r["training"].update(learning_rate=1.0),
])
def test_a_changed_record_of_the_training_shuts_it(run_copy, edit):
    record = json.loads((run_copy / "run.json").read_text())
    edit(record)
    (run_copy / "run.json").write_text(json.dumps(record))
    with pytest.raises(Uncertified, match="is for other settings"):
        sp.load(run_copy)


def test_weights_that_change_between_hash_and_load_are_not_used(run_copy, line_bank, tmp_path):
    other = sp.train(line_bank, "npe", out=tmp_path / "other", seed=3, progress=silent, **QUICK)
    run = sp.Run.open(run_copy)
    assert run.weights_digest
    shutil.copy(other.weights_path, run.weights_path)
    with pytest.raises(RunError, match="changed by another process"):
        sp.load(run)


def test_lost_weights_name_the_mend(run_copy):
    (run_copy / "weights.safetensors").unlink()
    with pytest.raises(RunError, match="delete it and train again"):
        sp.load(run_copy)


def test_thresholds_of_ones_own_stay_with_the_draws(run_copy):
    assert "own_thresholds" not in {k for k, v in sp.load(run_copy).provenance.items() if v}
    assert sp.gate(run_copy, progress=silent, under_coverage=0.5, n=300).passed
    posterior = sp.load(run_copy)
    assert posterior.provenance["own_thresholds"] == "pairs = 300 (usually 1000), under_coverage = 0.5 (usually 0.05)"
    assert posterior.to_arviz(np.zeros(2), 5).posterior.attrs["own_thresholds"]


def test_few_pairs_say_what_they_cannot_see(run_copy):
    few, many = (sp.gate(run_copy, progress=silent, n=n).criteria[0] for n in (250, 600))
    assert "from chance from 0.12 on" in few.statement
    assert "from chance from 0.08 on" in many.statement
    assert not sp.gate(run_copy, progress=silent, n=150).passed


def test_it_says_of_which_steps_the_posterior_is_a_chain(run_copy):
    content = json.loads((run_copy / "certificate.json").read_text())
    assert [(s["step"], s["name"], s["gives"]) for s in content["chain"]] == [("factor", "NPE", ["z"]), ("reparametrisation", "prior", ["theta"])]
    shown = subprocess.run([sys.executable, "-m", "sbiplat", "certificate", "show", str(run_copy)], capture_output=True, text=True, timeout=60)
    assert re.search(r"^chain +NPE -> z; prior \(reparametrisation\) -> theta$", shown.stdout, re.M), shown.stderr


def test_an_older_certificate_without_a_chain_still_opens_the_door(run_copy):
    content = json.loads((run_copy / "certificate.json").read_text())
    del content["chain"]
    content["sha256"] = hashed(content)
    (run_copy / "certificate.json").write_text(json.dumps(content))
    assert sp.load(run_copy).provenance["certified"] == "yes"
    assert Certificate.read(Run.open(run_copy)).chain == ""


@pytest.mark.parametrize("chain", ["NPE", [{}], [{"step": "factor", "name": 3}], [{"step": "gibbs", "name": "g", "steps": [{"name": "k"}]}]])
def test_a_chain_of_another_form_is_one_clear_line(run_copy, chain):
    content = json.loads((run_copy / "certificate.json").read_text())
    content["chain"] = chain
    content["sha256"] = hashed(content)
    (run_copy / "certificate.json").write_text(json.dumps(content))
    with pytest.raises(Uncertified, match=r"of another format \(chain") as error:
        sp.load(run_copy)
    assert "\n" not in str(error.value)
