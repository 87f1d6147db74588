"""Functions of the user's in the gate: they see copies, and what they do wrong is one line."""

import shutil

import numpy as np
import pytest

import sbiplat as sp
from sbiplat.errors import SettingError
from sbiplat.progress import silent

QUICK = {"n": 200, "draws": 500, "attacked": 10, "attack_steps": 2, "attack_queries": 2, "progress": silent}


@pytest.fixture
def run(line_run, tmp_path):
    return shutil.copytree(line_run.path, tmp_path / "run")


def test_a_function_that_writes_into_x_changes_nothing(run):
    def writing(x):
        found = np.array(x, float)
        x[...] = 0
        return found

    def reading(x):
        return np.array(x, float)

    mine, other = (sp.gate(run, references=f, **QUICK).figures for f in (writing, reading))
    assert mine == other


@pytest.mark.parametrize(("given", "why"), [
    ({"functions": {"f": lambda theta: 1 / 0}}, "function 'f' failed: ZeroDivisionError"),
    ({"functions": {"f": lambda theta: theta[..., 0] + 1j}}, "real numbers"),
    ({"functions": {"f": lambda theta: 3.0}}, "one number a theta"),
    ({"references": lambda x: {}["no"]}, "references failed: KeyError"),
])
def test_mistakes_of_own_functions_are_one_line(run, given, why):
    with pytest.raises(SettingError, match=why) as told:
        sp.gate(run, **given, **QUICK)
    assert "\n" not in str(told.value)
