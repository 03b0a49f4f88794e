"""RMU: what must go loses its hidden states to one that means nothing; what must stay keeps its own.

Layers after the one that is looked at are given no gradient.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from .loss import OWN, REFERENCE
from .loss_inputs import LossInputs


def rmu(readings: Mapping[str, LossInputs], beta: float, margin: float) -> Tensor:
    """mean_t 1/H ||h - beta ||h_ref|| u||^2, [N], u a unit vector; margin has no say.

    The length that is steered to follows the reference's own, token by token, as in adaptive RMU (arXiv 2408.06223):
    one beta does for every model and layer. u has entries that are uniform on [0, 1) before it is given unit length,
    and is always the same for a width.

    Reference: Li et al. 2024, arXiv 2403.03218.
    """
    own, reference = _states(readings)
    drawn = torch.rand(own.shape[1], generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    target = beta * reference.norm(dim=1, keepdim=True) * (drawn / drawn.norm()).to(own)
    return readings[OWN].mean_over_tokens((own - target).square().mean(1))


def kept_states(readings: Mapping[str, LossInputs], beta: float, margin: float) -> Tensor:
    """mean_t 1/H ||h - h_ref||^2, [N]: RMU's own loss on what must stay.

    Reference: Li et al. 2024, arXiv 2403.03218.
    """
    own, reference = _states(readings)
    return readings[OWN].mean_over_tokens((own - reference).square().mean(1))


def _states(readings: Mapping[str, LossInputs]) -> list[Tensor]:
    """[K, H] of both, float32 or wider."""
    found = []
    for name in (OWN, REFERENCE):
        states = readings[name].states
        assert states is not None
        found.append(states.to(torch.promote_types(states.dtype, torch.float32)))
    return found
