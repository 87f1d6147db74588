"""Embeddings: nets that turn x into a context vector; by name, or a user's own nn.Module.

A user's embedding is a class: made as `Embedding(spec)` where it takes an argument (the `ObservationSpec`), else as
`Embedding()`. Its forward takes x (a dict where the simulator returns one) after standardisation, or, with the class
attribute `standardise = False`, after the declared transform alone, and returns (B, C). Where it has a method
`summaries(x) -> (B, F)`, that part is fixed: it is computed once a row, without gradient, and forward takes its result.

It is named by `file.py:Class` or `module:Class`, or by an entry point of the group `sbiplat.embeddings`; see names.py.
"""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from sbiplat.errors import SettingError
from sbiplat.nets.embeddings.attention import Transformer
from sbiplat.nets.embeddings.conv import ConvNet
from sbiplat.nets.embeddings.dense import ACTIVATIONS, MLP, Flatten, ResidualBlock, ResidualMLP, flatten
from sbiplat.nets.embeddings.fused import Fused
from sbiplat.nets.embeddings.names import BUILT_IN, by_name, maker, parts_of, register, source_digest
from sbiplat.nets.embeddings.sets import DeepSet, SetTransformer
from sbiplat.nets.embeddings.shape import Shape
from sbiplat.observation import ObservationSpec

__all__ = ["ACTIVATIONS", "BUILT_IN", "Fused", "ResidualBlock", "Shape", "apply", "build", "by_name", "flatten", "masks_of",
           "numbers", "of_user", "parts_of", "prepare", "reads_all", "register", "seed_bases", "shared_axes", "source_digest", "unscaled",
           "width_of"]

MOST_NUMBERS = 2048
Size = tuple[int, ...]


@dataclass(frozen=True)
class _Kind:
    """How one array is embedded. make: (its shape, the settings, whether it is masked) -> the net. forms: number of axes -> their names."""

    make: Callable[[Size, Shape, bool], nn.Module]
    forms: dict[int, str]
    of_set: bool = False


_SERIES, _IMAGE, _SET = {1: "(T,)", 2: "(C, T)"}, {2: "(H, W)", 3: "(C, H, W)"}, {1: "(N,)", 2: "(N, F)"}
_KINDS = {
    "cnn1d": _Kind(lambda size, shape, _: ConvNet(size, shape, 1, 0), _SERIES),
    "cnn2d": _Kind(lambda size, shape, _: ConvNet(size, shape, 2, 0), _IMAGE),
    "resnet1d": _Kind(lambda size, shape, _: ConvNet(size, shape, 1, shape.blocks), _SERIES),
    "resnet2d": _Kind(lambda size, shape, _: ConvNet(size, shape, 2, shape.blocks), _IMAGE),
    "transformer": _Kind(lambda size, shape, _: Transformer(size, shape), _SERIES),
    "deepset": _Kind(DeepSet, _SET, of_set=True),
    "settransformer": _Kind(SetTransformer, _SET, of_set=True),
}
_WHOLE = {"mlp": MLP, "resmlp": ResidualMLP}
_SCALED_TOGETHER = (ConvNet, Transformer, DeepSet, SetTransformer)


def build(name: str, spec: ObservationSpec, shape: Shape) -> nn.Module:
    """The embedding of that name; raises SettingError where it is not known here, or cannot take this x."""
    parts = _by_field(name, spec)
    net = _one(name, spec, shape) if parts is None else _fused(parts, spec, shape)
    if shape.svd and not any(isinstance(m, MLP) and m.basis is not None for m in net.modules()):
        raise SettingError(f"svd = {shape.svd} is of an mlp or resmlp over more numbers; embedding = {name} has none: leave svd away")
    return net


