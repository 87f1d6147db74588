r"""Attention, and the transformer for time series that is made of it (Vaswani et al., 2017; Dosovitskiy et al., 2021).

.. math:: \mathrm{att}(q, k, v) = \mathrm{softmax}\!\big(q k^\top / \sqrt{d}\big)\, v ,

where what a mask leaves out gets a weight of exactly 0. On a CPU torch's fused kernel is three times as fast as the formula, but has no
second derivative, which penalties on the gradient with respect to x need: so it is taken where x asks for no gradient.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from sbiplat.errors import SettingError
from sbiplat.nets.embeddings.dense import ACTIVATIONS, he, layers
from sbiplat.nets.embeddings.shape import Shape


class Attention(nn.Module):
    """Multi-head attention of queries (B, Q, W) to keys and values (B, N, W); mask (B, N), true where there is something."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        if width % heads:
            raise SettingError(f"embedding_width = {width} is no multiple of heads = {heads}; take {heads * max(1, round(width / heads))}")
        self.heads = heads
        self.q, self.k, self.v, self.out = (nn.Linear(width, width) for _ in range(4))

    def forward(self, queries: Tensor, keys: Tensor, values: Tensor, fused: bool, mask: Tensor | None = None) -> Tensor:
        q, k, v = (self._apart(layer(h)) for layer, h in ((self.q, queries), (self.k, keys), (self.v, values)))
        seen = None if mask is None else mask[:, None, None, :]
        made = nn.functional.scaled_dot_product_attention(q, k, v, seen) if fused else attend(q, k, v, seen)
        return self.out(made.transpose(1, 2).flatten(2))

    def _apart(self, h: Tensor) -> Tensor:
        """(B, N, W) -> (B, heads, N, W / heads)."""
        return h.unflatten(-1, (self.heads, -1)).transpose(1, 2)


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    """The formula of the module's docstring over the last two axes; mask true where there is something."""
    scores = q @ k.mT / math.sqrt(q.shape[-1])
    return (scores if mask is None else scores.masked_fill(~mask, -math.inf)).softmax(-1) @ v


def may_fuse(x: Tensor) -> bool:
    """Whether the fused kernel serves for the net of x; see the module's docstring."""
    return x.device.type == "cpu" and not x.requires_grad


class AttentionBlock(nn.Module):
    """h + att(norm(h)), then h + W2 act(W1 norm(h)); the identity at first."""

    def __init__(self, width: int, heads: int, activation: str) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.attention = Attention(width, heads)
        self.net = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, 2 * width), ACTIVATIONS[activation](), nn.Linear(2 * width, width))
        for last in (self.attention.out, self.net[-1]):
            nn.init.zeros_(last.weight)
            nn.init.zeros_(last.bias)

    def forward(self, h: Tensor, fused: bool, mask: Tensor | None = None) -> Tensor:
        normed = self.norm(h)
        h = h + self.attention(normed, normed, normed, fused, mask)
        return h + self.net(h)


class AttentionPool(nn.Module):
    """One learnt query over all tokens: (B, N, W) -> (B, W). Keys are normalised, values are not: they carry how large x is."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.query = nn.Parameter(torch.randn(1, 1, width))
        self.norm = nn.LayerNorm(width)
        self.attention = Attention(width, heads)

    def forward(self, h: Tensor, fused: bool, mask: Tensor | None = None) -> Tensor:
        return self.attention(self.query.expand(len(h), -1, -1), self.norm(h), h, fused, mask)[:, 0]


class Transformer(nn.Module):
    """A time series (B, T) or (B, C, T) in patches, with sinusoidal positions, through attention blocks and one pool: (B, context)."""

    def __init__(self, size: tuple[int, ...], shape: Shape) -> None:
        super().__init__()
        channels, length = (1, *size)[-2:]
        self.shared_axes = (len(size) - 1,)
        self.patch = min(shape.patch, length)
        count = -(-length // self.patch)
        self.fill = count * self.patch - length
        self.first = nn.Linear(channels * self.patch, shape.width)
        self.register_buffer("positions", positions(count, shape.width), persistent=False)
        self.blocks = nn.ModuleList(AttentionBlock(shape.width, shape.heads, shape.activation) for _ in range(shape.blocks))
        self.pool = AttentionPool(shape.width, shape.heads)
        self.head = he(layers(shape.width, shape.hidden, shape.context, shape.activation))

    def forward(self, x: Tensor) -> Tensor:
        fused = may_fuse(x)
        x = nn.functional.pad(x.reshape(len(x), -1, x.shape[-1]), (0, self.fill))
        tokens = x.unflatten(-1, (-1, self.patch)).transpose(1, 2).flatten(2)
        h = self.first(tokens) + self.positions
        for block in self.blocks:
            h = block(h, fused)
        return self.head(self.pool(h, fused))


def positions(count: int, width: int) -> Tensor:
    """Sines and cosines of the place over geometric wavelengths: (count, width), of unit mean square."""
    angle = torch.arange(count)[:, None] * 10_000.0 ** (-torch.arange(0, width, 2) / width)
    return math.sqrt(2) * torch.stack([angle.sin(), angle.cos()], dim=-1).flatten(1)[:, :width]
