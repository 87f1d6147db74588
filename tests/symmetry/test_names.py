"""Actions by name: what a run holds makes ready-made ones again, and never runs a user's code that this process has not named."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

import sbiplat as sp
from sbiplat.errors import SettingError, SimulatorError, SymmetryError
from sbiplat.simulator import load_file
from sbiplat.symmetry import (
    Euclidean2,
    GroupAction,
    ImageRotation,
    Permutation,
    Phase,
    Product,
    Rotation2D,
    Rotation3D,
    Scaling,
    SpectrumShift,
    TimeShift,
    Translation,
    Units,
    names,
)
from sbiplat.symmetry.names import READY_MADE, describe, from_json, register, resolve_action

ALL = [
    Translation(("a", "b"), "v"), TimeShift("t", 0.1, channels=(0, 2)), SpectrumShift("t", 0.25, 20.0), Scaling("s"),
    Units({"m": 1, "r": -2}, {"x": 3}), Phase("p", order=2), Rotation2D("p"), ImageRotation("p", mode="bilinear"),
    Euclidean2(("p", "x", "y"), middle=(1, 2), fold=2), Rotation3D(("a", "b", "c")), Permutation(("v", "w"), by=1),
    Product(Permutation(), TimeShift("t", 0.1), Scaling("s")),
]
OWN = '''
import sbiplat as sp

class Both(sp.symmetry.GroupAction):
    """Adds a to x."""
    parameters = ("a",)
    factor = 1
    def act_data(self, g, x):
        return {"x": x["x"] + self.factor * g.to(x["x"].dtype)}

class Slow(sp.symmetry.TimeShift):
    """A user's own, made of a ready-made one."""

named = Slow("a", 1.0)
made = lambda: Both()
wrong = lambda: 3

@sp.simulator(prior={"a": sp.Normal(0, 1)}, x_shape=4, symmetry=sp.symmetry.Product(Both(), sp.symmetry.Permutation()))
def ours(theta, rng):
    """a and noise."""
    return theta + rng.standard_normal(4)
