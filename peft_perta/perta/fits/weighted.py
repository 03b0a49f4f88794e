"""The least error elementwise: sum_ij H_ij (E - B A)_ij^2, with H the squared mean gradient on the retain set.

Elements that the retain rows depend on must match the edit; the others are free. There is no closed form: alternating
least squares, from the truncated start. Each half step is solved exactly, so the error never grows.

Reference: Srebro and Jaakkola 2003, "Weighted Low-Rank Approximations".
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from ...adapters import Edit, Factors, Product, factorize
from ...gradients import Collector, GradientSums
from ..granularities.delta import Delta
from .fit import is_exact, judged

_FLOOR = 0.01  # of the mean weight, added to every element: no element is entirely free
_ROUNDS = 12
_ENOUGH = 1e-3  # the last round is the first that lowers the error by a smaller share than this
_CHUNK = 2**22  # elements of the working tensor of one batch of normal equations
_DAMPING = 1e-6  # of the mean diagonal of the normal equations


class Weighted:
    """Weighted least squares, started from the truncation."""

    name = "weighted"
    description = "least error where the retain set has gradients"
    collector = Collector(gradients=(Delta(),))
    copies = 7  # an allowance: the dense edit, H, their product, and the normal equations

    def fit(self, edit: Edit, rank: int | float, sums: Mapping[str, GradientSums]) -> Factors:
        """The factors of least weighted error."""
        if is_exact(edit, rank):
            return factorize(edit, rank)
        dense = edit.B @ edit.A if isinstance(edit, Product) else edit
        start = factorize(dense, rank)
        H = sums["retain"].magnitudes()["weight"].to(dense.device, dense.dtype).square_()
        mean = float(H.mean())
        if mean == 0 or start.energy == 0:
            return start
        H = (H / mean).add_(_FLOOR)
        A, B, error = weighted_factors(dense, H, start.A, start.B)
        total = float((H * dense.square()).sum(dtype=torch.float64))
        return judged(edit, Factors(A, B, start.energy, 0.0), error / total)


def weighted_factors(edit: Tensor, H: Tensor, A: Tensor, B: Tensor) -> tuple[Tensor, Tensor, float]:
    """Alternating least squares on sum_ij H_ij (E - B A)_ij^2.

    Args:
        edit: E [O, I].
        H: the elements' weights > 0, [O, I].
        A: the start, [R, I].
        B: the start, [O, R].

    Returns:
        A [R, I], B [O, R] and their error.
    """
    target = H * edit
    best = A, B, _error(edit, H, A, B)
    for _ in range(_ROUNDS):
        B = _solved(H, target, A)
        A = _solved(H.T, target.T, B.T).T
        error = _error(edit, H, A, B)
        if not error < best[2]:
            break
        enough = error > (1 - _ENOUGH) * best[2]
        best = A, B, error
        if enough:
            break
    # Both factors get the same scale, which keeps them within the range of a 16-bit type.
    A, B, error = best
    scales = (A.norm(dim=1) / B.norm(dim=0).clamp_min(torch.finfo(B.dtype).tiny)).sqrt()
    scales = torch.where(scales > 0, scales, torch.ones_like(scales))
    return A / scales.unsqueeze(1), B * scales, error


def _solved(H: Tensor, target: Tensor, A: Tensor) -> Tensor:
    """The best B [O, R] for a given A.

    Row b_i minimises sum_j H_ij (E_ij - b_i . a_j)^2, so (A diag(H_i) A^T) b_i = A (H_i E_i).
    """
    rank, width = A.shape
    right = target @ A.T
    identity = torch.eye(rank, dtype=A.dtype, device=A.device)
    solved = torch.empty_like(right)
    rows = max(1, _CHUNK // (rank * width))
    for start in range(0, len(H), rows):
        chunk = slice(start, start + rows)
        normal = (A * H[chunk].unsqueeze(1)) @ A.T
        scale = normal.diagonal(dim1=1, dim2=2).mean(1).clamp_min(torch.finfo(A.dtype).tiny)
        normal += _DAMPING * scale[:, None, None] * identity
        solved[chunk] = torch.linalg.solve(normal, right[chunk])
    return solved


def _error(edit: Tensor, H: Tensor, A: Tensor, B: Tensor) -> float:
    return float((H * torch.addmm(edit, B, A, alpha=-1).square_()).sum(dtype=torch.float64))
