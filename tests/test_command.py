"""Simulators that are programs: templates, working folders, outputs, failures, and what ends with them."""

import os
import shutil
import stat
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pytest

import sbiplat as sp
from sbiplat.progress import silent

ROOT = Path(__file__).parents[1]
PRIOR = sp.Prior({"a": sp.Uniform(0.0, 1.0), "b": sp.Normal(0.0, 1.0)})


@pytest.fixture
def script(tmp_path):
    """Makes an executable script of these lines of Python; returns its name."""
    def make(text, name="program"):
        path = tmp_path / name
        path.write_text(f"#!{sys.executable}\nimport sys, os\n{text}\n")
        path.chmod(path.stat().st_mode | stat.S_IXUSR)
        return f"./{name}"
    return make


@pytest.fixture
def scratch(tmp_path, monkeypatch):
    """Where temporary files go meanwhile."""
    (tmp_path / "scratch").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "scratch"))
    return tmp_path / "scratch"


def made(command, tmp_path, output="stdout", **settings):
    settings = {"name": "it", "prior": PRIOR, "x_shape": (2,), "dtype": "float64", **settings}
    return sp.command_simulator(command, output=output, folder=tmp_path, **settings)


def one(simulator, seed=0):
    return simulator(np.array([0.1, 2.0 / 3.0]), np.random.default_rng(seed))


def test_words_carry_every_digit_and_the_seed_is_of_the_stream(script, tmp_path):
    it = made([script("print(*sys.argv[1:])"), "{a}", "{b}", "{seed}", "{a:.2f}"], tmp_path, x_shape=(4,))
    x = one(it)
    assert x[0] == 0.1
    assert x[1] == 2.0 / 3.0
    assert x[2] == one(it)[2] != one(it, 1)[2]
    assert x[3] == 0.1


def test_input_files_are_templates_with_braces(script, tmp_path):
    it = made([script("print(open('in.json').read().replace('{', ' ').replace('}', ' ').split(':')[1])")], tmp_path,
              inputs={"in.json": '{{"a": {a}}}'}, x_shape=())
    assert one(it) == 0.1


WRITES = {
    "x.npy": "import numpy as np; np.save('x.npy', [1.0, 2.0])", "x.txt": "open('x.txt', 'w').write('# c\\n1 2\\n')",
    "x.csv": "open('x.csv', 'w').write('p,q\\n1,2\\n')", "x.h5": "import h5py; h5py.File('x.h5', 'w')['d'] = [1.0, 2.0]",
    "x.h5:/g/d": "import h5py; f = h5py.File('x.h5', 'w'); f['g/d'] = [1.0, 2.0]; f['e'] = 3", "stdout": "print('1\\n2')",
}


@pytest.mark.parametrize("output", WRITES)
def test_every_form_of_output(output, script, tmp_path):
    np.testing.assert_array_equal(one(made([script(WRITES[output])], tmp_path, output=output)), [1.0, 2.0])


def test_several_outputs_make_a_dict(script, tmp_path):
    it = made([script("print(5); open('t.txt', 'w').write('1 2\\n3 4')")], tmp_path, output={"n": "stdout", "t": "t.txt"},
              x_shape={"n": (), "t": (2, 2)})
    assert one(it)["n"] == 5
    np.testing.assert_array_equal(one(it)["t"], [[1, 2], [3, 4]])


def test_files_are_linked_and_folders_are_empty_and_go(script, scratch, tmp_path):
    (tmp_path / "table.dat").write_text("7 8")
    it = made([script("assert sorted(os.listdir()) == ['table.dat']; print(open('table.dat').read()); open('left', 'w')")], tmp_path, files=["table.dat"])
    np.testing.assert_array_equal(one(it), [7, 8])
    assert not list(scratch.iterdir())


def test_the_environment_is_handed_on(script, tmp_path):
    assert one(made([script("print(os.environ['LEVEL'])")], tmp_path, environment={"LEVEL": "3"}, x_shape=())) == 3


@pytest.mark.parametrize(("text", "says"), [
    ("sys.exit('bad table')", "./program failed (exit status 1): bad table"), ("os.abort()", "killed by SIGABRT"),
    ("pass", "stdout holds no numbers"), ("print('1 2'); print('3')", "lines of different length"), ("print('1 two')", "two"),
    ("print('1 2 3')", "x has shape (3,), declared is (2,)"),
])
def test_failures_are_kept_as_rows_with_their_message(text, says, script, tmp_path):
    program = script(f"if float(sys.argv[1]) < 0.5:\n    {text}\nelse:\n    print(1, 2)")
    bank = sp.simulate(made([program, "{a}"], tmp_path), 20, 1, tmp_path / "b", workers=2, checked=False, progress=silent)
    np.testing.assert_array_equal(bank.status == 2, bank.theta[:, 0] < 0.5)
    assert says in bank.info()["first_failures"][0]["message"]


def test_other_exit_codes_can_mean_success(script, tmp_path):
    np.testing.assert_array_equal(one(made([script("print(1, 2); sys.exit(3)")], tmp_path, exit_codes=(0, 3))), [1, 2])


