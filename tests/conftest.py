"""What tests share: small simulators with known answers, and banks and runs made of them once a session."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import pytest

import sbiplat as sp
from sbiplat.progress import silent

NOISE = 0.5


@sp.simulator(
    prior=sp.Prior({"slope": sp.Normal(1.0, 2.0, unit="m/s"), "offset": sp.Normal(0.0, 1.0, unit="m")}), x_shape=(2,), batched=True,
)
def line(theta, rng):
    """x = z + noise, with z the parameters in units of their prior: the posterior is Gaussian and known."""
    z = (theta - [1.0, 0.0]) / [2.0, 1.0]
    return z + NOISE * rng.standard_normal(z.shape)


def line_posterior(x):
    """Mean and sd of theta given x: (2,), (2,)."""
    shrink = 1 / (1 + NOISE**2)
    return np.array([1.0, 0.0]) + np.array([2.0, 1.0]) * shrink * np.asarray(x), np.array([2.0, 1.0]) * NOISE * np.sqrt(shrink)


QUICK = {"flow": "gaussian", "max_epochs": 12, "batch_size": 128, "embedding_hidden": [32], "context": 8}


@pytest.fixture(scope="session")
def line_simulator():
    return line


@pytest.fixture(scope="session")
def line_bank(tmp_path_factory):
    return sp.simulate(line, 6000, 1, tmp_path_factory.mktemp("line") / "bank", workers=1, progress=silent)


@pytest.fixture(scope="session")
def line_run(line_bank, tmp_path_factory):
    """A trained and gated run; tests that change it work on a copy."""
    run = sp.train(line_bank, "npe", out=tmp_path_factory.mktemp("line") / "run", progress=silent, **QUICK)
    certificate = sp.gate(run, progress=silent)
    assert certificate.passed, certificate.failed
    return run
