"""Augmentation by an exact symmetry stands in for simulations."""

import numpy as np
import pytest

import sbiplat as sp
from sbiplat.posteriors.of_run import from_run
from sbiplat.progress import silent
from simulators import damped_oscillator as oscillator


@pytest.mark.science
def test_a_thousand_oscillators_that_are_shifted_in_time_tell_more(tmp_path):
    bank = sp.simulate(oscillator.damped_oscillator, 1000, 1, tmp_path / "bank", workers=1, progress=silent)
    rng = np.random.default_rng(99)
    theta = oscillator.prior.sample(rng, 500)
    x = oscillator.signal(theta) + oscillator.NOISE * rng.standard_normal((500, oscillator.SAMPLES))
    told = {}
    for symmetry in ("none", "augment"):
        run = sp.train(bank, "npe", out=tmp_path / symmetry, simulator=oscillator.damped_oscillator, progress=silent, symmetry=symmetry)
        told[symmetry] = from_run(run).log_prob(theta[:, None], x)[:, 0]
    gain = told["augment"] - told["none"]
    assert gain.mean() - 3 * gain.std() / np.sqrt(500) > 0.3, "in nats; the noise is drawn afresh in both"
