"""Weights on the directions of a layer's input space, by how much each set's rows use them.

An edit E changes a layer's output by E x. It should change nothing on the retain rows, and keep its full effect on the
forget rows. Least squares gives the matrix on the input side that does this best,

    min_M  sum_forget ||(E M - E) x||^2 + sum_retain ||E M x||^2      =>      M = C_f (C_f + C_r)^-1 ,

with C_f and C_r the second moments of the inputs; a weight lambda on the second sum makes lambda C_r of C_r. In the
basis in which both are diagonal, M weights each direction by f / (f + r), in [0, 1]. This is PerTA's ratio, taken where
inputs do not mix instead of neuron by neuron. E M has the rank of E, so nothing is refitted; of a product B A only A
changes.

A little of the mean energy (``DAMPING``) is added to the retain side. Directions that hardly any row uses get weights
near 0: without evidence, nothing is changed.

Reference: ours; the least squares of MEMIT (Meng et al. 2023, arXiv 2210.07229), applied to forgetting.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from ..adapters import Edit, Product
from ..errors import NumericalError

DAMPING = 0.01  # of a direction's mean energy over both sets


# How many more copies of a layer's sums an edit needs here: float64 moments, S, L and a chunk of rows. The peak was
# measured below it; tests/test_budget.py repeats the measurement.
COPIES = 7
_ROWS = 256  # of a dense edit, processed at once in double precision


def weigh_input_directions(
    edit: Edit,
    forget: Mapping[str, Tensor],
    retain: Mapping[str, Tensor],
    *,
    retain_weight: float = 1.0,
    damping: float = DAMPING,
) -> tuple[Edit, dict[str, float]]:
    """Multiply an edit by M on its input side.

    Args:
        edit: the edit [O, I], dense or a product.
        forget: the forget set's ``GradientSums.moments``: 'inputs' [I, I] and 'tokens' [1, 1].
        retain: the same of the retain set.
        retain_weight: lambda, the weight of the sum over the retain rows.
        damping: the share of a direction's mean energy that is added to the retain side.

    Returns:
        E M, of the same form and of no larger rank, and for 'forget' and 'retain' the share of the edit's mean squared
        output that is left on that set's inputs: in [0, 1] up to rounding, and 1 if the output was zero before.

    Raises:
        NumericalError: the moments' spectrum is too steep for single precision.
    """
    rows = edit.A if isinstance(edit, Product) else edit
    C_f = _per_token(forget, rows.device)
    S = damped(C_f, _per_token(retain, rows.device).mul_(retain_weight), damping)
    if S is None:  # every input was zero
        zero = torch.zeros_like(rows)
        return _with_rows(edit, zero), {"forget": 1.0, "retain": 1.0}
    L = cholesky_factor(S)
    del S
    weighted = torch.empty_like(rows)
    for chunk, written in zip(rows.split(_ROWS), weighted.split(_ROWS), strict=True):  # E C_f S^-1, S = L L^T
        written.copy_(torch.cholesky_solve((chunk.double() @ C_f).T, L).T)
    del C_f, L
    result = _with_rows(edit, weighted)
    shares = {}
    for name, moments in (("forget", forget), ("retain", retain)):
        before, after = (_output_energy(e, moments["inputs"].to(rows.device)) for e in (edit, result))
        shares[name] = after / before if before > 0 else 1.0
    return result, shares


def damped(C_f: Tensor, C_r: Tensor, damping: float = DAMPING) -> Tensor | None:
    """C_f + C_r, with ``damping`` of their mean energy added to the diagonal, [I, I]; None if both are zero.

    C_r is overwritten.
    """
    S = C_r.add_(C_f)
    mean = float(S.diagonal().mean())
    if mean == 0:
        return None
    S.diagonal().add_(damping * mean)
    return S


def cholesky_factor(S: Tensor) -> Tensor:
    """L with L L^T = S.

    Raises:
        NumericalError: S is not positive definite: sums in single precision are too coarse for so steep a spectrum.
    """
    L, info = torch.linalg.cholesky_ex(S)
    if int(info) != 0:
        raise NumericalError(
            "the second moment of a layer's inputs is not positive definite, even damped: a few inputs exceed the "
            "others by more than single precision resolves; use input_directions=False and fit='truncated'"
        )
    return L


def _with_rows(edit: Edit, rows: Tensor) -> Edit:
    """The edit with other rows on its input side: A [R, I] of a product, the whole of a dense edit [O, I]."""
    return Product(edit.B, rows) if isinstance(edit, Product) else rows


def _per_token(moments: Mapping[str, Tensor], device: torch.device) -> Tensor:
    """The mean of x x^T over tokens, [I, I], in float64."""
    moment = moments["inputs"].to(device, torch.float64, copy=True)
    return moment.div_(moments["tokens"].to(device, torch.float64).clamp_min(1))


def _output_energy(edit: Edit, moment: Tensor) -> float:
    """tr(E C E^T)."""
    rows = edit.A if isinstance(edit, Product) else edit
    moved = rows @ moment.to(rows.dtype)
    if isinstance(edit, Product):
        return float(((edit.B.T @ edit.B) * (moved @ rows.T)).sum())
    return float((moved * rows).sum())
