r"""Rotated galaxy: the image of an elliptical disc with unknown position angle, centre, flux, radius and axis ratio.

An exponential disc (a Sérsic profile with n = 1) is seen through a Gaussian point-spread function, so that its image is known in Fourier
space and has next to nothing at the Nyquist frequency of the pixels. On the torus of 33 x 33 pixels

.. math:: s(p) = \frac{F}{33^2} \sum_k \big(1 + (k^T C k)\big)^{-3/2} \, e^{-b^2 |k|^2 / 2} \, e^{i k \cdot (p - c)}, \qquad
          C = r^2 R_a \begin{pmatrix} 1 & 0 \\ 0 & q^2 \end{pmatrix} R_a^T, \qquad x = s + \epsilon,

with white noise :math:`\epsilon`. Motions of the image plane, SE(2), act: g = (phi, t) sends a point p to :math:`R_\phi p + t`, the
centre c too, and the angle a to a + phi. An ellipse is its own image under a half turn, so a lies on a circle of circumference pi, and the
pose is known up to a half turn about its own centre. `Motion` holds to that: it is also an example of an action of one's own.

The posterior is explored in the prior's normal coordinates, the angle as it is, on the half turn around its best value.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from sbiplat.lazy import Lazy
from sbiplat.prior import LogNormal, Normal, Prior, Uniform, standard_normal_log_prob
from sbiplat.simulator import simulator
from sbiplat.symmetry import GroupAction
from simulators.reference import Mode, Reference, clear, finite, modes

if TYPE_CHECKING:
    import torch
    from torch import Tensor
else:
    torch = Lazy("torch")

PIXELS = 33  # odd: then shifts by Fourier transform are orthogonal
SEEING = 1.5  # b, standard deviation of the point-spread function in pixels, the pixel's own window included
NOISE = 1.0
MIDDLE = PIXELS // 2
BLOCK = 128  # images moved at once
KX = 2 * np.pi * np.fft.rfftfreq(PIXELS)  # columns
KY = 2 * np.pi * np.fft.fftfreq(PIXELS)[:, None]  # rows
_SEEN = np.exp(-0.5 * SEEING**2 * (KX**2 + KY**2))
_TWICE = np.where(KX > 0, 2.0, 1.0)  # k_x < 0 is left out of spectra of real images

prior = Prior({
    "angle": Uniform(0, np.pi, unit="rad"),
    "centre_x": Normal(0, 1.5, unit="px"),
    "centre_y": Normal(0, 1.5, unit="px"),
    "flux": LogNormal(np.log(600), 0.25),
    "radius": LogNormal(np.log(1.5), 0.2, unit="px"),
    "axis_ratio": Uniform(0.2, 0.8),
})
_others = Prior({name: marginal for name, marginal in zip(prior.names[1:], prior.law.marginals[1:], strict=True)})


def _disc(theta: np.ndarray) -> np.ndarray:
    """F (1 + k^T C k)^(-3/2) exp(-b^2 |k|^2 / 2), real, at the k_y and k_x >= 0, (N, 33, 17)."""
    angle, _, _, flux, radius, ratio = theta.T[:, :, None, None]
    along = radius * (np.cos(angle) * KX + np.sin(angle) * KY)
    across = radius * ratio * (np.cos(angle) * KY - np.sin(angle) * KX)
    power = 1 + along**2 + across**2
    return flux * _SEEN / (power * np.sqrt(power))


def _placed(theta: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """exp(-i k_y c_y), (N, 33), and exp(-i k_x c_x), (N, 17), of the centre from the corner of the grid."""
    return np.exp(-1j * KY[:, 0] * (theta[:, 2:3] + MIDDLE)), np.exp(-1j * KX * (theta[:, 1:2] + MIDDLE))


def image(theta: np.ndarray) -> np.ndarray:
    """s, (N, 33, 33): rows are y, columns are x, and the origin is the middle of the middle pixel."""
    in_y, in_x = _placed(theta)
    return np.fft.irfft2(_disc(theta) * in_y[:, :, None] * in_x[:, None], (PIXELS, PIXELS))


def log_likelihood(theta: np.ndarray, x: np.ndarray) -> np.ndarray:
    """log p(x | theta), (N,), summed over k by Parseval's theorem."""
    x = np.asarray(x, float)
    disc, (in_y, in_x) = _disc(theta), _placed(theta)
    overlap = np.einsum("nyx,nx,ny->n", disc * (_TWICE * np.fft.rfft2(x).conj()), in_x, in_y, optimize=True).real
    energy = np.einsum("nyx,nyx,x->n", disc, disc, _TWICE, optimize=True)
    squares = (x**2).sum() + (energy - 2 * overlap) / PIXELS**2
    return -0.5 * squares / NOISE**2 - PIXELS**2 * np.log(NOISE * np.sqrt(2 * np.pi))


# --------------------------------------------------------------------------------------------------------- the action


