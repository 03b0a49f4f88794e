"""The outputs of one forward pass: all that a loss may read."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ...data import IGNORED
from ...model import completion_losses


@dataclass(frozen=True)
class LossInputs:
    """The outputs of one forward pass over N samples, K of whose tokens carry loss.

    Attributes:
        logits: [K, V], the logits that predict these K tokens, sample after sample.
        labels: [N, T], ``IGNORED`` at tokens without loss.
        states: [K, H], the hidden states after block ``UnlearningSettings.layer``, at the positions of ``logits``.
            Only for losses with ``needs_states``.
    """

    logits: Tensor
    labels: Tensor
    states: Tensor | None = None

    def mean_losses(self) -> Tensor:
        """Mean cross-entropy over each sample's completion tokens, nats per token: [N]."""
        return completion_losses(self.logits.unsqueeze(0), self.labels)

    def log_probabilities(self) -> Tensor:
        """log pi(completion | prompt) of each sample, nats: [N]."""
        return -self.mean_losses() * (self.labels[:, 1:] != IGNORED).sum(1).to(self.logits.device)

    def mean_over_tokens(self, values: Tensor) -> Tensor:
        """Mean of values [K] over each sample's completion tokens: [N]."""
        carries_loss = (self.labels[:, 1:] != IGNORED).to(values.device)
        per_token = torch.zeros(carries_loss.shape, dtype=values.dtype, device=values.device)
        return per_token.masked_scatter(carries_loss, values).sum(1) / carries_loss.sum(1)
