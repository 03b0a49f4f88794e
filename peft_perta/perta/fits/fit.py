"""The contract of a fit, and what all fits share."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Protocol

import torch

from ...adapters import Edit, Factors, Product
from ...gradients import Collector, GradientSums


class Fit(Protocol):
    """From an edit to factors of a rank, with the least error in the fit's own measure.

    Where the rank holds the edit exactly, every fit passes it on unchanged.

    Attributes:
        name: the name in configs and provenance.
        description: one line for help texts.
        collector: what must be summed of each layer for the measure.
        copies: how many more copies of a layer's sums the fit needs in memory, beyond the three that every edit needs
            (magnitudes, weights, edit). The plan leaves room for them.
    """

    name: str
    description: str
    copies: int

    @property
    def collector(self) -> Collector: ...

    def fit(self, edit: Edit, rank: int | float, sums: Mapping[str, GradientSums]) -> Factors:
        """The factors.

        Args:
            edit: the edit of one layer.
            rank: an int for the rank itself; a float for the smallest rank that keeps this share of the measure.
            sums: 'forget' and 'retain' -> the sums that ``collector`` asks for.
        """
        ...


def is_exact(edit: Edit, rank: int | float) -> bool:
    """Whether the rank holds the edit as it is."""
    return isinstance(edit, Product) and isinstance(rank, int) and edit.A.shape[0] <= rank


def judged(edit: Edit, factors: Factors, metric_error: float) -> Factors:
    """The factors with two figures: the share of the edit's squared Frobenius norm that they keep, and the share that
    they lose in the fit's measure.

    ||E - B A||^2 = ||E||^2 - 2 tr(B^T E A^T) + ||B A||^2.
    """
    A, B = factors.A.double(), factors.B.double()
    if isinstance(edit, Product):
        E_A, E_B = edit.A.double(), edit.B.double()
        energy = float(((E_B.T @ E_B) * (E_A @ E_A.T)).sum())
        inner = float(((E_B.T @ B) * (E_A @ A.T)).sum())
    else:
        energy = float(torch.linalg.vector_norm(edit, dtype=torch.float64) ** 2)
        inner = float(((edit @ factors.A.T.to(edit.dtype)).double() * B).sum())
    error = energy - 2 * inner + float(((B.T @ B) * (A @ A.T)).sum())
    energy_kept = 1 - max(error, 0.0) / energy if energy > 0 else 1.0
    return dataclasses.replace(
        factors,
        energy=max(energy, 0.0),
        energy_kept=min(max(energy_kept, 0.0), 1.0),
        metric_error=max(metric_error, 0.0),
    )
