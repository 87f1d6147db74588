r"""The linear-Gaussian posterior, where estimators of theta given x begin: ridge regression in closed form,

.. math:: z \,|\, u \;\sim\; N(W^\top u + b, \; L L^\top), \qquad w = L^{-1} (z - W^\top u - b),

with u the prepared x as one row. The ridge is the one with the least leave-one-out error, and :math:`L L^\top` the covariance of the
leave-one-out residuals (Allen, 1974), so that rows which were used do not look better than new ones. A net that works on w has only
to learn what is not linear, and a narrow posterior has about unit scale. For a linear-Gaussian simulator w is N(0, I).
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn

RIDGES = 10.0 ** np.arange(-7, 3)  # in units of a standardised feature's variance
LEAST = 1e-10


class Regression(nn.Module):
    """u (B, F) -> the mean of z, (B, D); z to w and back. Without features, F = 0, w = z."""

    def __init__(self, features: int, dim: int) -> None:
        super().__init__()
        self.register_buffer("weight", torch.zeros(features, dim))
        self.register_buffer("bias", torch.zeros(dim))
        self.register_buffer("factor", torch.eye(dim))
        self.register_buffer("inverse", torch.eye(dim))

    def fit(self, u: Tensor, z: Tensor) -> None:
        """Set all from N rows (N, F) and (N, D); two and fewer say nothing of a residual."""
        if not len(self.weight) or len(u) < 3:
            return
        x, y = u.double().cpu().numpy(), z.double().cpu().numpy()
        rows, x_mean, y_mean = len(x), x.mean(0), y.mean(0)
        x, y = x - x_mean, y - y_mean
        variances, axes = np.linalg.eigh(x.T @ x / rows)
        along = x @ axes
        cross = along.T @ y / rows
        best, weight, covariance = np.inf, np.zeros_like(axes @ cross), y.T @ y / rows
        for ridge in RIDGES:
            shrunk = 1 / (variances.clip(0) + ridge)
            leverage = (1 + np.square(along) @ shrunk) / rows
            left_out = (y - along @ (shrunk[:, None] * cross)) / (1 - leverage).clip(LEAST)[:, None]
            spread = left_out.T @ left_out / rows + LEAST * np.eye(y.shape[1])
            volume = np.linalg.slogdet(spread)[1]
            if volume < best:
                best, weight, covariance = volume, axes @ (shrunk[:, None] * cross), spread
        self.weight.copy_(torch.as_tensor(weight))
        self.bias.copy_(torch.as_tensor(y_mean - x_mean @ weight))
        factor = np.linalg.cholesky(covariance)
        self.factor.copy_(torch.as_tensor(factor))
        self.inverse.copy_(torch.as_tensor(np.linalg.inv(factor)))

    def forward(self, u: Tensor) -> Tensor:
        return u @ self.weight + self.bias

    def whiten(self, z: Tensor, mean: Tensor) -> Tensor:
        """w (..., D) of z, given means of shapes that broadcast."""
        return (z - mean) @ self.inverse.mT

    def unwhiten(self, w: Tensor, mean: Tensor) -> Tensor:
        """The inverse of `whiten`."""
        return w @ self.factor.mT + mean

    @property
    def log_det(self) -> Tensor:
        """log |dw / dz|, whatever x."""
        return torch.diagonal(self.inverse).log().sum()