@pytest.mark.parametrize(("settings", "says"), [
    ({"command": "./program {a}"}, "as a list of words"), ({"command": []}, "as a list of words"),
    ({"command": ["./gone"]}, "there is no program"), ({"command": ["no-such-program-anywhere"]}, "there is no program"),
    ({"command": ["./plain"]}, "may not be executed"), ({"command": ["./program", "{c}"]}, "is neither a parameter (a, b) nor seed"),
    ({"command": ["./program", "{a.real}"]}, "is neither a parameter"), ({"command": ["./program", "{"]}, "for braces"),
    ({"command": ["./program", "{a:zz}"]}, "for braces"), ({"inputs": {"../in": ""}}, "must be the name of a file"),
    ({"output": "/etc/passwd"}, "must be the name of a file"), ({"files": ["gone.dat"]}, "there is no file"),
    ({"files": ["plain"], "inputs": {"plain": "x"}}, "stands for two"), ({"files": ["plain"], "output": "plain"}, "stands for two"),
    ({"files": ["plain", "sub/plain"]}, "stands for two|there is no file"), ({"prior": sp.Prior({"seed": sp.Uniform(0, 1)})}, "called seed"),
])
def test_mistakes_are_told_when_it_is_registered(settings, says, script, tmp_path):
    script("print(1, 2)")
    (tmp_path / "plain").write_text("")
    with pytest.raises(sp.UserError) as error:
        made(settings.pop("command", ["./program"]), tmp_path, **settings)
    assert any(text in str(error.value) for text in says.split("|"))
    assert "\n" not in str(error.value)


def test_the_identity_follows_the_program_and_not_its_place(script, tmp_path):
    program = script("print(1, 2)")
    digest = made([program], tmp_path).source_digest()
    shutil.copytree(tmp_path, tmp_path / "elsewhere")
    assert made([program], tmp_path / "elsewhere").source_digest() == digest
    script("print(1, 3)")
    assert made([program], tmp_path).source_digest() != digest
    assert made([program, "{a}"], tmp_path).source_digest() != digest


def test_a_late_program_ends_with_all_that_it_started(scratch, tmp_path):
    mark = f"{os.getpid()}.75"
    (tmp_path / "slow.sh").write_text(f"#!/bin/sh\nsleep {mark} &\nsleep {mark}\n")
    (tmp_path / "slow.sh").chmod(0o755)
    bank = sp.simulate(made(["./slow.sh"], tmp_path, time_limit=0.3), 3, 1, tmp_path / "b", workers=2, checked=False, progress=silent)
    assert bank.status_counts()["timed-out"] == 3
    assert not [p for p in Path("/proc").glob("[0-9]*/cmdline") if mark.encode() in p.read_bytes()]
    assert not list(scratch.iterdir()), "working folders are gone"


def test_what_a_program_leaves_in_the_background_is_not_waited_for(tmp_path):
    (tmp_path / "bg.sh").write_text("#!/bin/sh\nsleep 20 &\necho 1 2\n")
    (tmp_path / "bg.sh").chmod(0o755)
    began = time.monotonic()
    np.testing.assert_array_equal(one(made(["./bg.sh"], tmp_path)), [1, 2])
    assert time.monotonic() - began < 10


def test_a_linked_file_called_program_is_no_program(script, tmp_path):
    (tmp_path / "program").write_text("table")
    first = made([script("print(1, 2)", "p")], tmp_path, files=["program"]).source_digest()
    assert made([script("print(1, 3)", "p")], tmp_path, files=["program"]).source_digest() != first


@pytest.mark.parametrize(("shape", "text"), [((), "5"), ((1,), "5"), ((1, 2), "5 6"), ((2, 1), "5 6"), ((2, 2), "5 6\\n7 8")])
def test_text_takes_the_declared_shape_where_only_axes_of_one_differ(shape, text, script, tmp_path):
    x = one(made([script(f"print('{text}')")], tmp_path, x_shape=shape))
    assert np.shape(x) == shape
    assert np.ravel(x)[0] == 5


# ---------------------------------------------------------------------------------------------------------- examples


def compiled():
    program = ROOT / "simulators" / "programs" / "walk"
    if shutil.which("cc") is None and not os.environ.get("CI"):
        pytest.skip("no C compiler here")
    subprocess.run(["cc", "-O2", "-o", program, f"{program}.c", "-lm"], check=True)


@pytest.mark.parametrize("name", ["walk", "queue"])
def test_the_examples_fill_the_same_bank_on_workers_and_ranks(name, tmp_path):
    compiled()
    words = [sys.executable, "-m", "sbiplat", "simulate", f"{ROOT}/simulators/programs/{name}.py:{name}", "--n", "200", "--seed", "1", "--json"]
    mpiexec = Path(sys.prefix) / "bin" / "mpiexec"
    digests = set()
    for line, out in (([*words, "--workers", "1"], "b1"), ([*words, "--workers", "2"], "b2"), ([mpiexec, "-n", "3", *words], "m3")):
        done = subprocess.run([*line, "--out", out], cwd=tmp_path, capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stderr
        digests.add(sp.Bank.open(tmp_path / out).digest)
    bank = sp.Bank.open(tmp_path / "b1")
    assert len(digests) == 1
    assert bank.status_counts()["ok"] == 200
    known = bank.x[:, 0] if name == "walk" else bank.x[:, 0, 1]
    law = -bank.theta[:, 1] / bank.theta[:, 0] if name == "walk" else 0 * known
    if name == "walk":  # Wald: the mean time to absorption is start / |drift|
        assert abs((known - law).mean() / law.mean()) < 0.3
    else:  # the first customer never waits
        np.testing.assert_array_equal(known, law)
