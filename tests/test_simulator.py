"""Simulators: the contract and its breaches, the registry, and the digest of the source."""

import functools
import subprocess
import sys
import textwrap
from types import SimpleNamespace

import numpy as np
import pytest

from sbiplat.errors import SimulatorError, UserError
from sbiplat.prior import Normal, Prior, Uniform
from sbiplat.simulator import Simulator, address, available, check, resolve, simulator, source_digest

PRIOR = Prior({"a": Normal(0, 1), "b": Uniform(0, 1)})


@pytest.fixture(autouse=True)
def registry(monkeypatch):
    """A registry of the test's own."""
    module = sys.modules[simulator.__module__]
    monkeypatch.setattr(module, "_registered", {})
    monkeypatch.setattr(module, "_ambiguous", {})


def made(function, **settings):
    return simulator(**{"prior": PRIOR, "x_shape": (2,), "name": "mine", **settings})(function)


def write(path, text):
    path.write_text(textwrap.dedent(text))
    return path


# --------------------------------------------------------------------------------------------------------- contract


@pytest.mark.parametrize("settings", [dict(batched=True), dict(batched=False)])
def test_a_sound_simulator_passes(settings):
    result = check(made(lambda theta, rng: theta + rng.standard_normal(theta.shape), **settings), 8)
    assert (result.finite, result.raised) == (1.0, 0.0)


def test_the_share_of_rows_that_fail_is_counted():
    def fails(theta, rng):
        if theta[1] < 0.5:
            raise ValueError("too small")
        return theta

    result = check(made(fails), 400)
    assert result.raised == pytest.approx(0.5, abs=0.1)  # four sd of 400 coin throws
    assert result.first_error == "ValueError: too small"


def test_a_simulator_that_mostly_fails_is_not_refused_for_two_unlucky_rows():
    def rarely(theta, rng):
        return theta if theta[1] < 0.3 else np.full(2, np.nan)

    assert check(made(rarely), 1).finite > 0


def writes(theta, rng):
    theta[...] = 0
    return theta


def global_noise(theta, rng):
    return theta + np.random.default_rng().standard_normal(theta.shape)


def raises(theta, rng):
    raise RuntimeError("never\nworks")


def one_size(theta, rng):
    if len(theta) == 1:
        raise ValueError("squeezed away")
    return theta


def leaves(theta, rng):
    sys.exit(3)


BUFFER = np.zeros(2, np.float32)


def remembers(theta, rng):
    BUFFER[...] += theta
    return BUFFER


@pytest.mark.parametrize(("function", "settings", "why"), [
    (lambda theta, rng: theta[:1], {}, r"x has shape \(1,\), declared is \(2,\); change what it returns, or its x_shape"),
    (lambda theta, rng: theta[:1], {"batched": True}, r"x has shape \(1, 2\), declared is \(5, 2\)"),
    (lambda theta, rng: {"x": theta}, {}, "x is a dict"),
    (lambda theta, rng: theta, {"x_shape": {"u": 2}}, "x is a ndarray, declared is a dict"),
    (lambda theta, rng: {"v": theta}, {"x_shape": {"u": 2}}, "arrays v; declared are u"),
    (lambda theta, rng: None, {}, "dtype object"),
    (lambda theta, rng: theta + 1j, {}, "dtype complex128"), (writes, {}, "writes to its theta"),
    (global_noise, {}, "different x for the same theta"),
    (remembers, {}, "different x"), (raises, {}, r"raised \(RuntimeError: never\) on every one of 32 rows"),
    (leaves, {}, "SystemExit: 3"),
    (lambda theta, rng: theta * np.nan, {}, "NaN or infinite x on every one"),
    (one_size, {"batched": True}, "raised for 1 rows at once but not for another number: ValueError: squeezed away"),
])
def test_each_breach_has_its_message(function, settings, why):
    with pytest.raises(SimulatorError, match=why) as told:
        check(made(function, **settings), 5)
    assert "\n" not in str(told.value)


def test_a_check_of_no_rows_is_refused():
    with pytest.raises(SimulatorError, match="at least 1 row"):
        check(made(lambda theta, rng: theta), 0)


@pytest.mark.parametrize(("declare", "why"), [
    (lambda: made(lambda theta: theta), r"must take \(theta, rng\), its signature is mine\(theta\)"),
    (lambda: made(3), "decorates a function"),
    (lambda: made(lambda theta, rng: 0, prior={"a": 1}), "expected one of"),
    (lambda: made(lambda theta, rng: 0, x_shape=(0,)), "positive"),
])
def test_a_wrong_declaration_is_refused_when_it_is_made(declare, why):
    with pytest.raises(UserError, match=why):
        declare()


