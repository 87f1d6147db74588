r"""The trainer: one loop for every estimator.

Per step: a batch, the mean loss, its gradient (see `gradient`) clipped to a global norm, one step of AdamW (matrices by
Muon where `optimizer = "muon"`: Jordan et al., 2024), the rate by linear warm-up and then a cosine to zero,

.. math:: \eta_t = \eta \min(1, t / t_w) \cdot \tfrac12 (1 + \cos(\pi t / T)),

and, where asked, an exponential moving average of the weights. A step whose loss or gradient is not finite is left out;
many in a row bring back the best weights at half the rate. The validation loss is taken every epoch over a fixed set
of rows, on the averaged weights where there are any; the best are kept, and training stops early when the loss, smoothed where
asked, has long been no less.

Every random choice is a function of (seed, epoch), and the state between two steps can be written and read, so a resumed
training ends with the weights of an unbroken one. torch's global generator is left as it was.
"""

from __future__ import annotations

import json
import math
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from sbiplat import files
from sbiplat.bank.bank import Bank
from sbiplat.bank.layout import versions
from sbiplat.bank.stream import take
from sbiplat.errors import Diverged, RunError, SettingError
from sbiplat.estimators.base import Estimator
from sbiplat.progress import Progress
from sbiplat.runs import Run
from sbiplat.signals import Interrupted, Signals, Stopped
from sbiplat.simulator import Simulator
from sbiplat.symmetry.settings import GNPE
from sbiplat.training import checkpoint
from sbiplat.training.batches import Rows
from sbiplat.training.begin import Plan, TrainSettings, check_bank, check_place, plan, same_training
from sbiplat.training.defence import Defence
from sbiplat.training.equivariant import settled
from sbiplat.training.gradient import Gradient, check_compiler

PATIENCE_WITH_NON_FINITE = 20
MOST_RECOVERIES = 3


def train(
    bank: Bank | str | Path, estimator: str = "npe", *, out: str | Path, seed: int = 0, simulator: Simulator | str | None = None,
    progress: Progress | None = None, **settings: Any,
) -> Run:
    """Train an estimator on a bank into a run directory; the same call resumes, or returns a finished run at once.

    settings: fields of `TrainSettings` and of the estimator's own settings, by name. simulator: of a bank of signals, whose
    `observe` makes x of them in every epoch; needed where it has no registered name. Raises SettingError, BankError,
    RunError where `out` holds another training, and Stopped after SIGINT or SIGTERM.
    """
    return carry_out(plan(bank, estimator, seed, simulator, settings), Path(out), progress or Progress.auto())


Watch = Callable[[int, float], bool]


class Abandoned(Exception):
    """Raised by a training that its watch gave up; its files stay."""


def carry_out(wanted: Plan, out: Path, progress: Progress, *, watch: Watch | None = None, bank_is_checked: bool = False) -> Run:
    """Train what is planned, or go on with it, or return the finished run. Raises as `train` does.

    watch: called after every epoch with its number and the best validation loss so far, on a resume with all those before first;
    where it says True, the training raises Abandoned. A finished run is returned without asking.
    """
    torch.set_num_threads(wanted.training.threads)
    if wanted.symmetry.symmetry == GNPE and wanted.action is not None and wanted.architecture.symmetry is None:
        if (out / "run.json").exists() and (run := same_training(wanted.record(out), out)).finished:
            return run
        wanted, bank_is_checked = settled(wanted, out, progress, carry_out), True
    record = wanted.record(out)
    if not (out / "run.json").exists():
        check_place(out)
        wanted.architecture.build(wanted.seed)
        if not bank_is_checked:
            check_bank(wanted, progress)
    elif (run := same_training(record, out)).finished:
        return run
    if wanted.training.compile:
        check_compiler(wanted.training.device)
    busy = RunError(f"another process is training into {out}; wait for it, or stop it first")
    with files.locked(out, busy), _global_generator_kept():
        if not (out / "run.json").exists():
            files.write_json(out / "run.json", {**record, "finished": False, "created": files.now(), "versions": versions()})
        run = same_training(record, out)  # another process may have begun or finished it meanwhile
        return run if run.finished else _Training(run, wanted, progress, watch).finish()


