"""What a training is, and all that can be told of it before it begins: settings, the record in run.json, the place, the bank, the noise."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from sbiplat.bank.bank import Bank
from sbiplat.bank.layout import STATUS, simulator_of
from sbiplat.bank.stream import Split, pairs_at, split
from sbiplat.errors import OtherTraining, RunError, SettingError, SimulatorError
from sbiplat.estimators.base import Architecture, Estimator, find, find_trained_here
from sbiplat.estimators.equivariant import BASES, Equivariant
from sbiplat.nets import embeddings
from sbiplat.observe import Observe, check_observe
from sbiplat.progress import Progress
from sbiplat.runs import FORMAT_VERSION, PRACTICAL, Run, usable_device
from sbiplat.settings import build as build_settings
from sbiplat.settings import setting, whole_seed
from sbiplat.settings import split as split_settings
from sbiplat.simulator import Simulator, resolve
from sbiplat.source import source_digest
from sbiplat.symmetry import names
from sbiplat.symmetry.action import GroupAction
from sbiplat.symmetry.algebra import check_algebra
from sbiplat.symmetry.augment import Augmentation
from sbiplat.symmetry.contract import check_action
from sbiplat.symmetry.frame import PROXY, name_of, widths_of
from sbiplat.symmetry.settings import AUGMENT, GNPE, NONE, SymmetrySettings
from sbiplat.training.defence import checked, parsed

PRECISIONS = ("float32", "bf16")
HELD_OUT_LEAST = 500
OF_BOTH = ("members", "validation", "held_out", "held_out_most", "device", "defend", "compile", "memory_mb")
CHECKED_ROWS, CHECKED_SECONDS = 1024, 10.0  # of simulations on which a symmetry is checked before a training
PLAIN = SymmetrySettings()


@dataclass(frozen=True)
class TrainSettings:
    """How an estimator is trained, whatever it is."""

    batch_size: int | None = setting(None, "rows a step; by default a fortieth of the bank, from 64 to 1024", low=1)
    learning_rate: float | None = setting(None, "peak rate; by default 3e-3 sqrt(batch_size / 256), at most 5e-3", low=1e-8, high=1.0)
    optimizer: str = setting("adamw", "adamw, or muon for matrices and adamw for the rest", among=("adamw", "muon"))
    weight_decay: float = setting(1e-4, "decoupled weight decay", low=0.0, high=1.0)
    max_epochs: int | None = setting(
        None, "epochs of the cosine; by default about 4000 steps (npse, fmpe: 8000), from 10 to 200 epochs", low=1)
    warmup: float = setting(0.02, "share of all steps in which the rate rises", low=0.0, high=0.9)
    patience: int = setting(20, "epochs without a better validation loss before stopping", low=1)
    clip_norm: float = setting(5.0, "largest norm of a step's gradient", low=1e-6)
    ema: float | None = setting(
        None, "decay of the moving average of weights, a step; by default 0.999; 0: none", low=0.0, high=0.99999)
    validation: float = setting(0.05, "share of rows for the validation loss", low=0.001, high=0.5)
    held_out: float | None = setting(
        None, "share of rows kept for the gate, which training never sees; by default a tenth, of a small bank up to a fifth for 500 rows",
        low=0.001, high=0.5)
    held_out_most: int | None = setting(
        None, "at most so many rows for each of the two; by default 5000, fewer where they would take over an eighth of memory_mb", low=10)
    memory_mb: float = setting(2048, "MB that training rows may take in memory; more are streamed", low=1)
    defend: tuple[str, ...] = setting((), "defences against changes of x: slab:SHARE, fisher:WEIGHT, noise:SCALE, adversarial:EPS")
    smooth: float = setting(
        0.0, "exponential smoothing of the validation losses that patience looks at; 0: none", low=0.0, high=0.999)
    accumulate: int = setting(1, "pieces of a batch whose gradients add up to one step's: less memory, the same step", low=1, high=65536)
    precision: str = setting(
        "float32", "of linear and convolution layers in training; all else, and what draws, is float32", among=PRECISIONS)
    compile: bool = setting(False, "torch.compile of the loss; needs a C++ compiler, on CUDA Triton")
    threads: int = setting(1, "torch threads", low=1, high=1024)
    device: str = setting("cpu", "cpu, cuda or cuda:K")
    checkpoint_seconds: float = setting(30.0, "seconds between checkpoints", low=0.0)


def filled(settings: TrainSettings, bank: Bank, defaults: Mapping[str, Any]) -> TrainSettings:
    """Defaults that depend on the bank's size and on the estimator (its `training_defaults`), as figures."""
    values = asdict(settings)
    if settings.batch_size is None:
        values["batch_size"] = min(1024, max(64, 2 ** round(math.log2(max(bank.rows, 2) / 40))))
    if settings.learning_rate is None:
        values["learning_rate"] = min(5e-3, 3e-3 * math.sqrt(values["batch_size"] / 256))
    if settings.max_epochs is None:
        values["max_epochs"] = min(200, max(10, round(defaults["steps"] * values["batch_size"] / bank.rows)))
    if settings.ema is None:
        values["ema"] = defaults["ema"]
    if settings.held_out_most is None:
        values["held_out_most"] = min(5000, max(1000, int(settings.memory_mb * 2**17) // bank.header.x.row_bytes))
    if settings.held_out is None:
        values["held_out"] = min(0.2, max(0.1, HELD_OUT_LEAST / max(1, int((bank.status == STATUS["ok"]).sum()))))
    usable_device(settings.device)
    return build_settings(TrainSettings, values)


@dataclass(frozen=True)
class Plan:
    """A training before it begins: which net, on which rows of which bank, how."""

    bank: Bank
    architecture: Architecture
    training: TrainSettings
    seed: int
    apart: Split
    observe: Observe | None
    symmetry: SymmetrySettings = PLAIN
    action: GroupAction | None = None  # of the simulator, where symmetry asks for it
    simulator: Simulator | None = None  # then
    augmentation: Augmentation | None = None  # what moves rows, where symmetry is augment
    start: Callable[[Estimator], None] | None = None  # what an estimator is given before its training

    def record(self, out: Path) -> dict[str, Any]:
        """What this training is: run.json less its outcome."""
        bank, apart, shape = self.bank, self.apart, self.architecture.settings
        return {
            "format_version": FORMAT_VERSION, "architecture": self.architecture.to_json(), "training": asdict(self.training),
            "seed": self.seed,
            "bank": {"path": str(bank.path.resolve()), "relative_path": os.path.relpath(bank.path, out),
                     "digest": bank.digest, "rows": bank.rows, "simulator": bank.header.simulator,
                     "seed": bank.header.seed, "block_size": bank.header.block_size},
            "prior": bank.header.prior.to_json(),
            "split": {"validation": len(apart.validation), "held_out": len(apart.held_out), "training": apart.training_rows,
                      "left_out": apart.left_out, "digest": apart.digest()},
            "observe_source": source_digest(self.observe.function) if self.observe else None,
            "embedding_source": embeddings.source_digest(getattr(shape, "embedding", "mlp")),
            **({"symmetry": self._symmetry()} if self.action is not None else {}),
        }

    def _symmetry(self) -> dict[str, Any]:
        """The settings, the action, and how rows are moved, where they are."""
        assert self.action is not None
        about = {**asdict(self.symmetry), "action": names.describe(self.action)}
        if self.augmentation is None:
            return about
        frame = self.augmentation.frame
        return {**about, "widths": dict(zip(frame.action.coordinates, frame.widths, strict=True)),
                "acceptance": self.augmentation.acceptance}


def plan(bank: Bank | str | Path, estimator: str, seed: int, simulator: Simulator | str | None, settings: Mapping[str, Any]) -> Plan:
    """The training that these words ask for; see `trainer.train`."""
    seed = whole_seed(seed)
    bank = (bank if isinstance(bank, Bank) else Bank.open(bank)).require_complete()
    kind, values = find_trained_here(estimator), dict(settings)
    if "embedding" in values:
        values["embedding"] = embeddings.register(values["embedding"])
    ours, theirs, groups = split_settings(values, TrainSettings, kind.settings_class, SymmetrySettings)
    symmetry = build_settings(SymmetrySettings, groups)
    if symmetry.symmetry != GNPE and (idle := sorted(set(groups) - {"symmetry"})):
        raise SettingError(f"{idle[0]} is of symmetry = {GNPE!r}, and symmetry = {symmetry.symmetry!r}; leave it away")
    training = filled(build_settings(TrainSettings, ours), bank, kind.training_defaults)
    training = replace(training, defend=checked(training.defend, estimator, kind))
    prior, shape = bank.header.prior, build_settings(kind.settings_class, theirs)
    observe = observe_of(bank, simulator, f"sbiplat train {bank.path}")
    architecture = Architecture(estimator, shape, prior.dim, observe.x if observe else bank.header.x, prior.gaussianised)
    apart = split(bank, seed, training.validation, training.held_out, training.held_out_most)
    if observe:
        some = pairs_at(bank, apart.validation[:8])
        check_observe(observe, some["x"], some["parameters"])
    made = Plan(bank, architecture, training, seed, apart, observe, symmetry)
    if symmetry.symmetry == NONE:
        return made
    action, made_by = action_of(made, simulator)
    augmentation = Augmentation.of(action, prior) if symmetry.symmetry == AUGMENT else None
    return replace(made, action=action, simulator=made_by, augmentation=augmentation)


def action_of(plan: Plan, simulator: Simulator | str | None) -> tuple[GroupAction, Simulator]:
    """The action of the simulator that made the bank, and it; raises a UserError where there is none, or it does not go with the training.
    """
    bank, kind = plan.bank, plan.symmetry.symmetry
    made_by = simulator_of(bank.header, bank.path, simulator, f"sbiplat train {bank.path}")
    if made_by.symmetry is None:
        raise SettingError(f"symmetry = {kind!r}: the simulator {made_by.name!r} declares no symmetry; give it one "
                           "(@sp.simulator(..., symmetry=...)), or leave the setting away")
    action = names.resolve_action(made_by.symmetry)
    if kind == GNPE:
        _check_gnpe(plan, action)
    check_algebra(action, bank.header.prior, plan.architecture.x)
    names.describe(action, made_by)  # registers it, so that this process finds it again
    return action, made_by


def check_symmetry(plan: Plan) -> None:
    """Hold the action against a few simulations; raises SymmetryError where it is declared exact and is not."""
    assert plan.simulator is not None
    if not plan.simulator.parallel:  # whose ranks are not here
        check_action(plan.simulator, plan.action, rows=CHECKED_ROWS, seconds=CHECKED_SECONDS)


def _check_gnpe(plan: Plan, action: GroupAction) -> None:
    """Raises SettingError where GNPE does not go with the other settings, or with x."""
    architecture, training = plan.architecture, plan.training
    if architecture.estimator not in BASES:
        raise SettingError(f"symmetry = {GNPE!r} goes with {', '.join(BASES)}, and the estimator is {architecture.estimator}")
    for given, word in ((training.compile, "compile = true"), (getattr(architecture.settings, "members", 1) > 1, "members")):
        if given:
            raise SettingError(f"symmetry = {GNPE!r} does not go with {word}; leave it away")
    for kind in parsed(training.defend):
        if kind not in Equivariant.defences:
            raise SettingError(f"symmetry = {GNPE!r} can be defended by {' and '.join(Equivariant.defences)}, and not by {kind}; leave it "
                               "away")
    if not action.coordinates:
        raise SettingError(f"symmetry = {GNPE!r}: {name_of(action)} has no pose that a net could infer; for a set alone take embedding = "
                           "'deepset' and symmetry = 'none', or give it in a Product with an action that has one")
    if PROXY in architecture.x.shapes:
        raise SettingError(f"x has a field {PROXY!r} of its own, and GNPE adds one of that name; call it something else")
    for name in plan.symmetry.initial or {}:
        if name in OF_BOTH:
            raise SettingError(f"initial: {name} is the same for both nets of gnpe; set it for the training")
    widths_of(action, plan.symmetry.kernel_widths or {})


def check_place(out: Path) -> None:
    """A run may begin in a directory that is not there, or has nothing in it; raises RunError."""
    own = ("lock", "initial")
    if out.exists() and (not out.is_dir() or any(p.name not in own and not p.name.startswith(".tmp-") for p in out.iterdir())):
        raise RunError(f"{out} holds other files and is no run; give the run another --out")


def check_bank(plan: Plan, progress: Progress) -> None:
    """All that can be told of the bank before anything is written: every byte, how many rows failed, and of what is to move them whether
    it is a symmetry; raises RunError, SymmetryError."""
    bank, apart, estimator = plan.bank, plan.apart, plan.architecture.estimator
    problems = bank.verify(progress)
    if problems:
        raise RunError(f"the bank cannot be trained on: {problems[0]}" + (f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""))
    share, most = apart.left_out / bank.rows, find(estimator).most_failed
    if share > most:
        raise RunError(f"{apart.left_out} of {bank.rows} rows ({share:.2%}) failed, and {estimator} may leave out at most "
                       f"{most:.2%}: its likelihood would be that of simulations that succeed; return an x in such rows, or use npe")
    if apart.left_out:
        progress.say(f"{apart.left_out} of {bank.rows} rows ({share:.2%}) failed and are left out: "
                     "the posterior is given that a simulation succeeds"
                     + ("" if plan.augmentation is None else ", and moved rows may lie where one would have failed"))
    if plan.augmentation is not None:
        check_symmetry(plan)


def same_training(record: Mapping[str, Any], out: Path) -> Run:
    """The run that stands in `out`, if it is of the same training; raises OtherTraining with the first thing that differs."""
    run, record = Run.open(out), json.loads(json.dumps(record))  # as it is read back: lists for tuples

    def flat(record: Mapping[str, Any]) -> dict[str, Any]:
        training = {**asdict(TrainSettings()), **record["training"]}  # what a run of before a setting lacks is its default
        symmetry = record.get("symmetry") or {}
        settings = {**record["architecture"]["settings"], **{k: v for k, v in training.items() if k not in PRACTICAL}}
        return {"estimator": record["architecture"]["estimator"], "seed": record["seed"],
                **{k: list(v) if isinstance(v, tuple) else v for k, v in settings.items()}, "bank": record["bank"]["digest"][:12],
                "the embedding's code": (record.get("embedding_source") or "none")[:12],
                "the code of observe": (record.get("observe_source") or "none")[:12],
                **{k: symmetry.get(k, v) for k, v in asdict(PLAIN).items()},
                "the action": symmetry.get("action") or (record["architecture"].get("symmetry") or {}).get("action")}

    mine, theirs = flat(run.record), flat(record)
    differs = [k for k in theirs if mine.get(k) != theirs[k]]
    if differs:
        k = differs[0]
        raise OtherTraining(f"{out} was begun with {k} = {mine.get(k)!r}, not {theirs[k]!r}; "
                            "use the same settings to resume, or another --out")
    return run


def observe_of(bank: Bank, simulator: Simulator | str | None, command: str) -> Observe | None:
    """What makes x of the bank's rows, None where they are x; raises SimulatorError where a bank of signals has lost it."""
    if not bank.header.signals:
        given = resolve(simulator) if simulator is not None else None
        if given is not None and given.observe is not None:
            raise SimulatorError(f"simulator {given.name!r} has an observe, and the bank {bank.path} was made without one: it holds x "
                                 "itself; simulate again into another --out")
        if given is not None:
            simulator_of(bank.header, bank.path, given, command)
        return None
    return simulator_of(bank.header, bank.path, simulator, command).observe
