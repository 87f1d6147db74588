"""Simulators for tests of the farm, in a file that worker processes and MPI ranks can load."""

import os
import time

import numpy as np

import sbiplat as sp

PRIOR = sp.Prior({"a": sp.Uniform(0.0, 1.0), "b": sp.Gamma(2.0, 3.0, unit="s")})


@sp.simulator(prior=PRIOR, x_shape={"trace": (3,), "count": ()}, dtype="float64")
def rowwise(theta, rng):
    """A row in about 0.3 ms; some fail."""
    time.sleep(2e-4)
    if rng.random() < 0.1:
        raise ValueError("unlucky\nrow")
    return {"trace": theta[0] + rng.standard_normal(3), "count": np.nan if rng.random() < 0.1 else theta[1]}


@sp.simulator(prior=PRIOR, x_shape=(4,), batched=True)
def batchwise(theta, rng):
    return theta[:, :1] + rng.standard_normal((len(theta), 4))


@sp.simulator(prior=PRIOR, x_shape=(2,))
def kills_its_worker(theta, rng):
    """What a kill for want of memory may do: the worker goes, not the simulator's own process."""
    if os.environ.get("SBIPLAT_TEST_DIE"):
        os.kill(os.getppid(), 9)
        time.sleep(10)
    return theta


@sp.simulator(prior=PRIOR, x_shape=(3,), dtype="float64", parallel=True)
def parallel(theta, rng, comm):
    """A sum that all ranks of a group make together; the same on any number of them."""
    if theta[0] < 0.1:
        raise ValueError(f"low, on rank {comm.Get_rank()} of {comm.Get_size()}")
    terms = rng.integers(0, 1000, 24)
    mine = int(terms[comm.Get_rank()::comm.Get_size()].sum())
    total = comm.allreduce(mine)
    if os.environ.get("SBIPLAT_TEST_SIZES"):
        with open(os.environ["SBIPLAT_TEST_SIZES"], "a") as file:
            file.write(f"{comm.Get_size()}\n")
    return np.array([total, theta[0], theta[1]])


@sp.simulator(prior=PRIOR, x_shape=(3,), parallel=True)
def alone(theta, rng, comm):
    """Raises on one rank only, while the others wait for it."""
    if comm.Get_size() > 1 and comm.Get_rank() == 1:
        raise ValueError("alone")
    comm.allreduce(1)
    return np.zeros(3)


@sp.simulator(prior=PRIOR, x_shape=(3,), parallel=True)
def astray(theta, rng, comm):
    """Its ranks wait for each other for ever."""
    comm.recv(source=(comm.Get_rank() + 1) % comm.Get_size(), tag=7)
    return np.zeros(3)
