"""transformers' Conv1D (GPT-2): a linear layer whose weight is stored as [I, O]; PEFT transposes its delta."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from .kind import LayerKind


def _accepts(base_layer: nn.Module) -> bool:
    return isinstance(base_layer, Conv1D)


def _dense(base_layer: nn.Module) -> Tensor:
    return base_layer.weight.detach().T  # type: ignore[union-attr,operator]


def _shape(base_layer: Any) -> tuple[int, int]:
    return base_layer.weight.shape[1], base_layer.weight.shape[0]


def _is_transposed(wrapper: Any) -> bool:
    return True


KIND = LayerKind("conv1d", _accepts, dense=_dense, shape=_shape, is_transposed=_is_transposed)
