"""`sp.attack`: an observation is perturbed so that its posterior moves most, for a user who wants to see how."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray

from sbiplat.bank.bank import Bank
from sbiplat.bank.layout import STATUS
from sbiplat.bank.segment import dataset_names
from sbiplat.diagnostics import adversarial
from sbiplat.diagnostics.adversarial import AttackSettings, Draws
from sbiplat.diagnostics.fragility import NOISES, Attacked, arrays, device_of
from sbiplat.diagnostics.targets import Target, target_of
from sbiplat.diagnostics.whitened import Ball, Limits, Whitening
from sbiplat.errors import PriorError, SettingError
from sbiplat.observation import Fields
from sbiplat.posteriors.base import Posterior
from sbiplat.posteriors.of_run import from_run
from sbiplat.runs import Run
from sbiplat.settings import build, whole_seed
from sbiplat.simulator import Simulator, resolve

Array = NDArray[np.float64]
ROWS, ROWS_BYTES = 10_000, 2**28
PREDICTIVE = 100  # simulations an observation


@dataclass(frozen=True)
class AttackResult:
    """x: the perturbed observations, as the posterior takes them. delta: by how much of a feature's robust sd, (B, F), in the order of
    `names`. eps: of each, (B,). kl: KL(q_x || q_x'), (B,); noise_kl: of noise of the size asked for. predictive: root mean square
    distance from x, in robust sds, of the mean simulation by the posterior at x and at x', (B, 2); None without a simulator."""

    x: Any
    delta: Array
    names: tuple[str, ...]
    eps: Array
    kl: Array
    noise_kl: Array
    predictive: Array | None


def attack(
    run: Run | Posterior | str | Path, x: Any, *, eps: float = 0.1, towards: ArrayLike | None = None, towards_x: Any = None,
    universal: bool = False, gradients: bool = True, low: Any = None, high: Any = None, features: Any = None, project: Any = None,
    rows: Any = None, simulator: Simulator | str | None = None, seed: int = 0, device: str = "cpu", **settings: Any,
) -> AttackResult:
    """Perturb x, one observation or a batch of B, by at most eps, so that its posterior moves most.

    run: a finished run, or a posterior with rows of x. eps: in whitened x, see docs/gate.md. towards: a theta (D,), or towards_x: an
    observation whose posterior is to be imitated. universal: one perturbation for all of x. gradients: false for the gradient-free search.
    low, high, features, project: limits, as in `Limits`. rows: of x (N, ...), for the features' scales; by default of the run's bank.
    settings: fields of `AttackSettings`. Raises SettingError, ObservationError, PriorError.
    """
    posterior = run if isinstance(run, Posterior) else from_run(_run(run), device)
    simulator = None if simulator is None else resolve(simulator)
    made, seed = build(AttackSettings, settings), whole_seed(seed)
    if isinstance(eps, bool) or not isinstance(eps, int | float) or not 0 < eps < 1e9:
        raise SettingError(f"eps must be above 0, a number of robust sds, got {eps!r}")
    target = target_of(posterior)
    if gradients and not target.gradients:
        raise SettingError("no gradient reaches x here; take gradients=False, which searches without")
    known = rows_of(run) if rows is None else posterior.x.batch(rows)[0]
    whitening = Whitening.fit(posterior.x, known, target.masks, features)
    fields, batched = posterior.x.batch(x)
    attacked = Attacked.of(posterior, target, whitening, fields, made, seed)
    ball = Ball(whitening, attacked.x, eps, made.norm, Limits(low, high, features, project))
    aim = _aim(posterior, target, made, towards, towards_x, len(next(iter(fields.values()))), seed)
    objective = attacked.objective(ball, made.objective, aim=aim, universal=universal)
    generator = torch.Generator(ball.free.device).manual_seed(seed)
    found = adversarial.pgd(objective, made, generator)[0] if gradients else adversarial.search(objective, made, generator)
    if universal:
        found = ball.project(found.expand(-1, len(ball.free), -1))
    with torch.no_grad():
        _, choose, score = attacked.shares
        if aim is None:
            heights = attacked.kl(ball, found, choose)
        else:
            heights = torch.stack([objective._forward(target.condition(ball.moved(d)), 0, aim.z.shape[1])[0] for d in found])
        if universal:
            delta = found[heights.mean(1).argmax()]
        else:
            delta = found[heights.argmax(0), torch.arange(found.shape[1], device=found.device)]
        noise = attacked.kl(ball, ball.random(NOISES, generator), score).mean(0)
        kl = attacked.kl(ball, delta[None], score)[0]
    moved = arrays(ball.moved(delta))
    predictive = None if simulator is None else np.stack(
        [_predictive(posterior, whitening, simulator, at, fields, seed) for at in (fields, moved)], axis=1)
    unwrapped = posterior.x.unwrap(moved if batched else {k: v[0] for k, v in moved.items()})
    return AttackResult(unwrapped, delta.cpu().numpy(), tuple(whitening.names), ball.size(delta).cpu().numpy(),
                        kl.double().cpu().numpy(), noise.double().cpu().numpy(), predictive)


def _run(run: Run | str | Path) -> Run:
    return (run if isinstance(run, Run) else Run.open(run)).require_finished()


def rows_of(run: Run | Posterior | str | Path) -> Fields:
    """Rows of x of the run's bank; raises SettingError where it holds none."""
    if isinstance(run, Posterior):
        raise SettingError("a posterior has no bank at hand: give rows=, some hundred x that were simulated, for the scale of each feature")
    bank: Bank = _run(run).bank(None)
    if bank.header.signals:
        raise SettingError("the bank holds signals, not observations: give rows=, some hundred x as observed, for the features' scales")
    good = np.flatnonzero(bank.status == STATUS["ok"])
    count = max(1000, min(ROWS, ROWS_BYTES // bank.header.x.row_bytes))
    data = bank.at(good[np.linspace(0, len(good) - 1, min(count, len(good))).astype(np.int64)])
    return {name: data[ds] for name, ds in dataset_names(bank.header).items()}


def _aim(
    posterior: Posterior, target: Target, settings: AttackSettings, towards: ArrayLike | None, towards_x: Any, count: int, seed: int,
) -> Draws | None:
    """What x' is to come close to, for `count` observations; None where it is only to leave x."""
    if towards is None and towards_x is None:
        return None
    if towards is not None and towards_x is not None:
        raise SettingError("give towards or towards_x, not both")
    if "forward" not in target.objectives or settings.objective not in ("auto", "forward"):
        raise SettingError("an attack towards something needs the density itself, objective = forward; npe, nle and nre have it")
    device = device_of(posterior)
    if towards is not None:
        if not target.normalised:
            raise SettingError("an attack towards a theta needs its density; give towards_x, an observation whose posterior lies there")
        theta = np.asarray(towards, float)
        if theta.shape != (posterior.prior.dim,) or not posterior.prior.contains(theta).all():
            raise PriorError("towards must be one theta in the prior's support: " + ", ".join(posterior.prior.names))
        z = torch.as_tensor(posterior.prior.unconstrain(theta), dtype=torch.float32, device=device).expand(count, 1, -1)
        return Draws(z, torch.zeros(count, 1, device=device), towards=True)
    other, batched = posterior.x.batch(towards_x)
    if batched:
        raise SettingError("towards_x must be one observation")
    of_it = Attacked.of(posterior, target, Whitening(posterior.x, {}, {}), other, settings, seed)
    return Draws(of_it.draws.z.expand(count, -1, -1), of_it.draws.log_q.expand(count, -1), towards=True)


def _predictive(posterior: Posterior, whitening: Whitening, simulator: Simulator, at: Fields, x: Fields, seed: int) -> Array:
    """Distance of the mean simulation of draws given `at` from x, (B,)."""
    theta = posterior.prior.constrain(posterior.unconstrained_sample(at, PREDICTIVE, seed))
    data = {k: torch.as_tensor(v) for k, v in x.items()}
    out = []
    for b, (own, centre) in enumerate(zip(theta, whitening.whiten(data), strict=True)):
        rngs: Sequence[Any] = [np.random.default_rng(np.random.SeedSequence(seed, spawn_key=(b, k))) for k in range(len(own))]
        simulated = simulator.rows(own, rngs[:1] if simulator.batched else rngs)
        stacked = {k: torch.as_tensor(np.stack([row[k] for row in simulated])) for k in whitening.spec.shapes}
        out.append(float((whitening.whiten(stacked).nanmean(0) - centre).square().mean().sqrt()))
    return np.array(out)
