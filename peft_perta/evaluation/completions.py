"""Losses and token scores of rows' completions, under any stack of adapters."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from ..data import Sample, batches, encode_row
from ..errors import DataError, NumericalError
from ..model import TokenScores, input_device, preserved, sample_losses, token_scores
from .subject import Subject


@dataclass(frozen=True)
class ScoredCompletion:
    """One row, read: its completion's mean token loss (nats, with the token that closes it), and every token of the
    completion but that last one, scored."""

    loss: float
    tokens: TokenScores


def score_completions(subject: Subject, rows: Sequence[Mapping], name: str = "rows") -> list[ScoredCompletion]:
    """A reading of each row's completion, in the order of the rows; the model goes back as it came.

    Raises:
        DataError: there are no rows, or one is malformed.
        NumericalError: a loss is not finite.
    """
    samples = subject.encode(rows, name)
    device = input_device(subject.model)
    readings: dict[int, ScoredCompletion] = {}
    bar = tqdm(total=len(samples), desc=name, unit="row", disable=not subject.show_progress_bar, leave=False)
    with bar, preserved(subject.model, subject.adapters), torch.no_grad():
        for batch in batches(samples, subject.batch_size):
            for index, scores in zip(batch.indices, token_scores(subject.model, batch.to(device)), strict=True):
                loss = -float(scores.log_probabilities.mean())
                if not math.isfinite(loss):
                    raise NumericalError(
                        f"{name}, row {index + 1}: the loss is {loss}; evaluate in float32 or bfloat16, or lower the "
                        "strength of the adapters"
                    )
                kept = len(scores.log_probabilities) - 1
                whole = (scores.log_probabilities, scores.standardised, scores.hits)
                readings[index] = ScoredCompletion(loss, TokenScores(*(part[:kept] for part in whole)))
            bar.update(len(batch.indices))
    return [readings[index] for index in range(len(samples))]


def row_losses(
    model: nn.Module,
    tokenizer: Any,
    rows: Sequence[Mapping],
    *,
    adapters: Sequence[str] | None = None,
    batch_size: int = 32,
) -> Tensor:
    """The completions' mean token losses, [N], in the order of the rows."""
    samples = [encode_row(row, tokenizer, where=f"row {number}") for number, row in enumerate(rows, start=1)]
    return losses_of(model, samples, adapters=adapters, batch_size=batch_size)


def losses_of(
    model: nn.Module, samples: list[Sample], *, adapters: Sequence[str] | None = None, batch_size: int = 32
) -> Tensor:
    """The samples' losses [N], float32 on the CPU, in their own order.

    Raises:
        DataError: there are no samples.
    """
    if not samples:
        raise DataError("expected at least one row to evaluate on, found none")
    device = input_device(model)
    losses = torch.empty(len(samples))
    with preserved(model, adapters), torch.no_grad():
        for batch in batches(samples, batch_size):
            losses[batch.indices] = sample_losses(model, batch.to(device)).float().cpu()
    return losses
