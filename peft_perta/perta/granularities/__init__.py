"""What the weights multiply: one file a granularity, one row each in ``GRANULARITIES``.

A granularity says which gradient it needs of a layer, how the magnitudes of that gradient are arranged for the
weighting, and which edit the weights make. To add one: a file, a row here, its name in ``config.GRANULARITY_NAMES``, a
row in tests/tables.py.
"""

from __future__ import annotations

from typing import Protocol

from torch import Tensor

from ...adapters import Edit
from ...gradients import Outer
from ...model import Target
from .delta import Delta
from .factor import Factor
from .factor_delta import FactorDelta
from .separable import Separable


class Granularity(Protocol):
    """The contract. Tensors travel in mappings, from a name ('weight', 'A', 'B', 'rows', 'columns') to the tensor."""

    name: str

    def gradient(self, target: Target, layer_input: Tensor, output_gradient: Tensor | None) -> dict[str, Outer]:
        """From x [N, T, I] and g [N, T, O] to the gradients that this granularity keeps, as products over tokens.

        Where g is None, x is the weight's gradient G [O, I] itself: as if each output row were a token whose g is a
        row of the identity.
        """
        ...

    def shapes(self, target: Target) -> dict[str, tuple[int, int]]:
        """The shapes of what it keeps."""
        ...

    def arrange(self, magnitudes: dict[str, Tensor]) -> dict[str, Tensor]:
        """Magnitudes >= 0 of those gradients -> the tensors that the weighting turns into weights, elementwise."""
        ...

    def edit(self, target: Target, weights: dict[str, Tensor], strength: float) -> Edit:
        """The signed edit of the layer, from weights in [0, 1] of the arranged shapes."""
        ...

    def uniform(self, target: Target) -> dict[str, Tensor]:
        """Weights that are 1 everywhere: plain task arithmetic."""
        ...


GRANULARITIES: dict[str, Granularity] = {g.name: g for g in (Factor(), Delta(), Separable(), FactorDelta())}


__all__ = ["GRANULARITIES", "Granularity"]
