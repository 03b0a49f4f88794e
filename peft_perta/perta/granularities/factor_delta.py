"""Weights per factor times weights on the merged delta: W (*) (the edit of ``factor``), [O, I].

Either kind of weights can lower an element that the other would leave. The result has full rank, and is refitted.
"""

from __future__ import annotations

from torch import Tensor

from ...adapters import Edit, Product
from ...gradients import Outer
from ...model import Target
from .delta import Delta
from .factor import Factor


class FactorDelta:
    name = "factor+delta"
    _factor, _delta = Factor(), Delta()

    def gradient(self, target: Target, layer_input: Tensor, output_gradient: Tensor | None) -> dict[str, Outer]:
        return {
            **self._factor.gradient(target, layer_input, output_gradient),
            **self._delta.gradient(target, layer_input, output_gradient),
        }

    def shapes(self, target: Target) -> dict[str, tuple[int, int]]:
        return {**self._factor.shapes(target), **self._delta.shapes(target)}

    def arrange(self, magnitudes: dict[str, Tensor]) -> dict[str, Tensor]:
        return magnitudes

    def edit(self, target: Target, weights: dict[str, Tensor], strength: float) -> Edit:
        product = self._factor.edit(target, weights, strength)
        assert isinstance(product, Product)
        return (product.B @ product.A).mul_(weights["weight"])

    def uniform(self, target: Target) -> dict[str, Tensor]:
        return {**self._factor.uniform(target), **self._delta.uniform(target)}
