"""The diagnosis of a refused posterior: its defects by name, what shows each, and the command that usually mends it.

Several criteria may see one defect, and one criterion says how large a figure is rather than what is wrong. So failed criteria are
gathered by defect, in the order in which they are best mended: a posterior that does not use x need not be asked about its width.
"""

from __future__ import annotations

import json
import math
import shlex
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

import numpy as np

from sbiplat.errors import RunError
from sbiplat.gate import learning
from sbiplat.gate.criterion import Criterion
from sbiplat.gate.recalibrate import LEAST_PAIRS
from sbiplat.observation import feature_names
from sbiplat.runs import Run
from sbiplat.simulator import ENTRY_POINTS

FEW_STEPS = 300
OVERFITTED = 0.2  # nats between the losses of validation and training at the best epoch


@dataclass(frozen=True)
class Finding:
    """defect: its name. evidence: what shows it, in words. mend: what usually helps. command: that as typed; "" where there is none."""

    defect: str
    evidence: str
    mend: str
    command: str = ""

    def to_json(self) -> dict[str, str]:
        return asdict(self)


def diagnose(run: Run, failed: Sequence[Criterion], arrays: Mapping[str, Any] | None = None) -> list[Finding]:
    """The findings of a run that the gate refused, the first to be mended first. arrays: those of RUN/diagnostics.npz."""
    if not failed:
        return []
    by_name = {c.name: c for c in failed}
    commands = _Commands(run)
    found = [*_tested_too_little(by_name, commands), *_trained_briefly(commands), *_not_using_x(by_name, commands),
             *_fragile(run, by_name, commands, arrays or {}),
             *_shape(by_name, commands), *_too_few(run, by_name, commands)]
    known = {name for finding in found for name in finding[0]}
    rest = [((c.name,), Finding(c.name, c.statement, c.mend)) for c in failed if c.name not in known]
    return [finding for _, finding in (*found, *rest)]


Found = list[tuple[tuple[str, ...], Finding]]


class _Commands:
    """Commands on this run, as typed."""

    def __init__(self, run: Run) -> None:
        self.run, self.bank, self.split = run, run.record["bank"], run.record["split"]
        self._next = 2

    def again(self, *words: str) -> str:
        """Train anew into another directory, with other settings."""
        given = [word for setting in self._given(words) for word in ("--set", setting)]
        defended = [word for defence in self.run.record["training"].get("defend", ()) for word in ("--defend", str(defence))]
        seed = ("--seed", str(self.run.seed)) if self.run.seed else ()
        estimator = self.run.architecture.estimator
        return self._line("sbiplat", "train", str(self.bank["path"]), "--estimator", estimator, "--out", self._place(), *seed,
                          *self._symmetry(), *given, *(defended if "--defend" not in words else ()), *words)

    def _symmetry(self) -> list[str]:
        """What the training made of a symmetry, and the simulator that declares it, where that is not installed."""
        settings = self.run.symmetry_settings
        spec = self._simulator()
        words = [word for k, v in settings.items() for word in ("--set", f"{k}={_toml(v)}")]
        return [*words, *(("--simulator", spec) if settings and ":" in spec else ())]

    def _simulator(self) -> str:
        """The name of the bank's simulator as another process finds it."""
        recorded = dict(self.bank.get("simulator") or {})
        installed = {point.name for point in entry_points(group=ENTRY_POINTS)}
        return str(recorded.get("name" if recorded.get("name") in installed else "spec") or recorded.get("name") or "SIM")

    def _place(self) -> str:
        """A directory for another run, of another name for each finding."""
        while Path(f"{self.run.path}-{self._next}").exists():
            self._next += 1
        self._next += 1
        return f"{self.run.path}-{self._next - 1}"

    def _given(self, words: Sequence[str]) -> list[str]:
        """The settings of the net that are not the default ones, as --set takes them, but for those that the words set."""
        settings = self.run.architecture.settings
        usual = type(settings)()
        named = {word.partition("=")[0] for word in words}
        return [f"{f.name}={json.dumps(value)}" if not isinstance(value, str) else f"{f.name}={value}" for f in fields(settings)
                if (value := getattr(settings, f.name)) != getattr(usual, f.name) and f.name not in named]

    def more(self, rows: int = 0) -> str:
        """Extend the bank, to twice as many rows at least, and train on it."""
        rows = max(rows, 2 * int(self.bank["rows"]))
        made = self._line("sbiplat", "simulate", self._simulator(), "--n", str(rows), "--seed", str(self.bank["seed"]), "--out",
                          str(self.bank["path"]))
        return f"{made} && {self.again()}"

    def of_run(self, command: str, *words: str) -> str:
        return self._line("sbiplat", command, str(self.run.path), *words, *self.run.action_words)

    def longer(self) -> str:
        epochs = int(self.run.record["training"].get("max_epochs") or 10)
        return self.again("--set", f"max_epochs={2 * epochs}")

    def larger(self) -> str:
        """Train a larger net, of a flow; longer, of another estimator."""
        transforms = getattr(self.run.architecture.settings, "transforms", None)
        return self.longer() if transforms is None else self.again("--set", f"transforms={transforms + 2}")

    @staticmethod
    def _line(*words: str) -> str:
        return shlex.join(words)


