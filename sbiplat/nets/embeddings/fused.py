"""Several inputs, each with an embedding of its own: their contexts joined, then a multi-layer perceptron."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from sbiplat.nets.embeddings.dense import layers
from sbiplat.nets.embeddings.shape import Shape


class Fused(nn.Module):
    """x, a dict of fields (B, ...), to one context. A single branch is not fused with anything: its context is the answer.

    branches: field -> its net. widths: of their contexts. masks: field -> the field that is its mask. Fields without a branch are masks.
    """

    def __init__(self, branches: Mapping[str, nn.Module], widths: Mapping[str, int], masks: Mapping[str, str], shape: Shape) -> None:
        super().__init__()
        self.fields, self.masks = tuple(branches), dict(masks)
        self.branches = nn.ModuleList(branches.values())
        self.fuse = layers(sum(widths.values()), shape.hidden, shape.context, shape.activation) if len(branches) > 1 else nn.Identity()

    def by_field(self) -> dict[str, nn.Module]:
        """Field -> its net."""
        return dict(zip(self.fields, self.branches, strict=True))

    def forward(self, x: dict[str, Tensor]) -> Tensor:
        contexts = [net(x[field], x[self.masks[field]]) if field in self.masks else net(x[field])
                    for field, net in zip(self.fields, self.branches, strict=True)]
        return self.fuse(torch.cat([c.float() for c in contexts], dim=1))
