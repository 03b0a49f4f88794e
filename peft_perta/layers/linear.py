"""torch.nn.Linear: weight [out, in] in floating point."""

from __future__ import annotations

from torch import nn

from .kind import LayerKind


def _accepts(base_layer: nn.Module) -> bool:
    return isinstance(base_layer, nn.Linear) and base_layer.weight.is_floating_point()


KIND = LayerKind("linear", _accepts)
