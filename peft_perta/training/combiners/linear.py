"""The gradients added up, as they are or at unit length: no element and no tensor is treated unlike another."""

from __future__ import annotations

from torch import Tensor

from .combiner import Gradients, inner


def add(forget: Gradients, retain: Gradients, gamma: float, alpha: float) -> dict[str, Tensor]:
    """gamma g_f + alpha g_r: the gradient of the weighted sum of both losses (GradDiff and its kin)."""
    return {name: gamma * forget[name] + alpha * retain[name] for name in forget}


def normalise(forget: Gradients, retain: Gradients, gamma: float, alpha: float) -> dict[str, Tensor]:
    """gamma g_f / ||g_f|| + alpha g_r / ||g_r||, norms over all parameters; a gradient that is zero stays out.

    With gamma <= alpha, <g, g_r> >= 0. The paper's own learning rate (GeN) is left to the optimizer.

    Reference: NGDiff, Bu et al. 2024, arXiv 2410.22086, whose g_F is that of the loss to climb: -g_f here.
    """
    norms = inner(forget, forget) ** 0.5, inner(retain, retain) ** 0.5
    gamma, alpha = (weight / norm if norm else 0.0 for weight, norm in zip((gamma, alpha), norms, strict=True))
    return add(forget, retain, gamma, alpha)
