"""What an MPI launcher (mpiexec, srun) says in the environment of the ranks that it starts; MPI itself is not asked."""

from __future__ import annotations

import os

_RANKS = ("PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE", "SLURM_STEP_NUM_TASKS")
_RANK = ("PMI_RANK", "OMPI_COMM_WORLD_RANK", "MV2_COMM_WORLD_RANK", "SLURM_PROCID")


def launched_ranks() -> int:
    """How many ranks the launcher started, 1 without one.

    The launcher's own word counts, and Slurm's only without one: mpiexec inside Slurm starts its proxies as a step.
    """
    return next((count for count in map(_count, _RANKS) if count), 1)


def launched_rank() -> int:
    """This process's number among them."""
    named = (_RANK[k] for k, ranks in enumerate(_RANKS) if _count(ranks))
    return next((_count(name) for name in named), 0)


def _count(variable: str) -> int:
    """A number from the environment, 0 where there is none."""
    value = os.environ.get(variable, "")
    return int(value) if value.isdigit() else 0
