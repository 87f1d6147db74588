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

import difflib
import functools
import hashlib
import importlib
import importlib.util
import inspect
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sbiplat.errors import ObservationError, SimulatorError
from sbiplat.observation import Fields, ObservationSpec
from sbiplat.observe import Observe, check_observe
from sbiplat.prior import Prior
from sbiplat.source import source_digest

ENTRY_POINTS = "sbiplat.simulators"
_registered: dict[str, Simulator] = {}
_ambiguous: dict[str, set[str]] = {}  # name -> the places of the different functions that claim it


@dataclass(frozen=True, eq=False)
class Simulator:
    """A registered simulator. Calling it calls the user's function.

    The tractable parts are optional: `log_likelihood(theta (N, D), x) -> (N,)`, the exact posterior's
    `posterior_log_prob(theta (N, D), x) -> (N,)` and `posterior_sampler(x, n, rng) -> (n, D)`.

    Where it has `observe`, the function gives the signal, which is what banks hold, of the form `signal`; x is what observe
    makes of it (see observe.py). Without, both are the same.
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
    time_limit: float | None = None
    about: str = ""
    observe: Observe | None = None
    parallel: bool = False
    symmetry: Any = None  # a symmetry.GroupAction, or what makes one
    spec: str = field(default="", compare=False)  # how another process finds it again

    def __call__(self, theta: NDArray[np.float64], rng: np.random.Generator, comm: Any = None) -> Any:
        """What the function gives; one that runs on MPI ranks gets `comm`, by default this process alone."""
        if not self.parallel:
            return self.function(theta, rng)
        if comm is None:
            from mpi4py import MPI

            comm = MPI.COMM_SELF
        return self.function(theta, rng, comm)

    @property
    def signal(self) -> ObservationSpec:
        """The form of what the function returns and a bank holds."""
        return self.observe.signal if self.observe else self.x

    @property
    def summary(self) -> str:
        """What was said of it, or the first line of the function's docstring."""
        return self.about or (inspect.getdoc(self.function) or "").split("\n", 1)[0]

    def rows(self, theta: NDArray[np.float64], rngs: Sequence[np.random.Generator]) -> list[Any]:
        """x for each theta (n, D), observed: n calls with their own streams, or one batched call with the first stream."""
        if self.batched:
            fields = self.conform(self(theta, rngs[0]), (len(theta),))
        else:
            rows = [_copied(self.conform(self(t, rng))) for t, rng in zip(theta, rngs, strict=True)]
            fields = {k: np.stack([row[k] for row in rows]) for k in rows[0]}
        if self.observe:
            fields = self.observe.on_arrays(fields, theta, int(rngs[0].integers(2**62)))
        return [{k: v[i] for k, v in fields.items()} for i in range(len(theta))]

    def conform(self, x: Any, lead: tuple[int, ...] = ()) -> Fields:
        """What the function returned as the bank stores it; a `SimulatorError` with the mend where it is not as declared."""
        try:
            return self.signal.conform(x, lead)
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
    summary: str = "",
    time_limit: float | None = None,
    log_likelihood: Callable[..., Any] | None = None,
    posterior_log_prob: Callable[..., Any] | None = None,
    posterior_sampler: Callable[..., Any] | None = None,
    observe: Callable[..., Any] | None = None,
    signal_shape: Any = None,
    parallel: bool = False,
    symmetry: Any = None,
) -> Callable[[Callable[..., Any]], Simulator]:
    """Register a function `(theta, rng) -> x` as a simulator; see the module's docstring for its two forms.

    dtype: of stored x, "float32" or "float64". x_transform: "log" or "asinh" where x spans decades (nets read the
    transformed x). x_labels: names along the last axis. x_axis: (name, values) along the first. x_unit: of x.
    summary: a line on it, by default the docstring's first. time_limit: seconds a call may take (a row, or a block where it is
    batched); a row that takes longer is marked timed-out. observe: `(signal, theta, rng) -> x` in torch, where the function gives a
    signal of `signal_shape` (by default x_shape): noise that is drawn afresh in every epoch, see observe.py. parallel: the function is
    `(theta, rng, comm) -> x` and runs on all MPI ranks of comm at once, each with the same theta and rng; x is that of its rank 0.
    symmetry: a group that moves theta and x together (see `sbiplat.symmetry`), for `train(..., symmetry="gnpe")`.
    """
    if time_limit is not None and not (isinstance(time_limit, int | float) and time_limit > 0):
        raise SimulatorError(f"time_limit must be a number of seconds, got {time_limit!r}")
    if not isinstance(prior, Prior):
        prior = Prior(prior)
    x = ObservationSpec.declare(x_shape, dtype, x_transform, x_labels, x_axis, x_unit)

    if signal_shape is not None and observe is None:
        raise SimulatorError("signal_shape is of what observe takes: give observe too, or leave it away")

    def observer(own_name: str) -> Observe | None:
        signal = ObservationSpec.declare(signal_shape or x_shape, dtype)
        return Observe(observe, own_name, signal, x) if observe else None

    def register(function: Callable[..., Any]) -> Simulator:
        if not callable(function):
            raise SimulatorError(f"@sp.simulator decorates a function (theta, rng) -> x, got {function!r}")
        own_name = name or getattr(_innermost(function), "__name__", type(function).__name__)
        try:
            inspect.signature(function).bind(*[None] * (3 if parallel else 2))
        except TypeError:
            raise SimulatorError(f"simulator {own_name!r}: must take (theta, rng{', comm' if parallel else ''}), its signature is "
                                 f"{own_name}{inspect.signature(function)}") from None
        except ValueError:
            pass  # a compiled callable without a signature
        made = Simulator(function, own_name, prior, x, batched, citation, log_likelihood, posterior_log_prob, posterior_sampler,
                         time_limit, summary, observer(own_name), parallel, symmetry, address(function))
        _register(made)
        return made

    return register


