"""Directions of a layer's input space, and how much each set's rows use them.

An edit E changes a layer's output by E x. On the rows to keep it should change nothing, on the rows to forget it should
do all that the task vector's negative, N, does. Least squares says which matrix on the input side does that best,

    min_M  sum_forget ||(N M - N) x||^2 + sum_retain ||N M x||^2      =>      M = C_f (C_f + C_r)^-1 ,

C_f and C_r being the second moments of the inputs. M weighs, in [0, 1], the directions in which both are diagonal, by
f / (f + r): it is the ratio of PerTA in the basis where inputs do not mix, instead of the basis of neurons. Any
weighting of the same f and r makes a matrix too, and N M has the rank of N: no refitting, no [O, I] matrix.

A little of the mean energy (``DAMPING``) is added to what must stay, so that directions that hardly any row uses get
weights near 0: nothing known, nothing changed. The ratio and the least-squares form are ours; the least-squares view
follows MEMIT (Meng et al. 2023, arXiv 2210.07229), the sketch Tropp et al. 2017, arXiv 1706.05736.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .edit import Edit, Product
from .moments import sketch_directions

DAMPING = 0.01  # of the mean energy of a direction, over both sets


@dataclass(frozen=True)
class Directions:
    """K directions that span what both sets' inputs use.

    Attributes:
        onto: [I, K]; E @ onto are the edit's components.
        back: [K, I]; ``onto @ back`` is the projection onto their span.
        forget: [K], each direction's share of energy that is the forget set's, in [0, 1].
        retain: [K], the rest of it.
    """

    onto: Tensor
    back: Tensor
    forget: Tensor
    retain: Tensor


def find_directions(forget: dict[str, Tensor], retain: dict[str, Tensor]) -> Directions:
    """The directions in which both second moments are diagonal, from ``Statistic.moments()`` of each set.

    With S = C_f + C_r + damping = L L^T and L^-1 C_f L^-T = U diag(f) U^T, the columns of L U are those directions:
    C_f = L U diag(f) U^T L^T, and S - C_f, the same with 1 - f. Then C_f S^-1 = (L U) diag(f) (U^T L^-1).
    """
    factors = [_square_root(moments["inputs"]) / moments["tokens"].double().sqrt() for moments in (forget, retain)]
    basis = torch.linalg.qr(torch.cat(factors, dim=1)).Q  # [I, K]: all that either set's inputs span
    C_f, C_r = ((basis.T @ factor) @ (basis.T @ factor).T for factor in factors)
    S = C_f + C_r
    identity = torch.eye(len(S), dtype=S.dtype, device=S.device)
    mean = float(S.diagonal().sum()) / len(basis)
    if mean == 0:  # no input was ever different from zero
        return Directions(basis, basis.T, torch.zeros_like(S[0]), torch.ones_like(S[0]))
    L = torch.linalg.cholesky(S + DAMPING * mean * identity)
    whitened = torch.linalg.solve_triangular(L, torch.linalg.solve_triangular(L, C_f, upper=False).T, upper=False)
    f, U = torch.linalg.eigh((whitened + whitened.T) / 2)
    f = f.clamp(0, 1)
    back = torch.linalg.solve_triangular(L.T, U, upper=True).T @ basis.T
    return Directions(basis @ (L @ U), back, f, 1 - f)


def along_directions(edit: Edit, directions: Directions, weights: Tensor) -> Edit:
    """E @ (onto diag(w) back): an edit of the same form and no larger rank; w [K] in [0, 1]."""
    onto, back, w = (t.to(directions.onto.dtype) for t in (directions.onto, directions.back, weights))
    if isinstance(edit, Product):
        return Product(B=edit.B, A=(((edit.A.to(onto.dtype) @ onto) * w) @ back).to(edit.A.dtype))
    dtype = edit.dtype
    return (edit @ (onto * w).to(dtype)) @ back.to(dtype)


def _square_root(moment: Tensor) -> Tensor:
    """F [I, K] with F F^T the moment [I, I], or what its sketch [I, K] tells of it; float64."""
    moment = moment.double()
    sketch = sketch_directions(len(moment))
    if sketch is None:
        values, vectors = torch.linalg.eigh((moment + moment.T) / 2)
        return vectors * values.clamp_min(0).sqrt()
    # Nystroem: C is about Y (Omega^T Y)^+ Y^T for Y = C Omega; what rounding leaves of the core is left out.
    core = sketch.to(moment.device).T @ moment
    values, vectors = torch.linalg.eigh((core + core.T) / 2)
    known = values > 1e-6 * values[-1].clamp_min(0)
    return moment @ (vectors[:, known] / values[known].sqrt())


@dataclass(frozen=True)
class Root:
    """C^(1/2) = rest (1 - Q Q^T) + Q diag(roots) Q^T, symmetric, without an [I, I] matrix where I is large.

    Attributes:
        basis: Q [I, K], orthonormal.
        roots: [K].
        rest: what every other direction is multiplied by.
    """

    basis: Tensor
    roots: Tensor
    rest: float

    def times(self, matrix: Tensor) -> Tensor:
        """matrix [*, I] @ C^(1/2)."""
        return self._apply(matrix, self.roots, self.rest)

    def undone(self, matrix: Tensor) -> Tensor:
        """matrix [*, I] @ C^(-1/2)."""
        return self._apply(matrix, 1 / self.roots, 1 / self.rest)

    def _apply(self, matrix: Tensor, roots: Tensor, rest: float) -> Tensor:
        basis = self.basis.to(matrix.dtype)
        components = matrix @ basis
        return rest * matrix + (components * (roots - rest).to(matrix.dtype)) @ basis.T


def mean_root(forget: dict[str, Tensor], retain: dict[str, Tensor]) -> Root:
    """The root of both sets' mean second moment, with ``DAMPING`` of the mean energy on every direction."""
    factors = [_square_root(moments["inputs"]) / moments["tokens"].double().sqrt() for moments in (forget, retain)]
    both = torch.cat(factors, dim=1)
    U, S, _ = torch.linalg.svd(both, full_matrices=False)
    energies = S.square() / 2
    floor = DAMPING * float(energies.sum()) / len(both)
    if floor == 0:
        floor = 1.0
    return Root(U, (energies + floor).sqrt(), floor**0.5)
