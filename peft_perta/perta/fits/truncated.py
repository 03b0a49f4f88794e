"""The leading singular vectors: the least error in the Frobenius norm."""

from __future__ import annotations

from collections.abc import Mapping

from ...adapters import Edit, Factors, factorize
from ...gradients import Statistic


class Truncated:
    name = "truncated"
    reader = None

    def fit(self, edit: Edit, rank: int | float, measured: Mapping[str, Statistic]) -> Factors:
        return factorize(edit, rank)
