"""Exact conditionals in place of GNPE's nets, whose chains and densities are known in closed form."""

from __future__ import annotations

import math
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from sbiplat.posteriors.base import Posterior
from sbiplat.posteriors.gnpe import GNPESampler
from sbiplat.symmetry import Translation
from sbiplat.symmetry.frame import PROXY, Frame
from simulators import location

S = math.sqrt(location.VARIANCE)
LOG_2PI = math.log(2 * math.pi)


# ------------------------------------------------------------------------------------------- exact nets


@dataclass
class Gaussian:
    """A net whose law given fields is N(mean, sd^2), coordinate by coordinate: `moments` of fields (R, ...) gives both, (R, D)."""

    moments: Any

    def prepare(self, x):
        return x

    prepare_differentiably = prepare

    def context(self, x):
        return torch.cat(self.moments(x), -1)

    def sample(self, context, n, generator):
        mean, sd = context.chunk(2, -1)
        noise = torch.randn(len(context), n, mean.shape[-1], generator=generator, dtype=torch.float64)
        return mean[:, None] + sd[:, None] * noise

    def draws(self, context, n, generator):
        return self.sample(context, n, generator).float()

    def densities(self, u, context):
        mean, sd = context.chunk(2, -1)
        return (-0.5 * ((u.double() - mean) / sd).square() - sd.log() - 0.5 * LOG_2PI).sum(-1)


def sampler_of(frame, initial, main, most_steps=400, sight=None):
    """The sampler of an estimator with these laws of the pose and of u given x'."""
    law = Gaussian(main)
    net = SimpleNamespace(frame=frame, most_steps=most_steps, initial=SimpleNamespace(net=Gaussian(initial), prepare=lambda x: x), main=law,
                          sight=sight or (lambda x: None))
    net.eval = lambda: net
    return GNPESampler(net, law)


def of_location(width, *, off=5.0, wide=3.0, prior=None, told=True, scale=location.SCALE, **more):
    """Of the location model: the exact conditional, and an initial net that is `off` sd off and so many times too wide. told: of the
    proxy, and so exact under the normal prior; else that of a flat prior."""
    v = 1 / (scale**-2 + location.COUNT) if told else 1 / location.COUNT
    share = width**2 / (v + width**2)

    def initial(x):
        mean = location.VARIANCE * x["x"].sum(-1, keepdim=True)
        return mean + off * S, torch.full_like(mean, wide * S)

    def main(x):
        proxy = x[PROXY] if told else 0.0
        mean = v * (x["x"].sum(-1, keepdim=True) + location.COUNT * proxy) - proxy  # of theta - proxy
        return share * mean, torch.full_like(mean, math.sqrt(share * v))

    frame = Frame(Translation(("mu",)), prior or location.location.prior, (width,), (told,))
    return sampler_of(frame, initial, main, **more)


def observed(*mu, seed=0):
    return {"x": np.random.default_rng(seed).standard_normal((len(mu), location.COUNT)) + np.array(mu)[:, None]}

def theta_of(z, prior=location.location.prior):
    return prior.constrain(np.asarray(z, float))[..., 0]


def density(sampler, theta, x, prior=location.location.prior):
    """log q(theta | x) of theta (n,) for one observation."""
    return Posterior(prior, location.location.x, sampler).density(np.asarray(theta)[None, :, None], x)[0]


X = observed(1.0)
M = float(location.posterior_mean(X["x"])[0])
RATIOS = pytest.mark.parametrize("ratio", [0.2, 0.5, 1.0, 3.0])
