"""Embeddings: nets that turn x into a context vector; by name, or a user's own nn.Module.

A user's embedding is a class: made as `Embedding(spec)` where it takes an argument (the `ObservationSpec`), else as
`Embedding()`. Its forward takes x (a dict where the simulator returns one) after standardisation, or, with the class
attribute `standardise = False`, after the declared transform alone, and returns (B, C). Where it has a method
`summaries(x) -> (B, F)`, that part is fixed: it is computed once a row, without gradient, and forward takes its result.

It is named by `file.py:Class` or `module:Class`, or by an entry point of the group `sbiplat.embeddings`. Loading a run
never runs code that the run names: only embeddings of installed packages, and those that this process has named itself
(`register`), are found again.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable
from importlib.metadata import entry_points
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sbiplat.errors import SettingError, SimulatorError
from sbiplat.observation import ObservationSpec
from sbiplat.simulator import address, load_file
from sbiplat.simulator import source_digest as digest_of_source

ENTRY_POINTS = "sbiplat.embeddings"
ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {"elu": nn.ELU, "gelu": nn.GELU, "relu": nn.ReLU, "silu": nn.SiLU, "tanh": nn.Tanh}
_registered: dict[str, Any] = {}


class ResidualBlock(nn.Module):
    """h + W2 act(W1 norm(h)), the identity at first."""

    def __init__(self, width: int, activation: str = "silu") -> None:
        super().__init__()
        self.net = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, width), ACTIVATIONS[activation](), nn.Linear(width, width))
        nn.init.zeros_(self.net[-1].weight)
        nn.init.zeros_(self.net[-1].bias)

    def forward(self, h: Tensor) -> Tensor:
        return h + self.net(h)


class MLP(nn.Module):
    """All of x, flattened and joined, through a multi-layer perceptron: (B, ...) -> (B, context)."""

    def __init__(self, spec: ObservationSpec, hidden: tuple[int, ...], context: int, activation: str) -> None:
        super().__init__()
        sizes = [spec.size, *hidden]
        layers: list[nn.Module] = []
        for a, b in pairwise(sizes):
            layers += [nn.Linear(a, b), ACTIVATIONS[activation]()]
        self.net = nn.Sequential(*layers, nn.Linear(sizes[-1], context))

    def forward(self, x: Tensor | dict[str, Tensor]) -> Tensor:
        return self.net(flatten(x))


class Flatten(nn.Module):
    """No embedding: x itself, flattened and joined."""

    def forward(self, x: Tensor | dict[str, Tensor]) -> Tensor:
        return flatten(x)


def flatten(x: Tensor | dict[str, Tensor]) -> Tensor:
    """All of x as one row of numbers each: (B, F)."""
    if isinstance(x, Tensor):
        return x.reshape(len(x), -1)
    return torch.cat([v.reshape(len(v), -1) for v in x.values()], dim=1)


def register(embedding: Any) -> str:
    """Make a user's class (or a text that names one) known to this process; returns the name under which a run records it."""
    if isinstance(embedding, str):
        if embedding.rpartition(":")[0].endswith(".py"):
            path, _, attribute = embedding.rpartition(":")
            name = f"{Path(path).expanduser().resolve()}:{attribute}"
        else:
            name = embedding
        if name not in ("mlp", "none") and name not in _registered:
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
        raise SettingError(f"no embedding is called {name!r}; known: mlp, none, {', '.join(points) or 'no entry point'}, or file.py:Class")
    place, _, attribute = name.rpartition(":")
    try:
        module = load_file(Path(place)) if place.endswith(".py") else importlib.import_module(place)
    except (SimulatorError, ImportError) as error:
        raise SettingError(f"embedding {name}: {error}") from None
    if not hasattr(module, attribute):
        raise SettingError(f"embedding {name}: {place} has no {attribute!r}")
    return getattr(module, attribute)


def build(name: str, spec: ObservationSpec, hidden: tuple[int, ...], context: int, activation: str) -> nn.Module:
    """The embedding of that name; raises SettingError where it is not known here."""
    if name == "mlp":
        return MLP(spec, hidden, context, activation)
    if name == "none":
        return Flatten()
    maker = _maker(name)
    try:
        takes_spec = any(p.default is p.empty and p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)
                         for p in inspect.signature(maker).parameters.values())
        made = maker(spec) if takes_spec else maker()
    except Exception as error:
        raise SettingError(f"embedding {name} cannot be made: {type(error).__name__}: {error}") from error
    if not isinstance(made, nn.Module):
        raise SettingError(f"embedding {name} made a {type(made).__name__}, not an nn.Module")
    return made


def prepare(embedding: nn.Module, spec: ObservationSpec, x: dict[str, Tensor]) -> dict[str, Tensor]:
    """The fixed part of the way to the net: an embedding's summaries, {"x": (B, F)}, or x itself where it has none."""
    if not hasattr(embedding, "summaries"):
        return x
    return {"x": embedding.summaries(spec.unwrap(x)).float()}


def width_of(embedding: nn.Module, spec: ObservationSpec, name: str) -> int:
    """C, found by one forward pass; raises SettingError where the embedding does not take x or does not return (B, C)."""
    fields = {k: torch.zeros(2, *shape) for k, shape in spec.shapes.items()}
    was_training = embedding.training
    try:
        with torch.no_grad():
            ready = prepare(embedding.eval(), spec, fields)
            out = embedding(ready.get("x", ready))
    except Exception as error:
        shapes = {k: tuple(v.shape) for k, v in fields.items()}
        line = (str(error) or repr(error)).splitlines()[0]
        raise SettingError(f"embedding {name} fails on x of shape {shapes['x'] if spec.plain else shapes}: {line}") from error
    embedding.train(was_training)
    if not isinstance(out, Tensor) or out.ndim != 2 or len(out) != 2:
        returned = tuple(out.shape) if isinstance(out, Tensor) else type(out).__name__
        raise SettingError(f"embedding {name} must return (B, C); for B = 2 it returned {returned}")
    return out.shape[1]


def source_digest(name: str) -> str | None:
    """SHA-256 of the code of an embedding that is not sbiplat's own, or None: a certificate holds for this very code."""
    if name in ("mlp", "none"):
        return None
    return digest_of_source(_maker(name))


def _maker(name: str) -> Any:
    """The class or factory of that name, if this process or an installed package has named it."""
    points = {p.name: p for p in entry_points(group=ENTRY_POINTS)}
    if name not in _registered and name not in points:
        raise SettingError(f"the run's embedding is {name}, which is code of yours: name it in this process, with "
                           f"`--embedding {name}` or embedding=..., so that no run makes code run by itself")
    return _registered[name] if name in _registered else points[name].load()
