"""Weights on each factor, from gradients pulled back to the factors. No [O, I] matrix is formed.

With G the gradient of the layer's weight, the gradients of the adapter s * B @ A are

    dL/dA = s B^T G = s (g B)^T x   [R, I]          dL/dB = s G A^T = s g^T (x A^T)   [O, R]

so only g B and x A^T are computed, never G. Both factors are weighted, so their weights multiply. Each factor therefore
takes the square root of its own weights: the k-th rank-one term of the edit is weighted by the geometric mean
sqrt(W_B[:, k] W_A[k, :]). It stays in [0, 1], and ratios of 1/2 everywhere give 1/2, as with the other granularities.
The edit depends on the basis in which the factors were trained: rotating the basis changes it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ...adapters import Edit
from ...gradients import Outer, Shape
from ...model import Target
from ..task_vectors import weighted_factors


class Factor:
    """One weight per element of A and of B."""

    name = "factor"
    description = "A and B each (exact at the forget adapter's rank, no [out, in] matrix)"

    def gradient(self, target: Target, layer_input: Tensor, output_gradient: Tensor | None) -> dict[str, Outer]:
        """The factors' gradients, A [R, I] and B [O, R]."""
        return pulled_back(target, layer_input, output_gradient)

    def shapes(self, target: Target) -> dict[str, Shape]:
        """Those of the factors."""
        return factor_shapes(target)

    def arrange(self, magnitudes: dict[str, Tensor]) -> dict[str, Tensor]:
        """As they are."""
        return magnitudes

    def edit(self, target: Target, weights: dict[str, Tensor], strength: float) -> Edit:
        """-strength * s * (sqrt(W_B) (*) B) @ (sqrt(W_A) (*) A), as a product."""
        weights_A, weights_B = weights["A"].sqrt(), weights["B"].sqrt()
        return weighted_factors(target.A, target.B, target.scaling, weights_A, weights_B, strength)

    def uniform(self, target: Target) -> dict[str, Tensor]:
        """Ones, [R, I] and [O, R]."""
        return {"A": torch.ones_like(target.A), "B": torch.ones_like(target.B)}


def pulled_back(target: Target, layer_input: Tensor, output_gradient: Tensor | None) -> dict[str, Outer]:
    """The gradients of the adapter's own factors, A [R, I] and B [O, R], taken as if the adapter were on.

    Only the projections to the rank are cast to the factors' dtype; they are small.
    """
    A, B = target.A, target.scaling * target.B
    gradient_in_rank = B if output_gradient is None else output_gradient.to(B.dtype) @ B
    return {
        "A": Outer(gradient_in_rank, layer_input),
        "B": Outer(output_gradient, target.scaling * (layer_input.to(A.dtype) @ A.T)),
    }


def factor_shapes(target: Target) -> dict[str, Shape]:
    """The shapes of the pulled-back gradients."""
    return {"A": tuple(target.A.shape), "B": tuple(target.B.shape)}  # type: ignore[dict-item]
