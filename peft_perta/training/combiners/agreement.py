"""How far the two gradients, and what is made of them, go the same way."""

from __future__ import annotations

from .combiner import Gradients, inner
from .signs import conflicting


def agreement(forget: Gradients, retain: Gradients, combined: Gradients) -> dict[str, float]:
    """Cosines over all parameters (0 where a gradient is zero), and the share of elements whose signs conflict."""
    norms = {id(found): inner(found, found) ** 0.5 for found in (forget, retain, combined)}

    def cosine(one: Gradients, other: Gradients) -> float:
        length = norms[id(one)] * norms[id(other)]
        return inner(one, other) / length if length else 0.0

    conflicts = sum(int(conflicting(forget[name], retain[name]).sum()) for name in forget)
    return {
        "cosine_forget_retain": cosine(forget, retain),
        "cosine_combined_forget": cosine(combined, forget),
        "cosine_combined_retain": cosine(combined, retain),
        "conflicting_share": conflicts / max(sum(found.numel() for found in forget.values()), 1),
    }
