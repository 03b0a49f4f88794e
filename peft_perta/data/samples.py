"""Tokenised samples, and padded batches of them."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..errors import DataError
from .notes import note

IGNORED = -100  # the label that carries no loss, as in transformers


@dataclass(frozen=True)
class Sample:
    """One tokenised row.

    Attributes:
        input_ids: [T].
        labels: [T]; ``IGNORED`` at tokens without loss.
        row: the number of the row, from 1; None for a sample that no set of rows was loaded for.
        left_out: how many tokens of the row were cut.
    """

    input_ids: Tensor
    labels: Tensor
    row: int | None = field(default=None, kw_only=True)
    left_out: int = field(default=0, kw_only=True)


@dataclass(frozen=True)
class Batch:
    """Right-padded samples.

    Attributes:
        input_ids: [N, T].
        attention_mask: [N, T]; 1 at tokens, 0 at padding.
        labels: [N, T]; ``IGNORED`` at padding and at tokens without loss.
        indices: the index of each sample in the list that it came from.
    """

    input_ids: Tensor
    attention_mask: Tensor
    labels: Tensor
    indices: list[int]

    def to(self, device: torch.device) -> Batch:
        """The batch with its tensors on a device."""
        return Batch(self.input_ids.to(device), self.attention_mask.to(device), self.labels.to(device), self.indices)


def batches(samples: list[Sample], batch_size: int) -> Iterator[Batch]:
    """Group samples of similar length into right-padded batches; every sample is in exactly one batch.

    Sorting by length saves compute on padding. The longest batch comes first, so that running out of memory happens
    at once.
    """
    order = sorted(range(len(samples)), key=lambda i: -len(samples[i].input_ids))
    for start in range(0, len(order), batch_size):
        yield padded(samples, order[start : start + batch_size])


def padded(samples: list[Sample], indices: list[int]) -> Batch:
    """The samples with these indices as one batch, in this order."""
    length = max(len(samples[index].input_ids) for index in indices)
    input_ids = torch.zeros(len(indices), length, dtype=torch.long)
    attention_mask = torch.zeros_like(input_ids)
    labels = torch.full_like(input_ids, IGNORED)
    for row, index in enumerate(indices):
        size = len(samples[index].input_ids)
        input_ids[row, :size] = samples[index].input_ids
        attention_mask[row, :size] = 1
        labels[row, :size] = samples[index].labels
    return Batch(input_ids, attention_mask, labels, indices)


def fingerprint(samples: list[Sample]) -> str:
    """SHA-256 of the samples' tokens and labels, in order; equal for two runs on the same data."""
    digest = hashlib.sha256()
    for sample in samples:
        for part in (sample.input_ids, sample.labels):
            digest.update(len(part).to_bytes(8, "little"))
            digest.update(part.to(torch.int64).numpy().astype("<i8").tobytes())
    return digest.hexdigest()


def check_disjoint(
    forget: list[Sample], retain: list[Sample], name: str = "the retain set", first: str = "the forget set"
) -> None:
    """Check that no sample of the forget set is in the retain set, or of the set ``first`` in the set ``name``.

    Raises:
        DataError: a sample is in both sets; the message numbers the rows of the second set.
    """
    forgotten = {fingerprint([sample]) for sample in forget}
    shared = [(number, s) for number, s in enumerate(retain, start=1) if fingerprint([s]) in forgotten]
    if shared and len(shared) == len(retain):
        raise DataError(
            f"every row of {name} is in {first}; expected two sets without a common row: give other rows than those of "
            f"{first}"
        )
    if shared:
        rows = sorted({sample.row or number for number, sample in shared})
        listed = ", ".join(map(str, rows[:10])) + (f" and {len(rows) - 10} more" if len(rows) > 10 else "")
        raise DataError(
            f"row{'s' if len(rows) > 1 else ''} {listed} of {name} {'are' if len(rows) > 1 else 'is'} also in "
            f"{first}; expected two sets without a common row: remove what they share from one of them"
        )


def note_left_out(samples: list[Sample], name: str, max_length: int) -> None:
    """Say how many tokens of how many rows were cut, if any.

    Args:
        samples: the samples of one set.
        name: the set's name.
        max_length: the tokens that are kept of a row.
    """
    cut = [sample for sample in samples if sample.left_out]
    if cut:
        tokens = sum(sample.left_out for sample in cut)
        note(
            f"{name}: {tokens:,} token{'s' if tokens > 1 else ''} of {_count_rows(cut)} of {_count_rows(samples)} "
            f"rows, those after the first {max_length:,} (max_length), are left out"
        )


def _count_rows(samples: list[Sample]) -> int:
    """How many rows the samples are of: several may be of one; one without a number is a row of its own."""
    numbers = [sample.row for sample in samples]
    return len({*numbers} - {None}) + numbers.count(None)


def checked_sample(input_ids: Tensor, labels: Tensor, max_length: int, where: str) -> Sample:
    """A sample of ids and labels [T], cut to ``max_length``.

    Raises:
        DataError: no token carries loss. The first token never does: no token before it predicts it.
    """
    kept = labels[:max_length]
    if not bool((kept[1:] != IGNORED).any()):
        raise DataError(
            f"{where}: no token of the completion is left within max_length={max_length}, expected at least one; "
            "raise max_length, or shorten the prompt"
        )
    return Sample(input_ids[:max_length], kept, left_out=len(labels) - len(kept))
