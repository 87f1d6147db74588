"""The house itself: floors, names, docstrings, what no file may do, and that the docs speak of what there is."""

import ast
import importlib.util
import inspect
import json
import math
import pkgutil
import re
import subprocess
import sys
import tomllib
from dataclasses import fields, is_dataclass
from importlib.metadata import entry_points
from pathlib import Path

import pytest

import sbiplat as sp
from sbiplat import simulator as decorate
from sbiplat.diagnostics.adversarial import AttackSettings
from sbiplat.estimators.base import ESTIMATORS, find
from sbiplat.gate.criteria import Criteria
from sbiplat.simulator import check, resolve
from sbiplat.symmetry.settings import SymmetrySettings
from sbiplat.training.begin import TrainSettings

ROOT = Path(__file__).parents[1]
BIN = Path(sys.executable).parent
NEEDS_SBI = {"sbiplat.posteriors.to_sbi"} if importlib.util.find_spec("sbi") is None else set()  # an extra, which CI goes without
MODULES = sorted({"sbiplat", *(m.name for m in pkgutil.walk_packages(sp.__path__, "sbiplat."))} - {"sbiplat.__main__"} - NEEDS_SBI)
SOURCES = sorted((ROOT / "sbiplat").rglob("*.py"))
DOCS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), ROOT / "cluster" / "README.md"]


def python(code):
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)


# ------------------------------------------------------------------------------------------------- floors and names


def test_a_room_imports_only_from_floors_below_it():
    """The contracts of pyproject.toml; `lint-imports` is part of the extra dev, and a house without it is not tested."""
    done = subprocess.run([BIN / "lint-imports", "--no-cache"], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "2 kept, 0 broken" in done.stdout


def test_importing_the_platform_or_its_banks_imports_no_torch():
    for module in ("sbiplat", "sbiplat.bank.bank", "sbiplat.bank.fill", "sbiplat.simulator", "sbiplat.cli"):
        done = python(f"import sys, {module}; assert 'torch' not in sys.modules")
        assert done.returncode == 0, (module, done.stderr)


def test_names_of_the_front_door_are_functions_though_rooms_have_the_same_names():
    done = python("import sbiplat.simulator, sbiplat.gate.examine, sbiplat.report.page, sbiplat.gate, sbiplat.report\n"
                  "import sbiplat as sp, inspect\n"
                  "assert inspect.isfunction(sp.simulator) and inspect.isfunction(sp.gate) and inspect.isfunction(sp.report)")
    assert done.returncode == 0, done.stderr
    assert inspect.isfunction(decorate)


def test_every_public_name_resolves():
    assert sorted(sp.__all__) == sorted(set(sp.__all__))
    for name in sp.__all__:
        assert getattr(sp, name) is not None, name
        assert name in dir(sp)
    with pytest.raises(AttributeError, match="no attribute 'simulat'"):
        _ = sp.simulat


# ------------------------------------------------------------------------------------------------------- docstrings


def public(module):
    """(qualified name, object) of the classes and functions that a module defines and shows."""
    return [(f"{module.__name__}.{name}", value) for name, value in vars(module).items()
            if not name.startswith("_") and (inspect.isclass(value) or inspect.isfunction(value)) and value.__module__ == module.__name__]


@pytest.mark.parametrize("name", MODULES)
def test_modules_classes_and_functions_say_what_they_are(name):
    module = importlib.import_module(name)
    assert module.__doc__, name
    assert [n for n, v in public(module) if not own_docstring(v)] == []


def own_docstring(value):
    """A docstring that was written, not the signature that a dataclass gets by itself."""
    text = vars(value).get("__doc__") if inspect.isclass(value) else value.__doc__
    return bool(text) and not (is_dataclass(value) and text.startswith(f"{value.__name__}(") and text.endswith(")"))


def settings_classes():
    return [v for name in MODULES for _, v in public(importlib.import_module(name))
            if is_dataclass(v) and any("about" in f.metadata for f in fields(v))]


def test_every_setting_says_what_it_is():
    classes = settings_classes()
    assert {*SETTINGS_OF.values(), TrainSettings, Criteria} <= set(classes)
    for cls in classes:
        for f in fields(cls):
            assert f.metadata.get("about"), f"{cls.__name__}.{f.name}"


# --------------------------------------------------------------------------------------------- what no file may do

FORBIDDEN = {  # pattern -> the files that may, and why
    r"\b(c?[pP]ickle|dill|joblib|shelve|marshal)\b": {},
    r"torch\.load\(": {},
    r"(?<![\w.])eval\(": {},
    r"(?<![\w.])exec\(": {},
    r"\bexec_module\(": {"sbiplat/simulator.py": "the user's own file, which they named on the command line"},
    r"torch\.manual_seed\(": {
        "sbiplat/estimators/base.py": "initial weights, in fork_rng", "sbiplat/training/trainer.py": "dropout, in fork_rng",
        "sbiplat/laws.py": "torch distributions take no generator; in fork_rng",
        "sbiplat/estimators/sbi_npe.py": "sbi's nets take no generator; in fork_rng",
    },
    r"np\.random\.seed\(": {},
    r"np\.random\.(rand|randn|normal|uniform|choice|permutation)\(": {},
    r"allow_pickle=True": {},
    r"yaml\.load\(": {},
    r"shell=True|os\.system\(": {},
}


def code_of(path):
    """Source without comments and docstrings."""
    tree = ast.parse(path.read_text())
    for node in ast.walk(tree):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
            node.value.value = ""
    return ast.unparse(tree)


@pytest.mark.parametrize("pattern", FORBIDDEN, ids=list(FORBIDDEN))
def test_no_file_does_what_none_may(pattern):
    found = {str(p.relative_to(ROOT)) for p in SOURCES if re.search(pattern, code_of(p))}
    assert found <= set(FORBIDDEN[pattern]), f"{pattern} in {sorted(found - set(FORBIDDEN[pattern]))}"


def test_files_are_read_without_pickles():
    for path in SOURCES:
        for call in [n for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, ast.Call) and ast.unparse(n.func) == "np.load"]:
            assert "allow_pickle=False" in ast.unparse(call), path


