"""transformers' Conv1D (GPT-2): a linear layer whose weight is stored [in, out]; PEFT transposes its delta."""

from __future__ import annotations

from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from .kind import LayerKind


def _accepts(base_layer: nn.Module) -> bool:
    return isinstance(base_layer, Conv1D)


def _dense(base_layer: nn.Module) -> Tensor:
    return base_layer.weight.detach().T  # type: ignore[union-attr,operator]


KIND = LayerKind("conv1d", _accepts, dense=_dense)
