"""Directions of a layer's input space, and how much each set's rows use them.

An edit E changes a layer's output by E x. On the rows to keep it should change nothing; on the rows to forget it should
do all that it does. Least squares says which matrix on the input side does that best,

    min_M  sum_forget ||(E M - E) x||^2 + sum_retain ||E M x||^2      =>      M = C_f (C_f + C_r)^-1 ,

C_f and C_r being the second moments of the inputs. M weighs, in [0, 1], the directions in which both are diagonal by
f / (f + r): PerTA's ratio, in the basis where inputs do not mix instead of the basis of neurons. E M has the rank of E:
nothing is refitted, and of a product B A only A changes.

A little of the mean energy (``DAMPING``) counts as what must stay, so that directions that hardly any row uses get
weights near 0: nothing known, nothing changed.

Reference: ours; the least squares of MEMIT (Meng et al. 2023, arXiv 2210.07229) turned to what must go.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from ..adapters import Edit, Product
from ..errors import NumericalError

DAMPING = 0.01  # of the mean energy of a direction, over both sets


_ROWS = 256  # of a dense edit that are worked on at once, in double precision


def weigh_input_directions(
    edit: Edit, forget: Mapping[str, Tensor], retain: Mapping[str, Tensor]
) -> tuple[Edit, dict[str, float]]:
    """E M, an edit of the same form and no larger rank, and what is left of the edit.

    Args:
        forget, retain: ``GradientSums.moments()`` of each set: 'inputs' [I, I] and 'tokens' [1, 1].

    Returns:
        The edit, and the shares 'forget' and 'retain' of its mean squared output on each set's inputs, in [0, 1] but
        for rounding; 1 where there was none.

    Raises:
        NumericalError: the moments are too steep for the precision that they were summed in.
    """
    moved = edit.A if isinstance(edit, Product) else edit
    C_f = _per_token(forget, moved.device)
    S = damped(C_f, _per_token(retain, moved.device))
    if S is None:  # no input was ever different from zero
        return (Product(edit.B, torch.zeros_like(edit.A)) if isinstance(edit, Product) else torch.zeros_like(edit)), {
            "forget": 1.0,
            "retain": 1.0,
        }
    L = root(S)
    del S
    found = torch.empty_like(moved)
    for rows, written in zip(moved.split(_ROWS), found.split(_ROWS), strict=True):  # E C_f S^-1, S = L L^T
        written.copy_(torch.cholesky_solve((rows.double() @ C_f).T, L).T)
    del C_f, L
    result = Product(edit.B, found) if isinstance(edit, Product) else found
    shares = {}
    for name, moments in (("forget", forget), ("retain", retain)):
        before, after = (_output_energy(e, moments["inputs"].to(moved.device)) for e in (edit, result))
        shares[name] = after / before if before > 0 else 1.0
    return result, shares


def damped(C_f: Tensor, C_r: Tensor) -> Tensor | None:
    """C_f + C_r + ``DAMPING`` of the mean energy on the diagonal [I, I]; None where both are zero. Writes on C_r."""
    S = C_r.add_(C_f)
    mean = float(S.diagonal().mean())
    if mean == 0:
        return None
    S.diagonal().add_(DAMPING * mean)
    return S


def root(S: Tensor) -> Tensor:
    """L with L L^T = S.

    Raises:
        NumericalError: S is not positive definite: sums in single precision are too coarse for so steep a spectrum.
    """
    L, info = torch.linalg.cholesky_ex(S)
    if int(info) != 0:
        raise NumericalError(
            "the second moment of a layer's inputs is not positive definite, even damped: a few inputs are larger than "
            "the others by more than single precision holds; use input_directions=False and fit='truncated'"
        )
    return L


def _per_token(moments: Mapping[str, Tensor], device: torch.device) -> Tensor:
    """[I, I] in float64, symmetric."""
    moment = moments["inputs"].to(device, torch.float64, copy=True)
    return moment.div_(moments["tokens"].to(device, torch.float64).clamp_min(1))


def _output_energy(edit: Edit, moment: Tensor) -> float:
    """tr(E C E^T)."""
    rows = edit.A if isinstance(edit, Product) else edit
    moved = rows @ moment.to(rows.dtype)
    if isinstance(edit, Product):
        return float(((edit.B.T @ edit.B) * (moved @ rows.T)).sum())
    return float((moved * rows).sum())
