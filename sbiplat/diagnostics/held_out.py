"""The figures of a posterior on held-out pairs: ranks, coverage and information, in bounded memory.

A diagnostic measures and never decides. It works on any `Posterior`, an exact one included, so that tests can hold it
against known answers.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from sbiplat.diagnostics.coverage import Coverage, References, coverage, sbc_ranks, tarp_ranks
from sbiplat.diagnostics.examined import Examined, tensors
from sbiplat.diagnostics.information import Information, information
from sbiplat.nets.standardise import Standardise
from sbiplat.observation import Fields
from sbiplat.posteriors.base import Posterior

Array = NDArray[np.float64]
CHUNK_NUMBERS = 2**22
MOST_FEATURES = 256
LEAST_CHUNKS = 20  # so that a slow gate shows that it goes on


@dataclass(frozen=True)
class HeldOutFigures:
    """What the gate decides on. ranks: (P, 1 + D), TARP's first, then each parameter's."""

    pairs: int
    draws: int
    ranks: Array
    coverages: tuple[Coverage, ...]
    information: Information


class Features:
    """x as standardised features (P, F) for the reference regression; more than 256 are projected at random to 256."""

    def __init__(self, posterior: Posterior, x: Fields, rng: np.random.Generator) -> None:
        self._standardise = Standardise(posterior.x)
        self._standardise.fit(tensors(x))
        size = posterior.x.size
        self._project = rng.standard_normal((size, MOST_FEATURES)) / np.sqrt(size) if size > MOST_FEATURES else None

    def __call__(self, x: Fields) -> Array:
        flat = torch.cat([v.reshape(len(v), -1) for v in self._standardise(tensors(x)).values()], dim=1).double().numpy()
        return flat if self._project is None else flat @ self._project


def held_out_figures(examined: Examined, draws: int) -> HeldOutFigures:
    """Measure coverage and information by so many draws a pair, L."""
    posterior, pairs, training = examined.posterior, examined.pairs, examined.training
    streams = [np.random.default_rng(s) for s in examined.stream(0x6A7E).spawn(3)]
    features = Features(posterior, training["x"], streams[0])
    references = References.fit(features(training["x"]), np.asarray(training["theta"], float), streams[0])
    truth = examined.truth
    reference = references.draw(features(pairs["x"]), streams[1])
    count, dim = truth.shape
    chunk = max(1, min(CHUNK_NUMBERS // (draws * dim), -(-count // LEAST_CHUNKS)))
    parts = [slice(a, min(a + chunk, count)) for a in range(0, count, chunk)]

    def measure(k: int) -> tuple[Array, Array, Array]:
        part, rng = parts[k], np.random.default_rng(examined.stream(0xD4, k))
        x = {name: v[part] for name, v in pairs["x"].items()}
        z = posterior.unconstrained_sample(x, draws, int(examined.stream(0xD3, k).generate_state(1)[0]))
        tarp = tarp_ranks(z, truth[part], reference[part], references.residual, rng)
        log_q = posterior.unconstrained_log_prob(truth[part, None], x)[:, 0]
        return np.column_stack([tarp, sbc_ranks(z, truth[part], rng)]), log_q, z.var(1)

    with examined.progress.task("gate", count) as advance:
        done = examined.spread.map(measure, len(parts), lambda k: advance(parts[k].stop - parts[k].start))
    all_ranks, log_q, variances = (np.concatenate(values) for values in zip(*done, strict=True))
    prior_sd = np.ones(dim) if posterior.prior.gaussianised else np.asarray(training["theta"], float).std(0)
    names = ["TARP", *(f"SBC {name}" for name in posterior.prior.names)]
    return HeldOutFigures(
        count, draws, all_ranks,
        tuple(coverage(name, all_ranks[:, k], streams[2]) for k, name in enumerate(names)),
        information(log_q, posterior.prior.unconstrained_log_prob(truth), variances, prior_sd),
    )
