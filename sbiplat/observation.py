"""What a simulator returns: its shape, how to read it, and how to plot it.

An observation x is one array of a fixed shape, or a dict of named arrays. `ObservationSpec` is that contract in one
record: the simulator declares it, the bank stores it, and a run carries it along, so that an observation can be checked
and read from a file without the simulator's code. Inside sbiplat x is always a dict of arrays; a plain array has the
single name "x".
"""

from __future__ import annotations

import csv
import math
import zipfile
import zlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sbiplat.errors import ObservationError, SimulatorError

Fields = dict[str, NDArray[Any]]
TRANSFORMS = ("none", "log", "asinh")
DTYPES = ("float32", "float64")


@dataclass(frozen=True)
class ObservationSpec:
    """The contract of x.

    shapes: name -> shape; the single name "x" where the simulator returns a plain array.
    plain: whether the simulator returns a plain array.
    dtype: of the stored values, "float32" or "float64".
    transform: name -> "none", "log" or "asinh", applied before standardisation when a net reads x.
    labels: names along the last axis (columns of a .csv observation, lines of a plot); empty where there are none.
    axis: (name, values) along the first axis, for plots; ("", ()) where there is none.
    unit: of x.
    """

    shapes: dict[str, tuple[int, ...]]
    plain: bool = True
    dtype: str = "float32"
    transform: dict[str, str] = field(default_factory=dict)
    labels: tuple[str, ...] = ()
    axis: tuple[str, tuple[float, ...]] = ("", ())
    unit: str = ""

    @classmethod
    def declare(
        cls,
        shape: Sequence[int] | int | Mapping[str, Sequence[int]],
        dtype: str = "float32",
        transform: str | Mapping[str, str] | None = None,
        labels: Sequence[str] = (),
        axis: tuple[str, Sequence[float]] | None = None,
        unit: str = "",
    ) -> ObservationSpec:
        """The spec from what a user writes in `@sp.simulator`; every mistake is a `SimulatorError`."""
        plain = not isinstance(shape, Mapping)
        shapes = {str(k): _shape(v, k) for k, v in ({"x": shape} if plain else shape).items()}
        if not shapes:
            raise SimulatorError("x_shape is an empty dict: name at least one array")
        for name in shapes:
            if not name or "/" in name or name.startswith("."):
                raise SimulatorError(f"x_shape: {name!r} cannot name an array in an HDF5 file; leave out '/' and a leading '.'")
        if dtype not in DTYPES:
            raise SimulatorError(f"dtype {dtype!r} of x is not one of {', '.join(DTYPES)}")
        wanted = {k: transform or "none" for k in shapes} if not isinstance(transform, Mapping) else dict(transform)
        for name, value in wanted.items():
            if name not in shapes:
                raise SimulatorError(f"x_transform names {name!r}, which x does not have; it has {', '.join(shapes)}")
            if value not in TRANSFORMS:
                raise SimulatorError(f"x_transform {value!r} is not one of {', '.join(TRANSFORMS)}")
        if not isinstance(unit, str):
            raise SimulatorError(f"x_unit must be text, got {unit!r}")
        return cls(shapes, plain, dtype, {k: wanted.get(k, "none") for k in shapes},
                   _labels(labels, shapes["x"] if plain else ()), _axis(axis, shapes), unit)

    @property
    def row_bytes(self) -> int:
        """Bytes of one stored x."""
        return np.dtype(self.dtype).itemsize * self.size

    @property
    def size(self) -> int:
        """Numbers in one x."""
        return sum(math.prod(s) for s in self.shapes.values())

    def shape_text(self) -> str:
        """The declared shape as the user wrote it."""
        return str(self.shapes["x"]) if self.plain else str(dict(self.shapes))

    def conform(self, x: Any, lead: tuple[int, ...] = ()) -> Fields:
        """x as a dict of arrays of shape lead + the declared shape, in the stored dtype.

        Raises ObservationError where a name is missing, a shape differs or the values are not real numbers.
        """
        given = self._named(x)
        out = {}
        for name, shape in self.shapes.items():
            array = _real(given[name], name)
            if array.shape != lead + shape:
                of = "" if self.plain else f" {name!r}"
                raise ObservationError(f"x{of} has shape {array.shape}, declared is {lead + shape}")
            with np.errstate(over="ignore"):  # what float32 cannot hold becomes inf, and the row is marked
                out[name] = array.astype(self.dtype, copy=False)
        return out

    def batch(self, x: Any) -> tuple[Fields, bool]:
        """One observation or a batch of B -> (dict of (B, ...) arrays, whether a batch was given); refuses NaN and inf."""
        given = self._named(x)
        name, shape = next(iter(self.shapes.items()))
        array = _real(given[name], name)
        batched = array.ndim == len(shape) + 1
        if not batched and array.ndim != len(shape):
            raise ObservationError(f"the observation has shape {array.shape}; expected {self.shape_text()}, or the same "
                                   "with a leading axis for a batch")
        lead = array.shape[:1] if batched else ()
        if batched and lead[0] == 0:
            raise ObservationError("the batch of observations is empty")
        fields = self.conform(x, lead)
        for name, values in fields.items():
            bad = np.argwhere(~np.isfinite(values))
            if len(bad):
                where = f"{name}[{', '.join(map(str, bad[0]))}]"
                raise ObservationError(f"the observation holds {len(bad)} value(s) that are NaN or infinite, first at {where}; "
                                       "mend them, or leave such features out of the simulator's x")
        return {k: v if batched else v[None] for k, v in fields.items()}, batched

    def unwrap(self, fields: Fields) -> Any:
        """The user's own form of x: a plain array where the simulator returns one."""
        return fields["x"] if self.plain else fields

    def _named(self, x: Any) -> Mapping[str, Any]:
        if self.plain:
            if isinstance(x, Mapping):
                raise ObservationError(f"x is a dict ({', '.join(map(str, x))}), declared is one array of shape "
                                       f"{self.shapes['x']}")
            return {"x": x}
        if not isinstance(x, Mapping):
            raise ObservationError(f"x is a {type(x).__name__}, declared is a dict with {', '.join(self.shapes)}")
        if set(x) != set(self.shapes):
            raise ObservationError(f"x has the arrays {', '.join(map(str, x))}; declared are {', '.join(self.shapes)}")
        return x

    def to_json(self) -> dict[str, Any]:
        return {"shapes": {k: list(v) for k, v in self.shapes.items()}, "plain": self.plain, "dtype": self.dtype,
                "transform": self.transform, "labels": list(self.labels), "axis": [self.axis[0], list(self.axis[1])],
                "unit": self.unit}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> ObservationSpec:
        try:
            shape: Any = data["shapes"]["x"] if data["plain"] else data["shapes"]
            return cls.declare(shape, data["dtype"], data["transform"], data["labels"], data["axis"], data["unit"])
        except (KeyError, TypeError, IndexError, ValueError, AttributeError) as error:
            raise SimulatorError(f"not a description of x: {error!r}") from None


