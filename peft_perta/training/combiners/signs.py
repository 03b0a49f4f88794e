"""SAGO: element by element, the retain gradient decides where the two disagree.

Reference: arXiv 2604.14808. Zeros count as agreeing. What is guaranteed is <g, g_r> >= 0 of the gradient, which says
nothing of Adam's step.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .combiner import Gradients


def forget_where_agreed(forget: Gradients, retain: Gradients, gamma: float, alpha: float) -> dict[str, Tensor]:
    """alpha g_r where the signs conflict, gamma g_f elsewhere."""
    return {
        name: torch.where(conflicting(forget[name], retain[name]), alpha * retain[name], gamma * forget[name])
        for name in forget
    }


def retain_everywhere(forget: Gradients, retain: Gradients, gamma: float, alpha: float) -> dict[str, Tensor]:
    """alpha g_r where the signs conflict, gamma g_f + alpha g_r elsewhere: "prefer retain"."""
    return {
        name: alpha * retain[name] + gamma * forget[name].masked_fill(conflicting(forget[name], retain[name]), 0.0)
        for name in forget
    }


def conflicting(forget: Tensor, retain: Tensor) -> Tensor:
    """Where one is positive and the other negative, boolean."""
    return forget.sign() * retain.sign() < 0
