"""Losses on the retain set that read the output distribution."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from .loss import ForwardPass, Loss
from .loss_inputs import LossInputs


def nll(inputs: Mapping[ForwardPass, LossInputs], beta: float, margin: float) -> Tensor:
    """mean_t NLL, [N]: keep training on the retain set."""
    return inputs[ForwardPass.MODEL].mean_losses()


def kl(inputs: Mapping[ForwardPass, LossInputs], beta: float, margin: float) -> Tensor:
    """mean_t KL(pi_ref || pi) over the vocabulary, nats, [N]: predict what the reference model predicts, right or
    wrong."""
    own, reference = (
        inputs[forward_pass].logits.to(torch.promote_types(inputs[forward_pass].logits.dtype, torch.float32))
        for forward_pass in (ForwardPass.MODEL, ForwardPass.REFERENCE)
    )
    own, reference = own.log_softmax(1), reference.log_softmax(1)
    return inputs[ForwardPass.MODEL].mean_over_tokens((reference.exp() * (reference - own)).sum(1))


NLL = Loss("nll", "minimise the cross-entropy", nll)
KL = Loss(
    "kl",
    "stay close to the reference model's next-token distributions (KL divergence)",
    kl,
    (ForwardPass.MODEL, ForwardPass.REFERENCE),
)
