"""Task vectors and signed edits: pure tensor arithmetic.

Shapes, here and everywhere: N samples, T tokens, I in, O out, R rank.
"""

from __future__ import annotations

from torch import Tensor

from ..adapters import Product


def task_vector(A: Tensor, B: Tensor, scaling: float) -> Tensor:
    """The task vector: what the forget adapter adds to the weight, s * B @ A, [O, I]."""
    return scaling * (B @ A)


def weighted_delta(A: Tensor, B: Tensor, scaling: float, weights: Tensor, strength: float) -> Tensor:
    """-strength * W (*) (s * B @ A), elementwise, [O, I]; W is [O, I].

    Reference: arXiv 2601.22030, theta_final = theta_full - W (*) TV.
    """
    return task_vector(A, B, -strength * scaling).mul_(weights)


def weighted_factors(
    A: Tensor, B: Tensor, scaling: float, weights_A: Tensor, weights_B: Tensor, strength: float
) -> Product:
    """The product of (W_B (*) B) and (W_A (*) A); W_A [R, I], W_B [O, R]. B carries sign, scaling and strength.

    The k-th rank-one term of the edit is weighted by the outer product W_B[:, k] W_A[k, :].
    """
    return Product(B=(-strength * scaling) * (weights_B * B), A=weights_A * A)


def weighted_rows_columns(
    A: Tensor, B: Tensor, scaling: float, rows: Tensor, columns: Tensor, strength: float
) -> Product:
    """-strength * (u v^T) (*) (s * B @ A) = (-strength * s * diag(u) B)(A diag(v)): exact at the same rank.

    ``rows`` is u [O], ``columns`` is v [I].
    """
    return Product(B=(-strength * scaling) * (rows.unsqueeze(1) * B), A=A * columns)
