r"""Convolutional embeddings of signals (B, T), (B, C, T) and images (B, H, W), (B, C, H, W).

Each stage halves the resolution by a strided convolution; a residual net adds blocks (He et al., 2016), h + conv(act(conv(norm(h)))), which
are the identity at first. Only the blocks' inside is normalised, over channels: a norm on the main path would take away how
large x is, which is often what a parameter sets.

With circular padding and pooling to the mean, the context does not change when x is shifted around its axes. To have this for every shift,
and not only for multiples of the strides, convolutions are then dilated in place of strided (the à-trous algorithm): the full resolution's
cost in every stage.
"""

from __future__ import annotations

import math

from torch import Tensor, nn

from sbiplat.errors import SettingError
from sbiplat.nets.embeddings.dense import ACTIVATIONS, he, layers
from sbiplat.nets.embeddings.shape import Shape

CONVOLUTIONS = {1: nn.Conv1d, 2: nn.Conv2d}


class ChannelNorm(nn.Module):
    """Layer norm over the channels of (B, C, ...), at each place by itself."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(channels)

    def forward(self, h: Tensor) -> Tensor:
        return self.norm(h.movedim(1, -1)).movedim(-1, 1)


class ConvBlock(nn.Module):
    """h + conv(act(conv(norm(h)))), the identity at first."""

    def __init__(self, inner: nn.Module, outer: nn.Module, channels: int, activation: str) -> None:
        super().__init__()
        self.net = nn.Sequential(ChannelNorm(channels), inner, ACTIVATIONS[activation](), outer)
        nn.init.zeros_(outer.weight)
        nn.init.zeros_(outer.bias)

    def forward(self, h: Tensor) -> Tensor:
        return h + self.net(h)


class ConvNet(nn.Module):
    """Stages of convolutions over `dims` axes, pooled, then a multi-layer perceptron: (B, context). blocks: a stage, 0 for a plain net."""

    def __init__(self, size: tuple[int, ...], shape: Shape, dims: int, blocks: int) -> None:
        super().__init__()
        if shape.kernel % 2 == 0:
            raise SettingError(f"kernel = {shape.kernel}: take an odd number, such as {shape.kernel + 1}")
        self.dims, self.pooling = dims, shape.pooling
        self.shared_axes = tuple(range(len(size) - dims, len(size)))
        extent, channels = size[-dims:], 1 if len(size) == dims else size[0]
        self._shape, self._dense = shape, shape.padding == "circular" and shape.pooling == "mean"
        stages: list[nn.Module] = []
        for k, out in enumerate(shape.channels):
            stages += [self._convolution(channels, out, extent, 2**k, halves=True), ACTIVATIONS[shape.activation]()]
            extent = extent if self._dense else tuple(-(-n // 2) for n in extent)
            stages += [ConvBlock(*(self._convolution(out, out, extent, 2 ** (k + 1)) for _ in range(2)), out, shape.activation)
                       for _ in range(blocks)]
            channels = out
        self.stages = nn.Sequential(*stages)
        places = math.prod(extent) if self.pooling == "flatten" else 1
        self.head = he(layers(channels * places, shape.hidden, shape.context, shape.activation))

    def _convolution(self, channels: int, out: int, extent: tuple[int, ...], reach: int, halves: bool = False) -> nn.Module:
        """A convolution that halves the resolution or keeps it; `reach` is its dilation where the net is not strided."""
        shape = self._shape
        dilation = reach if self._dense else 1
        padding = dilation * (shape.kernel // 2)
        if shape.padding == "circular" and padding > min(extent):
            raise SettingError(f"circular padding of {padding} is more than x's {min(extent)} places there: take fewer channels (stages), "
                               "or a smaller kernel")
        made = CONVOLUTIONS[self.dims](channels, out, shape.kernel, stride=2 if halves and not self._dense else 1, padding=padding,
                                       dilation=dilation, padding_mode=shape.padding)
        nn.init.kaiming_normal_(made.weight, nonlinearity="relu")
        nn.init.zeros_(made.bias)
        return made

    def forward(self, x: Tensor) -> Tensor:
        h = self.stages(x.reshape(len(x), -1, *x.shape[-self.dims:]))
        return self.head(h.flatten(1) if self.pooling == "flatten" else h.flatten(2).mean(2))
