"""Weighted sums of the two gradients."""

from __future__ import annotations

from torch import Tensor

from .combiner import Combiner, Gradients, inner


def add(forget: Gradients, retain: Gradients, gamma: float, alpha: float) -> dict[str, Tensor]:
    """gamma g_f + alpha g_r: the gradient of the weighted sum of both losses, as in GradDiff."""
    return {name: gamma * forget[name] + alpha * retain[name] for name in forget}


def normalise(forget: Gradients, retain: Gradients, gamma: float, alpha: float) -> dict[str, Tensor]:
    """gamma g_f / ||g_f|| + alpha g_r / ||g_r||, norms over all parameters. A zero gradient contributes nothing.

    With gamma <= alpha, <g, g_r> >= 0. The paper's own learning rate (GeN) is left out: the optimizer sets the step.

    Reference: NGDiff, Bu et al. 2024, arXiv 2410.22086. Its g_F belongs to the loss to be maximised: -g_f here.
    """
    norms = inner(forget, forget) ** 0.5, inner(retain, retain) ** 0.5
    gamma, alpha = (weight / norm if norm else 0.0 for weight, norm in zip((gamma, alpha), norms, strict=True))
    return add(forget, retain, gamma, alpha)


SUM = Combiner("sum", "weighted sum of both gradients", add)
NORMALISED = Combiner("normalised", "weighted sum of both gradients, each scaled to unit length (NGDiff)", normalise)
