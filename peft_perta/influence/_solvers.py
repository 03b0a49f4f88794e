"""Solve (H + damping) D = b with matrix-vector products alone, and state the residual."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import NumericalError

_POWER_STEPS = 8


@dataclass(frozen=True)
class LinearSystem:
    """A x = b, with A known by its products.

    Attributes:
        apply: v [P] -> A v [P]; symmetric.
        b: [P].
        diagonal: roughly the diagonal of A [P], positive; it preconditions.
    """

    apply: Callable[[Tensor], Tensor]
    b: Tensor
    diagonal: Tensor

    def residual(self, vector: Tensor) -> Tensor:
        """b - A vector: [P]."""
        return self.b - self.apply(vector)


@dataclass(frozen=True)
class Stopping:
    """When a solver stops.

    Attributes:
        tolerance: at this relative residual.
        max_iterations: after this many products with A, at least 1.
        on_product: is told the relative residual after each product with A.
    """

    tolerance: float
    max_iterations: int
    on_product: Callable[[float], None]


@dataclass(frozen=True)
class Solution:
    """An approximate solution D.

    Attributes:
        vector: D [P].
        residual: |b - A D| / |b|, from a product with D itself and not from a recursion.
        iterations: number of products with A on the way.
        stopped: why the solver stopped: 'tolerance', 'iterations', or 'rounding' (the products are too inexact to go
            on).
    """

    vector: Tensor
    residual: float
    iterations: int
    stopped: str


def conjugate_gradients(system: LinearSystem, stopping: Stopping, *, is_definite: bool = False) -> Solution:
    """Conjugate gradients with a Jacobi preconditioner, restarted where the recursion drifts from the true residual.

    Args:
        system: the system.
        stopping: when to stop.
        is_definite: the matrix is known to be positive definite, so a negative curvature is rounding.

    Returns:
        The D with the smallest true residual; that is measured at every restart and at the end.

    Raises:
        NumericalError: the matrix is not positive definite, or the products are too inexact for a single step.

    Reference: Saad 2003, Iterative Methods for Sparse Linear Systems, algorithm 9.1.
    """
    norm = _norm(system.b)
    D, r, residual, iterations = torch.zeros_like(system.b), system.b, 1.0, 0
    best, smallest = D, math.inf
    while True:
        D, iterations, rounded = _recursion(system, stopping, D, r, iterations, is_definite)
        r = system.residual(D)
        previous, residual = residual, _norm(r) / norm
        if residual < smallest:
            best, smallest = D, residual
        if smallest <= stopping.tolerance:
            return Solution(best, smallest, iterations, "tolerance")
        if rounded and not bool(best.any()):
            raise NumericalError(
                "the products with the curvature are too inexact for a single step; compute in float32, or use more "
                "damping"
            )
        if iterations >= stopping.max_iterations:
            return Solution(best, smallest, iterations, "iterations")
        if rounded or residual > 0.9 * previous:
            return Solution(best, smallest, iterations, "rounding")


def _recursion(
    system: LinearSystem, stopping: Stopping, D: Tensor, r: Tensor, iterations: int, is_definite: bool
) -> tuple[Tensor, int, bool]:
    """Conjugate gradients from D, whose residual is r, until the recursion's own residual is small enough.

    Returns:
        D, the number of iterations with those before, and whether rounding stopped the recursion.
    """
    norm = _norm(system.b)
    z = r / system.diagonal
    p, rz = z, _dot(r, z)
    while iterations < stopping.max_iterations:
        Ap = system.apply(p)
        iterations += 1
        curvature = _dot(p, Ap)
        if curvature <= 0:
            if is_definite:
                return D, iterations, True
            raise NumericalError(
                f"the damped curvature is {curvature / _dot(p, p):.3g} along a direction (iteration {iterations}), "
                "expected it positive: the Hessian is indefinite there; use curvature='gauss-newton', which is never "
                "negative, or more damping"
            )
        alpha = rz / curvature
        D = D + alpha * p
        r = r - alpha * Ap
        stopping.on_product(_norm(r) / norm)
        if _norm(r) <= stopping.tolerance * norm:
            break
        z = r / system.diagonal
        rz, previous = _dot(r, z), rz
        p = z + (rz / previous) * p
    return D, iterations, False


def stochastic(
    system: LinearSystem, stopping: Stopping, *, apply_batch: Callable[[int, Tensor], Tensor], batches: int, seed: int
) -> Solution:
    """Preconditioned stochastic steps with reduced variance: one pass over the batches per product with A.

    An iteration computes the true residual r of D. It then visits every batch once, in random order, with
    d <- d - eta (A_i d - r) / diagonal from d = 0, and sets D <- D + d. The noise shrinks with d, so the residual goes
    to zero. A pass that does not lower the residual is undone, and eta is halved.

    Args:
        system: the system.
        stopping: when to stop; a product with A comes with a pass over the batches, which costs as much again.
        apply_batch: (batch, v) -> A_i v, whose mean over batches is A v.
        batches: number of batches.
        seed: of their order.

    Reference: Johnson and Zhang 2013, SVRG, for a quadratic.
    """
    norm, generator = _norm(system.b), torch.Generator().manual_seed(seed)
    eta = 1 / _largest_eigenvalue(apply_batch, batches, system.b / system.diagonal, system.diagonal)
    D, r, residual = torch.zeros_like(system.b), system.b, 1.0
    for iteration in range(1, stopping.max_iterations + 1):
        d = torch.zeros_like(system.b)
        for index in torch.randperm(batches, generator=generator).tolist():
            d = d - eta * (apply_batch(index, d) - r) / system.diagonal
        new_r = system.residual(D + d)
        new_residual = _norm(new_r) / norm
        if new_residual < residual:
            D, r, residual = D + d, new_r, new_residual
        else:  # larger, or not finite
            eta /= 2
        stopping.on_product(residual)
        if residual <= stopping.tolerance:
            return Solution(D, residual, iteration, "tolerance")
    return Solution(D, residual, stopping.max_iterations, "iterations")


def _largest_eigenvalue(
    apply_batch: Callable[[int, Tensor], Tensor], batches: int, v: Tensor, diagonal: Tensor
) -> float:
    """A rough largest eigenvalue of the preconditioned matrix, by power iteration in which each batch stands for A."""
    eigenvalue = 1.0
    for number in range(_POWER_STEPS):
        v = v / _norm(v)
        v = apply_batch(number % batches, v) / diagonal
        eigenvalue = _norm(v)
    return eigenvalue


def _dot(first: Tensor, second: Tensor) -> float:
    return float((first * second).sum(dtype=torch.float64))


def _norm(vector: Tensor) -> float:
    return float(torch.linalg.vector_norm(vector, dtype=torch.float64))
