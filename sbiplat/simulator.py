"""Simulators: a callable with its prior, the shape of its x, and what is known of it; the registry; contract checks.

    @sp.simulator(prior=sp.Prior({...}), x_shape=(200,))
    def pulse(theta, rng):              # theta: float64 (D,); rng: numpy.random.Generator of this row alone
        return ...                      # x: (200,)

    @sp.simulator(prior=..., x_shape={"a": (3,), "b": (64, 64)}, batched=True)
    def image(theta, rng):              # theta: (B, D); rng: the block's
        return {"a": ..., "b": ...}     # (B, 3) and (B, 64, 64)

A simulator is found by name (the entry points `sbiplat.simulators` of installed packages, or what this process has
decorated), as `path/to/file.py:object`, or as `package.module:object`. The decorator checks what it is given; the
dynamic contract (`check`) runs before a bank is begun and under `sbiplat simulators NAME`.
"""

from __future__ import annotations

import ast
import difflib
import hashlib
import importlib
import importlib.util
import inspect
import sys
import textwrap
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sbiplat.errors import ObservationError, SimulatorError
from sbiplat.observation import Fields, ObservationSpec
from sbiplat.prior import Prior

ENTRY_POINTS = "sbiplat.simulators"
_registered: dict[str, Simulator] = {}


@dataclass(frozen=True, eq=False)
class Simulator:
    """A registered simulator. Calling it calls the user's function.

    The tractable parts are optional: `log_likelihood(theta (N, D), x) -> (N,)`, the exact posterior's
    `posterior_log_prob(theta (N, D), x) -> (N,)` and `posterior_sampler(x, n, rng) -> (n, D)`.
    """

    function: Callable[..., Any]
    name: str
    prior: Prior
    x: ObservationSpec
    batched: bool = False
    citation: str = ""
    log_likelihood: Callable[..., NDArray[np.float64]] | None = None
    posterior_log_prob: Callable[..., NDArray[np.float64]] | None = None
    posterior_sampler: Callable[..., NDArray[np.float64]] | None = None
    spec: str = field(default="", compare=False)  # how another process finds it again

    def __call__(self, theta: NDArray[np.float64], rng: np.random.Generator) -> Any:
        return self.function(theta, rng)

    @property
    def summary(self) -> str:
        """The first line of the function's docstring."""
        return (inspect.getdoc(self.function) or "").split("\n", 1)[0]

    def rows(self, theta: NDArray[np.float64], rngs: Sequence[np.random.Generator]) -> list[Any]:
        """x for each theta (n, D): n calls with their own streams, or one batched call with the first stream."""
        if self.batched:
            fields = self.conform(self(theta, rngs[0]), (len(theta),))
            return [{k: v[i] for k, v in fields.items()} for i in range(len(theta))]
        return [self.conform(self(t, rng)) for t, rng in zip(theta, rngs, strict=True)]

    def conform(self, x: Any, lead: tuple[int, ...] = ()) -> Fields:
        """x as the bank stores it; a `SimulatorError` that names the mend where it is not as declared."""
        try:
            return self.x.conform(x, lead)
        except ObservationError as error:
            raise SimulatorError(f"simulator {self.name!r}: {error}; change what it returns, or its x_shape") from None

    def source_digest(self) -> str:
        """SHA-256 of the code that decides what is simulated; comments, docstrings and unrelated code do not count."""
        return source_digest(self.function)


def simulator(
    *,
    prior: Prior | Mapping[str, Any],
    x_shape: Sequence[int] | int | Mapping[str, Sequence[int]],
    batched: bool = False,
    name: str | None = None,
    dtype: str = "float32",
    x_transform: str | Mapping[str, str] | None = None,
    x_labels: Sequence[str] = (),
    x_axis: tuple[str, Sequence[float]] | None = None,
    x_unit: str = "",
    citation: str = "",
    log_likelihood: Callable[..., Any] | None = None,
    posterior_log_prob: Callable[..., Any] | None = None,
    posterior_sampler: Callable[..., Any] | None = None,
) -> Callable[[Callable[..., Any]], Simulator]:
    """Register a function `(theta, rng) -> x` as a simulator; see the module's docstring for its two forms.

    dtype: of stored x, "float32" or "float64". x_transform: "log" or "asinh" where x spans decades (nets read the
    transformed x). x_labels: names along the last axis. x_axis: (name, values) along the first. x_unit: of x.
    """
    if not isinstance(prior, Prior):
        prior = Prior(prior)
    x = ObservationSpec.declare(x_shape, dtype, x_transform, x_labels, x_axis, x_unit)

    def register(function: Callable[..., Any]) -> Simulator:
        if not callable(function):
            raise SimulatorError(f"@sp.simulator decorates a function (theta, rng) -> x, got {function!r}")
        own_name = name or getattr(function, "__name__", "simulator")
        try:
            inspect.signature(function).bind(None, None)
        except TypeError:
            raise SimulatorError(f"simulator {own_name!r}: must take (theta, rng), its signature is "
                                 f"{own_name}{inspect.signature(function)}") from None
        except ValueError:
            pass  # a compiled callable without a signature
        made = Simulator(function, own_name, prior, x, batched, citation, log_likelihood, posterior_log_prob, posterior_sampler,
                         address(function))
        _registered[own_name] = made
        return made

    return register


