r"""Flow matching posterior estimation: a velocity from noise to the posterior (Wildberger et al., 2023; Lipman et al., 2023).

Along a path :math:`z_t = \alpha_t w + \sigma_t \varepsilon` the velocity :math:`v = \dot\alpha_t w + \dot\sigma_t \varepsilon` is
regressed on,

.. math:: \min \; \mathbb{E}_{\theta, x, t, \varepsilon} \; \| v_\phi(z_t, t, c) - v \|^2 .

Paths: `linear`, :math:`\alpha = 1 - t, \sigma = t` (rectified flow), and `vp`, :math:`\alpha = \cos(\pi t / 2), \sigma = \sin(\pi t / 2)`
(Albergo & Vanden-Eijnden, 2023). t = u^p for uniform u: a `time_power` above 1 puts more of the training near the data. v is an
affine function of the net F of `denoising`, whose angle is atan(sigma / alpha): its squared error is that of F times
:math:`1 / ((1 - t)^2 + t^2)` on the linear path, and a constant on the other.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from sbiplat.estimators.denoising import Denoising, DenoisingSettings
from sbiplat.settings import setting


@dataclass(frozen=True)
class FMPESettings(DenoisingSettings):
    """What shapes flow matching posterior estimation."""

    path: str = setting("linear", "the path from posterior to noise", among=("linear", "vp"))
    time_power: float = setting(1.5, "t = u^p: above 1, more training near the data", low=0.1, high=10.0)


class FMPE(Denoising):
    """The velocity of a path from noise to the posterior; see the module's docstring."""

    settings: FMPESettings
    settings_class = FMPESettings
    of_the_loss = ("path", "time_power")

    def levels(self, u: Tensor) -> Tensor:
        t = u ** self.settings.time_power
        return t / (1 - t).clamp_min(1e-6) if self.settings.path == "linear" else torch.tan(0.5 * math.pi * t)

    def weight(self, s: Tensor) -> Tensor:
        if self.settings.path == "vp":
            return torch.ones_like(s)
        return (1 + s).square() / (1 + s.square())  # t = s / (1 + s)

    def velocity(self, z_t: Tensor, t: Tensor, conditions: Tensor) -> Tensor:
        """v(z_t, t, c) for z_t (B, n, D) and t (1, 1, 1) in (0, 1), over whitened parameters."""
        if self.settings.path == "linear":
            alpha, sigma, d_alpha, d_sigma = 1 - t, t, -torch.ones_like(t), torch.ones_like(t)
        else:
            angle = 0.5 * math.pi * t
            alpha, sigma = angle.cos(), angle.sin()
            d_alpha, d_sigma = -0.5 * math.pi * sigma, 0.5 * math.pi * alpha
        w = self.denoise(z_t / alpha, sigma / alpha, conditions)
        return d_alpha * w + d_sigma * (z_t - alpha * w) / sigma
