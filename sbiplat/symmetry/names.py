"""Actions by name: what a simulator or a user may give for one, and how a run names it.

A run holds a ready-made action as what makes it again, and a user's own as its address with the SHA-256 of its code. Reading it back never
runs code that the run names: a user's own is found where this process has named it (`register`, or by training with it), by its code and so
wherever it lies now, under an entry point of the group "sbiplat.actions", or with an installed simulator.
"""

from __future__ import annotations

import hashlib
import inspect
import sys
from collections.abc import Mapping
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

from sbiplat import files, symmetry
from sbiplat.errors import SettingError, SymmetryError, UserError
from sbiplat.simulator import ENTRY_POINTS as SIMULATORS
from sbiplat.simulator import Simulator, address, load_module, resolve
from sbiplat.source import source_digest as digest_of_source
from sbiplat.symmetry.action import GroupAction
from sbiplat.symmetry.product import Product

ENTRY_POINTS = "sbiplat.actions"
READY_MADE = {name: getattr(symmetry, name) for name in symmetry.__all__ if name != "GroupAction"}
_registered: dict[str, GroupAction] = {}


def resolve_action(given: Any) -> GroupAction:
    """The action that is given: itself, a simulator's, what a callable without arguments makes, or of "file.py:object" or "module:object".

    Raises SymmetryError.
    """
    if isinstance(given, GroupAction):
        return given
    if isinstance(given, Simulator):
        if given.symmetry is None:
            raise SymmetryError(f"simulator {given.name!r} has no symmetry: give one, @sp.simulator(..., symmetry=...)")
        return resolve_action(given.symmetry)
    if isinstance(given, str):
        return resolve_action(_found(given))
    if not callable(given):
        raise SymmetryError(f"symmetry = {given!r}: expected a GroupAction, what makes one, or file.py:object")
    try:
        made = given()
    except UserError:
        raise
    except Exception as error:  # the user's own code: anything may come
        raise SymmetryError(f"symmetry: {_name_of(given)}() failed: {type(error).__name__}: {error}".split("\n")[0]) from error
    if not isinstance(made, GroupAction):
        raise SymmetryError(f"symmetry: {_name_of(given)}() gave {made!r}, which is no GroupAction")
    return made


def register(given: Any) -> str:
    """Make a user's action known to this process: an action, a class, a simulator with one, or a text that names one of them.

    Returns the name under which a run records it.
    """
    action = resolve_action(given)
    if action.to_json() is not None:
        return type(action).__name__
    name = _absolute(given) if isinstance(given, str) else _named(given, action)
    _registered[name] = action
    return name


def register_of(simulator: Simulator | str) -> None:
    """Make the action of a simulator known to this process, where it has one."""
    found = resolve(simulator)
    if found.symmetry is not None:
        register(found)


def describe(action: GroupAction, simulator: Simulator | None = None) -> dict[str, Any]:
    """JSON that names an action: a ready-made one by its settings; a user's own, which is registered, by its address and code.

    simulator: whose symmetry it is, by which it is found again where it has no name of its own.
    """
    ready = action.to_json()
    if ready is not None:
        return ready
    name = next((k for k, v in _registered.items() if v is action), "") or _named(action, action, simulator)
    _registered[name] = action
    return {"own": name, "source_digest": source_digest(action)}


def from_json(description: Mapping[str, Any]) -> GroupAction:
    """The action that `describe` described; raises SettingError where it is code of a user's that this process has not named."""
    if "own" not in description:
        return _ready(description)
    name, digest = str(description["own"]), description.get("source_digest")
    action = next((a for a in _registered.values() if source_digest(a) == digest), None) or _registered.get(name) or _installed(name)
    if action is None and _registered:
        raise SettingError(f"the run's symmetry is {name}, and what this process has named, {', '.join(_registered)}, is other code: name "
                           "the one that the run was trained with, wherever it lies now")
    if action is None:
        raise SettingError(f"the run's symmetry is {name}, which is code of yours: name it in this process, with `--simulator {name}` or "
                           "simulator=..., so that no run makes code run by itself")
    if source_digest(action) != digest:
        raise SettingError(f"the code of the symmetry {name} has changed since the run was trained with it: put it back, or train again")
    return action


def source_digest(action: GroupAction) -> str:
    """SHA-256 of what decides how an action acts: settings of ready-made ones, code and values of a user's own."""
    parts = [files.digest_of(f.to_json()) if f.to_json() is not None else digest_of_source(f) for f in action.factors]
    own = [] if type(action) is Product or len(parts) == 1 else [digest_of_source(type(action))]
    return hashlib.sha256("".join([*own, *parts]).encode()).hexdigest()


def _ready(description: Mapping[str, Any]) -> GroupAction:
    settings = dict(description)
    name = settings.pop("action", None)
    if name not in READY_MADE:
        raise SettingError(f"no action is called {name!r}; known: {', '.join(READY_MADE)}")
    try:
        if name == "Product":
            return Product(*map(_ready, settings["factors"]))
        return READY_MADE[name](**{k: _tuples(v) for k, v in settings.items()})
    except (TypeError, KeyError, AttributeError) as error:
        raise SettingError(f"not the description of the action {name}: {error}") from None


def _tuples(value: Any) -> Any:
    return tuple(_tuples(v) for v in value) if isinstance(value, list) else value


def _found(name: str) -> Any:
    """What "file.py:object" or "module:object", or an entry point, names."""
    points = {p.name: p for p in entry_points(group=ENTRY_POINTS)}
    if name in points:
        return points[name].load()
    place, _, attribute = name.rpartition(":")
    if not place:
        raise SymmetryError(f"no action is called {name!r}; {'known: ' + ', '.join(points) + '; or ' if points else ''}give file.py:object")
    module = load_module(place, name)
    if not hasattr(module, attribute):
        raise SymmetryError(f"symmetry {name}: {place} has no {attribute!r}")
    return getattr(module, attribute)


def _installed(name: str) -> GroupAction | None:
    """The action of that name among installed actions and simulators."""
    for group in (ENTRY_POINTS, SIMULATORS):
        for point in entry_points(group=group):
            if name in (point.name, point.value):
                return resolve_action(point.load())
    return None


def _named(given: Any, action: GroupAction, simulator: Simulator | None = None) -> str:
    """Where an action is found: a module's name for it, its class if that is made without arguments, or the simulator's."""
    simulator = given if isinstance(given, Simulator) else simulator
    module = sys.modules.get(type(action).__module__)
    for variable, value in vars(module).items() if module else ():
        if value is action and not variable.startswith("_"):
            return f"{address(type(action)).rpartition(':')[0] or module.__name__}:{variable}"
    if simulator is not None:
        return _absolute(simulator.spec) or f"local:{simulator.name}"
    if not isinstance(given, GroupAction) and address(given):
        return address(given)
    if type(action) is not Product and _needs_nothing(type(action)) and address(type(action)):
        return address(type(action))
    return f"local:{type(action).__name__}"


def _needs_nothing(cls: type) -> bool:
    try:
        inspect.signature(cls).bind()
    except (TypeError, ValueError):
        return False
    return True


def _absolute(name: str) -> str:
    place, colon, attribute = name.rpartition(":")
    return f"{Path(place).expanduser().resolve()}{colon}{attribute}" if place.endswith(".py") else name


def _name_of(given: Any) -> str:
    return getattr(given, "__name__", type(given).__name__)