def _shape(value: Any, name: Any) -> tuple[int, ...]:
    sizes = (value,) if isinstance(value, int | np.integer) else value
    if (isinstance(sizes, str) or not isinstance(sizes, Sequence | np.ndarray)
            or not all(isinstance(s, int | np.integer) and not isinstance(s, bool) and s > 0 for s in sizes)):
        raise SimulatorError(f"x_shape of {name!r} must be a tuple of positive integers, got {value!r}")
    return tuple(int(s) for s in sizes)


def _labels(labels: Any, shape: tuple[int, ...]) -> tuple[str, ...]:
    """Checked names along the last axis; shape is () where x is a dict."""
    if isinstance(labels, str) or not isinstance(labels, Iterable):
        raise SimulatorError(f"x_labels must be a list of names, got {labels!r}")
    names = tuple(labels)
    for name in names:
        if not isinstance(name, str) or not name:
            raise SimulatorError(f"x_labels must be names, got {name!r}")
        if names.count(name) > 1:
            raise SimulatorError(f"x_labels has {name!r} twice: rename one")
    if names and shape[-1:] != (len(names),):
        raise SimulatorError(f"x_labels has {len(names)} names for a last axis of length {shape[-1] if shape else 'none'}")
    return names


def _axis(axis: Any, shapes: Mapping[str, tuple[int, ...]]) -> tuple[str, tuple[float, ...]]:
    """Checked (name, values) along the first axis of x, or of one of its arrays at least."""
    if axis is None:
        return ("", ())
    try:
        name, values = axis
        values = tuple(float(v) for v in values)
    except (TypeError, ValueError):
        raise SimulatorError(f"x_axis must be (name, values), such as (\"time [s]\", times), got {axis!r}") from None
    if not isinstance(name, str) or not np.isfinite(values).all():
        raise SimulatorError("x_axis must be a name and finite values")
    lengths = sorted({shape[0] for shape in shapes.values() if shape})
    if values and len(values) not in lengths:
        raise SimulatorError(f"x_axis has {len(values)} values for a first axis of length "
                             f"{' or '.join(map(str, lengths)) or 'none'}")
    return (name, values)


