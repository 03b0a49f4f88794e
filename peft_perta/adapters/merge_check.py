"""Compare a merged model with the base that has the same adapters stacked on it.

A merged model in 16 bits cannot hold the whole edit. What its dtype explains is measured, not guessed: PEFT merges the
stack in memory, its weights are rounded as the merged model's are, and that model must answer as the merged one does.
"""

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

TOLERANCE = 1e-3  # nats per token: two float32 models with the same weights differ by less

_NARROW = (torch.bfloat16, torch.float16)

Measured = tuple[Tensor, list[str]]  # (losses of the rows [N], greedy answers to the asked ones)


@dataclass(frozen=True)
class MergeCheck:
    """The merged model against the stacked one, on the same rows.

    Attributes:
        rows: number of rows that both answered.
        same_answers: number of rows with the same greedy answer.
        largest_difference: the largest difference between the losses of a row, in nats per token.
        unexplained_answers: number of rows whose answer differs from that of the stacked model with its weights rounded
            as the merged model's are.
        unexplained_difference: the largest difference between the losses of these two.
    """

    rows: int
    same_answers: int
    largest_difference: float
    unexplained_answers: int
    unexplained_difference: float

    @property
    def agrees(self) -> bool:
        """Whether the two are one model, up to the rounding of the stored weights and of float32 arithmetic."""
        return self.unexplained_answers == 0 and self.unexplained_difference <= TOLERANCE

    def __str__(self) -> str:
        text = (
            f"merged against stacked: {self.same_answers} of {self.rows} answers are the same, losses differ by "
            f"at most {self.largest_difference:.2g} nats per token"
        )
        if not self.agrees:
            return (
                f"{text}. They DISAGREE: beyond what rounding the merged weights explains, {self.unexplained_answers} "
                f"answers differ, and losses by up to {self.unexplained_difference:.2g} (expected 0, and at most "
                f"{TOLERANCE}); do not use the merged model"
            )
        explained = self.same_answers < self.rows or self.largest_difference > TOLERANCE
        return f"{text}, which rounding the merged weights explains" if explained else text


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
    model, tokenizer = load_base(str(merged), dtype=torch.float32)
    of_merged = _measure(model, tokenizer, rows, asked, [])
    dtypes = _stored_dtypes(model)
    model, tokenizer = load_base(model_name, dtype=torch.float32, revision=revision)
    directories = {f"adapter_{number}": directory for number, directory in enumerate(adapters)}
    stacked = attach_adapters(model, directories)
    with ExitStack() as strengths:
        for name, directory in directories.items():
            strengths.enter_context(adapter_strength(stacked, name, adapters[directory]))
        same, difference = _compare(of_merged, _measure(stacked, tokenizer, rows, asked, list(directories)))
        unexplained = len(asked) - same, difference
        if unexplained[0] or difference > TOLERANCE:
            rounded: Any = stacked.merge_and_unload(adapter_names=list(directories))
            for name, parameter in rounded.named_parameters():
                parameter.data = parameter.data.to(dtypes[name]).to(parameter.dtype)
            same_rounded, difference_rounded = _compare(of_merged, _measure(rounded, tokenizer, rows, asked, []))
            unexplained = len(asked) - same_rounded, difference_rounded
    return MergeCheck(len(asked), same, difference, *unexplained)


def _stored_dtypes(model: nn.Module) -> dict[str, torch.dtype]:
    """Parameter -> the narrowest type that holds its values exactly, which is no wider than the one of the files."""
    dtypes = {}
    for name, parameter in model.named_parameters():
        narrow = (dtype for dtype in _NARROW if torch.equal(parameter.to(dtype).to(parameter.dtype), parameter))
        dtypes[name] = next(narrow, parameter.dtype)
    return dtypes


def _compare(first: Measured, second: Measured) -> tuple[int, float]:
    """(number of answers that are the same, the largest difference between the losses of a row)."""
    same = sum(answer == other for answer, other in zip(first[1], second[1], strict=True))
    return same, float((first[0] - second[0]).abs().max())


def _measure(
    model: nn.Module, tokenizer: Any, rows: Sequence[Mapping], asked: list[Mapping], adapters: list[str]
) -> Measured:
    """The losses of the rows, and the answers to the asked ones."""
    subject = Subject(model, tokenizer, adapters, show_progress_bar=False)
    losses = losses_of(model, subject.encode(rows, "rows"), adapters=adapters)
    return losses, generate(subject, asked) if asked else []
