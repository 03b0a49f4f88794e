"""Edit -> factors at a rank or an energy; the error of that step is a returned value."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .edit import Edit, Product


@dataclass(frozen=True)
class Factors:
    """B [O, R] @ A [R, I] approximates an edit.

    Attributes:
        energy: the edit's squared Frobenius norm.
        energy_kept: the share of it that the factors hold, in [0, 1]; 1 for an edit that is zero.
    """

    A: Tensor
    B: Tensor
    energy: float
    energy_kept: float

    @property
    def rank(self) -> int:
        return self.A.shape[0]

    def padded(self, rank: int) -> Factors:
        """The same product at a larger rank, with zeros."""
        missing = rank - self.rank
        A = torch.cat([self.A, self.A.new_zeros(missing, self.A.shape[1])])
        B = torch.cat([self.B, self.B.new_zeros(len(self.B), missing)], dim=1)
        return Factors(A, B, self.energy, self.energy_kept)


def factorize(edit: Edit, rank: int | float) -> Factors:
    """The best approximation in the Frobenius norm at a rank (int), or at the least rank that keeps a share of the
    energy.

    A product whose rank suffices is passed on as it is, exactly. Sign and strength are inside B.

    Reference: Eckart and Young 1936.
    """
    if isinstance(edit, Product):
        if isinstance(rank, int) and edit.A.shape[0] <= rank:
            # ||B A||^2 = trace((B^T B)(A A^T)): no [O, I] matrix for the norm either.
            energy = float(((edit.B.T @ edit.B) * (edit.A @ edit.A.T)).sum().clamp_min(0))
            return Factors(edit.A, edit.B, energy, 1.0)
        # B A = Q_B (R_B R_A^T) Q_A^T: the singular values are those of an [R, R] core.
        Q_B, R_B = torch.linalg.qr(edit.B)
        Q_A, R_A = torch.linalg.qr(edit.A.T)
        U, S, Vh = torch.linalg.svd(R_B @ R_A.T)
        U, Vh = Q_B @ U, Vh @ Q_A.T
    else:
        U, S, Vh = torch.linalg.svd(edit, full_matrices=False)
    energies = S.double().square()
    total = float(energies.sum())
    kept_rank = min(rank if isinstance(rank, int) else _rank_of_energy(energies, rank), len(S))
    kept = float(energies[:kept_rank].sum()) / total if total > 0 else 1.0
    # The singular values are split evenly, which keeps both factors within the range of a 16-bit type.
    root = S[:kept_rank].sqrt()
    return Factors(root.unsqueeze(1) * Vh[:kept_rank], U[:, :kept_rank] * root, total, min(kept, 1.0))


def _rank_of_energy(energies: Tensor, share: float) -> int:
    total = energies.sum()
    if total == 0:
        return 1
    reached = energies.cumsum(0) >= share * total * (1 - 1e-12)
    return int(reached.int().argmax()) + 1
