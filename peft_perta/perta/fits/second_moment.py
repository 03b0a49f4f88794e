"""Least error of the layer's outputs on both sets' inputs: E ||(E - B A) x||^2 = ||(E - B A) L||_F^2.

L L^T = C is the Cholesky factor of the two sets' second moments, added up, with a little of their mean energy on every
direction. E L is truncated, and L taken off again.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

from ...adapters import Edit, Factors, Product, factorize
from ...errors import UnsupportedLayerError
from ...gradients import GradientSums, InputMoments
from .._input_directions import damped, root
from .fit import is_exact, judged


class SecondMoment:
    name = "second-moment"
    collector = InputMoments()

    def fit(self, edit: Edit, rank: int | float, measured: Mapping[str, GradientSums]) -> Factors:
        if is_exact(edit, rank):
            return factorize(edit, rank)
        rows = edit.A if isinstance(edit, Product) else edit
        moments = [found.moments() for found in measured.values()]
        if not all("inputs" in found for found in moments):
            raise UnsupportedLayerError(
                "fit='second-moment' needs the layers' inputs, which are not met for expert parameters; use "
                "fit='truncated' or 'weighted'"
            )
        C = damped(*(m["inputs"].to(rows.device, torch.float64) / m["tokens"].to(rows.device) for m in moments))
        if C is None:  # no input was ever different from zero: every error is the same
            return factorize(edit, rank)
        L = root(C).to(rows.dtype)
        scaled: Edit = Product(B=edit.B, A=edit.A @ L) if isinstance(edit, Product) else edit @ L
        found = factorize(scaled, rank)
        A = torch.linalg.solve_triangular(L, found.A, upper=False, left=False)
        unscaled = Factors(A, found.B, found.energy, 0.0, found.excess_error)
        return judged(edit, unscaled, 1 - found.energy_kept)
