"""The leading singular vectors: the least error in the Frobenius norm."""

from __future__ import annotations

from collections.abc import Mapping

from ...adapters import Edit, Factors, factorize
from ...gradients import Collector, GradientSums


class Truncated:
    """Truncated singular value decomposition."""

    name = "truncated"
    description = "least Frobenius error"
    collector = Collector()
    copies = 0

    def fit(self, edit: Edit, rank: int | float, sums: Mapping[str, GradientSums]) -> Factors:
        """The leading singular vectors; the sums are not used."""
        return factorize(edit, rank)
