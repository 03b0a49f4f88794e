"""Per-sample losses [N]; never a mean over samples, so that no result depends on the batch size."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from .data import IGNORED, Batch


def sample_losses(model: nn.Module, batch: Batch) -> Tensor:
    """Mean next-token cross-entropy over each sample's completion tokens, in nats per token: [N], float32 or wider.

    Reference: the loss of PerTA (arXiv 2601.22030), averaged within a sample; the caller sums over samples.
    """
    with _logits_where(model, batch.labels):
        logits = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask, use_cache=False).logits
    return completion_losses(logits, batch.labels)


def completion_losses(logits: Tensor, labels: Tensor) -> Tensor:
    """The same from logits and labels [N, T]; logits [N, T, V], or [1, K, V] of the K tokens that are taken."""
    labels = labels[:, 1:].to(logits.device)
    taken = labels != IGNORED
    chosen = logits.squeeze(0) if logits.shape[:2] != (len(labels), labels.shape[1] + 1) else logits[:, :-1][taken]
    chosen = chosen.to(torch.promote_types(logits.dtype, torch.float32))
    token_losses = nn.functional.cross_entropy(chosen, labels[taken], reduction="none")
    per_token = torch.zeros(labels.shape, dtype=token_losses.dtype, device=logits.device)
    return per_token.masked_scatter(taken, token_losses).sum(1) / taken.sum(1)


@contextmanager
def _logits_where(model: nn.Module, labels: Tensor) -> Iterator[None]:
    """Within the block the head sees only the tokens whose next one carries loss: prompts and padding cost nothing.

    An adapted head sees them all: its gradient needs the samples apart.
    """
    head = model.get_output_embeddings()  # type: ignore[operator]
    if head is None or isinstance(head, BaseTunerLayer):
        yield
        return

    def select(module: nn.Module, args: tuple) -> tuple | None:
        hidden = args[0] if args else None
        if hidden is None or hidden.dim() != 3 or hidden.shape[:2] != labels.shape:
            return None
        return (hidden[:, :-1][(labels[:, 1:] != IGNORED).to(hidden.device)].unsqueeze(0), *args[1:])

    handle = head.register_forward_pre_hook(select)
    try:
        yield
    finally:
        handle.remove()
