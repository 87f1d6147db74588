r"""The inverse of a masked autoregressive transform at the cost of one forward pass.

Inverting :math:`y_i = f(x_i; \phi_i(x_{<i}, c))` takes x one coordinate after the other. The plain way evaluates the whole
masked net once for each. But a masked unit depends on the coordinates up to its level and on no later one, so each
unit can be evaluated once, when the coordinates of its level are known: all steps together then cost one pass, the
context's share of the first layer is computed once for all draws of an observation, and only the coordinate in turn
goes through its univariate inverse. Units are kept in the order of their levels, so that a step reads and writes
contiguous columns.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import linear
from zuko.utils import unpack


class MaskedInverse:
    """x with transform(c)(x) = y, for a zuko `MaskedAutoregressiveTransform` whose weights stay as they are meanwhile."""

    def __init__(self, transform: nn.Module) -> None:
        self.transform = transform
        layers = list(transform.hyper)
        self.activations = layers[1::2]
        order, dim = transform.order, len(transform.order)
        self.count = int(order.max()) + 1
        # The coordinates, and then each layer's units, by the step at which they are known.
        self.coordinates = torch.argsort(order, stable=True)
        self.known = [torch.searchsorted(order[self.coordinates], torch.arange(self.count + 1, device=order.device)).tolist()]
        self.weights: list[Tensor] = []
        self.biases: list[Tensor] = []
        level, columns = order + 1, self.coordinates  # a coordinate serves the step after its own
        for depth, layer in enumerate(layers[0::2]):
            weight, mask = layer.mask * layer.weight, layer.mask
            if depth == 0:
                self.context_weight, weight, mask = weight[:, dim:], weight[:, :dim], mask[:, :dim]
            if depth < len(self.activations):
                needs = torch.where(mask, level, 0).amax(1)
                rows = torch.argsort(needs, stable=True)
            else:  # parameters of a coordinate, at its own step
                needs = order.repeat_interleave(transform.total)
                rows = (self.coordinates[:, None] * transform.total + torch.arange(transform.total, device=order.device)).flatten()
            self.weights.append(weight[rows][:, columns])
            self.biases.append(layer.bias[rows])
            if depth == 0:
                self.context_weight = self.context_weight[rows]
            self.known.append(torch.searchsorted(needs[rows], torch.arange(self.count + 1, device=order.device)).tolist())
            level, columns = needs, rows

    def __call__(self, y: Tensor, context: Tensor) -> Tensor:
        """y (B, n, D) and one context an observation, (B, C): x (B, n, D)."""
        batch, n, dim = y.shape
        y = y.reshape(-1, dim)[:, self.coordinates]
        x = torch.empty_like(y)
        values = [y.new_empty(len(y), len(bias)) for bias in self.biases[:-1]]
        from_context = linear(context, self.context_weight, self.biases[0])
        for step in range(self.count):
            below, reach = x, self.known[0][step]  # the coordinates of earlier steps
            for depth, activation in enumerate(self.activations):
                low, high = self.known[depth + 1][step], self.known[depth + 1][step + 1]
                if high > low:
                    weight = self.weights[depth][low:high, :reach]
                    if depth == 0:
                        total = linear(below[:, :reach], weight).view(batch, n, -1) + from_context[:, None, low:high]
                        total = total.view(len(y), -1)
                    else:
                        total = linear(below[:, :reach], weight, self.biases[depth][low:high])
                    values[depth][:, low:high] = activation(total)
                below, reach = values[depth], high
            first, last = self.known[0][step], self.known[0][step + 1]
            low, high = self.known[-1][step], self.known[-1][step + 1]
            phi = linear(below[:, :reach], self.weights[-1][low:high, :reach], self.biases[-1][low:high])
            univariate = self.transform.univariate(*unpack(phi.unflatten(1, (-1, self.transform.total)), self.transform.shapes))
            x[:, first:last] = univariate.inv(y[:, first:last])
        return x[:, torch.argsort(self.coordinates)].view(batch, n, dim)
