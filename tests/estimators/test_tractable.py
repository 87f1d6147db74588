"""What the sampler asks of nle and nre: log-likelihoods whose leading axes are broadcast, whatever the net."""

import numpy as np
import pytest
import torch

from sbiplat.estimators.base import Architecture, find
from sbiplat.nets.flows import FLOWS
from sbiplat.observation import ObservationSpec
from sbiplat.settings import build


@pytest.mark.parametrize(("name", "settings"), [*(("nle", {"flow": flow}) for flow in FLOWS if flow != "cnf"), ("nre", {})],
                         ids=[*(f"nle {flow}" for flow in FLOWS if flow != "cnf"), "nre"])
def test_a_set_of_observations_is_broadcast_against_one_theta(name, settings):
    architecture = Architecture(name, build(find(name).settings_class, settings), 3, ObservationSpec.declare((4,)), True)
    estimator = architecture.build(0).eval()
    generator = torch.Generator().manual_seed(1)
    theta, x = torch.randn(5, 1, 3, generator=generator), {"x": torch.randn(10, 4, generator=generator)}
    with torch.no_grad():
        values, left_out = estimator.observed(estimator.prepare(x))
        together = estimator.log_likelihood(theta, values.view(5, 2, -1))
        apart = estimator.log_likelihood(theta.expand(5, 2, 3).reshape(10, 3), values)
    assert together.shape == (5, 2)
    assert left_out.shape == (10,)
    np.testing.assert_allclose(together.flatten(), apart, rtol=1e-4, atol=1e-5)
    assert estimator.proposal_context(values).shape[0] == 10