def test_the_global_generator_is_seeded_only_where_it_is_put_back():
    for path in SOURCES:
        if "torch.manual_seed(" in code_of(path):
            assert "fork_rng(" in code_of(path), path


# ------------------------------------------------------------------------------------------------------ entry points


@pytest.mark.parametrize("name", sorted(p.name for p in entry_points(group="sbiplat.simulators")))
def test_every_registered_simulator_keeps_its_contract(name):
    simulator = resolve(name)
    result = check(simulator, rows=8)
    assert result.finite > 0
    assert simulator.summary


def test_every_registered_embedding_loads():
    from torch import nn

    points = entry_points(group="sbiplat.embeddings")
    assert points
    for point in points:
        assert issubclass(point.load(), nn.Module), point


def test_the_entry_points_are_those_of_the_project():
    """An old installation would test other code."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    for group, wanted in project["entry-points"].items():
        installed = {p.name: p.value for p in entry_points(group=group)}
        assert wanted.items() <= installed.items(), "pip install -e . again"


# -------------------------------------------------------------------------------------------------------------- docs


def blocks(path):
    """(language, text) of every fenced block."""
    return re.findall(r"^```(\w*)\n(.*?)^```", path.read_text(), re.S | re.M)


def commands():
    """(document, words) of every `sbiplat ...` in a shell block, and in the cluster's scripts."""
    found = []
    for path in DOCS:
        for language, text in blocks(path):
            if language in ("", "sh", "bash"):
                for line in text.splitlines():
                    words = line.split("#")[0].split()
                    if "sbiplat" in words:
                        found.append((path.name, tuple(words[words.index("sbiplat") + 1:])))
    return found


