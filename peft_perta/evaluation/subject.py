"""The subject of an evaluation: a model with a stack of adapters on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from ..data import Sample, encode_row
from ..errors import DataError


@dataclass(frozen=True)
class Subject:
    """A model with these adapters on, and how rows are fed to it.

    Attributes:
        model: a causal language model, with or without PEFT adapters.
        tokenizer: the model's.
        adapters: names of the adapters that are on; None leaves the model's own choice.
        batch_size: rows per forward.
        max_length: tokens kept per row, counted from the left.
        show_progress_bar: show a bar for each pass over rows.
    """

    model: nn.Module
    tokenizer: Any
    adapters: Sequence[str] | None = None
    batch_size: int = 32
    max_length: int = 1024
    show_progress_bar: bool = True

    def encode(self, rows: Sequence[Mapping], name: str) -> list[Sample]:
        """The rows as samples; ``name`` is the set's name in messages.

        Raises:
            DataError: there are no rows, or one is malformed; the message names the row.
        """
        if not rows:
            raise DataError(f"{name}: expected at least one row to evaluate on, found none")
        return [
            encode_row(row, self.tokenizer, max_length=self.max_length, where=f"{name}, row {number}")
            for number, row in enumerate(rows, start=1)
        ]
