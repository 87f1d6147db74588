r"""The inverse of a masked autoregressive transform at the cost of one forward pass.

Inverting :math:`y_i = f(x_i; \phi_i(x_{<i}, c))` takes x one coordinate after the other. The plain way evaluates the whole
masked net once for each. But a masked unit depends on the coordinates up to its level and on no later one, so each
unit can be evaluated once, when the coordinates of its level are known: all steps together then cost one pass, and only the
coordinate in turn goes through its univariate inverse. Units of level 0 depend on the context alone: they, what they add to later
layers, and the parameters of the first coordinate are computed once for all draws of an observation.

Units and coordinates are rows, in the order of their levels, and draws are columns: a step reads and writes contiguous memory.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from zuko.utils import unpack


class Layer:
    """A masked layer with its units, and those that it reads, in the order of levels; `known[s]` units are known at step s.

    total = inner w v + (outer w v_0 + bias), with v_0 (., B) what is the same for all draws of an observation, and v (., B, n) the rest.
    """

    def __init__(self, weight: Tensor, bias: Tensor, outer: int, level: Tensor, steps: int) -> None:
        self.outer, self.inner, self.bias = weight[:, :outer], weight[:, outer:].contiguous(), bias[:, None]
        self.known = _counts(level, steps)

    def constant(self, values: Tensor) -> Tensor:
        """(units, B), from values (outer, B)."""
        return torch.addmm(self.bias, self.outer, values)

    def total(self, step: int, values: Tensor, constant: Tensor) -> Tensor:
        """Of this step's units, (., B, n), from the values (., B, n) that are known."""
        low, high = self.known[step], self.known[step + 1]
        out = (self.inner[low:high, :len(values)] @ values.flatten(1)).view(-1, *values.shape[1:])
        return out.add_(constant[low:high, :, None])


class MaskedInverse:
    """x with transform(c)(x) = y, for a zuko `MaskedAutoregressiveTransform` whose weights stay as they are meanwhile."""

    def __init__(self, transform: nn.Module) -> None:
        self.transform = transform
        linear = list(transform.hyper)
        self.activations = linear[1::2]
        order, dim, each = transform.order, len(transform.order), transform.total
        self.steps = int(order.max()) + 1
        self.coordinates = torch.argsort(order, stable=True)
        self.known = _counts(order[self.coordinates], self.steps)
        self.layers: list[Layer] = []
        # What a layer reads: of the context (level 0) and the coordinates, each of which serves the step after its own.
        level = torch.cat([order.new_zeros(linear[0].in_features - dim), order[self.coordinates] + 1])
        columns = torch.cat([torch.arange(dim, linear[0].in_features, device=order.device), self.coordinates])
        for depth, layer in enumerate(linear[0::2]):
            if depth < len(self.activations):
                needs = torch.where(layer.mask[:, columns], level, 0).amax(1)
                rows = torch.argsort(needs, stable=True)
            else:  # a step's parameters by kind, so that each is contiguous over its coordinates
                needs = order.repeat_interleave(each)
                kind = torch.arange(each, device=order.device).repeat(dim)
                rows = torch.argsort(needs * each + kind, stable=True)
            weight = (layer.mask * layer.weight)[rows][:, columns]
            self.layers.append(Layer(weight, layer.bias[rows], int((level == 0).sum()), needs[rows], self.steps))
            level, columns = needs[rows], rows

    def __call__(self, y: Tensor, context: Tensor) -> Tensor:
        """y (D, B, n) and one context an observation, (B, C): x (D, B, n)."""
        y = y[self.coordinates]
        x = torch.empty_like(y)
        *hidden, last = self.layers
        constants, same = [], context.T
        for layer, activation in zip(hidden, self.activations, strict=True):
            constants.append(layer.constant(same))
            same = activation(constants[-1][:layer.known[1]])
        constants.append(last.constant(same))
        values = [y.new_empty(layer.known[-1] - layer.known[1], *y.shape[1:]) for layer in hidden]
        for step in range(self.steps):
            if step:
                reached = x[:self.known[step]]
                for layer, activation, own, constant in zip(hidden, self.activations, values, constants, strict=False):
                    first, low, high = layer.known[1], layer.known[step], layer.known[step + 1]
                    if high > low:
                        own[low - first:high - first] = activation(layer.total(step, reached, constant))
                    reached = own[:high - first]
                phi = last.total(step, reached, constants[-1])
            else:
                phi = constants[-1][:last.known[1], :, None]
            now = slice(self.known[step], self.known[step + 1])
            phi = phi.unflatten(0, (self.transform.total, -1)).movedim(0, -1)
            x[now] = self.transform.univariate(*unpack(phi, self.transform.shapes)).inv(y[now])
        return x[torch.argsort(self.coordinates)]


def _counts(level: Tensor, steps: int) -> list[int]:
    """How many of the sorted levels are below 0, 1, ..., steps."""
    return torch.searchsorted(level, torch.arange(steps + 1, device=level.device)).tolist()