def _toml(value: Any) -> str:
    """A value as --set takes it."""
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{k} = {_toml(v)}" for k, v in value.items()) + "}"
    return json.dumps(value)


def _some(by_name: Mapping[str, Criterion], names: Iterable[str]) -> list[Criterion]:
    return [by_name[name] for name in names if name in by_name]


def _told(criteria: Sequence[Criterion]) -> str:
    return "; ".join(f"{c.name}: {c.statement}" for c in criteria)


def _names(criteria: Sequence[Criterion]) -> tuple[str, ...]:
    return tuple(c.name for c in criteria)


def _tested_too_little(by_name: Mapping[str, Criterion], commands: _Commands) -> Found:
    out: Found = []
    if pairs := by_name.get("pairs"):
        out.append((("pairs",), Finding("tested too little", pairs.statement, "more held-out pairs, of a larger bank",
                                        commands.more(10 * math.ceil(pairs.threshold)))))
    if draws := by_name.get("draws"):
        out.append((("draws",), Finding("tested too little", draws.statement, "more draws a pair",
                                        commands.of_run("gate", "--set", "draws=1000"))))
    return out


def _trained_briefly(commands: _Commands) -> Found:
    """Few steps leave everything wrong at once."""
    steps, epochs = (int(dict(commands.run.record.get("outcome") or {}).get(k) or 0) for k in ("steps", "epochs"))
    if not steps or steps >= FEW_STEPS:
        return []
    wanted = math.ceil(2 * FEW_STEPS / steps * max(1, epochs))
    return [((), Finding("trained briefly", f"the training had {steps} steps", "a longer training, before all else",
                         commands.again("--set", f"max_epochs={wanted}")))]


def _not_using_x(by_name: Mapping[str, Criterion], commands: _Commands) -> Found:
    seen = _some(by_name, ("information", "nearest rows"))
    if not seen:
        return []
    rate = float(commands.run.record["training"].get("learning_rate") or 1e-3)
    defect = "not using x" if "information" in by_name else "knowing less than the bank's nearest rows"
    return [(_names(seen), Finding(defect, _told(seen), seen[0].mend, commands.again("--set", f"learning_rate={rate / 3:.1g}")))]


def _fragile(run: Run, by_name: Mapping[str, Criterion], commands: _Commands, arrays: Mapping[str, Any]) -> Found:
    seen = _some(by_name, ("fragility", "coverage under attack"))
    if not seen:
        return []
    along = fragile_feature(run, arrays)
    return [(_names(seen), Finding(f"fragile{f' along {along}' if along else ''}", _told(seen),
                                   "a defended training: disturbed data are shown to the net, and get wide posteriors",
                                   commands.again("--defend", "slab:0.05")))]


