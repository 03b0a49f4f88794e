"""The least error in the diagonal of the Kronecker-factored Fisher metric: sum_ij p_i q_j (E - B A)_ij^2.

q_j is the mean square of input j, p_i that of the gradient at output i, over both sets. Rows and columns are scaled by
the square roots of p and q, the edit is truncated, and the scaling is undone.

Reference: Martens and Grosse 2015, arXiv 1503.05671, for the metric.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from ...adapters import Edit, Factors, Product, factorize
from ...gradients import Collector, Energies, GradientSums
from .fit import is_exact, judged

_FLOOR = 1e-3  # of the mean energy: an unused input or output still counts a little, and its scaling can be undone


class Kronecker:
    """Truncation of the edit in scaled rows and columns."""

    name = "kronecker"
    description = "least error weighted by the energies of inputs and output gradients"
    collector = Collector(moments=(Energies(),))
    copies = 7  # an allowance: float64 energies, the scaled edit and its decomposition

    def fit(self, edit: Edit, rank: int | float, sums: Mapping[str, GradientSums]) -> Factors:
        """The factors of least error in the metric."""
        if is_exact(edit, rank):
            return factorize(edit, rank)
        rows, columns = (_roots(sums, name, edit) for name in ("output energy", "input energy"))
        if isinstance(edit, Product):
            scaled: Edit = Product(B=rows.unsqueeze(1) * edit.B, A=edit.A * columns)
        else:
            scaled = edit * columns
            scaled *= rows.unsqueeze(1)
        fitted = factorize(scaled, rank)
        unscaled = Factors(fitted.A / columns, fitted.B / rows.unsqueeze(1), fitted.energy, 0.0, fitted.excess_error)
        return judged(edit, unscaled, 1 - fitted.energy_kept)


def _roots(sums: Mapping[str, GradientSums], name: str, edit: Edit) -> Tensor:
    """The square roots of p [O] or q [I]."""
    like = edit.A if isinstance(edit, Product) else edit
    moments = [of_set.moments[name][0].to(like.device, torch.float64) for of_set in sums.values()]
    energy = sum(moment / moment.mean().clamp_min(torch.finfo(torch.float64).tiny) for moment in moments)
    return (energy + _FLOOR).sqrt().to(like.dtype)  # type: ignore[union-attr]
