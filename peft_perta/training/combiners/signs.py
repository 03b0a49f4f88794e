"""SAGO: where the signs of two elements conflict, the retain gradient wins.

Zeros do not conflict. The combined gradient g has <g, g_r> >= 0; this does not carry over to Adam's step.

Reference: arXiv 2604.14808.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .combiner import Combiner, Gradients


def forget_where_agreed(forget: Gradients, retain: Gradients, gamma: float, alpha: float) -> dict[str, Tensor]:
    """alpha g_r where the signs conflict, gamma g_f elsewhere."""
    return {
        name: torch.where(conflicting(forget[name], retain[name]), alpha * retain[name], gamma * forget[name])
        for name in forget
    }


def retain_everywhere(forget: Gradients, retain: Gradients, gamma: float, alpha: float) -> dict[str, Tensor]:
    """alpha g_r where the signs conflict, gamma g_f + alpha g_r elsewhere: the paper's "prefer retain"."""
    return {
        name: alpha * retain[name] + gamma * forget[name].masked_fill(conflicting(forget[name], retain[name]), 0.0)
        for name in forget
    }


def conflicting(forget: Tensor, retain: Tensor) -> Tensor:
    """Where one is positive and the other negative: boolean, of their shape."""
    return forget.sign() * retain.sign() < 0


SAGO = Combiner(
    "sago", "retain gradient where the signs of two elements conflict, forget gradient elsewhere", forget_where_agreed
)
SAGO_PREFER_RETAIN = Combiner(
    "sago-prefer-retain", "retain gradient where the signs conflict, sum of both elsewhere", retain_everywhere
)
