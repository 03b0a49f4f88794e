"""Tokenised samples and padded batches of them."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import DataError

IGNORED = -100  # the label that carries no loss, as in transformers


@dataclass(frozen=True)
class Sample:
    """One tokenised row: ``input_ids`` [T] and ``labels`` [T], the latter ``IGNORED`` where no loss is taken."""

    input_ids: Tensor
    labels: Tensor


@dataclass(frozen=True)
class Batch:
    """Right-padded samples: three [N, T] tensors, and where each sample stands in the list that it came from."""

    input_ids: Tensor
    attention_mask: Tensor
    labels: Tensor
    indices: list[int]

    def to(self, device: torch.device) -> Batch:
        return Batch(self.input_ids.to(device), self.attention_mask.to(device), self.labels.to(device), self.indices)


def batches(samples: list[Sample], batch_size: int) -> Iterator[Batch]:
    """Batches of samples of similar length, right-padded; every sample is in exactly one.

    Sorting by length wastes no compute on padding. The longest come first, so that a batch too large for the memory
    fails at once.
    """
    order = sorted(range(len(samples)), key=lambda i: -len(samples[i].input_ids))
    for start in range(0, len(order), batch_size):
        yield padded(samples, order[start : start + batch_size])


def padded(samples: list[Sample], indices: list[int]) -> Batch:
    """Those of the samples as one batch, in this order."""
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
    """SHA-256 of the samples' tokens and labels, in order: tells whether two runs saw the same data."""
    digest = hashlib.sha256()
    for sample in samples:
        for part in (sample.input_ids, sample.labels):
            digest.update(len(part).to_bytes(8, "little"))
            digest.update(part.to(torch.int64).numpy().astype("<i8").tobytes())
    return digest.hexdigest()


def checked_sample(input_ids: Tensor, labels: Tensor, max_length: int, where: str) -> Sample:
    if not bool((labels[1:] != IGNORED).any()):
        raise DataError(
            f"{where}: no token of the completion is left within max_length={max_length}; "
            "raise max_length, or shorten the prompt"
        )
    return Sample(input_ids, labels)