@contextmanager
def _global_generator_kept() -> Iterator[None]:
    with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
        yield


class _Training:
    """One training under way: its state between two steps, and the steps."""

    def __init__(self, run: Run, wanted: Plan, progress: Progress, watch: Watch | None) -> None:
        settings = wanted.training
        self.run, self.settings, self.progress, self.watch = run, settings, progress, watch
        self.device = torch.device(settings.device)
        self.rows = Rows(wanted, run.seed, progress)
        self.estimator: Estimator = run.architecture.build(run.seed)
        if wanted.start is not None:
            wanted.start(self.estimator)
        scales = self.rows.scales
        self.estimator.fit_scales(scales["theta"], scales["x"])
        for part in self.estimator.modules():
            if isinstance(part, Estimator):
                part.rows_were_fitted = self.rows.every_row and not self.estimator.draws_anew
        ready = self.estimator.prepare(scales["x"]) if settings.defend else {}
        self.defence = Defence(settings.defend, self.estimator, ready, settings.accumulate).to(self.device)
        self.estimator.to(self.device)
        self.validation = self.rows.to(self.estimator).validation
        self.gradient = Gradient(self.estimator, settings, self.defence)
        self.parameters = [p for p in self.estimator.parameters() if p.requires_grad]
        self.optimizers = _optimizers(self.parameters, settings)
        self.total_steps = settings.max_epochs * self.rows.per_epoch
        self.average = {k: v.detach().clone() for k, v in self.estimator.state_dict().items()} if settings.ema else None
        self.averaged = _homes(self.estimator) if settings.ema else {}
        self.best: dict[str, Tensor] = self._weights()
        self.apart: dict[str, float] = {}  # what the last validation loss is made of, where there is a defence
        self.state: dict[str, Any] = {
            "epoch": 0, "step_in_epoch": 0, "step": 0, "best_loss": math.inf, "best_epoch": -1,
            "smoothed": math.inf, "least_smoothed": math.inf, "least_epoch": -1, "rate_factor": 1.0,
            "in_a_row": 0, "skipped": 0, "recoveries": 0, "train_loss": 0.0, "seconds": 0.0,
        }
        self._since = time.monotonic()
        self._identity = files.digest_of({"config": run.config_digest, "bank": run.bank_digest})
        self._resume()

    # ------------------------------------------------------------------------------------------------------- steps

    def finish(self) -> Run:
        """Train to the end and write the best weights."""
        state, settings = self.state, self.settings
        signals = Signals()
        with signals.installed(), self.progress.task("train", self.total_steps, state["step"]) as advance:
            self._show_again()
            while state["epoch"] < settings.max_epochs and state["epoch"] - state["least_epoch"] <= settings.patience:
                try:
                    self._epoch(signals, advance)
                except Interrupted:
                    self._checkpoint()
                    raise Stopped(f"stopped in epoch {state['epoch']}: the state is kept in {self.run.path}; "
                                  "the same command resumes") from None
        run = self._write_result()
        if signals.requested and self.watch is not None:  # who watches has more to do, and is to stop too
            raise Stopped(f"stopped when {self.run.path} was finished; the same command goes on")
        return run

    def _epoch(self, signals: Signals, advance: Any) -> None:
        state = self.state
        if state["step_in_epoch"] == 0:
            torch.manual_seed(_epoch_seed(self.run.seed, state["epoch"]))
            state["train_loss"] = 0.0
        self.estimator.train()
        for batch in self.rows.epoch(state["epoch"], state["step_in_epoch"]):
            state["train_loss"] += (self._step(batch) - state["train_loss"]) / (state["step_in_epoch"] + 1)
            state["step_in_epoch"] += 1
            state["step"] += 1
            advance(1)
            if signals.requested:
                raise Interrupted
            if time.monotonic() - self._since > self.settings.checkpoint_seconds:
                self._checkpoint()
        self._end_epoch(advance)

    def _step(self, batch: dict[str, Any]) -> float:
        """One optimizer step; returns the loss, and the running one where the step was left out."""
        state, settings = self.state, self.settings
        rate = state["rate_factor"] * (settings.learning_rate or 0.0) * _schedule(state["step"], self.total_steps, settings.warmup)
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = rate
        for parameter in self.parameters:
            parameter.grad = None
        loss = self.gradient(batch)
        loss = loss + self.defence.add_gradient(batch["theta"], batch["x"], state["step"])
        gradients = [p.grad for p in self.parameters if p.grad is not None]
        norm = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(gradients)))
        value, size = torch.stack([loss, norm]).tolist()  # together: a GPU is waited for once a step
        if not (math.isfinite(value) and math.isfinite(size)):
            state["skipped"] += 1
            state["in_a_row"] += 1
            if state["in_a_row"] >= PATIENCE_WITH_NON_FINITE:
                self._recover()
            return float(state["train_loss"])
        if size > settings.clip_norm:
            torch._foreach_mul_(gradients, settings.clip_norm / size)
        state["in_a_row"] = 0
        for optimizer in self.optimizers:
            optimizer.step()
        if self.average is not None:
            decay = min(settings.ema or 0.0, (1 + state["step"]) / (10 + state["step"]))
            now = [table[name].detach() for table, name in self.averaged.values()]
            torch._foreach_lerp_([self.average[k] for k in self.averaged], now, 1 - decay)
        return value

    def _recover(self) -> None:
        """Back to the best weights at half the rate, with the optimizer's memory cleared."""
        state = self.state
        if state["recoveries"] >= MOST_RECOVERIES:
            raise Diverged(f"training in {self.run.path} diverged {MOST_RECOVERIES + 1} times (loss or gradient not finite); "
                           f"try --set learning_rate={(self.settings.learning_rate or 1e-3) / 10:g}, or look for extreme x in the bank")
        state["recoveries"] += 1
        state["in_a_row"] = 0
        state["rate_factor"] *= 0.5
        self.estimator.load_state_dict(self.best)
        if self.average is not None:
            self.average = {k: v.clone() for k, v in self.best.items()}
        self.optimizers = _optimizers(self.parameters, self.settings)

    def _end_epoch(self, advance: Any) -> None:
        state = self.state
        validation = self._validation_loss()
        if validation < state["best_loss"]:
            state["best_loss"], state["best_epoch"] = validation, state["epoch"]
            self.best = self._weights()
        self._smooth(validation)
        state["seconds"] += time.monotonic() - self._clock
        self._clock = time.monotonic()
        record = {
            "epoch": state["epoch"], "step": state["step"], "train_loss": state["train_loss"],
            "validation_loss": validation if math.isfinite(validation) else None,
            "learning_rate": self.optimizers[0].param_groups[0]["lr"], "seconds": round(state["seconds"], 3),
            "skipped_steps": state["skipped"], "recoveries": state["recoveries"],
            **{k: v if math.isfinite(v) else None for k, v in self.apart.items()},
            **({"smoothed_loss": state["smoothed"] if math.isfinite(state["smoothed"]) else None} if self.settings.smooth else {}),
        }
        with files.disk_errors(self.run.path / "metrics.jsonl"), (self.run.path / "metrics.jsonl").open("a") as file:
            file.write(json.dumps(record) + "\n")
        advance(0, f"epoch {state['epoch']}: validation loss {validation:.3f}, best {state['best_loss']:.3f}")
        state["epoch"] += 1
        state["step_in_epoch"] = 0
        self._show(state["epoch"] - 1, state["best_loss"])

    def _smooth(self, validation: float) -> None:
        """s <- a s + (1 - a) v, from the first finite v on; patience counts from where s was least."""
        state, share = self.state, self.settings.smooth
        if math.isfinite(validation):
            before = state["smoothed"] if math.isfinite(state["smoothed"]) else validation
            state["smoothed"] = share * before + (1 - share) * validation if share else validation
            if state["smoothed"] < state["least_smoothed"]:
                state["least_smoothed"], state["least_epoch"] = state["smoothed"], state["epoch"]

    def _show(self, epoch: int, best: float) -> None:
        if self.watch is not None and self.watch(epoch, best):
            raise Abandoned

    def _show_again(self) -> None:
        """Show the watch the epochs before a resume."""
        best = math.inf
        for record in self.run.metrics():
            best = min(best, math.inf if record["validation_loss"] is None else record["validation_loss"])
            self._show(record["epoch"], best)

    def _validation_loss(self) -> float:
        """Mean validation loss of the weights that would be kept, with what defends them, and its own fixed random stream."""
        current = {k: v.clone() for k, v in self.estimator.state_dict().items()} if self.average is not None else None
        if self.average is not None:
            self.estimator.load_state_dict(self.average)
        self.estimator.eval()
        generator_state = torch.get_rng_state()
        torch.manual_seed(_epoch_seed(self.run.seed, -1))
        value = self._mean_loss(disturbed=False)
        if self.defence:
            # What is watched is what is trained, on the same draws every epoch: of the plain loss alone the least may be that of the
            # first epochs, whose weights are still undefended.
            self.apart = {"plain_loss": value}
            if self.defence.disturbances:
                value = self._mean_loss(disturbed=True)
            if self.defence.fisher:
                self.apart["fisher_trace"] = self.defence.trace(self.validation["theta"], self.validation["x"])
                value += self.defence.fisher.weight * self.apart["fisher_trace"]
        torch.set_rng_state(generator_state)
        if current is not None:
            self.estimator.load_state_dict(current)
        return value if math.isfinite(value) else math.inf

    @torch.no_grad()
    def _mean_loss(self, disturbed: bool) -> float:
        """Of the validation rows, as they are or as the defence disturbs them."""
        losses = []
        for a in range(0, len(self.validation["theta"]), 4096):
            part = take(self.validation, slice(a, a + 4096))
            x = self.defence.disturbed(part["theta"], part["x"]) if disturbed else part["x"]
            losses.append(self.estimator.loss(part["theta"], x))
        return float(torch.cat(losses).double().mean())

    # ------------------------------------------------------------------------------------------------------- state

    def _weights(self) -> dict[str, Tensor]:
        source = self.average if self.average is not None else self.estimator.state_dict()
        return {k: v.detach().clone() for k, v in source.items()}

    def _checkpoint(self) -> None:
        self.state["seconds"] += time.monotonic() - self._clock
        self._clock = self._since = time.monotonic()
        generators = {"state": torch.get_rng_state()}
        if self.device.type == "cuda":
            generators["cuda"] = torch.cuda.get_rng_state(self.device)
        groups = {"weights": self.estimator.state_dict(), "best": self.best, "generator": generators,
                  **({"average": self.average} if self.average is not None else {}),
                  **{f"optimizer{k}": checkpoint.optimizer_tensors(o) for k, o in enumerate(self.optimizers)}}
        state = {k: (None if isinstance(v, float) and math.isinf(v) else v) for k, v in self.state.items()}
        checkpoint.save(self.run.path / "checkpoint" / "state.safetensors", self._identity, groups, state)

    def _resume(self) -> None:
        self._clock = time.monotonic()
        found = checkpoint.load(self.run.path / "checkpoint" / "state.safetensors", self._identity)
        if found is not None:
            groups, state = found
            self.state = {k: (math.inf if v is None else v) for k, v in state.items()}
            self.estimator.load_state_dict(groups["weights"])
            self.best = {k: v.to(self.device) for k, v in groups["best"].items()}
            if self.average is not None:
                self.average = {k: v.to(self.device) for k, v in groups["average"].items()}
            for k, optimizer in enumerate(self.optimizers):
                checkpoint.restore_optimizer(optimizer, groups.get(f"optimizer{k}", {}))
            torch.set_rng_state(groups["generator"]["state"])
            if self.device.type == "cuda" and "cuda" in groups["generator"]:
                torch.cuda.set_rng_state(groups["generator"]["cuda"], self.device)
        kept = [m for m in self.run.metrics() if m.get("epoch", -1) < self.state["epoch"]]
        files.write_text(self.run.path / "metrics.jsonl", "".join(json.dumps(m) + "\n" for m in kept))

    def _write_result(self) -> Run:
        from safetensors.torch import save_file

        path, state = self.run.weights_path, self.state
        if not math.isfinite(state["best_loss"]):
            raise Diverged(f"training in {self.run.path} never had a finite validation loss; try a lower learning_rate, or look for "
                           "extreme x in the bank")
        with files.disk_errors(path), files.atomic_path(path) as temporary:
            save_file({k: v.cpu().contiguous() for k, v in self.best.items()}, temporary)
        outcome = {"best_epoch": state["best_epoch"], "validation_loss": state["best_loss"], "epochs": state["epoch"],
                   "steps": state["step"], "seconds": round(state["seconds"], 1), "skipped_steps": state["skipped"],
                   "recoveries": state["recoveries"], "parameters": sum(p.numel() for p in self.estimator.parameters())}
        files.write_json(self.run.path / "run.json", {**self.run.record, "finished": True, "outcome": outcome})
        shutil.rmtree(self.run.path / "checkpoint", ignore_errors=True)
        return Run.open(self.run.path)


