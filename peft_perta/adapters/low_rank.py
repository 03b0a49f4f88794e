"""Edit -> factors at a rank or an energy; the error of that step is a returned value."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Product:
    """An edit held as factors: B [O, R] @ A [R, I]. No [O, I] matrix exists."""

    B: Tensor
    A: Tensor


Edit = Tensor | Product  # an edit of one layer: dense [O, I], or a product


# The fit of a dense edit may lose this share of the best fit's squared error, by its own bound, before it is repeated.
EXCESS = 0.005


_MOST_ITERATIONS = 12


@dataclass(frozen=True)
class Factors:
    """B [O, R] @ A [R, I] approximates an edit.

    Attributes:
        energy: the edit's squared Frobenius norm.
        energy_kept: the share of it that the factors hold, in [0, 1]; 1 for an edit that is zero.
        excess_error: how much larger the squared error may be than the best one at this rank, as a share of it; 0
            where the fit is exact. A bound where the leading subspace was found; on flat spectra (noise, nearly equal
            singular values) the true excess was seen up to 2.4 times this, and below 0.6 %.
        metric_error: the share of the edit that the factors lose in the measure that they were fitted in; of a
            truncation in the Frobenius norm, the rest of ``energy_kept``.
    """

    A: Tensor
    B: Tensor
    energy: float
    energy_kept: float
    excess_error: float = 0.0
    metric_error: float = 0.0

    @property
    def rank(self) -> int:
        return self.A.shape[0]

    def padded(self, rank: int) -> Factors:
        """The same product at a larger rank, with zeros."""
        missing = rank - self.rank
        A = torch.cat([self.A, self.A.new_zeros(missing, self.A.shape[1])])
        B = torch.cat([self.B, self.B.new_zeros(len(self.B), missing)], dim=1)
        return dataclasses.replace(self, A=A, B=B)


def factorize(edit: Edit, rank: int | float) -> Factors:
    """The best approximation in the Frobenius norm at a rank (int), or at the least rank that keeps a share of the
    energy.

    A product whose rank suffices is passed on as it is, exactly. A dense edit much larger than its rank is fitted by
    subspace iteration, whose error is bounded in ``excess_error``. Sign and strength are inside B.

    Reference: Eckart and Young 1936; Halko, Martinsson and Tropp 2011, arXiv 0909.4061.
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
        return _truncated(Q_B @ U, S, Vh @ Q_A.T, rank)
    tried = rank if isinstance(rank, int) else 16
    while _sketch_rank(tried) <= min(edit.shape) // 4:
        fitted = _subspace_iteration(edit, tried)
        if fitted is None:
            break
        if isinstance(rank, int):
            return fitted
        if fitted.energy_kept >= rank:
            return _least(fitted, rank)
        tried *= 2
    U, S, Vh = torch.linalg.svd(edit, full_matrices=False)
    return _truncated(U, S, Vh, rank)


def _truncated(U: Tensor, S: Tensor, Vh: Tensor, rank: int | float) -> Factors:
    """The leading part of a singular value decomposition."""
    energies = S.double().square()
    total = float(energies.sum())
    kept_rank = min(rank if isinstance(rank, int) else _rank_of_energy(energies, rank), len(S))
    kept = float(energies[:kept_rank].sum()) / total if total > 0 else 1.0
    A, B = _balanced(U, S, Vh, kept_rank)
    kept = min(kept, 1.0)
    return Factors(A, B, total, kept, metric_error=1 - kept)


def _balanced(U: Tensor, S: Tensor, Vh: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    # The singular values are split evenly, which keeps both factors within the range of a 16-bit type.
    root = S[:rank].sqrt()
    return root.unsqueeze(1) * Vh[:rank], U[:, :rank] * root


def _sketch_rank(rank: int) -> int:
    return rank + max(rank, 8)


def _subspace_iteration(edit: Tensor, rank: int) -> Factors | None:
    """The leading singular subspace, by products with the edit alone: two [O, I] x [I, L] products an iteration.

    The bound. Let Q [O, k] hold the leading left Ritz vectors, S their values, and C = (1 - Q Q^T) E E^T Q what the
    subspace still leaks. In the basis of Q and its complement, E E^T is a block diagonal matrix plus the off-diagonal
    blocks C, C^T. Ky Fan: the k largest eigenvalues of a sum are at most those of its parts, added up. The block
    diagonal's are the S^2 where the complement holds nothing larger (so it is where there is a gap, and not where
    singular values are nearly equal: there this is an estimate); the off-diagonal blocks' are at most the singular
    values of C. So the best fit of rank k keeps at most sum(sigma(C)) more energy than this one.

    Returns None where the bound is not reached in time.
    """
    total = float(torch.linalg.vector_norm(edit, dtype=torch.float64) ** 2)
    if total == 0:
        return Factors(edit.new_zeros(rank, edit.shape[1]), edit.new_zeros(len(edit), rank), 0.0, 1.0)
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(edit.shape[1], _sketch_rank(rank), generator=generator, dtype=edit.dtype).to(edit.device)
    Q = torch.linalg.qr(edit @ start).Q
    for _ in range(_MOST_ITERATIONS):
        projected = Q.T @ edit  # [L, I]
        image = edit @ projected.T  # E E^T Q
        U, S, Vh = torch.linalg.svd(projected, full_matrices=False)
        leading = Q @ U[:, :rank]
        leaked = image @ U[:, :rank] - leading * S[:rank].square()
        kept = float(S[:rank].double().square().sum())
        missed = float(torch.linalg.svdvals(leaked).double().sum())
        # What rounding alone leaves in each product.
        floor = 8 * torch.finfo(edit.dtype).eps * kept
        error = max(total - kept, floor)
        if missed <= EXCESS * error or missed <= floor:
            A, B = _balanced(leading, S, Vh, rank)
            share = min(kept / total, 1.0)
            excess = min(missed, error) / error if missed > floor else 0.0
            return Factors(A, B, total, share, excess, metric_error=1 - share)
        Q = torch.linalg.qr(image).Q
    return None


def _least(fitted: Factors, share: float) -> Factors:
    """As few of the factors as keep a share of the energy; the singular values are the columns' squared norms."""
    energies = fitted.B.double().square().sum(0).square()
    reached = energies.cumsum(0) >= share * fitted.energy * (1 - 1e-12)
    rank = int(reached.int().argmax()) + 1 if bool(reached.any()) else len(energies)
    kept = min(float(energies[:rank].sum()) / fitted.energy, 1.0) if fitted.energy else 1.0
    A, B = fitted.A[:rank], fitted.B[:, :rank]
    return dataclasses.replace(fitted, A=A, B=B, energy_kept=kept, metric_error=1 - kept)


def _rank_of_energy(energies: Tensor, share: float) -> int:
    total = energies.sum()
    if total == 0:
        return 1
    reached = energies.cumsum(0) >= share * total * (1 - 1e-12)
    return int(reached.int().argmax()) + 1
