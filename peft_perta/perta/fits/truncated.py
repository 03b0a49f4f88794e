"""The leading singular vectors: the least error in the Frobenius norm."""

from __future__ import annotations

from collections.abc import Mapping

from ...adapters import Edit, Factors, factorize
from ...gradients import GradientSums


class Truncated:
    name = "truncated"
    collector = None

    def fit(self, edit: Edit, rank: int | float, measured: Mapping[str, GradientSums]) -> Factors:
        return factorize(edit, rank)
