"""The contract of a fit."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Protocol

import torch

from ...adapters import Edit, Factors, Product
from ...gradients import Collector, GradientSums


class Fit(Protocol):
    """An edit -> factors of a rank, at the least error in this fit's own measure.

    Attributes:
        name: as the config calls it.
        reader: what must be read of each layer for that measure; None where nothing is.
    """

    name: str

    @property
    def collector(self) -> Collector | None: ...

    def fit(self, edit: Edit, rank: int | float, measured: Mapping[str, GradientSums]) -> Factors:
        """Factors at a rank (int), or at the least rank that keeps a share of the measure (float).

        ``measured`` holds the 'forget' and the 'retain' set's statistic of what the reader reads.
        """
        ...


def is_exact(edit: Edit, rank: int | float) -> bool:
    """Whether the rank holds the edit as it is."""
    return isinstance(edit, Product) and isinstance(rank, int) and edit.A.shape[0] <= rank


def judged(edit: Edit, factors: Factors, metric_error: float) -> Factors:
    """The factors with the shares of the edit that they keep in the squared Frobenius norm, and lose in the measure.

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
    kept = 1 - max(error, 0.0) / energy if energy > 0 else 1.0
    return dataclasses.replace(
        factors, energy=max(energy, 0.0), energy_kept=min(max(kept, 0.0), 1.0), metric_error=max(metric_error, 0.0)
    )
