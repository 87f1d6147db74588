"""The steps of a chain (`posteriors.chain`), one class a kind, and how their description reads."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Protocol

import torch
from torch import Generator, Tensor

from sbiplat.errors import SettingError

Columns = Mapping[str, Tensor]  # name -> (B, n, width)
Draw = Callable[[Any, Columns, int, Generator], tuple[Columns, Tensor | None]]  # (x, columns, n, generator) -> new columns, log q (B, n)
LogProb = Callable[[Any, Columns], Tensor]  # (x, columns) -> (B, n)
Map = Callable[[Any, Columns], tuple[Columns, Tensor]]  # (x, columns) -> new columns, log |det| of this map (B, n)
Json = dict[str, Any]


@dataclass(frozen=True)
class State:
    """Draws on their way. columns: those over which log_q, (B, n), is the density, and what is derived of them; log_q is None where
    there is no density. log_weight: (B, n). figures: what steps measured, by the step's name."""

    columns: Columns
    log_q: Tensor | None
    log_weight: Tensor
    figures: Mapping[str, Any] = field(default_factory=dict)


class Step(Protocol):
    """One step. needs: columns that must be there. takes: those of them that are gone afterwards. gives: columns that are new."""

    kind: ClassVar[str]
    name: str

    @property
    def needs(self) -> tuple[str, ...]: ...

    @property
    def takes(self) -> tuple[str, ...]: ...

    @property
    def gives(self) -> tuple[str, ...]: ...

    def run(self, state: State, x: Any, n: int, generator: Generator) -> State: ...

    def describe(self) -> Json: ...


@dataclass(frozen=True)
class Factor:
    """Draws columns given x and earlier ones, and adds their log q.

    draw: its log q is None exactly where `density` is False. log_prob: of the columns that it gives, given the others; without it the chain
    cannot be evaluated elsewhere than at its own draws. about: more for the description, as JSON.
    """

    kind: ClassVar[str] = "factor"
    name: str
    gives: tuple[str, ...]
    draw: Draw
    log_prob: LogProb | None = None
    needs: tuple[str, ...] = ()
    density: bool = True
    about: Json = field(default_factory=dict)
    takes: ClassVar[tuple[str, ...]] = ()

    def run(self, state: State, x: Any, n: int, generator: Generator) -> State:
        new, log_q = self.draw(x, state.columns, n, generator)
        if (log_q is None) == self.density:
            raise SettingError(f"step {self.name!r} gave {'no' if log_q is None else 'a'} density: set density={not self.density} where it "
                               "is made")
        known = state.log_q is not None and log_q is not None
        return replace(state, columns={**state.columns, **given_by(self, new, state, n)},
                       log_q=state.log_q + log_q if known else None)  # type: ignore[operator]

    def describe(self) -> Json:
        return described(self, density=self.density, **self.about)


@dataclass(frozen=True)
class Pinned:
    """Columns that are constants: values, name -> (width,), the same for all observations, or (B, width). They have no density to add."""

    kind: ClassVar[str] = "pinned"
    name: str
    values: Mapping[str, Tensor]
    labels: Mapping[str, Any] = field(default_factory=dict)  # what the user pinned, for the description
    needs: ClassVar[tuple[str, ...]] = ()
    takes: ClassVar[tuple[str, ...]] = ()

    @property
    def gives(self) -> tuple[str, ...]:
        return tuple(self.values)

    def columns(self, batch: int, n: int, like: Tensor) -> Columns:
        """Its columns, (B, n, width)."""
        return {k: torch.as_tensor(v, dtype=torch.float64, device=like.device)[..., None, :].expand(batch, n, -1)
                for k, v in self.values.items()}

    def run(self, state: State, x: Any, n: int, generator: Generator) -> State:
        new = self.columns(len(state.log_weight), n, state.log_weight)
        return replace(state, columns={**state.columns, **given_by(self, new, state, n)})

    def describe(self) -> Json:
        return described(self, values={k: float(v) for k, v in self.labels.items()} or {k: v.tolist() for k, v in self.values.items()})


@dataclass(frozen=True)
class Derived:
    """Columns that are functions of others; they add nothing to the density."""

    kind: ClassVar[str] = "derived"
    name: str
    needs: tuple[str, ...]
    gives: tuple[str, ...]
    function: Callable[[Any, Columns], Columns]
    about: Json = field(default_factory=dict)
    takes: ClassVar[tuple[str, ...]] = ()

    def run(self, state: State, x: Any, n: int, generator: Generator) -> State:
        return replace(state, columns={**state.columns, **given_by(self, self.function(x, state.columns), state, n)})

    def describe(self) -> Json:
        return described(self, **self.about)


