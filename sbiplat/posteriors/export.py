"""Draws in files and as ArviZ data: the one place that knows their forms."""

from __future__ import annotations

import os
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sbiplat import files
from sbiplat.errors import SettingError
from sbiplat.observation import Fields
from sbiplat.prior import Prior


def to_arviz(prior: Prior, x: Fields, batched: bool, theta: NDArray[np.float64], seed: int, provenance: Mapping[str, Any],
             log_weight: NDArray[np.float64] | None = None) -> Any:
    """InferenceData of draws theta, (n, D), or (B, n, D) for a batch of B observations: posterior, prior, observed_data.

    log_weight: (n,) or (B, n) of importance, into a group sample_stats. One chain; in a batch every parameter has a third dimension
    `observation`. Units, seed and digests are attributes.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # ArviZ announces its own next version at every import
        import arviz

    n = theta.shape[1 if batched else 0]
    before = prior.sample(np.random.default_rng(np.random.SeedSequence(seed, spawn_key=(1,))), n)
    attrs = {"seed": seed, **{k: v for k, v in provenance.items() if v is not None}}
    draws = {name: theta[..., k].T[None] if batched else theta[None, :, k] for k, name in enumerate(prior.names)}
    data = arviz.from_dict(
        posterior=draws,
        observed_data={name: v if batched else v[0] for name, v in x.items()},
        sample_stats=None if log_weight is None else {"log_weight": log_weight.T[None]},
        dims={name: ["observation"] for name in (*prior.names, "log_weight")} if batched else None,
        posterior_attrs=attrs,
        attrs=attrs,
    )
    data.extend(arviz.from_dict(prior={name: before[None, :, k] for k, name in enumerate(prior.names)}, prior_attrs=attrs))
    for group in (data.posterior, data.prior):
        for name, unit in zip(prior.names, prior.units, strict=True):
            group[name].attrs["unit"] = unit
    return data


def check_target(path: Path) -> None:
    """Refuse, before any work, a file of draws that cannot be written; raises SettingError."""
    if path.suffix.lower() not in (".nc", ".h5", ".csv"):
        raise SettingError(f"--out {path}: draws are written as .nc (ArviZ), .h5 or .csv")
    if not path.parent.is_dir():
        raise SettingError(f"--out {path}: there is no folder {path.parent}")
    if not os.access(path.parent, os.W_OK):
        raise SettingError(f"--out {path}: the folder {path.parent} cannot be written; choose another place")


def write_draws(
    path: Path, prior: Prior, x: Fields, batched: bool, theta: NDArray[np.float64], seed: int, provenance: Mapping[str, Any],
    log_weight: NDArray[np.float64] | None = None,
) -> None:
    """Write draws as .nc (ArviZ), .h5 (/theta with names and units as attributes) or .csv (a header of names, a row a draw).

    log_weight: of importance, (n,) or (B, n); /log_weight in .h5, the last column of .csv.
    """
    check_target(path)
    with files.disk_errors(path), files.atomic_path(path) as temporary:
        if path.suffix.lower() == ".nc":
            tree = to_arviz(prior, x, batched, theta, seed, provenance, log_weight).to_datatree()
            temporary.write_bytes(tree.to_netcdf(engine="h5netcdf"))  # at once: HDF5 that meets a full disk may crash at exit
        elif path.suffix.lower() == ".h5":
            _write_hdf5(temporary, prior, x, theta, seed, provenance, log_weight)
        else:
            _write_csv(temporary, prior, theta, log_weight)


def _write_hdf5(path: Path, prior: Prior, x: Fields, theta: NDArray[np.float64], seed: int, provenance: Mapping[str, Any],
                log_weight: NDArray[np.float64] | None) -> None:
    import h5py

    with h5py.File(path, "w") as file:
        file["theta"] = theta
        file["theta"].attrs.update({"parameters": list(prior.names), "units": list(prior.units)})
        if log_weight is not None:
            file["log_weight"] = log_weight
        for name, values in x.items():
            file[f"observation/{name}"] = values
        file.attrs.update({"seed": seed, **{k: v for k, v in provenance.items() if v is not None}})


def _write_csv(path: Path, prior: Prior, theta: NDArray[np.float64], log_weight: NDArray[np.float64] | None) -> None:
    """One observation: the parameters. A batch: a first column `observation` with its place in the batch."""
    names, rows = list(prior.names), theta
    if log_weight is not None:
        names, theta = [*names, "log_weight"], np.concatenate([theta, log_weight[..., None]], axis=-1)
        rows = theta
    if theta.ndim == 3:
        owner = np.repeat(np.arange(len(theta)), theta.shape[1])[:, None]
        names, rows = ["observation", *names], np.concatenate([owner, theta.reshape(-1, theta.shape[-1])], axis=1)
    np.savetxt(path, rows, fmt="%.17g", delimiter=",", header=",".join(names), comments="")