def _real(value: Any, name: str) -> NDArray[Any]:
    try:
        if isinstance(value, np.ma.MaskedArray):  # what is masked is not known
            value = value.astype(float).filled(np.nan)
        array = np.asarray(value)
    except (ValueError, TypeError, RuntimeError) as error:
        raise ObservationError(f"{name} is not an array of numbers: {error}") from None
    if array.dtype.kind not in "fiub":
        raise ObservationError(f"{name} has dtype {array.dtype}; return real numbers (float32 or float64)")
    return array


# ------------------------------------------------------------------------------------------------------- as numbers


def flat(spec: ObservationSpec, x: Fields) -> NDArray[np.floating]:
    """x as rows of numbers, (B, F)."""
    return np.concatenate([np.asarray(x[name]).reshape(len(x[name]), -1) for name in spec.shapes], axis=1)


def fields_of(spec: ObservationSpec, rows: NDArray[np.floating]) -> Fields:
    """Rows of numbers (B, F) as x by name; the inverse of `flat`."""
    out, at = {}, 0
    for name, shape in spec.shapes.items():
        size = int(np.prod(shape, dtype=int))
        out[name] = rows[:, at:at + size].reshape(len(rows), *shape).astype(spec.dtype)
        at += size
    return out


def feature_names(spec: ObservationSpec, indices: NDArray[np.int64]) -> list[str]:
    """Each feature as a person would name it: by label, by place along the axis, or by index."""
    names, ends = list(spec.shapes), np.cumsum([int(np.prod(s, dtype=int)) for s in spec.shapes.values()])
    out = []
    for j in indices:
        k = int(np.searchsorted(ends, j, side="right"))
        shape = spec.shapes[names[k]]
        place = [int(i) for i in np.unravel_index(int(j) - (int(ends[k - 1]) if k else 0), shape)] if shape else []
        along = f" at {spec.axis[0]} = {spec.axis[1][place[0]]:.4g}" if place and len(spec.axis[1]) == shape[0] else ""
        if spec.plain and spec.labels:
            label, rest = spec.labels[place[-1]], place[:-1]
        else:
            label, rest = names[k], place
        out.append(label + (f"[{', '.join(map(str, rest))}]" if rest else "") + along)
    return out


# ----------------------------------------------------------------------------------------------------- from a file


def read_observation(path: str | Path, spec: ObservationSpec) -> Any:
    """x, or a batch of x, from a .npy, .npz, .csv or .h5 file; ready for `ObservationSpec.batch`.

    A .csv may have a header: where the spec has labels, its columns are found by name and others are left out.
    An .npz or .h5 holds the arrays of x by name; where x is a plain array, a single dataset of any name will do.
    """
    path = Path(path)
    if not path.is_file():
        raise ObservationError(f"no observation file at {path}")
    reader = _READERS.get(path.suffix.lower())
    if reader is None:
        raise ObservationError(f"{path}: an observation is read from .npy, .npz, .csv or .h5, "
                               f"not {path.suffix or 'a file without a suffix'}")
    try:
        x = reader(path, spec)
        spec.batch(x)
    except ObservationError as error:
        raise ObservationError(f"{path}: {error}") from None
    except _UNREADABLE as error:
        reason = str(error).splitlines()[0] if str(error) else repr(error)
        raise ObservationError(f"{path} cannot be read as {path.suffix}: {reason}") from None
    return x