def fragile_feature(run: Run, arrays: Mapping[str, Any]) -> str:
    """The feature that the worst perturbations move most, by its label or index; "" where none was found."""
    delta = arrays.get("attack_delta")  # (sizes, observations, F)
    if delta is None or delta.ndim != 3 or not delta.size or delta.shape[2] != run.x.size:
        return ""
    size = np.sqrt(np.nanmean(np.square(delta[-1].astype(float)), axis=0))
    return feature_names(run.x, np.array([size.argmax()]))[0] if np.isfinite(size).all() and size.max() > 0 else ""


def _shape(by_name: Mapping[str, Criterion], commands: _Commands) -> Found:
    """Width, bias, tails, dependence and what is wrong in some place only."""
    uniform = {n: c for n, c in by_name.items() if n.startswith("coverage ") and n not in
               ("local coverage", "coverage by theta", "coverage under attack")}
    biased = [c for c in uniform.values() if c.mend.startswith("biased")]
    local, wrong = _some(by_name, ("local coverage", "coverage by theta")), _some(by_name, ("C2ST", "tails"))
    wide = _some(by_name, ("over-coverage",))
    narrow = _some(by_name, ("under-coverage",))
    rest = [c for c in uniform.values() if c not in biased]
    everywhere = not local and not wrong
    everywhere = everywhere and int(commands.split["validation"]) >= LEAST_PAIRS and commands.run.recalibration is None
    mended = commands.of_run("recalibrate", "--out", f"{commands.run.path}-recalibrated")
    out: Found = []
    if narrow:
        out.append((_names(narrow + rest), Finding(
            "over-confident", _told(narrow), "more simulations, or a smaller net; or recalibration, if it is so everywhere",
            mended if everywhere else commands.more())))
    if wide:
        out.append((_names(wide + rest), Finding(
            "under-confident", _told(wide), "longer training; or recalibration, if it is so everywhere",
            mended if everywhere else commands.longer())))
    if biased:
        which = ", ".join(c.name.removeprefix("coverage SBC ").removeprefix("coverage function ") for c in biased)
        out.append((_names(biased), Finding(f"biased in {which}", _told(biased), "; ".join(sorted({c.mend for c in biased})),
                                            mended if everywhere and not narrow and not wide else commands.longer())))
    if local:
        out.append((_names(local), Finding("failing in a region", _told(local), "; ".join(c.mend for c in local if c.mend),
                                           commands.more())))
    if wrong or (rest and not narrow and not wide):
        seen = [*wrong, *(rest if not narrow and not wide else [])]
        out.append((_names(seen), Finding("misshapen", _told(seen), "; ".join(sorted({c.mend for c in seen if c.mend})),
                                          commands.larger() if (overfitting(commands.run) or 0.0) < OVERFITTED else commands.more())))
    return out


def _too_few(run: Run, by_name: Mapping[str, Criterion], commands: _Commands) -> Found:
    """What the losses and the learning curve say of the bank's size; the curve is not measured here."""
    try:
        curve = learning.read(run)
    except RunError:
        curve = None
    if curve is not None and curve.next_gain > learning.TOLERANCE:
        return [((), Finding("too few simulations", f"learning curve: {curve.statement}", "a larger bank", commands.more(curve.next_rows)))]
    gap = overfitting(run)
    if curve is None and gap is not None and gap > OVERFITTED:
        measurable = int(commands.split["held_out"]) > 3 * learning.LEAST_ROWS  # half of them, and some
        return [((), Finding("too few simulations", f"at the best epoch the loss of rows in training is {gap:.2f} below that of others",
                             "a larger bank; how large, a learning curve says",
                             commands.of_run("learning-curve") if measurable else commands.more()))]
    return []


def overfitting(run: Run) -> float | None:
    """Validation loss less training loss at the best epoch, None where the run does not say."""
    best = dict(run.record.get("outcome") or {}).get("best_epoch")
    line = next((m for m in run.metrics() if m.get("epoch") == best), None)
    losses = [line.get(k) for k in ("validation_loss", "train_loss")] if line else [None]
    return float(losses[0] - losses[1]) if all(isinstance(v, int | float) and math.isfinite(v) for v in losses) else None
