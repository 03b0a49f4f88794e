"""bitsandbytes' Linear8bitLt (LLM.int8): the weight is int8 with row scales."""

from __future__ import annotations

import bitsandbytes as bnb
from torch import nn

from .kind import LayerKind


def _accepts(base_layer: nn.Module) -> bool:
    return isinstance(base_layer, bnb.nn.Linear8bitLt)


KIND = LayerKind("linear8bit", _accepts, keeps_training_flag=True)