@dataclass(frozen=True)
class Motion(GroupAction):
    r"""SE(2) on images: elements (phi, t_x, t_y) in (rad, px, px), phi in (-pi, pi], with (phi, t)(psi, u) = (phi + psi, t + R_phi u).

    Images are turned by quarter turns and three shears (Paeth; Unser et al., 1995), each a shift of rows or columns by Fourier
    transform, which is orthogonal. So white noise stays white, and a signal of low frequencies far from the edge is turned as it should be.
    Not so the highest frequencies, which wrap around the edge of Fourier space: on noise T_g T_h is T_gh in law only. So the action
    is approximate.

    Poses are known up to a half turn, :math:`h = (\pi, 0)` from the right, and the kernel is the mean over both:
    :math:`K(\hat g | \theta) = \frac{1}{2} \sum_h N(\log((p h)^{-1} \hat g); 0, \kappa^2)`.
    """

    parameters: tuple[str, ...] = ("angle", "centre_x", "centre_y")
    exact: bool = False

    def compose(self, g: Tensor, h: Tensor) -> Tensor:
        return _element(g[:, 0] + h[:, 0], g[:, 1:] + _turn(g[:, 0], h[:, 1:]))

    def inverse(self, g: Tensor) -> Tensor:
        return _element(-g[:, 0], -_turn(-g[:, 0], g[:, 1:]))

    def exp(self, v: Tensor) -> Tensor:
        return _element(v[:, 0], v[:, 1:])

    def stabiliser(self) -> Tensor:
        return torch.tensor([[0.0, 0.0, 0.0], [math.pi, 0.0, 0.0]], dtype=torch.float64)

    def preimages(self, v: Tensor) -> Sequence[Tensor]:
        """v and what a whole turn makes of it: widths are of a radian at most."""
        return [torch.cat([v[:, :1] + 2 * math.pi * k, v[:, 1:]], -1) for k in (-1, 0, 1)]

    def pose_of(self, theta: Tensor) -> Tensor:
        return _element(theta[:, 0], theta[:, 1:])

    def act_theta(self, g: Tensor, theta: Tensor) -> tuple[Tensor, Tensor]:
        return self.unchart(self.compose(g, theta)), theta.new_zeros(len(theta))

    def chart(self, theta: Tensor) -> tuple[Tensor, Tensor]:
        """The angle in (-pi/2, pi/2]."""
        return torch.cat([_wrapped(theta[:, :1], math.pi), theta[:, 1:]], -1), theta.new_zeros(len(theta))

    def unchart(self, u: Tensor) -> Tensor:
        return torch.cat([u[:, :1].remainder(math.pi), u[:, 1:]], -1)

    def act_data(self, g: Tensor, x: dict[str, Tensor]) -> dict[str, Tensor]:
        return {**x, "x": moved(x["x"], g)}


def _wrapped(angle: Tensor, period: float) -> Tensor:
    """In (-period / 2, period / 2]."""
    return period / 2 - (period / 2 - angle).remainder(period)


def _element(angle: Tensor, shift: Tensor) -> Tensor:
    return torch.cat([_wrapped(angle, 2 * math.pi)[:, None], shift], -1)


def _turn(angle: Tensor, points: Tensor) -> Tensor:
    """R points (B, 2)."""
    c, s = angle.cos(), angle.sin()
    x, y = points.unbind(-1)
    return torch.stack([c * x - s * y, s * x + c * y], -1)


def moved(images: Tensor, g: Tensor) -> Tensor:
    """T_g of images (B, 33, 33), for g (B, 3): the same dtype; in blocks that fit in the cache."""
    return torch.cat([_moved(*block) for block in zip(images.split(BLOCK), g.to(images.device).split(BLOCK), strict=True)])


def _moved(images: Tensor, g: Tensor) -> Tensor:
    quarters = (g[:, 0] / (math.pi / 2)).round()
    rest = (g[:, 0] - quarters * (math.pi / 2)).to(images.dtype)
    which = quarters.long().remainder(4)[:, None, None]
    turned = images
    for k in (1, 2, 3):  # rot90 turns from columns to rows, x to y
        turned = torch.where(which == k, images.rot90(k, (-1, -2)), turned)
    lines = torch.arange(-MIDDLE, MIDDLE + 1, dtype=images.dtype, device=images.device)
    skew, shift = -(rest / 2).tan()[:, None] * lines, g[:, 1:].to(images.dtype)
    turned = _slide(turned, skew)
    turned = _slide(turned.mT, rest.sin()[:, None] * lines).mT
    turned = _slide(turned, skew + shift[:, :1])
    return _slide(turned.mT, shift[:, 1:].expand(-1, PIXELS)).mT


