"""transformers' Conv1D (GPT-2): a linear layer whose weight is stored [in, out]; PEFT transposes its delta."""

from __future__ import annotations

from torch import nn
from transformers.pytorch_utils import Conv1D

from .kind import LayerKind


def _accepts(base_layer: nn.Module) -> bool:
    return isinstance(base_layer, Conv1D)


KIND = LayerKind("conv1d", _accepts)
