"""Settings: frozen dataclasses filled by name from TOML, the command line or keyword arguments.

A field's metadata states what it is and its range: `setting(default, "what it is", low=..., high=..., among=...)`.
An unknown name or an impossible value is one line that says what was expected.
"""

from __future__ import annotations

import difflib
import json
import math
import tomllib
import types
import typing
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from sbiplat.errors import SettingError

S = TypeVar("S")


def setting(default: Any, about: str, *, low: float = -math.inf, high: float = math.inf, among: Sequence[str] = (),
            fewest: int = 0) -> Any:
    """A dataclass field with its documentation and range; fewest: of a list, how many it must have."""
    return field(default=default, metadata={"about": about, "low": low, "high": high, "among": tuple(among), "fewest": fewest})


@dataclass(frozen=True)
class Interval:
    """The values of a setting that a search may try, low to high: whole numbers where both ends are; even in the logarithm if `log`."""

    low: float
    high: float
    log: bool = False

    def holds(self, value: Any) -> bool:
        """Whether a value lies in it."""
        return isinstance(value, int | float) and self.low <= value <= self.high


Space = dict[str, "Interval | tuple[Any, ...]"]  # the values of each setting that a search may try: an interval, or some


def space(values: Mapping[str, Any], *classes: type) -> Space:
    """A search space from plain values: a list of choices, or {"low": ..., "high": ..., "log": ...}; raises SettingError."""
    out: Space = {}
    for name, given in values.items():
        cls = next((c for c, part in zip(classes, split({name: None}, *classes), strict=True) if part))
        if isinstance(given, Interval | Mapping):
            table = asdict(given) if isinstance(given, Interval) else given
            if not {"low", "high"} <= set(table) <= {"low", "high", "log"} or not isinstance(table.get("log", False), bool):
                raise SettingError(f"search of {name}: expected {{low = ..., high = ..., log = true or false}}, or a list of values")
            low, high = (getattr(build(cls, {name: table[end]}), name) for end in ("low", "high"))
            if not all(isinstance(v, int | float) and not isinstance(v, bool) for v in (low, high)) or not low < high:
                raise SettingError(f"search of {name}: low = {low!r} must be below high = {high!r}, both numbers")
            if table.get("log") and low <= 0:
                raise SettingError(f"search of {name}: low = {low!r} must be above 0 where log = true")
            out[name] = Interval(low, high, table.get("log", False))
        elif isinstance(given, list | tuple) and len(given):
            out[name] = tuple(getattr(build(cls, {name: v}), name) for v in given)
        else:
            raise SettingError(f"search of {name} = {given!r}: expected a list of values, or {{low = ..., high = ..., log = ...}}")
    return out


def toml_table(name: str, values: Mapping[str, Any]) -> str:
    """A table of TOML, of numbers, texts, true or false, and lists of them; None is left out."""
    return "".join([f"[{name}]\n", *(f"{k} = {json.dumps(v)}\n" for k, v in values.items() if v is not None)])


def build(cls: type[S], values: Mapping[str, Any]) -> S:
    """An instance of a settings class from names and values; raises SettingError."""
    known = {f.name: f for f in fields(cls)}  # type: ignore[arg-type]
    hints = typing.get_type_hints(cls)
    for name in values:
        if name not in known:
            raise unknown(name, list(known))
    return cls(**{name: _checked(name, value, hints[name], known[name].metadata) for name, value in values.items()})


def split(values: Mapping[str, Any], *classes: type) -> list[dict[str, Any]]:
    """Share out names among settings classes; raises SettingError for a name that none has."""
    owners = {f.name: k for k, cls in enumerate(classes) for f in fields(cls)}
    parts: list[dict[str, Any]] = [{} for _ in classes]
    for name, value in values.items():
        if name not in owners:
            raise unknown(name, list(owners))
        parts[owners[name]][name] = value
    return parts


def unknown(name: str, known: list[str]) -> SettingError:
    """The error for a name that no setting has, with the near ones or all."""
    near = difflib.get_close_matches(name, known, 3, 0.5)
    hint = f"did you mean {' or '.join(near)}?" if near else f"known: {', '.join(known)}"
    return SettingError(f"no setting is called {name!r}; {hint}")


def whole_seed(seed: Any) -> int:
    """A seed as an int; raises SettingError for what is none."""
    if isinstance(seed, bool) or not isinstance(seed, int | np.integer) or not 0 <= seed < 2**62:
        raise SettingError(f"seed must be a whole number from 0 to 2^62, got {seed!r}")
    return int(seed)


def _checked(name: str, value: Any, hint: Any, about: Mapping[str, Any]) -> Any:
    options = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    if value is None and type(None) in options:
        return None
    kind = next(o for o in options if o is not type(None))
    origin = typing.get_origin(kind) or kind
    wrong = SettingError(f"{name} = {value!r}: expected {_kind_name(kind)}" + _range(about))
    if origin is tuple and str in typing.get_args(kind):
        value = [value] if isinstance(value, str) else value
        if not isinstance(value, list | tuple) or not all(isinstance(v, str) for v in value):
            raise wrong
        return tuple(value)
    if origin is tuple:
        whole = isinstance(value, list | tuple) and all(isinstance(v, int) and not isinstance(v, bool) for v in value)
        if not whole or len(value) < about["fewest"] or not all(about["low"] <= v <= about["high"] for v in value):
            raise wrong
        return tuple(value)
    if origin is Mapping:
        if not isinstance(value, Mapping):
            raise wrong
        return dict(value)
    if origin is bool:
        if not isinstance(value, bool):
            raise wrong
        return value
    if origin in (int, float):
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
            raise wrong
        if (origin is int and value != int(value)) or not about["low"] <= value <= about["high"]:
            raise wrong
        return origin(value)
    if not isinstance(value, str) or (about["among"] and value not in about["among"]):
        raise wrong
    return value


def _kind_name(kind: Any) -> str:
    if typing.get_origin(kind) is tuple and str in typing.get_args(kind):
        return "a text, or a list of texts"
    names = {int: "a whole number", float: "a number", bool: "true or false", str: "text", Mapping: "a table"}
    return names.get(typing.get_origin(kind) or kind, "a list of whole numbers")


def _range(about: Mapping[str, Any]) -> str:
    if about["among"]:
        return f", one of {', '.join(about['among'])}"
    low, high = about["low"], about["high"]
    some = f", {about['fewest']} or more of them," if about["fewest"] else ""
    if math.isinf(low) and math.isinf(high):
        return ""
    return some + (f" between {low:g} and {high:g}" if not math.isinf(high) else f" of at least {low:g}")


def read_toml(path: Path) -> dict[str, Any]:
    """A TOML file as a dict; raises SettingError with the line where it is not TOML."""
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise SettingError(f"no settings file at {path}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise SettingError(f"{path} cannot be read: {error}") from None
    except tomllib.TOMLDecodeError as error:
        raise SettingError(f"{path} is not TOML: {error}") from None


def parse_assignments(items: Sequence[str], option: str = "--set", example: str = "flow=maf") -> dict[str, Any]:
    """`key=value` words as settings: the value in TOML's notation, or plain text. option, example: for messages."""
    out: dict[str, Any] = {}
    for item in items:
        name, equals, text = item.partition("=")
        if not equals or not name.strip():
            raise SettingError(f"{option} {item!r}: expected key=value, such as {option} {example}")
        try:
            found = tomllib.loads(f"value = {text.strip()}")
            out[name.strip()] = found["value"] if len(found) == 1 else text.strip()
        except tomllib.TOMLDecodeError:
            out[name.strip()] = text.strip()
    return out