def _by_field(name: str, spec: ObservationSpec) -> dict[str, str] | None:
    """Field -> kind, of all fields but masks; None where one net takes all of x."""
    parts = parts_of(name)
    if parts is None:
        if spec.plain or name not in _KINDS:
            return None
        fields = [f for f in spec.shapes if not _KINDS[name].of_set or (f != "mask" and not f.endswith("_mask"))]
        if len(fields) != 1:
            raise SettingError(f"embedding = {name} takes one array, and x has {', '.join(fields)}: say which, as in "
                               f"embedding = {fields[0] if fields else 'NAME'}={name}")
        parts = {fields[0]: name}
    elif spec.plain:
        raise SettingError(f"embedding = {name} is of a dict x, and x is one array: give one name, such as {next(iter(parts.values()))}")
    for field in parts:
        if field not in spec.shapes:
            near = difflib.get_close_matches(field, spec.shapes, 1)
            raise SettingError(f"embedding names the field {field!r}, which x does not have; " +
                               (f"did you mean {near[0]}?" if near else f"it has {', '.join(spec.shapes)}"))
    masks = {_mask_of(f, spec) for f, kind in parts.items() if kind in _KINDS and _KINDS[kind].of_set}
    return {f: parts.get(f, "mlp") for f in spec.shapes if f in parts or f not in masks}


def _mask_of(field: str, spec: ObservationSpec) -> str | None:
    """The field that is the mask of a set: NAME_mask, or mask; None where there is neither."""
    name = next((m for m in (f"{field}_mask", "mask") if m in spec.shapes and m != field), None)
    if name and spec.shapes[name] != spec.shapes[field][:1]:
        raise SettingError(f"x has {name} of shape {spec.shapes[name]}, and {field} of shape {spec.shapes[field]}: a mask has shape "
                           f"{spec.shapes[field][:1]}; one of another field F is called F_mask")
    return name


def _fused(parts: dict[str, str], spec: ObservationSpec, shape: Shape) -> Fused:
    branches, widths, masks = {}, {}, {}
    for field, kind in parts.items():
        alone = _alone(spec, field)
        mask = _mask_of(field, spec) if kind in _KINDS and _KINDS[kind].of_set else None
        if mask:
            masks[field] = mask
        own = shape if alone.size > shape.svd else replace(shape, svd=0)  # so few numbers are a basis themselves
        branches[field] = _one(kind, alone, own, field, masked=mask is not None)
        widths[field] = shape.context if kind in _KINDS else width_of(branches[field], alone, kind)
    return Fused(branches, widths, masks, shape)


def _alone(spec: ObservationSpec, field: str) -> ObservationSpec:
    """The spec of one field, as of a plain array."""
    return ObservationSpec.declare(spec.shapes[field], spec.dtype, spec.transform[field])


def _one(name: str, spec: ObservationSpec, shape: Shape, field: str = "x", masked: bool = False) -> nn.Module:
    """The net of one name, of all of x or of one field."""
    if name == "none":
        return Flatten()
    if name in _WHOLE:
        return _WHOLE[name](spec.size, shape.hidden, shape.context, shape.activation, shape.svd)
    if name in _KINDS:
        size, kind = spec.shapes["x"], _KINDS[name]
        if len(size) not in kind.forms:
            fitting = ["mlp", *(k for k, v in _KINDS.items() if len(size) in v.forms)]
            forms = " or ".join(kind.forms.values())
            raise SettingError(f"embedding = {name} takes an array of shape {forms}, and {field} has shape {size}; "
                               f"take {', '.join(fitting)}")
        return kind.make(size, shape, masked)
    return of_user(name, spec)


def reads_all(name: str) -> bool:
    """Whether a net of that name takes all fields of x together."""
    return name == "none" or name in _WHOLE


def of_user(name: str, spec: ObservationSpec) -> nn.Module:
    """An embedding that is installed, or was named to this process; raises SettingError where it cannot be made."""
    make = maker(name)
    try:
        takes_spec = any(p.default is p.empty and p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)
                         for p in inspect.signature(make).parameters.values())
        made = make(spec) if takes_spec else make()
    except Exception as error:
        raise SettingError(f"embedding {name} cannot be made: {type(error).__name__}: {error}") from error
    if not isinstance(made, nn.Module):
        raise SettingError(f"embedding {name} made a {type(made).__name__}, not an nn.Module")
    return made


# ------------------------------------------------------------------------------------------------- on the way to the net


def shared_axes(embedding: nn.Module, spec: ObservationSpec) -> dict[str, Size | None]:
    """For each field, the axes of x over which one location and scale holds, () for none; None where it is not to be scaled.

    Elements of a set, and places of a signal or an image, share theirs: else standardisation would tell them apart.
    """
    if isinstance(embedding, Fused):
        nets = embedding.by_field()
        return {f: shared_axes(nets[f], _alone(spec, f))["x"] if f in nets else None for f in spec.shapes}
    axes = embedding.shared_axes if isinstance(embedding, _SCALED_TOGETHER) else ()
    return dict.fromkeys(spec.shapes, axes if getattr(embedding, "standardise", True) else None)


