"""Data in any accepted form -> tokenised samples."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from ..errors import DataError
from .encoding import encode_row
from .rows import read_rows
from .samples import IGNORED, Sample, checked_sample


def load_samples(
    data: Any,
    tokenizer: Any = None,
    *,
    max_length: int = 1024,
    max_samples: int | None = None,
    seed: int = 0,
    name: str = "data",
) -> list[Sample]:
    """Load data in any accepted form as tokenised samples.

    Args:
        data: a path to a JSON-lines file, a list of rows, a ``datasets.Dataset`` (of rows, or tokenised with
            ``input_ids`` and ``labels`` or ``completion_mask``), or a dataloader of batches ``{input_ids, labels[,
            attention_mask]}``.
        tokenizer: required for rows; tokenised data needs none.
        max_length: tokens to keep per sample, counted from the left.
        max_samples: if the set is larger, draw this many samples at random, in their original order.
        seed: the seed of that draw.
        name: the name of the set in error messages.

    Raises:
        DataError: the set is empty, or a row is malformed. The message names the row.
    """
    if isinstance(data, (str, Path)):
        name = f"{name} ({data})"
        data = read_rows(data)
    if data is None:
        raise DataError(f"{name}: expected a data set, found None")
    if not isinstance(data, Iterable):
        raise DataError(
            f"{name}: expected a path, a list of rows, a datasets.Dataset or a dataloader, found {type(data).__name__}"
        )
    samples: list[Sample] = []
    for index, item in enumerate(data):
        where = f"{name}, row {index + 1}"
        if not isinstance(item, Mapping):
            raise DataError(
                f"{where}: expected a mapping, found {type(item).__name__}; see load_samples for the accepted forms"
            )
        if "input_ids" in item:
            samples.extend(_tokenised(item, max_length, where))
        else:
            if tokenizer is None:
                raise DataError(f"{where} is text, which needs a tokenizer, found None; pass tokenizer=...")
            samples.append(encode_row(item, tokenizer, max_length=max_length, where=where))
    if not samples:
        raise DataError(f"{name} is empty; expected at least one row")
    if max_samples is not None and len(samples) > max_samples:
        generator = torch.Generator().manual_seed(seed)
        drawn = sorted(torch.randperm(len(samples), generator=generator)[:max_samples].tolist())
        samples = [samples[i] for i in drawn]
    return samples


def _tokenised(item: Mapping, max_length: int, where: str) -> Iterator[Sample]:
    """The samples of a tokenised row [T] or batch [N, T], without padding."""
    if "position_ids" in item or "cu_seq_lens_q" in item:
        raise DataError(
            f"{where}: packed batches hold several samples per row, expected one; turn packing and padding_free off"
        )
    if "labels" not in item and "completion_mask" not in item:
        raise DataError(f"{where}: expected 'labels' or 'completion_mask' beside 'input_ids', found neither")
    input_ids = torch.atleast_2d(torch.as_tensor(item["input_ids"], dtype=torch.long)).cpu()
    if "labels" in item:
        labels = torch.atleast_2d(torch.as_tensor(item["labels"], dtype=torch.long)).cpu()
    else:
        completion = torch.atleast_2d(torch.as_tensor(item["completion_mask"])).cpu()
        labels = torch.where(completion.bool(), input_ids, IGNORED)
    mask = torch.ones_like(input_ids)
    if item.get("attention_mask") is not None:
        mask = torch.atleast_2d(torch.as_tensor(item["attention_mask"], dtype=torch.long)).cpu()
    if not input_ids.shape == labels.shape == mask.shape:
        raise DataError(
            f"{where}: input_ids {tuple(input_ids.shape)}, labels {tuple(labels.shape)} and attention_mask "
            f"{tuple(mask.shape)} must have the same shape"
        )
    for row in range(len(input_ids)):
        is_token = mask[row].bool()
        yield checked_sample(
            input_ids[row][is_token][:max_length], labels[row][is_token][:max_length], max_length, where
        )
