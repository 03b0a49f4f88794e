"""torch.nn.Linear: weight [O, I] in floating point."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from .kind import LayerKind


def _accepts(base_layer: nn.Module) -> bool:
    return isinstance(base_layer, nn.Linear) and base_layer.weight.is_floating_point()


def _refusal(wrapper: Any, base_layer: Any) -> str | None:
    """A subclass may return something else than x W^T, as Llama-4's router does: neither LoRA nor a tap fits it."""
    forward, weight = type(base_layer).forward, base_layer.weight
    if forward is nn.Linear.forward or weight.dtype.itemsize == 1:  # packed in 8 bits: its forward unpacks it
        return None
    row = torch.zeros(1, base_layer.in_features, dtype=weight.dtype, device=weight.device)
    try:
        with torch.no_grad():
            output = forward(base_layer, row)
    except RuntimeError:  # it expects inputs of another shape
        output = None
    if isinstance(output, Tensor) and output.shape == (1, base_layer.out_features):
        return None
    return (
        f"is a {type(base_layer).__name__}, whose output is not the tensor [tokens, {base_layer.out_features}] of a "
        "linear layer; train the adapter without it (exclude_modules; --exclude-modules)"
    )


def _dense(base_layer: nn.Module) -> Tensor:
    return base_layer.weight.detach()  # type: ignore[union-attr,operator]


KIND = LayerKind("linear", _accepts, _refusal, dense=_dense)
