r"""Classifier two-sample tests of the joint law of (theta, x): truths against draws, over all x (C2ST) and at one observation (L-C2ST).

Both learn the ratio of the true posterior to q by least squares (uLSIF; Kanamori et al., 2009),

.. math:: \frac{p(\theta | x)}{q(\theta | x)} \approx r = 1 + w \cdot \tilde\phi, \qquad
          w = (\Sigma + \lambda I)^{-1} \frac1P \sum_i \tilde\phi(\theta^*_i, x_i),

where :math:`\tilde\phi` are features of (theta, x) less their mean over truth and draws of the same pair, and :math:`\Sigma` is their
covariance. The classifier is d = r / (1 + r). :math:`\lambda` is chosen by cross-validation of the least-squares score. No net is
trained, so the same data and seed give the same answer, and a refit under another labelling is a product of matrices.

**C2ST.** w is learnt on one half of the pairs; on the other the rank of the truth's score among its draws' is uniform if q is the
posterior, whatever w, so the test of the mean rank, the area under the ROC curve, has its level. Both halves are tested, and Bonferroni
joins them.

**L-C2ST** (Linhart et al., 2023). At an observation x_o the statistic is the mean of (d - 1/2)^2 over draws of q(theta | x_o). Under the
hypothesis truth and draws of a pair are exchangeable, so its null is refitted with another member of each pair in the truth's place.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import special

from sbiplat.diagnostics.coverage import ranks
from sbiplat.diagnostics.examined import Examined
from sbiplat.diagnostics.references import Features, References
from sbiplat.observation import Fields

Array = NDArray[np.float64]
PENALTIES = (1e-3, 1e-2, 1e-1, 1.0, 10.0)
FOLDS = 5
FITTED_DRAWS, TESTED_DRAWS = 20, 50
MOST_PARAMETERS, MOST_AXES, UNITS = 20, 10, 200
ROWS, MOST_NUMBERS = 2**15, 2**25


@dataclass(frozen=True)
class JointC2ST:
    """area: under the ROC curve of truths against draws, mean of the halves, 0.5 where none can tell; error: its standard error."""

    p_value: float
    area: float
    error: float


@dataclass(frozen=True)
class LocalC2ST:
    """At one observation: p_value; statistic: mean of (d - 1/2)^2; null: of as many refits, (N,). theta: the draws, (n, D), in the user's
    space; probability: d of each, above 1/2 where the posterior gives too little (n,)."""

    p_value: float
    statistic: float
    null: Array
    theta: Array
    probability: Array
    pairs: int


class Map:
    """Features of (z, x): residuals e of z from its regression on x, whitened; their products, products with x, and random tanh units."""

    def __init__(self, references: References, dim: int, axes: int, rng: np.random.Generator) -> None:
        self._references = references
        self._turn = np.linalg.qr(rng.standard_normal((dim, dim)))[0][:, :MOST_PARAMETERS] if dim > MOST_PARAMETERS else np.eye(dim)
        self._across = rng.standard_normal((axes, MOST_AXES)) / np.sqrt(axes) if axes > MOST_AXES else np.eye(axes)
        size = self._turn.shape[1]
        self._inner = np.concatenate([rng.standard_normal((size, UNITS)) / np.sqrt(size),
                                      rng.standard_normal((self._across.shape[1], UNITS)) / np.sqrt(self._across.shape[1])])
        self._inner *= np.where(np.arange(UNITS) % 2, 1.0, 2.5)
        self._inner, self._shift = self._inner.astype(np.float32), rng.uniform(-2, 2, UNITS).astype(np.float32)

    def __call__(self, z: Array, features: Array) -> Array:
        """z (P, M, D), features (P, F): (P, M, size), float32."""
        e = (z - self._references.estimate(features)[:, None]) @ self._references.whiten @ self._turn
        e, f = np.clip(e, -8, 8).astype(np.float32), np.clip(features @ self._across, -4, 4).astype(np.float32)
        spread = np.broadcast_to(f[:, None], (*e.shape[:2], f.shape[1]))
        upper = np.triu_indices(e.shape[-1])
        with_x = e[..., :, None] * spread[..., None, :]
        squares_with_x = np.square(e)[..., :, None] * spread[..., None, :]
        units = np.tanh(np.concatenate([e, spread], axis=-1) @ self._inner + self._shift)
        return np.concatenate([e, e[..., upper[0]] * e[..., upper[1]], with_x.reshape(*e.shape[:2], -1),
                               squares_with_x.reshape(*e.shape[:2], -1), units], axis=-1)


class Ratio:
    """The least-squares ratio of truths to draws on pairs of them: members (P, M, size), of which one of each pair is called the truth."""

    def __init__(self, members: Array) -> None:
        centred = members - members.mean(1, keepdims=True)
        self.scale = np.maximum(np.sqrt(np.square(centred).mean((0, 1), dtype=float)), 1e-9)
        flat = (centred / self.scale.astype(np.float32)).reshape(-1, members.shape[-1])
        self._values, self._vectors = np.linalg.eigh((flat.T @ flat / len(flat)).astype(float))
        self._values = np.maximum(self._values, 0)
        self._members = (flat @ self._vectors.astype(np.float32)).reshape(members.shape)
        self._fold = np.arange(len(members)) % FOLDS

    def weights(self, truths: NDArray[np.integer]) -> Array:
        """w for each labelling, truths (B, P), the member that is called the truth: (B, size), over features as they were given."""
        rows = np.arange(len(self._members))
        means = np.empty((FOLDS, len(truths), self._members.shape[-1]))
        for k in range(FOLDS):
            mine = rows[self._fold == k]
            for b, chosen in enumerate(truths):
                means[k, b] = self._members[mine, chosen[mine]].mean(0, dtype=float)
        share = np.bincount(self._fold, minlength=FOLDS)[:, None, None] / len(rows)
        whole = (share * means).sum(0)
        others = (whole - share * means) / (1 - share)
        scores = []
        for penalty in PENALTIES:
            w = others / (self._values + penalty)
            scores.append((0.5 * np.square(w) * self._values - w * means).sum((0, 2)))
        penalty = np.array(PENALTIES)[np.argmin(scores, axis=0)]
        return whole / (self._values + penalty[:, None]) @ self._vectors.T / self.scale


def joint_c2st(truth: Array, draws: Array, features: Array, mapping: Map, rng: np.random.Generator) -> JointC2ST:
    """Truths (P, D) against draws (P, M, D) given features of x (P, F)."""
    half, draws = rng.permutation(len(truth)), draws[:, :TESTED_DRAWS]
    few = _fitted_draws(mapping, truth, features)
    halves = half[::2], half[1::2]
    areas, p_values, errors = [], [], []
    for fitted, tested in (halves, halves[::-1]):
        ratio = Ratio(mapping(np.concatenate([truth[fitted, None], draws[fitted, :few]], axis=1), features[fitted]))
        w = ratio.weights(np.zeros((1, len(fitted)), int))[0]
        u = np.empty(len(tested))
        step = max(1, ROWS // (draws.shape[1] + 1))
        for a in range(0, len(tested), step):
            rows = tested[a:a + step]
            score = mapping(np.concatenate([truth[rows, None], draws[rows]], axis=1), features[rows]) @ w
            u[a:a + step] = ranks(score[:, 1:], score[:, 0], rng)
        areas.append(u.mean())
        errors.append(u.std() / np.sqrt(len(u)))
        p_values.append(float(special.ndtr(-(u.mean() - 0.5) * np.sqrt(12 * len(u)))))
    return JointC2ST(min(1.0, 2 * min(p_values)), float(np.mean(areas)), float(np.hypot(*errors) / 2))


def local_c2st(examined: Examined, x: Fields, draws: int = 1000, nulls: int = 500) -> LocalC2ST:
    """L-C2ST at one observation, x with a leading axis of 1: by all held-out pairs with a few draws each, and so many draws at x."""
    posterior, truth = examined.posterior, examined.truth
    fitting, mapping, labels, *seeds = examined.stream(0x1C2).spawn(5)
    fit = np.random.default_rng(fitting)
    features = Features(posterior.x, examined.training["x"], fit)
    references = References.fit(features(examined.training["x"]), np.asarray(examined.training["theta"], float), fit)
    here, there = features(examined.pairs["x"]), features(x)
    make = Map(references, truth.shape[1], here.shape[1], np.random.default_rng(mapping))
    few = _fitted_draws(make, truth, here)
    pair_seed, own_seed = (int(s.generate_state(1)[0]) for s in seeds)
    own = posterior.unconstrained_sample(examined.pairs["x"], few, pair_seed)
    z = posterior.unconstrained_sample(x, draws, own_seed)
    ratio = Ratio(make(np.concatenate([truth[:, None], own], axis=1), here))
    chosen = np.random.default_rng(labels).integers(few + 1, size=(nulls + 1, len(truth)))
    chosen[0] = 0
    features_there = make(z, there)[0]
    r = np.maximum(1 + (features_there - features_there.mean(0)) @ ratio.weights(chosen).T, 0)
    probability = r / (1 + r)
    statistics = np.square(probability - 0.5).mean(0)
    p_value = (1 + int((statistics[1:] >= statistics[0]).sum())) / (nulls + 1)
    return LocalC2ST(p_value, float(statistics[0]), statistics[1:], posterior.prior.constrain(z[0]), probability[:, 0], len(truth))


def _fitted_draws(mapping: Map, truth: Array, features: Array) -> int:
    """Draws a pair to learn from: as many as fit the memory."""
    size = mapping(truth[:1, None], features[:1]).shape[-1]
    return int(np.clip(MOST_NUMBERS // (len(truth) * size), 4, FITTED_DRAWS))
