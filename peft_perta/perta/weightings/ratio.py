"""The ratio weightings: how much a parameter matters to the forget set, as a share of how much it matters to both."""

from __future__ import annotations

import torch
from torch import Tensor

from .weighting import Weighting

_CPU_CHUNK, _GPU_CHUNK = 2**18, 2**22


def ratio(forget: Tensor, retain: Tensor, power: float) -> Tensor:
    """W = f^tau / (f^tau + r^tau), elementwise, for magnitudes f, r >= 0.

    With tau = 1 on |mean gradients| this is PerTA-grad. With tau = 2 it is the Fisher form: the ratio of squared mean
    gradients, or of mean squared gradients if f and r are root mean squares. With tau = 0 it is 1/2 everywhere. 0/0
    counts as 0: a parameter without any gradient is left unchanged.

    Args:
        forget: magnitudes f on the forget set, of any shape.
        retain: magnitudes r on the retain set, of the same shape.
        power: the exponent tau.

    Returns:
        Weights in [0, 1], of the same shape.

    Reference: arXiv 2601.22030, W_grad and W_fisher; the general power is ours.
    """
    if power == 0:
        return torch.full(forget.shape, 0.5, dtype=torch.result_type(forget, 0.5), device=forget.device)
    weights = torch.empty(forget.shape, dtype=torch.result_type(forget, 0.5), device=forget.device)
    chunk = _GPU_CHUNK if forget.is_cuda else _CPU_CHUNK
    chunks = (tensor.flatten().split(chunk) for tensor in (weights, forget, retain))
    for chunk_of_weights, f, r in zip(*chunks, strict=True):  # in chunks: a step needs about eight tensors of its size
        chunk_of_weights.copy_(_ratio(f, r, power))
    return weights


def _ratio(forget: Tensor, retain: Tensor, power: float) -> Tensor:
    # Both are divided by the larger one first: then no power overflows, and a common scale cancels.
    larger = torch.maximum(forget, retain)
    nonzero = larger > 0
    divisor = torch.where(nonzero, larger, torch.ones_like(larger))
    f, r = (forget / divisor) ** power, (retain / divisor) ** power
    return torch.where(nonzero, f / torch.where(nonzero, f + r, torch.ones_like(larger)), torch.zeros_like(larger))


GRAD = Weighting("grad", ratio, "mean", power=1.0, description="the ratio of the mean gradients' magnitudes")
FISHER = Weighting("fisher", ratio, "mean", power=2.0, description="the ratio of the squared mean gradients (sharper)")
EMPIRICAL_FISHER = Weighting(
    "empirical-fisher",
    ratio,
    "squares",
    power=2.0,
    description="the ratio of the mean squared per-sample gradients, nearly uniform on small sets",
)
