"""Second moments of a layer's inputs and output gradients: which directions of its input space the rows use."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from ..model import Target
from .gradient_sums import MOMENT, Outer


class Collector(Protocol):
    """What is kept of a layer's forward and backward, and in which shapes."""

    def gradient(self, target: Target, layer_input: Tensor, output_gradient: Tensor | None) -> dict[str, Outer]:
        """From x [N, T, I] and g [N, T, O] to what is summed; where g is None, x is the weight's gradient [O, I]."""
        ...

    def shapes(self, target: Target) -> dict[str, tuple[int, int]]:
        """The shapes of what it keeps."""
        ...


class Collectors:
    """Several readers as one; what two of them ask for is kept once."""

    def __init__(self, collectors: Sequence[Collector]) -> None:
        self.collectors = tuple(collectors)

    def gradient(self, target: Target, layer_input: Tensor, output_gradient: Tensor | None) -> dict[str, Outer]:
        found: dict[str, Outer] = {}
        for collector in self.collectors:
            found |= collector.gradient(target, layer_input, output_gradient)
        return found

    def shapes(self, target: Target) -> dict[str, tuple[int, int]]:
        found: dict[str, tuple[int, int]] = {}
        for collector in self.collectors:
            found |= collector.shapes(target)
        return found


class InputMoments:
    """sum_t x_t x_t^T [I, I] over the tokens through which the loss flows (g_t != 0: padding and what follows the last
    loss drop out), and their number [1, 1].

    Nothing of an expert's parameter, whose tokens are not met.
    """

    def gradient(self, target: Target, layer_input: Tensor, output_gradient: Tensor | None) -> dict[str, Outer]:
        if output_gradient is None:
            return {}
        counted = (output_gradient != 0).any(-1, keepdim=True)
        x = layer_input * counted.to(layer_input.dtype)
        ones = counted.to(torch.promote_types(layer_input.dtype, torch.float32))
        return {f"{MOMENT}inputs": Outer(x, x), f"{MOMENT}tokens": Outer(ones, ones)}

    def shapes(self, target: Target) -> dict[str, tuple[int, int]]:
        if target.parameter is not None:
            return {}
        width = target.A.shape[1]
        return {f"{MOMENT}inputs": (width, width), f"{MOMENT}tokens": (1, 1)}


class Energies:
    """Sums of squares of each input [1, I] and each output gradient [1, O]: the diagonals of the two second moments."""

    def gradient(self, target: Target, layer_input: Tensor, output_gradient: Tensor | None) -> dict[str, Outer]:
        if output_gradient is None:  # x is G [O, I]: what rows and columns of the gradient itself hold
            energies = layer_input.square()
            return {
                f"{MOMENT}input energy": Outer(torch.ones_like(energies[:, :1]), energies),
                f"{MOMENT}output energy": Outer(torch.ones_like(energies[0]).unsqueeze(1), energies.T),
            }
        wide = torch.promote_types(layer_input.dtype, torch.float32)
        counted = (output_gradient != 0).any(-1, keepdim=True).to(wide)
        return {
            f"{MOMENT}input energy": Outer(counted, layer_input.to(wide).square()),
            f"{MOMENT}output energy": Outer(counted, output_gradient.to(wide).square()),
        }

    def shapes(self, target: Target) -> dict[str, tuple[int, int]]:
        return {f"{MOMENT}input energy": (1, target.A.shape[1]), f"{MOMENT}output energy": (1, len(target.B))}
