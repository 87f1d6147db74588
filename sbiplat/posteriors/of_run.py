"""The posterior of a run: which sampler stands behind which estimator."""

from __future__ import annotations

import importlib
from typing import Any

from sbiplat.estimators.base import Estimator
from sbiplat.estimators.ensemble import Ensemble
from sbiplat.estimators.equivariant import Equivariant
from sbiplat.posteriors.base import Posterior, Sampler
from sbiplat.posteriors.ensemble import EnsembleSampler
from sbiplat.posteriors.gnpe import GNPESampler
from sbiplat.posteriors.recalibrated import Maps, RecalibratedSampler
from sbiplat.runs import Run

SAMPLERS = {
    "direct": "sbiplat.posteriors.direct:DirectSampler",
    "diffusion": "sbiplat.posteriors.diffusion:DiffusionSampler",
    "likelihood": "sbiplat.posteriors.likelihood:LikelihoodSampler",
    "theta_space": "sbiplat.posteriors.theta_space:ThetaSpaceSampler",
}


def from_run(run: Run, device: str = "cpu", **provenance: Any) -> Posterior:
    """The posterior of a finished run, whether or not it is certified: `sbiplat.load` is the door for users."""
    run.require_finished()
    sampler: Sampler = _sampler(run.estimator(device), run, device)
    if run.recalibration is not None:
        sampler = RecalibratedSampler(sampler, Maps.from_json(run.recalibration, run.prior.dim))
    return Posterior(run.prior, run.x, sampler, {"run": str(run.path), "weights_digest": run.weights_digest,
                                                 "bank_digest": run.bank_digest, **provenance})


def _sampler(estimator: Estimator, run: Run, device: str) -> Sampler:
    if isinstance(estimator, Ensemble):
        return EnsembleSampler([_sampler(member, run, device) for member in estimator.members])
    if isinstance(estimator, Equivariant):
        return GNPESampler(estimator, _sampler(estimator.main, run, device), device)
    module, _, attribute = SAMPLERS[estimator.posterior].partition(":")
    needs = {"likelihood": (run.prior.unconstrained_log_prob,), "theta_space": (run.prior,)}.get(estimator.posterior, ())
    return getattr(importlib.import_module(module), attribute)(estimator, *needs, device=device)
