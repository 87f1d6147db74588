"""Observations as panels, by the shape of x: such as the data beside simulations from draws of the posterior.

The posterior predictive is a look, not a test: the data were used to find the posterior, so they should lie where its simulations lie;
where they do not, the simulator cannot make such data, whatever the certificate says.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from sbiplat.observation import Fields, ObservationSpec
from sbiplat.report.figures import PREDICTIVE, Dots, Panel, Picture, Series, Words, plain, with_unit

Array = NDArray[np.float64]
QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)
MOST_DOTS, MOST_POINTS, MOST_PIXELS, MOST_PANELS = 40, 1000, 512, 12
LEAST_IMAGE = 8


def panels(spec: ObservationSpec, data: Fields, simulated: Fields, words: Words = PREDICTIVE) -> tuple[list[Panel], list[str]]:
    """What to draw, and sentences on what is left out. data: name -> the declared shape; simulated: name -> (R, ...)."""
    found: list[Panel] = []
    notes: list[str] = []
    for name in spec.shapes:
        some, said = _panels_of(spec, name, np.asarray(data[name], float), np.asarray(simulated[name], float), words)
        found += some
        notes += [f"{name}: {text}" if not spec.plain else text for text in said]
    if len(found) > MOST_PANELS:
        notes.append(f"the first {MOST_PANELS} of {len(found)} panels are shown")
    return found[:MOST_PANELS], notes


def share_inside(shown: list[Panel]) -> float | None:
    """The share of the shown numbers that lie within the 90 % band; None where there are only pictures."""
    inside = [(p.bands[0] <= p.data) & (p.data <= p.bands[4]) for p in shown if not isinstance(p, Picture)]
    return float(np.concatenate(inside).mean()) if inside else None


def _panels_of(spec: ObservationSpec, name: str, data: Array, simulated: Array, words: Words) -> tuple[list[Panel], list[str]]:
    """The panels of one array of x, by its shape."""
    shape = data.shape
    axis_name, axis = spec.axis
    over_axis = bool(axis) and bool(shape) and len(axis) == shape[0]
    labelled = spec.plain and len(spec.labels) > 0
    if data.ndim <= 1 and not over_axis and data.size <= MOST_DOTS:
        return [_dots(spec, name, data.reshape(-1), simulated.reshape(len(simulated), -1), words)], []
    if data.ndim == 2 and not (over_axis or labelled):
        if min(shape) >= LEAST_IMAGE:
            return _pictures(spec, name, data, simulated)
        if shape[0] < shape[1]:
            data, simulated = data.T, simulated.swapaxes(1, 2)
    elif data.ndim > 2 and not over_axis:
        channels_last = data.ndim == 3 and shape[-1] <= 4 and min(shape[:2]) >= LEAST_IMAGE
        if channels_last or min(shape[-2:]) >= LEAST_IMAGE:
            return _pictures(spec, name, np.moveaxis(data, -1, 0) if channels_last else data,
                             np.moveaxis(simulated, -1, 1) if channels_last else simulated)
        data, simulated = data.reshape(-1), simulated.reshape(len(simulated), -1)
    data, simulated = data.reshape(len(data), -1), simulated.reshape(len(simulated), len(data), -1)
    x = np.asarray(axis, float) if over_axis else np.arange(len(data), dtype=float)
    return _columns(spec, name, data, simulated, x, plain(axis_name, 40) if over_axis else "index in x")


def _columns(
    spec: ObservationSpec, name: str, data: Array, simulated: Array, x: Array, xlabel: str,
) -> tuple[list[Panel], list[str]]:
    """A panel a column of data (T, C), simulated (R, T, C), over x (T,)."""
    count, notes = data.shape[1], []
    thin = -(-len(x) // MOST_POINTS)
    if thin > 1:
        notes.append(f"every {thin}th of {len(x)} values is shown")
    if count > MOST_PANELS:
        notes.append(f"the first {MOST_PANELS} of {count} columns are shown")
    labelled = spec.plain and len(spec.labels) == count
    out: list[Panel] = []
    for k in range(min(count, MOST_PANELS)):
        label = spec.labels[k] if labelled else (name if count == 1 else f"{name}[{k}]")
        values, bands, scale = _summary(spec, name, data[::thin, k], simulated[:, ::thin, k])
        out.append(Series(values, bands, x[::thin], xlabel, with_unit(label, spec.unit), scale=scale))
    return out, notes


def _dots(spec: ObservationSpec, name: str, data: Array, simulated: Array, words: Words) -> Dots:
    """A few numbers; where their sizes differ too much for one axis, each in units of its own predictive spread."""
    labels = spec.labels if spec.plain else ()
    if len(labels) != len(data):
        labels = tuple(name if len(data) == 1 else f"{name}[{k}]" for k in range(len(data)))
    values, bands, scale = _summary(spec, name, data, simulated)
    ylabel = with_unit("x" if spec.plain else name, spec.unit)
    spread = np.maximum(simulated.std(0), 1e-300)
    if scale != "log" and spread.max() > 30 * np.ptp(bands, axis=0).min():
        labels = tuple(f"{label}\n= {value:.3g}" for label, value in zip(labels, values, strict=True))
        values, bands, scale = (values - bands[2]) / spread, (bands - bands[2]) / spread, "linear"
        ylabel = words.dots
        off = float(np.abs(values).max())
        if off > 100:
            scale = "asinh"
    return Dots(values, bands, labels, ylabel, "" if spec.plain else plain(name), scale)


def _pictures(spec: ObservationSpec, name: str, data: Array, simulated: Array) -> tuple[list[Panel], list[str]]:
    """The first of the images in data (..., H, W), simulated (R, ..., H, W)."""
    notes = []
    lead = data.shape[:-2]
    first = (0,) * len(lead)
    if int(np.prod(lead, dtype=int)) > 1:
        notes.append(f"the first of {int(np.prod(lead, dtype=int))} images is shown")
    thin = -(-max(data.shape[-2:]) // MOST_PIXELS)
    if thin > 1:
        notes.append(f"every {thin}th pixel is shown")
    image, mean = data[first][::thin, ::thin], simulated[(slice(None), *first)].mean(0)[::thin, ::thin]
    return [Picture(image, mean, with_unit("x" if spec.plain else name, spec.unit), "" if spec.plain else plain(name),
                    _SCALES[spec.transform.get(name, "none")])], notes


_SCALES: dict[str, Any] = {"none": "linear", "log": "log", "asinh": "asinh"}


def _summary(spec: ObservationSpec, name: str, data: Array, simulated: Array) -> tuple[Array, Array, str]:
    """data, quantiles of the simulations (5, S), and the scale; a log scale has zeros at half the least positive number."""
    scale = _SCALES[spec.transform.get(name, "none")]
    bands = np.quantile(simulated, QUANTILES, axis=0)
    if scale == "log":
        positive = np.concatenate([data[data > 0], bands[bands > 0]])
        if not len(positive):
            return data, bands, "linear"
        floor = positive.min() / 2
        data, bands = np.maximum(data, floor), np.maximum(bands, floor)
    return data, bands, scale
