"""The outputs of one forward pass: all that a loss may read."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from ...data import IGNORED
from ...model import completion_losses

_CHUNK = 2**23  # logits of one kind that are converted to float32 at a time


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

    @property
    def tokens(self) -> Tensor:
        """The right tokens, which ``logits`` predict: [K]."""
        labels = self.labels[:, 1:].to(self.logits.device)
        return labels[labels != IGNORED]

    def mean_over_tokens(self, values: Tensor, *, without_first: bool = False) -> Tensor:
        """Mean of values [K] over each sample's completion tokens: [N].

        Args:
            values: one for each token with loss.
            without_first: leave out each sample's first token, unless it is the only one.
        """
        carries_loss = (self.labels[:, 1:] != IGNORED).to(values.device)
        per_token = torch.zeros(carries_loss.shape, dtype=values.dtype, device=values.device)
        per_token = per_token.masked_scatter(carries_loss, values)
        if without_first:
            carries_loss = carries_loss & ((carries_loss.cumsum(1) > 1) | (carries_loss.sum(1, keepdim=True) == 1))
        return per_token.masked_fill(~carries_loss, 0.0).sum(1) / carries_loss.sum(1)


def per_token(function: Callable[..., Tensor], *tensors: Tensor) -> Tensor:
    """function(*tensors): [K], chunk by chunk of tokens, on floating-point tensors in float32 or wider.

    Logits are the largest tensors of a batch. Their wide copies, and all that the function makes of them, live for one
    chunk at a time: backward computes each chunk again.

    Args:
        function: (tensors of k of the tokens) -> [k]; a token's value depends on its own rows alone.
        tensors: logits [K, V] first, then tensors whose first dimension is K.
    """

    def of_chunk(*chunk: Tensor) -> Tensor:
        return function(
            *(t.to(torch.promote_types(t.dtype, torch.float32)) if t.is_floating_point() else t for t in chunk)
        )

    size = max(1, _CHUNK // tensors[0].shape[1])
    chunks = zip(*(tensor.split(size) for tensor in tensors), strict=True)
    values = [checkpoint(of_chunk, *chunk, use_reentrant=False, preserve_rng_state=False) for chunk in chunks]
    return torch.cat(values)  # type: ignore[arg-type]


def _wide(tensor: Tensor) -> Tensor:
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))
