"""Row weights times column weights: W = sqrt(u v^T), exact at the forget adapter's own rank.

The magnitudes are row and column norms of the pulled-back gradients of ``factor``,

    rows_i = || (G A^T)_i ||  [O]          columns_j = || (B^T G)_j ||  [I]

that is, how much the loss moves with row i or column j within the subspace that the adapter can reach (Adafactor keeps
the same two vectors for the whole gradient). An element's weight is the geometric mean of its row's and its column's:
it stays in [0, 1], and ratios of 1/2 everywhere give 1/2.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ...adapters import Edit
from ...gradients import Outer, Shape
from ...model import Target
from ..task_vectors import weighted_rows_columns
from .factor import factor_shapes, pulled_back


class Separable:
    """One weight per row and one per column."""

    name = "separable"
    description = "rows times columns (exact at the forget adapter's rank; for comparison)"

    def gradient(self, target: Target, layer_input: Tensor, output_gradient: Tensor | None) -> dict[str, Outer]:
        """The factors' gradients, A [R, I] and B [O, R]."""
        return pulled_back(target, layer_input, output_gradient)

    def shapes(self, target: Target) -> dict[str, Shape]:
        """Those of the factors."""
        return factor_shapes(target)

    def arrange(self, magnitudes: dict[str, Tensor]) -> dict[str, Tensor]:
        """Norms of rows [O] and of columns [I]."""
        return {"rows": magnitudes["B"].norm(dim=1), "columns": magnitudes["A"].norm(dim=0)}

    def edit(self, target: Target, weights: dict[str, Tensor], strength: float) -> Edit:
        """-strength * s * (diag(sqrt(u)) B) @ (A diag(sqrt(v))), as a product."""
        rows, columns = weights["rows"].sqrt(), weights["columns"].sqrt()
        return weighted_rows_columns(target.A, target.B, target.scaling, rows, columns, strength)

    def uniform(self, target: Target) -> dict[str, Tensor]:
        """Ones, [O] and [I]."""
        return {"rows": torch.ones_like(target.B[:, 0]), "columns": torch.ones_like(target.A[0])}
