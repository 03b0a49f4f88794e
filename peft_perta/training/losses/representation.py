"""Losses on the hidden states of one decoder block. Blocks after it get no gradient.

Reference: RMU, Li et al. 2024, arXiv 2403.03218.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from .loss import ForwardPass, Loss
from .loss_inputs import LossInputs


def rmu(inputs: Mapping[ForwardPass, LossInputs], beta: float, margin: float) -> Tensor:
    """mean_t 1/H ||h - beta ||h_ref|| u||^2, [N], u a fixed random unit vector [H].

    The target's length follows that of the reference model's state, token by token, as in adaptive RMU
    (arXiv 2408.06223), so that one beta fits every model and layer. u is drawn uniformly on [0, 1)^H with seed 0 and
    normalised: it is the same for every model of width H.
    """
    own, reference = _states(inputs)
    drawn = torch.rand(own.shape[1], generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    target = beta * reference.norm(dim=1, keepdim=True) * (drawn / drawn.norm()).to(own)
    return inputs[ForwardPass.MODEL].mean_over_tokens((own - target).square().mean(1))


def embed_diff(inputs: Mapping[ForwardPass, LossInputs], beta: float, margin: float) -> Tensor:
    """mean_t 1/H ||h - h_ref||^2, [N]: RMU's loss on the retain set."""
    own, reference = _states(inputs)
    return inputs[ForwardPass.MODEL].mean_over_tokens((own - reference).square().mean(1))


def _states(inputs: Mapping[ForwardPass, LossInputs]) -> list[Tensor]:
    """The hidden states [K, H] of the model in training and of the reference model, in float32 or wider."""
    both = []
    for forward_pass in (ForwardPass.MODEL, ForwardPass.REFERENCE):
        states = inputs[forward_pass].states
        assert states is not None
        both.append(states.to(torch.promote_types(states.dtype, torch.float32)))
    return both


RMU = Loss(
    "rmu",
    "steer the hidden states of one block to a random direction; beta is the target's length over that of the "
    "reference model's states",
    rmu,
    (ForwardPass.MODEL, ForwardPass.REFERENCE),
    beta=5.0,
    needs_states=True,
)
EMBED_DIFF = Loss(
    "embed-diff",
    "stay close to the reference model's hidden states of one block (squared distance)",
    embed_diff,
    (ForwardPass.MODEL, ForwardPass.REFERENCE),
    needs_states=True,
)
