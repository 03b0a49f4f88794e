"""The layers that relearning trains and requantization rounds: every linear layer but the output head."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from ...errors import UnsupportedLayerError
from ...model import LayerKind, base_model, find_kind, tuner_modules


@dataclass(frozen=True)
class Projection:
    """One linear layer.

    Attributes:
        name: path inside the base model, without adapters.
        layer: the base layer.
        module: the module that the model calls: PEFT's wrapper around the layer, or the layer itself.
        kind: None where the layer's weight cannot be read.
    """

    name: str
    layer: nn.Module
    module: nn.Module
    kind: LayerKind | None

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in)."""
        if self.kind is not None:
            return self.kind.shape(self.layer)
        return self.layer.out_features, self.layer.in_features  # type: ignore[return-value]


def projections(model: nn.Module) -> list[Projection]:
    """The linear layers in the model's order, without those of adapters and without the output head.

    Raises:
        UnsupportedLayerError: the model has none.
    """
    base = base_model(model)
    head: nn.Module | None = base.get_output_embeddings()  # type: ignore[operator]
    excluded = set() if head is None else set(map(id, head.modules()))
    tuners = tuner_modules(base.modules())
    wrappers: dict[int, Any] = {
        id(tuner.get_base_layer()): tuner for tuner in reversed(tuners) if isinstance(tuner, BaseTunerLayer)
    }
    excluded |= {
        id(part)
        for tuner in tuners
        for name, child in tuner.named_children()
        if name not in ("base_layer", "original_module")
        for part in child.modules()
    }
    linear = []
    for path, layer in base.named_modules():
        kind = find_kind(layer)
        if id(layer) not in excluded and _is_matrix(layer, kind):
            name = path.replace(".base_layer", "")
            linear.append(Projection(name, layer, wrappers.get(id(layer), layer), kind))
    if not linear:
        raise UnsupportedLayerError(
            f"expected a model with linear layers, found none in {type(base).__name__}; load it in floating point, or "
            "in 4 or 8 bit by bitsandbytes"
        )
    return linear


def _is_matrix(layer: nn.Module, kind: LayerKind | None) -> bool:
    """Whether the layer multiplies by one matrix. Llama-4's router is linear by its class, but not by its output."""
    if kind is None:
        return isinstance(layer, nn.Linear)
    return kind.dense is not None and not (kind.name == "linear" and kind.refusal(layer, layer))
