"""Row weights times column weights: W = sqrt(u v^T), exact at the forget adapter's own rank.

The statistics are row and column energies of the pulled-back gradients of ``factor``,

    rows_i = || (G A^T)_i ||  [O]          columns_j = || (B^T G)_j ||  [I]

which is how much the loss moves with row i, or column j, inside the subspace in which the adapter can move it
(Adafactor keeps the same two vectors of the whole gradient). A row and a column both vouch for an element, hence the
geometric mean: the weights stay in [0, 1], and ratios of 1/2 everywhere give 1/2.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ...adapters import Edit
from ...gradients import Outer
from ...model import Target
from ..task_vectors import weighted_rows_columns
from .factor import factor_shapes, pulled_back


class Separable:
    name = "separable"

    def gradient(self, target: Target, layer_input: Tensor, output_gradient: Tensor | None) -> dict[str, Outer]:
        return pulled_back(target, layer_input, output_gradient)

    def shapes(self, target: Target) -> dict[str, tuple[int, int]]:
        return factor_shapes(target)

    def arrange(self, magnitudes: dict[str, Tensor]) -> dict[str, Tensor]:
        return {"rows": magnitudes["B"].norm(dim=1), "columns": magnitudes["A"].norm(dim=0)}

    def edit(self, target: Target, weights: dict[str, Tensor], strength: float) -> Edit:
        rows, columns = weights["rows"].sqrt(), weights["columns"].sqrt()
        return weighted_rows_columns(target.A, target.B, target.scaling, rows, columns, strength)

    def uniform(self, target: Target) -> dict[str, Tensor]:
        return {"rows": torch.ones_like(target.B[:, 0]), "columns": torch.ones_like(target.A[0])}
