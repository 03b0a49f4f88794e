"""Losses on what must stay."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from .loss import OWN, REFERENCE
from .loss_inputs import LossInputs


def nll(readings: Mapping[str, LossInputs], beta: float, margin: float) -> Tensor:
    """mean_t NLL, [N]: learn the retain set on."""
    return readings[OWN].mean_losses()


def kl(readings: Mapping[str, LossInputs], beta: float, margin: float) -> Tensor:
    """mean_t KL(pi_ref || pi) over the vocabulary, nats, [N]: say what the reference says, right or wrong."""
    own, reference = (
        readings[name].logits.to(torch.promote_types(readings[name].logits.dtype, torch.float32)).log_softmax(1)
        for name in (OWN, REFERENCE)
    )
    return readings[OWN].mean_over_tokens((reference.exp() * (reference - own)).sum(1))
