"""The least error of the layer's outputs on both sets' inputs: E ||(E - B A) x||^2 = ||(E - B A) L||_F^2.

L is the Cholesky factor of C = L L^T, the sum of both sets' second input moments with a little of their mean energy
added to every direction. E L is truncated, and L is divided out again.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

from ...adapters import Edit, Factors, Product, factorize
from ...errors import UnsupportedLayerError
from ...gradients import Collector, GradientSums, InputMoments
from .._input_directions import cholesky_factor, damped
from .fit import is_exact, judged


class SecondMoment:
    """Truncation of the edit in the inputs' own directions."""

    name = "second-moment"
    description = "least error on the layers' inputs (keeps the model's function best)"
    collector = Collector(moments=(InputMoments(),))
    copies = 7  # an allowance: float64 moments, their Cholesky factor, the scaled edit and its decomposition

    def fit(self, edit: Edit, rank: int | float, sums: Mapping[str, GradientSums]) -> Factors:
        """The factors of least output error.

        Raises:
            UnsupportedLayerError: the layer is an expert's parameter, which has no input moments.
        """
        if is_exact(edit, rank):
            return factorize(edit, rank)
        rows = edit.A if isinstance(edit, Product) else edit
        moments = [of_set.moments for of_set in sums.values()]
        if not all("inputs" in of_set for of_set in moments):
            raise UnsupportedLayerError(
                "fit='second-moment' needs the layers' inputs, which are unknown for expert parameters; use "
                "fit='truncated' or 'weighted'"
            )
        C_f, C_r = (m["inputs"].to(rows.device, torch.float64) / m["tokens"].to(rows.device) for m in moments)
        C = damped(C_f, C_r)
        if C is None:  # every input was zero: all errors are the same
            return factorize(edit, rank)
        L = cholesky_factor(C).to(rows.dtype)
        scaled: Edit = Product(B=edit.B, A=edit.A @ L) if isinstance(edit, Product) else edit @ L
        fitted = factorize(scaled, rank)
        A = torch.linalg.solve_triangular(L, fitted.A, upper=False, left=False)
        unscaled = Factors(A, fitted.B, fitted.energy, 0.0, fitted.excess_error)
        return judged(edit, unscaled, 1 - fitted.energy_kept)
