"""Make a model differentiable twice: by double backward and by forward derivatives."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from ..errors import UnsupportedLayerError
from ..model import LayerKind, base_model, find_kind, preserved


class _Product(torch.autograd.Function):
    """x W^T, or x W where ``transposed``, with a frozen weight [O, I] that is dequantised again for each product.

    The product is linear in x, so its backward and its forward derivative are such products too.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, dense: Callable[[], Tensor], transposed: bool) -> Tensor:
        ctx.dense, ctx.transposed = dense, transposed
        weight = dense().to(x.dtype)
        return x @ (weight if transposed else weight.T)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Any, None, None]:
        return _Product.apply(gradients[0], ctx.dense, not ctx.transposed), None, None

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Any:
        return _Product.apply(tangents[0], ctx.dense, ctx.transposed)


@contextmanager
def differentiable(model: nn.Module, adapters: Sequence[str]) -> Iterator[None]:
    """Within the block these adapters are on, and every operation can be differentiated twice where that is possible.

    The model computes the same values by other operations:

    - 4-bit and 8-bit layers multiply by their dequantised weight, one layer at a time. bitsandbytes' own function has
      no forward derivative, and in 8 bit its derivatives are not those of the values that it computes.
    - Attention uses plain matrix products; the fused kernels have neither derivative.
    - Experts run one by one; the grouped product has no forward derivative.

    Afterwards the model is as it was before.

    Raises:
        UnsupportedLayerError: a weight is offloaded.
    """
    config: Any = base_model(model).config
    experts = getattr(config, "_experts_implementation", None)
    with preserved(model, adapters), _dequantised(model), sdpa_kernel(SDPBackend.MATH):
        try:
            if experts is not None:
                config._experts_implementation = "eager"
            yield
        finally:
            if experts is not None:
                config._experts_implementation = experts


@contextmanager
def _dequantised(model: nn.Module) -> Iterator[None]:
    for name, parameter in model.named_parameters():
        if parameter.is_meta:
            raise UnsupportedLayerError(
                f"{name} is offloaded, expected the whole model in memory: products through an offloaded weight cannot "
                "be differentiated twice. Load the model without device_map, in 4 bit if it is too large"
            )
    quantised = [(layer, kind) for layer in model.modules() if (kind := find_kind(layer)) and _is_packed(layer, kind)]
    forwards = [vars(layer).get("forward") for layer, _ in quantised]
    try:
        for layer, kind in quantised:
            layer.forward = partial(_linear, layer, partial(kind.dense, layer))  # type: ignore[arg-type]
        yield
    finally:
        for (layer, _), forward in zip(quantised, forwards, strict=True):
            vars(layer).pop("forward", None)
            if forward is not None:
                layer.forward = forward


def _is_packed(layer: nn.Module, kind: LayerKind) -> bool:
    weight: Any = getattr(layer, "weight", None)
    return kind.dense is not None and isinstance(weight, Tensor) and not weight.is_floating_point()


def _linear(layer: nn.Module, dense: Callable[[], Tensor], x: Tensor) -> Tensor:
    product: Any = _Product.apply(x, dense, False)
    bias: Any = layer.bias
    return product if bias is None else product + bias.to(product.dtype)
