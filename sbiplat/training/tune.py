r"""Tuning: which flow, width, depth and learning rate, by trials that are ordinary trainings, most of them given up early.

Settings are proposed by a tree-structured Parzen estimator (Bergstra et al., 2011), the first being the defaults, and trials are stopped
by asynchronous successive halving (Li et al., 2020), both optuna's. What is compared is the best validation loss up to an epoch: after
:math:`m = \lceil E / 4 \rceil` and 2m of E epochs a trial goes on if it is among the better half of those that came so far. Earlier
and stricter rungs would judge by the learning rate: until the cosine has brought it down, a high one that ends best looks worse.

Every trial trains on the same rows with the same seed; rows that are held out for the gate are never read. A trial's settings are a
function of (seed, number, the trials before), written before it begins, so a search that was killed goes on with the trial that was under
way, from its checkpoint, and ends where an unbroken one does.

    OUT/tune.json      the search space, and each trial's settings, state and losses
    OUT/tuned.toml     the settings found, for --config
    OUT/trials/000/    the trials, each a run
    OUT/               the best of them, an ordinary run
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from sbiplat import files
from sbiplat.bank.bank import Bank
from sbiplat.errors import Diverged, OtherTraining, RunError, SettingError
from sbiplat.estimators.base import find
from sbiplat.progress import Progress
from sbiplat.runs import PRACTICAL, Run
from sbiplat.settings import Interval, Space, toml_table
from sbiplat.settings import space as search_space
from sbiplat.simulator import Simulator
from sbiplat.symmetry.settings import GNPE
from sbiplat.training.begin import PLAIN, Plan, TrainSettings, check_bank, check_place, plan
from sbiplat.training.gradient import check_compiler
from sbiplat.training.trainer import Abandoned, carry_out

VERSION = 1
STATES = ("running", "complete", "pruned", "diverged")
HALVING = 2
STARTUP_TRIALS = 8  # drawn from the whole space before proposals learn from losses
# Of training: settings by which validation losses are of other rows, or are not to be compared at one epoch; and those that change nothing.
NOT_SEARCHED = ("validation", "held_out", "held_out_most", "max_epochs", "patience", "smooth", "defend", "memory_mb", "compile", *PRACTICAL)


def tune(
    bank: Bank | str | Path, estimator: str = "npe", *, out: str | Path, trials: int = 20, seed: int = 0,
    search: Mapping[str, Any] | None = None, simulator: Simulator | str | None = None, progress: Progress | None = None, **settings: Any,
) -> Run:
    """Search the settings of least validation loss; the best trial's run stands in `out`. The same call resumes, more trials extend.

    search: what to try, by name: a list of values, or {"low": ..., "high": ..., "log": True}; by default the estimator's own
    (`Estimator.search`). settings: as of `train`; what is given is not searched. Needs the extra `tune`. Raises as `train` does.
    """
    if isinstance(trials, bool) or not isinstance(trials, int) or trials < 1:
        raise SettingError(f"trials = {trials!r}: expected a whole number of at least 1")
    progress = progress or Progress.auto()
    base = plan(bank, estimator, seed, simulator, settings)
    if base.symmetry.symmetry == GNPE:
        raise SettingError("tuning compares validation losses, and with symmetry = 'gnpe' each trial's are of its own kernel; tune with "
                           "symmetry = 'none' or 'augment', and train with what it finds")
    place = _space(base, search, settings)
    with _quiet_optuna():
        return _Search(base, place, settings, simulator, Path(out), progress).run(trials)


def _space(base: Plan, search: Mapping[str, Any] | None, settings: Mapping[str, Any]) -> Space:
    """The search space, less what the user has given; raises SettingError."""
    kind = find(base.architecture.estimator)
    for name in search or {}:
        if name in kind.of_the_loss:
            raise SettingError(f"search of {name}: the meaning of the loss of {base.architecture.estimator} depends on it, so losses "
                               "cannot be compared; tune once for each value, and compare what the gate measures")
        if name in NOT_SEARCHED:
            raise SettingError(f"search of {name}: validation losses cannot be compared over it, or do not depend on it; set it")
        if name in settings:
            raise SettingError(f"{name} is given and searched; leave one out")
    whole = search_space(kind.search if search is None else search, TrainSettings, kind.settings_class)
    free = {k: v for k, v in whole.items() if k not in settings}
    if not free:
        raise SettingError(f"nothing is left to search: {', '.join(whole) or 'the space'} {'are' if len(whole) != 1 else 'is'} given")
    return free


class _Search:
    """One search: its trials on disk, and the optuna study that is made of them anew."""

    def __init__(self, base: Plan, place: Space, settings: dict[str, Any], simulator: Any, out: Path, progress: Progress) -> None:
        import optuna

        self.base, self.space, self.settings, self.simulator, self.out, self.progress = base, place, settings, simulator, out, progress
        self.epochs = int(base.training.max_epochs or 1)
        self.distributions = {k: _distribution(v) for k, v in place.items()}
        self.trials: list[dict[str, Any]] = []
        self.study = optuna.create_study(pruner=optuna.pruners.SuccessiveHalvingPruner(math.ceil(self.epochs / HALVING**2), HALVING))

    def run(self, count: int) -> Run:
        """All trials that are still to be made, then the best as the run in `out`."""
        fresh = not (self.out / "tune.json").exists()
        if fresh:
            if (self.out / "run.json").exists():
                raise RunError(f"{self.out} holds a run that was not tuned; give the search another --out")
            check_place(self.out)
            for chosen in ({}, *({k: v} for k, values in self.space.items() if not isinstance(values, Interval) for v in values)):
                self._plan(chosen).architecture.build(self.base.seed)  # a choice that no trial could make is told now
            if self.base.training.compile:
                check_compiler(self.base.training.device)
            check_bank(self.base, self.progress)
        else:
            self._read()
        with files.locked(self.out, RunError(f"another process is tuning in {self.out}; wait for it, or stop it first")):
            if (self.out / "tune.json").exists():
                self._read()  # another process may have begun it meanwhile
            for told in self.trials:
                if told["state"] != "running":
                    self._retell(told)
            for number in range(count):
                if number >= len(self.trials) or self.trials[number]["state"] == "running":
                    self._trial(number, count)
            return self._settle()

    # ------------------------------------------------------------------------------------------------------ trials

    def _trial(self, number: int, count: int) -> None:
        """Make a trial, or go on with it."""
        trial = self._asked(number)
        told = self.trials[number]
        folder, seen = self.out / "trials" / f"{number:03d}", 0
        self.progress.say(f"trial {number + 1} of {count}: {_words(told['settings'])}")
        wanted = self._plan(told["settings"])

        def watch(epoch: int, best: float) -> bool:
            nonlocal seen
            trial.report(best, epoch + 1)
            seen = epoch + 1
            return trial.should_prune() and seen < self.epochs

        try:
            carry_out(wanted, folder, self.progress, watch=watch, bank_is_checked=True)
            state, message = "complete", ""
        except Abandoned:
            state, message = "pruned", ""
        except Diverged as error:
            state, message = "diverged", str(error)
        losses = _best_so_far(Run.open(folder))
        for epoch in range(seen, len(losses)):  # of a trial that was finished when its search was killed
            trial.report(losses[epoch], epoch + 1)
            trial.should_prune()
        told |= {"state": state, "epochs": len(losses), "validation_loss": _plain(min(losses, default=math.inf)),
                 "losses": [_plain(v) for v in losses], **({"message": message} if message else {})}
        self._tell(trial, told)
        self._write()
        shutil.rmtree(folder / "checkpoint", ignore_errors=True)
        loss = "never finite" if told["validation_loss"] is None else f"{told['validation_loss']:.4f}"
        self.progress.say(f"trial {number + 1} of {count}: {state} after {len(losses)} epochs, validation loss {loss}")

    def _asked(self, number: int) -> Any:
        """optuna's trial of that number; its settings are written before it begins."""
        import optuna

        seed = int(np.random.SeedSequence(self.base.seed, spawn_key=(0x7E4E, number)).generate_state(1)[0])
        self.study.sampler = optuna.samplers.TPESampler(seed=seed, n_startup_trials=STARTUP_TRIALS)
        if number < len(self.trials):
            self.study.enqueue_trial(self._encoded(self.trials[number]["settings"]))
        elif number == 0:
            self.study.enqueue_trial(self._encoded(self._defaults()))
        trial = self.study.ask(self.distributions)
        if number == len(self.trials):
            settings = {k: json.loads(v) if isinstance(v, str) else v for k, v in trial.params.items()}
            self.trials.append({"number": number, "settings": settings, "state": "running"})
            self._write()
        return trial

    def _retell(self, told: Mapping[str, Any]) -> None:
        """Let the study know a trial of before."""
        import optuna

        self.study.sampler = optuna.samplers.RandomSampler(seed=0)  # not asked: all is given
        self.study.enqueue_trial(self._encoded(told["settings"]))
        trial = self.study.ask(self.distributions)
        for epoch, loss in enumerate(told["losses"]):
            trial.report(math.inf if loss is None else loss, epoch + 1)
            trial.should_prune()
        self._tell(trial, told)

    def _tell(self, trial: Any, told: Mapping[str, Any]) -> None:
        from optuna.trial import TrialState

        if told["state"] == "complete":
            self.study.tell(trial, told["validation_loss"])
            return
        if told["state"] == "diverged":  # the worst there is, so that proposals keep away
            trial.report(math.inf, told["epochs"] + 1)
        self.study.tell(trial, state=TrialState.PRUNED)

    def _plan(self, chosen: Mapping[str, Any]) -> Plan:
        base, settings = self.base, {**self.settings, **chosen, "max_epochs": self.epochs}
        return plan(base.bank, base.architecture.estimator, base.seed, self.simulator, settings)

    def _defaults(self) -> dict[str, Any]:
        """What an untuned training takes, as far as it lies in the space."""
        values = {**asdict(self.base.training), **asdict(self.base.architecture.settings)}
        return {k: values[k] for k, v in self.space.items() if (v.holds(values[k]) if isinstance(v, Interval) else values[k] in v)}

    def _encoded(self, settings: Mapping[str, Any]) -> dict[str, Any]:
        return {k: v if isinstance(self.space[k], Interval) else json.dumps(v) for k, v in settings.items()}

    # ------------------------------------------------------------------------------------------------------ on disk

    def _about(self) -> dict[str, Any]:
        """What this search is: of another the trials are not these."""
        record = self.base.record(self.out)
        settings = {**record["architecture"]["settings"], **{k: v for k, v in record["training"].items() if k not in PRACTICAL},
                    **asdict(self.base.symmetry)}
        about = {"estimator": record["architecture"]["estimator"], "seed": record["seed"], "bank": record["bank"]["digest"],
                 "observe_source": record["observe_source"], "embedding_source": record["embedding_source"],
                 "settings": {k: v for k, v in settings.items() if k not in self.space},
                 "search": {k: asdict(v) if isinstance(v, Interval) else v for k, v in self.space.items()}}
        return json.loads(json.dumps(about))

    def _write(self) -> None:
        files.write_json(self.out / "tune.json", {"format_version": VERSION, **self._about(), "trials": self.trials})

    def _read(self) -> None:
        path = self.out / "tune.json"
        found = files.read_json(path, "tune.json", RunError)
        if found.get("format_version") != VERSION:
            raise RunError(f"{path} is of format {found.get('format_version')!r}, this sbiplat reads {VERSION}; give another --out")
        theirs_all = {**asdict(PLAIN), **_flat(found)}  # a search of before symmetries had none
        for name, mine in _flat(self._about()).items():
            theirs = theirs_all.get(name)
            if theirs != mine:
                raise OtherTraining(f"the search in {self.out} was begun with {name} = {theirs!r}, not {mine!r}; "
                                    "use the same settings to resume, or another --out")
        trials = found.get("trials")
        if not isinstance(trials, list) or not all(self._is_trial(k, t) for k, t in enumerate(trials)):
            raise RunError(f"{path} is damaged: its trials are no list of trials; give another --out")
        self.trials = trials

    def _is_trial(self, number: int, told: Any) -> bool:
        if not isinstance(told, dict) or told.get("number") != number or told.get("state") not in STATES:
            return False
        settings = told.get("settings")
        if not isinstance(settings, dict) or set(settings) != set(self.space):
            return False
        if not all(_lies_in(self.space[k], v) for k, v in settings.items()):
            return False
        if told["state"] == "running":
            return True
        losses, best = told.get("losses"), told.get("validation_loss")
        return isinstance(losses, list) and all(v is None or _is_number(v) for v in losses) and isinstance(told.get("epochs"), int) \
            and (_is_number(best) or (best is None and told["state"] != "complete"))

    def _settle(self) -> Run:
        """Make the best trial's run the one in `out`, unless it is."""
        complete = [t for t in self.trials if t["state"] == "complete"]
        if not complete:
            raise Diverged(f"no trial in {self.out} came to its end; the first said: {self.trials[0].get('message', '')}")
        best = min(complete, key=lambda t: t["validation_loss"])
        made = Run.open(self.out / "trials" / f"{best['number']:03d}").require_finished()
        states = [t["state"] for t in self.trials]
        record = {**made.record, "bank": self.base.record(self.out)["bank"],
                  "tune": {"trial": best["number"], "trials": len(states), "settings": best["settings"],
                           **{k: states.count(k) for k in ("complete", "pruned", "diverged")}}}
        if (self.out / "run.json").exists():
            there = Run.open(self.out)
            if there.record == record and there.weights_digest == made.weights_digest:
                return there
        for name in ("metrics.jsonl", "weights.safetensors"):
            with files.disk_errors(self.out / name), files.atomic_path(self.out / name) as temporary:
                shutil.copyfile(made.path / name, temporary)
        found = {**self.settings, **best["settings"], "max_epochs": self.epochs}
        if "embedding" in found:
            found["embedding"] = made.architecture.settings.embedding
        heading = {"estimator": made.architecture.estimator, "seed": made.seed}
        files.write_text(self.out / "tuned.toml", toml_table("train", {**heading, **found}))
        files.write_json(self.out / "run.json", record)
        return Run.open(self.out)


