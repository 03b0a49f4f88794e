"""Second moments of a layer's inputs and output gradients: which directions of its input space the rows use."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from .statistics import MOMENT, Outer
from .targets import Target

# A wider input's moment is sketched: its product with so many random directions, from which it is rebuilt (Nystroem).
SKETCH = 512


class Reader(Protocol):
    """What is kept of a layer's forward and backward, and in which shapes."""

    def gradient(self, target: Target, layer_input: Tensor, output_gradient: Tensor | None) -> dict[str, Outer]:
        """From x [N, T, I] and g [N, T, O] to what is summed; where g is None, x is the weight's gradient [O, I]."""
        ...

    def shapes(self, target: Target) -> dict[str, tuple[int, int]]:
        """The shapes of what it keeps."""
        ...


class Readers:
    """Several readers as one; what two of them ask for is kept once."""

    def __init__(self, readers: Sequence[Reader]) -> None:
        self.readers = tuple(readers)

    def gradient(self, target: Target, layer_input: Tensor, output_gradient: Tensor | None) -> dict[str, Outer]:
        found: dict[str, Outer] = {}
        for reader in self.readers:
            found |= reader.gradient(target, layer_input, output_gradient)
        return found

    def shapes(self, target: Target) -> dict[str, tuple[int, int]]:
        found: dict[str, tuple[int, int]] = {}
        for reader in self.readers:
            found |= reader.shapes(target)
        return found


class InputMoments:
    """sum_t x_t x_t^T [I, I], or its sketch [I, SKETCH], over the tokens through which the loss flows (g_t != 0:
    padding and what follows the last loss drop out), and their number [1, 1].

    Nothing of an expert's parameter, whose tokens are not met.
    """

    def __init__(self) -> None:
        self._drawn: dict[tuple[int, torch.device, torch.dtype], Tensor | None] = {}

    def gradient(self, target: Target, layer_input: Tensor, output_gradient: Tensor | None) -> dict[str, Outer]:
        if output_gradient is None:
            return {}
        counted = (output_gradient != 0).any(-1, keepdim=True).to(layer_input.dtype)
        x = layer_input * counted
        wide = torch.promote_types(x.dtype, torch.float32)
        key = x.shape[-1], x.device, wide
        if key not in self._drawn:
            drawn = sketch_directions(x.shape[-1])
            self._drawn[key] = None if drawn is None else drawn.to(x.device, wide)
        directions = self._drawn[key]
        sketched = x if directions is None else x.to(directions.dtype) @ directions
        ones = counted.to(wide)
        return {f"{MOMENT}inputs": Outer(x, sketched), f"{MOMENT}tokens": Outer(ones, ones)}

    def shapes(self, target: Target) -> dict[str, tuple[int, int]]:
        if target.parameter is not None:
            return {}
        width = target.A.shape[1]
        return {f"{MOMENT}inputs": (width, min(width, SKETCH)), f"{MOMENT}tokens": (1, 1)}


class Energies:
    """Mean squares of each input [1, I] and each output gradient [1, O]: the diagonals of the two second moments."""

    def gradient(self, target: Target, layer_input: Tensor, output_gradient: Tensor | None) -> dict[str, Outer]:
        if output_gradient is None:  # x is G [O, I]: what rows and columns of the gradient itself hold
            energies = layer_input.square()
            ones = torch.ones_like(energies[:, :1])
            columns = torch.ones_like(energies[0]).unsqueeze(1)
            return {
                f"{MOMENT}input energy": Outer(ones, energies),
                f"{MOMENT}output energy": Outer(columns, energies.T),
            }
        wide = torch.promote_types(layer_input.dtype, torch.float32)
        counted = (output_gradient != 0).any(-1, keepdim=True).to(wide)
        return {
            f"{MOMENT}input energy": Outer(counted, layer_input.to(wide).square()),
            f"{MOMENT}output energy": Outer(counted, output_gradient.to(wide).square()),
        }

    def shapes(self, target: Target) -> dict[str, tuple[int, int]]:
        return {f"{MOMENT}input energy": (1, target.A.shape[1]), f"{MOMENT}output energy": (1, len(target.B))}


def sketch_directions(width: int) -> Tensor | None:
    """Omega [I, SKETCH], float64, the same at every call; None where the whole moment is kept."""
    if width <= SKETCH:
        return None
    return torch.randn(width, SKETCH, generator=torch.Generator().manual_seed(width), dtype=torch.float64)
