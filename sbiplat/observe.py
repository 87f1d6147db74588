r"""Observation apart from simulation: an expensive signal, made once, and the cheap noise that is drawn afresh every epoch.

    def detector(signal, theta, rng):      # torch: signal (B, ...), theta (B, D) in the user's units, rng: torch.Generator
        return signal + 0.1 * torch.randn(signal.shape, generator=rng, device=signal.device)

    @sp.simulator(prior=..., x_shape=(200,), observe=detector)
    def wave(theta, rng):                  # the signal, (200,): this is what a bank stores
        ...

The bank holds signals s; training draws :math:`x \sim p(x | s, \theta)` for every row of every epoch, on the training device, from
a generator that is fixed by the run's seed and the step. So noise is never learnt by heart, and the noise model can be
changed without simulating again. The validation rows and the gate's held-out pairs have one draw each, fixed by the seed.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from sbiplat.errors import SimulatorError
from sbiplat.observation import Fields, ObservationSpec

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Observe:
    """A user's `observe(signal, theta, rng) -> x`, held to the declared shapes. name: of the simulator, for messages."""

    function: Callable[..., Any]
    name: str
    signal: ObservationSpec
    x: ObservationSpec

    def __call__(self, signal: dict[str, Tensor], theta: Tensor, seed: int) -> dict[str, Tensor]:
        """x by name, (B, ...), of signals (B, ...) and theta (B, D), all on one device; the same seed gives the same x.

        Raises SimulatorError where it fails, or x is not as declared, or not finite.
        """
        import torch

        generator = torch.Generator(theta.device).manual_seed(seed)
        given = {k: v.clone() for k, v in signal.items()}
        try:
            with torch.no_grad():
                made = self.function(given["x"] if self.signal.plain else given, theta, generator)
        except Exception as error:  # the user's own code: anything may come
            raise SimulatorError(f"simulator {self.name!r}: observe failed: {type(error).__name__}: {error}".split("\n")[0]) from error
        found = {"x": made} if self.x.plain else made
        if not isinstance(found, dict) or set(found) != set(self.x.shapes) or not all(isinstance(v, torch.Tensor) for v in found.values()):
            what = "a tensor" if self.x.plain else f"a dict of tensors with {', '.join(self.x.shapes)}"
            raise SimulatorError(f"simulator {self.name!r}: observe must return {what}")
        out = {}
        for name, shape in self.x.shapes.items():
            value = found[name]
            if tuple(value.shape) != (len(theta), *shape):
                raise SimulatorError(f"simulator {self.name!r}: observe gave {name} of shape {tuple(value.shape)}, declared is "
                                     f"{(len(theta), *shape)}")
            if not torch.isfinite(value).all():
                raise SimulatorError(f"simulator {self.name!r}: observe gave NaN or infinite {name}; mask with a number instead")
            out[name] = value.detach().to(getattr(torch, self.x.dtype))
        return out

    def on_arrays(self, signal: Fields, theta: NDArray[np.float64], seed: int) -> Fields:
        """The same for numpy arrays."""
        import torch

        tensors = {k: torch.as_tensor(np.array(v)) for k, v in signal.items()}
        made = self(tensors, torch.as_tensor(np.array(theta), dtype=getattr(torch, self.x.dtype)), seed)
        return {k: v.numpy() for k, v in made.items()}


def check_observe(observe: Observe, signal: Fields, theta: NDArray[np.float64]) -> None:
    """Hold observe against its contract on a few signals; raises SimulatorError at the first breach."""
    import torch

    before = torch.get_rng_state()
    first, again, other = (observe.on_arrays(signal, theta, seed) for seed in (1, 1, 2))
    if not all(np.array_equal(first[k], again[k]) for k in first):
        raise SimulatorError(f"simulator {observe.name!r}: observe gives another x for the same generator; draw all randomness from it")
    if not torch.equal(before, torch.get_rng_state()) or all(np.array_equal(first[k], other[k]) for k in first):
        raise SimulatorError(f"simulator {observe.name!r}: observe draws nothing from its rng; pass generator=rng to torch's functions, or "
                             "leave observe away where there is no noise")
