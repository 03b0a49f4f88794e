"""(H + damping) D = b, by products alone, to a stated residual."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import NumericalError

Product = Callable[[Tensor], Tensor]  # [P] -> [P]


Step = Callable[[float], None]  # is told the residual after each product with the whole


_POWER_STEPS = 8


@dataclass(frozen=True)
class Solution:
    """
    Attributes:
        vector: D [P].
        residual: |b - (H + damping) D| / |b|, of a product with D itself and not of the recursion.
        iterations: products with the whole matrix on the way.
        stopped: 'tolerance', 'iterations' (the most that were asked for), or 'rounding' (the products are not exact
            enough for more).
    """

    vector: Tensor
    residual: float
    iterations: int
    stopped: str


def conjugate_gradients(
    apply: Product,
    b: Tensor,
    diagonal: Tensor,
    *,
    tolerance: float,
    max_iterations: int,
    step: Step,
    is_definite: bool = False,
) -> Solution:
    """Conjugate gradients with a Jacobi preconditioner; started anew where the recursion and the truth part ways.

    Args:
        apply: v -> (H + damping) v, symmetric.
        diagonal: [P], positive: roughly the matrix's own.
        is_definite: the matrix is known to be positive definite: what shows otherwise is rounding.

    Returns:
        The D of the smallest residual among those at which one was measured: at each new start, and at the end.

    Raises:
        NumericalError: the matrix is not positive definite along a direction that is met, or the products are too
            inexact for a single step.

    Reference: Saad 2003, Iterative Methods for Sparse Linear Systems, algorithm 9.1.
    """
    norm = _norm(b)
    D, r, residual, iterations, rounded = torch.zeros_like(b), b, 1.0, 0, False
    best, smallest = D, math.inf
    while True:
        if iterations:
            r = b - apply(D)
            before, residual = residual, _norm(r) / norm
            if residual < smallest:
                best, smallest = D, residual
            if smallest <= tolerance:
                return Solution(best, smallest, iterations, "tolerance")
            if rounded and not bool(best.any()):
                raise NumericalError(
                    "the products with the curvature are too inexact for a single step; compute in float32, or give "
                    "more damping"
                )
            if iterations >= max_iterations:
                return Solution(best, smallest, iterations, "iterations")
            if rounded or residual > 0.9 * before:
                return Solution(best, smallest, iterations, "rounding")
        z = r / diagonal
        p, rz = z, _dot(r, z)
        while iterations < max_iterations:
            Ap = apply(p)
            iterations += 1
            curvature = _dot(p, Ap)
            rounded = is_definite and curvature <= 0
            if rounded:
                break
            if curvature <= 0:
                raise NumericalError(
                    f"the damped curvature is {curvature / _dot(p, p):.3g} along a direction (iteration {iterations}), "
                    "expected it positive: the Hessian is indefinite there; use curvature='gauss-newton', which never "
                    "is, or more damping"
                )
            alpha = rz / curvature
            D = D + alpha * p
            r = r - alpha * Ap
            step(_norm(r) / norm)
            if _norm(r) <= tolerance * norm:
                break
            z = r / diagonal
            rz, last = _dot(r, z), rz
            p = z + (rz / last) * p


def stochastic(
    apply: Product,
    apply_batch: Callable[[int, Tensor], Tensor],
    batches: int,
    b: Tensor,
    diagonal: Tensor,
    *,
    tolerance: float,
    max_iterations: int,
    seed: int,
    step: Step,
) -> Solution:
    """Preconditioned stochastic steps with reduced variance: a pass over the batches for each product with the whole.

    The true residual r of D is computed; then every batch once, in a drawn order, d <- d - eta ((H_i + damping) d - r)
    / diagonal, from d = 0; then D <- D + d. The noise shrinks with d, so that the residual goes to zero. A pass that
    does not lower it is undone, and eta halved.

    Args:
        apply_batch: (batch, v) -> (H_i + damping) v, whose mean over batches is ``apply``.
        max_iterations: products with the whole; each costs a second pass, of steps.

    Reference: Johnson and Zhang 2013, SVRG, of the quadratic.
    """
    norm, generator = _norm(b), torch.Generator().manual_seed(seed)
    eta = 1 / _largest(apply_batch, batches, b / diagonal, diagonal)
    D, r, residual = torch.zeros_like(b), b, 1.0
    for iteration in range(1, max_iterations + 1):
        d = torch.zeros_like(b)
        for index in torch.randperm(batches, generator=generator).tolist():
            d = d - eta * (apply_batch(index, d) - r) / diagonal
        new = b - apply(D + d)
        found = _norm(new) / norm
        if not found < residual:
            eta /= 2
        else:
            D, r, residual = D + d, new, found
        step(residual)
        if residual <= tolerance:
            return Solution(D, residual, iteration, "tolerance")
    return Solution(D, residual, max_iterations, "iterations")


def _largest(apply_batch: Callable[[int, Tensor], Tensor], batches: int, v: Tensor, diagonal: Tensor) -> float:
    """The largest eigenvalue of the preconditioned matrix, roughly, by powers of it; a batch stands for the whole."""
    size = 1.0
    for number in range(_POWER_STEPS):
        v = v / _norm(v)
        v = apply_batch(number % batches, v) / diagonal
        size = _norm(v)
    return size


def _dot(one: Tensor, other: Tensor) -> float:
    return float((one * other).sum(dtype=torch.float64))


def _norm(vector: Tensor) -> float:
    return float(torch.linalg.vector_norm(vector, dtype=torch.float64))
