r"""The inverse of a masked autoregressive transform at the cost of one forward pass.

Inverting :math:`y_i = f(x_i; \phi_i(x_{<i}, c))` takes x one coordinate after the other. The plain way evaluates the whole
masked net once for each. But a masked unit depends on the coordinates up to its level and on no later one, so each
unit can be evaluated once, when the coordinates of its level are known: all steps together then cost one pass, the
context's share of the first layer is computed once for all draws of an observation, and only the coordinate in turn
goes through its univariate inverse.
"""

from __future__ import annotations

from typing import Any

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
        masked = [(layer.mask * layer.weight, layer.bias) for layer in layers[0::2]]
        self.context_weight, self.context_bias = masked[0][0][:, dim:], masked[0][1]
        level = order  # of x_i: it is known once its step is done
        which = [torch.nonzero(order == s).squeeze(1) for s in range(int(order.max()) + 1)]
        self.steps: list[dict[str, Any]] = [{"which": w, "layers": []} for w in which]
        for depth, (weight, bias) in enumerate(masked):
            mask = layers[2 * depth].mask[:, :dim] if depth == 0 else layers[2 * depth].mask
            # The step at which a unit can be evaluated: one after the last coordinate it needs (a unit of no coordinate at 0),
            # or with the last unit it needs; outputs at the step of their coordinate.
            needs = torch.where(mask, level + (depth == 0), 0).amax(1) if mask.shape[1] else torch.zeros(len(mask), dtype=torch.long)
            if depth == len(masked) - 1:
                needs = order.repeat_interleave(transform.total)
            for s, step in enumerate(self.steps):
                rows = torch.nonzero(needs == s).squeeze(1)
                known = torch.nonzero(level < s if depth == 0 else level <= s).squeeze(1)
                source = weight[:, :dim] if depth == 0 else weight
                step["layers"].append((rows, known, source[rows][:, known], bias[rows]))
            level = needs

    def __call__(self, y: Tensor, context: Tensor) -> Tensor:
        """y (B, n, D) and one context an observation, (B, C): x (B, n, D)."""
        x = torch.zeros_like(y)
        lead = y.shape[:-1]
        from_context = linear(context, self.context_weight, self.context_bias)[:, None]
        values = [y.new_zeros(*lead, layer.out_features) for layer in list(self.transform.hyper)[0:-1:2]]
        for step in self.steps:
            for depth, (rows, known, weight, bias) in enumerate(step["layers"][:-1]):
                if len(rows):
                    below = x if depth == 0 else values[depth - 1]
                    total = linear(below[..., known], weight, None if depth == 0 else bias)
                    values[depth][..., rows] = self.activations[depth](total + from_context[..., rows] if depth == 0 else total)
            rows, known, weight, bias = step["layers"][-1]
            phi = linear(values[-1][..., known], weight, bias).unflatten(-1, (-1, self.transform.total))
            which = step["which"]
            x[..., which] = self.transform.univariate(*unpack(phi, self.transform.shapes)).inv(y[..., which])
        return x
