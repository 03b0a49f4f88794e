"""A borrowed model that can be differentiated as often as one likes, forth and back."""

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
    """x W^T, or x W where ``transposed``, with a frozen weight [O, I] that is made anew for each product.

    It is linear in x, so that its derivative in either direction is a product again.
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
    """Within the block the model is borrowed with these adapters on, and computes what it does by operations that have
    a double backward and a forward derivative, where there are such:

    - layers of 4 or 8 bits by products with their dequantised weight, one layer's at a time. bitsandbytes' own
      function has no forward derivative, and in 8 bit its derivatives are not those of what it computes;
    - attention by matrix products: the fused kernels have neither;
    - experts one by one: the grouped product has no forward derivative.

    Raises:
        UnsupportedLayerError: a weight is offloaded.
    """
    config: Any = base_model(model).config
    experts = getattr(config, "_experts_implementation", None)
    with preserved(model, adapters), _unpacked(model), sdpa_kernel(SDPBackend.MATH):
        try:
            if experts is not None:
                config._experts_implementation = "eager"
            yield
        finally:
            if experts is not None:
                config._experts_implementation = experts


@contextmanager
def _unpacked(model: nn.Module) -> Iterator[None]:
    for name, parameter in model.named_parameters():
        if parameter.is_meta:
            raise UnsupportedLayerError(
                f"{name} is offloaded, expected the whole model in memory: its products cannot be differentiated "
                "again; load the model without device_map, in 4 bit where it is too large"
            )
    packed = [(layer, kind) for layer in model.modules() if (kind := find_kind(layer)) and _is_packed(layer, kind)]
    before = [vars(layer).get("forward") for layer, _ in packed]
    try:
        for layer, kind in packed:
            layer.forward = partial(_linear, layer, partial(kind.dense, layer))  # type: ignore[arg-type]
        yield
    finally:
        for (layer, _), forward in zip(packed, before, strict=True):
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
