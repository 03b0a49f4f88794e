"""The contract of a layer kind."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import Tensor, nn


class ExpertParameter(NamedTuple):
    """A parameter [E, O, I] that holds one weight per expert: its name in the module, and E."""

    name: str
    experts: int


def _no_refusal(wrapper: Any, base_layer: nn.Module) -> str | None:
    return None


def _no_expert_parameter(wrapper: Any) -> ExpertParameter | None:
    return None


def _not_transposed(wrapper: Any) -> bool:
    return False


def _features(base_layer: Any) -> tuple[int, int]:
    return base_layer.out_features, base_layer.in_features


def _one_weight(wrapper: Any, A: Tensor, B: Tensor) -> list[tuple[Tensor, Tensor]]:
    return [(A, B)]


def _one_pair(factors: Sequence[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    (pair,) = factors
    return pair


@dataclass(frozen=True)
class LayerKind:
    """What the package knows about one class of layers. The defaults describe a layer with one weight [O, I].

    A wrapper is PEFT's ``LoraLayer`` around a base layer.

    Attributes:
        name: the name in messages and in provenance.
        accepts: given a base layer (or a wrapper, for experts), whether it is of this kind.
        refusal: given the wrapper and the base layer, why this layer cannot be edited and what to do, or None.
        keeps_training_flag: the layer rewrites its own weights in an inference forward in eval mode, after which no
            gradient flows through it. It must stay in training mode; it holds no dropout.
        dense: given the base layer, its weight [O, I] in floating point, as a view where possible. Used to round the
            weight again, never to edit it. None if the weight is not a single matrix.
        shape: given the base layer, (O, I).
        is_transposed: given the wrapper, whether the weight is stored as [I, O] (an expert's as [E, I, O]).
        expert_parameter: given the wrapper, the parameter that holds the weights of its experts; None for a layer with
            one weight.
        split: given the wrapper and PEFT's two matrices, (A [R, I], B [O, R]) of each weight.
        pack: the inverse of ``split``: PEFT's two matrices from the factors of each weight.
    """

    name: str
    accepts: Callable[[nn.Module], bool]
    refusal: Callable[[Any, nn.Module], str | None] = _no_refusal
    keeps_training_flag: bool = False
    dense: Callable[[nn.Module], Tensor] | None = None
    shape: Callable[[Any], tuple[int, int]] = _features
    is_transposed: Callable[[Any], bool] = _not_transposed
    expert_parameter: Callable[[Any], ExpertParameter | None] = _no_expert_parameter
    split: Callable[[Any, Tensor, Tensor], list[tuple[Tensor, Tensor]]] = _one_weight
    pack: Callable[[Sequence[tuple[Tensor, Tensor]]], tuple[Tensor, Tensor]] = _one_pair
