"""Embeddings by name: what a setting may say, and the classes of a user that this process knows.

`embedding` is one name, or names by field of a dict x, as a table {field: name} or in one line, "signal=cnn1d,image=net.py:Net". Loading a
run never runs code that the run names: only embeddings of installed packages, and those that this process has named itself (`register`),
are found again.
"""

from __future__ import annotations

import hashlib
import importlib
import re
from collections.abc import Callable, Mapping
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

from torch import nn

from sbiplat.errors import SettingError, SimulatorError
from sbiplat.simulator import address, load_file
from sbiplat.simulator import source_digest as digest_of_source

ENTRY_POINTS = "sbiplat.embeddings"
BUILT_IN = ("mlp", "resmlp", "none", "cnn1d", "cnn2d", "resnet1d", "resnet2d", "transformer", "deepset", "settransformer")
_FIELD = r"[^=,:/\\]+="  # of "field=name"; what has a slash or a colon before its first "=" is a path
_registered: dict[str, Any] = {}


def parts_of(name: str) -> dict[str, str] | None:
    """Field -> name, of names by field; None of one name for all of x."""
    if not re.match(_FIELD, name):
        return None
    pairs = [part.split("=", 1) for part in re.split(rf",\s*(?={_FIELD})", name)]
    fields = [field.strip() for field, _ in pairs]
    if twice := next((f for f in fields if fields.count(f) > 1), None):
        raise SettingError(f"embedding names the field {twice!r} twice")
    return {field: kind.strip() for field, (_, kind) in zip(fields, pairs, strict=True)}


def by_name(embedding: Any, of_one: Callable[[Any], Any]) -> str:
    """One line that says what `embedding` does, each name of it as `of_one` gives it."""
    parts = embedding if isinstance(embedding, Mapping) else parts_of(embedding) if isinstance(embedding, str) else None
    if parts is None:
        return of_one(embedding)
    if not parts:
        raise SettingError("embedding is an empty table: name a field of x and its embedding, such as signal = 'cnn1d'")
    for field in parts:
        if not isinstance(field, str) or not re.fullmatch(_FIELD, f"{field}="):
            raise SettingError(f"embedding cannot name the field {field!r}: give it a name without '=', ',', ':' and slashes")
    return ",".join(f"{field}={of_one(kind)}" for field, kind in parts.items())


def register(embedding: Any) -> str:
    """Make a user's class (or a text that names one, or a table of them) known to this process; returns the name that a run records."""
    return by_name(embedding, _register)


def _register(embedding: Any) -> str:
    if isinstance(embedding, str):
        if embedding.rpartition(":")[0].endswith(".py"):
            path, _, attribute = embedding.rpartition(":")
            name = f"{Path(path).expanduser().resolve()}:{attribute}"
        else:
            name = embedding
        if name not in BUILT_IN and name not in _registered:
            _registered[name] = _find(name)
        return name
    if isinstance(embedding, nn.Module):
        raise SettingError(f"embedding: give the class {type(embedding).__name__}, not an instance: a run must be able to make it anew")
    if not callable(embedding):
        raise SettingError(f"embedding: expected a name, 'file.py:Class' or an nn.Module class, got {embedding!r}")
    name = address(embedding) or f"local:{getattr(embedding, '__name__', 'embedding')}"
    _registered[name] = embedding
    return name


def _find(name: str) -> Any:
    points = {p.name: p for p in entry_points(group=ENTRY_POINTS)}
    if name in points:
        return points[name].load()
    if ":" not in name:
        raise SettingError(f"no embedding is called {name!r}; known: {', '.join((*BUILT_IN, *points))}, or file.py:Class")
    place, _, attribute = name.rpartition(":")
    try:
        module = load_file(Path(place)) if place.endswith(".py") else importlib.import_module(place)
    except (SimulatorError, ImportError) as error:
        raise SettingError(f"embedding {name}: {error}") from None
    if not hasattr(module, attribute):
        raise SettingError(f"embedding {name}: {place} has no {attribute!r}")
    return getattr(module, attribute)


def maker(name: str) -> Any:
    """The class or factory of that name, if this process or an installed package has named it."""
    points = {p.name: p for p in entry_points(group=ENTRY_POINTS)}
    if name not in _registered and name not in points:
        raise SettingError(f"the run's embedding is {name}, which is code of yours: name it in this process, with "
                           f"`--embedding {name}` or embedding=..., so that no run makes code run by itself")
    return _registered[name] if name in _registered else points[name].load()


def source_digest(name: str) -> str | None:
    """SHA-256 of the code of an embedding that is not sbiplat's own, or None: a certificate holds for this very code."""
    parts = parts_of(name)
    foreign = [kind for kind in (parts.values() if parts else [name]) if kind not in BUILT_IN]
    if not foreign:
        return None
    digests = [digest_of_source(maker(kind)) for kind in foreign]
    return digests[0] if parts is None else hashlib.sha256("".join(digests).encode()).hexdigest()
