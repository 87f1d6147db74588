"""Checkpoints: the whole state of a training between two steps, from which it goes on to the same weights.

Tensors stand in one safetensors file, everything else in its JSON header; the file replaces its forerunner atomically.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sbiplat import files
from sbiplat.errors import RunError

VERSION = 2


def save(path: Path, training: str, groups: dict[str, dict[str, Tensor]], state: dict[str, Any]) -> None:
    """Write named groups of tensors and a JSON state. training: the digest of the training that they belong to."""
    from safetensors.torch import save_file

    flat = {f"{group}|{name}": t.detach().contiguous().clone() for group, tensors in groups.items() for name, t in tensors.items()}
    path.parent.mkdir(exist_ok=True)
    with files.disk_errors(path), files.atomic_path(path) as temporary:
        save_file(flat, temporary, {"version": str(VERSION), "training": training, "state": json.dumps(state)})


def load(path: Path, training: str) -> tuple[dict[str, dict[str, Tensor]], dict[str, Any]] | None:
    """What `save` wrote; None where there is no checkpoint; RunError where it is damaged or of another training."""
    from safetensors import SafetensorError, safe_open

    if not path.is_file():
        return None
    try:
        with safe_open(path, "pt") as file:
            about = file.metadata() or {}
            if about.get("version") != str(VERSION):
                found = about.get("version")
                raise RunError(f"{path} is of checkpoint version {found}, this sbiplat reads {VERSION}; delete it to train anew")
            if about.get("training") != training:
                raise RunError(f"{path} is of another training than {path.parent.parent / 'run.json'}; delete it to train anew")
            groups: dict[str, dict[str, Tensor]] = {}
            for key in file.keys():  # noqa: SIM118 - not a dict
                group, _, name = key.partition("|")
                groups.setdefault(group, {})[name] = file.get_tensor(key)
            return groups, json.loads(about["state"])
    except (SafetensorError, OSError, KeyError, json.JSONDecodeError) as error:
        raise RunError(f"{path} is damaged ({str(error).splitlines()[0]}); delete it to train anew") from None


def optimizer_tensors(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """An optimizer's per-parameter state, flat; scalars as tensors."""
    return {f"{k}/{name}": torch.as_tensor(value) for k, state in optimizer.state_dict()["state"].items() for name, value in state.items()}


def restore_optimizer(optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor]) -> None:
    """Put back what `optimizer_tensors` gave; rates and other settings stay as the optimizer was made."""
    state: dict[int, dict[str, Tensor]] = {}
    for key, value in tensors.items():
        k, _, name = key.partition("/")
        state.setdefault(int(k), {})[name] = value
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
