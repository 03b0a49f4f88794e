"""Weights per factor, from pulled-back gradients: no [O, I] matrix anywhere.

With G the gradient of the layer's weight, the adapter s * B @ A has

    dL/dA = s B^T G = s (g B)^T x   [R, I]          dL/dB = s G A^T = s g^T (x A^T)   [O, R]

so only g B and x A^T are formed, never G. Both factors are weighted, so their weights meet as a product: each factor
takes the square root of its own, and the edit's term k is weighted by the geometric mean sqrt(W_B[:, k] W_A[k, :]). It
stays in [0, 1], and ratios of 1/2 everywhere give 1/2, as with the other granularities. The basis is the one in which
the factors were trained; rotating it changes the edit.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ...adapters import Edit
from ...gradients import Outer
from ...model import Target
from ..task_vectors import weighted_factors


class Factor:
    name = "factor"

    def gradient(self, target: Target, layer_input: Tensor, output_gradient: Tensor | None) -> dict[str, Outer]:
        return pulled_back(target, layer_input, output_gradient)

    def shapes(self, target: Target) -> dict[str, tuple[int, int]]:
        return factor_shapes(target)

    def arrange(self, magnitudes: dict[str, Tensor]) -> dict[str, Tensor]:
        return magnitudes

    def edit(self, target: Target, weights: dict[str, Tensor], strength: float) -> Edit:
        weights_A, weights_B = weights["A"].sqrt(), weights["B"].sqrt()
        return weighted_factors(target.A, target.B, target.scaling, weights_A, weights_B, strength)

    def uniform(self, target: Target) -> dict[str, Tensor]:
        return {"A": torch.ones_like(target.A), "B": torch.ones_like(target.B)}


def pulled_back(target: Target, layer_input: Tensor, output_gradient: Tensor | None) -> dict[str, Outer]:
    """The gradients of the adapter's own factors, as if it were on: A [R, I], B [O, R].

    Only what is projected to the rank is widened to the factors' dtype by itself; it is small.
    """
    A, B = target.A, target.scaling * target.B
    gradient_in_rank = B if output_gradient is None else output_gradient.to(B.dtype) @ B
    return {
        "A": Outer(gradient_in_rank, layer_input),
        "B": Outer(output_gradient, target.scaling * (layer_input.to(A.dtype) @ A.T)),
    }


def factor_shapes(target: Target) -> dict[str, tuple[int, int]]:
    """Of the pulled-back gradients."""
    return {"A": tuple(target.A.shape), "B": tuple(target.B.shape)}  # type: ignore[dict-item]
