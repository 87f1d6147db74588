r"""The linear-Gaussian posterior, where estimators of theta given x begin: ridge regression in closed form,

.. math:: z \,|\, u \;\sim\; N(W^\top u + b, \; L L^\top), \qquad w = L^{-1} (z - W^\top u - b),

with u the prepared x as one row. The ridge is the one with the least leave-one-out error, and :math:`L L^\top` the covariance of the
leave-one-out residuals (Allen, 1974). A net that works on w has only to learn what is not linear, and a narrow posterior has about unit
scale. For a linear-Gaussian simulator w is N(0, I). Rows that were used must not look better than new ones to the net that is trained on
them: their means are those of the fit without them,

.. math:: m_{-i} = \frac{m_i - h_i z_i}{1 - h_i}, \qquad h_i = \frac1N \big( 1 + (u_i - \bar u)^\top (C + r I)^{-1} (u_i - \bar u) \big),

with C the covariance of u and r the ridge.
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
        self.register_buffer("centre", torch.zeros(features), persistent=False)  # of training alone, which fits anew when it resumes
        self.register_buffer("precision", torch.zeros(features, features), persistent=False)
        self.rows = 0

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
        best, weight, covariance, kept = np.inf, np.zeros_like(axes @ cross), y.T @ y / rows, np.zeros_like(variances)
        for ridge in RIDGES:
            shrunk = 1 / (variances.clip(0) + ridge)
            leverage = (1 + np.square(along) @ shrunk) / rows
            left_out = (y - along @ (shrunk[:, None] * cross)) / (1 - leverage).clip(LEAST)[:, None]
            spread = left_out.T @ left_out / rows + LEAST * np.eye(y.shape[1])
            volume = np.linalg.slogdet(spread)[1]
            if volume < best:
                best, weight, covariance, kept = volume, axes @ (shrunk[:, None] * cross), spread, shrunk
        self.rows = rows
        self.centre.copy_(torch.as_tensor(x_mean))
        self.precision.copy_(torch.as_tensor((axes * kept) @ axes.T))
        self.weight.copy_(torch.as_tensor(weight))
        self.bias.copy_(torch.as_tensor(y_mean - x_mean @ weight))
        factor = np.linalg.cholesky(covariance)
        self.factor.copy_(torch.as_tensor(factor))
        self.inverse.copy_(torch.as_tensor(np.linalg.inv(factor)))

    def forward(self, u: Tensor) -> Tensor:
        return u @ self.weight + self.bias

    def left_out(self, mean: Tensor, u: Tensor, z: Tensor) -> Tensor:
        """Means of rows that were fitted, as without them: (B, D)."""
        if not self.rows:
            return mean
        gap = u - self.centre
        leverage = ((1 + ((gap @ self.precision) * gap).sum(1)) / self.rows).clamp_max(1 - 1e-3)[:, None]
        return (mean - leverage * z) / (1 - leverage)

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
