"""The run directory: all of one training, written whole, hashed, and read back without running anything.

    RUN/run.json              what was trained: architecture, settings, seeds, bank digest, split, versions, outcome
    RUN/weights.safetensors   the best weights
    RUN/metrics.jsonl         a line an epoch
    RUN/checkpoint/           what an unfinished training resumes from; gone when it has finished
    RUN/certificate.json      the gate's verdict           RUN/diagnostics.npz  what its figures were made of
    RUN/report.html           the report
    RUN/tune.json, tuned.toml, trials/   of a run that was tuned: the search, the settings it found, and what it tried
"""

from __future__ import annotations

import importlib
import json
import shlex
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from sbiplat import files
from sbiplat.bank.bank import Bank
from sbiplat.errors import BankError, PriorError, RunError, SettingError, SimulatorError
from sbiplat.estimators.base import Architecture, Estimator
from sbiplat.nets.embeddings import source_digest
from sbiplat.observation import ObservationSpec
from sbiplat.prior import Prior
from sbiplat.symmetry.settings import SymmetrySettings

FORMAT_VERSION = 1
# Settings that change how long a training takes or where it runs, not what it is: a resume may change them.
PRACTICAL = ("threads", "device", "checkpoint_seconds")
DOOR = "sbiplat.gate.door:load"  # by name, since it stands above


_KINDS: dict[str, type] = {
    "finished": bool, "seed": int, "training": dict, "bank.digest": str, "bank.rows": int, "bank.path": str, "bank.relative_path": str,
    "split.digest": str, "split.left_out": int, "split.held_out": int,
}


