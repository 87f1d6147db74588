"""A refused posterior is told what is wrong with it, with a command that can be typed."""

import json
import shlex
import shutil
from dataclasses import asdict

import numpy as np
import pytest
from typer.testing import CliRunner

import sbiplat as sp
from sbiplat.cli import app
from sbiplat.gate import learning
from sbiplat.gate.criterion import Criterion
from sbiplat.gate.diagnosis import diagnose
from sbiplat.progress import silent
from sbiplat.runs import Run
from sbiplat.settings import parse_assignments
from sbiplat.symmetry.settings import SymmetrySettings


def failed(*names, mend="m"):
    return [Criterion(name, False, 1.0, 0.5, f"statement of {name}", mend) for name in names]


@pytest.fixture
def run(line_run, tmp_path):
    shutil.copytree(line_run.path, tmp_path / "a run")
    return sp.Run.open(tmp_path / "a run")


@pytest.mark.parametrize(("names", "mend", "defects"), [
    (["under-coverage", "coverage SBC slope"], "too narrow", ["over-confident"]),
    (["over-coverage"], "too wide", ["under-confident"]),
    (["coverage SBC slope"], "biased high in slope: train longer", ["biased in slope"]),
    (["local coverage"], "m", ["failing in a region"]),
    (["information", "C2ST"], "m", ["not using x", "misshapen"]),
    (["nearest rows"], "m", ["knowing less than the bank's nearest rows"]),
    (["fragility", "coverage under attack"], "m", ["fragile"]),
    (["tails"], "m", ["misshapen"]), (["pairs"], "m", ["tested too little"]), (["gradient masking"], "m", ["gradient masking"]),
])
def test_every_defect_is_called_by_its_name(run, names, mend, defects):
    found = diagnose(run, failed(*names, mend=mend))
    assert [f.defect for f in found] == defects
    told = " ".join(f.evidence for f in found)
    assert all(name in told for name in names if not name.startswith("coverage SBC") or "biased" in mend)


def test_the_feature_that_attacks_move_most_is_named(run):
    delta = np.zeros((3, 5, 2))
    delta[..., 1] = 1.0
    assert diagnose(run, failed("fragility"), {"attack_delta": delta})[0].defect == "fragile along x[1]"


def test_the_command_trains_the_same_net(run):
    """The settings that were given stay, but for those that the mend changes."""
    command = diagnose(run, failed("fragility"))[0].command
    assert "--set flow=gaussian" in command
    assert shlex.split(command)[-2:] == ["--defend", "slab:0.05"]
    assert "embedding_hidden=[32]" in shlex.split(command)


def test_a_width_that_is_wrong_everywhere_may_be_recalibrated_and_one_in_a_region_may_not(run):
    assert "recalibrate" in diagnose(run, failed("under-coverage"))[0].command
    assert all("recalibrate" not in f.command for f in diagnose(run, failed("under-coverage", "local coverage")))


def test_a_curve_that_still_rises_says_how_many_simulations(run):
    curve = learning.of_three((1500, 3000, 6000), np.stack([np.full(100, 1 - 60 * n**-0.5) for n in (1500, 3000, 6000)]))
    (run.path / learning.FILE).write_text(json.dumps({
        "format_version": 1, "weights": run.weights_digest, "rows": curve.rows, "log_density": curve.log_density, "gains": curve.gains,
        "next_gain": curve.next_gain, "enough": curve.enough, "held_out": 100}))
    found = diagnose(run, failed("under-coverage"))[-1]
    assert found.defect == "too few simulations"
    assert f"--n {curve.next_rows}" in found.command


@pytest.mark.parametrize("name", ["under-coverage", "over-coverage", "coverage by theta", "information", "fragility", "C2ST", "draws"])
def test_commands_can_be_typed(run, name):
    """Each word is known to the command: what comes back is a mistake in what is there, if any, not in the words."""
    for finding in diagnose(run, failed(name)):
        for command in finding.command.split(" && "):
            words = shlex.split(command)
            assert words[0] == "sbiplat"
            known = CliRunner().invoke(app, [words[1], "--help"], env={"COLUMNS": "200"}).output
            assert all(w in known for w in words if w.startswith("--")), command


def test_a_passed_run_has_no_diagnosis_and_a_refused_one_says_it(run):
    assert diagnose(run, []) == []
    certificate = sp.gate(run, n=300, progress=silent, information=50.0)
    assert certificate.content["diagnosis"][0]["defect"] == "not using x"


def test_the_commands_keep_the_symmetry_and_name_the_simulator_that_declares_it(run):
    record = {**run.record, "symmetry": {**asdict(SymmetrySettings()), "symmetry": "gnpe", "initial": {"flow": "gaussian"}},
              "bank": {**run.record["bank"], "simulator": {"name": "mine", "spec": "/somewhere/mine.py:mine"}}}
    found = diagnose(Run(run.path, record), failed("fragility"))[0].command
    words = shlex.split(found)
    assert "symmetry=\"gnpe\"" in words
    assert parse_assignments([next(w for w in words if w.startswith("initial="))]) == {"initial": {"flow": "gaussian"}}
    assert words[words.index("--simulator") + 1] == "/somewhere/mine.py:mine"
