r"""What score (NPSE) and flow-matching (FMPE) estimators share: the denoiser of whitened parameters.

The regression of `nets.regression` whitens z to w; the field is left with what is not linear, at about unit scale. w is turned into
noise along a quarter of a circle, and the net predicts the velocity back (Salimans & Ho, 2022; Lu & Song, 2024),

.. math:: z_t = \cos t \; w + \sin t \; \varepsilon, \qquad F(z_t, t, c) \approx \mathbb{E}[\sin t \; w - \cos t \; \varepsilon \,|\, z_t],
          \qquad \frac{dz}{dt} = -F, \quad 0 \le t < \pi / 2 .

z_t and the target have unit variance at every t; for a Gaussian posterior F = 0. Every path :math:`\alpha w + \sigma \varepsilon` of a
diffusion or an interpolant is this one with the noise level :math:`s = \sigma / \alpha = \tan t`, up to a known scaling (Karras et al.,
2022): paths differ in which s they train on, and how they weigh them. From F follow, with y = w + s e,

.. math:: D = \mathbb{E}[w \,|\, y] = \cos t \; z_t + \sin t \; F, \qquad \nabla_y \log p_s(y) = \frac{D - y}{s^2} .

How much the posterior depends on x follows too. The divergence of two laws is the integral over the noise level of how far their
denoisers are apart (Verdu, 2010; by de Bruijn's identity),
:math:`\mathrm{KL}(p \| p') = \int_0^\infty s^{-3} \, \mathbb{E}_p \| D_s(y) - D'_s(y) \|^2 \, ds`. For x and x + dx it is
:math:`\frac12 dx^\top F dx` to second order, and so the posterior's Fisher information in x has the trace

.. math:: \mathrm{tr} \, F(x) = 2 \int_0^\infty \mathbb{E} \, \| \partial_x D_s \|^2 \, \frac{ds}{s^3}
          = 2 \int_0^{\pi / 2} \cot t \; \mathbb{E} \, \big\| \partial_x ( \sin t \; L^{-1} m(x) + F(z_t, t, c(x)) ) \big\|^2 \, dt ,

the slopes taken with y in z's own coordinates held fast, where m and L are the regression's. Levels are drawn half uniform in t and half in
log s, and the norms are estimated by random signs (Hutchinson).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from sbiplat.estimators.base import LEARNING_RATES, Architecture
from sbiplat.estimators.conditioned import Conditioned, ConditionedSettings
from sbiplat.nets.fields import Field
from sbiplat.settings import Interval, setting

LEAST, MOST = 1e-3, 80.0  # noise levels, in units of the whitened posterior
SOLVERS = {"heun": 12, "dpm": 50, "sde": 50}  # and their steps


@dataclass(frozen=True)
class DenoisingSettings(ConditionedSettings):
    """What shapes the field, and how draws are made of it."""

    hidden: int = setting(64, "width of the field", low=1, high=65536)
    blocks: int = setting(3, "residual blocks of the field", low=1, high=256)
    noises: int = setting(2, "noise levels a row and step", low=1, high=1024)
    solver: str = setting("heun", "heun (two evaluations a step), dpm (DPM-Solver++ 2M, one), or sde (its stochastic form)",
                          among=tuple(SOLVERS))
    steps: int | None = setting(None, "steps of the solver; by default 12 of heun, 50 of dpm and sde", low=4, high=10000)
    trace: str = setting("exact", "trace of the Jacobian in log_prob: exact, or hutchinson's estimate", among=("exact", "hutchinson"))


class Denoising(Conditioned):
    """Base of NPSE and FMPE, which state `levels` and `weight`."""

    settings: DenoisingSettings
    posterior = "diffusion"
    training_defaults = {"ema": 0.999, "steps": 8000}
    search = {"hidden": (32, 64, 128, 256), "blocks": Interval(2, 6), "learning_rate": LEARNING_RATES}

    def __init__(self, architecture: Architecture) -> None:
        super().__init__(architecture)
        self.field = Field(architecture.dim, self.width, self.settings.hidden, self.settings.blocks)

    @property
    def steps(self) -> int:
        """Of the solver."""
        return self.settings.steps or SOLVERS[self.settings.solver]

    def levels(self, u: Tensor) -> Tensor:
        """Noise levels s of uniform u in (0, 1): what the field is trained on."""
        raise NotImplementedError

    def weight(self, s: Tensor) -> Tensor:
        """The weight of |F - target|^2 at s."""
        raise NotImplementedError

    def velocity_back(self, z: Tensor, t: Tensor, conditions: Tensor) -> Tensor:
        """F(z, t, c) for z (B, n, D), angles t (B, n, 1) or (1, 1, 1), and the field's conditions of B contexts."""
        return self.field(z, t.tan().clamp(LEAST, MOST).log(), conditions)

    def denoise(self, y: Tensor, s: Tensor, conditions: Tensor) -> Tensor:
        """E[w | y] for y = w + s e, with s as t above."""
        t = s.atan()
        return t.cos().square() * y + t.sin() * self.velocity_back(t.cos() * y, t, conditions)

    def score(self, y: Tensor, s: Tensor, conditions: Tensor) -> Tensor:
        """The gradient of log p_s(y)."""
        return (self.denoise(y, s, conditions) - y) / s.square()

    def fisher_root(self, theta: Tensor, x: dict[str, Tensor]) -> Tensor:
        """The root of the last equation of the module's docstring, at `noises` levels a row; theta is a draw of the posterior."""
        context, count = self.context(x), self.settings.noises
        shape, mean = (len(theta), count, 1), context[:, None, -self.dim:]
        u = (torch.rand(len(theta), 1, 1, device=theta.device) + torch.arange(count, device=theta.device)[:, None] / count) % 1
        log_range = math.log(MOST / LEAST)
        t = torch.where(torch.rand(shape, device=u.device) < 0.5, 0.5 * math.pi * u, torch.exp(math.log(LEAST) + u * log_range).atan())
        t = t.clamp(math.atan(LEAST), math.atan(MOST))
        weight = 2 * t.cos() / t.sin() / (1 / math.pi + 0.5 / (t.sin() * t.cos() * log_range)) / count
        noise = torch.randn(len(theta), count, self.dim, device=theta.device)
        with torch.no_grad():
            y = self.regression.unwhiten(self.whiten(theta, context)[:, None] + t.tan() * noise, mean)
        F = self.velocity_back(t.cos() * self.regression.whiten(y, mean), t, self.field.conditions(context))
        signs = 2.0 * torch.randint(0, 2, noise.shape, device=theta.device) - 1
        return (weight.sqrt() * signs * (t.sin() * (mean @ self.regression.inverse.mT) + F)).sum((1, 2))

    def nat(self) -> float:
        """What the loss rises by where N(0, I) is learnt displaced by a nat, a length of sqrt 2: F is then off by sin t times that."""
        s = self.levels((torch.arange(4096) + 0.5) / 4096).clamp(LEAST, MOST)
        return float((2 * self.weight(s) * s.atan().sin().square()).mean())

    def loss(self, theta: Tensor, x: dict[str, Tensor]) -> Tensor:
        """The field's weighted squared error, (B,)."""
        context = self.context_of(theta, x)
        w = self.whiten(theta, context)
        count = self.settings.noises
        strata = (torch.rand(len(w), 1, 1, device=w.device) + torch.arange(count, device=w.device)[:, None] / count) % 1
        s = self.levels(strata.clamp(1e-6, 1 - 1e-6)).clamp(LEAST, MOST)
        t, w, noise = s.atan(), w[:, None], torch.randn(len(w), count, self.dim, device=w.device)
        error = self.velocity_back(t.cos() * w + t.sin() * noise, t, self.field.conditions(context)) - (t.sin() * w - t.cos() * noise)
        return (self.weight(s)[..., 0] * error.square().sum(-1)).mean(1)


def log_uniform(u: Tensor) -> Tensor:
    """Levels between the least and the most, each octave alike."""
    return torch.exp(math.log(LEAST) + u * math.log(MOST / LEAST))
