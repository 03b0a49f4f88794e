"""How far the forget gradient, the retain gradient and their combination point the same way."""

from __future__ import annotations

from .combiners import Gradients, conflicting, inner


def agreement(forget: Gradients, retain: Gradients, combined: Gradients) -> dict[str, float]:
    """Cosines over all parameters (0 if a gradient is zero), and the share of elements whose signs conflict."""
    norms = {id(gradients): inner(gradients, gradients) ** 0.5 for gradients in (forget, retain, combined)}

    def cosine(first: Gradients, second: Gradients) -> float:
        length = norms[id(first)] * norms[id(second)]
        return inner(first, second) / length if length else 0.0

    conflicts = sum(int(conflicting(forget[name], retain[name]).sum()) for name in forget)
    return {
        "cosine_forget_retain": cosine(forget, retain),
        "cosine_combined_forget": cosine(combined, forget),
        "cosine_combined_retain": cosine(combined, retain),
        "conflicting_share": conflicts / max(sum(gradient.numel() for gradient in forget.values()), 1),
    }