# ---------------------------------------------------------------------------------------------------- the registry


def available() -> dict[str, str]:
    """Registered names -> where each comes from (an entry point's `module:object`, or this process)."""
    found = {point.name: point.value for point in entry_points(group=ENTRY_POINTS)}
    return {**found, **{name: made.spec for name, made in _registered.items() if name not in found}}


def resolve(spec: str | Simulator) -> Simulator:
    """The simulator that `spec` names: a registered name, `file.py:object`, or `module:object`."""
    if isinstance(spec, Simulator):
        return spec
    if ":" in spec:
        place, _, attribute = spec.rpartition(":")
        module = load_file(Path(place)) if place.endswith(".py") else _import(place, spec)
        found = getattr(module, attribute, None)
        if not isinstance(found, Simulator):
            have = [k for k, v in vars(module).items() if isinstance(v, Simulator)]
            what = "is not decorated with @sp.simulator" if found is not None else "does not exist"
            raise SimulatorError(f"{attribute!r} in {place} {what}; simulators there: {', '.join(have) or 'none'}")
        return found
    points = {point.name: point for point in entry_points(group=ENTRY_POINTS)}
    if spec in points:
        return resolve(points[spec].value)
    if spec in _registered:
        return _registered[spec]
    known = sorted({*points, *_registered})
    near = difflib.get_close_matches(spec, known, 3, 0.5)
    hint = f"did you mean {' or '.join(near)}?" if near else f"registered: {', '.join(known) or 'none'}"
    raise SimulatorError(f"no simulator is called {spec!r}; {hint} (or give file.py:object)")


def _import(module: str, spec: str) -> Any:
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name and (module == error.name or module.startswith(error.name + ".")):
            raise SimulatorError(f"{spec}: there is no module {error.name!r}; give an importable module or path/to/file.py:object") from None
        raise SimulatorError(f"{spec}: importing {module} failed: {error}") from error
    except Exception as error:
        raise SimulatorError(f"{spec}: importing {module} failed: {type(error).__name__}: {error}") from error


def load_file(path: Path) -> Any:
    path = path.expanduser().resolve()
    if not path.is_file():
        raise SimulatorError(f"no simulator file at {path}")
    name = f"sbiplat_user_{hashlib.sha256(str(path).encode()).hexdigest()[:12]}_{path.stem}"
    if name in sys.modules:
        return sys.modules[name]
    loaded = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(loaded)
    sys.modules[name] = module
    sys.path.insert(0, str(path.parent))  # its neighbours, as if it were run as a script
    try:
        loaded.loader.exec_module(module)
    except Exception as error:
        del sys.modules[name]
        raise SimulatorError(f"{path} failed to load: {type(error).__name__}: {error}") from error
    finally:
        sys.path.remove(str(path.parent))
    return module


def address(function: Callable[..., Any]) -> str:
    """`file.py:object` or `module:object` for another process; empty where there is none (a notebook, a closure)."""
    qualname, module = getattr(function, "__qualname__", "<>"), getattr(function, "__module__", "")
    if "<" in qualname or "." in qualname:
        return ""
    if module == "__main__" or module.startswith("sbiplat_user_"):
        file = getattr(sys.modules.get(module), "__file__", None)
        return f"{Path(file).resolve()}:{qualname}" if file else ""
    return f"{module}:{qualname}"


def source_digest(function: Callable[..., Any]) -> str:
    """SHA-256 of a function or class and of all that it uses from its own file; see `_relevant_source`."""
    return hashlib.sha256(_relevant_source(function).encode()).hexdigest()


