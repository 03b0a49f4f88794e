"""Weights on each factor, times weights on the merged delta: W (*) (the edit of ``factor``), [O, I].

Either kind of weight can lower an element that the other would keep. The result has full rank and is refitted.
"""

from __future__ import annotations

from torch import Tensor

from ...adapters import Edit, Product
from ...gradients import Outer, Shape
from ...model import Target
from .delta import Delta
from .factor import Factor


class FactorDelta:
    """The weights of ``factor`` and of ``delta``, multiplied."""

    name = "factor+delta"
    description = "both weights, multiplied (for research at full rank)"
    _factor, _delta = Factor(), Delta()

    def gradient(self, target: Target, layer_input: Tensor, output_gradient: Tensor | None) -> dict[str, Outer]:
        """The factors' gradients, and the weight's."""
        return {
            **self._factor.gradient(target, layer_input, output_gradient),
            **self._delta.gradient(target, layer_input, output_gradient),
        }

    def shapes(self, target: Target) -> dict[str, Shape]:
        """Those of both."""
        return {**self._factor.shapes(target), **self._delta.shapes(target)}

    def arrange(self, magnitudes: dict[str, Tensor]) -> dict[str, Tensor]:
        """As they are."""
        return magnitudes

    def edit(self, target: Target, weights: dict[str, Tensor], strength: float) -> Edit:
        """W (*) (the edit of ``factor``), dense."""
        product = self._factor.edit(target, weights, strength)
        assert isinstance(product, Product)
        return (product.B @ product.A).mul_(weights["weight"])

    def uniform(self, target: Target) -> dict[str, Tensor]:
        """Ones, of all three shapes."""
        return {**self._factor.uniform(target), **self._delta.uniform(target)}
