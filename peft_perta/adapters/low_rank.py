"""Approximate an edit by low-rank factors, at a given rank or share of its energy, and return the error."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Product:
    """An edit given as factors: B [O, R] @ A [R, I]. The [O, I] matrix is never formed."""

    B: Tensor
    A: Tensor


Edit = Tensor | Product  # an edit of one layer: dense [O, I], or a product


# Subspace iteration stops once its squared error exceeds the best one by at most this share, by its own bound.
EXCESS = 0.005
_MOST_ITERATIONS = 12


@dataclass(frozen=True)
class Factors:
    """Factors B [O, R] @ A [R, I] that approximate an edit.

    Attributes:
        A: [R, I].
        B: [O, R].
        energy: the edit's squared Frobenius norm.
        energy_kept: the share of that energy that the factors hold, in [0, 1]; 1 for an edit of zeros.
        excess_error: by which share the squared error may exceed the best one at this rank; 0 where the fit is exact.
            It is a bound where the leading subspace was found. On flat spectra (noise, nearly equal singular values) it
            is an estimate: the largest true excess seen was 2.4 times as large, and below 0.6 %.
        metric_error: the share of the edit that the factors lose in the measure of the fit. For a truncation in the
            Frobenius norm it is 1 - ``energy_kept``.
    """

    A: Tensor
    B: Tensor
    energy: float
    energy_kept: float
    excess_error: float = 0.0
    metric_error: float = 0.0

    @property
    def rank(self) -> int:
        """R, the number of columns of B."""
        return self.A.shape[0]

    def padded(self, rank: int) -> Factors:
        """The same product at a larger rank, padded with zeros."""
        missing = rank - self.rank
        A = torch.cat([self.A, self.A.new_zeros(missing, self.A.shape[1])])
        B = torch.cat([self.B, self.B.new_zeros(len(self.B), missing)], dim=1)
        return dataclasses.replace(self, A=A, B=B)


def factorize(edit: Edit, rank: int | float) -> Factors:
    """The best low-rank approximation of an edit in the Frobenius norm.

    A product of small enough rank is returned unchanged, so it stays exact. A dense edit that is much larger than the
    rank is fitted by subspace iteration; ``excess_error`` bounds its error. Any other edit is fitted by a full singular
    value decomposition. The edit's sign and strength end up in B.

    Args:
        edit: the edit, dense [O, I] or a product.
        rank: the rank, as an int; or the share of the energy to keep, as a float, for the smallest such rank.

    Returns:
        The factors, and the error of the approximation.

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
    sketched = rank if isinstance(rank, int) else 16
    while _sketch_rank(sketched) <= min(edit.shape) // 4:
        fitted = _subspace_iteration(edit, sketched)
        if fitted is None:
            break
        if isinstance(rank, int):
            return fitted
        if fitted.energy_kept >= rank:
            return _shortened(fitted, rank)
        sketched *= 2
    U, S, Vh = torch.linalg.svd(edit, full_matrices=False)
    return _truncated(U, S, Vh, rank)


def _truncated(U: Tensor, S: Tensor, Vh: Tensor, rank: int | float) -> Factors:
    """The leading part of a singular value decomposition."""
    energies = S.double().square()
    total = float(energies.sum())
    kept_rank = min(rank if isinstance(rank, int) else _smallest_rank(energies, rank * total), len(S))
    share = min(float(energies[:kept_rank].sum()) / total, 1.0) if total > 0 else 1.0
    A, B = _balanced(U, S, Vh, kept_rank)
    return Factors(A, B, total, share, metric_error=1 - share)


def _balanced(U: Tensor, S: Tensor, Vh: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    # Each factor gets the square root of the singular values, which keeps both within the range of a 16-bit type.
    root = S[:rank].sqrt()
    return root.unsqueeze(1) * Vh[:rank], U[:, :rank] * root


def _sketch_rank(rank: int) -> int:
    return rank + max(rank, 8)


def _subspace_iteration(edit: Tensor, rank: int) -> Factors | None:
    """The leading singular subspace by products with the edit: two [O, I] x [I, L] products per iteration.

    The bound: let Q [O, R] hold the leading left Ritz vectors, S their values, and C = (1 - Q Q^T) E E^T Q the part
    that the subspace leaks. In the basis of Q and its complement, E E^T is a block diagonal matrix plus the
    off-diagonal blocks C and C^T. By Ky Fan, the sum of the R largest eigenvalues of a sum of matrices is at most the
    sum of theirs. Those of the block diagonal are S^2 if the complement holds nothing larger. That is so where the
    spectrum has a gap; where singular values are nearly equal, this makes the bound an estimate. Those of the
    off-diagonal blocks are at most the singular values of C. So the best fit of rank R keeps at most sum(sigma(C)) more
    energy than this one.

    Returns:
        The factors; None where the bound is not reached within ``_MOST_ITERATIONS``.
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
        # The error that rounding alone leaves in each product.
        floor = 8 * torch.finfo(edit.dtype).eps * kept
        error = max(total - kept, floor)
        if missed <= EXCESS * error or missed <= floor:
            A, B = _balanced(leading, S, Vh, rank)
            share = min(kept / total, 1.0)
            excess = min(missed, error) / error if missed > floor else 0.0
            return Factors(A, B, total, share, excess, metric_error=1 - share)
        Q = torch.linalg.qr(image).Q
    return None


def _shortened(fitted: Factors, share: float) -> Factors:
    """The fewest of the factors that keep a share of the energy.

    The factors are balanced, so the squared norm of a column of B is its singular value.
    """
    energies = fitted.B.double().square().sum(0).square()
    rank = _smallest_rank(energies, share * fitted.energy)
    kept = min(float(energies[:rank].sum()) / fitted.energy, 1.0) if fitted.energy else 1.0
    A, B = fitted.A[:rank], fitted.B[:, :rank]
    return dataclasses.replace(fitted, A=A, B=B, energy_kept=kept, metric_error=1 - kept)


def _smallest_rank(energies: Tensor, needed: float) -> int:
    """How many of the leading energies add up to the needed one; all of them where they fall short of it."""
    reached = energies.cumsum(0) >= needed * (1 - 1e-12)
    return int(reached.int().argmax()) + 1 if bool(reached.any()) else len(energies)
