r"""Neural posterior score estimation: the score of the posterior under growing noise (Sharrock et al., 2024; Geffner et al., 2023).

Denoising score matching (Vincent, 2011) over a schedule of noise levels s,

.. math:: \min \; \mathbb{E}_{\theta, x, s, \varepsilon} \; \lambda(s) \, \| F - F^* \|^2,

with the preconditioned net of `denoising`. Schedules, by the law of s: `edm`, log s ~ N(-1, 1.6^2) (Karras et al., 2022, wider);
`vp`, :math:`s = \tan(\pi t / 2)`, t uniform, the cosine schedule of the variance-preserving diffusion; `ve`, log s uniform, as in
the variance-exploding one (Song et al., 2021). Weights: `unit`, each level alike for the net;
`likelihood`, which bounds the Kullback-Leibler divergence (Song et al., 2021, "Maximum likelihood training").
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from sbiplat.estimators.denoising import LEAST, MOST, Denoising, DenoisingSettings, log_uniform
from sbiplat.settings import setting

EDM_MEAN, EDM_SD = -1.0, 1.6


@dataclass(frozen=True)
class NPSESettings(DenoisingSettings):
    """What shapes neural posterior score estimation."""

    schedule: str = setting("edm", "the law of the noise levels", among=("edm", "vp", "ve"))
    weighting: str = setting("unit", "weight of the levels: unit, or likelihood", among=("unit", "likelihood"))


class NPSE(Denoising):
    """The score of the diffused posterior; see the module's docstring."""

    settings: NPSESettings
    settings_class = NPSESettings
    of_the_loss = ("schedule", "weighting")

    def levels(self, u: Tensor) -> Tensor:
        if self.settings.schedule == "vp":
            return torch.tan(0.5 * math.pi * u)
        if self.settings.schedule == "ve":
            return log_uniform(u)
        return torch.exp(EDM_MEAN + EDM_SD * math.sqrt(2) * torch.erfinv(2 * u - 1))

    def weight(self, s: Tensor) -> Tensor:
        if self.settings.weighting == "unit":
            return torch.ones_like(s)
        # KL <= 1/2 int |D - w|^2 / s^2 dlog s, and |D - w|^2 = s^2 / (1 + s^2) |F - F*|^2; over the schedule's density of log s
        whole = math.log(1 / LEAST)  # about the integral of the weight over the schedule, so that its mean is about 1
        if self.settings.schedule == "vp":
            density = (2 / math.pi) * s / (1 + s.square())
        elif self.settings.schedule == "ve":
            density = torch.full_like(s, 1 / math.log(MOST / LEAST))
        else:
            density = torch.exp(-0.5 * ((s.log() - EDM_MEAN) / EDM_SD).square()) / (EDM_SD * math.sqrt(2 * math.pi))
        return (1 / (1 + s.square()) / density / whole).clamp_max(10.0)
