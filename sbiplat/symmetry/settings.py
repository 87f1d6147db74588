"""How a training uses the simulator's symmetry."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from sbiplat.settings import setting

GNPE, AUGMENT, NONE = "gnpe", "augment", "none"


@dataclass(frozen=True)
class SymmetrySettings:
    """What is made of the group that moves theta and x together."""

    symmetry: str = setting(NONE, "gnpe: x in its standard pose; augment: rows moved at random by an exact action; none",
                            among=(NONE, GNPE, AUGMENT))
    kernel_ratio: float = setting(0.5, "width of gnpe's kernel, in standard deviations of the pose that the initial net measures", low=0.01,
                                  high=100.0)
    kernel_kind: str = setting("auto", "width of the kernel. adaptive: by the initial net's spread at each x; fixed: the same for all x; "
                                       "auto: adaptive where spreads differ much, unless kernel_widths are given",
                             among=("auto", "adaptive", "fixed"))
    kernel_widths: Mapping[str, Any] | None = setting(None, "widths by coordinate, in its own unit, in place of kernel_ratio")
    proxy: str = setting("auto", "whether the net is told the proxy; dropped: not where the action is exact; auto: nor where, moreover, "
                                 "the prior is flat over the initial net's spread", among=("auto", "told", "dropped"))
    gibbs_steps: int = setting(100, "steps of the chains, at most: what has not converged then is refused", low=2, high=10000)
    initial: Mapping[str, Any] | None = setting(None, "settings of the initial net, of the pose, that differ from the main net's")
