"""GNPE's chains with trained nets."""

from __future__ import annotations

import numpy as np
import pytest
from exact_nets import M, S, X, observed
from scipy import stats

import sbiplat as sp
from sbiplat.errors import SettingError
from sbiplat.posteriors.of_run import from_run
from sbiplat.progress import silent
from sbiplat.symmetry import Permutation, Product, Translation
from simulators import location

# ---------------------------------------------------------------------------------------------- trained nets


def trained(folder, rows, simulator=location.location, **settings):
    bank = sp.simulate(simulator, rows, 1, folder / "bank", workers=1, progress=silent)
    return sp.train(bank, "npe", out=folder / "run", simulator=simulator, symmetry="gnpe", progress=silent, embedding_hidden=[32], context=8,
                    **{"flow": "gaussian", "batch_size": 128, **settings})


def with_width(run):
    """rho of theory for the kernel of a run on the location model."""
    return location.autocorrelation(run.architecture.symmetry["widths"][0])


def test_chains_of_trained_flows_have_the_known_law_and_autocorrelation(tmp_path):
    run = trained(tmp_path, 2000, max_epochs=15)
    posterior = from_run(run)
    theta = posterior.sample(X["x"][0], 4000, seed=0)[:, 0]
    facts = posterior.facts
    assert facts["gibbs_rho"] == pytest.approx(with_width(run), abs=0.08)
    assert facts["gibbs_rho_theory"] == pytest.approx(with_width(run), abs=0.08)
    assert stats.kstest(theta, stats.norm(M, S).cdf).statistic < 0.1
    assert stats.kstest(theta, stats.norm(0, 10).cdf).statistic > 0.3, "power: the prior is seen"


@pytest.mark.science
def test_chains_of_well_trained_flows_have_the_known_law_and_autocorrelation_to_a_hundredth(tmp_path):
    run = trained(tmp_path, 40_000, flow="nsf", batch_size=256, max_epochs=60)
    posterior, found = from_run(run), []
    for seed, mu in enumerate((-10.0, 0.0, 8.0)):
        x = observed(mu, seed=seed)["x"][0]
        theta = posterior.sample(x, 10_000, seed=seed)[:, 0]
        assert stats.kstest(theta, stats.norm(location.posterior_mean(x), S).cdf).statistic < 0.03
        found.append(posterior.facts["gibbs_rho"])
    assert np.mean(found) == pytest.approx(with_width(run), abs=0.02)


def test_a_set_in_a_product_trains_and_alone_is_refused(tmp_path):
    def simulator(symmetry):
        made = sp.simulator(prior=location.location.prior, x_shape=(location.COUNT,), batched=True, symmetry=symmetry, name="set")
        return made(lambda theta, rng: theta + rng.standard_normal((len(theta), location.COUNT)))

    (tmp_path / "alone").mkdir()
    with pytest.raises(SettingError, match=r"Permutation has no pose .*deepset") as told:
        trained(tmp_path / "alone", 500, simulator(Permutation()))
    assert "\n" not in str(told.value)
    posterior = from_run(trained(tmp_path, 2000, simulator(Product(Permutation(), Translation("mu"))), max_epochs=15))
    theta = posterior.sample(X["x"][0], 2000, seed=0)[:, 0]
    assert stats.kstest(theta, stats.norm(M, S).cdf).statistic < 0.15
