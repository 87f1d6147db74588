"""What shapes the embeddings that come with sbiplat, whatever their kind."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Shape:
    """The settings of `ConditionedSettings`, less their prefix; a kind takes of them what it has."""

    hidden: tuple[int, ...] = (128, 128)
    context: int = 32
    activation: str = "silu"
    width: int = 64
    blocks: int = 2
    heads: int = 4
    channels: tuple[int, ...] = (16, 32, 64)
    kernel: int = 5
    padding: str = "zeros"
    pooling: str = "flatten"
    patch: int = 16
    svd: int = 0
