"""Simulators whose cost is known: they spin for a fixed time, so that the farm's own cost is what is left."""

import time

import numpy as np

import sbiplat as sp

PRIOR = sp.Prior({"a": sp.Uniform(0.0, 1.0), "b": sp.Uniform(0.0, 1.0)})
SECONDS = {"busy1": 1e-3, "busy10": 1e-2}


def spin(seconds, theta, rng):
    """x (10,), after so many seconds of work."""
    end = time.perf_counter() + seconds
    x = theta[0] + rng.standard_normal(10)
    while time.perf_counter() < end:
        pass
    return x


@sp.simulator(prior=PRIOR, x_shape=(10,))
def busy1(theta, rng):
    """A row in 1 ms."""
    return spin(SECONDS["busy1"], theta, rng)


@sp.simulator(prior=PRIOR, x_shape=(10,))
def busy10(theta, rng):
    """A row in 10 ms."""
    return spin(SECONDS["busy10"], theta, rng)


@sp.simulator(prior=PRIOR, x_shape=(100,), batched=True)
def quick(theta, rng):
    """A row of 400 bytes in about a microsecond."""
    return theta[:, :1].astype(np.float32) + rng.standard_normal((len(theta), 100), dtype=np.float32)