@pytest.fixture(scope="module")
def options():
    """Command -> its options, from the commands themselves."""
    import typer

    from sbiplat.cli import app

    def walk(command, path=()):
        if hasattr(command, "commands"):
            return {k: v for name, c in command.commands.items() for k, v in walk(c, (*path, name)).items()}
        return {path: {o for p in command.params for o in (*p.opts, *p.secondary_opts)} | {"--help", "--debug"}}

    return walk(typer.main.get_command(app))


def test_the_docs_name_only_commands_and_options_that_exist(options):
    found = commands()
    assert len(found) > 20
    for document, words in found:
        if words[:1] == ("...",):
            continue
        command = words[:2] if words[:2] in options else words[:1]
        assert command in options, f"{document}: sbiplat {' '.join(words)}"
        for word in words:
            if word.startswith("--"):
                assert word.split("=")[0] in options[command], f"{document}: sbiplat {' '.join(words)} has no {word}"
        for setting in [words[k + 1] for k, word in enumerate(words[:-1]) if word == "--set"]:
            estimator = words[words.index("--estimator") + 1] if "--estimator" in words else "npe"
            classes = (Criteria,) if command == ("gate",) else (TrainSettings, SETTINGS_OF[estimator])
            assert setting.split("=")[0] in {f.name for c in classes for f in fields(c)}, f"{document}: {setting}"


def test_options_that_the_docs_speak_of_in_text_exist(options):
    known = {o for some in options.values() for o in some} | {
        "--mpi", "--signal", "--requeue", "--gpus", "--cpus-per-task", "--no-binary", "--nodes", "--ntasks-per-node", "--time", "--dependency",
    }
    for path in DOCS:
        for code in re.findall(r"`([^`\n]+)`", path.read_text()):
            for word in re.findall(r"(?<![\w-])--[a-z][a-z-]*", code):
                assert word in known, f"{path.name}: {code}"


def test_the_python_of_the_docs_is_python_and_names_what_there_is():
    for path in DOCS:
        for language, text in blocks(path):
            if language == "toml":
                tomllib.loads(text)
            if language != "python":
                continue
            for node in ast.walk(ast.parse(text)):
                if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "sp":
                    assert hasattr(sp, node.attr), f"{path.name}: sp.{node.attr}"


def test_links_between_the_docs_lead_somewhere():
    lost = []
    for path in [*DOCS, ROOT / "CONTRIBUTING.md"]:
        for target, anchor in re.findall(r"\]\((?!https?:)([^)#]*)(?:#([^)]*))?\)", path.read_text()):
            there = (path.parent / target).resolve() if target else path
            headings = re.findall(r"^#+ (.*)$", there.read_text(), re.M) if anchor and there.is_file() else []
            anchors = {re.sub(r"[^\w -]", "", heading).strip().lower().replace(" ", "-") for heading in headings}
            if not there.exists() or (anchor and anchor not in anchors):
                lost.append(f"{path.name}: {target}#{anchor}")
    assert lost == []


def settings_table(cls):
    """The settings of a class as the docs show them."""
    lines = ["| setting | default | what | range |", "|---|---|---|---|"]
    for f in fields(cls):
        low, high, among = (f.metadata[k] for k in ("low", "high", "among"))
        within = f"at least {low:g}" if math.isinf(high) else f"{low:g} to {high:g}"
        span = ", ".join(among) if among else "" if math.isinf(low) and math.isinf(high) else within
        default = "by the bank" if f.default is None else json.dumps(f.default).strip('"')
        lines.append(f"| `{f.name}` | {default} | {f.metadata['about']} | {span} |".replace("|ECP - alpha|", r"\|ECP - alpha\|").replace("  |", " |"))
    return "\n".join(lines)


SETTINGS_OF = {name: find(name).settings_class for name in ESTIMATORS}


@pytest.mark.parametrize(("document", "cls"), [*(("estimators.md", cls) for cls in SETTINGS_OF.values()),
                                               ("how-to.md", TrainSettings), ("equivariance.md", SymmetrySettings), ("gate.md", Criteria), ("gate.md", AttackSettings)])
