"""The subject of an evaluation: a model with a stack of adapters on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from ..data import Sample, encode_row, note_left_out
from ..errors import DataError
from ..model import distributed, row_length


@dataclass(frozen=True)
class Subject:
    """A model with these adapters on, and how rows are fed to it.

    Attributes:
        model: a causal language model, with or without PEFT adapters.
        tokenizer: the model's.
        adapters: names of the adapters that are on; None leaves the model's own choice.
        batch_size: the most rows per forward.
        max_length: tokens kept per row, counted from the left; None stands for 1024, or for the model's number of
            positions if that is less. It is a number from then on.
        show_progress_bar: show a bar for each pass over rows.

    Raises:
        ConfigError: the model is sharded.
    """

    model: nn.Module
    tokenizer: Any
    adapters: Sequence[str] | None = None
    batch_size: int = 32
    max_length: int | None = None
    show_progress_bar: bool = True

    def __post_init__(self) -> None:
        distributed.refuse_sharded(self.model)
        object.__setattr__(self, "max_length", row_length(self.model, self.max_length))

    def encode(self, rows: Sequence[Mapping], name: str) -> list[Sample]:
        """The rows as samples; ``name`` is the set's name in messages.

        Raises:
            DataError: there are no rows, or one is malformed; the message names the row.
        """
        if not rows:
            raise DataError(f"{name}: expected at least one row to evaluate on, found none")
        assert self.max_length is not None
        samples = [
            encode_row(row, self.tokenizer, max_length=self.max_length, where=f"{name}, row {number}")
            for number, row in enumerate(rows, start=1)
        ]
        note_left_out(samples, name.partition(":")[0], self.max_length)  # the same line for each measure of a set
        return samples
