"""The probability of an answer, normalised by its length."""

from __future__ import annotations

from torch import Tensor


def probability(losses: Tensor) -> Tensor:
    """exp(-loss) of each answer, [N], in (0, 1].

    Args:
        losses: [N], mean token losses, nats.

    Reference: TOFU (Maini et al. 2024, arXiv 2401.06121), P(a|q)^(1/|a|).
    """
    return (-losses).exp()