def unscaled(embedding: nn.Module, spec: ObservationSpec) -> set[str]:
    """The fields of prepared x that are no standardised x: an embedding's summaries, and what it takes as it is."""
    if isinstance(embedding, Fused):
        return {f for f, net in embedding.by_field().items() if unscaled(net, _alone(spec, f))}
    if hasattr(embedding, "summaries"):
        return {"x"}
    return set() if getattr(embedding, "standardise", True) else set(spec.shapes)


def masks_of(embedding: nn.Module) -> dict[str, str]:
    """Field -> the field that is its mask."""
    return embedding.masks if isinstance(embedding, Fused) else {}


def prepare(embedding: nn.Module, spec: ObservationSpec, x: dict[str, Tensor]) -> dict[str, Tensor]:
    """The fixed part of the way to the net: an embedding's summaries, {"x": (B, F)}, or x itself where it has none."""
    if isinstance(embedding, Fused):
        nets = embedding.by_field()
        return {f: prepare(nets[f], _alone(spec, f), {"x": v})["x"] if f in nets else v for f, v in x.items()}
    if not hasattr(embedding, "summaries"):
        return x
    return {"x": embedding.summaries(spec.unwrap(x)).float()}


def apply(embedding: nn.Module, spec: ObservationSpec, x: dict[str, Tensor]) -> Tensor:
    """The context (B, C) of prepared x."""
    return embedding(x["x"] if spec.plain or hasattr(embedding, "summaries") else x)


def numbers(embedding: nn.Module, spec: ObservationSpec, x: dict[str, Tensor]) -> Tensor:
    """Prepared x as rows (B, F) on which a linear model may lean beside the net.

    All of x for dense nets, the summaries where an embedding has some; F = 0 for nets whose context may be invariant (sets, convolutions,
    a user's own), which such a model would break, and where there are over `MOST_NUMBERS`.
    """
    if isinstance(embedding, Fused):
        nets = embedding.by_field()
        found = torch.cat([numbers(net, _alone(spec, f), {"x": x[f]}) for f, net in nets.items()], dim=1)
    elif hasattr(embedding, "summaries"):
        found = flatten(x["x"])
    elif isinstance(embedding, MLP | ResidualMLP | Flatten):
        found = flatten(x)
    else:
        first = next(iter(x.values()))
        return first.new_zeros(len(first), 0)
    return found if found.shape[1] <= MOST_NUMBERS else found[:, :0]


def seed_bases(embedding: nn.Module, spec: ObservationSpec, x: dict[str, Tensor]) -> None:
    """Set the reduced bases that stand in front of nets (`svd`) from prepared rows of the bank."""
    if isinstance(embedding, Fused):
        for field, net in embedding.by_field().items():
            seed_bases(net, _alone(spec, field), {"x": x[field]})
    elif isinstance(embedding, MLP):
        embedding.seed_basis(spec.unwrap(x))


def width_of(embedding: nn.Module, spec: ObservationSpec, name: str) -> int:
    """C, found by one forward pass; raises SettingError where the embedding does not take x or does not return (B, C)."""
    fields = {k: torch.zeros(2, *shape) for k, shape in spec.shapes.items()}
    was_training = embedding.training
    try:
        with torch.no_grad():
            out = apply(embedding, spec, prepare(embedding.eval(), spec, fields))
    except Exception as error:
        shapes = {k: tuple(v.shape) for k, v in fields.items()}
        line = (str(error) or repr(error)).splitlines()[0]
        raise SettingError(f"embedding {name} fails on x of shape {shapes['x'] if spec.plain else shapes}: {line}") from error
    embedding.train(was_training)
    if not isinstance(out, Tensor) or out.ndim != 2 or len(out) != 2:
        returned = tuple(out.shape) if isinstance(out, Tensor) else type(out).__name__
        raise SettingError(f"embedding {name} must return (B, C); for B = 2 it returned {returned}")
    return out.shape[1]
