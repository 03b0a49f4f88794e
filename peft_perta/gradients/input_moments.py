"""Second moments of a layer's inputs and output gradients: which directions of the input space the rows use."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..model import Target
from .collector import Shape
from .gradient_sums import Gram, Moment, Outer


@dataclass(frozen=True)
class InputMoments:
    """Two sums over tokens: 'inputs', sum_t x_t x_t^T [I, I], and 'tokens', the number of tokens [1, 1].

    Only tokens with g_t != 0 count, those through which the loss flows: padding and the tokens after the last loss drop
    out. So does a first token for queries, which has no choice what to attend to; where a fused attention kernel rounds
    its g to almost 0, it counts. Experts' parameters have no input moments, because their inputs are unknown.
    """

    def moments(self, target: Target, layer_input: Tensor, output_gradient: Tensor | None) -> dict[str, Moment]:
        """'inputs' and 'tokens'; nothing for an expert's parameter."""
        if output_gradient is None:
            return {}
        counted = _flows(output_gradient)
        ones = counted.to(torch.promote_types(layer_input.dtype, torch.float32))
        return {"inputs": Gram(layer_input, counted), "tokens": Outer(ones, ones)}

    def shapes(self, target: Target) -> dict[str, Shape]:
        """The shapes of the moments."""
        if target.parameter is not None:
            return {}
        width = target.A.shape[1]
        return {"inputs": (width, width), "tokens": (1, 1)}


@dataclass(frozen=True)
class Energies:
    """Sums of squares of each input [1, I] and of each output gradient [1, O]: the diagonals of both second moments."""

    def moments(self, target: Target, layer_input: Tensor, output_gradient: Tensor | None) -> dict[str, Moment]:
        """'input energy' and 'output energy'; of an expert's parameter, those of its gradient's columns and rows."""
        if output_gradient is None:  # layer_input is G [O, I]
            energies = layer_input.square()
            return {
                "input energy": Outer(torch.ones_like(energies[:, :1]), energies),
                "output energy": Outer(torch.ones_like(energies[0]).unsqueeze(1), energies.T),
            }
        wide = torch.promote_types(layer_input.dtype, torch.float32)
        counted = _flows(output_gradient).to(wide)
        return {
            "input energy": Outer(counted, layer_input.to(wide).square()),
            "output energy": Outer(counted, output_gradient.to(wide).square()),
        }

    def shapes(self, target: Target) -> dict[str, Shape]:
        """The shapes of the moments."""
        return {"input energy": (1, target.A.shape[1]), "output energy": (1, len(target.B))}


def _flows(output_gradient: Tensor) -> Tensor:
    """Whether the loss flows through each token: any of its g is not 0 (NaN is not 0), [N, T, 1].

    The extremes take a fifth of the time of a comparison of all elements.
    """
    return (output_gradient.amax(-1, keepdim=True) != 0) | (output_gradient.amin(-1, keepdim=True) != 0)
