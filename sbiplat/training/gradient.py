r"""The gradient of a batch's mean loss: in pieces, in mixed precision, compiled, as the settings say.

A batch of B rows in K pieces of sizes b_k gives, one piece in memory at a time,

.. math:: \nabla \frac1B \sum_i \ell_i = \sum_k \frac{b_k}{B} \, \nabla \frac1{b_k} \sum_{i \in k} \ell_i ,

the gradient of the whole up to rounding; a loss that draws noise draws other noise. In bf16 only linear and convolution layers compute
in bfloat16, from float32 weights, and give float32: splines, log-determinants and losses would lose their digits (Micikevicius et al.,
2018, keep what sums and exponentiates in float32). Nothing of this is left in the module: its state_dict is that of a plain one.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from sbiplat.bank.stream import take
from sbiplat.errors import SettingError
from sbiplat.estimators.base import Estimator
from sbiplat.training.begin import TrainSettings
from sbiplat.training.defence import Defence


class Gradient:
    """Called with a batch, adds the gradient of its mean loss to the parameters' `grad` and returns that loss, a scalar tensor.

    defence: what disturbs x on its way to the loss.
    """

    def __init__(self, estimator: Estimator, settings: TrainSettings, defence: Defence | None = None) -> None:
        self._pieces, self._compiled, self._defence = settings.accumulate, settings.compile, defence
        if settings.precision == "bf16":
            for layer in estimator.modules():
                if isinstance(layer, nn.Linear | _ConvNd):
                    _multiply_in_bf16(layer, torch.device(settings.device).type)
        if settings.compile:
            torch.compiler.reset()  # what earlier trainings of this process compiled counts towards a limit, over which nothing is compiled
        # dynamic=False: the kernels for a size do not depend on which sizes came before, nor does a resumed training
        self._loss = torch.compile(estimator.loss, dynamic=False) if settings.compile else estimator.loss

    def __call__(self, batch: dict[str, Any]) -> Tensor:
        rows = len(batch["theta"])
        size = -(-rows // self._pieces)
        losses = [self._add(take(batch, slice(a, a + size)) if size < rows else batch, min(size, rows - a) / rows)
                  for a in range(0, rows, size)]
        return torch.stack(losses).sum()

    def _add(self, piece: dict[str, Any], share: float) -> Tensor:
        theta, x = piece["theta"], piece["x"]
        if self._defence is not None:
            x = self._defence.disturbed(theta, x)
        try:
            loss = self._loss(theta, x).mean() * share
            loss.backward()
        except RuntimeError as error:
            if self._compiled and _of_compiler(error):
                raise SettingError(f"compile = true: torch.compile fails on this net ({_told(error)}); use compile = false") from None
            raise
        return loss.detach()


def check_compiler(device: str) -> None:
    """Compile and run one small function; raises SettingError where this machine cannot."""
    try:
        torch.compile(lambda x: x.sin() + 1, dynamic=False)(torch.zeros(8, device=device))
    except RuntimeError as error:
        if not _of_compiler(error):
            raise
        raise SettingError(f"compile = true: nothing can be compiled here ({_told(error)}); install a C++ compiler such as g++, on "
                           "CUDA Triton too, or use compile = false") from None


def _multiply_in_bf16(layer: nn.Module, device: str) -> None:
    """Let a layer compute in bfloat16 while it trains; its result is float32."""
    whole = layer.forward

    def forward(*inputs: Tensor) -> Tensor:
        if not layer.training:
            return whole(*inputs)
        with torch.autocast(device, torch.bfloat16):
            return whole(*inputs).float()

    layer.forward = forward  # type: ignore[method-assign]


def _of_compiler(error: RuntimeError) -> bool:
    from torch._dynamo.exc import TorchDynamoException

    return isinstance(error, TorchDynamoException)


def _told(error: RuntimeError) -> str:
    """What torch says before its advice, on one line."""
    return " ".join(str(error).strip().partition("\n\n")[0].split())