def _schedule(step: int, total: int, warmup: float) -> float:
    rise = min(1.0, (step + 1) / max(1.0, warmup * total))
    return rise * 0.5 * (1 + math.cos(math.pi * step / total))


def _epoch_seed(seed: int, epoch: int) -> int:
    return int(np.random.SeedSequence(seed, spawn_key=(0x70C4, epoch + 1)).generate_state(1, np.uint64)[0] >> 1)


def _homes(estimator: Estimator) -> dict[str, tuple[dict[str, Any], str]]:
    """Where each floating-point tensor of the state_dict is found anew in every step: a table of its module, and its name there."""
    floats = {k for k, v in estimator.state_dict().items() if v.is_floating_point()}
    homes = {f"{path}.{name}".lstrip("."): (table, name) for path, module in estimator.named_modules(remove_duplicate=False)
             for table in (module._parameters, module._buffers) for name in table}
    if not floats <= set(homes):
        raise SettingError(f"ema cannot average {min(floats - set(homes))}, which the net's own state_dict makes up; use ema = 0")
    return {k: homes[k] for k in sorted(floats)}


def _optimizers(parameters: list[nn.Parameter], settings: TrainSettings) -> list[torch.optim.Optimizer]:
    """AdamW for all, or Muon for matrices and AdamW for the rest, at one rate: Muon's updates are scaled to AdamW's size."""
    rate, decay = settings.learning_rate or 0.0, settings.weight_decay
    if settings.optimizer == "adamw":
        return [torch.optim.AdamW(parameters, lr=rate, betas=(0.9, 0.99), weight_decay=decay, fused=True)]
    if not hasattr(torch.optim, "Muon"):
        raise SettingError(f"optimizer = 'muon' needs torch 2.9 or later, this is {torch.__version__}; use adamw")
    matrices = [p for p in parameters if p.ndim == 2]
    rest = [p for p in parameters if p.ndim != 2]
    return [torch.optim.AdamW(rest, lr=rate, betas=(0.9, 0.99), weight_decay=0.0, fused=True),
            torch.optim.Muon(matrices, lr=rate, weight_decay=decay, adjust_lr_fn="match_rms_adamw")]