def _copied(fields: Fields) -> Fields:
    """The same values in memory of their own: a simulator may fill one buffer again and again."""
    return {name: values.copy() for name, values in fields.items()}


def _innermost(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function inside partials and wrappers."""
    while isinstance(function, functools.partial):
        function = function.func
    return inspect.unwrap(function)


# ---------------------------------------------------------------------------------------------------- the registry


def _register(made: Simulator) -> None:
    """Enter a simulator under its name. The same function again (a notebook's cell, a reload) replaces the former."""
    former = _registered.get(made.name)
    if former is not None and not _places(former.function) & _places(made.function):
        _ambiguous.setdefault(made.name, {_place(former.function)}).add(_place(made.function))
    _registered[made.name] = made


def _places(function: Callable[..., Any]) -> set[tuple[str, str]]:
    """(module, qualified name) and (file, qualified name): functions that share one of them are the same one."""
    inner = _innermost(function)
    inner = inner if hasattr(inner, "__qualname__") else type(inner)
    file = getattr(getattr(inner, "__code__", None), "co_filename", "") or inner.__module__
    return {(inner.__module__, inner.__qualname__), (file, inner.__qualname__)}


def _place(function: Callable[..., Any]) -> str:
    code = getattr(_innermost(function), "__code__", None)
    return f"{code.co_filename}:{code.co_firstlineno}" if code else repr(function)


def available() -> dict[str, str]:
    """Registered names -> where each comes from (an entry point's `module:object`, or this process)."""
    found = {point.name: point.value for point in entry_points(group=ENTRY_POINTS)}
    return {**found, **{name: made.spec for name, made in _registered.items() if name not in found}}


def resolve(spec: str | Simulator) -> Simulator:
    """The simulator that `spec` names: a registered name, `file.py:object`, or `module:object`."""
    if isinstance(spec, Simulator):
        return spec
    if ":" in spec or spec.endswith(".py"):
        return _resolve_object(spec)
    points = {point.name: point for point in entry_points(group=ENTRY_POINTS)}
    if spec in points:
        return resolve(points[spec].value)
    if spec in _ambiguous:
        raise SimulatorError(f"different functions are registered as {spec!r}, at {' and '.join(sorted(_ambiguous[spec]))}; "
                             "give one another name=, or pass the simulator itself")
    if spec in _registered:
        return _registered[spec]
    known = sorted({*points, *_registered})
    near = difflib.get_close_matches(spec, known, 3, 0.5)
    hint = f"did you mean {' or '.join(near)}?" if near else f"registered: {', '.join(known) or 'none'}"
    raise SimulatorError(f"no simulator is called {spec!r}; {hint} (or give file.py:object)")


def _resolve_object(spec: str) -> Simulator:
    """The simulator at `file.py:object` or `module:object`."""
    place, _, attribute = (f"{spec}:" if spec.endswith(".py") else spec).rpartition(":")
    module = load_module(place, spec)
    have = [k for k, v in vars(module).items() if isinstance(v, Simulator)]
    if not attribute:
        raise SimulatorError(f"{spec}: say which object, as {place}:{have[0] if have else 'NAME'}; simulators there: "
                             f"{', '.join(have) or 'none'}")
    found = getattr(module, attribute, None)
    if not isinstance(found, Simulator):
        what = "is not decorated with @sp.simulator" if found is not None else "does not exist"
        raise SimulatorError(f"{attribute!r} in {place} {what}; simulators there: {', '.join(have) or 'none'}")
    return found


def resolve_prior(spec: str) -> Prior:
    """The prior at `file.py:object` or `module:object`, or that of the simulator there; raises SimulatorError."""
    place, _, attribute = spec.rpartition(":")
    if not place:
        raise SimulatorError(f"no prior is called {spec!r}; give file.py:object or module:object, of an sp.Prior")
    module = load_module(place, spec)
    found = getattr(module, attribute, None)
    if isinstance(found, Prior | Simulator):
        return found if isinstance(found, Prior) else found.prior
    have = [k for k, v in vars(module).items() if isinstance(v, Prior)]
    raise SimulatorError(f"{attribute!r} in {place} {'is no sp.Prior' if found is not None else 'does not exist'}; priors there: "
                         f"{', '.join(have) or 'none'}")


def load_module(place: str, spec: str) -> Any:
    """The module at `path/to/file.py` or of that name; spec: what the user wrote, for errors. Raises SimulatorError."""
    return load_file(Path(place)) if place.endswith(".py") else _import(place, spec)


def _import(module: str, spec: str) -> Any:
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name and (module == error.name or module.startswith(error.name + ".")):
            raise SimulatorError(f"{spec}: there is no module {error.name!r}; "
                                 "give an importable module or path/to/file.py:object") from None
        raise SimulatorError(f"{spec}: importing {module} failed: {_one_line(error)}") from error
    except (Exception, SystemExit) as error:  # the user's own code: anything may come
        raise SimulatorError(f"{spec}: importing {module} failed: {_one_line(error)}") from error


def load_file(path: Path) -> Any:
    """The module in a user's file, run once a process, with the file's folder on the path meanwhile."""
    path = path.expanduser().resolve()
    if not path.is_file():
        raise SimulatorError(f"no simulator file at {path}")
    name = f"sbiplat_user_{hashlib.sha256(str(path).encode()).hexdigest()[:12]}_{path.stem.replace('.', '_')}"
    if name in sys.modules:
        return sys.modules[name]
    loaded = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(loaded)
    sys.modules[name] = module
    sys.path.insert(0, str(path.parent))  # its neighbours, as if it were run as a script
    try:
        loaded.loader.exec_module(module)
    except (Exception, SystemExit) as error:  # the user's own code: anything may come
        del sys.modules[name]
        raise SimulatorError(f"{path} failed to load: {_one_line(error)}") from error
    finally:
        if str(path.parent) in sys.path:
            sys.path.remove(str(path.parent))
    return module


def _one_line(error: BaseException) -> str:
    """The kind of an error and the first line of what it says, with its place where it is one of syntax."""
    if isinstance(error, SyntaxError):
        return f"SyntaxError at {Path(error.filename or '').name}, line {error.lineno}: {error.msg}"
    text = next((line.strip() for line in str(error).splitlines() if line.strip()), "")
    return f"{type(error).__name__}{text and ': '}{text[:300]}"


def address(function: Callable[..., Any]) -> str:
    """`file.py:object` or `module:object` for another process; empty where there is none (a notebook, a closure)."""
    qualname, module = getattr(function, "__qualname__", "<>"), getattr(function, "__module__", "")
    if "<" in qualname or "." in qualname:
        return ""
    if module == "__main__" or module.startswith("sbiplat_user_"):
        file = getattr(sys.modules.get(module), "__file__", None)
        return f"{Path(file).resolve()}:{qualname}" if file else ""
    return f"{module}:{qualname}"


# ------------------------------------------------------------------------------------------------- contract checks

_TRIED_AT_MOST = 32  # rows, while none is finite


@dataclass(frozen=True)
class CheckResult:
    """What the contract check saw: rows tried, the share of them with finite x, and the share that raised."""

    rows: int
    finite: float
    raised: float
    first_error: str = ""


def check(simulator: Simulator, rows: int = 64, seed: int = 0) -> CheckResult:
    """Run a few rows and hold them against the declaration; raises SimulatorError at the first breach.

    Checked: shape and dtype of x; the same stream gives the same x; theta is not written to; a batched simulator gives
    one x a row for every B, and raises for all B or none; at least one row is finite (while none is, up to 32 are
    tried). Rows that raise are counted; a bank records them. Not checked: whether a batched simulator mixes its rows,
    which cannot be told from its use of the block's stream.
    """
    if rows < 1:
        raise SimulatorError(f"the contract check needs at least 1 row, got {rows}")
    streams = [np.random.SeedSequence(seed, spawn_key=(2**32 - 1, row)) for row in range(max(rows, _TRIED_AT_MOST))]
    theta = simulator.prior.sample_each([np.random.default_rng(s) for s in streams])
    if simulator.batched:
        outcomes = {size: _outcome(simulator, theta[:size], streams[0]) for size in (rows, 1)}
        _same_for_all_sizes(simulator, outcomes)
        results = list(outcomes.values())
    else:
        results = []
        for t, stream in zip(theta, streams, strict=True):
            results.append(_outcome(simulator, t, stream))
            if len(results) >= rows and any(r.finite for r in results):
                break
    total, finite, raised = (sum(getattr(r, k) for r in results) for k in ("rows", "finite", "raised"))  # counts as yet
    error = next((r.first_error for r in results if r.first_error), "")
    if finite and simulator.observe:
        _check_signals(simulator, theta, streams)
    if finite == 0:
        what = f"raised ({error})" if raised == total else f"{'raised or ' if raised else ''}gave NaN or infinite x"
        raise SimulatorError(f"simulator {simulator.name!r} {what} on every one of {total} rows drawn from its prior; "
                             "mend it, or narrow the prior")
    return CheckResult(total, finite / total, raised / total, error)


def _check_signals(simulator: Simulator, theta: NDArray[np.float64], streams: list[np.random.SeedSequence]) -> None:
    """The contract of observe, on up to eight finite signals."""
    assert simulator.observe is not None
    if simulator.batched:
        fields, _ = _call(simulator, theta[:8], streams[0])
        signals = [{k: v[i] for k, v in fields.items()} for i in range(8)]
    else:
        signals = [_call(simulator, t, s)[0] for t, s in zip(theta[:8], streams, strict=False)]
    good = [i for i, s in enumerate(signals) if s and all(np.isfinite(v).all() for v in s.values())]
    if good:
        check_observe(simulator.observe, {k: np.stack([signals[i][k] for i in good]) for k in simulator.signal.shapes}, theta[good])


def _outcome(simulator: Simulator, theta: NDArray[np.float64], stream: np.random.SeedSequence) -> CheckResult:
    """One call, theta (D,) or (B, D), made twice; the counts of its rows, or the breach."""
    lead = theta.shape[:-1]
    count = theta.shape[0] if lead else 1
    fields, error = _call(simulator, theta, stream)
    again, _ = _call(simulator, theta, stream)
    same = fields.keys() == again.keys() and all(np.array_equal(again[k], fields[k], equal_nan=True) for k in fields)
    if not same:
        raise SimulatorError(f"simulator {simulator.name!r} gives a different x for the same theta and the same stream; "
                             "draw all randomness from its rng argument, and none from np.random, random or torch")
    good = np.full(lead, not error)
    for values in fields.values():
        good = good & np.isfinite(values).reshape(*lead, -1).all(-1)
    return CheckResult(count, int(good.sum()), count if error else 0, error)


def _call(simulator: Simulator, theta: NDArray[np.float64], stream: np.random.SeedSequence) -> tuple[Fields, str]:
    """(x, "") or ({}, what was raised)."""
    given = theta.copy()
    try:
        x = simulator(given, np.random.default_rng(stream))
    except (Exception, SystemExit) as error:  # the user's own code: anything may come
        return {}, _one_line(error)
    if not np.array_equal(given, theta):
        raise SimulatorError(f"simulator {simulator.name!r} writes to its theta; work on a copy (theta = theta.copy())")
    return _copied(simulator.conform(x, theta.shape[:-1])), ""


def _same_for_all_sizes(simulator: Simulator, outcomes: Mapping[int, CheckResult]) -> None:
    raising = [size for size, result in outcomes.items() if result.raised]
    if raising and len(raising) < len(outcomes):
        size = raising[0]
        raise SimulatorError(f"simulator {simulator.name!r} raised for {size} rows at once but not for another number: "
                             f"{outcomes[size].first_error}; take any number of rows, and give NaN where one fails")