def _slide(rows: Tensor, by: Tensor) -> Tensor:
    """Each row (B, 33, 33) along itself by so many pixels (B, 33), on the circle."""
    step = torch.polar(torch.ones_like(by), -2 * math.pi / PIXELS * by)
    turns = torch.stack([torch.ones_like(step), step], -1)  # powers of step, by doubling: cheaper than as many cosines
    while turns.shape[-1] < PIXELS // 2 + 1:
        step = step * step
        turns = torch.cat([turns, turns * step[..., None]], -1)
    return torch.fft.irfft(torch.fft.rfft(rows) * turns[..., :PIXELS // 2 + 1], n=PIXELS)


# ------------------------------------------------------------------------------------------------- the reference posterior


def rough_fits(x: np.ndarray, most: int = 3) -> np.ndarray:
    """theta (most, 6): the best of sixteen angles with a middling shape, each at the centre where it correlates best with x."""
    shape = np.zeros((16, 6))
    shape[:, 0], shape[:, 3:] = np.arange(16) * np.pi / 16, (600, 1.5, 0.45)
    in_y, in_x = _placed(shape)
    here = _disc(shape) * in_y[:, :, None] * in_x[:, None]
    correlation = np.fft.irfft2(np.fft.rfft2(np.asarray(x, float)) * here.conj(), (PIXELS, PIXELS)).reshape(16, -1)
    peak = correlation.argmax(-1)
    for column, index in ((2, peak // PIXELS), (1, peak % PIXELS)):
        shape[:, column] = (index + MIDDLE) % PIXELS - MIDDLE
    return shape[np.argsort(-correlation.max(-1))[:most]]


def reference(x: np.ndarray, rng: np.random.Generator) -> Reference:
    """The exact posterior of (angle, z of the others): the density is over the angle itself, within a half turn around the best mode."""
    x = finite(x, "rotated_galaxy")

    def parameters(v: np.ndarray) -> np.ndarray:
        return np.concatenate([v[:, :1], _others.constrain(v[:, 1:])], -1)

    def residuals(v: np.ndarray) -> np.ndarray:
        return np.append((image(parameters(v[None]))[0] - x).ravel() / NOISE, v[1:])

    starts = rough_fits(x)
    starts = np.concatenate([starts[:, :1], _others.unconstrain(starts[:, 1:])], -1)
    best = clear(modes(residuals, starts), x, NOISE, "rotated_galaxy")
    middle = best[0].z[0]
    near = [Mode(np.append(middle + _nearest(m.z[0] - middle), m.z[1:]), m.covariance, m.log_density) for m in best]

    def log_density(v: np.ndarray) -> np.ndarray:
        value = log_likelihood(parameters(v), x) + standard_normal_log_prob(v[:, 1:]).sum(-1) - np.log(np.pi)
        return np.where(np.abs(v[:, 0] - middle) <= np.pi / 2, value, -np.inf)

    return Reference(log_density, near, rng, "rotated_galaxy")


def _nearest(angle: float) -> float:
    return angle - np.pi * np.round(angle / np.pi)


def posterior_sampler(x: np.ndarray, n: int, rng: np.random.Generator) -> np.ndarray:
    """n independent draws of theta (n, 6), exact as `reference.py` says."""
    v = reference(x, rng).sample(n, rng)
    return np.concatenate([v[:, :1] % np.pi, _others.constrain(v[:, 1:])], -1)


def posterior_log_prob(theta: np.ndarray, x: np.ndarray) -> np.ndarray:
    """log p(theta | x), (N,), its evidence by importance sampling to about 0.01; -inf outside the prior."""
    log_evidence = reference(x, np.random.default_rng(0)).log_evidence
    return np.where(prior.contains(theta), log_likelihood(theta, x) + prior.log_prob(theta) - log_evidence, -np.inf)


def noisy(image: Tensor, theta: Tensor, rng: torch.Generator) -> Tensor:
    """x of images s."""
    return image + NOISE * torch.randn(image.shape, generator=rng, dtype=image.dtype, device=image.device)


@simulator(
    prior=prior, observe=noisy, x_shape=(PIXELS, PIXELS), batched=True, symmetry=Motion(),
    log_likelihood=log_likelihood, posterior_log_prob=posterior_log_prob, posterior_sampler=posterior_sampler,
    citation="Freeman (1970), On the disks of spiral and S0 galaxies, ApJ 160; Dax et al. (2022), GNPE, ICLR",
)
def rotated_galaxy(theta: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    r"""The image of an inclined galaxy: motions of the plane act on it, all but exactly.

    An exponential disc through a Gaussian point-spread function of 1.5 px, with white noise of standard deviation 1 a pixel:

    .. math:: a \sim U(0, \pi), \quad c \sim N(0, 1.5^2 I) \text{ px}, \quad \log F \sim N(\log 600, 0.25^2), \quad
              \log r \sim N(\log 1.5, 0.2^2), \quad q \sim U(0.2, 0.8) .

    The bank holds the image s, and noise is drawn afresh in every epoch. theta: (B, 6); x: (B, 33, 33).
    """
    return image(theta)
