"""Weights on the merged delta [O, I]: the form of the PerTA paper."""

from __future__ import annotations

import torch
from torch import Tensor

from ...adapters import Edit
from ...gradients import Outer, Shape
from ...model import Target
from ..task_vectors import weighted_delta


class Delta:
    """One weight per element of B @ A."""

    name = "delta"
    description = "the merged B @ A, as in the paper (refitted to the rank)"

    def gradient(self, target: Target, layer_input: Tensor, output_gradient: Tensor | None) -> dict[str, Outer]:
        """G = g^T x, [O, I]."""
        return {"weight": Outer(output_gradient, layer_input)}

    def shapes(self, target: Target) -> dict[str, Shape]:
        """[O, I]."""
        return {"weight": (len(target.B), target.A.shape[1])}

    def arrange(self, magnitudes: dict[str, Tensor]) -> dict[str, Tensor]:
        """As they are."""
        return magnitudes

    def edit(self, target: Target, weights: dict[str, Tensor], strength: float) -> Edit:
        """-strength * W (*) (s * B @ A), dense."""
        return weighted_delta(target.A, target.B, target.scaling, weights["weight"], strength)

    def uniform(self, target: Target) -> dict[str, Tensor]:
        """Ones, [O, I]."""
        return {"weight": torch.ones(len(target.B), target.A.shape[1], dtype=target.A.dtype, device=target.A.device)}
