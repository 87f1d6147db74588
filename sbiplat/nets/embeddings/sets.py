r"""Embeddings of exchangeable sets {x_1 ... x_n}: the order of the elements cannot matter.

.. math:: s(x) = \rho\Big( \frac{1}{n} \sum_{i \le n} \phi(x_i), \; \log n \Big)

is the deep set (Zaheer et al., 2017); a set transformer (Lee et al., 2019) lets the elements attend to each other before an attention pool.
In a set of varying size a mask says which of the N places are filled; what stands in the others cannot matter either.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from sbiplat.nets.embeddings.attention import AttentionBlock, AttentionPool, may_fuse
from sbiplat.nets.embeddings.dense import he, layers
from sbiplat.nets.embeddings.shape import Shape


class _OfSet(nn.Module):
    """Base: x (B, N) or (B, N, F) and a mask (B, N), 1 where there is an element, to the head of (pooled, log n): (B, context)."""

    shared_axes = (0,)

    def __init__(self, size: tuple[int, ...], shape: Shape, masked: bool) -> None:
        super().__init__()
        self.features = (*size, 1)[1]
        self.head = he(layers(shape.width + masked, shape.hidden, shape.context, shape.activation))

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        elements = x.reshape(len(x), -1, self.features)
        if mask is None:
            return self.head(self.pooled(elements, None))
        present = mask > 0.5
        pooled = self.pooled(torch.where(present[..., None], elements, 0.0), present)
        count = torch.log1p(present.sum(1, keepdim=True).to(pooled.dtype))
        return self.head(torch.cat([pooled, count], dim=1))

    def pooled(self, elements: Tensor, present: Tensor | None) -> Tensor:
        """(B, N, F) -> (B, width); of an empty set 0."""
        raise NotImplementedError


class DeepSet(_OfSet):
    """The mean of a net of each element, with the logarithm of 1 + n where sizes vary."""

    def __init__(self, size: tuple[int, ...], shape: Shape, masked: bool) -> None:
        super().__init__(size, shape, masked)
        self.element = he(layers(self.features, (shape.width,) * shape.blocks, shape.width, shape.activation))

    def pooled(self, elements: Tensor, present: Tensor | None) -> Tensor:
        h = self.element(elements)
        if present is None:
            return h.mean(1)
        return (h * present[..., None]).sum(1) / present.sum(1, keepdim=True).clamp_min(1)


class SetTransformer(_OfSet):
    """Attention among the elements, then an attention pool; its cost grows with N squared."""

    def __init__(self, size: tuple[int, ...], shape: Shape, masked: bool) -> None:
        super().__init__(size, shape, masked)
        self.first = nn.Linear(self.features, shape.width)
        self.blocks = nn.ModuleList(AttentionBlock(shape.width, shape.heads, shape.activation) for _ in range(shape.blocks))
        self.pool = AttentionPool(shape.width, shape.heads)

    def pooled(self, elements: Tensor, present: Tensor | None) -> Tensor:
        h, fused = self.first(elements), may_fuse(elements)
        some = None if present is None else present.any(1, keepdim=True)
        seen = None if present is None else present | ~some  # of an empty set all, so that no weight is 0 / 0
        for block in self.blocks:
            h = block(h, fused, seen)
        pooled = self.pool(h, fused, seen)
        return pooled if some is None else pooled * some