def _distribution(values: Interval | tuple[Any, ...]) -> Any:
    from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

    if not isinstance(values, Interval):
        return CategoricalDistribution([json.dumps(v) for v in values])
    if isinstance(values.low, int) and isinstance(values.high, int):
        return IntDistribution(values.low, values.high, log=values.log)
    return FloatDistribution(values.low, values.high, log=values.log)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _lies_in(values: Interval | tuple[Any, ...], value: Any) -> bool:
    if isinstance(values, Interval):
        return _is_number(value) and values.low <= value <= values.high
    return json.dumps(value) in [json.dumps(v) for v in values]


def _best_so_far(run: Run) -> list[float]:
    losses = [math.inf if m["validation_loss"] is None else m["validation_loss"] for m in run.metrics()]
    return [float(v) for v in np.minimum.accumulate(losses)] if losses else []


def _plain(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _flat(about: Mapping[str, Any]) -> dict[str, Any]:
    return {**{k: v for k, v in about.items() if k not in ("settings", "search", "format_version", "trials")}, **about.get("settings", {}),
            **{f"the search of {k}": v for k, v in about.get("search", {}).items()}}


def _words(settings: Mapping[str, Any]) -> str:
    return ", ".join(f"{k} = {f'{v:.3g}' if isinstance(v, float) else v}" for k, v in settings.items())


@contextmanager
def _quiet_optuna() -> Iterator[None]:
    """optuna is there, and says nothing of its own."""
    try:
        from optuna import logging
    except ImportError:
        raise SettingError("tuning needs optuna, which is in the extra `tune`: install sbiplat[tune]") from None
    before = logging.get_verbosity()
    logging.set_verbosity(logging.ERROR)
    try:
        yield
    finally:
        logging.set_verbosity(before)