def _relevant_source(function: Callable[..., Any]) -> str:
    """The function and every module-level name it uses, transitively, in its own file, as normalised source."""
    function = inspect.unwrap(function)
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(inspect.getmodule(function))))
        own = ast.parse(textwrap.dedent(inspect.getsource(function))).body[0]
    except (OSError, TypeError, SyntaxError, IndexError):
        code = getattr(function, "__code__", None)
        return f"{code.co_code.hex()} {code.co_names} {code.co_consts!r}" if code else repr(type(function))
    table: dict[str, list[ast.stmt]] = {}
    for statement in tree.body:
        for name in _defined(statement):
            table.setdefault(name, []).append(statement)
    seen: list[ast.stmt] = [own]
    for statement in seen:  # grows while it is walked
        if isinstance(statement, ast.FunctionDef | ast.ClassDef):
            statement.decorator_list = []
        for node in ast.walk(statement):
            if isinstance(node, ast.Name):
                seen.extend(s for s in table.get(node.id, []) if s not in seen and getattr(s, "lineno", 0) != 0
                            and getattr(s, "name", None) != own.name)
    texts = [ast.unparse(_without_docstrings(s)) for s in seen]
    return "\n".join([texts[0], *sorted(texts[1:])])


def _defined(statement: ast.stmt) -> list[str]:
    if isinstance(statement, ast.FunctionDef | ast.ClassDef):
        return [statement.name]
    if isinstance(statement, ast.Assign | ast.AnnAssign | ast.AugAssign):
        targets = statement.targets if isinstance(statement, ast.Assign) else [statement.target]
        return [n.id for t in targets for n in ast.walk(t) if isinstance(n, ast.Name)]
    if isinstance(statement, ast.Import | ast.ImportFrom):
        return [(a.asname or a.name).split(".")[0] for a in statement.names]
    return []


def _without_docstrings(tree: ast.stmt) -> ast.stmt:
    for node in ast.walk(tree):
        body = getattr(node, "body", None)
        if isinstance(body, list) and body and isinstance(body[0], ast.Expr) and isinstance(body[0].value, ast.Constant) \
                and isinstance(body[0].value.value, str):
            node.body = body[1:] or [ast.Pass()]
    return tree


# ------------------------------------------------------------------------------------------------- contract checks


@dataclass(frozen=True)
class CheckResult:
    """What the contract check saw: rows tried, the share of them with finite x, and the share that raised."""

    rows: int
    finite: float
    raised: float
    first_error: str = ""


def check(simulator: Simulator, rows: int = 64, seed: int = 0) -> CheckResult:
    """Run a few rows and hold them against the declaration; raises SimulatorError at the first breach.

    Checked: shape and dtype of x; the same stream gives the same x; theta is not written to; a batched simulator
    gives one x a row for any B; at least one row is finite. Rows that raise are counted (a bank records them), but all
    raising is a breach.
    """
    streams = [np.random.SeedSequence(seed, spawn_key=(2**32 - 1, row)) for row in range(rows)]
    theta = simulator.prior.sample_each([np.random.default_rng(s) for s in streams])
    sizes = [rows, 1] if simulator.batched and rows > 1 else [rows if simulator.batched else 1]
    runs = [(theta[:size], streams[0]) for size in sizes] if simulator.batched else list(zip(theta, streams, strict=True))
    finite = raised = 0
    first_error = ""
    for inputs, stream in runs:
        lead = inputs.shape[:1] if simulator.batched else ()
        weight = lead[0] if lead else 1
        given = inputs.copy()
        try:
            x = simulator(given, np.random.default_rng(stream))
        except Exception as error:  # the user's own code: anything may come
            raised += weight
            first_error = first_error or f"{type(error).__name__}: {error}"
            continue
        fields = simulator.conform(x, lead)
        if not np.array_equal(given, inputs):
            raise SimulatorError(f"simulator {simulator.name!r} writes to its theta; work on a copy (theta = theta.copy())")
        again = simulator.conform(simulator(inputs.copy(), np.random.default_rng(stream)), lead)
        if any(not np.array_equal(again[k], fields[k], equal_nan=True) for k in fields):
            raise SimulatorError(f"simulator {simulator.name!r} gives a different x for the same theta and the same stream; "
                                 "draw all randomness from its rng argument, and none from np.random, random or torch")
        good = np.ones(lead, bool)
        for values in fields.values():
            good = good & np.isfinite(values).reshape(*lead, -1).all(-1)
        finite += int(good.sum())
    total = sum(sizes) if simulator.batched else rows
    if raised == total:
        raise SimulatorError(f"simulator {simulator.name!r} raised on every one of {total} rows drawn from its prior; first: {first_error}")
    if finite == 0:
        raise SimulatorError(f"simulator {simulator.name!r} gave NaN or infinite x on every one of {total} rows drawn from its prior")
    return CheckResult(total, finite / total, raised / total, first_error)