'''


def test_ready_made_actions_come_back_from_json():
    assert {type(a).__name__ for a in ALL} == set(READY_MADE)
    for action in ALL:
        described = json.loads(json.dumps(describe(action)))
        assert from_json(described) == action
        assert described["action"] == type(action).__name__


@pytest.mark.parametrize("wrong", [{"action": "Twist"}, {"action": "TimeShift", "spacing": 1.0}, {"action": "Product"}, {},
                                   {"action": "TimeShift", "parameter": "t", "spacing": 1.0, "more": 1}])
def test_descriptions_of_nothing_are_one_line(wrong):
    with pytest.raises(SettingError) as told:
        from_json(wrong)
    assert "\n" not in str(told.value)


def test_actions_are_given_in_four_ways(tmp_path):
    file = tmp_path / "own.py"
    file.write_text(OWN)
    module = load_file(file)
    assert resolve_action(ALL[0]) is ALL[0]
    assert isinstance(resolve_action(module.Both), module.Both)
    assert isinstance(resolve_action(f"{file}:made"), module.Both)
    assert resolve_action(f"{file}:named") is module.named
    assert resolve_action(module.ours) is resolve_action(f"{file}:ours")
    for given, told in ((3, "expected a GroupAction"), (f"{file}:nothing", "has no 'nothing'"), (f"{file}:wrong", "gave 3"), ("twist", "no action is called"),
                        (lambda: 1 / 0, "failed: ZeroDivisionError")):
        with pytest.raises(SymmetryError, match=told):
            resolve_action(given)
    with pytest.raises(SimulatorError, match="no simulator file"):
        resolve_action("nowhere.py:object")


def test_a_users_own_is_found_only_where_this_process_has_named_it(tmp_path):
    """Another process reads what this one has described: it runs nothing, until it is told the name."""
    file = tmp_path / "own.py"
    file.write_text(OWN + f"\nopen({str(tmp_path / 'ran')!r}, 'w').close()\n")
    module = load_file(file)
    for name, described in {"named": describe(module.named), "Both": describe(module.Both()),
                            "ours": describe(module.ours.symmetry, module.ours)}.items():
        assert described["own"] == f"{file}:{name}"
        assert isinstance(from_json(described), GroupAction)
        (tmp_path / "ran").unlink(missing_ok=True)
        text = json.dumps(described)
        there = (f"import json; from sbiplat.symmetry.names import from_json, register\nfrom sbiplat.errors import SettingError\n"
                 f"d = json.loads({text!r})\ntry:\n    from_json(d)\nexcept SettingError as e:\n    print(e)\n"
                 f"import os; assert not os.path.exists({str(tmp_path / 'ran')!r})\n"
                 f"assert register(d['own']) == d['own']; print(type(from_json(d)).__name__)")
        done = subprocess.run([sys.executable, "-c", there], capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, done.stderr
        told, found = done.stdout.splitlines()
        assert f"--simulator {file}:{name}" in told
        assert found == {"named": "Slow", "Both": "Both", "ours": "Product"}[name]


def test_changed_code_is_told(tmp_path):
    file = tmp_path / "own.py"
    file.write_text(OWN)
    described = describe(load_file(file).named)
    with pytest.raises(SettingError, match="has changed since"):
        from_json({**described, "source_digest": "0" * 64})
    assert register(TimeShift("t", 1.0)) == "TimeShift"


def test_a_users_own_is_found_by_its_code_wherever_it_lies(tmp_path, monkeypatch):
    monkeypatch.setattr(names, "_registered", {})
    for place in ("here", "there"):
        (tmp_path / place).mkdir()
        (tmp_path / place / "own.py").write_text(("# moved\n" if place == "there" else "") + OWN)
    described = describe(load_file(tmp_path / "here" / "own.py").named)
    names._registered.clear()
    register(f"{tmp_path / 'there' / 'own.py'}:ours")
    with pytest.raises(SettingError, match=r"what this process has named, .*there/own.py:ours, is other code"):
        from_json(described)
    register(f"{tmp_path / 'there' / 'own.py'}:named")
    assert type(from_json(described)).__name__ == "Slow"


# ------------------------------------------------------------------------------------------------- the command line


def cli(*words):
    from sbiplat.cli import app

    return CliRunner().invoke(app, words)


def test_the_card_shows_the_symmetry_and_its_check(tmp_path):
    file = tmp_path / "own.py"
    file.write_text(OWN)
    told = cli("simulators", f"{file}:ours")
    assert told.exit_code == 0, told.output
    assert "symmetry  Both x Permutation, exact, of a" in told.output
    assert "T_g simulate(theta) agree: p = " in told.output
    card = json.loads(cli("simulators", f"{file}:ours", "--json").stdout)["symmetry"]
    assert card["own"] == f"{file}:ours"
    assert card["check"]["p_value"] > 0.001


@pytest.mark.parametrize(("old", "new", "error", "words"), [
    ("factor = 1", "factor = 2", SymmetryError, "Both x Permutation is declared exact"),
    ('("a",)', '("b",)', SymmetryError, "no parameter 'b'"),
    ('("a",)', '"a"', SymmetryError, "parameters = 'a': expected the names"), ('("a",)', "()", SymmetryError, "parameters = (): expected the names"),
    ("return {", "import os; os.abort(); return {", SimulatorError, "ended its process"),
])
def test_a_wrong_or_crashing_action_is_refused_in_one_line(tmp_path, old, new, error, words):
    file = tmp_path / "own.py"
    file.write_text(OWN.replace(old, new, 1))
    told = cli("simulators", f"{file}:ours")
    assert isinstance(told.exception, error)
    assert words in str(told.exception)
    assert "\n" not in str(told.exception)


def test_the_action_in_the_docs_keeps_the_contract(tmp_path):
    """docs/equivariance.md: the snippet is a file that passes the check."""
    import re

    text = (Path(__file__).parents[2] / "docs" / "equivariance.md").read_text()
    snippet = next(b for b in re.findall(r"^```python\n(.*?)^```", text, re.S | re.M) if "GroupAction" in b)
    file = tmp_path / "drift.py"
    file.write_text(snippet)
    told = cli("simulators", f"{file}:drift")
    assert told.exit_code == 0, told.output
    assert "symmetry  Drift, exact, of slope" in told.output
    assert sp.symmetry.GroupAction is GroupAction
