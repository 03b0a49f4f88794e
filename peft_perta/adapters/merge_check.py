"""Compare a merged model with the base that has the same adapters stacked on it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..evaluation import Subject, generate, losses_of
from ..model import adapter_strength, attach_adapters, load_base


@dataclass(frozen=True)
class MergeCheck:
    """The merged model against the stacked one, on the same rows.

    Attributes:
        rows: number of rows that both answered.
        same_answers: number of rows with the same greedy answer.
        largest_difference: the largest difference between the losses of a row, in nats per token.
    """

    rows: int
    same_answers: int
    largest_difference: float

    def __str__(self) -> str:
        return (
            f"merged against stacked: {self.same_answers} of {self.rows} answers are the same, losses differ by "
            f"at most {self.largest_difference:.2g} nats per token"
        )


def compare_merged(
    model_name: str,
    adapters: Mapping[str, float],
    merged: str | Path,
    rows: Sequence[Mapping],
    *,
    revision: str | None = None,
    answered: int = 8,
) -> MergeCheck:
    """Answer rows and take their losses with the merged model and with the stacked one, both in float32.

    Args:
        model_name: the base, as a directory or a hub name.
        adapters: adapter directory -> strength.
        merged: the directory that ``merge_adapters`` wrote from these.
        rows: the rows to compare on.
        revision: revision of a hub model.
        answered: how many of the rows to answer.

    Raises:
        DataError: a row is malformed, or there is none.
    """
    asked = [row for row in rows if "text" not in row][:answered]
    losses, answers = _measure(*load_base(str(merged), dtype=torch.float32), rows, asked, [])
    base, tokenizer = load_base(model_name, dtype=torch.float32, revision=revision)
    directories = {f"adapter_{number}": directory for number, directory in enumerate(adapters)}
    model = attach_adapters(base, directories)
    with ExitStack() as strengths:
        for name, directory in directories.items():
            strengths.enter_context(adapter_strength(model, name, adapters[directory]))
        stacked_losses, stacked_answers = _measure(model, tokenizer, rows, asked, list(directories))
    same = sum(answer == stacked for answer, stacked in zip(answers, stacked_answers, strict=True))
    return MergeCheck(len(answers), same, float((losses - stacked_losses).abs().max()))


def _measure(
    model: nn.Module, tokenizer: Any, rows: Sequence[Mapping], asked: list[Mapping], adapters: list[str]
) -> tuple[Tensor, list[str]]:
    """(losses of the rows [N], greedy answers to the asked ones)."""
    subject = Subject(model, tokenizer, adapters, show_progress_bar=False)
    losses = losses_of(model, subject.encode(rows, "rows"), adapters=adapters)
    return losses, generate(subject, asked) if asked else []