@dataclass(frozen=True)
class Reparametrisation:
    """Columns `takes` become columns `gives`, in a bijection that may depend on x and on the columns `given`.

    forward: the new columns and log |det d gives / d takes|. inverse: the old columns and log |det d takes / d gives|.
    """

    kind: ClassVar[str] = "reparametrisation"
    name: str
    takes: tuple[str, ...]
    gives: tuple[str, ...]
    forward: Map
    inverse: Map | None = None
    given: tuple[str, ...] = ()
    about: Json = field(default_factory=dict)

    @property
    def needs(self) -> tuple[str, ...]:
        return (*self.takes, *self.given)

    def run(self, state: State, x: Any, n: int, generator: Generator) -> State:
        new, log_det = self.forward(x, state.columns)
        kept = {k: v for k, v in state.columns.items() if k not in self.takes}
        return replace(state, columns={**kept, **given_by(self, new, state, n)},
                       log_q=None if state.log_q is None else state.log_q - log_det)

    def describe(self) -> Json:
        return described(self, takes=list(self.takes), **self.about)


@dataclass(frozen=True)
class Target:
    """The target correction: adds log target - log q to the log weights. log_target: of all the columns that log q is the density of."""

    kind: ClassVar[str] = "target"
    name: str
    needs: tuple[str, ...]
    log_target: LogProb
    about: Json = field(default_factory=dict)
    takes: ClassVar[tuple[str, ...]] = ()
    gives: ClassVar[tuple[str, ...]] = ()

    def run(self, state: State, x: Any, n: int, generator: Generator) -> State:
        assert state.log_q is not None  # as the chain has checked
        return replace(state, log_weight=state.log_weight + self.log_target(x, state.columns) - state.log_q)

    def describe(self) -> Json:
        return described(self, **self.about)


@dataclass(frozen=True)
class Tilt:
    """Adds a log ratio to the log weights, such as log p'(theta) - log p(theta) of another prior; it needs no log q."""

    kind: ClassVar[str] = "tilt"
    name: str
    needs: tuple[str, ...]
    log_ratio: LogProb
    about: Json = field(default_factory=dict)
    takes: ClassVar[tuple[str, ...]] = ()
    gives: ClassVar[tuple[str, ...]] = ()

    def run(self, state: State, x: Any, n: int, generator: Generator) -> State:
        return replace(state, log_weight=state.log_weight + self.log_ratio(x, state.columns))

    def describe(self) -> Json:
        return described(self, **self.about)


def given_by(step: Step, new: Columns, state: State, n: int) -> dict[str, Tensor]:
    """The columns that a step gave, if they are those that it declares."""
    if set(new) != set(step.gives):
        raise SettingError(f"step {step.name!r} gave the columns {', '.join(new) or 'none'}; it declares {', '.join(step.gives)}")
    for name, values in new.items():
        if values.ndim != 3 or values.shape[:2] != (len(state.log_weight), n):
            raise SettingError(f"step {step.name!r} gave column {name!r} of shape {tuple(values.shape)}; expected "
                               f"({len(state.log_weight)}, {n}, width)")
    return dict(new)


def described(step: Step, **more: Any) -> Json:
    """What every step says of itself, and more."""
    return {"step": step.kind, "name": step.name, "needs": list(step.needs), "gives": list(step.gives), **more}


def describe(sampler: Any) -> list[Json]:
    """The steps behind a sampler as JSON: what it says of itself by `describe() -> list`; of a plain one, the one factor that draws z."""
    if hasattr(sampler, "describe"):
        return list(sampler.describe())
    return [{"step": "factor", "name": type(getattr(sampler, "estimator", sampler)).__name__, "needs": [], "gives": ["z"], "density": True}]


def in_words(description: Sequence[Mapping[str, Any]]) -> str:
    """A description in a line: NPE -> z; prior (reparametrisation) -> theta."""
    return "; ".join(_words(step) for step in description)


def _words(step: Mapping[str, Any]) -> str:
    rule = step.get("rule") or {}
    about = [*([step["step"]] if step["step"] not in ("factor", step["name"]) else []), *([str(step["fit"])] if "fit" in step else []),
             *(["of widths " + ", ".join(f"{k} {v:.3g}" for k, v in step["widths"].items())
               + (" times the initial net's spread beside its median" if step.get("adaptive") else "")] if step.get("widths") else []),
             *([f"until {rule['stops']}, {rule['most_steps']} steps at most"] if {"stops", "most_steps"} <= set(rule) else [])]
    inner = f" [{in_words(step['steps'])}]" if step.get("steps") else ""
    return (step["name"] + (f" ({'; '.join(about)})" if about else "") + inner
            + (f" -> {', '.join(step['gives'])}" if step.get("gives") else ""))
