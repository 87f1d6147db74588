r"""Dense embeddings of all of x as one row of numbers, and the reduced basis that may stand in front of them.

A long signal fills few directions of its space. With `svd = K` the first layer is a projection on the top K right singular vectors of n
standardised rows of the bank, :math:`X = U S V^\top`, at unit mean square,

.. math:: y = V_K^\top x \Big/ \sqrt{\textstyle\sum_{k \le K} S_k^2 / (n K)} ,

and is trained with the rest from there (Dax et al., 2021). Signs are fixed: each vector's largest entry is positive.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import linalg
from torch import Tensor, nn

from sbiplat.errors import SettingError

ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {"elu": nn.ELU, "gelu": nn.GELU, "relu": nn.ReLU, "silu": nn.SiLU, "tanh": nn.Tanh}


class ResidualBlock(nn.Module):
    """h + W2 act(W1 norm(h)), the identity at first."""

    def __init__(self, width: int, activation: str = "silu") -> None:
        super().__init__()
        self.net = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, width), ACTIVATIONS[activation](), nn.Linear(width, width))
        nn.init.zeros_(self.net[-1].weight)
        nn.init.zeros_(self.net[-1].bias)

    def forward(self, h: Tensor) -> Tensor:
        return h + self.net(h)


def layers(size: int, hidden: tuple[int, ...], out: int, activation: str) -> nn.Sequential:
    """A multi-layer perceptron: (..., size) -> (..., out)."""
    sizes = [size, *hidden]
    inner = [m for a, b in pairwise(sizes) for m in (nn.Linear(a, b), ACTIVATIONS[activation]())]
    return nn.Sequential(*inner, nn.Linear(sizes[-1], out))


def flatten(x: Tensor | dict[str, Tensor]) -> Tensor:
    """All of x as one row of numbers each: (B, F)."""
    if isinstance(x, Tensor):
        return x.reshape(len(x), -1)
    return torch.cat([v.reshape(len(v), -1) for v in x.values()], dim=1)


def he(net: nn.Sequential) -> nn.Sequential:
    """The same net with linear layers that keep the size of what comes (He et al., 2015), and kinks spread over it, but for its last."""
    for layer in [m for m in net if isinstance(m, nn.Linear)][:-1]:
        nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
        nn.init.uniform_(layer.bias, -0.5, 0.5)
    return net


class Flatten(nn.Module):
    """No embedding: x itself, flattened and joined."""

    def forward(self, x: Tensor | dict[str, Tensor]) -> Tensor:
        return flatten(x)


class MLP(nn.Module):
    """All of x, flattened and joined, through a multi-layer perceptron: (B, ...) -> (B, context).

    svd: components of the reduced basis in front of it, 0 for none; `seed_basis` sets it. Raises SettingError where x has fewer numbers.
    """

    def __init__(self, size: int, hidden: tuple[int, ...], context: int, activation: str, svd: int = 0) -> None:
        super().__init__()
        if svd > size:
            raise SettingError(f"svd = {svd}: x has {size} numbers; take at most so many components")
        self.basis = nn.Linear(size, svd) if svd else None
        self.net = self._layers(svd or size, hidden, context, activation)

    def _layers(self, size: int, hidden: tuple[int, ...], context: int, activation: str) -> nn.Sequential:
        return layers(size, hidden, context, activation)

    def forward(self, x: Tensor | dict[str, Tensor]) -> Tensor:
        flat = flatten(x)
        return self.net(flat if self.basis is None else self.basis(flat))

    @torch.no_grad()
    def seed_basis(self, x: Tensor | dict[str, Tensor]) -> None:
        """Set the first layer from standardised rows x (n, ...), where there is one; raises SettingError where n is too small."""
        if self.basis is None:
            return
        rows, count = flatten(x).double().cpu().numpy(), self.basis.out_features
        if len(rows) < count:
            raise SettingError(f"svd = {count}: the bank has {len(rows)} rows for it; take fewer components, or a larger bank")
        self.basis.weight.copy_(torch.as_tensor(reduced_basis(rows, count)))
        self.basis.bias.zero_()


class ResidualMLP(MLP):
    """As MLP, with a residual block after each hidden layer, and linear layers between widths that differ."""

    def _layers(self, size: int, hidden: tuple[int, ...], context: int, activation: str) -> nn.Sequential:
        sizes, inner = [size, *hidden], []
        for k, (a, b) in enumerate(pairwise(sizes)):
            inner += [*([nn.Linear(a, b)] if k == 0 or a != b else []), ResidualBlock(b, activation)]
        return nn.Sequential(*inner, ACTIVATIONS[activation](), nn.Linear(sizes[-1], context))


def reduced_basis(rows: NDArray[np.float64], count: int) -> NDArray[np.float64]:
    """The projection of the module's docstring from rows (n, F): (count, F). By the smaller Gram matrix, in double precision."""
    n, size = rows.shape
    wide = size > n
    gram = rows @ rows.T if wide else rows.T @ rows
    last = len(gram) - 1
    squares, vectors = linalg.eigh(gram, subset_by_index=[last - count + 1, last])
    squares, vectors = np.maximum(squares[::-1], 0.0), vectors[:, ::-1]
    if wide:
        vectors = rows.T @ vectors
        vectors /= np.maximum(np.linalg.norm(vectors, axis=0), np.finfo(float).tiny)
    largest = np.abs(vectors).argmax(0)
    vectors = vectors * np.where(vectors[largest, np.arange(count)] < 0, -1.0, 1.0)
    scale = np.sqrt(squares.sum() / (n * count))
    return vectors.T / (scale if scale > 0 else 1.0)
