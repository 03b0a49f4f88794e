"""Per-sample losses [N] and token scores. No mean over samples is taken, so no result depends on the batch size."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from ..data import IGNORED, Batch

_CHUNK = 2**23  # logits that are converted to float32 at a time


def sample_losses(model: nn.Module, batch: Batch) -> Tensor:
    """The mean next-token cross-entropy over each sample's completion tokens: [N], nats per token, float32 or wider.

    Reference:
        The loss of PerTA (arXiv 2601.22030), as a mean within each sample. The caller sums over samples.
    """
    return completion_losses(_logits(model, batch), batch.labels)


def completion_logits(model: nn.Module, batch: Batch) -> Tensor:
    """The logits [K, V] that predict the K tokens with loss, sample after sample; V is the size of the vocabulary."""
    return _predictions(_logits(model, batch), batch.labels)[0]


def completion_states(model: nn.Module, batch: Batch, block: nn.Module) -> tuple[Tensor, Tensor]:
    """``completion_logits`` [K, V], and the hidden states [K, H] that a decoder block outputs at the same positions."""
    outputs: list[Tensor] = []
    handle = block.register_forward_hook(
        lambda module, args, output: outputs.append(output if isinstance(output, Tensor) else output[0])
    )
    try:
        logits = completion_logits(model, batch)
    finally:
        handle.remove()
    return logits, _predictions(outputs[0], batch.labels)[0]


def completion_losses(logits: Tensor, labels: Tensor) -> Tensor:
    """The losses [N] of ``sample_losses``, from logits.

    Args:
        logits: [N, T, V] at all tokens, or [1, K, V] at the K tokens that predict one with loss.
        labels: [N, T].
    """
    predictions, tokens, has_loss = _predictions(logits, labels)
    token_losses: Tensor = _TokenLosses.apply(predictions, tokens)  # type: ignore[assignment]
    by_position = torch.zeros(has_loss.shape, dtype=token_losses.dtype, device=logits.device)
    return by_position.masked_scatter(has_loss, token_losses).sum(1) / has_loss.sum(1)


def _predictions(values: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """What predicts the tokens with loss: (logits or states [K, ..], the tokens [K], where they are [N, T - 1])."""
    labels = labels[:, 1:].to(values.device)
    has_loss = labels != IGNORED
    at_all_tokens = values.shape[:2] == (len(labels), labels.shape[1] + 1)
    return values[:, :-1][has_loss] if at_all_tokens else values.squeeze(0), labels[has_loss], has_loss


def _logits(model: nn.Module, batch: Batch) -> Tensor:
    """[1, K, V], or [N, T, V] if the head is adapted."""
    with _head_on_completions(model, batch.labels):
        return model(input_ids=batch.input_ids, attention_mask=batch.attention_mask, use_cache=False).logits


@dataclass(frozen=True)
class TokenScores:
    """How a model scores each of the C tokens of one completion; tensors on the CPU.

    Attributes:
        log_probabilities: [C], of the tokens, in nats.
        standardised: [C], (log p - mu) / sigma, with mu and sigma the mean and the standard deviation of log p over
            the vocabulary under the model's own distribution.
        hits: [C], whether the token is the model's first choice.
    """

    log_probabilities: Tensor
    standardised: Tensor
    hits: Tensor


def token_scores(model: nn.Module, batch: Batch) -> list[TokenScores]:
    """The token scores of each of the N samples.

    Reference:
        Min-K%++ (arXiv 2404.02936), for the standardised score; its variance is clamped to at least 1e-6.
    """
    predictions, tokens, has_loss = _predictions(_logits(model, batch), batch.labels)
    chunks = [_scores(*chunk) for chunk in _chunks(predictions, tokens)]
    columns = [torch.cat(column).cpu().split(has_loss.sum(1).tolist()) for column in zip(*chunks, strict=True)]
    return [TokenScores(*parts) for parts in zip(*columns, strict=True)]


def _scores(logits: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    logs = _wide(logits).log_softmax(1)
    probabilities = logs.exp()
    mean = (probabilities * logs).nan_to_num().sum(1)  # 0 log 0 is 0
    variance = (probabilities * (logs - mean.unsqueeze(1)).square()).nan_to_num().sum(1)
    of_tokens = logs.gather(1, tokens.unsqueeze(1)).squeeze(1)
    return of_tokens, (of_tokens - mean) / variance.clamp_min(1e-6).sqrt(), logs.argmax(1) == tokens


class _TokenLosses(torch.autograd.Function):
    """The cross-entropy [K] of tokens [K] under logits [K, V]: ``nn.functional.cross_entropy``, in chunks of tokens.

    With a large vocabulary the logits are the largest tensor of a batch. They stay in their own type; in forward and
    backward, only one chunk at a time is converted to float32.
    """

    @staticmethod
    def forward(ctx: Any, logits: Tensor, tokens: Tensor) -> Tensor:
        ctx.save_for_backward(logits, tokens)
        losses = [
            nn.functional.cross_entropy(_wide(chunk), of_chunk, reduction="none")
            for chunk, of_chunk in _chunks(logits, tokens)
        ]
        return torch.cat(losses)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        logits, tokens = ctx.saved_tensors
        chunks = _chunks(logits, tokens, gradients[0])
        return torch.cat([_logit_gradients(*chunk).to(logits.dtype) for chunk in chunks]), None


def _logit_gradients(logits: Tensor, tokens: Tensor, gradients: Tensor) -> Tensor:
    """(softmax - one-hot) * gradient, by operations that can be differentiated again."""
    gradients = gradients.unsqueeze(1)
    return (_wide(logits).softmax(1) * gradients).scatter_add(1, tokens.unsqueeze(1), -gradients)


def _chunks(logits: Tensor, *others: Tensor) -> Iterator[tuple[Tensor, ...]]:
    size = max(1, _CHUNK // logits.shape[1])
    return zip(*(tensor.split(size) for tensor in (logits, *others)), strict=True)


def _wide(logits: Tensor) -> Tensor:
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


@contextmanager
def _head_on_completions(model: nn.Module, labels: Tensor) -> Iterator[None]:
    """Within the block the head is applied only to the tokens that predict one with loss, to save compute and memory.

    An adapted head is applied to all tokens: its gradient sums must tell the samples apart.
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
