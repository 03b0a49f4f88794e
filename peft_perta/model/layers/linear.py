"""torch.nn.Linear: weight [O, I] in floating point."""

from __future__ import annotations

from torch import Tensor, nn

from .kind import LayerKind


def _accepts(base_layer: nn.Module) -> bool:
    return isinstance(base_layer, nn.Linear) and base_layer.weight.is_floating_point()


def _dense(base_layer: nn.Module) -> Tensor:
    return base_layer.weight.detach()  # type: ignore[union-attr,operator]


KIND = LayerKind("linear", _accepts, dense=_dense)
