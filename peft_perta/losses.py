"""Per-sample losses [N]; never a mean over samples, so that no result depends on the batch size."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .data import IGNORED, Batch


def sample_losses(model: nn.Module, batch: Batch) -> Tensor:
    """Mean next-token cross-entropy over each sample's completion tokens, in nats per token: [N], float32 or wider.

    Reference: the loss of PerTA (arXiv 2601.22030), averaged within a sample; the caller sums over samples.
    """
    logits = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask, use_cache=False).logits
    return completion_losses(logits, batch.labels)


def completion_losses(logits: Tensor, labels: Tensor) -> Tensor:
    """The same from logits [N, T, V] and labels [N, T]."""
    labels = labels[:, 1:].to(logits.device)
    taken = labels != IGNORED
    # Only tokens with a loss reach the softmax: prompts and padding cost nothing here.
    chosen = logits[:, :-1][taken].to(torch.promote_types(logits.dtype, torch.float32))
    token_losses = nn.functional.cross_entropy(chosen, labels[taken], reduction="none")
    per_token = torch.zeros(labels.shape, dtype=token_losses.dtype, device=logits.device)
    return per_token.masked_scatter(taken, token_losses).sum(1) / taken.sum(1)
