"""bitsandbytes' Linear8bitLt (LLM.int8): the weight is stored as int8 with one scale per row."""

from __future__ import annotations

from typing import Any

import bitsandbytes as bnb
from bitsandbytes.functional import int8_vectorwise_dequant
from torch import Tensor, nn

from .kind import LayerKind


def _accepts(base_layer: nn.Module) -> bool:
    return isinstance(base_layer, bnb.nn.Linear8bitLt)


def _dense(base_layer: nn.Module) -> Tensor:
    layer: Any = base_layer
    scales = layer.weight.SCB if layer.state.SCB is None else layer.state.SCB  # the first forward moves the scales
    return int8_vectorwise_dequant(layer.weight.data, scales.to(layer.weight.device))


KIND = LayerKind("linear8bit", _accepts, keeps_training_flag=True, dense=_dense)