@dataclass(frozen=True)
class Run:
    """A run directory as it was when opened. `record` is run.json."""

    path: Path
    record: Mapping[str, Any]

    def __repr__(self) -> str:
        state = "finished" if self.record.get("finished") else "unfinished"
        return f"Run({str(self.path)!r}, {self.record['architecture']['estimator']}, {state})"

    @classmethod
    def open(cls, path: str | Path) -> Run:
        """Open a run; raises RunError where it is none, damaged, or of another format version."""
        path = Path(path)
        if not path.is_dir():
            raise RunError(f"no run at {path}; make one with `sbiplat train BANK --estimator npe --out {path}`")
        record = files.read_json(path / "run.json", "run.json (is this a run? it holds a bank)" if (path / "bank.json").exists()
                                 else "run.json (is this a run?)", RunError)
        if record.get("format_version") != FORMAT_VERSION:
            raise RunError(f"{path} is of run format {record.get('format_version')!r}, this sbiplat reads {FORMAT_VERSION}; "
                           "train again, or use the sbiplat that made it")
        run = cls(path, record)
        run._check()
        return run

    def _check(self) -> None:
        missing = [k for k in ("architecture", "training", "seed", "bank", "prior", "split", "finished") if k not in self.record]
        if missing:
            raise RunError(f"{self.path / 'run.json'} is damaged: it lacks {', '.join(missing)}")
        try:
            assert self.prior.dim == self.architecture.dim, "prior and architecture differ"
            for place, kind in _KINDS.items():
                value: Any = self.record
                for key in place.split("."):
                    value = value[key]
                assert type(value) is kind, f"{place} = {value!r}"
            assert not self.finished or isinstance(self.record["outcome"]["validation_loss"], float), "outcome.validation_loss"
        except (KeyError, TypeError, ValueError, AttributeError, AssertionError, PriorError, SettingError, SimulatorError) as error:
            raise RunError(f"{self.path / 'run.json'} is damaged: {str(error) or repr(error)}") from None

    @property
    def finished(self) -> bool:
        return bool(self.record["finished"])

    def require_finished(self) -> Run:
        if not self.finished:
            raise RunError(f"the training in {self.path} has not finished; run the same `sbiplat train` command again to resume it")
        return self

    @cached_property
    def prior(self) -> Prior:
        return Prior.from_json(self.record["prior"])

    @cached_property
    def architecture(self) -> Architecture:
        return Architecture.from_json(dict(self.record["architecture"]))

    @property
    def x(self) -> ObservationSpec:
        return self.architecture.x

    @property
    def seed(self) -> int:
        return int(self.record["seed"])

    @property
    def weights_path(self) -> Path:
        return self.path / "weights.safetensors"

    @cached_property
    def weights_digest(self) -> str:
        """SHA-256 of the weights; `estimator` gives these or none."""
        return files.digest_bytes(self._weights())

    def _weights(self) -> bytes:
        try:
            return self.weights_path.read_bytes()
        except FileNotFoundError:
            raise RunError(f"{self.path} has no weights any more; delete it and train again") from None
        except OSError as error:
            raise RunError(f"{self.weights_path} cannot be read: {error.strerror or error}") from None

    @cached_property
    def config_digest(self) -> str:
        """SHA-256 of all that made the posterior besides weights and bank: architecture, prior, training settings, seed, split, and
        the code of a user's embedding as it is now."""
        code = source_digest(getattr(self.architecture.settings, "embedding", "mlp"))
        training = {k: v for k, v in self.record["training"].items() if k not in PRACTICAL}
        parts = {k: self.record[k] for k in ("architecture", "prior", "seed", "split", "symmetry") if k in self.record}
        observe = self.record.get("observe_source")
        recalibration = {"recalibration": self.recalibration} if self.recalibration is not None else {}
        return files.digest_of({**parts, "training": training, "embedding_code": code, "observe_code": observe, **recalibration})

    @property
    def symmetry_settings(self) -> dict[str, Any]:
        """What its training made of a symmetry, as it was given: the settings that are not the default ones."""
        found, usual = self.record.get("symmetry") or {}, asdict(SymmetrySettings())
        return {k: found[k] for k in usual if found.get(k, usual[k]) != usual[k]}

    @property
    def action_words(self) -> tuple[str, ...]:
        """What commands on it need beside its path: the simulator whose action is code in a user's file."""
        about = self.record["architecture"].get("symmetry")
        action = about.get("action") if isinstance(about, dict) else None
        own = str(action.get("own", "")) if isinstance(action, dict) else ""
        return ("--simulator", own) if ".py:" in own else ()

    @property
    def gate_command(self) -> str:
        """What to type to have it gated."""
        return shlex.join(["sbiplat", "gate", str(self.path), *self.action_words])

    @property
    def recalibration(self) -> Mapping[str, Any] | None:
        """The maps that recalibrate its draws (see `posteriors.recalibrated`), None where there are none."""
        return self.record.get("recalibration")

    @property
    def bank_digest(self) -> str:
        return str(self.record["bank"]["digest"])

    def bank_place(self) -> Path | None:
        """Where the bank is, if it is where it was or in the same place beside the run."""
        places = (Path(self.record["bank"]["path"]), self.path / self.record["bank"]["relative_path"])
        return next((p for p in places if p.exists()), None)

    def bank(self, path: str | Path | None = None) -> Bank:
        """The bank that this run was trained on, as it was then; raises BankError where it has changed or is gone."""
        recorded, found = self.record["bank"], Path(path) if path else self.bank_place()
        if found is None or not found.exists():
            raise BankError(f"the bank of {self.path} is not at {path or recorded['path']} any more; say where it is with --bank")
        bank = Bank.open(found).first(int(recorded["rows"]))
        if bank.digest != self.bank_digest:
            raise BankError(f"{found} is not the bank that {self.path} was trained on: its digest is {bank.digest[:12]}, not "
                            f"{self.bank_digest[:12]}; name the right one with --bank, or train again")
        return bank

    def estimator(self, device: str = "cpu") -> Estimator:
        """The estimator with its weights."""
        from safetensors import SafetensorError
        from safetensors.torch import load

        weights = self._weights()
        try:
            estimator = self.architecture.build()
        except (RuntimeError, TypeError, ValueError, OverflowError, MemoryError) as error:
            line = (str(error) or repr(error)).splitlines()[0]
            raise RunError(f"the net that {self.path / 'run.json'} describes cannot be made ({line[:120]}): the file is damaged") from None
        if files.digest_bytes(weights) != self.weights_digest:
            raise RunError(f"{self.weights_path} was changed by another process; open the run again")
        try:
            tensors = load(weights)
            for name, wanted in estimator.state_dict().items():
                if name in tensors and tensors[name].dtype != wanted.dtype:
                    raise RuntimeError(f"{name} holds {tensors[name].dtype}, expected {wanted.dtype}")
                if name in tensors and wanted.is_floating_point() and not bool(tensors[name].isfinite().all()):
                    raise RuntimeError(f"{name} holds numbers that are not finite")
            estimator.load_state_dict(tensors)
        except (SafetensorError, OSError, RuntimeError, KeyError) as error:
            raise RunError(f"{self.weights_path} is damaged or of another architecture: {str(error).splitlines()[0]}") from None
        return estimator.to(usable_device(device)).eval()

    def to_sbi(self, *, allow_uncertified: bool = False, embedding: Any = None, device: str = "cpu") -> Any:
        """The posterior behind sbi's `NeuralPosterior`: theta as float32 tensors in its own space, x as tensors.

        Its draws take their seed from torch's global generator (`torch.manual_seed`), one number a call. Arguments as for `sbiplat.load`:
        raises Uncertified unless the certificate holds; SettingError where sbi is missing or x is a dict.
        """
        module, _, attribute = DOOR.partition(":")
        load = getattr(importlib.import_module(module), attribute)
        return load(self, allow_uncertified=allow_uncertified, embedding=embedding, device=device).to_sbi()

    def metrics(self) -> list[dict[str, Any]]:
        """One record an epoch; lines that cannot be read are left out."""
        path, out = self.path / "metrics.jsonl", []
        for line in path.read_text().splitlines() if path.is_file() else []:
            try:
                out.append(json.loads(line))
            except json.JSONDecodeError:
                continue
        return out


def usable_device(name: Any) -> str:
    """The name of a device that is here, cpu, cuda or cuda:K; raises SettingError."""
    import torch

    try:
        if torch.device(name).type not in ("cpu", "cuda"):
            raise RuntimeError("expected cpu, cuda or cuda:K")
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError, TypeError) as error:
        raise SettingError(f"device = {name!r} is not to be had here: {str(error).splitlines()[0]}") from None
    return str(name)
