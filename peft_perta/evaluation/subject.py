"""Who is judged: a model with some adapters on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from ..data import Sample, encode_row
from ..errors import DataError


@dataclass(frozen=True)
class Subject:
    """Who is judged: a model with these adapters on (None: as they are), and how it is fed.

    Attributes:
        max_length: tokens kept per row, counted from the left.
    """

    model: nn.Module
    tokenizer: Any
    adapters: Sequence[str] | None = None
    batch_size: int = 32
    max_length: int = 1024
    show_progress_bar: bool = True

    def encode(self, rows: Sequence[Mapping], name: str) -> list[Sample]:
        """The rows as samples; ``name`` is what messages call them.

        Raises:
            DataError: there are none, or one is malformed; the message names the row.
        """
        if not rows:
            raise DataError(f"{name}: expected at least one row to evaluate on, found none")
        return [
            encode_row(row, self.tokenizer, max_length=self.max_length, where=f"{name}, row {number}")
            for number, row in enumerate(rows, start=1)
        ]
