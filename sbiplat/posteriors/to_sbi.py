"""A posterior of ours as sbi's `NeuralPosterior`, so that sbi's analysis and diagnostics work on it: `run.to_sbi()`.

theta is a float32 tensor in the user's own space, x a tensor. Draws take their seed from torch's global generator, of which they use one
number and which they leave alone otherwise: so `torch.manual_seed` fixes them, as it does sbi's own.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from sbi.inference.posteriors.base_posterior import NeuralPosterior
from sbi.inference.potentials.base_potential import BasePotential
from scipy.optimize import minimize
from torch import Tensor
from torch.distributions import Distribution, constraints

from sbiplat.errors import ObservationError, PriorError, SettingError
from sbiplat.observation import ObservationSpec
from sbiplat.posteriors.base import Array, Posterior
from sbiplat.prior import Prior

STEP = 1e-3  # in z, of central differences


class SbiPrior(Distribution):
    """A prior of ours as a torch distribution of vectors (D,), in float32."""

    arg_constraints: dict[str, Any] = {}

    def __init__(self, prior: Prior) -> None:
        self.prior = prior
        super().__init__(event_shape=torch.Size([prior.dim]), validate_args=False)

    @property
    def support(self) -> Any:
        """The box that the prior lives on."""
        sides = [_side(float(low), float(high)) for low, high in zip(*self.prior.support, strict=True)]
        return constraints.independent(constraints.cat(sides, dim=-1, lengths=[1] * len(sides)), 1)

    def sample(self, sample_shape: Any = ()) -> Tensor:
        """(*sample_shape, D)."""
        shape = torch.Size(sample_shape)
        drawn = self.prior.sample(np.random.default_rng(_global_seed()), max(1, shape.numel()))
        return _single(drawn[:shape.numel()], self.prior).reshape(*shape, self.prior.dim)

    def log_prob(self, value: Tensor) -> Tensor:
        """log p(theta), -inf outside the support."""
        return torch.as_tensor(self.prior.log_prob(_numpy(value)), dtype=torch.float32)


def _side(low: float, high: float) -> Any:
    if np.isfinite(low) and np.isfinite(high):
        return constraints.interval(low, high)
    if np.isfinite(low):
        return constraints.greater_than_eq(low)
    return constraints.less_than(high) if np.isfinite(high) else constraints.real


class _Potential(BasePotential):
    """log q(theta | x), without gradients."""

    def __init__(self, posterior: SbiPosterior, prior: SbiPrior) -> None:
        self._posterior = posterior
        super().__init__(prior)

    def __call__(self, theta: Tensor, track_gradients: bool = False) -> Tensor:
        if theta.requires_grad:
            raise SettingError("a posterior from run.to_sbi() has no gradients with respect to theta: use its draws and log_prob")
        return self._posterior.log_prob(theta, self.x_o)


class SbiPosterior(NeuralPosterior):
    """The posterior of a run behind sbi's interface. Its density is normalised, and no draw leaves the prior's support."""

    def __init__(self, posterior: Posterior) -> None:
        self.posterior, self.prior = posterior, SbiPrior(posterior.changed_prior or posterior.prior)
        super().__init__(_Potential(self, self.prior))
        self._purpose = "Trained and gated by sbiplat."

    def set_default_x(self, x: Any) -> SbiPosterior:
        """The observation that `sample`, `log_prob` and `map` use where they are given none; returns itself."""
        self._x, self._map = self._one(x), None
        return self

    def sample(
        self, sample_shape: Any = (), x: Any = None, show_progress_bars: bool = False, max_sampling_batch_size: int | None = None,
    ) -> Tensor:
        """Draws given one x, (*sample_shape, D). max_sampling_batch_size is sbi's; passes are bounded here without it."""
        shape = torch.Size(sample_shape)
        drawn = self.posterior.sample(self._one(self._x_else_default_x(x))[0].numpy(), max(1, shape.numel()), seed=_global_seed())
        return _single(drawn[:shape.numel()], self.posterior.prior).reshape(*shape, self.posterior.prior.dim)

    def sample_batched(
        self, sample_shape: Any, x: Any, show_progress_bars: bool = False, max_sampling_batch_size: int | None = None,
    ) -> Tensor:
        """Draws given each of B observations, (*sample_shape, B, D)."""
        shape, batch = torch.Size(sample_shape), self._batch(x)
        drawn = self.posterior.sample(batch.numpy(), max(1, shape.numel()), seed=_global_seed())[:, :shape.numel()]
        return _single(drawn, self.posterior.prior).transpose(0, 1).reshape(*shape, len(batch), self.posterior.prior.dim)

    def log_prob(self, theta: Any, x: Any = None, norm_posterior: bool = True, track_gradients: bool = False) -> Tensor:
        """log q(theta | x) of theta (N, D) or (D,), given one x: (N,). It is normalised whatever norm_posterior says, without gradients."""
        _no_gradients(track_gradients)
        values = np.atleast_2d(_numpy(theta))
        return torch.as_tensor(self.posterior.log_prob(values, self._one(self._x_else_default_x(x))[0].numpy()), dtype=torch.float32)

    def log_prob_batched(self, theta: Any, x: Any, norm_posterior: bool = True, track_gradients: bool = False) -> Tensor:
        """log q(theta_b | x_b) of theta (*sample_shape, B, D) given B observations: (*sample_shape, B)."""
        _no_gradients(track_gradients)
        values, batch = _numpy(theta), self._batch(x)
        if values.ndim < 2 or values.shape[-2:] != (len(batch), self.posterior.prior.dim):
            raise PriorError(f"theta has shape {values.shape}; its last axes must be ({len(batch)}, {self.posterior.prior.dim})")
        flat = values.reshape(-1, *values.shape[-2:]).swapaxes(0, 1)
        found = self.posterior.log_prob(flat, batch.numpy()).T.reshape(values.shape[:-1])
        return torch.as_tensor(found, dtype=torch.float32)

    def potential(self, theta: Any, x: Any = None, track_gradients: bool = False) -> Tensor:
        """The same as `log_prob`: this posterior is normalised."""
        return self.log_prob(theta, x, track_gradients=track_gradients)

    def map(
        self, x: Any = None, num_iter: int = 200, num_to_optimize: int = 5, num_init_samples: int = 1000, force_update: bool = False,
        show_progress_bars: bool = False,
    ) -> Tensor:
        """The theta of the highest density given the default x, (1, D): BFGS over z from the best of some draws, within the box of all.

        Beyond the draws a net's density over theta may grow without bound towards an edge of the prior.

        num_iter: of each of num_to_optimize descents. Unlike sbi's there is no learning rate, and the parameters' scales do not matter.
        """
        if x is not None:
            self.set_default_x(x)
        if self._map is None or force_update:
            self._map = self._highest(self._one(self._x_else_default_x(None))[0].numpy(), num_iter, num_to_optimize, num_init_samples)
        return self._map

    def _highest(self, x: Any, num_iter: int, starts: int, draws: int) -> Tensor:
        prior = self.posterior.prior
        theta = self.posterior.sample(x, draws, seed=_global_seed())
        z = prior.unconstrain(theta)
        best = z[np.argsort(-self.posterior.log_prob(theta, x))[:starts]]
        around = np.concatenate([np.zeros((1, prior.dim)), STEP * np.eye(prior.dim), -STEP * np.eye(prior.dim)])

        def falling(z: Any) -> tuple[float, Any]:
            values = -self.posterior.log_prob(prior.constrain(z + around), x)
            values = np.where(np.isfinite(values), values, 1e10)
            return float(values[0]), (values[1:prior.dim + 1] - values[prior.dim + 1:]) / (2 * STEP)

        box = list(zip(z.min(0), z.max(0), strict=True))
        found = [minimize(falling, start, jac=True, method="L-BFGS-B", bounds=box, options={"maxiter": num_iter}) for start in best]
        return _single(prior.constrain(min(found, key=lambda f: f.fun).x)[None], prior)

    def _x_else_default_x(self, x: Any) -> Any:
        if x is None and self.default_x is None:
            raise ObservationError("an observation x is needed: give x=..., or set_default_x(x) first")
        return self.default_x if x is None else x

    def _one(self, x: Any) -> Tensor:
        """One observation, (1, ...)."""
        batch = self._batch(x)
        if len(batch) != 1:
            raise ObservationError(f"{len(batch)} observations were given, one is expected; use sample_batched or log_prob_batched")
        return batch

    def _batch(self, x: Any) -> Tensor:
        """Observations (B, ...) of x with or without a leading axis, in the bank's dtype; sbi adds axes of its own to a scalar x."""
        spec: ObservationSpec = self.posterior.x
        shape, dtype = spec.shapes["x"], getattr(torch, spec.dtype)
        values = torch.as_tensor(x).detach().cpu().to(dtype)
        trailing = tuple(values.shape[values.ndim - len(shape):]) if values.ndim >= len(shape) else None
        if trailing != shape or values.ndim > len(shape) + 1 + (not shape):
            raise ObservationError(f"x has shape {tuple(values.shape)}; expected {shape}, or the same with a leading axis for a batch")
        return values.reshape(-1, *shape)


def to_sbi(posterior: Posterior) -> SbiPosterior:
    """See `Posterior.to_sbi`."""
    if not posterior.x.plain:
        raise SettingError(f"x is a dict ({', '.join(posterior.x.shapes)}), and sbi's tools take one tensor: simulate one array")
    return SbiPosterior(posterior)


def _single(theta: Array, prior: Prior) -> Tensor:
    """theta in float32, rounded to the inside of the prior's support."""
    low, high = (v.astype(np.float32) for v in prior.support)
    low = np.where(low < prior.support[0], np.nextafter(low, np.float32(np.inf)), low)
    high = np.where(high > prior.support[1], np.nextafter(high, np.float32(-np.inf)), high)
    return torch.as_tensor(np.clip(theta.astype(np.float32), low, high))


def _numpy(theta: Any) -> Array:
    return torch.as_tensor(theta).detach().cpu().double().numpy()


def _no_gradients(wanted: bool) -> None:
    if wanted:
        raise SettingError("a posterior from run.to_sbi() has no gradients with respect to theta: leave out track_gradients")


def _global_seed() -> int:
    """A seed from torch's global generator: one number of it is used up."""
    return int(torch.randint(2**62, ()))
