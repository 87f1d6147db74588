"""A posterior that sbi trained as a run of ours, so that the gate can test it: `sp.from_sbi`."""

from __future__ import annotations

import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from sbiplat import files
from sbiplat.bank.bank import Bank
from sbiplat.bank.layout import versions
from sbiplat.bank.stream import Split, pairs_at
from sbiplat.errors import BankError, RunError, SettingError
from sbiplat.estimators.base import Architecture
from sbiplat.estimators.sbi_npe import PROBES, SbiNPE, SbiSettings, require_sbi
from sbiplat.nets import embeddings
from sbiplat.posteriors.theta_space import ThetaSpaceSampler
from sbiplat.progress import Progress
from sbiplat.runs import Run
from sbiplat.settings import build as build_settings
from sbiplat.settings import whole_seed
from sbiplat.training.begin import Plan, check_bank, check_place, same_training
from sbiplat.training.rows import SHARES, set_apart

CHECKED = 256


def from_sbi(
    trained: Any, bank: Bank | str | Path, *, out: str | Path, seed: int = 0, trained_on: Any = None, progress: Progress | None = None,
    **settings: Any,
) -> Run:
    """A run from a density estimator (or a DirectPosterior) that sbi's NPE trained on rows of a bank; gate it like any other.

    settings: the arguments of sbi's `posterior_nn` that it was built with (`SbiSettings`), and the shares of `sp.pairs`. The net is built
    anew from them, and nothing is written unless it gives the same densities. seed: that of `sp.pairs`, whose training rows sbi must have
    been given. trained_on: the theta it was given, (N, D), which is then held against the bank and its held-out rows; without it the run
    says that the rows are by your word. Raises SettingError, BankError, RunError.
    """
    require_sbi()
    start = time.monotonic()
    net = _density_of(trained)
    bank = (bank if isinstance(bank, Bank) else Bank.open(bank)).require_complete()
    if bank.header.signals:
        raise BankError(f"{bank.path} holds signals, of which x is drawn anew in every epoch; sbi's net needs a bank of x itself")
    seed, out, progress = whole_seed(seed), Path(out), progress or Progress.auto()
    if "embedding" in settings:
        settings["embedding"] = embeddings.register(settings["embedding"])
    apart, split_settings = set_apart(bank, seed, {k: settings.pop(k) for k in SHARES if k in settings})
    prior = bank.header.prior
    architecture = Architecture("sbi", build_settings(SbiSettings, settings), prior.dim, bank.header.x, prior.gaussianised)
    wanted = Plan(bank, architecture, split_settings, seed, apart, None)
    record = wanted.record(out)
    record["training"] = {name: getattr(split_settings, name) for name in SHARES}
    record["split"]["trained_on"] = _rows_of(trained_on, bank, apart)  # which the certificate binds
    found = (out / "run.json").exists()
    if found:
        same_training(record, out)
    else:
        check_place(out)
        check_bank(wanted, progress)
    estimator = architecture.build()
    assert isinstance(estimator, SbiNPE)
    loss = _adopted(estimator, net, bank, apart)
    data = _safetensors(estimator)
    if found and (old := Run.open(out)).finished:
        if old.weights_digest != files.digest_bytes(data):
            raise RunError(f"{out} holds another net of sbi's; use another out")
        return old
    with files.locked(out, RunError(f"another process writes into {out}; wait for it, or use another out")):
        with files.disk_errors(out), files.atomic_path(out / "weights.safetensors") as temporary:
            temporary.write_bytes(data)
        outcome = {"validation_loss": loss, "trained_by": f"sbi {version('sbi')}",
                   "parameters": sum(p.numel() for p in estimator.parameters()), "seconds": round(time.monotonic() - start, 1)}
        files.write_json(out / "run.json", {**record, "finished": True, "outcome": outcome, "created": files.now(),
                                            "versions": {**versions(), "sbi": version("sbi")}})
    return Run.open(out)


def _density_of(trained: Any) -> nn.Module:
    from sbi.inference import DirectPosterior
    from sbi.neural_nets.estimators.base import ConditionalDensityEstimator

    net = trained.posterior_estimator if isinstance(trained, DirectPosterior) else trained
    if not isinstance(net, ConditionalDensityEstimator):
        raise SettingError(f"from_sbi takes the density estimator that sbi's NPE.train returned, or a DirectPosterior of it, got "
                           f"{type(trained).__name__}")
    return net


def _adopted(estimator: SbiNPE, net: nn.Module, bank: Bank, apart: Split) -> float:
    """Give the estimator the net's weights; returns the mean of -log q(z | x), leakage and all, over the validation rows."""
    if len(apart.validation) < PROBES:
        raise BankError(f"{bank.path} leaves {len(apart.validation)} rows for validation, {PROBES} are needed; give a larger share")
    data = bank.at(apart.validation[:CHECKED])
    estimator.adopt(net, torch.as_tensor(data["theta"]), {"x": torch.as_tensor(data["x"])})
    pairs = pairs_at(bank, apart.validation)
    log_q = ThetaSpaceSampler(estimator, bank.header.prior).leaky_log_prob(pairs["theta"][:, None], pairs["x"])
    if not np.isfinite(log_q).all():
        bad = int((~np.isfinite(log_q)).sum())
        raise RunError(f"the net's density is not finite at {bad} of {len(log_q)} validation rows; train it again")
    return -float(log_q.mean())


def _safetensors(estimator: SbiNPE) -> bytes:
    from safetensors.torch import save

    return save({k: v.detach().clone().contiguous() for k, v in estimator.state_dict().items()})  # clones: layers may share a tensor


def _rows_of(trained_on: Any, bank: Bank, apart: Split) -> str:
    """What is known of the rows that sbi was trained on; raises SettingError where they are held out, or not of the bank."""
    if trained_on is None:
        return "by the user's word: those of sp.pairs"
    theta = _keys(trained_on, bank)
    known = _keys(bank.theta, bank)
    held = int(np.isin(theta, known[apart.held_out]).sum())
    if held:
        raise SettingError(f"{held} of the {len(theta)} rows that sbi was trained on are held out for the gate: train it on "
                           "sp.pairs(bank, \"training\", seed=...) of the same seed alone")
    strange = int((~np.isin(theta, known)).sum())
    if strange:
        raise SettingError(f"{strange} of the {len(theta)} rows that sbi was trained on are not rows of {bank.path}; name the bank that "
                           "they come from")
    return f"{len(theta)} rows of the bank, none held out (checked)"


def _keys(theta: Any, bank: Bank) -> NDArray[np.uint64]:
    """A number a row, the same for rows that are equal in float32."""
    values = np.asarray(theta.detach().cpu() if isinstance(theta, torch.Tensor) else theta, np.float32) + np.float32(0)  # no -0
    if values.ndim != 2 or values.shape[1] != bank.header.prior.dim:
        raise SettingError(f"trained_on has shape {values.shape}; expected (N, {bank.header.prior.dim}), the theta that sbi was given")
    odd = np.random.default_rng(0x5B1).integers(2**63, size=values.shape[1], dtype=np.uint64) * 2 + 1
    return (np.ascontiguousarray(values).view(np.uint32).astype(np.uint64) * odd).sum(1, dtype=np.uint64)
