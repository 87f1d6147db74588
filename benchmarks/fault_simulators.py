"""Simulators for the campaign of faults: a few seconds of work each, with failures of their own."""

import ctypes
import time

import numpy as np

import sbiplat as sp

PRIOR = sp.Prior({"a": sp.Uniform(0.0, 1.0), "b": sp.Gamma(2.0, 3.0, unit="s")})


@sp.simulator(prior=PRIOR, x_shape={"trace": (3,), "count": ()}, dtype="float64")
def faulty(theta, rng):
    """Some rows raise, some are not finite."""
    time.sleep(1e-3)
    if rng.random() < 0.1:
        raise ValueError("unlucky")
    return {"trace": theta[0] + rng.standard_normal(3), "count": np.nan if rng.random() < 0.1 else theta[1]}


@sp.simulator(prior=PRIOR, x_shape=(16,), batched=True)
def batch(theta, rng):
    """Blocks of 1024 rows in some milliseconds."""
    time.sleep(5e-3)
    return theta[:, :1] + rng.standard_normal((len(theta), 16))


@sp.simulator(prior=PRIOR, x_shape=(2,))
def crashing(theta, rng):
    """One row in a hundred takes its process down."""
    time.sleep(5e-3)
    if theta[0] < 0.01:
        ctypes.string_at(0)
    return theta + rng.standard_normal(2)
