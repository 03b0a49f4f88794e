"""Least error in the diagonal of the Kronecker-factored Fisher metric: sum_ij p_i q_j (E - B A)_ij^2.

q_j is the mean square of input j, p_i that of the gradient at output i, over both sets. Rows and columns are scaled by
their roots, truncated, and scaled back.

Reference: Martens and Grosse 2015, arXiv 1503.05671, for the metric.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from ...adapters import Edit, Factors, Product, factorize
from ...gradients import Energies, GradientSums
from .fit import is_exact, judged

_FLOOR = 1e-3  # of the mean energy: what no row ever uses still costs a little, and can be scaled back


class Kronecker:
    name = "kronecker"
    collector = Energies()

    def fit(self, edit: Edit, rank: int | float, measured: Mapping[str, GradientSums]) -> Factors:
        if is_exact(edit, rank):
            return factorize(edit, rank)
        rows, columns = (_roots(measured, name, edit) for name in ("output energy", "input energy"))
        if isinstance(edit, Product):
            scaled: Edit = Product(B=rows.unsqueeze(1) * edit.B, A=edit.A * columns)
        else:
            scaled = edit * columns
            scaled *= rows.unsqueeze(1)
        found = factorize(scaled, rank)
        unscaled = Factors(found.A / columns, found.B / rows.unsqueeze(1), found.energy, 0.0, found.excess_error)
        return judged(edit, unscaled, 1 - found.energy_kept)


def _roots(measured: Mapping[str, GradientSums], name: str, edit: Edit) -> Tensor:
    like = edit.A if isinstance(edit, Product) else edit
    moments = [s.moments()[name][0].to(like.device, torch.float64) for s in measured.values()]
    energy = sum(moment / moment.mean().clamp_min(torch.finfo(torch.float64).tiny) for moment in moments)
    return (energy + _FLOOR).sqrt().to(like.dtype)  # type: ignore[union-attr]
