r"""A posterior as an ordered chain of steps over named columns of draws.

A column is (B, n, width): n draws for each of B observations. The chain keeps the log-density of all columns that are there,

.. math:: \log q = \sum_{\text{factors}} \log q_k(c_k \,|\, x, c_{<k}) - \sum_{\text{reparametrisations}} \log |\det J_k| ,

and a log weight, to which a target correction adds :math:`\log p(c) - \log q(c)`. A density-free block (Gibbs) leaves no log q; what
follows it may draw and reparametrise, but not be corrected to a target before a recovery has drawn from a fitted density again. So

    NPE                        Factor(z), Reparametrisation(z -> theta)
    importance correction      ..., Target
    pinned parameters          Factor, Pinned, ..., Target
    prior change               ..., Tilt
    GNPE                       Factor(pose), Gibbs[Factor(proxy | pose), Factor(u | proxy), Reparametrisation(u -> theta), Derived(pose)]
    with density recovery      ..., Recovery(proxy), Factor(u | proxy), Reparametrisation(u -> theta)

A chain is checked when it is built, and describes itself as JSON for certificates and files of draws. The idea of checked chains, and of
density recovery, is dingo's (Dax et al., 2023).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, ClassVar, Protocol

import torch
from torch import Generator, Tensor

from sbiplat.errors import SettingError
from sbiplat.posteriors.passes import stream

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
        return replace(state, columns={**state.columns, **_given(self, new, state, n)},
                       log_q=state.log_q + log_q if known else None)  # type: ignore[operator]

    def describe(self) -> Json:
        return _described(self, density=self.density, **self.about)


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
        return replace(state, columns={**state.columns, **_given(self, new, state, n)})

    def describe(self) -> Json:
        return _described(self, values={k: float(v) for k, v in self.labels.items()} or {k: v.tolist() for k, v in self.values.items()})


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
        return replace(state, columns={**state.columns, **_given(self, self.function(x, state.columns), state, n)})

    def describe(self) -> Json:
        return _described(self, **self.about)


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
        return replace(state, columns={**kept, **_given(self, new, state, n)}, log_q=None if state.log_q is None else state.log_q - log_det)

    def describe(self) -> Json:
        return _described(self, takes=list(self.takes), **self.about)


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
        return _described(self, **self.about)


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
        return _described(self, **self.about)


class Watcher(Protocol):
    """Looks at one Gibbs run. figures: what it measured, as JSON."""

    figures: Mapping[str, Any]

    def done(self, columns: Columns) -> Tensor:
        """Called after every iteration with its columns, of the observations that are not done yet: which of them are now, (B,) of bools.

        Raises a UserError where there is no hope."""
        ...


class Rule(Protocol):
    """When a Gibbs block stops."""

    def watch(self, x: Any, columns: Columns) -> Watcher:
        """columns: those that the first iteration starts from."""
        ...

    def describe(self) -> Json: ...


@dataclass(frozen=True)
class Gibbs:
    """Iterates steps until its rule says so, of each observation by itself; density-free. renews: the columns that an iteration starts
    from and gives anew.

    Every other column that an iteration gives is there afterwards too, as of the last one. figures: `iterations`, and the rule's.
    """

    kind: ClassVar[str] = "gibbs"
    name: str
    renews: tuple[str, ...]
    steps: tuple[Step, ...]
    rule: Rule

    def __post_init__(self) -> None:
        object.__setattr__(self, "steps", tuple(self.steps))

    @cached_property
    def chain(self) -> Chain:
        """One iteration; raises SettingError."""
        made: set[str] = set()
        outside = dict.fromkeys(self.renews)
        for step in self.steps:
            outside.update(dict.fromkeys(c for c in step.needs if c not in made))
            made.update(step.gives)
        for step in self.steps:
            if step.kind not in ("factor", "pinned", "derived", "reparametrisation"):
                raise SettingError(f"step {self.name!r} iterates {step.name!r}, a {step.kind}: put it after the block")
        return Chain(self.steps, given=tuple(outside), renews=self.renews)

    @property
    def needs(self) -> tuple[str, ...]:
        return self.chain.given

    @property
    def takes(self) -> tuple[str, ...]:
        return self.renews

    @property
    def gives(self) -> tuple[str, ...]:
        outside = set(self.chain.given) - set(self.renews)
        return tuple(c for c in self.chain.columns if c not in outside)

    def run(self, state: State, x: Any, n: int, generator: Generator) -> State:
        start, seen = {k: v for k, v in state.columns.items() if k in self.needs}, x
        watcher = self.rule.watch(x, start)
        alive, ended, count = torch.arange(len(state.log_weight), device=state.log_weight.device), {}, 0
        while len(alive):
            now = replace(state, columns=start, log_q=None, log_weight=state.log_weight[alive])
            for step in self.steps:
                now = step.run(now, seen, n, generator)
            count += 1
            done = watcher.done(now.columns)
            for k in self.gives:
                values = now.columns[k]
                ended.setdefault(k, values.new_empty(len(state.log_weight), *values.shape[1:]))[alive[done]] = values[done]
            alive, start = alive[~done], {k: v[~done] for k, v in {**start, **{k: now.columns[k] for k in self.renews}}.items()}
            seen = {k: v[~done] if isinstance(v, Tensor) else v[(~done).cpu().numpy()] for k, v in seen.items()}
        kept = {k: v for k, v in state.columns.items() if k not in self.renews}
        return replace(state, columns={**kept, **ended}, log_q=None,
                       figures={**now.figures, self.name: {"iterations": count, **watcher.figures}})

    def describe(self) -> Json:
        return _described(self, renews=list(self.renews), rule=self.rule.describe(), density=False,
                          steps=[step.describe() for step in self.steps])


class Density(Protocol):
    """A density that was fitted to columns."""

    def draw(self, x: Any, columns: Columns, n: int, generator: Generator) -> tuple[Columns, Tensor]: ...


@dataclass(frozen=True)
class Recovery:
    """Density recovery: fits a density to columns of draws (by default those that it gives), forgets all, and draws anew from it, with
    their exact log q. fitted_on: how many draws the steps before it make, by default as many as are asked for."""

    kind: ClassVar[str] = "recovery"
    name: str
    gives: tuple[str, ...]
    fit: Callable[[Any, Columns, Generator], Density]
    about: Json = field(default_factory=dict)
    fitted_to: tuple[str, ...] = ()
    fitted_on: int | None = None

    @property
    def needs(self) -> tuple[str, ...]:
        return self.fitted_to or self.gives

    @property
    def takes(self) -> tuple[str, ...]:
        return self.needs

    def run(self, state: State, x: Any, n: int, generator: Generator) -> State:
        fitted = self.fit(x, {k: state.columns[k] for k in self.needs}, generator)
        new, log_q = fitted.draw(x, {}, n, generator)
        return replace(state, columns=_given(self, new, state, n), log_q=log_q, log_weight=torch.zeros_like(log_q))

    def describe(self) -> Json:
        return _described(self, density=True, **self.about)


@dataclass(frozen=True)
class Chain:
    """Steps in their order, checked when it is built; raises SettingError, which names the step and the mend.

    given: columns that are there before the first step. renews: those of them that steps give anew (a Gibbs block's iteration).
    """

    steps: tuple[Step, ...]
    given: tuple[str, ...] = ()
    renews: tuple[str, ...] = ()
    columns: tuple[str, ...] = field(init=False, compare=False)  # that are there at its end
    density: bool = field(init=False, compare=False)  # whether its draws come with log q

    def __init__(self, steps: Sequence[Step], given: tuple[str, ...] = (), renews: tuple[str, ...] = ()) -> None:
        for name, value in (("steps", tuple(steps)), ("given", tuple(given)), ("renews", tuple(renews))):
            object.__setattr__(self, name, value)
        self._check()

    def _check(self) -> None:
        here, made, names = dict.fromkeys(self.given), set(self.given) - set(self.renews), set[str]()
        density, weighted = True, ""
        if not self.steps:
            raise SettingError("a chain needs at least one step, such as a Factor that draws a column")
        for step in self.steps:
            name = f"step {step.name!r} ({step.kind})"
            if step.name in names:
                raise SettingError(f"{name}: two steps have this name; rename one")
            names.add(step.name)
            for column in step.needs:
                if column not in here:
                    raise SettingError(f"{name} needs column {column!r}, and there are {', '.join(here) or 'none'}; "
                                       f"{self._mend_of(column, step, column in made)}")
            if step.kind == "recovery":
                here, made, density = {}, set(), True
            elif step.kind == "gibbs":
                made -= set(step.takes)  # it gives them anew
            for column in step.gives:
                if column in made:
                    raise SettingError(f"{name} gives column {column!r}, which was there before; give it another name")
            if len(set(step.gives)) != len(step.gives):
                raise SettingError(f"{name} gives a column twice; name it once")
            if step.kind == "target" and not density:
                raise SettingError(f"{name} needs the density of the draws, and a step before it has none; put a Recovery between them, "
                                   "and draw the rest from it again")
            if step.kind == "target" and weighted:
                raise SettingError(f"{name} comes after weights were set by {weighted!r}; make one target of both")
            if step.kind == "target" and (left := self._left_out(step, here)):
                raise SettingError(f"{name} says nothing of column {left!r}, and log q is the density of that too; include its law, as "
                                   "log p(proxy | theta), and name it in needs")
            if step.kind in ("gibbs", "recovery") and weighted:
                raise SettingError(f"{name} would move weighted draws; put it before step {weighted!r}")
            if step.kind in ("target", "tilt"):
                weighted = weighted or step.name
            if step.kind == "gibbs" or not getattr(step, "density", True):
                density = False
            here = {**{c: None for c in here if c not in step.takes}, **dict.fromkeys(step.gives)}
            made.update(step.gives)
        if lacking := [c for c in self.renews if not any(c in s.gives for s in self.steps)]:
            raise SettingError(f"the block renews column {lacking[0]!r}, which none of its steps gives; add a step that does")
        object.__setattr__(self, "columns", tuple(here))
        object.__setattr__(self, "density", density)

    def _mend_of(self, column: str, step: Step, was_there: bool) -> str:
        """What to do about a column that a step lacks."""
        gone = next((s.name for s in self.steps if column in s.takes and s is not step), None)
        giver = next((s.name for s in self.steps if column in s.gives), None)
        if was_there and gone is not None:
            return f"step {gone!r} has taken it: put {step.name!r} before"
        return f"put {giver!r}, which gives it, before" if giver is not None else "add a Factor that gives it"

    def _left_out(self, target: Step, here: Iterable[str]) -> str:
        """A column of which log q is the density, and that a target does not name, nor anything derived from it; "" where there is none."""
        covered = set(target.needs)
        for step in reversed(self.steps):
            if step.kind == "derived" and covered & set(step.gives):
                covered.update(step.needs)
        free = {c for s in self.steps if s.kind not in ("derived", "pinned") for c in s.gives} | set(self.given)
        return next((c for c in here if c in free and c not in covered), "")

    def sample(self, x: Mapping[str, Any], n: int, seed: int, columns: Columns | None = None, device: str = "cpu") -> State:
        """n draws for each of the B observations x, name -> (B, ...); columns: those `given`. The same seed gives the same draws."""
        batch, counts = len(next(iter(x.values()))), self._counts(n)
        zeros = torch.zeros(batch, counts[0], dtype=torch.float64, device=device)
        state = State(self._started(columns or {}), zeros, zeros)
        generator = torch.Generator(device).manual_seed(stream(seed))
        for step, count in zip(self.steps, counts, strict=True):
            state = step.run(state, x, count, generator)
        return state

    def _counts(self, n: int) -> list[int]:
        """The draws that each step makes: before a recovery, those that it is fitted on."""
        counts = [n]
        for step in reversed(self.steps[1:]):
            counts.append((step.fitted_on or counts[-1]) if isinstance(step, Recovery) else counts[-1])
        return counts[::-1]

    def _started(self, columns: Columns) -> dict[str, Tensor]:
        if lacking := [c for c in self.given if c not in columns]:
            raise SettingError(f"the chain starts from column {lacking[0]!r}: give it")
        return dict(columns)

    @property
    def backwards(self) -> str:
        """Why the chain's density cannot be evaluated at columns of one's own; "" where it can."""
        for step in self.steps:
            if step.kind in ("gibbs", "recovery"):
                return f"step {step.name!r} ({step.kind}) has no density of its own"
            if step.kind == "factor" and step.log_prob is None:  # type: ignore[attr-defined]
                return f"step {step.name!r} has no log_prob"
        known = {*self.columns, *self.given}
        for _ in self.steps:
            for step in self.steps:
                known |= set(_reached(step, known))
        lost = [c for s in self.steps for c in (*s.gives, *s.needs) if c not in known]
        if lost:
            return f"column {lost[0]!r} cannot be had back from {', '.join(self.columns)}: give its reparametrisation an inverse"
        return ""

    def log_prob(self, x: Mapping[str, Any], columns: Columns) -> Tensor:
        """log q of columns at the end of the chain, (B, n); those that are derived or pinned need not be given. Raises SettingError."""
        if self.backwards:
            raise SettingError(f"the chain has no density: {self.backwards}")
        lead = next(iter(columns.values()))
        known = dict(columns)
        total = torch.zeros(lead.shape[:2], dtype=torch.float64, device=lead.device)
        for _ in self.steps:
            for step in self.steps:
                if not _reached(step, known):
                    continue
                if isinstance(step, Pinned):
                    known |= step.columns(*lead.shape[:2], lead)
                elif isinstance(step, Derived):
                    known |= step.function(x, known)
                elif isinstance(step, Reparametrisation):
                    assert step.inverse is not None
                    old, log_det = step.inverse(x, known)
                    known, total = {**known, **old}, total + log_det
        for step in self.steps:
            if isinstance(step, Pinned):
                for name, fixed in step.columns(*lead.shape[:2], lead).items():
                    total = torch.where((known[name] == fixed).all(-1), total, -torch.inf)
            elif isinstance(step, Factor):
                if lacking := [c for c in (*step.gives, *step.needs) if c not in known]:
                    raise SettingError(f"log_prob needs column {lacking[0]!r}: the density is over {', '.join(self.columns)} together")
                assert step.log_prob is not None
                total = total + step.log_prob(x, known)
        return total

    def description(self) -> list[Json]:
        """The steps as JSON, for certificates and files of draws."""
        return [step.describe() for step in self.steps]


def _reached(step: Step, known: Any) -> tuple[str, ...]:
    """The columns that a step gives of those that are known, where it runs backwards; () where it gives none that are new."""
    if step.kind == "pinned" or (step.kind == "derived" and all(c in known for c in step.needs)):
        return tuple(c for c in step.gives if c not in known)
    if isinstance(step, Reparametrisation) and step.inverse is not None and all(c in known for c in (*step.gives, *step.given)):
        return tuple(c for c in step.takes if c not in known)
    return ()


def _given(step: Step, new: Columns, state: State, n: int) -> dict[str, Tensor]:
    """The columns that a step gave, if they are those that it declares."""
    if set(new) != set(step.gives):
        raise SettingError(f"step {step.name!r} gave the columns {', '.join(new) or 'none'}; it declares {', '.join(step.gives)}")
    for name, values in new.items():
        if values.ndim != 3 or values.shape[:2] != (len(state.log_weight), n):
            raise SettingError(f"step {step.name!r} gave column {name!r} of shape {tuple(values.shape)}; expected "
                               f"({len(state.log_weight)}, {n}, width)")
    return dict(new)


def _described(step: Step, **more: Any) -> Json:
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