def _read_npy(path: Path, spec: ObservationSpec) -> Any:
    array = np.load(path, allow_pickle=False)
    if not spec.plain:
        raise ObservationError(f"x is a dict with {', '.join(spec.shapes)}: give an .npz or .h5 with arrays of these names")
    return array


def _pick(arrays: Mapping[str, Any], spec: ObservationSpec) -> Any:
    if spec.plain:
        if "x" in arrays:
            return arrays["x"]
        if len(arrays) != 1:
            raise ObservationError(f"holds {', '.join(arrays) or 'no array'}; expected one array, or one named 'x'")
        return next(iter(arrays.values()))
    missing = [name for name in spec.shapes if name not in arrays]
    if missing:
        raise ObservationError(f"has no array {', '.join(missing)}; it holds {', '.join(arrays) or 'none'}")
    return {name: arrays[name] for name in spec.shapes}


def _read_npz(path: Path, spec: ObservationSpec) -> Any:
    with np.load(path, allow_pickle=False) as archive:
        return _pick({name: archive[name] for name in archive.files}, spec)


def _read_hdf5(path: Path, spec: ObservationSpec) -> Any:
    import h5py

    with h5py.File(path, "r") as file:
        group = file["x"] if isinstance(file.get("x"), h5py.Group) else file
        return _pick({name: item[()] for name, item in group.items() if isinstance(item, h5py.Dataset)}, spec)


def _read_csv(path: Path, spec: ObservationSpec) -> Any:
    if not spec.plain:
        raise ObservationError(f"x is a dict with {', '.join(spec.shapes)}: give an .npz or .h5 with arrays of these names")
    with path.open(newline="", encoding="utf-8-sig") as lines:
        wanted = (line for line in lines if line.strip() and not line.lstrip().startswith("#"))
        rows = [[cell.strip() for cell in row] for row in csv.reader(wanted)]
    if not rows:
        raise ObservationError("the file has no values")
    header = None if all(_is_number(cell) for cell in rows[0]) else rows.pop(0)
    if not rows:
        raise ObservationError("the file has a header and no values")
    if len({len(row) for row in rows}) > 1:
        raise ObservationError("its rows have different numbers of columns")
    bad = next(((i, cell) for i, row in enumerate(rows) for cell in row if not _is_number(cell)), None)
    if bad:
        raise ObservationError(f"data row {bad[0] + 1} holds {bad[1]!r}, which is not a number")
    table = np.array(rows, float)
    if header and len(header) != table.shape[1]:
        raise ObservationError(f"its header names {len(header)} columns, its rows have {table.shape[1]}")
    if header and spec.labels:
        missing = [name for name in spec.labels if name not in header]
        if missing:
            raise ObservationError(f"has no column {', '.join(missing)}; its header is {', '.join(header)}")
        table = table[:, [header.index(name) for name in spec.labels]]
    shape = spec.shapes["x"]
    if len(shape) < 2 and table.size == math.prod(shape):  # one observation, as a row or a column
        return table.reshape(shape)
    return table if shape else table.reshape(-1)


def _is_number(cell: str) -> bool:
    try:
        float(cell)
    except ValueError:
        return False
    return True


_READERS = {".npy": _read_npy, ".npz": _read_npz, ".csv": _read_csv, ".h5": _read_hdf5, ".hdf5": _read_hdf5}
_UNREADABLE = (OSError, ValueError, KeyError, EOFError, RuntimeError, MemoryError, csv.Error, zipfile.BadZipFile, zlib.error)
