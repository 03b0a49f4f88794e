"""How much a parameter matters to the forget set, as a share of how much it matters to both."""

from __future__ import annotations

import torch
from torch import Tensor

_CPU_CHUNK, _GPU_CHUNK = 2**18, 2**22


def ratio(forget: Tensor, retain: Tensor, power: float) -> Tensor:
    """W = f^tau / (f^tau + r^tau), for magnitudes f, r >= 0.

    tau = 1 on |mean gradients| is PerTA-grad; tau = 2 is the Fisher form, of the squared mean gradient or of the mean
    squared gradient, whichever statistic f and r are the root of. tau = 0 is 1/2 everywhere. 0/0 is 0: nothing known,
    nothing changed.

    Reference: arXiv 2601.22030, W_grad and W_fisher; the general power is ours.
    """
    if power == 0:
        return torch.full(forget.shape, 0.5, dtype=torch.result_type(forget, 0.5), device=forget.device)
    weights = torch.empty(forget.shape, dtype=torch.result_type(forget, 0.5), device=forget.device)
    chunk = _GPU_CHUNK if forget.is_cuda else _CPU_CHUNK
    parts = (tensor.flatten().split(chunk) for tensor in (weights, forget, retain))
    for part, f, r in zip(*parts, strict=True):  # in chunks: the steps below hold some eight tensors of one's size
        part.copy_(_ratio(f, r, power))
    return weights


def _ratio(forget: Tensor, retain: Tensor, power: float) -> Tensor:
    # Both are divided by the larger first: no power of a large or tiny magnitude overflows, and a common scale cancels.
    larger = torch.maximum(forget, retain)
    known = larger > 0
    safe = torch.where(known, larger, torch.ones_like(larger))
    f, r = (forget / safe) ** power, (retain / safe) ** power
    return torch.where(known, f / torch.where(known, f + r, torch.ones_like(larger)), torch.zeros_like(larger))