def test_the_docs_list_the_settings_as_the_code_has_them(document, cls):
    text = (ROOT / "docs" / document).read_text()
    shown = re.search(rf"<!-- settings: {cls.__name__} -->\n\n((?:\|.*\n)*)", text)
    assert shown, f"{document} has no place for {cls.__name__}"
    assert shown[1].strip() == settings_table(cls), f"put this under <!-- settings: {cls.__name__} --> in docs/{document}:\n{settings_table(cls)}"


def test_the_docs_show_every_room_on_its_floor():
    """docs/house.md against the contract that lint-imports holds."""
    contract = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]["contracts"][0]["layers"]
    wanted = {room.strip().removeprefix("sbiplat."): len(contract) - 1 - k for k, floor in enumerate(contract) for room in re.split("[:|]", floor)}
    shown = {}
    for floor, rooms in re.findall(r"^\| (\d+) \| (.*?) \|", (ROOT / "docs" / "house.md").read_text(), re.M):
        shown |= {room.strip("`/ ").removesuffix(".py"): int(floor) for room in rooms.split(",")}
    assert shown == wanted
    there = {p.stem for p in (ROOT / "sbiplat").iterdir() if (p.suffix == ".py" or (p / "__init__.py").exists()) and p.stem != "__init__"}
    assert set(wanted) == there, "a room that no floor holds may import what it likes"


def test_the_reader_in_the_docs_computes_a_banks_digest(tmp_path):
    """docs/bank-format.md is enough to write a reader: its own reads banks of both forms, extended ones, and sees damage."""
    reader, streams = (text for language, text in blocks(ROOT / "docs" / "bank-format.md") if language == "python")
    prior = sp.Prior({"a": sp.Uniform(0, 1), "b": sp.Gamma(2, 3)})

    def scalar(theta, rng):
        return theta[0] + rng.standard_normal(4)

    def block(theta, rng):
        return {"two": theta + rng.standard_normal(theta.shape), "one": theta[:, 0]}

    made = [sp.simulator(prior=prior, x_shape=4)(scalar),
            sp.simulator(prior=prior, x_shape={"two": (2,), "one": ()}, batched=True, dtype="float64")(block)]
    for simulator in made:
        path = tmp_path / simulator.name
        sp.simulate(simulator, 100, 7, path, block_size=32, workers=1)
        bank = sp.simulate(simulator, 250, 7, path, workers=1)
        told = run_snippet(reader, path)
        assert told.returncode == 0, told.stderr
        assert told.stdout.strip() == bank.digest
        for row in (99, 249):
            assert run_snippet(streams, path, row).stdout.strip() == "True"
    segment = max((tmp_path / "scalar" / "segments").glob("*.h5"))
    data = bytearray(segment.read_bytes())
    at = data.rindex(bytes(bank_bytes(tmp_path / "scalar")))
    data[at] ^= 1
    segment.write_bytes(data)
    assert "is damaged" in run_snippet(reader, tmp_path / "scalar").stderr


def run_snippet(text, *words):
    return subprocess.run([sys.executable, "-c", text, *map(str, words)], capture_output=True, text=True, timeout=60)


def bank_bytes(path):
    """The last row's x, as it lies in its segment."""
    return sp.Bank.open(path).x[-1].tobytes()


def api_table():
    """Every public name and what it is, from the code."""
    rows = ["| name | what |", "|---|---|"]
    for name in sp.__all__:
        rows.append(f"| `{name}` | {inspect.getdoc(getattr(sp, name)).splitlines()[0].replace('|', chr(92) + '|')} |")
    return "\n".join(rows)


def test_the_docs_list_the_public_names():
    shown = (ROOT / "docs" / "api.md").read_text().partition("<!-- api -->\n\n")[2].strip()
    assert shown == api_table(), f"put this under <!-- api --> in docs/api.md:\n{api_table()}"
