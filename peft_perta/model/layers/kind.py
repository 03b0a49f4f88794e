"""The contract of a layer kind."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor, nn


def _no_refusal(adapted: nn.Module, base_layer: nn.Module) -> str | None:
    return None


@dataclass(frozen=True)
class LayerKind:
    """What we know of one class of layers.

    Attributes:
        name: for reports.
        accepts: whether a base layer is of this kind.
        refusal: given PEFT's wrapper and the base layer, why this one cannot be edited and what to do, or None.
        keeps_training_flag: the layer rewrites its own weights on an inference forward in eval mode and loses its
            gradient thereby; it must be left in training mode (it holds no dropout).
        dense: given the base layer, its weight as [O, I] in floating point, for what rounds it anew; a view where it
            can be. None where the weight is not one matrix.
    """

    name: str
    accepts: Callable[[nn.Module], bool]
    refusal: Callable[[nn.Module, nn.Module], str | None] = _no_refusal
    keeps_training_flag: bool = False
    dense: Callable[[nn.Module], Tensor] | None = None
