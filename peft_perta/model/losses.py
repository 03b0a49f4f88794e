"""Per-sample losses [N]; never a mean over samples, so that no result depends on the batch size."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from ..data import IGNORED, Batch

_CHUNK = 2**23  # logits that are widened at once


def sample_losses(model: nn.Module, batch: Batch) -> Tensor:
    """Mean next-token cross-entropy over each sample's completion tokens, in nats per token: [N], float32 or wider.

    Reference: the loss of PerTA (arXiv 2601.22030), averaged within a sample; the caller sums over samples.
    """
    with _logits_where(model, batch.labels):
        logits = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask, use_cache=False).logits
    return completion_losses(logits, batch.labels)


def completion_logits(model: nn.Module, batch: Batch) -> Tensor:
    """The logits [K, V] that predict the K tokens with loss, sample after sample."""
    with _logits_where(model, batch.labels):
        logits = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask, use_cache=False).logits
    return _chosen(logits, batch.labels)[0]


def completion_states(model: nn.Module, batch: Batch, block: nn.Module) -> tuple[Tensor, Tensor]:
    """The same logits [K, V], and the hidden states [K, H] that a decoder block puts out in their places."""
    seen: list[Tensor] = []
    handle = block.register_forward_hook(
        lambda module, args, output: seen.append(output if isinstance(output, Tensor) else output[0])
    )
    try:
        logits = completion_logits(model, batch)
    finally:
        handle.remove()
    return logits, _chosen(seen[0], batch.labels)[0]


def completion_losses(logits: Tensor, labels: Tensor) -> Tensor:
    """The same from logits and labels [N, T]; logits [N, T, V], or [1, K, V] of the K tokens that are taken."""
    chosen, wanted, taken = _chosen(logits, labels)
    token_losses: Tensor = _TokenLosses.apply(chosen, wanted)  # type: ignore[assignment]
    per_token = torch.zeros(taken.shape, dtype=token_losses.dtype, device=logits.device)
    return per_token.masked_scatter(taken, token_losses).sum(1) / taken.sum(1)


def _chosen(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The logits [K, V] that predict a token with loss, those tokens [K], and where they stand [N, T - 1]."""
    labels = labels[:, 1:].to(logits.device)
    taken = labels != IGNORED
    whole = logits.shape[:2] == (len(labels), labels.shape[1] + 1)
    return logits[:, :-1][taken] if whole else logits.squeeze(0), labels[taken], taken


@dataclass(frozen=True)
class TokenScores:
    """How a model reads one sample's completion, token by token: three [t], on the CPU.

    Attributes:
        log_probabilities: of each token, nats.
        standardised: (log p - mu) / sigma, with mu and sigma the mean and standard deviation of log p over the
            vocabulary under the model itself.
        hits: whether the token is the model's first choice.
    """

    log_probabilities: Tensor
    standardised: Tensor
    hits: Tensor


def token_scores(model: nn.Module, batch: Batch) -> list[TokenScores]:
    """Every token of each sample's completion, scored; N of them.

    Reference: the standardised score is Min-K%++'s (arXiv 2404.02936), whose variance is held above 1e-6.
    """
    with _logits_where(model, batch.labels):
        logits = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask, use_cache=False).logits
    chosen, labels, taken = _chosen(logits, batch.labels)
    scored = [_scores(*part) for part in _chunks(chosen, labels)]
    columns = [torch.cat(column).cpu().split(taken.sum(1).tolist()) for column in zip(*scored, strict=True)]
    return [TokenScores(*parts) for parts in zip(*columns, strict=True)]


def _scores(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    logs = _wide(logits).log_softmax(1)
    shares = logs.exp()
    mean = (shares * logs).nan_to_num().sum(1)  # 0 log 0 is 0
    variance = (shares * (logs - mean.unsqueeze(1)).square()).nan_to_num().sum(1)
    found = logs.gather(1, labels.unsqueeze(1)).squeeze(1)
    return found, (found - mean) / variance.clamp_min(1e-6).sqrt(), logs.argmax(1) == labels


class _TokenLosses(torch.autograd.Function):
    """Cross-entropy of each token [K] from logits [K, V]: ``nn.functional.cross_entropy``, in chunks of tokens.

    With a large vocabulary the logits are a batch's largest tensor. They are kept in their own type; what is float32
    exists for one chunk at a time, on the way forth and back.
    """

    @staticmethod
    def forward(ctx: Any, logits: Tensor, labels: Tensor) -> Tensor:
        ctx.save_for_backward(logits, labels)
        parts = _chunks(logits, labels)
        return torch.cat([nn.functional.cross_entropy(_wide(p), of, reduction="none") for p, of in parts])

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        # softmax - one-hot, by operations that can be differentiated again
        logits, labels = ctx.saved_tensors
        parts = _chunks(logits, labels, gradients[0])
        return torch.cat([_logit_gradients(*part).to(logits.dtype) for part in parts]), None


def _logit_gradients(logits: Tensor, labels: Tensor, gradients: Tensor) -> Tensor:
    gradients = gradients.unsqueeze(1)
    return (_wide(logits).softmax(1) * gradients).scatter_add(1, labels.unsqueeze(1), -gradients)


def _chunks(logits: Tensor, *others: Tensor) -> Iterator[tuple[Tensor, ...]]:
    tokens = max(1, _CHUNK // logits.shape[1])
    return zip(*(tensor.split(tokens) for tensor in (logits, *others)), strict=True)


def _wide(logits: Tensor) -> Tensor:
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


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