def test_rows_are_copies_where_the_simulator_fills_one_buffer():
    def fills(theta, rng):
        BUFFER[...] = theta
        return BUFFER

    theta = np.arange(6.0).reshape(3, 2)
    rows = made(fills).rows(theta, [np.random.default_rng(0)] * 3)
    np.testing.assert_array_equal(np.stack([row["x"] for row in rows]), theta)


# --------------------------------------------------------------------------------------------------------- registry


def test_installed_simulators_are_found_by_name():
    assert set(available()) >= {"two_moons", "slcp"}
    assert resolve("two_moons").name == "two_moons"


def test_an_unknown_name_lists_the_nearest():
    with pytest.raises(SimulatorError, match="no simulator is called 'two_mons'; did you mean two_moons"):
        resolve("two_mons")
    with pytest.raises(SimulatorError, match=r"registered: .*slcp.*two_moons"):
        resolve("qqqqqqqq")


def test_a_cell_that_is_run_again_replaces_the_former():
    scope = {"__name__": "__main__"}
    for k in (1, 2):
        exec(compile(f"def cell(theta, rng): return theta * {k}", f"<cell {k}>", "exec"), scope)
        latest = made(scope["cell"], name="cell")
    assert resolve("cell") is latest


def test_two_functions_of_one_name_are_refused_by_name_with_both_places():
    first, second = made(writes, name="twice"), made(raises, name="twice")
    with pytest.raises(SimulatorError,
                       match=r"test_simulator.py:\d+ and .*test_simulator.py:\d+; give one another name=") as told:
        resolve("twice")
    assert str(writes.__code__.co_firstlineno) in str(told.value)
    assert resolve(first) is first
    assert resolve(second) is second


SOUND = """
    import sbiplat as sp
    @sp.simulator(prior=sp.Prior({"a": sp.Uniform(0, 1)}), x_shape=(1,))
    def sound(theta, rng):
        return theta
    other = 3
"""


def test_a_file_and_its_object_are_resolved_and_addressed(tmp_path):
    path = write(tmp_path / "my.sim.py", SOUND)
    found = resolve(f"{path}:sound")
    assert isinstance(found, Simulator)
    assert address(found.function) == f"{path}:sound"
    assert resolve(f"{path}:sound") is found


@pytest.mark.parametrize(("text", "attribute", "why"), [
    (SOUND, ":nothing", "'nothing' in .* does not exist; simulators there: sound"),
    (SOUND, ":other", "'other' in .* is not decorated"),
    (SOUND, "", "say which object, as .*sim.py:sound; simulators there: sound"), (SOUND, ":", "say which object"),
    ("raise ValueError('one\\ntwo\\nthree')", ":f", "failed to load: ValueError: one"),
    ("raise SystemExit('bye')", ":f", "SystemExit: bye"),
    ("x = 1\ny = (\n", ":f", r"failed to load: SyntaxError at sim.py, line 2"),
    ("import nowhere_at_all", ":f", "No module named 'nowhere_at_all'"),
    ("import sbiplat as sp\nsp.Prior({})", ":f", "PriorError: a prior needs"),
])
def test_a_file_that_cannot_be_used_is_one_line(text, attribute, why, tmp_path):
    path = write(tmp_path / "sim.py", text)
    with pytest.raises(SimulatorError, match=why) as told:
        resolve(f"{path}{attribute}")
    assert "\n" not in str(told.value)


@pytest.mark.parametrize(("spec", "why"), [
    ("nowhere/sim.py:f", "no simulator file at .*nowhere/sim.py"), ("no_such_package.sims:f", "no module 'no_such_package'"),
    ("simulators.no_such:f", "no module 'simulators.no_such'"), (":f", "importing  failed"),
])
def test_a_place_that_is_not_there_is_named(spec, why):
    with pytest.raises(SimulatorError, match=why):
        resolve(spec)


# ----------------------------------------------------------------------------------------------- digest of the source

