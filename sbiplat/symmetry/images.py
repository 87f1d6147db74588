"""Images under motions of the plane, by interpolation.

A pixel's place is counted from the image's centre, in pixels: X along the last axis, Y along the one before; angles go from X to Y.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from sbiplat.errors import SymmetryError
from sbiplat.lazy import Lazy

if TYPE_CHECKING:
    import torch
    from torch import Tensor
else:
    torch = Lazy("torch")

MODES = ("bilinear", "bicubic")
PADDINGS = ("zeros", "border", "reflection")


def check_sampling(mode: str, padding: str) -> None:
    """Raises SymmetryError for what `warped` does not know."""
    for what, value, among in (("mode", mode, MODES), ("padding", padding, PADDINGS)):
        if value not in among:
            raise SymmetryError(f"{what} = {value!r}: expected one of {', '.join(among)}")


def warped(x: Tensor, angle: Tensor, offset: Tensor, mode: str, padding: str) -> Tensor:
    """Images x (B, ..., H, W), each turned by angle (B,) about its centre and then moved by offset (B, 2) pixels (X, Y)."""
    count, height, width = len(x), *x.shape[-2:]
    y, x_ = torch.meshgrid(_centred(height, angle), _centred(width, angle), indexing="ij")
    a, b = x_ - offset[:, 0, None, None], y - offset[:, 1, None, None]
    cosine, sine = angle.cos()[:, None, None], angle.sin()[:, None, None]
    source = torch.stack([(cosine * a + sine * b) * (2 / width), (cosine * b - sine * a) * (2 / height)], -1)
    flat = x.reshape(count, -1, height, width)
    return torch.nn.functional.grid_sample(flat, source.to(x), mode, padding, align_corners=False).reshape(x.shape)


def _centred(length: int, like: Tensor) -> Tensor:
    return torch.arange(length, dtype=like.dtype, device=like.device) - (length - 1) / 2
