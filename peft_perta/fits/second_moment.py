"""Least error of the layer's outputs on both sets' inputs: E ||(E - B A) x||^2 = ||(E - B A) C^(1/2)||_F^2.

C is the mean of the two sets' second moments (sketched where the input is wide) plus a little of their mean energy on
every direction. With T = C^(1/2), E T is truncated and T taken off again.
"""

from __future__ import annotations

from collections.abc import Mapping

from ..directions import mean_root
from ..edit import Edit, Product
from ..errors import UnsupportedLayerError
from ..factorize import Factors, factorize
from ..moments import InputMoments
from ..statistics import Statistic
from .fit import is_exact, judged


class SecondMoment:
    name = "second-moment"
    reader = InputMoments()

    def fit(self, edit: Edit, rank: int | float, measured: Mapping[str, Statistic]) -> Factors:
        if is_exact(edit, rank):
            return factorize(edit, rank)
        moments = [found.moments() for found in measured.values()]
        if not all("inputs" in found for found in moments):
            raise UnsupportedLayerError(
                "fit='second-moment' needs the layers' inputs, which are not met for expert parameters; use "
                "fit='truncated' or 'weighted'"
            )
        root = mean_root(*moments)
        if isinstance(edit, Product):
            scaled: Edit = Product(B=edit.B, A=root.times(edit.A))
        else:
            scaled = root.times(edit)
        found = factorize(scaled, rank)
        A = root.undone(found.A)
        unscaled = Factors(A, found.B, found.energy, 0.0, found.excess_error)
        return judged(edit, unscaled, 1 - found.energy_kept)