MODEL = """
    import math
    from helper import scale, unused
    import sbiplat as sp

    try:
        import numpy as np
    except ImportError:
        RATE = 0.0
    if math.pi > 3:
        RATE = 2.0
    for k in range(3):
        TABLE = {k: RATE}
    TABLE[5] = 7.0
    ITEMS = []
    ITEMS.append(4.0)
    OTHER = 1.0

    def _inner(u):
        return scale(u) * TABLE[2] + ITEMS[0]

    def unrelated():
        return OTHER

    @sp.simulator(prior=sp.Prior({"a": sp.Uniform(0, 1)}), x_shape=(1,))
    def model(theta, rng):
        '''Doc.'''
        return _inner(theta)

    if __name__ == "__main__":
        ITEMS.clear()
"""
HELPER = """
    from deeper import power
    FACTOR = 2.0
    def scale(u):
        return FACTOR * u ** power
    def unused():
        return 1
"""


def digest_of_files(folder, model=MODEL, helper=HELPER, deeper="power = 1.0\n"):
    """In a process of its own: modules of one name may not meet."""
    folder.mkdir(exist_ok=True)
    for name, text in (("model.py", model), ("helper.py", helper), ("deeper.py", deeper)):
        write(folder / name, text)
    code = f"from sbiplat.simulator import resolve; print(resolve({str(folder / 'model.py')!r} + ':model').source_digest())"
    return subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout.strip()


@pytest.fixture(scope="module")
def first_digest(tmp_path_factory):
    return digest_of_files(tmp_path_factory.mktemp("first"))


@pytest.mark.parametrize("change", [
    {"model": MODEL.replace("RATE = 2.0", "RATE = 3.0")}, {"model": MODEL.replace("TABLE[5] = 7.0", "TABLE[5] = 8.0")},
    {"model": MODEL.replace("append(4.0)", "append(5.0)")}, {"model": MODEL.replace("+ ITEMS[0]", "- ITEMS[0]")},
    {"helper": HELPER.replace("FACTOR = 2.0", "FACTOR = 2.5")}, {"deeper": "power = 1.5\n"},
], ids=["in an if", "an item", "a call", "a function", "a neighbour", "a neighbour's neighbour"])
def test_a_change_that_decides_what_is_simulated_changes_the_digest(change, first_digest, tmp_path):
    assert digest_of_files(tmp_path / "changed", **change) != first_digest


def test_a_change_that_decides_nothing_keeps_the_digest(first_digest, tmp_path):
    model = MODEL.replace("OTHER = 1.0", "OTHER = 2.0  # more").replace("Doc.", "Another text.").replace("ITEMS.clear()",
                                                                                                         "print(model)")
    helper = HELPER.replace("return 1", "return 2")
    assert digest_of_files(tmp_path / "elsewhere", model=model, helper=helper) == first_digest


def scaled(factor, theta, rng):
    return factor * theta


def closure(factor):
    def inner(theta, rng):
        return factor * theta

    return inner


class Callable:
    def __init__(self, factor):
        self.factor = factor

    def __call__(self, theta, rng):
        return self.factor * theta


KINDS = {"partial": lambda f: functools.partial(scaled, f), "closure": closure, "object": Callable,
         "method": lambda f: Callable(f).__call__}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("one", "another"), [(1.0, 2.0), (np.arange(2), np.arange(2) + 1), ([1, {"a": 2}], [1, {"a": 3}]),
                                              (SimpleNamespace(v=1), SimpleNamespace(v=2))],
                                              ids=["number", "array", "list", "object"])
def test_what_a_callable_carries_counts(kind, one, another):
    build = KINDS[kind]
    assert source_digest(build(one)) == source_digest(build(one))
    assert source_digest(build(one)) != source_digest(build(another))


def test_without_a_file_the_globals_that_are_used_count():
    def digest(rate, other=0):
        scope = {"__name__": "__main__", "RATE": rate, "OTHER": other}
        exec("def inner(u): return RATE * u\ndef f(theta, rng): return [inner(t) for t in theta]", scope)
        return source_digest(scope["f"])

    assert digest(1.0) == digest(1.0, other=5)
    assert digest(1.0) != digest(2.0)


def test_the_digest_is_the_same_in_every_process():
    code = ("import sys; sys.path.insert(0, sys.argv[1]); import test_simulator as t; "
            "print(t.source_digest(t.Callable([1, {'a', 'b', 'c'}, t.closure(2)])))")
    digests = {subprocess.run([sys.executable, "-c", code, __file__.rpartition("/")[0]], check=True, capture_output=True,
                              env={"PYTHONHASHSEED": str(k)}).stdout for k in (1, 2)}
    assert len(digests) == 1
