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
from sbiplat.posteriors.steps import (
    Columns,
    Derived,
    Factor,
    Json,
    Pinned,
    Reparametrisation,
    State,
    Step,
    described,
    given_by,
)


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
        return described(self, renews=list(self.renews), rule=self.rule.describe(), density=False,
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
        return replace(state, columns=given_by(self, new, state, n), log_q=log_q, log_weight=torch.zeros_like(log_q))

    def describe(self) -> Json:
        return described(self, density=True, **self.about)


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
