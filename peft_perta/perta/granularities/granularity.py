"""The contract of a granularity."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor

from ...adapters import Edit
from ...gradients import Outer, Shape
from ...model import Target


class Granularity(Protocol):
    """What the weights multiply: the gradients that this needs, and the edit that the weights make.

    Tensors travel in mappings from a name ('weight', 'A', 'B', 'rows', 'columns') to the tensor. Shapes: N samples,
    T tokens, I in, O out, R rank.

    Attributes:
        name: the name in configs and provenance.
        description: one line for help texts.
    """

    name: str
    description: str

    def gradient(self, target: Target, layer_input: Tensor, output_gradient: Tensor | None) -> dict[str, Outer]:
        """The gradients to sum, as products over tokens.

        Args:
            target: the layer.
            layer_input: x [N, T, I].
            output_gradient: g [N, T, O]. None for an expert's parameter: ``layer_input`` is then the gradient of the
                weight itself, G [O, I], as if each output row were a token whose g is a row of the identity.
        """
        ...

    def shapes(self, target: Target) -> dict[str, Shape]:
        """The shapes of those gradients."""
        ...

    def arrange(self, magnitudes: dict[str, Tensor]) -> dict[str, Tensor]:
        """From the gradients' magnitudes, >= 0, to the tensors that the weighting turns into weights elementwise."""
        ...

    def edit(self, target: Target, weights: dict[str, Tensor], strength: float) -> Edit:
        """The signed edit of the layer, from weights in [0, 1] of the arranged shapes."""
        ...

    def uniform(self, target: Target) -> dict[str, Tensor]:
        """Weights of 1 everywhere: plain task arithmetic."""
        ...
