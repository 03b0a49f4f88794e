"""What a model makes of a batch of completions: all that a loss may look at."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ...data import IGNORED
from ...model import completion_losses


@dataclass(frozen=True)
class LossInputs:
    """
    Attributes:
        logits: [K, V], of the K tokens that carry loss, sample after sample.
        labels: [N, T], ``IGNORED`` where there is no loss.
        states: [K, H], the hidden states at the same places after the settings' ``layer``; only for a loss that asks.
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
        """[K] -> mean over each sample's completion tokens: [N]."""
        taken = (self.labels[:, 1:] != IGNORED).to(values.device)
        return torch.zeros(taken.shape, dtype=values.dtype, device=values.device).masked_scatter(taken, values).sum(
            1
        ) / taken.sum(1)
